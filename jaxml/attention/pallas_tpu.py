"""The TPU backend `mosaic_tpu`: which calls it computes. The kernels are in tpu_forward.py and tpu_backward.py."""

import jax.numpy as jnp

from jaxml.attention import blocks, tiles
from jaxml.attention.tiles import Inputs, Rules
from jaxml.attention.tpu_backward import backward
from jaxml.attention.tpu_forward import forward
from jaxml.target import INTERPRET, platform

__all__ = ["backward", "forward", "supports"]


def supports(rules: Rules, x: Inputs) -> str | None:
    """Why the kernels cannot compute the call, or None."""
    if reason := blocks.unsupported():
        return reason
    if x.query.dtype == jnp.float64 and platform() != INTERPRET:
        return "TPUs have no float64"
    return tiles.outside_kernels(rules, x)
