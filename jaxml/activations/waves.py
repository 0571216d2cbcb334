"""Periodic functions, bells, and what is built of them. sin(±inf) is taken as 0 where a factor decides the limit."""

import math

import jax.numpy as jnp

from jaxml.activations.arithmetic import (
    FAR,
    bounded,
    exp_square,
    finite,
    logistic,
    mirror,
    reach,
    tanh_slope,
    tanh_wide,
)
from jaxml.activations.rule import activation
from jaxml.axes import Array, Float


@activation(jnp.cos)
def sin(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sine.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in sin(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.841', '0.479', '0.909']

    Reference:
        Sitzmann, Martel, Bergman, Lindell, Wetzstein 2020, "SIREN", https://arxiv.org/abs/2006.09661.
    """
    return jnp.sin(x)


@activation(lambda x: -jnp.sin(x))
def cos(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cosine.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in cos(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.540', '0.878', '-0.416']
    """
    return jnp.cos(x)


def _sinc_slope(x):
    near = jnp.where(mirror(x) < 2.25, x, 1)
    far = jnp.where(mirror(x) < 2.25, 3, x)
    series = jnp.zeros_like(x)
    for k in range(13, 0, -1):
        series = series * near * near + (-1) ** k * 2 * k / math.factorial(2 * k + 1)
    direct = jnp.where(mirror(x) < math.inf, (jnp.cos(finite(far)) - jnp.sin(finite(far)) / far) / far, 0)
    return jnp.where(mirror(x) < 2.25, series * near, direct)


@activation(_sinc_slope)
def sinc(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Cardinal sine, not normalised: sin(x) / x, 1 at 0. (`jnp.sinc` and `torch.sinc` are sin(πx) / (πx).)

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in sinc(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.841', '0.959', '0.455']
    """
    return jnp.where(x == 0, 1, jnp.sin(finite(x)) / jnp.where(x == 0, 1, x))


def _snake_slope(x, alpha):
    y = alpha * finite(x)
    s = jnp.sin(y) + jnp.cos(y)
    return s * s  # 1 + sin(2 α x), whose zeros are double


@activation(_snake_slope)
def snake(x: Float[Array, "..."], alpha: float | Array = 1.0) -> Float[Array, "..."]:
    """Snake, a line with waves: x + sin²(α x) / α. Learnable in `learnable.snake`.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in snake(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.292', '0.730', '2.827']

    Reference:
        Ziyin, Hartwig, Ueda 2020, https://arxiv.org/abs/2006.08195, equation 3.
    """
    s = jnp.sin(alpha * finite(x))
    return x + s * s / alpha


def _gcu_slope(x):
    return jnp.cos(x) - x * jnp.sin(x)


@activation(_gcu_slope)
def gcu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Growing cosine unit: x cos(x).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in gcu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.540', '0.439', '-0.832']

    Reference:
        Noel, Trivedi, Dutta 2021, https://arxiv.org/abs/2108.12943.
    """
    return x * jnp.cos(x)


@activation(lambda x: -2 * bounded(x, -FAR, FAR) * exp_square(x, -1.0))
def gaussian(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gaussian bell: exp(−x²).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in gaussian(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.368', '0.779', '0.018']
    """
    return exp_square(x, -1.0)


_RICKER = 2 / (math.sqrt(3) * math.pi**0.25)


def _mexican_hat_slope(x):
    near = bounded(x, -FAR, FAR)
    return _RICKER * near * ((near - math.sqrt(3)) * (near + math.sqrt(3))) * exp_square(x, -0.5)


@activation(_mexican_hat_slope)
def mexican_hat(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Mexican hat (Ricker's wavelet), of unit energy: 2 / (√3 π^¼) (1 − x²) exp(−x²/2).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in mexican_hat(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.574', '-0.352']
    """
    near = bounded(x, -FAR, FAR)
    return _RICKER * ((1 - near) * (1 + near)) * exp_square(x, -0.5)


def _lisht_slope(x):
    return tanh_wide(x) + bounded(x, -reach(x), reach(x)) * tanh_slope(x)


@activation(_lisht_slope)
def lisht(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """LiSHT, even and positive: x tanh(x).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in lisht(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.762', '0.231', '1.928']

    Reference:
        Roy, Manna, Dubey, Chaudhuri 2019, https://arxiv.org/abs/1901.05894.
    """
    return x * jnp.tanh(x)


def _sinlu_slope(x):
    near = bounded(x, -reach(x), reach(x))
    half = jnp.cos(finite(x) / 2)
    return logistic(x) * (2 * half * half + (near + jnp.sin(finite(x))) * logistic(-x))


@activation(_sinlu_slope)
def sinlu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SinLU: (x + sin(x)) σ(x).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in sinlu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.495', '0.610', '2.563']

    Reference:
        Paul, Bandyopadhyay, Yoon, Geem, Sarkar 2022, "SinLU: sinu-sigmoidal linear unit", Mathematics 10(3).
    """
    return (bounded(x, -reach(x)) + jnp.sin(finite(x))) * logistic(x)
