"""The sums of a spline layer by kernels that never store the basis, and their derivatives.

Three maps, each linear in its arrays, hold all of it. With B_k^(n) the n-th derivative of function k by its input,

    spread  y_bo  = Σ_ik B_k^(n)(x_bi) w_bi c_kio     what a layer computes (n = 0, w = 1)
    collect d_bi  = Σ_ko B_k^(n)(x_bi) g_bo c_kio     its gradient by x (n = 1)
    outer   c_kio = Σ_b  B_k^(n)(x_bi) w_bi g_bo      its gradient by the coefficients (n = 0)

The tangent of each is a sum of these, one n up where x moves, and so is the transpose: all orders, both modes. The
functions below define them in plain JAX; `kernel_gpu.py` and `kernel_tpu.py` compute them tile by tile.

They pay where the basis, K times as large as x, is what takes the time: large grids, wide batches. On an H200, in
bfloat16, they take XLA's time at grids of 5 and 20 cells and half to two thirds of it at 100, with a fifth to a
two-hundredth of its memory; in float32 they save memory only (`benchmarks/kan.py`). They stay a choice
(`layer.apply(..., implementation="kernel")`): XLA shards its own products over devices, a kernel only within
`jax.shard_map`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxml import kernels
from jaxml.axes import Array, Float, wide
from jaxml.kan import bspline
from jaxml.linear import linear


def unsupported(spec, dtype) -> str | None:
    """Why the kernels cannot run here with such a layer and input, or None."""
    if spec.basis != "bspline":
        return f"it knows B-splines on uniform grids, the basis is {spec.basis!r}"
    if not spec.uniform:
        return "it knows B-splines on uniform grids, this grid is not uniform"
    return kernels.unsupported(dtype)


def sums(spec, x: Float[Array, "B I"], coef: Float[Array, "K I O"], points: Float[Array, "I G1"]) -> Array:
    """Σ_ik B_k(x_i) c_kio, summed in float32, in x's dtype."""
    return spread(spec, 0, x.dtype, x, None, coef, points)


# ---- definitions -------------------------------------------------------------------------------------


def basis(spec, n: int, x: Float[Array, "B I"], points: Float[Array, "I G1"]) -> Float[Array, "B K I"]:
    """The n-th derivatives of all functions."""
    return bspline.derivative(lambda x: bspline.values(x, points, order=spec.order, outside=spec.outside), n)(x)


def _weighted(spec, n, x, weight, points):
    b = basis(spec, n, x.astype(wide(x.dtype)), points)
    return b if weight is None else b * weight[:, None].astype(b.dtype)


def define_spread(spec, n, x, weight, coef, points):
    return jnp.einsum("bki,kio->bo", _weighted(spec, n, x, weight, points), coef.astype(wide(x.dtype)))


def define_collect(spec, n, x, coef, g, points):
    of_functions = jnp.einsum("bo,kio->bki", g.astype(wide(x.dtype)), coef.astype(wide(x.dtype)))
    return jnp.sum(basis(spec, n, x.astype(wide(x.dtype)), points) * of_functions, axis=1)


def define_outer(spec, n, x, weight, g, points):
    return jnp.einsum("bki,bo->kio", _weighted(spec, n, x, weight, points), g.astype(wide(x.dtype)))


# ---- kernels and their derivatives -------------------------------------------------------------------


def _kernels():
    """The module for the device, imported where it is used: Pallas takes its time."""
    from jaxml.kan import kernel_gpu, kernel_tpu

    return kernels.choose(kernel_gpu, kernel_tpu)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def spread(spec, n: int, dtype, x, weight, coef, points) -> Float[Array, "B O"]:
    return _kernels().spread(spec, n, dtype, x, weight, coef, points)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def collect(spec, n: int, dtype, x, coef, g, points) -> Float[Array, "B I"]:
    return _kernels().collect(spec, n, dtype, x, coef, g, points)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def outer(spec, n: int, dtype, x, weight, g, points) -> Float[Array, "K I O"]:
    return _kernels().outer(spec, n, dtype, x, weight, g, points)


