"""What the kernels of several parts share: where they run, and how lengths are cut."""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxml.axes import Array
from jaxml.target import INTERPRET, INTERPRET_GPU, platform

LANES = 128


class Tile(NamedTuple):
    """What a program for a GPU computes at once, and how."""

    rows: int
    columns: int
    step: int  # how much of a summed axis it takes at a time
    warps: int = 8
    stages: int = 3  # of loads that are under way


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


def divide(a: Array, n: int) -> Array:
    """a // n of an index, which is never negative."""
    return a if n == 1 else jax.lax.div(a, jnp.asarray(n, a.dtype))


def remainder(a: Array, n: int) -> Array:
    """a % n of an index, which is never negative."""
    return jnp.zeros_like(a) if n == 1 else jax.lax.rem(a, jnp.asarray(n, a.dtype))


def right_operand(w: Array, block: tuple[int, ...], index: Callable) -> tuple[Array, Any]:
    """The operand w [..., N, M] of a product on a GPU that sums over N, and its BlockSpec; `rows_of` loads from it.

    Tensor cores of Hopper read float32 only with the summed axis last: such arrays are handed over transposed.

    Args:
        block, index: of the BlockSpec, as if w were not transposed.
    """
    from jax.experimental import pallas as pl  # where it is used: it takes its time

    if w.dtype != jnp.float32:
        return w, pl.BlockSpec(block, index)
    turn = lambda a: (*a[:-2], a[-1], a[-2])
    return w.swapaxes(-1, -2), pl.BlockSpec(turn(block), lambda *i: turn(index(*i)))


def rows_of(ref, *at):
    """The rows [N, M] at those places of a block that `right_operand` made."""
    *before, rows = at
    return ref[(*before, slice(None), rows)].T if ref.dtype == jnp.float32 else ref[(*before, rows, slice(None))]
