"""GaLore: any Optax optimizer, run on gradients projected to a low rank.

For each target the gradient G [m, n] becomes R = PᵀG [r, n] (or G Q, or PᵀG Q), the inner optimizer makes N of R with
moments of R's shape, and the update is scale · P N. Every `gap` steps the basis P follows the gradient.

Reference:
    Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", algorithm 2.
    Differences from the authors' code: the sign of a singular vector is canonical, so that a run can be repeated;
    moments are rotated into the new basis unless `moments="carry"`; bases are refreshed by turns; any leading axes.
"""

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxml.axes import Array, Float, Int, wide
from jaxml.optim import basis, modes, moments, packed, refresh
from jaxml.optim import inner as inners
from jaxml.optim.chain import Pending, optimizer, pending
from jaxml.optim.plain import plainly
from jaxml.optim.targets import DimensionNumbers, Rank, Target, check_mesh, find


def galore(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: Rank | None = None,
    gap: int = 200,
    scale: float | None = None,
    targets=None,
    side: str | None = None,
    method: str | None = None,
    moments: str | None = None,
    mode: str = "galore",
    spread: bool = True,
    adaptive: float | None = None,
    basis_dtype: str = "float32",
    dims: DimensionNumbers | dict | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore around an Optax optimizer, or in front of one in a chain.

    Wrapper and chain are the same to the last bit:
    ```python
    galore(optax.adam(1e-3), rank=128)
    optax.chain(galore(rank=128), adam(1e-3))        # adam of jaxml.optim, or aware(any optimizer)
    jaxml.optim.chain(galore(rank=128), optax.adam(1e-3))
    ```

    Members of a chain before it see whole gradients (clipping), members after the optimizer act in full space (weight
    decay, learning rate). Without an optimizer that knows it (a stock `optax.adam` in a stock `optax.chain`) it emits
    scale · P PᵀG in full shape and warns that no memory is saved.

    Args:
        inner: any Optax optimizer. Decoupled weight decay inside it (AdamW's, Lion's) acts in full space, as in the
            authors' code; optimizers that do more with the weights (Adafactor, LAMB, schedule-free) are shown them in
            the basis, and decay those: put `optax.add_decayed_weights` behind them.
        rank: of the projected gradients: a number, a share of each matrix's shorter side (in (0, 1)), a function of
            (path, shape), or a mapping from patterns of paths to either. 128 where None (256 in the mode "apollo", 1
            in "apollo-mini").
        gap: steps between two refreshes of a basis.
        scale: α, the factor of the update; 0.25 where None (1 in the mode "apollo", 128 in "apollo-mini").
        targets: which leaves: regular expressions searched in the path ("layers/attn/q/kernel"), or a function of
            (path, shape). None takes every leaf of two axes or more that is wider than the rank on both sides, but
            embeddings, output heads, norms, biases and scales.
        side: of each matrix's basis: "auto" (the smallest state), "std" (the authors': the shorter side is projected),
            "reverse_std", "left" (the input axis), "right" (the output axis), "full" (both). "auto" where None, in
            the modes of APOLLO "std".
        method: "power" (one warm-started step of subspace iteration), "rsvd", "svd", or "random" (drawn anew every gap
            steps and never kept, as in Flora and APOLLO). "power" where None, "random" in the modes of APOLLO.
        moments: at a refresh: "rotate" into the new basis (LDAdam), "carry" unchanged (the GaLore paper), "reset" to 0.
        mode: "galore", "fira", "apollo" or "apollo-mini"; `jaxml.optim.modes` has their formulas.
        spread: matrices take turns over the gap, so that no step refreshes all; all at once where False.
        adaptive: where given, a matrix's gap doubles when the overlap of successive bases, ‖PᵀP'‖² / r, averages at
            least this over five refreshes (Q-GaLore takes 0.4 of a similar measure).
        basis_dtype: "float32", "bfloat16", "int8" or "int4" (in blocks of 256).
        dims: `DimensionNumbers` (or those of `optax.contrib.muon`) for all targets, a mapping from patterns to them, or
            a function of (path, shape): which axes make the matrix; all others are batch axes. A tree like the
            parameters and a function of them do as well, as muon takes them. The last two where None, but for Flax's
            attention kernels (query/kernel, …, out/kernel of three axes), which are known by name.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the axes that the batch is spread over. Gradients are then
            those of each device, and it is the projected ones that are averaged: r/m of the bytes; a whole matrix is
            averaged only when its basis is refreshed. Mode "galore" only. (Under `check_vma=True` JAX sums gradients of
            replicated parameters by itself: take them at `jax.lax.pcast(params, axis_name, to="varying")`.)
        seed: of random directions.

    Raises:
        TypeError: `inner` is no transformation.
        ValueError: an option that does not exist; at `init`, no leaf that matches or a rank out of range.
        NotImplementedError: parameters are spread over a mesh axis of type Explicit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxml.optim import adam
        >>> params = {"layers": jnp.zeros((3, 64, 32)), "bias": jnp.zeros(32)}
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), galore(rank=8), adam(1e-3))
        >>> state = tx.init(params)
        >>> [leaf.shape for leaf in (state[2].inner[0].mu["layers"], state[2].targets["layers"].basis[0])]
        [(3, 8, 32), (3, 64, 8)]

    Reference:
        Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection".
    """
    options = Options(
        rank=rank, gap=gap, scale=scale, targets=targets, side=side, method=method, moments=moments, mode=mode,
        spread=spread, adaptive=adaptive, basis_dtype=basis_dtype, dims=dims, axis_name=axis_name, seed=seed,
    )  # fmt: skip
    if isinstance(inner, Pending):
        raise ValueError("galore: the inner optimizer is not a projection without one itself, got a galore.")
    if inner is not None:
        return wrap(inner, options)
    alone = wrap(optax.identity(), options)

    def init(params):
        if options.mode != "galore":
            raise ValueError(f"galore: mode {options.mode!r} has an optimizer inside, got none. {_SPELLINGS}")
        warnings.warn(f"galore: no aware optimizer follows, so that no memory is saved. {_SPELLINGS}", stacklevel=2)
        return alone.init(params)

    return pending("galore", optax.GradientTransformationExtraArgs(init, alone.update), lambda tx: wrap(tx, options))


_SPELLINGS = "Write optax.chain(galore(...), jaxml.optim.adam(...)) or galore(optax.adam(...), ...)."


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetState:
    """What is kept of one target beside the inner optimizer's state."""

    basis: tuple[Any, ...]  # (P,), (Q,) or (P, Q), [*batch, m or n, r] each; () where it is drawn anew in every step
    turns: refresh.Turns | tuple  # when to refresh, where the gap adapts; else ()
    norm: Float[Array, "..."] | tuple  # [*batch], of the last residual, where the mode limits its growth; else ()
    coordinates: Float[Array, "..."] | tuple  # Σ N, of R's shape, where the inner optimizer keeps parameters; else ()
    target: Target = dataclasses.field(metadata=dict(static=True))


