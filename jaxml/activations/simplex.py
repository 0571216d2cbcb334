"""Maps to the simplex (non-negative, summing to 1) along an axis, dense and sparse, and softmax's kin.

Computed in float32 and rounded once; reverse mode keeps the result, or less.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxml.activations.rule import real, widened
from jaxml.axes import Array, Float, wide

softmax = widened(jax.nn.softmax)
log_softmax = widened(jax.nn.log_softmax)
logsumexp = widened(jax.nn.logsumexp)


def softmin(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """exp(−xᵢ) / Σⱼ exp(−xⱼ).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in softmin(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.786', '0.175', '0.039']
    """
    return softmax(-real(x, "softmin"), axis)


def softmax1(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """exp(xᵢ) / (1 + Σⱼ exp(xⱼ)): may attend to nothing. Sums to less than 1.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in softmax1(jnp.array([0.0, 0.0, -jnp.inf]))]
        ['0.333', '0.333', '0.000']

    Reference:
        Miller 2023, "Attention is off by one".
    """
    return _softmax1(real(x, "softmax1"), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax1(x, axis):
    wider = x.astype(wide(x.dtype))
    top = jnp.maximum(jnp.max(wider, axis=axis, keepdims=True, initial=0.0), 0)
    e = jnp.exp(wider - top)
    return (e / (jnp.exp(-top) + jnp.sum(e, axis=axis, keepdims=True))).astype(x.dtype)


@_softmax1.defjvp
def _softmax1_jvp(axis, primals, tangents):
    y = _softmax1(*primals, axis)
    return y, _weighted(y, tangents[0], axis, lambda y, dx: y * (dx - jnp.sum(y * dx, axis=axis, keepdims=True)))


def sparsemax(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """The nearest point of the simplex: max(x − τ, 0), τ so that it sums to 1.

    Example:
        >>> import jax.numpy as jnp
        >>> sparsemax(jnp.array([1.0, 0.5, -2.0])).tolist()
        [0.75, 0.25, 0.0]

    Reference:
        Martins, Astudillo 2016, https://arxiv.org/abs/1602.02068, algorithm 1 and equation 9.
    """
    return _sparsemax(real(x, "sparsemax"), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sparsemax(x, axis):
    def last(z):
        z = z - jnp.max(z, axis=-1, keepdims=True)
        down = -jnp.sort(-z, axis=-1)
        k = _count(z)
        sums = jnp.cumsum(jnp.where(down == -math.inf, 0, down), axis=-1)
        support = jnp.sum(1 + k * down > sums, axis=-1, keepdims=True)
        tau = (jnp.take_along_axis(sums, support - 1, axis=-1) - 1) / support
        return jnp.maximum(z - tau, 0)

    return _along_last(last, x, axis)


@_sparsemax.defjvp
def _sparsemax_jvp(axis, primals, tangents):
    y = _sparsemax(*primals, axis)

    def out(y, dx):
        support = (y > 0).astype(dx.dtype)
        total, count = (jnp.sum(a, axis=axis, keepdims=True) for a in (support * dx, support))
        return support * (dx - total / count)

    return y, _weighted(y, tangents[0], axis, out)


def entmax15(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """1.5-entmax, between softmax and sparsemax: max(x/2 − τ, 0)², τ so that it sums to 1.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in entmax15(jnp.array([1.0, 0.5, -2.0]))]
        ['0.674', '0.326', '0.000']

    Reference:
        Peters, Niculae, Martins 2019, "Sparse sequence-to-sequence models", https://arxiv.org/abs/1905.05702,
        algorithm 2 and equation 15.
    """
    return _entmax15(real(x, "entmax15"), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _entmax15(x, axis):
    def last(z):
        z = (z - jnp.max(z, axis=-1, keepdims=True)) / 2
        z = jnp.where(z < -1, -1.0, z)  # beyond the support of every entmax: no square of a large number
        down = -jnp.sort(-z, axis=-1)
        k = _count(z)
        mean = jnp.cumsum(down, axis=-1) / k
        scatter = jnp.cumsum(down * down, axis=-1) / k - mean * mean
        tau = mean - jnp.sqrt(jnp.maximum(1 / k - scatter, 0))
        support = jnp.sum(tau <= down, axis=-1, keepdims=True)
        return jnp.square(jnp.maximum(z - jnp.take_along_axis(tau, support - 1, axis=-1), 0))

    return _along_last(last, x, axis)


@_entmax15.defjvp
def _entmax15_jvp(axis, primals, tangents):
    y = _entmax15(*primals, axis)

    def out(y, dx):
        g = jnp.where(y > 0, jnp.sqrt(jnp.where(y > 0, y, 1)), 0)
        total, count = (jnp.sum(a, axis=axis, keepdims=True) for a in (g * dx, g))
        return g * (dx - total / count)

    return y, _weighted(y, tangents[0], axis, out)


# ---- helpers -----------------------------------------------------------------------------------------


def _weighted(y: Array, dx: Array, axis: int, out) -> Array:
    """A tangent made of the result y, in float32, rounded once."""
    dtype = wide(y.dtype)
    return jax.checkpoint(lambda y, dx: out(y.astype(dtype), dx.astype(dtype)).astype(y.dtype), prevent_cse=False)(
        y, dx
    )


def _along_last(function, x: Array, axis: int) -> Array:
    moved = jnp.moveaxis(x.astype(wide(x.dtype)), axis, -1)
    return jnp.moveaxis(function(moved), -1, axis).astype(x.dtype)


def _count(z: Array) -> Array:
    """1, 2, 3, … along the last axis, in as many axes as z."""
    return jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
