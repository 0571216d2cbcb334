"""The gated feed-forward's kernels on TPUs: Pallas kernels whose tiles of the hidden layer stay in VMEM.

The last axis of the grid walks along D, and along D2 in as many steps, and adds to float32 sums; its last step applies
the function and writes. Lengths are padded with zeros to what a tile takes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxml.attention import blocks
from jaxml.kernels import LANES, divisor, padded
from jaxml.target import INTERPRET, platform

SUBLANES, PIECE = 16, 256
COLUMNS, STEP = 512, 512  # of the hidden layer's tile, and how much of D a step takes, at most
ROWS = (1024, 512, 256)  # of the tile: the first that fits


def forward(formula, x, gate, up):
    """h [M, F] in x's dtype; all arrays of one dtype."""
    rows, hidden, cut = x.shape[0], gate.shape[1], _cut(x, gate, sums=2, outputs=1)
    x, gate, up = padded(x, cut.rows, cut.step), padded(gate, cut.step, cut.columns), padded(up, cut.step, cut.columns)

    def kernel(x, gate, up, h, *sums):
        def finish(at, of_gate, of_up):
            h[at] = formula(of_gate, of_up).astype(h.dtype)

        _walk(sums, [(x, gate, 0), (x, up, 0)], finish)

    run = _call(kernel, "gated_feed_forward", cut, x, gate, [cut.of_x, cut.of_weight, cut.of_weight], 2, 1)
    return run(x, gate, up)[0][:rows, :hidden]


def backward(formula, x, gate, up, down, dy):
    """h and the cotangents of x gate and x up, [M, F] each; dy is h's own where there is no down."""
    third = int(down is not None)
    rows, hidden, cut = x.shape[0], gate.shape[1], _cut(x, gate, sums=2 + third, outputs=3)
    specs = [cut.of_x, cut.of_weight, cut.of_weight, cut.of_hidden]
    if third:
        step = -(-down.shape[1] // (cut.steps * LANES)) * LANES
        of_dy = pl.BlockSpec((cut.rows, step), lambda i, j, s: (i, s))
        specs[3:] = of_dy, pl.BlockSpec((cut.columns, step), lambda i, j, s: (j, s))
        more = [padded(dy, cut.rows, cut.steps * step), padded(down, cut.columns, cut.steps * step)]
    else:
        more = [padded(dy, cut.rows, cut.columns)]
    x, gate, up = padded(x, cut.rows, cut.step), padded(gate, cut.step, cut.columns), padded(up, cut.step, cut.columns)

    def kernel(x, gate, up, dy, *refs):
        down, outs, sums = refs[:third], refs[third : third + 3], refs[third + 3 :]

        def finish(at, of_gate, of_up, dh=None):
            value, vjp = jax.vjp(formula, of_gate, of_up)
            dh = dy[at].astype(jnp.float32) if dh is None else dh
            for ref, out in zip(outs, (value, *vjp(dh))):
                ref[at] = out.astype(ref.dtype)

        _walk(sums, [(x, gate, 0), (x, up, 0), *[(dy, w, 1) for w in down]], finish)

    run = _call(kernel, "gated_feed_forward_backward", cut, x, gate, specs, 2 + third, 3)
    return tuple(a[:rows, :hidden] for a in run(x, gate, up, *more))


def _walk(sums, products, finish) -> None:
    """Adds each product of two tiles, over the axis of the second one that is named, to its sum.

    The last step goes by pieces of rows: while the function of one is computed, the next one is multiplied.
    """
    step, rows = pl.program_id(2), sums[0].shape[0]
    last = step == pl.num_programs(2) - 1

    @pl.when(step == 0)
    def _():
        for total in sums:
            total[...] = jnp.zeros(total.shape, total.dtype)

    def added(at):
        for total, (a, b, axis) in zip(sums, products):
            over = (((1,), (axis,)), ((), ()))
            yield total[at] + jax.lax.dot_general(a[at], b[...], over, preferred_element_type=jnp.float32)

    @pl.when(jnp.logical_not(last))
    def _():
        for total, value in zip(sums, added(slice(None))):
            total[...] = value

    @pl.when(last)
    def _():
        for start in range(0, rows, min(rows, PIECE)):
            at = pl.ds(start, min(rows, PIECE))
            finish(at, *added(at))


class _Cut(NamedTuple):
    rows: int
    columns: int
    step: int
    steps: int

    @property
    def of_x(self):
        return pl.BlockSpec((self.rows, self.step), lambda i, j, s: (i, s))

    @property
    def of_weight(self):
        return pl.BlockSpec((self.step, self.columns), lambda i, j, s: (s, j))

    @property
    def of_hidden(self):
        return pl.BlockSpec((self.rows, self.columns), lambda i, j, s: (i, j))


def _cut(x, gate, sums: int, outputs: int) -> _Cut:
    """Tiles as large as VMEM allows, of operands held twice and sums held once."""
    (rows, width), hidden, itemsize = x.shape, gate.shape[1], x.dtype.itemsize
    columns, step = divisor(hidden, COLUMNS), divisor(width, STEP)
    steps = -(-width // step)
    for most in ROWS:
        tile = min(most, -(-rows // PIECE) * PIECE if rows > PIECE else -(-rows // SUBLANES) * SUBLANES)
        operands = (sums - 1) * tile * step + sums * step * columns + outputs * tile * columns
        if 4 * sums * tile * columns + 2 * itemsize * operands < blocks.limits().vmem:
            break
    return _Cut(tile, columns, step, steps)


def _call(kernel, name: str, cut: _Cut, x, gate, in_specs, sums: int, outputs: int):
    rows, hidden = x.shape[0], gate.shape[1]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(rows // cut.rows, hidden // cut.columns, cut.steps),
            in_specs=in_specs,
            out_specs=[cut.of_hidden] * outputs,
            scratch_shapes=[pltpu.VMEM((cut.rows, cut.columns), jnp.float32)] * sums,
        ),
        out_shape=[jax.ShapeDtypeStruct((rows, hidden), x.dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=blocks.limits().vmem + 8 * blocks.MiB,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * sums * rows * hidden * x.shape[1],
            transcendentals=rows * hidden,
            bytes_accessed=x.dtype.itemsize
            * (x.size * (hidden // cut.columns) + 2 * gate.size * (rows // cut.rows) + outputs * rows * hidden),
        ),
        interpret=platform() == INTERPRET,
        name=name,
    )
