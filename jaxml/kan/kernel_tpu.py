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
from jaxml.target import INTERPRET, platform

LANES, SUBLANES = 128, 16
TOGETHER = 32
ROWS, INPUTS, OUTPUTS = 512, 256, 1024  # of a tile, at most


def unsupported() -> str | None:
    """Why the kernels cannot run on this TPU, or None."""
    return blocks.unsupported()


def spread(spec, n, dtype, x, weight, coef, points):
    (B, n_in), (K, _, n_out) = x.shape, coef.shape
    cut = cut_of("spread", x, K, n_in, n_out)
    of_rows = [_pad(a, cut.rows, cut.inputs) for a in (x, weight) if a is not None]
    coef = _pad(coef.astype(x.dtype), cut.together, cut.inputs, cut.outputs)

    def kernel(ends, low, high, coef, *refs):
        *x_and_weight, y, total = refs
        tiles = (a[...] for a in x_and_weight)
        values = _values(spec, n, cut, pl.program_id(3), ends, low[...], high[...], *tiles)

        def add():
            for j in range(cut.together):
                total[...] += _dot(values(j).astype(x.dtype), coef[j], 1, 0)

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
    )(_ends(spec, cut), *_grid(points, cut.inputs), coef, *of_rows)
    return y[:B, :n_out]


def collect(spec, n, dtype, x, coef, g, points):
    (B, n_in), (K, _, n_out) = x.shape, coef.shape
    cut = cut_of("collect", x, K, n_in, n_out)
    x = _pad(x, cut.rows, cut.inputs)
    coef = _pad(coef.astype(x.dtype), cut.together, cut.inputs, cut.outputs)
    g = _pad(g.astype(x.dtype), cut.rows, cut.outputs)

    def kernel(ends, low, high, coef, x, g, d, total):
        values = _values(spec, n, cut, pl.program_id(3), ends, low[...], high[...], x[...])

        def add():
            for j in range(cut.together):
                total[...] += values(j) * _dot(g[...], coef[j], 1, 1)

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
    )(_ends(spec, cut), *_grid(points, cut.inputs), coef, x, g)
    return d[:B, :n_in]


def outer(spec, n, dtype, x, weight, g, points):
    n_in, n_out, K = x.shape[1], g.shape[1], spec.size
    cut = cut_of("outer", x, K, n_in, n_out)
    of_rows = [_pad(a, cut.rows, cut.inputs) for a in (x, weight) if a is not None]
    g = _pad(g.astype(x.dtype), cut.rows, cut.outputs)

    def kernel(ends, low, high, g, *refs):
        *x_and_weight, c, total = refs
        turned = (a[...].astype(jnp.float32).T for a in x_and_weight)  # once, rather than each function's values
        values = _values(spec, n, cut, pl.program_id(0), ends, low[...], high[...], *turned)

        def add():
            for j in range(cut.together):
                total[j] += _dot(values(j).astype(g.dtype), g[...], 1, 0)

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
    )(_ends(spec, cut), *(a.T for a in _grid(points, cut.inputs)), g, *of_rows)
    return c[:K, :n_in, :n_out]


def _values(spec, n: int, cut, chunk, ends, low: Array, high: Array, x: Array, weight: Array | None = None):
    """j ↦ the n-th derivative of the chunk's function j at a tile of inputs, times their weights."""
    known = bspline.ends(spec)

    def values(j: int):
        if cut.chunks == 1:
            k, at_ends = float(j), [float(e) or None for e in known[:, j]]
        else:
            k = chunk * cut.together + j
            k, at_ends = k.astype(jnp.float32), [ends[0, k], ends[1, k]]
        b = bspline.derivative(bspline.function(spec, k, at_ends, low, high), n)(x.astype(jnp.float32))
        return b if weight is None else b * weight.astype(jnp.float32)

    return values


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
        cut = Cut(rows, _divisor(n_in, INPUTS), _divisor(n_out, OUTPUTS // shrink), together, chunks)
        coefficients = together * cut.inputs * cut.outputs
        sums = {"spread": rows * cut.outputs, "collect": rows * cut.inputs, "outer": coefficients}[name]
        tiles = rows * (2 * cut.inputs + cut.outputs)
        if 4 * sums + 2 * x.dtype.itemsize * (coefficients + tiles) < blocks.limits().vmem:
            break
        chunks *= 2
    return cut


def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides the size, itself padded to a multiple of 128."""
    padded = -(-size // LANES) * LANES
    return max(n for n in range(LANES, min(most, padded) + 1, LANES) if padded % n == 0)


def _pad(a: Array, *multiples: int) -> Array:
    """With zeros at the ends of its axes, up to multiples of those sizes."""
    return jnp.pad(a, [(0, -size % m) for size, m in zip(a.shape, multiples)])


def _grid(points: Array, inputs: int) -> list[Array]:
    """Its first and last points as rows [1, I]; those of inputs that are not there are 0 and 1."""
    row = lambda a, fill: jnp.pad(a.astype(jnp.float32), (0, -len(a) % inputs), constant_values=fill)[None]
    return [row(points[:, 0], 0.0), row(points[:, -1], 1.0)]


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
