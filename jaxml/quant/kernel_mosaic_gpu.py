"""Products with quantised matrices on Hopper: a Pallas Mosaic GPU kernel for many rows of x (training).

It computes yᵀ = S xᵀ (or Sᵀ xᵀ): tensor cores take the dequantised tile, which is their left operand, from registers,
so that it is written nowhere. Each thread reads the bytes of its own fragment and looks their values up in a table of
sixteen numbers in shared memory; scales come 64 weights at a time. Two warp groups share a tile of x: while one
multiplies, the other dequantises; a third one copies what comes next.

What a thread reads is tested by hand; the instructions run nowhere but on a Hopper GPU.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxml.axes import Array, Float
from jaxml.kernels import padded
from jaxml.linear import vary, varying_axes
from jaxml.quant.codebook import TABLES
from jaxml.quant.qarray import QArray, units

GROUPS, HEIGHT, STEP = 2, 64, 64  # warp groups that multiply; outputs of each; weights summed at once
WIDEST = 256  # rows of x in a tile
STAGES = 4  # tiles under way, at most
WIDE = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # rows of 64 numbers of 16 bits
SHARED = 225 * 1024  # bytes of shared memory for them


class Tile(NamedTuple):
    """The codes of a step, in shared memory: rows of 32, 64 or 128 bytes, swizzled over all banks."""

    rows: int
    bytes: int
    along: bool
    halves: int  # weights a byte

    @property
    def transforms(self) -> tuple:
        return plgpu.TilingTransform((8, self.bytes)), plgpu.SwizzleTransform(self.bytes)

    def address(self, group, warp, g, c, row: int, column: int):
        """Where a thread's byte lies: of the weights at (row, column) beside its first ones (`_lookup`)."""
        if self.along:
            stored = group * HEIGHT + warp * 16 + g + row
            byte = c * (2 // self.halves) + column // self.halves
        else:
            stored = c * 2 + column
            byte = (group * HEIGHT + warp * 16) // self.halves + g + row
        piece = stored // (128 // self.bytes) & (self.bytes // 16 - 1)  # of 16 bytes
        return stored * self.bytes + (byte ^ (piece * 16))


def tile_of(along: bool, halves: int) -> Tile:
    height = GROUPS * HEIGHT
    return Tile(height, STEP // halves, True, halves) if along else Tile(STEP, height // halves, False, halves)


def product(q: QArray, x: Float[Array, "M C"], along: bool) -> Float[Array, "M N"]:
    """x S, or x Sᵀ where the sum goes `along` the stored rows S; `kernel.product` says of what."""
    codes, unit, kind = q.codes, units(q), q.kind
    M, (R, held), halves = x.shape[0], codes.shape, 1 if kind == "int8" else 2
    block = held * halves // unit.shape[1]
    width = min(WIDEST, -(-M // 64) * 64)
    x = padded(x, width, 1)
    outputs, summed = (R, held * halves) if along else (held * halves, R)
    height = GROUPS * HEIGHT  # outputs in a tile
    tile = tile_of(along, halves)
    # Of the scales: a row a block, 64 weights of a step (along: of the outputs) beside each other.
    unit = unit.T
    scales = (1, height) if along else (max(1, height // block), STEP)
    step = 2 * width * STEP + tile.rows * tile.bytes + 4 * math.prod(scales)
    stages = min(STAGES, (SHARED - 2 * width * height) // step)

    def kernel(x, codes, unit, table, y, values, out, barrier):
        group = jax.lax.axis_index("group")
        i, j = jax.lax.axis_index("outputs"), jax.lax.axis_index("rows")

        @pl.when(group == 0)
        def _():
            plgpu.copy_gmem_to_smem(table, values, barrier)

        plgpu.barrier_wait(barrier)

        def multiply(_, x, codes, unit, total):
            by = unit[0, pl.ds(group * HEIGHT, HEIGHT)] if along else unit[group * HEIGHT // block % scales[0]]
            w = _lookup(tile, codes, values) * jax.lax.broadcast_in_dim(by, (HEIGHT, STEP), (0 if along else 1,))
            plgpu.wgmma(total, w.astype(x.dtype), x.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            return total

        def whole(run):
            @functools.partial(pl.run_scoped, total=plgpu.ACC((HEIGHT, width), jnp.float32))
            def _(total):
                run(total)
                done = plgpu.layout_cast(total[...].astype(out.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                out.at[group].transpose((1, 0))[...] = done
                plgpu.commit_smem()
                at = pl.ds(i * height + group * HEIGHT, HEIGHT)
                plgpu.copy_smem_to_gmem(out.at[group], y.at[pl.ds(j * width, width), at])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        first = lambda step: step * STEP // block if along else i * height // block // scales[0]
        plgpu.emit_pipeline_warp_specialized(
            multiply,
            grid=(summed // STEP,),
            in_specs=[
                plgpu.BlockSpec((width, STEP), lambda s: (j, s), transforms=WIDE),
                plgpu.BlockSpec(
                    (tile.rows, tile.bytes), lambda s: (i, s) if along else (s, i), transforms=tile.transforms
                ),
                plgpu.BlockSpec(scales, lambda s: (first(s), i if along else s)),
            ],
            memory_registers=40,
            max_concurrent_steps=stages,
            wg_axis="group",
            num_compute_wgs=GROUPS,
            compute_context=whole,
        )(x, codes, unit)

    table = jnp.asarray(np.tile(TABLES[kind] if halves == 2 else np.zeros(16), 2), jnp.float32)
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype),
        grid=(outputs // height, x.shape[0] // width),
        grid_names=("outputs", "rows"),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=dict(
            values=plgpu.SMEM((32,), jnp.float32),
            out=plgpu.SMEM(
                (GROUPS, width, HEIGHT),
                x.dtype,
                transforms=WIDE,
            ),
            barrier=plgpu.Barrier(),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(x, codes, unit, vary(table, varying_axes(x)))
    if not along and halves == 2:  # of 16 outputs the even ones came first
        y = y.reshape(-1, outputs // 16, 2, 8).swapaxes(-1, -2).reshape(-1, outputs)
    return y[:M]


def _lookup(tile: Tile, codes, values) -> Float[Array, "64 64"]:
    """What the codes stand for, in the fragments of a left operand: outputs × weights that are summed.

    Thread t of a warp group holds, with warp w = t // 32, g = t % 32 // 4 and c = t % 4, the rows 16w + g + {0, 8} and
    the columns 2c + {0, 1} + 8n. Along stored rows, two columns are a byte. Across them, byte 8w + g has two rows:
    16w + g is its high half.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(tile.transforms), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((HEIGHT, STEP), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def fragments(ctx, codes, values):
        bytes_ = _Bytes(tile, codes, values)
        layout = plgpu.Layout.WGMMA.to_mgpu()
        shape = layout.registers_shape((HEIGHT, STEP))
        strides = layout.tiling.tile_strides((STEP, 1))
        registers = np.empty(shape, dtype=object)
        for at in np.ndindex(shape):
            row, column = divmod(sum(n * s for n, s in zip(at, strides)), STEP)
            registers[at] = bytes_.pair(row, column)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return fragments(codes, values)


class _Bytes:
    """A thread's own bytes of a tile, each read once; in the code that is being built."""

    def __init__(self, tile: Tile, codes, values):
        self.tile, self.read = tile, {}
        self.codes, self.values = mgpu.utils.memref_ptr(codes), mgpu.utils.memref_ptr(values)
        thread = _Int(mgpu.utils.thread_idx())
        self.place = thread // 128, thread // 32 % 4, thread // 4 % 8, thread % 4

    def pair(self, row: int, column: int):
        """Values of (row, column) and (row, column + 1) beside this thread's first ones."""
        both = [self.value(row, column + n) for n in (0, 1)]
        return vector.from_elements(ir.VectorType.get((2,), ir.F32Type.get()), both)

    def value(self, row: int, column: int):
        f32 = ir.F32Type.get()
        if self.tile.halves == 1:
            bits = (self.byte(row, column) ^ 0x80) | 0x4B000000  # of 2²³ + 128 + code: faster than a conversion
            return arith.subf(arith.bitcast(f32, bits.value), arith.constant(f32, 2.0**23 + 128))
        # The weight before the other one of its byte has the high half.
        first = (row, column // 2 * 2) if self.tile.along else (0, column)
        byte = self.byte(*first)
        offset = (byte & 0xF0) // 4 if first == (row, column) else (byte & 15) * 4
        return llvm.load(f32, self._pointer(self.values, offset))

    def byte(self, *at: int) -> "_Int":
        if at not in self.read:
            i8 = ir.IntegerType.get_signless(8)
            byte = llvm.load(i8, self._pointer(self.codes, self.tile.address(*self.place, *at)))
            self.read[at] = _Int(arith.extui(_Int.type(), byte))
        return self.read[at]

    def _pointer(self, base, offset: "_Int"):
        return mgpu.utils.getelementptr(base, [offset.value], ir.IntegerType.get_signless(8))


class _Int:
    """A number of the code that is being built, int32 and never negative, with Python's operators."""

    def __init__(self, value):
        self.value = value

    @staticmethod
    def type():
        return ir.IntegerType.get_signless(32)

    def _with(self, operation, other) -> "_Int":
        other = other.value if isinstance(other, _Int) else arith.constant(self.type(), other)
        return _Int(operation(self.value, other))

    __add__ = lambda self, other: self._with(arith.addi, other)
    __mul__ = lambda self, other: self._with(arith.muli, other)
    __floordiv__ = lambda self, other: self._with(arith.divui, other)
    __mod__ = lambda self, other: self._with(arith.remui, other)
    __and__ = lambda self, other: self._with(arith.andi, other)
    __or__ = lambda self, other: self._with(arith.ori, other)
    __xor__ = lambda self, other: self._with(arith.xori, other)
