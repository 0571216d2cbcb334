"""What the kernels of several parts share: where they run, and how lengths are cut."""

import types

import jax.numpy as jnp

from jaxml.axes import Array
from jaxml.target import INTERPRET, INTERPRET_GPU, platform

LANES = 128


def unsupported(dtype) -> str | None:
    """Why a kernel for GPUs and TPUs cannot run here with arrays of that dtype, or None."""
    if platform() not in ("gpu", "tpu", INTERPRET, INTERPRET_GPU):
        return f"it needs a GPU or TPU, this is {platform()!r}"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it computes in float32, bfloat16 and float16, x is {jnp.dtype(dtype).name}"
    from jaxml.attention import blocks  # where it is used: it brings Pallas along

    return blocks.unsupported() if platform() in ("tpu", INTERPRET) else None


def choose(gpu: types.ModuleType, tpu: types.ModuleType) -> types.ModuleType:
    """The one whose kernels the device runs."""
    return gpu if platform() in ("gpu", INTERPRET_GPU) else tpu


def padded(a: Array, *multiples: int) -> Array:
    """With zeros at the ends of its axes, up to multiples of those sizes.

    Example:
        >>> padded(jnp.ones((5, 3)), 4, 1).shape
        (8, 3)
    """
    return jnp.pad(a, [(0, -size % m) for size, m in zip(a.shape, multiples)])


def divisor(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides the size, itself padded to a multiple of 128.

    Example:
        >>> divisor(11008, 512), divisor(300, 512)
        (256, 384)
    """
    whole = -(-size // LANES) * LANES
    return max(n for n in range(LANES, min(most, whole) + 1, LANES) if whole % n == 0)
