"""Gated linear units: act(gate) · value, of two arrays, as in the feed-forward act(x Wg) * (x Wu).

The product is rounded once, and reverse mode keeps the two inputs and nothing else. A projection that holds both halves
in one array is split by `halves`.

Reference:
    Dauphin, Fan, Auli, Grangier 2016, https://arxiv.org/abs/1612.08083; Shazeer 2020, "GLU variants improve
    transformer", https://arxiv.org/abs/2002.05202.
"""

import jax
import jax.numpy as jnp

from jaxml.activations import gelus, rectifiers, self_gated, sigmoids
from jaxml.activations.arithmetic import bounded, positive
from jaxml.activations.rule import activation, real
from jaxml.axes import Array, Float


def halves(x: Float[Array, "... 2F"], axis: int = -1) -> tuple[Float[Array, "... F"], Float[Array, "... F"]]:
    """The first and the second half of an axis.

    Raises:
        ValueError: the axis is odd.

    Example:
        >>> import jax.numpy as jnp
        >>> gate, value = halves(jnp.array([0.0, 1.0, 2.0, 3.0]))
        >>> bilinear(gate, value).tolist()
        [0.0, 3.0]
    """
    x = real(x, "halves")
    if x.shape[axis] % 2:
        raise ValueError(f"halves: the axis has an even length, got {x.shape[axis]}. Project to an even width.")
    first, second = jnp.split(x, 2, axis=axis)
    return first, second


def glu(x: Float[Array, "... 2F"], axis: int = -1) -> Float[Array, "... F"]:
    """Gated linear unit of one array, as in jax.nn and torch: first half times sigmoid of the second.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in glu(jnp.array([1.0, 2.0, 0.0, 1.0]))]
        ['0.500', '1.462']

    Reference:
        Dauphin, Fan, Auli, Grangier 2016, https://arxiv.org/abs/1612.08083, equation 1.
    """
    value, gate = halves(x, axis)
    return siglu(gate, value)


@activation(lambda gate, value: sigmoids.sigmoid.slope(gate) * value)
def siglu(gate: Float[Array, "... F"], value: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """σ(gate) · value, the gated linear unit of two arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in siglu(jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5]))]
        ['0.807', '0.440']
    """
    return sigmoids.sigmoid.formula(gate) * value


@activation(lambda gate, value: value)
def bilinear(gate: Float[Array, "... F"], value: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """gate · value.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in bilinear(jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5]))]
        ['-3.000', '1.000']
    """
    return gate * value


@activation(lambda gate, value: jnp.where(gate > 0, value, 0))
def reglu(gate: Float[Array, "... F"], value: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """max(gate, 0) · value.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in reglu(jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5]))]
        ['0.000', '1.000']
    """
    return positive(gate) * value


@activation(lambda gate, value: gelus.gelu_tanh.slope(gate) * value)
def _geglu_tanh(gate, value):
    return gelus.gelu_tanh.formula(gate) * value


@activation(lambda gate, value: gelus.gelu_exact.slope(gate) * value)
def _geglu_exact(gate, value):
    return gelus.gelu_exact.formula(gate) * value


def geglu(gate: Float[Array, "... F"], value: Float[Array, "... F"], approximate: bool = True) -> Float[Array, "... F"]:
    """gelu(gate) · value, with the default of `gelu`.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in geglu(jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5]))]
        ['-0.476', '0.977']
    """
    return _geglu_tanh(gate, value) if approximate else _geglu_exact(gate, value)


@activation(lambda gate, value: self_gated.silu.slope(gate) * value)
def swiglu(gate: Float[Array, "... F"], value: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) · value, the feed-forward of the Llama family.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> gate, value = jnp.zeros((2, 8)), jnp.ones((2, 8))
        >>> _, vjp = jax.vjp(swiglu, gate, value)
        >>> sorted(a.shape for a in jax.tree.leaves(vjp))
        [(2, 8), (2, 8)]
    """
    return self_gated.silu.formula(gate) * value


@activation(lambda gate, value: rectifiers.selu.slope(gate) * value)
def seglu(gate: Float[Array, "... F"], value: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """selu(gate) · value.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in seglu(jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5]))]
        ['-3.334', '1.051']
    """
    return rectifiers.selu.formula(gate) * value


@activation(lambda gate, value: self_gated.mish.slope(gate) * value)
def mishglu(gate: Float[Array, "... F"], value: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """mish(gate) · value.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in mishglu(jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5]))]
        ['-0.910', '0.972']
    """
    return self_gated.mish.formula(gate) * value


@activation(lambda gate, value: sigmoids.sigmoid.slope(gate) * jnp.tanh(value))
def gtu(gate: Float[Array, "... F"], value: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """Gated tanh unit: σ(gate) · tanh(value).

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in gtu(jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5]))]
        ['0.268', '0.407']

    Reference:
        van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders",
        https://arxiv.org/abs/1606.05328, equation 2.
    """
    return sigmoids.sigmoid.formula(gate) * jnp.tanh(value)


def _clamped_swiglu_slope(gate, value, alpha, limit):
    near = jnp.minimum(gate, limit)
    right = jax.nn.sigmoid(alpha * near)
    slope = right * (1 + alpha * bounded(near, -500.0) * jax.nn.sigmoid(-alpha * near))
    return jnp.where(gate < limit, slope, 0) * (jnp.clip(value, -limit, limit) + 1)


@activation(_clamped_swiglu_slope)
def clamped_swiglu(
    gate: Float[Array, "... F"],
    value: Float[Array, "... F"],
    alpha: float | Array = 1.702,
    limit: float | Array = 7.0,
) -> Float[Array, "... F"]:
    """g σ(α g) (v + 1) with g = min(gate, limit) and v = value clipped to ±limit.

    Example:
        >>> import jax.numpy as jnp
        >>> [f"{y:.3f}" for y in clamped_swiglu(jnp.array([-1.0, 2.0]), jnp.array([3.0, 0.5]))]
        ['-0.617', '2.903']

    Reference:
        OpenAI 2025, "gpt-oss-120b & gpt-oss-20b model card", and the reference code published with the weights. There
        the two halves are interleaved, gate first: `x[..., ::2], x[..., 1::2]`.
    """
    near = jnp.minimum(gate, limit)
    return bounded(near, -500.0) * jax.nn.sigmoid(alpha * near) * (jnp.clip(value, -limit, limit) + 1)
