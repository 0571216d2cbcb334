"""The three maps of `kernel.py` on GPUs: Pallas kernels for Triton.

A program holds one tile of the result and walks over the tiles that sum up to it. A function is computed from x in
registers and goes straight into the tensor cores. Sums are float32; the operands of products have x's dtype.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxml.axes import Array
from jaxml.kan import bspline
from jaxml.kan.kernel_tiles import grid, values
from jaxml.kernels import Tile, padded, right_operand, rows_of
from jaxml.target import INTERPRET_GPU, platform

TILES = {  # by map and bytes of a number: the fastest on an H200 of those with at most 96 KiB of operands under way
    ("spread", 2): Tile(64, 256, 32, warps=4),
    ("spread", 4): Tile(64, 256, 32, warps=4),
    ("collect", 2): Tile(64, 128, 64),
    ("collect", 4): Tile(128, 64, 32),
    ("outer", 2): Tile(64, 256, 32, warps=4),
    ("outer", 4): Tile(128, 256, 32),
}
PROGRAMS = 264  # that keep a large GPU busy


def spread(spec, n, dtype, x, weight, coef, points):
    (B, n_in), (K, _, n_out) = x.shape, coef.shape
    tile = TILES["spread", x.dtype.itemsize]
    rows, columns, step = _sides(tile, B, n_out, n_in)
    of_rows = [padded(a, rows, step) for a in (x, weight) if a is not None]
    of_all = [*grid(points, step), _ends(spec)]
    width, across = of_rows[0].shape[1], pl.cdiv(n_out, columns)
    coef = padded(coef.astype(x.dtype), 1, step, columns)
    coef, of_coef = right_operand(coef, (K, width, columns), lambda i, j: (0, 0, j))

    def kernel(low, high, ends, coef, *refs):
        *x_and_weight, y = refs

        def inputs(s, total):
            at = pl.ds(s * step, step)
            of = _values(spec, n, ends, low[:, at], high[:, at], *[a[:, at] for a in x_and_weight])
            add = lambda k, total: total + _dot(of(k).astype(x.dtype), rows_of(coef, k, at))
            return jax.lax.fori_loop(0, K, add, total)

        total = jax.lax.fori_loop(0, width // step, inputs, jnp.zeros(y.shape, jnp.float32))
        y[...] = total.astype(y.dtype)

    run = _call(
        kernel,
        "kan_spread",
        tile,
        grid=(of_rows[0].shape[0] // rows, across),
        in_specs=[
            *[pl.BlockSpec(a.shape, lambda i, j: (0, 0)) for a in of_all],
            of_coef,
            *[pl.BlockSpec((rows, width), lambda i, j: (i, 0)) for _ in of_rows],
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((of_rows[0].shape[0], across * columns), dtype),
    )
    return run(*of_all, coef, *of_rows)[:B, :n_out]


def collect(spec, n, dtype, x, coef, g, points):
    (B, n_in), (K, _, n_out) = x.shape, coef.shape
    tile = TILES["collect", x.dtype.itemsize]
    rows, columns, step = _sides(tile, B, n_in, n_out)
    x, of_inputs = padded(x, rows, columns), grid(points, columns)
    coef, g = padded(coef.astype(x.dtype), 1, columns, step), padded(g.astype(x.dtype), rows, step)

    def kernel(low, high, ends, coef, x, g, d):
        of = _values(spec, n, ends, low[...], high[...], x[...])

        def functions(k, total):
            def outputs(s, of_k):
                at = pl.ds(s * step, step)
                return of_k + _dot(g[:, at], coef[k, :, at].T)

            of_k = jax.lax.fori_loop(0, g.shape[1] // step, outputs, jnp.zeros(d.shape, jnp.float32))
            return total + of_k * of(k)

        total = jax.lax.fori_loop(0, K, functions, jnp.zeros(d.shape, jnp.float32))
        d[...] = total.astype(d.dtype)

    run = _call(
        kernel,
        "kan_collect",
        tile,
        grid=(x.shape[0] // rows, x.shape[1] // columns),
        in_specs=[
            *[pl.BlockSpec((1, columns), lambda i, j: (0, j)) for _ in of_inputs],
            pl.BlockSpec((2, K), lambda i, j: (0, 0)),
            pl.BlockSpec((K, columns, g.shape[1]), lambda i, j: (0, j, 0)),
            pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
            pl.BlockSpec((rows, g.shape[1]), lambda i, j: (i, 0)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct(x.shape, dtype),
    )
    return run(*of_inputs, _ends(spec), coef, x, g)[:B, :n_in]


def outer(spec, n, dtype, x, weight, g, points):
    (B, n_in), n_out, K = x.shape, g.shape[1], spec.size
    tile = TILES["outer", x.dtype.itemsize]
    rows, columns, step = _sides(tile, n_in, n_out, B)
    down, across = pl.cdiv(n_in, rows), pl.cdiv(n_out, columns)
    tiles = down * across
    parts = max(1, min(PROGRAMS // (K * tiles), pl.cdiv(B, 8 * step)))  # of the batch, summed afterwards
    steps = pl.cdiv(B, parts * step)
    batch = parts * steps * step
    of_rows = [padded(a.T, rows, batch) for a in (x, weight) if a is not None]
    of_inputs = [a.T for a in grid(points, rows)]
    g = padded(g.astype(x.dtype), batch, columns)
    g, of_g = right_operand(g, (steps * step, columns), lambda p, k, t: (p, t // down))

    def kernel(low, high, ends, g, *refs):
        *x_and_weight, c = refs
        k = pl.program_id(1)

        def add(s, total):
            at = pl.ds(s * step, step)
            b = _values(spec, n, ends, low[...], high[...], *[a[:, at] for a in x_and_weight])(k)
            return total + _dot(b.astype(x.dtype), rows_of(g, at))

        total = jax.lax.fori_loop(0, steps, add, jnp.zeros((rows, columns), jnp.float32))
        c[...] = total.astype(c.dtype)[None, None]

    run = _call(
        kernel,
        "kan_outer",
        tile,
        grid=(parts, K, tiles),
        in_specs=[
            *[pl.BlockSpec((rows, 1), lambda p, k, t: (t % down, 0)) for _ in of_inputs],
            pl.BlockSpec((2, K), lambda p, k, t: (0, 0)),
            of_g,
            *[pl.BlockSpec((rows, steps * step), lambda p, k, t: (t % down, p)) for _ in of_rows],
        ],
        out_specs=pl.BlockSpec((1, 1, rows, columns), lambda p, k, t: (p, k, t % down, t // down)),
        out_shape=jax.ShapeDtypeStruct((parts, K, down * rows, across * columns), jnp.float32 if parts > 1 else dtype),
    )
    return run(*of_inputs, _ends(spec), g, *of_rows).sum(axis=0)[:, :n_in, :n_out].astype(dtype)


def _values(spec, n: int, ends, *tiles: Array):
    """k ↦ `values` of function k."""
    return lambda k: values(spec, n, k.astype(jnp.float32), (ends[0, k], ends[1, k]), *tiles)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _sides(tile: Tile, *sizes: int) -> list[int]:
    """Of a tile of arrays of those sizes: powers of two, 16 at least, which is what tensor cores take."""
    return [max(16, min(most, pl.next_power_of_2(size))) for most, size in zip(tile, sizes)]


def _ends(spec) -> Array:
    return jnp.asarray(bspline.ends(spec), jnp.float32)


def _call(kernel, name: str, tile: Tile, **kwargs):
    return pl.pallas_call(
        kernel,
        name=name,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=platform() == INTERPRET_GPU,
        **kwargs,
    )