def _times(weight, dx):
    return dx if weight is None else weight * dx


@functools.partial(spread.defjvp, symbolic_zeros=True)
def _(spec, n, dtype, primals, tangents):
    def forward(primals, dot):
        x, w, c, points = primals
        yield "x", lambda: spread(spec, n + 1, dtype, x, _times(w, dot["x"]), c, points)
        yield "w", lambda: spread(spec, n, dtype, x, dot["w"], c, points)
        yield "c", lambda: spread(spec, n, dtype, x, w, dot["c"], points)

    def transpose(primals, g):
        x, w, c, points = primals
        yield "x", lambda: _times(w, collect(spec, n + 1, x.dtype, x, c, g, points))
        yield "w", lambda: collect(spec, n, w.dtype, x, c, g, points)
        yield "c", lambda: outer(spec, n, c.dtype, x, w, g, points)

    define = functools.partial(define_spread, spec, n)
    return _rule(functools.partial(spread, spec, n, dtype), define, "xwc", primals, tangents, forward, transpose)


@functools.partial(collect.defjvp, symbolic_zeros=True)
def _(spec, n, dtype, primals, tangents):
    def forward(primals, dot):
        x, c, g, points = primals
        yield "x", lambda: dot["x"] * collect(spec, n + 1, dtype, x, c, g, points)
        yield "c", lambda: collect(spec, n, dtype, x, dot["c"], g, points)
        yield "g", lambda: collect(spec, n, dtype, x, c, dot["g"], points)

    def transpose(primals, h):
        x, c, g, points = primals
        yield "x", lambda: h * collect(spec, n + 1, x.dtype, x, c, g, points)
        yield "c", lambda: outer(spec, n, c.dtype, x, h, g, points)
        yield "g", lambda: spread(spec, n, g.dtype, x, h, c, points)

    define = functools.partial(define_collect, spec, n)
    return _rule(functools.partial(collect, spec, n, dtype), define, "xcg", primals, tangents, forward, transpose)


@functools.partial(outer.defjvp, symbolic_zeros=True)
def _(spec, n, dtype, primals, tangents):
    def forward(primals, dot):
        x, w, g, points = primals
        yield "x", lambda: outer(spec, n + 1, dtype, x, _times(w, dot["x"]), g, points)
        yield "w", lambda: outer(spec, n, dtype, x, dot["w"], g, points)
        yield "g", lambda: outer(spec, n, dtype, x, w, dot["g"], points)

    def transpose(primals, c):
        x, w, g, points = primals
        yield "x", lambda: _times(w, collect(spec, n + 1, x.dtype, x, c, g, points))
        yield "w", lambda: collect(spec, n, w.dtype, x, c, g, points)
        yield "g", lambda: spread(spec, n, g.dtype, x, w, c, points)

    define = functools.partial(define_outer, spec, n)
    return _rule(functools.partial(outer, spec, n, dtype), define, "xwg", primals, tangents, forward, transpose)


def _rule(function, define, names, primals, tangents, forward, transpose):
    """(value, tangent): by `forward`'s terms of the arrays that move, transposed by `transpose`'s; of points by XLA."""
    out = function(*primals)
    *of_arrays, of_points = tangents
    at = dict(zip(names, primals))
    dot = {n: d for n, d in zip(names, of_arrays) if at[n] is not None and not isinstance(d, SymbolicZero)}
    tangent = jnp.zeros_like(out)
    if dot:
        add = lambda primals, dot: sum(term() for n, term in forward(primals, dot) if n in dot).astype(out.dtype)
        back = lambda primals, ct: {n: t().astype(at[n].dtype) for n, t in transpose(primals, ct) if n in dot}
        tangent = linear(add, back, primals, dot)
    if not isinstance(of_points, SymbolicZero):
        *arrays, points = primals
        tangent += jax.jvp(lambda p: define(*arrays, p).astype(out.dtype), (points,), (of_points,))[1]
    return out, tangent
