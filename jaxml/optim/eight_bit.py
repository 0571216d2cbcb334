"""Optimizer states of eight bits: any Optax optimizer whose moments are kept packed between steps.

A step unpacks the moments, lets the optimizer update them in float32, and packs them again; nothing else changes. Means
of squares take the unsigned dynamic map, everything with a sign the signed one (`jaxml.optim.packed`).

Reference:
    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization". Differences from bitsandbytes: blocks do not
    run across rows longer than a block, so that a state shards as its parameter does; rounding may be stochastic.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxml.axes import Array, Int, wide
from jaxml.optim import moments, packed
from jaxml.optim.chain import Aware, aware, optimizer
from jaxml.optim.galore import TargetState
from jaxml.optim.plain import plainly


class EightBitState(NamedTuple):
    """State of `eight_bit`."""

    step: Int[Array, ""]
    inner: Any  # the optimizer's, with `packed.Packed` in the place of large moments


def eight_bit(
    inner: optax.GradientTransformation, *, min_size: int = 4096, stochastic: bool = False, seed: int = 0
) -> Aware:
    """Any optimizer with its moments in eight bits.

    Args:
        inner: whose moments are state leaves of a parameter's shape under a known name (`moments.LINEAR`, `SQUARED`):
            Adam, AdamW, Lion, SGD with momentum, RMSProp, Adan and most others.
        min_size: smaller parameters keep float32 moments, as in bitsandbytes.
        stochastic: round to one of the two neighbours, the nearer the likelier, instead of to the nearest. With
            gradients of mini-batches both end alike; where a gradient hardly changes from step to step, the nearest
            value holds a mean where it is.
        seed: of the rounding.

    Raises:
        TypeError: `inner` is no transformation.
        ValueError: at `init`, no moment that could be packed, or a `galore` inside (which belongs outside).

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> state = eight_bit(optax.adam(1e-3)).init({"w": jnp.zeros((64, 256))})
        >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state.inner[0].mu))
        16640
    """
    inner = optimizer("eight_bit", inner)

    def init(params) -> EightBitState:
        state = inner.init(jax.tree.map(lambda p: p.astype(wide(p.dtype)), params))
        leaves, tree = jax.tree.flatten(state)
        is_target = lambda s: isinstance(s, TargetState)
        if any(map(is_target, jax.tree.leaves(state, is_leaf=is_target))):
            raise ValueError(
                "eight_bit: the optimizer inside is one that keeps moments itself, got a galore. "
                "Write galore(eight_bit(optimizer), ...)."
            )
        found = _large(state, params)
        if not found and any(jnp.size(p) >= min_size for p in jax.tree.leaves(params)):
            raise ValueError(
                "eight_bit: the optimizer keeps moments of the parameters' shape under a name in "
                f"{', '.join(moments.LINEAR + moments.SQUARED)}, got {type(state).__name__} without any."
            )
        for n, squared in found.items():
            moment = jax.lax.optimization_barrier(leaves[n].astype(jnp.float32))  # else XLA packs zeros as it compiles
            leaves[n] = packed.pack(moment, _kind(squared))
        return EightBitState(jnp.zeros((), jnp.int32), tree.unflatten(leaves))

    def update(updates, state: EightBitState, params=None, **extra):
        kept, tree = jax.tree.flatten(state.inner, is_leaf=packed.is_packed)
        grads = jax.tree.map(lambda g: g.astype(wide(g.dtype)), updates)  # squares of float16 would be 0
        new, inner_state = inner.update(grads, tree.unflatten([packed.unpack(x) for x in kept]), params, **extra)
        leaves = tree.flatten_up_to(inner_state)
        keys = [None] * len(leaves)
        if stochastic:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), len(leaves))
        leaves = [packed.pack_like(x, was, k) for x, was, k in zip(leaves, kept, keys)]
        new = jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates)
        return new, EightBitState(optax.safe_increment(state.step), tree.unflatten(leaves))

    def _large(state, params) -> dict[int, bool]:
        """Number of each moment's leaf that is to be packed, and whether it is of squares."""
        shapes = {path: jnp.shape(p) for path, p in jax.tree.leaves_with_path(params) if jnp.size(p) >= min_size}
        return moments.packable(state, shapes)

    return aware(plainly(optax.GradientTransformationExtraArgs(init, update)))


def _kind(squared: bool) -> str:
    return "dynamic_unsigned" if squared else "dynamic"
