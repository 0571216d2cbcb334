"""LoRA as a gradient transformation on dense weights: no change to the model, any optimizer.

The state holds A [m, r] and B [r, n] of each target and the inner optimizer's state for them. From the dense gradient G
follow dA = s G Bᵀ and dB = s AᵀG; the inner optimizer makes A', B' of them, and the update is s (A'B' − A B), so that
W_t = W_0 + s A_t B_t in every step.

Reference:
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxml.axes import Array, Float, Int, wide
from jaxml.optim import rounding as rounds
from jaxml.optim.chain import Pending, optimizer, pending
from jaxml.optim.plain import plainly
from jaxml.optim.targets import Rank, Target, check_mesh, find

ROUNDING = (*rounds.ROUNDING, "base")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """Of one target."""

    a: Float[Array, "... m r"]
    b: Float[Array, "... r n"]
    target: Target = dataclasses.field(metadata=dict(static=True))


class LoRAState(NamedTuple):
    """State of `lora`."""

    step: Int[Array, ""]
    factors: Any  # the tree of the parameters with `Factors` at each target, `optax.MaskedNode()` elsewhere
    inner: Any  # the inner optimizer's, of that tree
    base: Any  # the weights at the beginning where `rounding="base"`, in the same tree; else ()


def lora(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: Rank = 8,
    alpha: float | None = None,
    targets=None,
    dims=None,
    rounding: str = "auto",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """LoRA around an Optax optimizer, or in front of an aware one in a chain: `optax.chain(lora(rank=8), adam(1e-3))`.

    All leaves that are no targets are frozen: their updates are zero. Memory is that of A, B and their moments, beside
    the dense gradient; to do without that, put the factors into the model (`jaxml.tune.adapters`).

    Args:
        inner: any Optax optimizer; what it does to parameters (decay) it does to A and B.
        rank: as in `galore`.
        alpha: the scale s is alpha / rank; twice the rank where None.
        targets, dims: as in `galore`.
        rounding: how W + s (A'B' − AB) is rounded to the weights' dtype. "nearest" loses most of the movement in
            bfloat16, where an update is smaller than half a unit of the last place; "stochastic" keeps it on average;
            "base" keeps W_0 as well and emits round(W_0 + s A'B') − W, exactly, at the price of a copy. "auto" is
            "nearest" for float32 and wider, "stochastic" for narrower weights.
        seed: of A and of the rounding.

    Raises:
        TypeError: `inner` is no transformation.
        NotImplementedError: parameters are spread over a mesh axis of type Explicit.
        ValueError: an option that does not exist; at `init`, no leaf that matches or a rank out of range; at `update`,
            no parameters where the rounding needs them.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxml.optim import adam
        >>> params = {"w": jnp.ones((16, 8)), "b": jnp.zeros(8)}
        >>> tx = optax.chain(lora(rank=2), adam(1e-2))
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> jnp.linalg.matrix_rank(updates["w"]).item() <= 2, updates["b"].sum().item()
        (True, 0.0)
    """
    if rounding not in ROUNDING:
        raise ValueError(f"lora: rounding is one of {', '.join(ROUNDING)}, got {rounding!r}.")
    if isinstance(inner, Pending):
        raise ValueError("lora: the inner optimizer is not a projection without one itself, got one.")
    options = dict(rank=rank, alpha=alpha, targets=targets, dims=dims, rounding=rounding, seed=seed)
    if inner is not None:
        return _wrap(inner, **options)

    def alone(*_, **__):
        raise ValueError(
            "lora: an aware optimizer follows, got none. "
            "Write optax.chain(lora(...), jaxml.optim.adam(...)) or lora(optax.adam(...), ...)."
        )

    return pending("lora", optax.GradientTransformationExtraArgs(alone, alone), lambda tx: _wrap(tx, **options))


def _wrap(inner, *, rank, alpha, targets, dims, rounding, seed) -> optax.GradientTransformationExtraArgs:
    inner = optimizer("lora", inner)
    seek = lambda tree: find(tree, rank=rank, targets=targets, dims=dims, name="lora")
    factor = lambda t: 2.0 if alpha is None else alpha / t.rank

    def init(params) -> LoRAState:
        leaves, tree = jax.tree.flatten(params)
        found = seek(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves) + 1)
        masked = lambda made: tree.unflatten([optax.MaskedNode() if x is None else x for x in made])
        factors = masked([t and _first(t, k, wide(x.dtype)) for t, k, x in zip(found, keys, leaves)])
        base = ()
        if rounding == "base":  # a copy: the step may consume the parameters
            base = masked([None if t is None else jnp.array(x, copy=True) for t, x in zip(found, leaves)])
        return LoRAState(jnp.zeros((), jnp.int32), factors, inner.init(factors), base)

    def update(updates, state: LoRAState, params=None, **extra):
        grads, tree = jax.tree.flatten(updates)
        check_mesh("lora", grads)
        old = tree.flatten_up_to(state.factors)
        found = [getattr(f, "target", None) for f in old]
        low = [optax.MaskedNode() if t is None else _low(t, factor(t), g, f) for t, g, f in zip(found, grads, old)]
        moves, inner_state = inner.update(tree.unflatten(low), state.inner, state.factors, **extra)
        factors = optax.apply_updates(state.factors, moves)
        new = tree.flatten_up_to(factors)
        weights = [None] * len(grads) if params is None else tree.flatten_up_to(params)
        base = tree.flatten_up_to(state.base) if rounding == "base" else weights
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), len(grads))
        out = []
        for t, g, f, f_new, w, w0, key in zip(found, grads, old, new, weights, base, keys):
            if t is None:
                out.append(jnp.zeros_like(g))
                continue
            rule = rounds.rule(rounding, g.dtype)
            if w is None and rule != "nearest":
                raise ValueError(f"lora: rounding {rule!r} needs the parameters: tx.update(grads, state, params).")
            after = factor(t) * jnp.matmul(f_new.a, f_new.b, precision=jax.lax.Precision.HIGHEST)
            if rule == "base":
                out.append(_difference((w0 + t.restore(after)).astype(w.dtype), w))
                continue
            before = factor(t) * jnp.matmul(f.a, f.b, precision=jax.lax.Precision.HIGHEST)
            move = t.restore(after - before)
            if rule == "stochastic":
                move = _difference(rounds.stochastic(w + move, w.dtype, key), w)
            out.append(move.astype(g.dtype))
        return tree.unflatten(out), LoRAState(optax.safe_increment(state.step), factors, inner_state, state.base)

    return plainly(optax.GradientTransformationExtraArgs(init, update))


def _first(target: Target, key: Array, dtype) -> Factors:
    """A uniform within ±1/√m and B zero, as in PEFT."""
    bound = target.m**-0.5
    a = jax.random.uniform(key, (*target.batch, target.m, target.rank), dtype, -bound, bound)
    return Factors(a, jnp.zeros((*target.batch, target.rank, target.n), dtype), target)


def _low(target: Target, scale: float, g: Array, f: Factors) -> Factors:
    """(s G Bᵀ, s AᵀG), accumulated in float32."""
    g = target.matrices(g)
    multiply = lambda spec, x, y: (
        scale * jnp.einsum(spec, x.astype(g.dtype), y.astype(g.dtype), preferred_element_type=f.a.dtype)
    )
    return Factors(multiply("...mn,...rn->...mr", g, f.b), multiply("...mr,...mn->...rn", f.a, g), target)


def _difference(new: Array, old: Array) -> Array:
    """What added to `old` gives `new` in their dtype."""
    return (new.astype(wide(new.dtype)) - old.astype(wide(old.dtype))).astype(new.dtype)
