"""The GPU backends `mosaic_gpu` and `mosaic_gpu_fused`: which calls they compute.

The kernels are in hopper_forward.py and hopper_backward.py; the two differ in the backward pass.
"""

import jax.numpy as jnp

from jaxml.attention import tiles
from jaxml.attention.tiles import Inputs, Rules
from jaxml.target import compute_capability, platform


def forward(rules: Rules, x: Inputs):
    from jaxml.attention import hopper_forward  # where it is used: it brings Mosaic GPU along

    return hopper_forward.forward(rules, x)


def backward(rules: Rules, x: Inputs, *args):
    from jaxml.attention import hopper_backward

    return hopper_backward.backward(rules, x, *args)


def fused_backward(rules: Rules, x: Inputs, *args):
    from jaxml.attention import hopper_backward

    return hopper_backward.backward(rules, x, *args, fused=True)


def supports(rules: Rules, x: Inputs) -> str | None:
    """Why the kernels cannot compute the call, or None."""
    if platform() != "gpu":
        return f"it needs a Hopper GPU, this is {platform()}"
    if compute_capability() != 90:
        return f"it needs a Hopper GPU, this one has compute capability {compute_capability() / 10}"
    if x.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, query is {x.query.dtype}"
    if max(x.query.shape[3], x.value.shape[3]) > 256:
        return f"head dims are at most 256, got {x.query.shape[3]} and {x.value.shape[3]}"
    return tiles.outside_kernels(rules, x)


def fused_supports(rules: Rules, x: Inputs) -> str | None:
    """Why they cannot with the backward pass in one kernel, or None."""
    if max(x.query.shape[3], x.value.shape[3]) > 128:
        return f"head dims are at most 128, got {x.query.shape[3]} and {x.value.shape[3]}"
    return supports(rules, x)
