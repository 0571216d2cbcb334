"""What becomes of N, the inner optimizer's answer to the projected gradient R, in full space.

| mode | update of one matrix | reference |
|---|---|---|
| galore | α P N | Zhao et al. 2024, algorithm 2 |
| fira | α P N + s · limit(φ (G − α P R)) | Chen et al. 2024, "Fira", algorithm 1 |
| apollo | s · limit(√α φ G) | Zhu et al. 2024, "APOLLO", algorithm 1 |
| apollo-mini | s · limit(√α φ G) with one φ for the whole matrix | the same, section 4.2 |

φ is ‖N / s‖ / ‖R‖ channel by channel, along the axis of the rank, and `limit` lets a norm grow by 1 % a step at most.
The papers' N has no learning rate; here an optimizer with any learning rate may stand, whose size and sign s is found
by running it beside on gradients of 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxml.axes import Array, Float
from jaxml.optim.targets import Target

MODES = ("galore", "fira", "apollo", "apollo-mini")
GROWTH = 1.01
DEFAULTS = {  # of rank, scale, method, moments, side
    "galore": (128, 0.25, "power", "rotate", "auto"),
    "fira": (128, 0.25, "power", "rotate", "auto"),
    "apollo": (256, 1.0, "random", "carry", "std"),
    "apollo-mini": (1, 128.0, "random", "carry", "std"),
}


def probe(inner: optax.GradientTransformation, low: Any) -> Any:
    """The state of the same optimizer on a tree of the same structure whose leaves have one element."""
    return inner.init(_ones(low))


def rates(
    inner: optax.GradientTransformationExtraArgs, low: Any, state: Any, extra: dict[str, Any]
) -> tuple[list[Float[Array, ""]], Any]:
    """(s of each leaf: the update of a gradient that is always 1, the new state of the probe)."""
    ones = _ones(low)
    new, state = inner.update(ones, state, jax.tree.map(jnp.zeros_like, ones), **extra)
    return [jnp.sum(leaf) for leaf in jax.tree.leaves(new)], state


def apply(
    mode: str,
    scale: float,
    target: Target,
    basis: tuple[Array, ...],
    g: Float[Array, "... m n"],
    low: Float[Array, "... low"],
    new: Float[Array, "... low"],
    rate: Float[Array, ""] | None,
    norm: Float[Array, "..."] | tuple,
) -> tuple[Float[Array, "... m n"], Float[Array, "..."] | tuple]:
    """(The update, the norm to keep for the next step's limit)."""
    lift = lambda x: scale * target.lift(basis, x.astype(g.dtype))
    if mode == "galore":
        return lift(new), norm
    channels = (-2, -1) if mode == "apollo-mini" else -2 if target.side == "left" else -1
    size = lambda x, axes: jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))
    direction = new / jnp.where(rate == 0, 1, rate)
    factor = size(direction, channels) / (size(low, channels) + 1e-8)
    wide = g.astype(low.dtype)
    if mode == "fira":
        residual, norm = _limit(factor * (wide - lift(low)), norm, rate)
        return lift(new) + rate * residual, norm
    scaled, norm = _limit(scale**0.5 * factor * wide, norm, rate)
    return rate * scaled, norm


def _limit(x: Float[Array, "... m n"], norm: Float[Array, "..."], rate: Array):
    """x with at most 1.01 times the last norm, and its norm; while the rate is 0 nothing is known of the norm."""
    present = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1)))
    bound = jnp.where(norm > 0, GROWTH * norm, present)
    shrink = jnp.where(present > bound, bound / jnp.where(present > 0, present, 1), 1)
    return x * shrink[..., None, None], jnp.where(rate == 0, norm, present * shrink)


def _ones(low: Any) -> Any:
    return jax.tree.map(lambda a: jnp.ones((1,) * jnp.ndim(a), a.dtype), low)
