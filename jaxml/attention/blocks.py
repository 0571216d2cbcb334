"""How large the tiles of a kernel are: by generation of the device, by length and by width, without a tuning run.

A TPU kernel works on a block of query rows, cut into chunks of columns of the transposed tile; keys pass by in chunks
of their own. Both are multiples of 128 and cut a length evenly, so that any length costs little more than itself.
"""

import dataclasses

import jax.numpy as jnp

from jaxml.attention import tuned
from jaxml.target import INTERPRET, INTERPRET_GPU, compute_capability, generation, platform

LANES = 128


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a generation of TPU is good at: the row of the table."""

    vmem: int  # bytes that a kernel may plan with
    chunk: int  # keys and queries of a chunk
    rows: int  # queries of a block, forwards
    rows_backward: int
    together: int = 1  # chunks of keys in one turn of the forward loop: 1 or 2


MiB = 2**20
TABLE = {
    "v4": Limits(vmem=14 * MiB, chunk=512, rows=1024, rows_backward=1024),
    "v5e": Limits(vmem=96 * MiB, chunk=512, rows=2048, rows_backward=1024),
    "v5p": Limits(vmem=80 * MiB, chunk=512, rows=2048, rows_backward=1024),
    "v6e": Limits(vmem=96 * MiB, chunk=512, rows=2048, rows_backward=1024, together=2),
    "tpu7x": Limits(vmem=48 * MiB, chunk=512, rows=2048, rows_backward=1024, together=2),
    INTERPRET: Limits(vmem=48 * MiB, chunk=128, rows=256, rows_backward=256, together=2),
}


def limits() -> Limits:
    """The table's row for the device that runs; the kernels' `supports` has asked whether there is one."""
    return TABLE[generation()]


def unsupported() -> str | None:
    """Why kernels for TPUs cannot run here, or None."""
    if platform() not in ("tpu", INTERPRET):
        return f"it needs a TPU, this is {platform()}"
    if generation() not in TABLE:
        known = ", ".join(name for name in TABLE if name != INTERPRET)
        return f"it knows the TPUs {known}, this is {generation()!r}"
    return None


def cut_evenly(length: int, most: int) -> tuple[int, int]:
    """(size, number) of the pieces of a length: multiples of 128, near `most`, with as little left over as can be.

    Example:
        >>> cut_evenly(1100, 512), cut_evenly(4096, 512), cut_evenly(5, 512)
        ((384, 3), (512, 8), (128, 1))
    """
    fewest = max(1, round(length / most))
    choices = []
    for n in range(fewest, 2 * fewest + 2):
        size = -(-length // (n * LANES)) * LANES
        choices.append((size, -(-length // size)))
    least = min(size * number for size, number in choices)
    return max((size, number) for size, number in choices if size * number <= 1.03 * least)


def unsupported_gpu(interpreted: bool = True) -> str | None:
    """Why programs for GPUs from Ampere on cannot run here, or None; `interpreted`: whether they may be."""
    if interpreted and platform() == INTERPRET_GPU:
        return None
    if platform() != "gpu":
        return f"it needs a GPU, this is {platform()}"
    if compute_capability() < 80:
        return f"it needs an Ampere GPU or a newer one, this has compute capability {compute_capability() / 10}"
    return None


# ---- GPUs -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GpuCut:
    """What a program for a GPU takes at once, and how: the row of the table."""

    rows: int  # queries
    columns: int  # keys
    warps: int
    stages: int  # of loads that are under way


# Kernel → widest head dim → tiles. What spills in CUDA 13.0's machine code, tests/attention/test_gpu_compile.py says.
_AMPERE = {
    "forward": {64: GpuCut(128, 64, 4, 3), 128: GpuCut(128, 64, 8, 3), 256: GpuCut(64, 64, 8, 2)},
    "queries": {64: GpuCut(64, 64, 4, 2), 128: GpuCut(64, 64, 8, 2), 256: GpuCut(32, 64, 8, 1)},
    "keys": {64: GpuCut(32, 64, 4, 2), 128: GpuCut(32, 64, 8, 2), 256: GpuCut(64, 32, 8, 2)},
}
_HOPPER = {
    "forward": {64: GpuCut(128, 128, 8, 3), 128: GpuCut(128, 128, 8, 2), 256: GpuCut(128, 64, 8, 2)},
    "queries": {64: GpuCut(128, 64, 8, 2), 128: GpuCut(128, 64, 8, 2), 256: GpuCut(128, 32, 8, 1)},
    "keys": {64: GpuCut(64, 128, 8, 2), 128: GpuCut(64, 64, 8, 2), 256: GpuCut(64, 32, 8, 2)},
}
_FLOAT32 = {
    "forward": {64: GpuCut(32, 32, 8, 1), 128: GpuCut(32, 32, 8, 1), 256: GpuCut(16, 32, 8, 1)},
    "queries": {64: GpuCut(32, 32, 8, 1), 128: GpuCut(16, 32, 4, 1), 256: GpuCut(16, 16, 8, 1)},
    "keys": {64: GpuCut(32, 32, 8, 2), 128: GpuCut(16, 32, 8, 1), 256: GpuCut(16, 16, 8, 1)},
}
PROGRAMS = 264  # as many as fill an H100 twice


def gpu_cut(T: int, H: int, H2: int, dtype, which: str = "forward") -> GpuCut:
    """The tiles of a Triton kernel: "forward", or backward of the "queries" or the "keys"."""
    if platform() == INTERPRET_GPU:
        return GpuCut(32, 32, 4, 1)
    if chosen := tuned.find("triton", which, T, max(H, H2), dtype):
        return GpuCut(**chosen)
    table = _FLOAT32 if dtype == jnp.float32 else _HOPPER if compute_capability() >= 90 else _AMPERE
    cut = table[which][next(width for width in table[which] if max(H, H2) <= width)]
    short = max(16, 1 << (T - 1).bit_length())
    return dataclasses.replace(cut, rows=min(cut.rows, short))


def splits(programs: int, blocks: int) -> int:
    """Into how many parts the keys of each program are cut, where there are too few programs to fill a GPU."""
    return max(1, min(PROGRAMS // programs, blocks // 4))


@dataclasses.dataclass(frozen=True)
class HopperCut:
    """The tile of a Hopper program: the row of the table."""

    rows: int  # queries
    columns: int  # keys
    stages: int  # blocks that are under way, at most


# Kernel → widest head dim → tiles, of 16 bits; 240 registers bound them.
HOPPER = {
    "forward": {64: HopperCut(128, 128, 4), 128: HopperCut(128, 128, 4), 256: HopperCut(128, 64, 4)},
    "queries": {64: HopperCut(128, 128, 3), 128: HopperCut(128, 64, 3), 256: HopperCut(64, 64, 2)},
    "keys": {64: HopperCut(64, 128, 4), 128: HopperCut(64, 128, 2), 256: HopperCut(64, 64, 2)},
}
SHARED = 223 * 1024  # bytes of shared memory for tiles


def hopper_cut(T: int, H: int, H2: int, dtype, which: str = "forward") -> HopperCut:
    """The tiles of a Hopper kernel: "forward", or backward of the "queries" or the "keys"."""
    if chosen := tuned.find("mosaic_gpu", which, T, max(H, H2), dtype):
        return HopperCut(**chosen)
    cut = HOPPER[which][next(width for width in HOPPER[which] if (H2 if which == "forward" else max(H, H2)) <= width)]
    if which == "forward":
        stages = lambda columns: min(cut.stages, (SHARED - shared_bytes(cut.rows, H)) // shared_bytes(columns, H, H2))
        columns = cut.columns if stages(cut.columns) > 1 else 64
        return HopperCut(cut.rows, columns, stages(columns))
    return cut


def shared_bytes(rows: int, *widths: int) -> int:
    """Of tiles of 16 bits, their widths multiples of 64."""
    return sum(2 * rows * -(-width // 64) * 64 for width in widths)
