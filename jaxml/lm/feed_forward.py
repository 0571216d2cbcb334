"""The feed-forward half of a layer: gated as in Llama, or of learnt functions (`jaxml.kan`) in models trained anew.

======== ============================================================
gated    down(act(gate x) * up x)
kan      two layers of splines, D → F → D, on grids over ±`LIMIT`
rational two group-rational layers (Kolmogorov–Arnold transformer)
======== ============================================================
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float, Params
from jaxml.kan import layer as layers
from jaxml.kan import rational
from jaxml.lm.config import DecoderConfig
from jaxml.parallel import rules

LIMIT = 3.0  # standard deviations of normalised inputs that the grids reach


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, L layers stacked."""
    L, D, F = config.num_layers, config.width, config.hidden_dim
    widths = {"up": (D, F), "down": (F, D)}
    if config.feed_forward == "kan":
        K = _spec(config).size
        return {f"{n}_coef": (L, K, *w) for n, w in widths.items()} | {f"{n}_base": (L, *w) for n, w in widths.items()}
    if config.feed_forward == "rational":
        out: dict[str, tuple[int, ...]] = {}
        for name, (i, o) in widths.items():
            if i % rational.GROUPS:
                raise ValueError(
                    f"DecoderConfig: width and hidden_dim are multiples of {rational.GROUPS} (groups of channels) with "
                    f"feed_forward='rational', got {i}."
                )
            out |= {name: (L, i, o), f"{name}_bias": (L, o)}
            out |= {f"{name}_numerator": (L, 6, rational.GROUPS), f"{name}_denominator": (L, 4, rational.GROUPS)}
        return out
    out = {"gate": (L, D, F), "up": (L, D, F), "down": (L, F, D)}
    return out | ({"gate_bias": (L, F), "up_bias": (L, F), "down_bias": (L, D)} if config.mlp_bias else {})


def init(key: Array, config: DecoderConfig, name: str, shape: tuple[int, ...]) -> Array | None:
    """A parameter of learnt functions in float32; None of any other, which starts as all matrices do."""
    if config.feed_forward == "kan" and name in shapes(config):
        # As `kan.layer.init` with start "power": of K functions of `in` inputs, and of the base functions.
        fan = shape[-2] * (shape[1] if name.endswith("_coef") else 1)
        return fan**-0.5 * jax.random.normal(key, shape)
    if config.feed_forward == "rational" and name.endswith(("_numerator", "_denominator")):
        of = rational.start(jax.nn.silu if name.startswith("down") else None)[name.partition("_")[2]]
        return jnp.broadcast_to(of[None, :, None], shape)
    if config.feed_forward == "rational" and name in ("up", "down"):
        gain = rational.gain(jax.nn.silu if name == "down" else None)
        return gain * shape[-2] ** -0.5 * jax.random.normal(key, shape)
    return None


def apply(layer: Params, config: DecoderConfig, x: Float[Array, "... D"], dense: Callable) -> Float[Array, "... D"]:
    """One layer's; `dense(layer, name, x)` is the decoder's product with a weight."""
    if config.feed_forward == "kan":
        for name in ("up", "down"):
            x = layers.apply(_layer(layer[f"{name}_coef"], layer[f"{name}_base"], config), x)
        return x
    if config.feed_forward == "rational":
        for name in ("up", "down"):
            of = {part: layer[f"{name}_{part}"] for part in ("numerator", "denominator")}
            x = dense(layer, name, rational.functions(of, x))
        return x
    gate = dense(layer, "gate", x)
    gate = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return dense(layer, "down", rules.hint(gate * dense(layer, "up", x), "batch", "length", "hidden"))


def _spec(config: DecoderConfig) -> layers.Spec:
    return layers.Spec(grid=config.kan_grid)


def _layer(coef: Array, base: Array, config: DecoderConfig) -> Any:
    ends = jnp.linspace(-LIMIT, LIMIT, config.kan_grid + 1)
    points = jnp.broadcast_to(ends[None], (base.shape[0], ends.size))
    return layers.Layer(coef, base, points, None, (), _spec(config))
