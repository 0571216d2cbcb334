"""The GPU backend `triton`: which calls it computes. The kernels are in triton_forward.py and triton_backward.py."""

import jax.numpy as jnp

from jaxml.attention import blocks, tiles
from jaxml.attention.tiles import Inputs, Rules
from jaxml.attention.triton_backward import backward
from jaxml.attention.triton_forward import forward
from jaxml.target import INTERPRET_GPU, platform

__all__ = ["backward", "forward", "supports"]


def supports(rules: Rules, x: Inputs) -> str | None:
    """Why the kernels cannot compute the call, or None."""
    if reason := blocks.unsupported_gpu():
        return reason
    if x.query.dtype == jnp.float64 and platform() != INTERPRET_GPU:
        return "it computes in float32, bfloat16 and float16, query is float64"
    if max(x.query.shape[3], x.value.shape[3]) > 256:
        return f"head dims are at most 256, got {x.query.shape[3]} and {x.value.shape[3]}"
    return tiles.outside_kernels(rules, x)
