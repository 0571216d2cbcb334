"""The two kernels of `feed_forward.py` on GPUs: Pallas kernels for Triton.

A program holds a tile of x gate and one of x up in registers, walks along D, and writes what the function makes of
them. Sums are float32; the operands of products have x's dtype.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxml.kernels import Tile, padded, right_operand, rows_of
from jaxml.target import INTERPRET_GPU, platform

# By bytes of a number: fast on an H200, with at most 96 KiB of operands under way.
TILES = {2: Tile(128, 64, 64, warps=4), 4: Tile(128, 128, 32, stages=2)}


def forward(formula, x, gate, up):
    """h [M, F] in x's dtype; all arrays of one dtype."""
    rows, hidden, tile = x.shape[0], gate.shape[1], TILES[x.dtype.itemsize]
    operands, specs = _operands(tile, x, gate, up)

    def kernel(x, gate, up, h):
        h[...] = formula(*_products(tile, x, gate, up)).astype(h.dtype)

    return _call(kernel, "gated_feed_forward", tile, x, hidden, specs, 1)(*operands)[0][:rows, :hidden]


def backward(formula, x, gate, up, down, dy):
    """h and the cotangents of x gate and x up, [M, F] each; dy is h's own where there is no down."""
    rows, hidden, tile = x.shape[0], gate.shape[1], TILES[x.dtype.itemsize]
    operands, specs = _operands(tile, x, gate, up)
    if down is None:
        operands += [padded(dy, tile.rows, tile.columns)]
        specs += [pl.BlockSpec((tile.rows, tile.columns), lambda i, j: (i, j))]
    else:
        dy, down = padded(dy, tile.rows, tile.step), padded(down, tile.columns, tile.step)
        operands += [dy, down]
        specs += [_rows(tile, dy), pl.BlockSpec((tile.columns, down.shape[1]), lambda i, j: (j, 0))]

    def kernel(x, gate, up, *refs):
        *into, h, of_gate, of_up = refs
        dh = into[0][...].astype(jnp.float32) if down is None else _along(tile, 1, _transposed, *into)[0]
        value, vjp = jax.vjp(formula, *_products(tile, x, gate, up))
        for ref, out in zip((h, of_gate, of_up), (value, *vjp(dh))):
            ref[...] = out.astype(ref.dtype)

    out = _call(kernel, "gated_feed_forward_backward", tile, x, hidden, specs, 3)(*operands)
    return tuple(a[:rows, :hidden] for a in out)


def _operands(tile: Tile, x, gate, up):
    x = padded(x, tile.rows, tile.step)
    weights = [padded(w, tile.step, tile.columns) for w in (gate, up)]
    weights = [right_operand(w, (w.shape[0], tile.columns), lambda i, j: (0, j)) for w in weights]
    return [x, *(w for w, _ in weights)], [_rows(tile, x), *(spec for _, spec in weights)]


def _products(tile: Tile, x, gate, up):
    one = lambda x, w, at: jnp.dot(x[:, at], rows_of(w, at), preferred_element_type=jnp.float32)
    both = lambda x, gate, up, at: (one(x, gate, at), one(x, up, at))
    return _along(tile, 2, both, x, gate, up)


def _transposed(dy, down, at):
    return (jnp.dot(dy[:, at], down[:, at].T, preferred_element_type=jnp.float32),)


def _along(tile: Tile, count: int, products, left, *refs):
    """The sums of so many products over the pieces of the left operand's last axis."""

    def add(s, total):
        return jax.tree.map(jnp.add, total, products(left, *refs, pl.ds(s * tile.step, tile.step)))

    zero = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    return jax.lax.fori_loop(0, left.shape[1] // tile.step, add, (zero,) * count)


def _rows(tile: Tile, a):
    return pl.BlockSpec((tile.rows, a.shape[1]), lambda i, j: (i, 0))


def _call(kernel, name: str, tile: Tile, x, hidden: int, in_specs, outputs: int):
    down, across = pl.cdiv(x.shape[0], tile.rows), pl.cdiv(hidden, tile.columns)
    shape = jax.ShapeDtypeStruct((down * tile.rows, across * tile.columns), x.dtype)
    return pl.pallas_call(
        kernel,
        grid=(down, across),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((tile.rows, tile.columns), lambda i, j: (i, j))] * outputs,
        out_shape=[shape] * outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=platform() == INTERPRET_GPU,
        name=name,
    )
