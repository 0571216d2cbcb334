"""Gradients that are born low-rank: GaLore without the gradient.

GaLore forms G [m, n] and keeps R = PᵀG [r, n]. But of y = x W the product rule gives R at once, (xP)ᵀ dy, at r/m of the
cost and memory. Here each target weight becomes a node whose backward pass returns R in place of G, and the update
α P N is added layer by layer, so that no array of a stacked weight's size is ever made. Every `gap` steps one more
pass, `refresh`, turns the basis: the cotangent of P is defined as G GᵀP = xᵀ(dy (dyᵀ(xP))), a step of subspace
iteration, again without G.

The results are those of `galore` (mode "galore", method "power"); the state is a `GaLoreState` as well.

Reference:
    Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection".
    Torroba-Hennigen et al. 2025, "On the Duality between Gradient Transformations and Adapters".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxml.axes import Array, Float, wide
from jaxml.linear import vary, varying_axes
from jaxml.optim import basis, packed, refresh
from jaxml.optim import inner as inners
from jaxml.optim import rounding as rounds
from jaxml.optim.chain import Pending, optimizer
from jaxml.optim.galore import GaLoreState, Options, TargetState, refreshed, wrap
from jaxml.optim.targets import Rank


class Subspace(NamedTuple):
    """What `subspace` returns: four pure functions."""

    init: Callable[[Any], GaLoreState]
    value_and_grad: Callable[..., Callable]
    refresh: Callable[..., Callable]
    update: Callable[[Any, GaLoreState, Any], tuple[Any, GaLoreState]]


def subspace(
    inner: optax.GradientTransformation,
    *,
    rank: Rank = 128,
    scale: float = 0.25,
    targets=None,
    side: str = "auto",
    moments: str = "rotate",
    basis_dtype: str = "float32",
    rounding: str = "auto",
    seed: int = 0,
) -> Subspace:
    """GaLore whose backward pass makes the projected gradients directly.

    A step, jitted with `params` and `state` donated:
    ```python
    method = subspace(optax.adam(1e-3), rank=128)
    state = method.init(params)
    def step(params, state, batch):
        loss, grads = method.value_and_grad(loss_fn)(params, state, batch)
        return *method.update(grads, state, params), loss
    def refresh(params, state, batch):              # every 200 steps or so, and a few times at the beginning
        return method.refresh(loss_fn)(params, state, batch)
    ```

    `loss_fn(params, ...)` multiplies with its weights through `jaxml.weights.dot`, as the decoder does; at targets it
    is given weight nodes. Gradients are trees like the parameters, with R at targets: they can be summed over small
    batches and averaged over devices before `update`, which costs r/m of what it costs for G.

    Args:
        inner: any Optax optimizer. It sees R at targets and whole gradients elsewhere.
        rank, scale, targets, side: as in `galore`; side "full" is not there. Targets are [..., in, out] and used by
            `dot` once in the loss; a weight may be int8 (`packed.pack(w, "int8")`, as in Q-GaLore).
        moments: at a refresh, as in `galore`.
        basis_dtype: as in `galore`.
        rounding: of updated weights in two bytes or int8: "nearest", "stochastic", or "auto" (stochastic).
        seed: of the first basis and of the rounding.

    Returns:
        - init(params): the state.
        - value_and_grad(loss, has_aux=False): a function of (params, state, *args) that returns (value, gradients).
        - refresh(loss, axis_name=None, has_aux=False): a function of (params, state, *args) that returns the state with
          bases turned by one step of subspace iteration. Inside `jax.shard_map`, `axis_name` names the axes that the
          batch is spread over.
        - update(gradients, state, params): (params, state).

    Raises:
        ValueError: as `galore`; a side or a rounding that does not exist.

    Example:
        >>> from jaxml.weights import dot
        >>> method = subspace(optax.adam(1e-2), rank=4)
        >>> params, x = {"w": jnp.ones((64, 32))}, jnp.ones((8, 64))
        >>> state = method.init(params)
        >>> loss, grads = method.value_and_grad(lambda p, x: jnp.mean(dot(x, p["w"]) ** 2))(params, state, x)
        >>> grads["w"].shape
        (4, 32)
        >>> params, state = method.update(grads, state, params)

    Reference:
        Torroba-Hennigen et al. 2025, "On the Duality between Gradient Transformations and Adapters".
    """
    if isinstance(inner, Pending):
        raise ValueError("subspace: the inner optimizer is not a projection without one itself, got one.")
    if side == "full":
        raise ValueError("subspace: side is one of auto, std, reverse_std, left, right, got 'full'. galore has it.")
    if rounding not in rounds.ROUNDING:
        raise ValueError(f"subspace: rounding is one of {', '.join(rounds.ROUNDING)}, got {rounding!r}.")
    options = Options(
        rank=rank, gap=1, scale=scale, targets=targets, side=side, moments=moments, spread=False,
        basis_dtype=basis_dtype, seed=seed,
    )  # fmt: skip
    inner = optimizer("subspace", inner)

    def init(params) -> GaLoreState:
        state = wrap(inner, options).init(jax.tree.map(_like, params, is_leaf=packed.is_packed))
        orthonormal = lambda b: packed.pack_like(_orthonormal(packed.unpack(b)), b)
        first = lambda s: dataclasses.replace(s, basis=tuple(map(orthonormal, s.basis)))
        is_target = lambda s: isinstance(s, TargetState)
        return state._replace(targets=jax.tree.map(first, state.targets, is_leaf=is_target))

    def value_and_grad(loss: Callable, has_aux: bool = False) -> Callable:
        def run(params, state: GaLoreState, *args, **kwargs):
            leaves, tree, states = _flat(params, state)
            given = [w if s is None else jnp.zeros(s.target.low_shape, wide(w.dtype)) for w, s in zip(leaves, states)]

            def total(given):
                put = lambda w, s, c: c if s is None else Node(w, s.basis[0], c, s.target.side, "gradient", ())
                return loss(tree.unflatten(map(put, leaves, states, given)), *args, **kwargs)

            value, grads = jax.value_and_grad(total, has_aux=has_aux)(given)
            return value, tree.unflatten(grads)

        return run

    def turn(loss: Callable, axis_name: str | tuple[str, ...] | None = None, has_aux: bool = False) -> Callable:
        axes = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

        def run(params, state: GaLoreState, *args, **kwargs) -> GaLoreState:
            leaves, tree, states = _flat(params, state)
            given = [
                None if s is None else packed.unpack(s.basis[0]).astype(wide(w.dtype)) for w, s in zip(leaves, states)
            ]

            def total(given):
                put = lambda w, s, p: w if s is None else Node(w, p, None, s.target.side, "refresh", axes)
                out = loss(tree.unflatten(map(put, leaves, states, given)), *args, **kwargs)
                return out[0] if has_aux else out

            turned = jax.grad(total)(given)
            schedule = refresh.Schedule.of([s and s.target for s in states], options)
            names = tree.unflatten([jnp.zeros(()) for _ in leaves])  # only their paths count
            new, inner_state = refreshed(inner, schedule, names, state, turned, {}, products=True)
            return state._replace(targets=tree.unflatten(new), inner=inner_state)

        return run

    def update(grads, state: GaLoreState, params, **extra) -> tuple[Any, GaLoreState]:
        leaves, tree, states = _flat(params, state)
        low, found = [g.astype(wide(g.dtype)) for g in tree.flatten_up_to(grads)], [s and s.target for s in states]
        bases = [s and tuple(packed.unpack(b) for b in s.basis) for s in states]
        coordinates = [() if s is None else s.coordinates for s in states]
        weights = [packed.unpack(w) for w in leaves]
        new, decay, inner_state = inners.update(
            inner, found, tree, low, state.inner, weights, coordinates, bases, extra
        )
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), len(leaves))
        out = list(states)
        for i, (w, s) in enumerate(zip(leaves, states)):
            if s is None:
                leaves[i], out[i] = optax.apply_updates(w, new[i]), optax.MaskedNode()
                continue
            leaves[i] = _moved(w, s, scale, new[i], decay[i], rounding, keys[i])
            if not isinstance(s.coordinates, tuple):
                out[i] = dataclasses.replace(s, coordinates=s.coordinates + new[i])
        step = optax.safe_increment(state.step)
        return tree.unflatten(leaves), GaLoreState(step, tree.unflatten(out), inner_state, ())

    return Subspace(init, value_and_grad, turn, update)


def _flat(params: Any, state: GaLoreState) -> tuple[list[Any], Any, list[TargetState | None]]:
    """(leaves, their tree, the state of each leaf that is a target)."""
    leaves, tree = jax.tree.flatten(params, is_leaf=packed.is_packed)
    states = tree.flatten_up_to(state.targets)
    return leaves, tree, [s if isinstance(s, TargetState) else None for s in states]


def _like(w: Array | packed.Packed) -> Any:
    """What stands for a weight where only its shape counts."""
    return jax.ShapeDtypeStruct(w.shape, w.dtype) if packed.is_packed(w) else w


def _orthonormal(p: Float[Array, "... m r"]) -> Array:
    return jax.lax.map(basis.orthonormal, p.reshape(-1, *p.shape[-2:])).reshape(p.shape)


# ---- the update -------------------------------------------------------------------------------------


def _moved(w, state: TargetState, scale: float, new: Array, decay: Array | None, rounding: str, key: Array):
    """W + scale · P N + c W, one matrix after the other, so that no array of the whole stack's size is made."""
    target = state.target
    one = dataclasses.replace(target, shape=target.shape[-2:], reduction=(0,), output=(1,))
    flat = functools.partial(jax.tree.map, lambda a: a.reshape(target.count, *a.shape[len(target.batch) :]))
    low, bases = flat(new), flat(state.basis)

    def move(n, weights):
        this = lambda tree: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, n, keepdims=False), tree)
        old = this(weights)
        before = packed.unpack(old).astype(wide(w.dtype))
        moved = before + scale * one.lift([packed.unpack(b) for b in this(bases)], this(low).astype(before.dtype))
        moved = moved if decay is None else moved + decay.reshape(-1, 1, 1)[0] * before
        moved = _narrowed(moved, old, rounding, jax.random.fold_in(key, n))
        return jax.tree.map(lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, n, 0), weights, moved)

    moved = jax.lax.fori_loop(0, target.count, move, flat(w))
    return jax.tree.map(lambda a: a.reshape(*target.batch, *a.shape[1:]), moved)


