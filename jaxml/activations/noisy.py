"""Activations that draw: the key comes first and is explicit; each has a fixed counterpart without noise."""

import jax
import jax.numpy as jnp

from jaxml.activations.rule import lean, real
from jaxml.activations.simplex import softmax
from jaxml.axes import Array, Float, wide


def rrelu(key: Array, x: Float[Array, "..."], lower: float = 1 / 8, upper: float = 1 / 3) -> Float[Array, "..."]:
    """Randomised leaky rectifier: x where x ≥ 0, a x elsewhere, a uniform in [lower, upper) for each element.

    Without noise: `leaky_relu(x, (lower + upper) / 2)`.

    Raises:
        ValueError: lower > upper.

    Example:
        >>> y = rrelu(jax.random.key(0), jnp.full(10_000, -1.0))  # the mean of −a is −11/48
        >>> round(float(y.mean()), 2), bool((-y >= 1 / 8).all()), float(rrelu(jax.random.key(0), 3.0))
        (-0.23, True, 3.0)

    Reference:
        Xu, Wang, Chen, Li 2015, https://arxiv.org/abs/1505.00853, section 2.4.
    """
    if lower > upper:
        raise ValueError(f"rrelu: lower ≤ upper, got {lower} and {upper}. Exchange them.")
    x = real(x, "rrelu")
    a = jax.random.uniform(key, x.shape, wide(x.dtype), lower, upper)
    return lean(lambda x, a: jnp.where(x >= 0, x, a * x))(x, a.astype(x.dtype))


def bernoulli(key: Array, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 with probability σ(x), 0 otherwise, with the gradient of σ (straight through). Without noise: `sigmoid(x)`.

    Example:
        >>> y = bernoulli(jax.random.key(0), jnp.full(10_000, 1.0))
        >>> round(float(y.mean()), 2), round(float(jax.nn.sigmoid(1.0)), 2)
        (0.73, 0.73)
        >>> float(jax.grad(bernoulli, argnums=1)(jax.random.key(0), 0.0))
        0.25

    Reference:
        Bengio, Léonard, Courville 2013, https://arxiv.org/abs/1308.3432.
    """
    x = real(x, "bernoulli")
    u = jax.random.uniform(key, x.shape, wide(x.dtype))

    def draw(x, u):
        p = jax.nn.sigmoid(x)
        return p + jax.lax.stop_gradient((u < p).astype(p.dtype) - p)

    return lean(draw)(x, u)


def concrete(key: Array, x: Float[Array, "..."], temperature: float = 2 / 3) -> Float[Array, "..."]:
    """Binary concrete: σ((x + log u − log(1 − u)) / temperature), u uniform. Without noise: `sigmoid(x)`.

    Example:
        >>> y = concrete(jax.random.key(0), jnp.full(10_000, 1.0))
        >>> round(float((y > 0.5).mean()), 2), round(float(jax.nn.sigmoid(1.0)), 2)
        (0.73, 0.73)

    Reference:
        Maddison, Mnih, Teh 2016, https://arxiv.org/abs/1611.00712, appendix B.
    """
    x = real(x, "concrete")
    noise = jax.random.logistic(key, x.shape, wide(x.dtype))
    return lean(lambda x, noise: jax.nn.sigmoid((x + noise) / temperature))(x, noise)


def hard_concrete(
    key: Array, x: Float[Array, "..."], temperature: float = 2 / 3, lower: float = -0.1, upper: float = 1.1
) -> Float[Array, "..."]:
    """`concrete` stretched to [lower, upper] and clipped to [0, 1]: exactly 0 and exactly 1 have a probability.

    Without noise: clip(σ(x) (upper − lower) + lower, 0, 1).

    Example:
        >>> y = hard_concrete(jax.random.key(0), jnp.zeros(10_000))
        >>> round(float((y == 0).mean()), 2), round(float((y == 1).mean()), 2)
        (0.17, 0.17)

    Reference:
        Louizos, Welling, Kingma 2017, https://arxiv.org/abs/1712.01312, equations 10 to 12.
    """
    x = real(x, "hard_concrete")
    noise = jax.random.logistic(key, x.shape, wide(x.dtype))

    def draw(x, noise):
        return jnp.clip(jax.nn.sigmoid((x + noise) / temperature) * (upper - lower) + lower, 0, 1)

    return lean(draw)(x, noise)


def gumbel_softmax(
    key: Array, x: Float[Array, "..."], temperature: float = 1.0, *, hard: bool = False, axis: int = -1
) -> Float[Array, "..."]:
    """Softmax of (x + Gumbel noise) / temperature; `hard` gives a one-hot array with the soft one's gradient.

    Without noise: `softmax(x)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> float(gumbel_softmax(jax.random.key(0), jnp.zeros(5), hard=True).sum())
        1.0

    Reference:
        Jang, Gu, Poole 2016, https://arxiv.org/abs/1611.01144, equation 2; Maddison, Mnih, Teh 2016,
        https://arxiv.org/abs/1611.00712.
    """
    x = real(x, "gumbel_softmax")
    noise = jax.random.gumbel(key, x.shape, wide(x.dtype))
    soft = softmax((x.astype(noise.dtype) + noise) / temperature, axis)
    if hard:
        best = jax.nn.one_hot(jnp.argmax(soft, axis=axis), x.shape[axis], axis=axis, dtype=soft.dtype)
        soft = soft + jax.lax.stop_gradient(best - soft)
    return soft.astype(x.dtype)