class GaLoreState(NamedTuple):
    """State of `galore`."""

    step: Int[Array, ""]
    targets: Any  # the tree of the parameters with a `TargetState` at each target, `optax.MaskedNode()` elsewhere
    inner: Any  # the inner optimizer's, of R at each target and of the whole leaf elsewhere
    probe: Any  # the same on gradients of 1, where the mode needs the learning rate; else ()


@dataclasses.dataclass(frozen=True)
class Options:
    """What `galore` was called with, beside the inner optimizer; None is the mode's own (`modes.DEFAULTS`)."""

    rank: Any = None
    gap: int = 200
    scale: float | None = None
    targets: Any = None
    side: str | None = None
    method: str | None = None
    moments: str | None = None
    mode: str = "galore"
    spread: bool = True
    adaptive: float | None = None
    basis_dtype: str = "float32"
    dims: Any = None
    axis_name: str | tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        _one_of("mode", self.mode, modes.MODES)
        for name, default in zip(("rank", "scale", "method", "moments", "side"), modes.DEFAULTS[self.mode]):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        _one_of("method", self.method, basis.METHODS)
        _one_of("moments", self.moments, moments.KINDS)
        _one_of("basis_dtype", self.basis_dtype, refresh.DTYPES)
        if not isinstance(self.gap, int) or self.gap < 1:
            raise ValueError(f"galore: gap is a number of steps, at least 1, got {self.gap!r}.")
        if self.mode != "galore" and self.side == "full":
            raise ValueError(f"galore: side 'full' goes with mode 'galore' only, got {self.mode!r}.")
        if self.mode != "galore" and self.axis_name is not None:
            raise ValueError(
                f"galore: axis_name goes with mode 'galore' only, got {self.mode!r}, which needs whole gradients. "
                "Average them before with jax.lax.pmean."
            )
        if isinstance(self.adaptive, bool) or (self.adaptive is not None and not 0 < self.adaptive <= 1):
            raise ValueError(f"galore: adaptive is an overlap in (0, 1], got {self.adaptive!r}.")
        if self.method == "random" and self.adaptive is not None:
            raise ValueError("galore: a random basis has no overlap for the gap to follow. Leave adaptive out.")

    def find(self, tree: Any) -> list[Target | None]:
        return find(tree, rank=self.rank, targets=self.targets, side=self.side, dims=self.dims)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"galore: {name} is one of {', '.join(allowed)}, got {value!r}.")


