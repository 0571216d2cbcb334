"""Piecewise lines and parabolas, their steps with straight-through gradients, and activations over pairs of features.

Where one-sided derivatives differ, the derivative is the left one, unless a docstring says otherwise.
"""

import jax
import jax.numpy as jnp

from jaxml.activations.arithmetic import bounded, mirror, negative, positive, side
from jaxml.activations.rule import activation, real
from jaxml.axes import Array, Float


def _between(x, low, high):
    """1 inside, 0 outside and at the bounds."""
    return jnp.where((x > low) & (x < high), 1.0, 0.0).astype(x.dtype)


@activation(lambda x: _between(x, -1, 1))
def hard_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Clipped line: min(max(x, −1), 1). Derivative 0 at both bounds.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in hard_tanh(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.000', '0.500', '1.000']

    Reference:
        Collobert 2004, "Large scale machine learning".
    """
    return jnp.clip(x, -1, 1)


@activation(lambda x: _between(x, -3, 3) / 6)
def hard_sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Clipped line: min(max(x + 3, 0), 6) / 6. Derivative 0 at both bounds.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in hard_sigmoid(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.333', '0.583', '0.833']

    Reference:
        Howard et al. 2019, "MobileNetV3", https://arxiv.org/abs/1905.02244, section 5.2.
    """
    return jnp.clip(x + 3, 0, 6) / 6


@activation(lambda x: jnp.where(x >= 3, 1, _between(x, -3, 3) * ((2 * bounded(x, -3, 3) + 3) / 6)))
def hard_silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Hard swish: x min(max(x + 3, 0), 6) / 6. Derivative 0 at −3, 1 at 3.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in hard_silu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.333', '0.292', '1.667']

    Reference:
        Howard et al. 2019, "MobileNetV3", https://arxiv.org/abs/1905.02244, section 5.2.
    """
    return bounded(x, -3) * (jnp.clip(x + 3, 0, 6) / 6)


@activation(lambda x: jnp.where(x >= 0, 1, _between(x, -2, 0) * (bounded(x, -2, 0) + 1)))
def hard_mish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Hard mish: x/2 min(max(x + 2, 0), 2).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in hard_mish(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.500', '0.500', '2.000']

    Reference:
        Wightman, "PyTorch Image Models" (timm), after a proposal of D. Misra.
    """
    return bounded(x, -2) * (jnp.clip(x + 2, 0, 2) / 2)


def _hard_elish_slope(x):
    gate, left = jnp.clip((x + 1) / 2, 0, 1), negative(x)
    inside = _between(x, -1, 0) * (jnp.exp(left) * gate + jnp.expm1(left) / 2)
    return side(x, jnp.where(x < 1, bounded(x, high=1.0) + 0.5, 1), inside)


@activation(_hard_elish_slope)
def hard_elish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Hard ELiSH: x where x ≥ 0, exp(x) − 1 elsewhere, times min(max((x + 1) / 2, 0), 1). Derivative 1 at 1.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in hard_elish(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.000', '0.375', '2.000']

    Reference:
        Basirat, Roth 2018, https://arxiv.org/abs/1808.00783, equation 7.
    """
    return side(x, positive(x), jnp.expm1(negative(x))) * jnp.clip((x + 1) / 2, 0, 1)


@activation(lambda x, width: jnp.where(mirror(x) > width, 1.0, 0.0))
def hard_shrink(x: Float[Array, "..."], width: float | Array = 0.5) -> Float[Array, "..."]:
    """Hard shrinkage: x where |x| > width, 0 elsewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in hard_shrink(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.000', '0.000', '2.000']

    Reference:
        Donoho, Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage".
    """
    return jnp.where(mirror(x) > width, x, 0)


@activation(lambda x, width: jnp.where(mirror(x) > width, 1.0, 0.0))
def soft_shrink(x: Float[Array, "..."], width: float | Array = 0.5) -> Float[Array, "..."]:
    """Soft shrinkage: sign(x) max(|x| − width, 0).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in soft_shrink(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.500', '0.000', '1.500']

    Reference:
        Donoho, Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage".
    """
    return jnp.where(x > width, x - width, jnp.where(x < -width, x + width, 0))


@activation(lambda x, at, value: jnp.where(x > at, 1.0, 0.0))
def threshold(x: Float[Array, "..."], at: float | Array = 0.0, value: float | Array = 0.0) -> Float[Array, "..."]:
    """x where x > at, `value` elsewhere. (torch.nn.Threshold has no defaults; at 0 and value 0 are the ReLU.)

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in threshold(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.500', '2.000']
    """
    return jnp.where(x > at, x, value)


@activation(lambda x, n: jnp.where((x > 0) & (x < n), 1.0, 0.0))
def relu_n(x: Float[Array, "..."], n: float | Array = 1.0) -> Float[Array, "..."]:
    """Rectifier with a ceiling: min(max(x, 0), n). Derivative 0 at 0 and at n.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in relu_n(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.500', '1.000']

    Reference:
        Krizhevsky 2010, "Convolutional deep belief networks on CIFAR-10" (n = 6).
    """
    return jnp.minimum(jnp.maximum(x, 0), n)


@activation(lambda x: jnp.where(x > -1, 1.0, 0.0))
def shifted_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rectifier with a floor of −1: max(x, −1).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in shifted_relu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.000', '0.500', '2.000']

    Reference:
        Clevert, Unterthiner, Hochreiter 2015, https://arxiv.org/abs/1511.07289, section 4.1.
    """
    return jnp.maximum(x, -1)


@activation(lambda x: 2 * positive(x))
def relu_squared(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Squared rectifier: max(x, 0)².

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in relu_squared(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.250', '4.000']

    Reference:
        So et al. 2021, "Primer", https://arxiv.org/abs/2109.08668.
    """
    return positive(x) * positive(x)


@activation(lambda x, scale, bias: 2 * scale * positive(x))
def star_relu(
    x: Float[Array, "..."], scale: float | Array = 0.8944, bias: float | Array = -0.4472
) -> Float[Array, "..."]:
    """StarReLU: scale max(x, 0)² + bias; mean 0 and variance 1 of standard normal inputs at the defaults.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in star_relu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.447', '-0.224', '3.130']

    Reference:
        Yu et al. 2022, "MetaFormer baselines for vision", https://arxiv.org/abs/2210.13452, equation 3.
    """
    return scale * (positive(x) * positive(x)) + bias


@activation(lambda x, negative_slope: 2 * x * side(x, 1.0, negative_slope * negative_slope))
def leaky_relu_squared(x: Float[Array, "..."], negative_slope: float | Array = 0.01) -> Float[Array, "..."]:
    """Squared leaky rectifier: x² where x ≥ 0, (negative_slope x)² elsewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in leaky_relu_squared(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.250', '4.000']
    """
    y = x * side(x, 1.0, negative_slope)
    return y * y


@activation(lambda x: jnp.sign(x))
def absolute(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Absolute value. Derivative 0 at 0.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in absolute(jnp.array([-1.0, 0.5, 2.0]))]
        ['1.000', '0.500', '2.000']

    Reference:
        Jarrett, Kavukcuoglu, Ranzato, LeCun 2009, "What is the best multi-stage architecture for object recognition?".
    """
    return jnp.abs(x)


def _srelu_slope(x, left, left_slope, right, right_slope):
    return jnp.where(x >= right, right_slope, jnp.where(x <= left, left_slope, 1.0)).astype(x.dtype)


@activation(_srelu_slope)
def srelu(
    x: Float[Array, "..."],
    left: float | Array = -1.0,
    left_slope: float | Array = 0.1,
    right: float | Array = 1.0,
    right_slope: float | Array = 0.1,
) -> Float[Array, "..."]:
    """S-shaped rectifier of three lines: 1 between `left` and `right`, the slopes given outside.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in srelu(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.000', '0.500', '1.100']

    Reference:
        Jin et al. 2015, https://arxiv.org/abs/1512.07030, equation 1.
    """
    above, below = right + right_slope * (x - right), left + left_slope * (x - left)
    return jnp.where(x >= right, above, jnp.where(x <= left, below, x))


@activation(lambda x: positive(1 - mirror(x) / 2))
def sqnl(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square nonlinearity, a tanh of parabolas: sign(x) (|x| − x²/4) where |x| ≤ 2, sign(x) elsewhere.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in sqnl(jnp.array([-1.0, 0.5, 2.0]))]
        ['-0.750', '0.438', '1.000']

    Reference:
        Wuraola, Patel 2018, "SQNL: a new computationally efficient activation function".
    """
    near = bounded(x, -2.0, 2.0)
    return near * (1 - mirror(near) / 4)


@activation(lambda x: -_between(x, -1, 1) * jnp.sign(x))
def triangle(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Triangle: max(1 − |x|, 0). Derivative 0 at the three kinks.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in triangle(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.500', '0.000']
    """
    return jnp.maximum(1 - jnp.abs(x), 0)


@activation(lambda x: jnp.clip((x + 1) / 2, 0, 1))
def sparse_plus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Softplus' sparse twin: 0 where x ≤ −1, (x + 1)²/4 between, x where x ≥ 1.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in sparse_plus(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.562', '2.000']

    Reference:
        Blondel, Martins, Niculae 2019, "Learning with Fenchel–Young losses", https://arxiv.org/abs/1901.02324.
    """
    near = jnp.clip(x, -1, 1) + 1
    return jnp.where(x >= 1, x, near * near / 4)


@activation(lambda x: _between(x, -1, 1) / 2)
def sparse_sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sigmoid's sparse twin, and the derivative of `sparse_plus`: min(max((x + 1)/2, 0), 1).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in sparse_sigmoid(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '0.750', '1.000']

    Reference:
        Blondel, Martins, Niculae 2019, "Learning with Fenchel–Young losses", https://arxiv.org/abs/1901.02324.
    """
    return jnp.clip((x + 1) / 2, 0, 1)


# ---- steps whose gradient is that of something else --------------------------------------------------


@activation(lambda x: _between(x, -1, 1) / 2)
def step(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Heaviside's step, 1 where x > 0, with the gradient of `sparse_sigmoid` (straight through).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in step(jnp.array([-1.0, 0.5, 2.0]))]
        ['0.000', '1.000', '1.000']

    Reference:
        Bengio, Léonard, Courville 2013, https://arxiv.org/abs/1308.3432.
    """
    return jnp.where(x > 0, 1.0, 0.0).astype(x.dtype)


@activation(lambda x: _between(x, -1, 1))
def sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Sign, with the gradient of `hard_tanh` (straight through).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in sign(jnp.array([-1.0, 0.5, 2.0]))]
        ['-1.000', '1.000', '1.000']

    Reference:
        Courbariaux, Hubara, Soudry, El-Yaniv, Bengio 2016, https://arxiv.org/abs/1602.02830, equation 4.
    """
    return jnp.sign(x)


# ---- over several features ---------------------------------------------------------------------------


def crelu(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """Concatenated rectifiers: [max(x, 0), max(−x, 0)] along `axis`, which doubles.

    Example:
        >>> import jax.numpy as jnp
        >>> crelu(jnp.array([1.0, -2.0])).tolist()
        [1.0, 0.0, 0.0, 2.0]

    Reference:
        Shang, Sohn, Almeida, Lee 2016, https://arxiv.org/abs/1603.05201.
    """
    x = real(x, "crelu")
    return jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=axis)


def maxout(x: Float[Array, "..."], pieces: int = 2, axis: int = -1) -> Float[Array, "..."]:
    """Largest of each `pieces` neighbours along `axis`, which shrinks by that factor.

    Raises:
        ValueError: `pieces` does not divide the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in maxout(jnp.array([-1.0, 0.5, 2.0, 1.0]))]
        ['0.500', '2.000']

    Reference:
        Goodfellow, Warde-Farley, Mirza, Courville, Bengio 2013, https://arxiv.org/abs/1302.4389.
    """
    return jnp.max(_groups(x, pieces, axis, "maxout"), axis=axis % jnp.ndim(x) + 1)


def group_sort(x: Float[Array, "..."], size: int = 2, axis: int = -1) -> Float[Array, "..."]:
    """Each `size` neighbours along `axis` in ascending order: keeps the norm of gradients.

    Raises:
        ValueError: `size` does not divide the axis.

    Example:
        >>> import jax.numpy as jnp
        >>> group_sort(jnp.array([3.0, 1.0, 2.0, 4.0])).tolist()
        [1.0, 3.0, 2.0, 4.0]

    Reference:
        Anil, Lucas, Grosse 2018, https://arxiv.org/abs/1811.05381, section 4.
    """
    return jnp.sort(_groups(x, size, axis, "group_sort"), axis=axis % jnp.ndim(x) + 1).reshape(jnp.shape(x))


def _groups(x: Array, size: int, axis: int, name: str) -> Array:
    x = real(x, name)
    axis %= x.ndim
    if size < 1 or x.shape[axis] % size:
        raise ValueError(
            f"{name}: the axis is a multiple of the group, got {x.shape[axis]} and {size}. Choose another size."
        )
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
