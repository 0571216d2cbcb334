"""Smooth rectifiers that are not x times a step: about x on the right, about 0 or a constant on the left."""

import math

import jax.numpy as jnp

from jaxml.activations.arithmetic import (
    bounded,
    log1p_exp,
    logistic,
    mirror,
    negative,
    positive,
    root,
    side,
    unit,
    unit_slope,
)
from jaxml.activations.rule import activation
from jaxml.axes import Array, Float


@activation(logistic)
def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Softplus: log(1 + exp(x)).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in softplus(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.313', '0.974', '2.127']

    Reference:
        Dugas, Bengio, Bélisle, Nadeau, Garcia 2001, "Incorporating second-order functional knowledge".
    """
    return log1p_exp(x)


@activation(logistic)
def shifted_softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Softplus that is 0 at 0: log(½ exp(x) + ½).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in shifted_softplus(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.380', '0.281', '1.434']

    Reference:
        Schütt et al. 2017, "SchNet", https://arxiv.org/abs/1706.08566.
    """
    near = bounded(x, -1.0, 1.0)
    return jnp.where(mirror(x) < 1, jnp.log1p(jnp.expm1(near) / 2), log1p_exp(x) - math.log(2))


def _squareplus_slope(x, b):
    r = root(x, b)
    near = bounded(x, -(2.0**30), 2.0**30)
    return side(x, (1 + near / jnp.sqrt(near * near + b)) / 2, b / (2 * (r + mirror(x))) / r)


@activation(_squareplus_slope)
def squareplus(x: Float[Array, "..."], b: float | Array = 4.0) -> Float[Array, "..."]:
    """Squareplus: (x + √(x² + b)) / 2, b > 0; on the left b / (2 (√(x² + b) − x)), which does not cancel.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in squareplus(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.618', '1.281', '2.414']

    Reference:
        Barron 2021, https://arxiv.org/abs/2112.11687, equation 1.
    """
    r, m = root(x, b), mirror(x)
    return side(x, (m / 2 + r / 2), b / (2 * (r + m)))


@activation(lambda x, alpha: jnp.where(x > 0, 1, alpha * jnp.exp(negative(x))))
def elu(x: Float[Array, "..."], alpha: float | Array = 1.0) -> Float[Array, "..."]:
    """Exponential linear unit: x where x > 0, α (exp(x) − 1) elsewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in elu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.632', '0.500', '2.000']

    Reference:
        Clevert, Unterthiner, Hochreiter 2015, https://arxiv.org/abs/1511.07289, equation 2.
    """
    return jnp.where(x > 0, x, alpha * jnp.expm1(negative(x)))


@activation(lambda x, alpha: jnp.where(x > 0, 1, jnp.exp(negative(x) / alpha)))
def celu(x: Float[Array, "..."], alpha: float | Array = 1.0) -> Float[Array, "..."]:
    """Continuously differentiable ELU: x where x > 0, α (exp(x/α) − 1) elsewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in celu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.632', '0.500', '2.000']

    Reference:
        Barron 2017, https://arxiv.org/abs/1704.07483, equation 2.
    """
    return jnp.where(x > 0, x, alpha * jnp.expm1(negative(x) / alpha))


SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


@activation(lambda x: jnp.where(x > 0, SELU_SCALE, SELU_SCALE * SELU_ALPHA * jnp.exp(negative(x))))
def selu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Scaled ELU, 1.0507 elu(x, 1.6733): keeps mean 0 and variance 1 of standard normal inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in selu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.111', '0.525', '2.101']

    Reference:
        Klambauer, Unterthiner, Mayr, Hochreiter 2017, https://arxiv.org/abs/1706.02515, equation 2.
    """
    return jnp.where(x > 0, SELU_SCALE * x, (SELU_SCALE * SELU_ALPHA) * jnp.expm1(negative(x)))


@activation(lambda x: side(x, 1, unit_slope(x)))
def isrlu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Inverse square root linear unit: x where x ≥ 0, x / √(1 + x²) elsewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in isrlu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.707', '0.500', '2.000']

    Reference:
        Carlile, Delamarter, Kinney, Marti, Whitney 2017, https://arxiv.org/abs/1710.09967, equation 2, α = 1.
    """
    return side(x, x, unit(x))


@activation(lambda x, beta: jnp.where(x > 0, beta / (1 + beta * positive(x)), 0))
def nlrelu(x: Float[Array, "..."], beta: float | Array = 1.0) -> Float[Array, "..."]:
    """Natural logarithm of a ReLU: log(1 + β max(x, 0)). Derivative 0 at 0.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in nlrelu(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.405', '1.099']

    Reference:
        Liu, Zhang, Chen, Li, Du 2019, https://arxiv.org/abs/1908.03682.
    """
    return jnp.log1p(beta * positive(x))