def wrap(inner: optax.GradientTransformation, options: Options) -> optax.GradientTransformationExtraArgs:
    """The transformation that `galore(inner, ...)` is."""
    inner = optimizer("galore", inner)
    needs_rate = options.mode != "galore"

    def init(params) -> GaLoreState:
        leaves, tree = jax.tree.flatten(params)
        targets = options.find(params)
        schedule = refresh.Schedule.of(targets, options)
        zeros = [leaf.astype(wide(leaf.dtype)) if t is None else _zeros(t, leaf) for t, leaf in zip(targets, leaves)]
        low = tree.unflatten(zeros)
        averages = inners.keeps_parameters(inner, low, targets)
        states = []
        for i, target in enumerate(targets):
            if target is None:
                states.append(optax.MaskedNode())
                continue
            first = refresh.first(target, options, i, zeros[i].dtype)
            norm = jnp.zeros(target.batch, jnp.float32) if needs_rate else ()
            states.append(TargetState(first, schedule.init(i), norm, zeros[i] if averages else (), target))
        probe = modes.probe(inner, low) if needs_rate else ()
        state = GaLoreState(jnp.zeros((), jnp.int32), tree.unflatten(states), inner.init(low), probe)
        _say_what_is_unknown(options, state.inner, params, targets)
        return state

    def update(updates, state: GaLoreState, params=None, **extra):
        grads, tree = jax.tree.flatten(updates)
        check_mesh("galore", grads)
        targets = [getattr(s, "target", None) for s in tree.flatten_up_to(state.targets)]
        schedule = refresh.Schedule.of(targets, options)
        matrices = [None if t is None else t.matrices(g) for t, g in zip(targets, grads)]
        states, inner_state = refreshed(inner, schedule, updates, state, matrices, extra)
        bases = [None if t is None else refresh.bases(schedule, i, state.step, states[i].basis, wide(grads[i].dtype))
                 for i, t in enumerate(targets)]  # fmt: skip
        low = [g.astype(wide(g.dtype)) if t is None else t.project(b, x)
               for t, g, b, x in zip(targets, grads, bases, matrices)]  # fmt: skip
        if options.axis_name is not None:
            low = jax.lax.pmean(low, options.axis_name)
        weights = None if params is None else tree.flatten_up_to(params)
        coordinates = [() if t is None else s.coordinates for t, s in zip(targets, states)]
        new, decay, inner_state = inners.update(
            inner, targets, tree, low, inner_state, weights, coordinates, bases, extra
        )
        rates, probe = [None] * len(grads), ()
        if needs_rate:
            rates, probe = modes.rates(inner, tree.unflatten(low), state.probe, extra)
        out = list(new)
        for i, target in enumerate(targets):
            if target is None:
                out[i] = new[i].astype(grads[i].dtype)
                continue
            s = states[i]
            u, norm = modes.apply(
                options.mode, options.scale, target, bases[i], matrices[i], low[i], new[i], rates[i], s.norm
            )
            if decay[i] is not None:
                u = u + decay[i] * target.matrices(weights[i]).astype(u.dtype)
            moved = () if isinstance(s.coordinates, tuple) else s.coordinates + new[i]
            states[i] = dataclasses.replace(s, norm=norm, coordinates=moved)
            out[i] = target.restore(u.astype(grads[i].dtype))
        step = optax.safe_increment(state.step)
        return tree.unflatten(out), GaLoreState(step, tree.unflatten(states), inner_state, probe)

    return plainly(optax.GradientTransformationExtraArgs(init, update))


