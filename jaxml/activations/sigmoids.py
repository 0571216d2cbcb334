"""Smooth steps: bounded, or bounded on one side (log-sigmoid), and monotone."""

import math

import jax
import jax.numpy as jnp

from jaxml.activations.arithmetic import (
    bounded,
    constant,
    exp_pair,
    exp_square,
    log1p_exp,
    logistic,
    logistic_slope,
    mills,
    mirror,
    reach,
    side,
    tanh_slope,
    times,
    two_product,
    two_sum,
    unit,
    unit_slope,
)
from jaxml.activations.rule import activation
from jaxml.axes import Array, Float


@activation(logistic_slope)
def sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logistic sigmoid: 1 / (1 + exp(−x)).

    Example:
        >>> import jax
        >>> float(sigmoid(0.0)), f"{jax.grad(sigmoid)(30.0):.4g}"
        (0.5, '9.358e-14')
    """
    return logistic(x)


@activation(lambda x: logistic(-x))
def log_sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logarithm of the logistic sigmoid: −log(1 + exp(−x)).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in log_sigmoid(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.313', '-0.474', '-0.127']
    """
    return -log1p_exp(-x)


@activation(tanh_slope)
def tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Hyperbolic tangent, (exp(x) − exp(−x)) / (exp(x) + exp(−x)); its derivative is right where it rounds to ±1.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in tanh(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.762', '0.462', '0.964']
    """
    return jnp.tanh(x)


def _lecun_tanh_slope(x):
    p, e = times(bounded(mirror(x), high=reach(x)), 4 / 3)
    u = exp_pair(-p, -e)
    return (4 * 1.7159 * 2 / 3) * u / ((1 + u) * (1 + u))


@activation(_lecun_tanh_slope)
def lecun_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scaled hyperbolic tangent: 1.7159 tanh(2 x / 3), which takes ±1 to ±1.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in lecun_tanh(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.000', '0.552', '1.493']

    Reference:
        LeCun, Bottou, Orr, Müller 1998, "Efficient BackProp", section 4.4.
    """
    return 1.7159 * jnp.tanh(x * (2 / 3))


def _soft_sign_slope(x):
    r = 1 / (1 + mirror(x))
    return r * r


@activation(_soft_sign_slope)
def soft_sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Softsign (Elliott's sigmoid): x / (1 + |x|).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in soft_sign(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.500', '0.333', '0.667']

    Reference:
        Elliott 1993, "A better activation function for artificial neural networks".
    """
    m = mirror(x)
    return jnp.where(m > 2.0**60, side(x, 1.0, -1.0), x / (1 + m))


def _one_over_one_plus_square(x):
    near = bounded(x, -(2.0**60), 2.0**60)
    return jnp.where(mirror(x) > 2.0**60, 0, 1 / (1 + near * near))


@activation(_one_over_one_plus_square)
def arctan(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Inverse tangent.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in arctan(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.785', '0.464', '1.107']
    """
    return jnp.arctan(x)


@activation(lambda x: (2 / math.sqrt(math.pi)) * exp_square(x, -1.0))
def erf(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Error function: 2/√π ∫₀ˣ exp(−t²) dt.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in erf(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.843', '0.520', '0.995']
    """
    return jax.lax.erf(x)


@activation(lambda x, alpha: unit_slope(jnp.sqrt(alpha) * x))
def isru(x: Float[Array, "..."], alpha: float | Array = 1.0) -> Float[Array, "..."]:
    """Inverse square root unit: x / √(1 + α x²), α > 0.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in isru(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.707', '0.447', '0.894']

    Reference:
        Carlile, Delamarter, Kinney, Marti, Whitney 2017, https://arxiv.org/abs/1710.09967, equation 1.
    """
    return unit(jnp.sqrt(alpha) * x) / jnp.sqrt(alpha)


def _laplace_parts(x):
    """(φ(z), Mills' ratio at |z|) of z = (x − √½) √(4π), z to twice the precision: far out φ would lose its digits."""
    mean, mean_low = constant(x, math.sqrt(0.5))
    rate, rate_low = constant(x, math.sqrt(4 * math.pi))
    near = jnp.where(mirror(x) > 20, side(x, 20.0, -20.0), x)
    d, d_low = two_sum(near, -mean)
    z, z_low = two_product(d, rate)
    z_low = z_low + d * rate_low + (d_low - mean_low) * rate
    square, square_low = two_product(z, z)
    pdf = exp_pair(-square / 2, -square_low / 2 - z_low * (z + z_low / 2)) * (1 / math.sqrt(2 * math.pi))
    return z, pdf, mills(mirror(z + z_low))


def _laplace_slope(x):
    _, pdf, _ = _laplace_parts(x)
    return pdf * math.sqrt(4 * math.pi)


@activation(_laplace_slope)
def laplace(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A smooth step like relu²: Φ((x − √½) √(4π)), Φ the standard normal distribution.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in laplace(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.231', '1.000']

    Reference:
        Ma et al. 2022, "Mega", https://arxiv.org/abs/2209.10655, equation 11.
    """
    z, pdf, ratio = _laplace_parts(x)
    return side(z, 1 - pdf * ratio, pdf * ratio)


def _gompertz_slope(x):
    return jnp.where(x < -7, 0, jnp.exp(-jnp.exp(-jnp.where(x < -7, -7, x)) - jnp.where(x < -7, -7, x)))


@activation(_gompertz_slope)
def gompertz(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gompertz' curve: exp(−exp(−x)). Its left tail has a relative error of exp(−x) roundings.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in gompertz(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.066', '0.545', '0.873']
    """
    return jnp.exp(-jnp.exp(-x))
