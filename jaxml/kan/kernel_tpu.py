"""The three maps of `kernel.py` on TPUs: Pallas kernels whose float32 sums stay in VMEM.

A step of the grid holds a tile of x, and for up to `TOGETHER` functions their values and products one after the other:
the vector units compute the next function while the matrix units work on the last one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxml.attention import blocks
from jaxml.axes import Array
from jaxml.kan import bspline
from jaxml.kan.kernel_tiles import grid, values
from jaxml.kernels import divisor, padded
from jaxml.target import INTERPRET, platform

SUBLANES = 16
TOGETHER = 32
ROWS, INPUTS, OUTPUTS = 512, 256, 1024  # of a tile, at most


def spread(spec, n, dtype, x, weight, coef, points):
    (B, n_in), (K, _, n_out) = x.shape, coef.shape
    cut = cut_of("spread", x, K, n_in, n_out)
    of_rows = [padded(a, cut.rows, cut.inputs) for a in (x, weight) if a is not None]
    coef = padded(coef.astype(x.dtype), cut.together, cut.inputs, cut.outputs)

    def kernel(ends, low, high, coef, *refs):
        *x_and_weight, y, total = refs
        tiles = (a[...] for a in x_and_weight)
        of = _values(spec, n, cut, pl.program_id(3), ends, low[...], high[...], *tiles)

        def add():
            for j in range(cut.together):
                total[...] += _dot(of(j).astype(x.dtype), coef[j], 1, 0)

        _accumulate(add, total, y, axes=(2, 3))

    y = _call(
        kernel,
        "kan_spread",
        total=(cut.rows, cut.outputs),
        grid=(of_rows[0].shape[0] // cut.rows, coef.shape[2] // cut.outputs, coef.shape[1] // cut.inputs, cut.chunks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *[pl.BlockSpec((1, cut.inputs), lambda i, j, s, k: (0, s))] * 2,
            pl.BlockSpec((cut.together, cut.inputs, cut.outputs), lambda i, j, s, k: (k, s, j)),
            *[pl.BlockSpec((cut.rows, cut.inputs), lambda i, j, s, k: (i, s)) for _ in of_rows],
        ],
        out_spec=pl.BlockSpec((cut.rows, cut.outputs), lambda i, j, s, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((of_rows[0].shape[0], coef.shape[2]), dtype),
    )(_ends(spec, cut), *grid(points, cut.inputs), coef, *of_rows)
    return y[:B, :n_out]


def collect(spec, n, dtype, x, coef, g, points):
    (B, n_in), (K, _, n_out) = x.shape, coef.shape
    cut = cut_of("collect", x, K, n_in, n_out)
    x = padded(x, cut.rows, cut.inputs)
    coef = padded(coef.astype(x.dtype), cut.together, cut.inputs, cut.outputs)
    g = padded(g.astype(x.dtype), cut.rows, cut.outputs)

    def kernel(ends, low, high, coef, x, g, d, total):
        of = _values(spec, n, cut, pl.program_id(3), ends, low[...], high[...], x[...])

        def add():
            for j in range(cut.together):
                total[...] += of(j) * _dot(g[...], coef[j], 1, 1)

        _accumulate(add, total, d, axes=(2, 3))

    d = _call(
        kernel,
        "kan_collect",
        total=(cut.rows, cut.inputs),
        grid=(x.shape[0] // cut.rows, x.shape[1] // cut.inputs, g.shape[1] // cut.outputs, cut.chunks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *[pl.BlockSpec((1, cut.inputs), lambda i, j, s, k: (0, j))] * 2,
            pl.BlockSpec((cut.together, cut.inputs, cut.outputs), lambda i, j, s, k: (k, j, s)),
            pl.BlockSpec((cut.rows, cut.inputs), lambda i, j, s, k: (i, j)),
            pl.BlockSpec((cut.rows, cut.outputs), lambda i, j, s, k: (i, s)),
        ],
        out_spec=pl.BlockSpec((cut.rows, cut.inputs), lambda i, j, s, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct(x.shape, dtype),
    )(_ends(spec, cut), *grid(points, cut.inputs), coef, x, g)
    return d[:B, :n_in]


def outer(spec, n, dtype, x, weight, g, points):
    n_in, n_out, K = x.shape[1], g.shape[1], spec.size
    cut = cut_of("outer", x, K, n_in, n_out)
    of_rows = [padded(a, cut.rows, cut.inputs) for a in (x, weight) if a is not None]
    g = padded(g.astype(x.dtype), cut.rows, cut.outputs)

    def kernel(ends, low, high, g, *refs):
        *x_and_weight, c, total = refs
        turned = (a[...].astype(jnp.float32).T for a in x_and_weight)  # once, rather than each function's values
        of = _values(spec, n, cut, pl.program_id(0), ends, low[...], high[...], *turned)

        def add():
            for j in range(cut.together):
                total[j] += _dot(of(j).astype(g.dtype), g[...], 1, 0)

        _accumulate(add, total, c, axes=(3,))

    c = _call(
        kernel,
        "kan_outer",
        total=(cut.together, cut.inputs, cut.outputs),
        grid=(cut.chunks, of_rows[0].shape[1] // cut.inputs, g.shape[1] // cut.outputs, g.shape[0] // cut.rows),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *[pl.BlockSpec((cut.inputs, 1), lambda k, i, j, s: (i, 0))] * 2,
            pl.BlockSpec((cut.rows, cut.outputs), lambda k, i, j, s: (s, j)),
            *[pl.BlockSpec((cut.rows, cut.inputs), lambda k, i, j, s: (s, i)) for _ in of_rows],
        ],
        out_spec=pl.BlockSpec((cut.together, cut.inputs, cut.outputs), lambda k, i, j, s: (k, i, j)),
        out_shape=jax.ShapeDtypeStruct((cut.chunks * cut.together, of_rows[0].shape[1], g.shape[1]), dtype),
    )(_ends(spec, cut), *(a.T for a in grid(points, cut.inputs)), g, *of_rows)
    return c[:K, :n_in, :n_out]


def _values(spec, n: int, cut, chunk, ends, *tiles: Array):
    """j ↦ `values` of the chunk's function j."""
    known = bspline.ends(spec)

    def of(j: int):
        if cut.chunks == 1:
            return values(spec, n, float(j), [float(e) or None for e in known[:, j]], *tiles)
        k = chunk * cut.together + j
        return values(spec, n, k.astype(jnp.float32), [ends[0, k], ends[1, k]], *tiles)

    return of


