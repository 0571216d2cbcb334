"""Products with quantised matrices on TPUs: a Pallas kernel that dequantises tiles and never stores them.

A weight's value is looked up along sublanes (eight of the sixteen values at a time, one vector instruction each), its
scale along lanes; a tile's scales are themselves looked up before, in the table of the dynamic map. Two weights share a
byte, so that the high halves of a tile's bytes are its even columns. With few rows it is x (or y) that is put into that
order; with many rows the bytes are spread over twice the lanes, which costs nothing while the matrix units are busy.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxml.attention import blocks
from jaxml.axes import Array, Float
from jaxml.kernels import LANES, padded
from jaxml.linear import vary, varying_axes
from jaxml.quant import codebook
from jaxml.quant.qarray import NESTED_BLOCK, QArray, unit_of
from jaxml.target import INTERPRET, platform

SUBLANES = 8
PAIR = 2 * LANES  # weights in 128 bytes
HALF = LANES // 2
FEW = 512  # rows of x that are put into the order of the bytes, at most


class Cut(NamedTuple):
    """Sizes of a tile."""

    rows: int  # of x
    stored: int  # rows of codes
    run: int  # weights of such a row
    few: bool


def product(q: QArray, x: Float[Array, "M C"], along: bool) -> Float[Array, "M N"]:
    """x S, or x Sᵀ where the sum goes `along` the stored rows S; `kernel.product` says of what."""
    M, (R, run), kind, codes = x.shape[0], q.rows, q.kind, q.codes
    cut, per_row = cut_of(x, R, run), q.scales.shape[1]
    block = run // per_row
    apart = cut.few and kind != "int8"
    span = -(-min(per_row, max(32, cut.run // block)) // SUBLANES) * SUBLANES  # blocks whose scales are made at once
    deep = -(-per_row // span) * span
    axes = varying_axes(x)
    if q.nested is None:
        scales, nested = padded(q.scales.T, deep, cut.stored), ()  # beyond the codes' ends by zeros
    else:
        scales, nested = q.scales.T, q.nested.scales
        groups = -(-R // cut.stored) * cut.stored * deep // NESTED_BLOCK + (_windows(per_row) + 1) * LANES
        halves = jnp.pad(nested, (0, groups - nested.size + -groups % HALF)).reshape(-1, HALF)
        nested = jnp.concatenate([halves[:-1], halves[1:]], axis=1).reshape(1, -1)  # 128 from every 64th on
        dynamic = jnp.asarray(codebook.dynamic(), jnp.float32).reshape(2, 1, LANES)
        dynamic = jnp.concatenate([vary(dynamic, axes), jnp.broadcast_to(q.nested.offset, (1, 1, LANES))])
        nested = nested, jnp.broadcast_to(dynamic, (3, SUBLANES, LANES))
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

    def kernel(table, codes, scales, *refs):
        *nested, x, y, unit, total = refs

        @pl.when(pl.program_id(2) == 0)
        def _():
            total[...] = jnp.zeros(total.shape, total.dtype)

        first = pl.program_id(2 if along else 1) * cut.run
        column = first // block // span * span
        _units(unit, scales, nested, kind, pl.program_id(1 if along else 2) * cut.stored, column, per_row, span)
        first = first - column * block
        for n in range(cut.run // PAIR):  # as wide as the widest matrix unit
            here = pl.ds(n * PAIR, PAIR)
            halves = [_dense(table, codes, unit, kind, block, span, first, 2 * n + half, apart) for half in (0, 1)]
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
                pl.BlockSpec((deep, cut.stored), lambda *i: (0, of_codes(*i)[0])),
                *(pl.BlockSpec(a.shape, lambda *i, of=a.ndim: (0,) * of) for a in nested),
                pl.BlockSpec((cut.rows, step), lambda i, j, s: (i, s)),
            ],
            out_specs=pl.BlockSpec((cut.rows, width), lambda i, j, s: (i, j)),
            scratch_shapes=[
                pltpu.VMEM((cut.stored, -(-span // LANES) * LANES), jnp.float32),
                pltpu.VMEM((cut.rows, width), jnp.float32),
            ],
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
            bytes_accessed=q.nbytes * (x.shape[0] // cut.rows)
            + x.dtype.itemsize * (x.size * kept + x.shape[0] * kept * width),
        ),
        interpret=platform() == INTERPRET,
        name="quantised_product",
    )(vary(_table(kind), axes), codes, scales, *nested, x)
    y = y if along or not apart else _in_order(y, back=True)
    return y[:M, : R if along else run]


def _units(unit, scales, nested: tuple, kind: str, row, column, per_row: int, span: int) -> None:
    """Writes what multiplies the values of the tile's blocks: those from (row, column) on of the matrix's scales.

    XLA keeps so narrow a matrix with its rows along lanes; that is how the scales come, and they are turned.
    """
    rows, start = unit.shape[0], row * per_row + column
    for at in range(0, span, LANES):
        deep = min(LANES, span - at)
        for r in range(0, rows, LANES):
            wide = pl.ds(r, min(LANES, rows))
            some = scales[pl.ds(at if span == scales.shape[0] else pl.multiple_of(column + at, 32), deep), wide]
            parts = []
            for n in range(0, deep, SUBLANES):
                of = some[n : n + SUBLANES]
                if nested:
                    of = _nested(of.astype(jnp.int32), *nested, start, r * per_row + at + n, per_row)
                parts.append(unit_of(of, kind))
            unit[wide, at : at + deep] = jnp.concatenate(parts).T


def _nested(codes, scales, dynamic, start, further: int, per_row: int) -> Float[Array, "sublanes lanes"]:
    """Scales of a row along the sublanes, of rows along the lanes: from their codes, `further` than `start` on."""
    sublane, lane = (jax.lax.broadcasted_iota(jnp.int32, codes.shape, axis) for axis in (0, 1))
    low, high = (_pick(dynamic[n], codes & (LANES - 1), 1) for n in (0, 1))
    group = start // NESTED_BLOCK + further // NESTED_BLOCK
    half = group // HALF
    place = start % NESTED_BLOCK + further % NESTED_BLOCK + sublane + lane * per_row
    of_lane = place // NESTED_BLOCK + (group - half * HALF)
    of_groups = jnp.zeros(codes.shape, jnp.float32)
    for n in range(_windows(per_row)):
        window = scales[:, pl.ds(pl.multiple_of((half + 2 * n) * LANES, LANES), LANES)]
        found = _pick(jnp.broadcast_to(window, (SUBLANES, LANES)), of_lane & (LANES - 1), 1)
        of_groups = found if n == 0 else jnp.where(of_lane < n * LANES, of_groups, found)
    return jnp.where(codes < LANES, low, high) * of_groups + dynamic[2, :, : codes.shape[1]]


def _windows(per_row: int) -> int:
    """Of 128 scales of scales, from any 64th on, those that the scales of 128 rows can have."""
    return -(-(LANES * per_row // NESTED_BLOCK + 3 + HALF) // LANES)


def _dense(
    table, codes, unit, kind: str, block: int, span: int, first, n: int, apart: bool
) -> Float[Array, "stored lanes"]:
    """The n-th 128 weights of each stored row of the tile: in order, or (`apart`) every second of 256."""
    rows = codes.shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    which = n if kind == "int8" else n // 2
    held = codes[:, which * LANES : (which + 1) * LANES].astype(jnp.int32)
    start = first + (n // 2 * PAIR if apart else n * LANES)
    column = start // block
    units = unit[:, pl.ds(pl.multiple_of(column // LANES * LANES, LANES), LANES)]
    of_lane = column % LANES + (lane * (2 if apart else 1)) // block
    if span < LANES:  # beyond the row's end, where x is 0, no lane may be one that was never written
        of_lane = jnp.minimum(of_lane, span - 1)
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
    of = np.zeros(16) if kind == "int8" else codebook.TABLES[kind]
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
