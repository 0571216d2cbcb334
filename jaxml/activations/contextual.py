"""Learnable activations whose value depends on more than one number: on positions, features or neighbours."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxml.activations.arithmetic import bounded, logistic
from jaxml.activations.rule import activation, lean, real
from jaxml.axes import Array, Params


class Learnable(NamedTuple):
    """An activation with parameters; `about` has its formula and its paper.

    Example:
        >>> params = polynorm.init(degree=2)
        >>> sorted(params), polynorm.apply(params, jnp.array([1.0, -1.0])).round(3).tolist()
        (['bias', 'weight'], [1.0, 0.0])
    """

    init: Callable[..., Params]
    apply: Callable[..., Array]
    about: str


def _acon_slope(x, p1, p2, beta):
    z = bounded(beta * (p1 - p2) * x, -500.0, 500.0)
    return (p1 - p2) * logistic(z) * (1 + z * logistic(-z)) + p2


@activation(_acon_slope)
def acon(x, p1, p2, beta):
    """(p₁ − p₂) x σ(β (p₁ − p₂) x) + p₂ x.

    Example:
        >>> x = jnp.array([-1.0, 0.0, 2.0])
        >>> bool(jnp.allclose(acon(x, 1.0, 0.0, 1.0), jax.nn.silu(x))), acon(x, 1.0, 0.25, 1000.0).tolist()
        (True, [-0.25, 0.0, 2.0])
    """
    d = (p1 - p2) * x
    return jnp.where(beta * d < -500, 0, d * logistic(bounded(beta * d, -500.0))) + p2 * x


def _meta_acon_init(key: Array, channels: int, reduction: int = 16) -> Params:
    width = max(reduction, channels // reduction)
    keys = jax.random.split(key)
    draw = lambda key, m, n: jax.random.normal(key, (m, n), jnp.float32) / math.sqrt(m)
    return {
        "p1": jnp.ones(channels, jnp.float32),
        "p2": jnp.zeros(channels, jnp.float32),
        "down": draw(keys[0], channels, width),
        "up": draw(keys[1], width, channels),
    }


def _meta_acon_apply(params: Params, x: Array) -> Array:
    x = real(x, "meta_acon")
    if x.ndim < 3:
        raise ValueError(f"meta_acon: x is [B, positions …, D], got {x.shape}. Add an axis, or take acon_c.")
    mean = jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim - 1)), keepdims=True)
    beta = jax.nn.sigmoid(mean @ params["down"] @ params["up"])
    return acon(x, params["p1"], params["p2"], beta)


meta_acon = Learnable(
    _meta_acon_init,
    _meta_acon_apply,
    """acon_c whose β is computed from the mean over positions: σ(mean(x) W₁ W₂); `init(key, channels)`. The authors'
    code normalises by batch statistics between the two matrices; this does not. Ma, Zhang, Liu, Sun 2020,
    https://arxiv.org/abs/2009.04759, section 3.3.""",
)


def _polynorm_init(degree: int = 3) -> Params:
    return {"weight": jnp.full(degree, 1 / degree, jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def _polynorm_apply(params: Params, x: Array, eps: float = 1e-6) -> Array:
    def formula(x, weight, bias):
        out, power = bias, x
        for k in range(len(weight)):
            size = jax.lax.rsqrt(jnp.mean(power * power, axis=-1, keepdims=True) + eps)
            out, power = out + weight[k] * power * size, power * x
        return out

    return lean(formula)(x, params["weight"], params["bias"])


polynorm = Learnable(
    _polynorm_init,
    _polynorm_apply,
    """Σᵢ wᵢ xⁱ / rms(xⁱ) + b, the root mean square along the last axis; `init(degree)`. Zhuo et al. 2024,
    https://arxiv.org/abs/2411.03884, equation 4.""",
)


def _frelu_init(key: Array, channels: int, window: int = 3) -> Params:
    scale = 1 / window
    return {"kernel": scale * jax.random.normal(key, (window, window, 1, channels), jnp.float32)}


def _frelu_apply(params: Params, x: Array) -> Array:
    def formula(x, kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        near = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=axes, feature_group_count=x.shape[-1]
        )
        return jnp.maximum(x, near)

    if jnp.ndim(x) != 4:
        raise ValueError(f"frelu: x is [B, height, width, D], got {jnp.shape(x)}. Reshape it.")
    return lean(formula)(x, params["kernel"])


frelu = Learnable(
    _frelu_init,
    _frelu_apply,
    """Funnel rectifier: max(x, depthwise convolution of x), for images [B, height, width, D]; `init(key, channels)`.
    The authors normalise the convolution by batch statistics; this does not. Ma, Zhang, Sun 2020,
    https://arxiv.org/abs/2007.11824, equation 3.""",
)