def _dot(a: Array, b: Array, over_a: int, over_b: int) -> Array:
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


def _accumulate(add, total, out, axes: tuple[int, ...]) -> None:
    """`add` to the total on every step along some axes of the grid, written out after the last one."""
    here = lambda ends: functools.reduce(jnp.logical_and, [pl.program_id(a) == end for a, end in zip(axes, ends)])

    @pl.when(here([0] * len(axes)))
    def _():
        total[...] = jnp.zeros(total.shape, total.dtype)

    add()

    @pl.when(here([pl.num_programs(a) - 1 for a in axes]))
    def _():
        out[...] = total[...].astype(out.dtype)


# ---- tiles -------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    rows: int
    inputs: int
    outputs: int
    together: int  # functions a step
    chunks: int  # of functions


def cut_of(name: str, x: Array, size: int, n_in: int, n_out: int) -> Cut:
    """Tiles of a map as large as VMEM allows: operands and results held twice, float32 sums once."""
    chunks = -(-size // TOGETHER)
    rows = min(ROWS, -(-x.shape[0] // SUBLANES) * SUBLANES)
    for shrink in (1, 2, 4):
        together = -(-size // chunks)
        cut = Cut(rows, divisor(n_in, INPUTS), divisor(n_out, OUTPUTS // shrink), together, chunks)
        coefficients = together * cut.inputs * cut.outputs
        sums = {"spread": rows * cut.outputs, "collect": rows * cut.inputs, "outer": coefficients}[name]
        tiles = rows * (2 * cut.inputs + cut.outputs)
        if 4 * sums + 2 * x.dtype.itemsize * (coefficients + tiles) < blocks.limits().vmem:
            break
        chunks *= 2
    return cut


def _ends(spec, cut: Cut) -> Array:
    more = cut.chunks * cut.together - spec.size
    return jnp.asarray(np.pad(bspline.ends(spec), ((0, 0), (0, more))), jnp.float32)


def _call(kernel, name: str, *, total: tuple[int, ...], grid, in_specs, out_spec, out_shape):
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(total, jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=blocks.limits().vmem + 8 * blocks.MiB
        ),
        interpret=platform() == INTERPRET,
        name=name,
    )
