"""Products with quantised matrices on TPUs: a Pallas kernel that dequantises tiles and never stores them.

A weight's value is looked up along sublanes (eight of the sixteen values at a time, one vector instruction each), its
scale along lanes. Two weights share a byte, so that the high halves of a tile's bytes are its even columns. With few
rows it is x (or y) that is put into that order; with many rows the bytes are spread over twice the lanes, which costs
nothing while the matrix units are busy.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxml.attention import blocks
from jaxml.axes import Array, Float, Int
from jaxml.kernels import LANES, padded
from jaxml.linear import vary, varying_axes
from jaxml.quant.codebook import TABLES
from jaxml.target import INTERPRET, platform

SUBLANES = 8
PAIR = 2 * LANES  # weights in 128 bytes
FEW = 512  # rows of x that are put into the order of the bytes, at most


class Cut(NamedTuple):
    """Sizes of a tile."""

    rows: int  # of x
    stored: int  # rows of codes
    run: int  # weights of such a row
    few: bool


def product(
    x: Float[Array, "M C"], codes: Int[Array, "R bytes"], unit: Float[Array, "R blocks"], kind: str, along: bool
) -> Float[Array, "M N"]:
    """x S, or x Sᵀ where the sum goes `along` the stored rows S; `kernel.product` says of what."""
    M, R, run = x.shape[0], codes.shape[0], codes.shape[1] * (1 if kind == "int8" else 2)
    cut, block = cut_of(x, R, run), run // unit.shape[1]
    apart = cut.few and kind != "int8"
    unit = padded(unit, cut.stored, LANES)  # by zeros: what lies beyond the codes' ends is multiplied by them
    tiles = pl.cdiv(R, cut.stored), pl.cdiv(run, cut.run)
    if along:
        x = padded(x, cut.rows, cut.run)
        x = _in_order(x) if apart else x
        summed, kept, of_codes = tiles[1], tiles[0], lambda i, j, s: (j, s)
        step, width = cut.run, cut.stored
    else:
        x = padded(x, cut.rows, cut.stored)
        summed, kept, of_codes = *tiles, lambda i, j, s: (s, j)
        step, width = cut.stored, cut.run

    def kernel(table, codes, unit, x, y, total):
        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros(total.shape, total.dtype)

        first = pl.program_id(2 if along else 1) * cut.run
        for n in range(cut.run // PAIR):  # as wide as the widest matrix unit
            here = pl.ds(n * PAIR, PAIR)
            halves = [_dense(table, codes, unit, kind, block, first, 2 * n + half, apart) for half in (0, 1)]
            w = jnp.concatenate(halves, axis=1).astype(x.dtype)
            if along:
                total[...] += _dot(x[:, here], w, 1)
            else:
                total[:, here] += _dot(x[...], w, 0)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            y[...] = total[...].astype(y.dtype)

    y = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(x.shape[0] // cut.rows, kept, summed),
            in_specs=[
                pl.BlockSpec((2, SUBLANES, LANES), lambda i, j, s: (0, 0, 0)),
                pl.BlockSpec((cut.stored, cut.run * codes.shape[1] // run), of_codes),
                pl.BlockSpec((cut.stored, unit.shape[1]), lambda *i: (of_codes(*i)[0], 0)),
                pl.BlockSpec((cut.rows, step), lambda i, j, s: (i, s)),
            ],
            out_specs=pl.BlockSpec((cut.rows, width), lambda i, j, s: (i, j)),
            scratch_shapes=[pltpu.VMEM((cut.rows, width), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            (x.shape[0], kept * width), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=blocks.limits().vmem + 8 * blocks.MiB,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * R * run,
            transcendentals=0,
            bytes_accessed=(codes.size + 4 * unit.size) * (x.shape[0] // cut.rows)
            + x.dtype.itemsize * (x.size * kept + x.shape[0] * kept * width),
        ),
        interpret=platform() == INTERPRET,
        name="quantised_product",
    )(vary(_table(kind), varying_axes(x)), codes, unit, x)
    y = y if along or not apart else _in_order(y, back=True)
    return y[:M, : R if along else run]


def lookup(table: np.ndarray, codes: Int[Array, "..."]) -> Float[Array, "..."]:
    """``table[codes]`` of 256 values, float32: each half of them lies along the lanes."""
    rows, piece = -(-codes.size // LANES), 32 if platform() == INTERPRET else 512
    flat = jnp.pad(codes.reshape(-1), (0, -codes.size % LANES)).reshape(rows, LANES)
    piece = min(piece, -(-rows // 32) * 32)

    def kernel(table, codes, out):
        for r in range(0, piece, 32):
            some = codes[r : r + 32].astype(jnp.int32)
            for n in range(0, 32, SUBLANES):
                code = some[n : n + SUBLANES]
                low, high = (_pick(table[half], code & (LANES - 1), 1) for half in (0, 1))
                out[r + n : r + n + SUBLANES] = jnp.where(code >= LANES, high, low)

    values = jnp.asarray(table, jnp.float32).reshape(2, 1, LANES)
    found = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, piece),),
        in_specs=[
            pl.BlockSpec((2, SUBLANES, LANES), lambda i: (0, 0, 0)),
            pl.BlockSpec((piece, LANES), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((piece, LANES), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, LANES), jnp.float32, manual_axis_type=jax.typeof(flat).manual_axis_type),
        interpret=platform() == INTERPRET,
        name="quantised_scales",
    )(vary(jnp.broadcast_to(values, (2, SUBLANES, LANES)), varying_axes(flat)), flat)
    return found.reshape(-1)[: codes.size].reshape(codes.shape)


def _dense(table, codes, unit, kind: str, block: int, first, n: int, apart: bool) -> Float[Array, "stored lanes"]:
    """The n-th 128 weights of each stored row of the tile: in order, or (`apart`) every second of 256."""
    rows = codes.shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    which = n if kind == "int8" else n // 2
    held = codes[:, which * LANES : (which + 1) * LANES].astype(jnp.int32)
    start = first + (n // 2 * PAIR if apart else n * LANES)
    column = start // block
    units = unit[:, pl.ds(pl.multiple_of(column // LANES * LANES, LANES), LANES)]
    of_lane = column % LANES + (lane * (2 if apart else 1)) // block
    out = []
    for r in range(0, rows, SUBLANES):
        code = held[r : r + SUBLANES]
        if kind == "int8":
            value = code.astype(jnp.float32)
        else:
            if apart:
                code = code >> 4 if n % 2 == 0 else code & 15
            else:
                code = (_pick(code, n % 2 * (LANES // 2) + lane // 2, 1) >> (4 - lane % 2 * 4)) & 15
            low, high = (_pick(table[half], code & 7, 0) for half in (0, 1))
            value = jnp.where(code > 7, high, low)
        out.append(value * _pick(units[r : r + SUBLANES], of_lane, 1))
    return jnp.concatenate(out)


def _pick(a: Array, at: Array, axis: int) -> Array:
    return jnp.take_along_axis(a, at, axis, mode="promise_in_bounds")


def _dot(a: Array, b: Array, over: int) -> Array:
    return jax.lax.dot_general(a, b, (((1,), (over,)), ((), ())), preferred_element_type=jnp.float32)


def _in_order(a: Array, back: bool = False) -> Array:
    """Even columns of every 256 before the odd ones, or back: by a product, which TPUs do faster than they gather."""
    order = np.arange(PAIR).reshape(LANES, 2).T.reshape(-1)
    turn = np.eye(PAIR)[:, order]
    groups = a.reshape(a.shape[0], -1, PAIR)
    turn = jnp.asarray(turn.T if back else turn, a.dtype)
    return jnp.matmul(groups, turn, precision="highest").reshape(a.shape)


def _table(kind: str) -> Float[Array, "halves values lanes"]:
    of = np.zeros(16) if kind == "int8" else TABLES[kind]
    return jnp.broadcast_to(jnp.asarray(of, jnp.float32).reshape(2, SUBLANES, 1), (2, SUBLANES, LANES))


def cut_of(x: Array, stored: int, run: int) -> Cut:
    """Tiles: with few rows codes are what is waited for, so that they come in long pieces."""
    few = x.shape[0] <= FEW
    small = platform() == INTERPRET
    most_rows, most_stored, most_run = (32, 32, 512) if small else (FEW, 256, 4096) if few else (2048, 512, 512)
    sublanes = 16 if x.dtype.itemsize == 2 else 8
    rows = _piece(x.shape[0], sublanes, most_rows)
    return Cut(rows, _piece(stored, LANES if not small else 32, most_stored), _piece(run, PAIR, most_run), few)


def _piece(size: int, least: int, most: int) -> int:
    """Of the doubles of `least` up to `most`, the largest that leaves as little over as can be, or nearly."""
    options = [least * 2**n for n in range(int(math.log2(most // least)) + 1)]
    whole = lambda piece: -(-size // piece) * piece
    return max(piece for piece in options if whole(piece) <= 1.06 * whole(least))
