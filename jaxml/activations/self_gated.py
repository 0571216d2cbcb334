"""Smooth rectifiers of the form x · step(x): SiLU, Mish and their family, each accurate in its left tail."""

import math

import jax
import jax.numpy as jnp

from jaxml.activations.arithmetic import (
    artanh_series,
    bounded,
    erf_excess,
    exp_square,
    log1p_excess,
    log1p_exp,
    log1p_unit,
    logistic,
    logistic_slope,
    mirror,
    negative,
    positive,
    reach,
    side,
    tanh_slope,
    tanh_small,
    tanh_wide,
)
from jaxml.activations.rule import activation
from jaxml.axes import Array, Float


def _silu_slope(x):
    near = bounded(x, -reach(x), reach(x))
    return logistic(x) * (1 + near * logistic(-x))


@activation(_silu_slope)
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SiLU, or swish: x σ(x).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> [f"{y:.3f}" for y in silu(jnp.array([-jnp.inf, -1.0, 1.0]))]
        ['-0.000', '-0.269', '0.731']

    Reference:
        Elfwing, Uchibe, Doya 2017, https://arxiv.org/abs/1702.03118; Ramachandran, Zoph, Le 2017,
        https://arxiv.org/abs/1710.05941.
    """
    return bounded(x, -reach(x)) * logistic(x)


def _dsilu_slope(x):
    near = bounded(x, -reach(x), reach(x))
    return logistic_slope(x) * (2 - near * tanh_wide(x / 2))


@activation(_dsilu_slope)
def dsilu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Derivative of SiLU, a step that overshoots: σ(x) (1 + x σ(−x)).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in dsilu(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.072', '0.740', '1.091']

    Reference:
        Elfwing, Uchibe, Doya 2017, https://arxiv.org/abs/1702.03118, equation 5.
    """
    return _silu_slope(x)


@activation(lambda x, beta: beta * _silu_slope(x))
def eswish(x: Float[Array, "..."], beta: float | Array = 1.375) -> Float[Array, "..."]:
    """E-swish: β x σ(x).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in eswish(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.370', '0.428', '2.422']

    Reference:
        Alcaide 2018, https://arxiv.org/abs/1801.07145.
    """
    return beta * (bounded(x, -reach(x)) * logistic(x))


def _mish_slope(x):
    u = jnp.exp(-mirror(x))
    d = 1 + 2 * u + 2 * u * u
    right = 1 + u * u * (4 * bounded(x, 0, reach(x)) * (1 + u) - 2 * d) / (d * d)
    n = u * (u + 2) + 2
    left = u * ((u + 2) * n + 4 * bounded(x, -reach(x), 0) * (1 + u)) / (n * n)
    return side(x, right, left)


@activation(_mish_slope)
def mish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Mish: x tanh(log(1 + exp(x))), as a ratio of polynomials in exp(−|x|).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in mish(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.303', '0.375', '1.944']

    Reference:
        Misra 2019, https://arxiv.org/abs/1908.08681, equation 1.
    """
    u = jnp.exp(-mirror(x))
    left = u * (u + 2)
    return bounded(x, -reach(x)) * side(x, (1 + 2 * u) / (1 + 2 * u + 2 * u * u), left / (left + 2))


def _serf_slope(x):
    u, near = jnp.exp(-mirror(x)), bounded(x, -reach(x), reach(x))
    s = log1p_exp(x)
    right = jax.lax.erf(s) + near * (2 / math.sqrt(math.pi)) * exp_square(s, -1.0) * logistic(x)
    less = log1p_excess(u)
    square = (u - less) ** 2
    left = (u - less) * erf_excess(square) + jnp.exp(-square) * (u + (near * (u / (1 + u)) - less))
    return side(x, right, (2 / math.sqrt(math.pi)) * left)


@activation(_serf_slope)
def serf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Serf: x erf(log(1 + exp(x))).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in serf(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.342', '0.416', '1.995']

    Reference:
        Nag, Bhattacharyya, Mukherjee, Kundu 2021, https://arxiv.org/abs/2108.09598.
    """
    return bounded(x, -reach(x)) * jax.lax.erf(log1p_exp(x))


def _tanhexp_slope(x):
    near = bounded(x, -reach(x), 6.0)
    w = jnp.exp(near)
    small = tanh_small(bounded(w, high=1.0))
    return side(x, tanh_wide(w) + near * w * tanh_slope(w), small + near * w * (1 - small * small))


@activation(_tanhexp_slope)
def tanhexp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """TanhExp: x tanh(exp(x)).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in tanhexp(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.352', '0.464', '2.000']

    Reference:
        Liu, Di 2020, https://arxiv.org/abs/2003.09855.
    """
    return bounded(x, -reach(x)) * jnp.tanh(jnp.exp(bounded(x, high=6.0)))


def _aptx_slope(x):
    near = bounded(x, -reach(x), reach(x))
    return logistic(2 * x) * (1 + 2 * near * logistic(-2 * x))


@activation(_aptx_slope)
def aptx(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """APTx, like Mish and cheaper: (1 + tanh(x)) x/2, computed as x σ(2x), whose left tail does not cancel.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in aptx(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.119', '0.366', '1.964']

    Reference:
        Kumar 2022, https://arxiv.org/abs/2209.06119, α = β = 1, γ = ½.
    """
    return bounded(x, -reach(x)) * logistic(2 * x)


def _logish_slope(x):
    s, u = logistic(x), jnp.exp(-mirror(x))
    near = bounded(x, -reach(x), reach(x))
    right = log1p_unit(s) + near * logistic_slope(x) / (1 + s)
    w = u / (2 + 3 * u)
    left = u * (artanh_series(w * w) / (2 + 3 * u) + near / ((1 + u) * (1 + 2 * u)))
    return side(x, right, left)


@activation(_logish_slope)
def logish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logish: x log(1 + σ(x)).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in logish(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.238', '0.242', '1.263']

    Reference:
        Zhu, Zeng, Lin, Lin, Yang 2021, "Logish: a new nonlinear nonmonotonic activation function", Neurocomputing 458.
    """
    return bounded(x, -reach(x)) * log1p_unit(logistic(x))


def _smish_slope(x):
    u = jnp.exp(-mirror(x))
    near = 4 * bounded(x, -reach(x), reach(x))
    n = 5 + u * (6 + 2 * u)
    right = ((3 + 2 * u) + near * u * ((2 + u * (3 + u)) / n)) / n
    n = 2 + u * (6 + 5 * u)
    left = u * (((2 + 3 * u) + near * ((1 + u * (3 + 2 * u)) / n)) / n)
    return side(x, right, left)


@activation(_smish_slope)
def smish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Smish: x tanh(log(1 + σ(x))), as a ratio of polynomials in σ(x).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in smish(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.234', '0.225', '1.118']

    Reference:
        Wang, Ren, Wang 2022, "Smish: a novel activation function for deep learning methods", Electronics 11(4).
    """
    s = logistic(x)
    n = s * (s + 2)
    return bounded(x, -reach(x)) * (n / (n + 2))


def _elish_slope(x):
    s, left = logistic(x), negative(x)
    return side(x, _silu_slope(x), s * (jnp.exp(left) + jnp.expm1(left) * logistic(-x)))


@activation(_elish_slope)
def elish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """ELiSH: x σ(x) where x ≥ 0, (exp(x) − 1) σ(x) elsewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in elish(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.170', '0.311', '1.762']

    Reference:
        Basirat, Roth 2018, https://arxiv.org/abs/1808.00783, equation 6.
    """
    return logistic(x) * side(x, positive(x), jnp.expm1(negative(x)))
