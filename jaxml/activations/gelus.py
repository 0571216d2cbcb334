"""The Gaussian error linear unit, exact and approximate, and what is made of it; accurate in the left tail."""

import math

import jax.numpy as jnp

from jaxml.activations.arithmetic import (
    bounded,
    constant,
    exp_pair,
    mills,
    mirror,
    normal_cdf,
    normal_pdf,
    reach,
    side,
    tanh_slope,
    tanh_small,
    tanh_wide,
    times,
    two_product,
    two_sum,
)
from jaxml.activations.rule import activation
from jaxml.axes import Array, Float


def _gate(p, e):
    """(σ(p + e), σ(−p − e)) of a pair."""
    u = exp_pair(-mirror(p), -side(p, e, -e))
    return side(p, 1, u) / (1 + u), side(p, u, 1) / (1 + u)


def _quick_gelu_slope(x):
    near = bounded(x, -reach(x), reach(x))
    right, left = _gate(*times(near, 1.702))
    return right * (1 + 1.702 * near * left)


@activation(_quick_gelu_slope)
def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU through a sigmoid: x σ(1.702 x).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in quick_gelu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.154', '0.350', '1.936']

    Reference:
        Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2.
    """
    near = bounded(x, -reach(x), reach(x))
    return bounded(x, -reach(x)) * _gate(*times(near, 1.702))[0]


def gelu(x: Float[Array, "..."], approximate: bool = True) -> Float[Array, "..."]:
    """Gaussian error linear unit, x Φ(x): `gelu_tanh` by default as in jax.nn, `gelu_exact` where not approximate.

    torch's and Keras' default is the exact form. The two differ by up to 5e-4.

    Example:
        >>> f"{gelu(1.0):.6f} {gelu(1.0, approximate=False):.6f}"
        '0.841192 0.841345'

    Reference:
        Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415.
    """
    return gelu_tanh(x) if approximate else gelu_exact(x)


def _gelu_exact_slope(x):
    pdf, m = normal_pdf(x), bounded(mirror(x), high=reach(x))
    ratio = mills(m)
    return side(x, 1 - pdf * (ratio - m), pdf * (ratio - m))


@activation(_gelu_exact_slope)
def gelu_exact(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gaussian error linear unit: x Φ(x), Φ the standard normal distribution; accurate in the left tail.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in gelu_exact(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.159', '0.346', '1.954']

    Reference:
        Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415, equation 1.
    """
    return bounded(x, -reach(x)) * normal_cdf(x)


FAR_CUBE = 24.0
"""σ of GELU's cubic is 0 or 1 beyond, in float32 and float64."""
_GELU_A, _GELU_B = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


def _gelu_tanh_gate(x):
    """σ(±z), z = x (a + b x²) to twice the precision."""
    (a, a_low), (b, b_low) = constant(x, _GELU_A), constant(x, _GELU_B)
    square, square_low = two_product(x, x)
    cubic, cubic_low = two_product(square, b)
    factor, factor_low = two_sum(cubic, a)
    factor_low = factor_low + a_low + cubic_low + square_low * b + square * b_low
    p, e = two_product(x, factor)
    return _gate(p, e + x * factor_low)


def _gelu_tanh_slope(x):
    near = bounded(x, -FAR_CUBE, FAR_CUBE)
    right, left = _gelu_tanh_gate(near)
    return right * (1 + near * (_GELU_A + 3 * _GELU_B * near * near) * left)


@activation(_gelu_tanh_slope)
def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU through a hyperbolic tangent: x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), as a sigmoid of twice that.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in gelu_tanh(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.159', '0.346', '1.955']

    Reference:
        Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2.
    """
    return bounded(x, -FAR_CUBE) * _gelu_tanh_gate(bounded(x, -FAR_CUBE, FAR_CUBE))[0]


def _phish_slope(x):
    near = bounded(x, -reach(x), reach(x))
    g = near * normal_cdf(x)
    small = tanh_small(bounded(g, -1.0, 1.0))
    step = jnp.where(g < 1, small, tanh_wide(g))
    return step + near * jnp.where(g < 1, 1 - small * small, tanh_slope(g)) * _gelu_exact_slope(x)


@activation(_phish_slope)
def phish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Phish: x tanh(gelu(x)), of the exact GELU.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in phish(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.157', '0.166', '1.921']

    Reference:
        Naveen 2022, "Phish: a novel hyper-optimizable activation function", TechRxiv.
    """
    near = bounded(x, -reach(x))
    return near * jnp.tanh(near * normal_cdf(x))