def refreshed(
    tx: optax.GradientTransformationExtraArgs,
    schedule: refresh.Schedule,
    updates: Any,
    state: GaLoreState,
    matrices: list[Array | None],
    extra: dict[str, Any],
    products: bool = False,
) -> tuple[list[Any], Any]:
    """(the targets' states, the inner state) after the refreshes that are due in this step; see `refresh.refresh`."""
    paths = [path for path, _ in jax.tree.leaves_with_path(updates)]
    states = jax.tree.structure(updates).flatten_up_to(state.targets)
    inner, tree = jax.tree.flatten(state.inner, is_leaf=packed.is_packed)
    shapes = {path: t.low_shape for path, t in zip(paths, schedule.targets) if t is not None}

    def decays() -> dict[int, float]:
        leaves, tree = jax.tree.flatten(updates)
        low = [x if t is None else jnp.zeros((1,) * len(t.low_shape)) for x, t in zip(leaves, schedule.targets)]
        return moments.decays_of(tx, tree.unflatten(low), extra)

    found = moments.find(state.inner, shapes, decays)
    kept: list[refresh.Kept | None] = []
    for path, target, s in zip(paths, schedule.targets, states):
        if target is None:
            kept.append(None)
            continue
        values = [inner[m.leaf] for m in found[path]] + ([] if isinstance(s.coordinates, tuple) else [s.coordinates])
        flat = lambda a, t=target: a.reshape(t.count, *a.shape[len(t.batch) :])
        kept.append(jax.tree.map(flat, refresh.Kept(s.basis, values, s.turns)))
    moved = moments.Moment(-1, squared=False)  # the coordinates, after the moments
    kinds = [None if k is None else [*found[p], moved][: len(k.moments)] for p, k in zip(paths, kept)]
    for i, new in enumerate(refresh.refresh(schedule, state.step, matrices, kept, kinds, products)):
        if new is None:
            continue
        target = schedule.targets[i]
        new = jax.tree.map(lambda a, t=target: a.reshape(*t.batch, *a.shape[1:]), new)
        for moment, value in zip(found[paths[i]], new.moments):
            inner[moment.leaf] = value
        coordinates = states[i].coordinates if isinstance(states[i].coordinates, tuple) else new.moments[-1]
        states[i] = dataclasses.replace(states[i], basis=new.basis, turns=new.turns, coordinates=coordinates)
    return states, tree.unflatten(inner)


def _say_what_is_unknown(options: Options, inner_state: Any, params: Any, targets: list[Target | None]) -> None:
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    names = moments.unknown(inner_state, {p: t.low_shape for p, t in zip(paths, targets) if t is not None})
    if names and options.moments != "carry":
        warnings.warn(
            f"galore: the inner optimizer's state has arrays called {', '.join(names)}, which are not known to be "
            "moments: a refresh leaves them as they are. moments='carry' does so with all, and says nothing.",
            stacklevel=4,
        )


def _zeros(target: Target, leaf: Array) -> Array:
    """Of R's shape."""
    return jnp.zeros(target.low_shape, wide(leaf.dtype))
