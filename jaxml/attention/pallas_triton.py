"""The GPU backends `triton` and `jax_triton`: which calls they compute.

The kernels are in triton_forward.py and triton_backward.py; triton_launch.py says in what the two differ.
"""

import functools

import jax.numpy as jnp

from jaxml import triton_call
from jaxml.attention import blocks, tiles
from jaxml.attention.tiles import Inputs, Rules
from jaxml.attention.triton_backward import backward
from jaxml.attention.triton_forward import forward
from jaxml.attention.triton_launch import by_jax_triton
from jaxml.target import INTERPRET_GPU, platform

__all__ = ["backward", "backward_by_jax_triton", "forward", "forward_by_jax_triton", "jax_triton_supports", "supports"]

forward_by_jax_triton = functools.partial(forward, launch=by_jax_triton)
backward_by_jax_triton = functools.partial(backward, launch=by_jax_triton)


def supports(rules: Rules, x: Inputs) -> str | None:
    """Why the kernels cannot compute the call, or None."""
    if reason := blocks.unsupported_gpu():
        return reason
    if x.query.dtype == jnp.float64 and platform() != INTERPRET_GPU:
        return "it computes in float32, bfloat16 and float16, query is float64"
    if max(x.query.shape[3], x.value.shape[3]) > 256:
        return f"head dims are at most 256, got {x.query.shape[3]} and {x.value.shape[3]}"
    return tiles.outside_kernels(rules, x)


def jax_triton_supports(rules: Rules, x: Inputs) -> str | None:
    """Why they cannot as source of Triton, or None."""
    return supports(rules, x) or triton_call.unsupported()
