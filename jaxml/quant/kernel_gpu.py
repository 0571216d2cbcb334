"""Products with quantised matrices on GPUs: Pallas kernels for Triton, for few rows of x (decoding).

A program loads codes, looks their values up in a table of sixteen numbers that stays in the L1 cache, and hands them to
the tensor cores. The two halves of a byte are neighbours in a row, so that x comes as its even and its odd columns, and
each half of the bytes has a product of its own. With many rows, where tensor cores are what is waited for, XLA
dequantises a whole matrix faster than every tile of rows does it again.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxml.axes import Array, Float
from jaxml.kernels import Tile, padded
from jaxml.linear import vary, varying_axes
from jaxml.quant.codebook import TABLES
from jaxml.quant.qarray import QArray, units
from jaxml.target import INTERPRET_GPU, platform

ROWS = 64  # of x in a tile, at most
ALONG, ACROSS = Tile(16, 32, 128, warps=4), Tile(16, 128, 32, warps=4)  # rows of x, of y; bytes or rows summed at once


def product(q: QArray, x: Float[Array, "M C"], along: bool) -> Float[Array, "M N"]:
    """x S, or x Sᵀ where the sum goes `along` the stored rows S; `kernel.product` says of what."""
    codes, unit, kind = q.codes, units(q), q.kind
    (M, _), (R, held) = x.shape, codes.shape
    halves = 1 if kind == "int8" else 2
    lanes = held // unit.shape[1]  # bytes that share a scale
    rows = max(16, min(ROWS, pl.next_power_of_2(M)))
    bytes_, stored, tile = (ALONG.step, ALONG.columns, ALONG) if along else (ACROSS.columns, ACROSS.step, ACROSS)
    if bytes_ % lanes and lanes % bytes_:  # a scale a row of any length: all columns are the first
        lanes = bytes_ * pl.cdiv(held, bytes_)
    codes = padded(codes, stored, bytes_)
    unit = padded(unit, stored, codes.shape[1] // lanes)
    table = jnp.asarray(TABLES[kind] if halves == 2 else [0.0], jnp.float32)
    if along:
        x = padded(x, rows, halves * bytes_)
        x = jnp.moveaxis(x.reshape(x.shape[0], -1, halves), -1, 0)
    else:
        x = padded(x, rows, stored)[None]
    # [halves or 1, rows, columns of x]

    def halves_of(table, codes, unit, at_rows, at_bytes):
        of = codes[at_rows, pl.ds(at_bytes, bytes_)]
        units = _expanded(unit, at_rows, at_bytes, lanes, of.shape)
        if halves == 1:
            yield (of.astype(jnp.float32) * units).astype(x.dtype)
            return
        of = of.astype(jnp.int32)
        for code in (of >> 4, of & 15):
            yield (table[code] * units).astype(x.dtype)

    def along_rows(table, codes, unit, x, y):
        def add(s, total):
            for h, w in enumerate(halves_of(table, codes, unit, slice(None), s * bytes_)):
                total += _dot(x[h, :, pl.ds(s * bytes_, bytes_)], w.T)
            return total

        total = jax.lax.fori_loop(0, codes.shape[1] // bytes_, add, jnp.zeros(y.shape, jnp.float32))
        y[...] = total.astype(y.dtype)

    def across_rows(table, codes, unit, x, y):
        first = pl.program_id(1) * bytes_

        def add(s, totals):
            at = pl.ds(s * stored, stored)
            of = x[0, :, at]
            return tuple(t + _dot(of, w) for t, w in zip(totals, halves_of(table, codes, unit, at, first)))

        zero = jnp.zeros((rows, bytes_), jnp.float32)
        totals = jax.lax.fori_loop(0, codes.shape[0] // stored, add, (zero,) * halves)
        for h, total in enumerate(totals):
            y[h] = total.astype(y.dtype)

    down, whole = x.shape[1] // rows, lambda a: pl.BlockSpec(a.shape, lambda i, j: (0,) * a.ndim)
    run = (
        dict(
            kernel=along_rows,
            grid=(down, codes.shape[0] // stored),
            in_specs=[
                whole(table),
                pl.BlockSpec((stored, codes.shape[1]), lambda i, j: (j, 0)),
                pl.BlockSpec((stored, unit.shape[1]), lambda i, j: (j, 0)),
                pl.BlockSpec((halves, rows, x.shape[2]), lambda i, j: (0, i, 0)),
            ],
            out_specs=pl.BlockSpec((rows, stored), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct(
                (x.shape[1], codes.shape[0]), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
            ),
        )
        if along
        else dict(
            kernel=across_rows,
            grid=(down, codes.shape[1] // bytes_),
            in_specs=[
                whole(table),
                whole(codes),
                whole(unit),
                pl.BlockSpec((1, rows, x.shape[2]), lambda i, j: (0, i, 0)),
            ],
            out_specs=pl.BlockSpec((halves, rows, bytes_), lambda i, j: (0, i, j)),
            out_shape=jax.ShapeDtypeStruct(
                (halves, x.shape[1], codes.shape[1]), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
            ),
        )
    )
    y = pl.pallas_call(
        **run,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=platform() == INTERPRET_GPU,
        name="quantised_product",
    )(vary(table, varying_axes(x)), codes, unit, x)
    if along:
        return y[:M, :R]
    return jnp.moveaxis(y, 0, -1).reshape(y.shape[1], -1)[:M, : held * halves]


def _expanded(unit, at_rows, at_bytes, lanes: int, shape: tuple[int, int]) -> Float[Array, "rows bytes"]:
    """Each byte's scale."""
    if lanes >= shape[1]:
        return unit[at_rows, pl.ds(at_bytes // lanes, 1)]
    count = shape[1] // lanes
    of = unit[at_rows, pl.ds(at_bytes // lanes, count)]
    return jnp.broadcast_to(of[:, :, None], (shape[0], count, lanes)).reshape(shape)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
