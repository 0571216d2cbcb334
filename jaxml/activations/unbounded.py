"""Smooth, monotone and unbounded on both sides (or like exp and logit): compressions, expansions, bent lines."""

import jax.numpy as jnp

from jaxml.activations.arithmetic import mirror, root, side, tanh_parts, tanh_slope, tanh_small, unit
from jaxml.activations.rule import activation
from jaxml.axes import Array, Float


@activation(lambda x: 1 / (1 + mirror(x)))
def symlog(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Symmetric logarithm: sign(x) log(1 + |x|). Its inverse is `symexp`.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in symlog(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.693', '0.405', '1.099']

    Reference:
        Hafner et al. 2023, "DreamerV3", https://arxiv.org/abs/2301.04104, equation 9.
    """
    return side(x, 1.0, -1.0) * jnp.log1p(mirror(x))


@activation(lambda x: jnp.exp(mirror(x)))
def symexp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Symmetric exponential: sign(x) (exp(|x|) − 1).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in symexp(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.718', '0.649', '6.389']

    Reference:
        Hafner et al. 2023, "DreamerV3", https://arxiv.org/abs/2301.04104, equation 9.
    """
    return side(x, 1.0, -1.0) * jnp.expm1(mirror(x))


@activation(lambda x: 1 / root(x))
def arcsinh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Inverse hyperbolic sine: log(x + √(x² + 1)).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in arcsinh(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.881', '0.481', '1.444']
    """
    return jnp.arcsinh(x)


@activation(jnp.exp)
def exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exponential.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in exp(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.368', '1.649', '7.389']
    """
    return jnp.exp(x)


@activation(lambda x: 1 / (x * (1 - x)))
def logit(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logit, the inverse of the sigmoid, on (0, 1): log(x / (1 − x)).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in logit(jnp.array([0.1, 0.5, 0.9]))]
        ['-2.197', '0.000', '2.197']
    """
    return jnp.log(x) - jnp.log1p(-x)


@activation(lambda x: 2 * x)
def square(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square: x².

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in square(jnp.array([-1.0, 0.5, 2.0]))]
        ['1.000', '0.250', '4.000']
    """
    return x * x


@activation(lambda x: 1 + unit(x) / 2)
def bent_identity(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Bent identity: (√(x² + 1) − 1) / 2 + x.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in bent_identity(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.793', '0.559', '2.618']
    """
    r, m = root(x), mirror(x)
    middle = x + x * x / (2 * (r + 1))
    return jnp.where(x > 1, (r - 1) / 2 + x, jnp.where(x < -1, 1 / (2 * (r + m)) - (1 + m) / 2, middle))


def _tanh_shrink_slope(x):
    near = jnp.where(mirror(x) < 2.5, x, 1)
    t = tanh_small(near)
    return jnp.where(mirror(x) < 2.5, t * t, 1 - tanh_slope(x))


@activation(_tanh_shrink_slope)
def tanh_shrink(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """What tanh takes away: x − tanh(x), accurate where the two nearly cancel.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in tanh_shrink(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.238', '0.038', '1.036']
    """
    near = jnp.where(mirror(x) < 2.5, x, 1)
    c = tanh_parts(near)
    return jnp.where(mirror(x) < 2.5, near * (c / (1 + c)), x - jnp.tanh(x))
