"""Adding a small number to a narrow one: what is written where an update is less than half a unit of the last place."""

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float

ROUNDING = ("auto", "nearest", "stochastic")


def rule(rounding: str, dtype) -> str:
    """What "auto" means: "nearest" for float32 and wider, "stochastic" for narrower weights."""
    if rounding != "auto":
        return rounding
    return "nearest" if jnp.promote_types(dtype, jnp.float32) == dtype else "stochastic"


def stochastic(x: Float[Array, "..."], dtype, key: Array) -> Float[Array, "..."]:
    """One of the two neighbours of x in `dtype` (two bytes wide), the nearer the likelier.

    Example:
        >>> x = jnp.full(10_000, 1.001)  # a quarter of the way from 1 to the next bfloat16
        >>> 1.0005 < stochastic(x, jnp.bfloat16, jax.random.key(0)).astype(jnp.float32).mean() < 1.0015
        Array(True, dtype=bool)
    """
    if dtype == jnp.bfloat16:  # the upper half of a float32
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
        rounded = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
        return jnp.where(jnp.isfinite(x), rounded, x.astype(dtype))  # noise would carry NaN over to a number
    near = x.astype(dtype)
    away = jnp.where(x > near.astype(x.dtype), jnp.inf, -jnp.inf).astype(dtype)
    other = jnp.nextafter(near, away)
    gap = jnp.abs(other.astype(x.dtype) - near.astype(x.dtype))
    share = jnp.abs(x - near.astype(x.dtype)) / jnp.where(gap > 0, gap, 1)
    return jnp.where(jax.random.uniform(key, x.shape, x.dtype) < share, other, near)
