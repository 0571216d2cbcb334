"""The gated feed-forward's kernels on GPUs: Pallas kernels for Triton.

A program holds a tile of the hidden layer, walks along D for the two products that make it, and along D2 for the third
that its cotangent is. Sums are float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxml.kernels import padded
from jaxml.target import INTERPRET_GPU, platform

ROWS, COLUMNS, STEP = 128, 64, 32  # of a program's tile, and how much of D it takes at once


def forward(formula, x, gate, up):
    """h [M, F] in x's dtype; all arrays of one dtype."""
    rows, hidden = x.shape[0], gate.shape[1]
    x, gate, up = padded(x, ROWS, STEP), padded(gate, STEP, COLUMNS), padded(up, STEP, COLUMNS)

    def kernel(x, gate, up, h):
        h[...] = formula(*_products(x, gate, up)).astype(h.dtype)

    run = _call(kernel, "gated_feed_forward", x, gate.shape[1], [_rows(x), _columns(gate), _columns(up)], 1)
    return run(x, gate, up)[0][:rows, :hidden]


def backward(formula, x, gate, up, down, dy):
    """h and the cotangents of x gate and x up, [M, F] each; dy is h's own where there is no down."""
    rows, hidden = x.shape[0], gate.shape[1]
    x, gate, up = padded(x, ROWS, STEP), padded(gate, STEP, COLUMNS), padded(up, STEP, COLUMNS)
    if down is None:
        more, specs = [padded(dy, ROWS, COLUMNS)], [pl.BlockSpec((ROWS, COLUMNS), lambda i, j: (i, j))]
    else:
        more = [padded(dy, ROWS, STEP), padded(down, COLUMNS, STEP)]
        specs = [_rows(more[0]), pl.BlockSpec((COLUMNS, more[1].shape[1]), lambda i, j: (j, 0))]

    def kernel(x, gate, up, *refs):
        *into, h, of_gate, of_up = refs
        dh = into[0][...].astype(jnp.float32) if down is None else _along(into[0].shape[1], 1, _transposed, *into)[0]
        value, vjp = jax.vjp(formula, *_products(x, gate, up))
        for ref, out in zip((h, of_gate, of_up), (value, *vjp(dh))):
            ref[...] = out.astype(ref.dtype)

    specs = [_rows(x), _columns(gate), _columns(up), *specs]
    out = _call(kernel, "gated_feed_forward_backward", x, gate.shape[1], specs, 3)(x, gate, up, *more)
    return tuple(a[:rows, :hidden] for a in out)


def _products(x, gate, up):
    one = lambda x, w, at: jnp.dot(x[:, at], w[at, :], preferred_element_type=jnp.float32)
    both = lambda x, gate, up, at: (one(x, gate, at), one(x, up, at))
    return _along(x.shape[1], 2, both, x, gate, up)


def _transposed(dy, down, at):
    return (jnp.dot(dy[:, at], down[:, at].T, preferred_element_type=jnp.float32),)


def _along(length: int, count: int, products, *refs):
    """The sums of so many products over the pieces of an axis."""

    def add(s, total):
        return jax.tree.map(jnp.add, total, products(*refs, pl.ds(s * STEP, STEP)))

    return jax.lax.fori_loop(0, length // STEP, add, (jnp.zeros((ROWS, COLUMNS), jnp.float32),) * count)


def _rows(a):
    return pl.BlockSpec((ROWS, a.shape[1]), lambda i, j: (i, 0))


def _columns(a):
    return pl.BlockSpec((a.shape[0], COLUMNS), lambda i, j: (0, j))


def _call(kernel, name: str, x, hidden: int, in_specs, outputs: int):
    return pl.pallas_call(
        kernel,
        grid=(x.shape[0] // ROWS, hidden // COLUMNS),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((ROWS, COLUMNS), lambda i, j: (i, j))] * outputs,
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], hidden), x.dtype)] * outputs,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=platform() == INTERPRET_GPU,
        name=name,
    )