def _narrowed(x: Array, old: Array | packed.Packed, rounding: str, key: Array) -> Array | packed.Packed:
    """x in the form of the weight that it replaces."""
    if packed.is_packed(old):
        return old.pack_like(x, None if rounding == "nearest" else key)
    if rounds.rule(rounding, old.dtype) == "stochastic":
        return rounds.stochastic(x, old.dtype, key)
    return x.astype(old.dtype)


# ---- the weight node --------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Node:
    """A weight node (`jaxml.weights`) whose gradient is R (what="gradient") or G GᵀP (what="refresh")."""

    weight: Any  # an array, or `packed.Packed`
    basis: Any  # [..., m or n, r], an array or `packed.Packed`
    coordinates: Float[Array, "..."] | None  # zeros of R's shape, to take the gradient by
    side: str = dataclasses.field(metadata=dict(static=True))
    what: str = dataclasses.field(metadata=dict(static=True))
    axes: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def matmul(self, x: Array, transpose: bool = False) -> Array:
        if transpose:
            raise ValueError("subspace: a target multiplies as x·w, got x·wᵀ. Leave tables and heads out of targets.")
        if len(self.shape) != 2:
            raise ValueError(f"subspace: a target is a matrix [in, out] where it is used, got {self.shape}.")
        by = self.coordinates if self.what == "gradient" else self.basis
        by = vary(by, varying_axes(x, by))  # summed over devices behind this, as any gradient is
        basis = packed.unpack(self.basis) if self.what == "gradient" else None
        y = _product(self.side, self.what, self.axes, x.reshape(-1, x.shape[-1]), self.weight, basis, by)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def dense(self) -> Array:
        return packed.unpack(self.weight)

    def take(self, ids: Array) -> Array:
        raise ValueError("subspace: a target multiplies as x·w, got rows taken. Leave tables out of targets.")

    def astype(self, dtype: Any) -> "Node":
        """Products are in x's dtype whatever the weight's is."""
        return self

    def __getattr__(self, name: str):
        raise AttributeError(
            f"subspace: the loss multiplies with its targets by jaxml.weights.dot(x, w), got w.{name}. "
            "Write dot, or leave this weight out of targets."
        )

    def __rmatmul__(self, x: Array) -> Array:
        return self.matmul(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(side, what, axes, x: Float[Array, "T m"], weight, basis, by) -> Float[Array, "T n"]:
    return jnp.matmul(x, packed.unpack(weight).astype(x.dtype))


def _forward(side, what, axes, x, weight, basis, by):
    y = _product(side, what, axes, x, weight, basis, by)
    if what == "gradient" and side == "left":  # of x only its projection is needed again
        return y, (_times(x, basis).astype(x.dtype), weight, None)
    return y, (x, weight, basis if what == "gradient" else by)


def _backward(side, what, axes, residuals, dy):
    x, weight, basis = residuals
    dx = jnp.matmul(dy, packed.unpack(weight).astype(dy.dtype).T)
    if what == "gradient":
        by = _times(x.T, dy) if side == "left" else _times(x.T, _times(dy, basis).astype(dy.dtype))
    else:
        a, b = (x, dy) if side == "left" else (dy, x)  # G is aᵀb seen from the basis's side
        low = _times(b.T, _times(a, basis).astype(a.dtype))  # GᵀP
        low = jax.lax.pmean(low, axes) if axes else low
        by = _times(a.T, _times(b, low / _largest(low)).astype(a.dtype))  # of any size: only directions count
        by = vary(jax.lax.pmean(by, axes), varying_axes(x)) if axes else by
        by = by.astype(basis.dtype)
    return dx, None, None, by


_product.defvjp(_forward, _backward)


def _times(a: Array, b: Array) -> Array:
    """a · b in a's dtype, summed in float32 or wider."""
    return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _largest(a: Array) -> Array:
    largest = jnp.max(jnp.abs(a))
    return jnp.where(largest > 0, largest, 1)
