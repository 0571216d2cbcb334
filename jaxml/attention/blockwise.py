"""Exact attention in blocks, in plain JAX: memory grows with the length, on every platform.

Tiles of logits are made, used and forgotten. Tiles that the mask leaves empty are skipped, tiles that it leaves
whole are computed without it. `tangent` and `backward` are ordinary JAX and may be differentiated again.

Reference:
    Rabe and Staats 2021, "Self-attention does not need O(n²) memory"; Dao et al. 2022, "FlashAttention".
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.attention import masks, tiles
from jaxml.attention.masks import Grid, Lengths
from jaxml.attention.tiles import Inputs, Rules
from jaxml.axes import Array, Float, wide
from jaxml.linear import vary, varying_axes


def supports(rules: Rules, x: Inputs) -> str | None:
    """None: it computes everything."""
    return None


# ---- the tiles of a call ----------------------------------------------------------------------------


def _blocks(x: Inputs) -> tuple[int, int]:
    """Rows and columns of a tile: small enough for a core's cache, never longer than the sequence."""
    B, T, N, _ = x.query.shape
    S = x.key.shape[1]
    if T * S <= 512 * 512:
        return T, S
    if jax.default_backend() != "cpu":
        return min(T, 512), min(S, 512)
    side = 2 ** int(math.log2(math.sqrt(2**20 / (B * N))))  # a tile of all heads is about 2 MiB
    side = min(max(side, 64), 512)
    return min(T, side), min(S, side // 2)


class _Problem:
    """A call cut into tiles: arrays lengthened to whole blocks, and which tiles are empty or whole."""

    def __init__(self, rules: Rules, x: Inputs, *others):
        self.axes = varying_axes(x, others)
        x = vary(x, self.axes)
        B, T, N, _ = x.query.shape
        S = x.key.shape[1]
        self.rules, self.B, self.N, self.T, self.S = rules, B, N, T, S
        self.K = x.key.shape[2]
        self.grid = grid = Grid(T, S, *_blocks(x))
        self.R, self.C = -(-T // grid.rows), -(-S // grid.columns)
        mask = x.mask
        if self.R * grid.rows > T or self.C * grid.columns > S:  # places beyond the ends
            ends = Lengths(jnp.full((1,), T, jnp.int32), jnp.full((1,), S, jnp.int32))
            mask = ends if mask is None else mask & ends
        self.kind = None
        self.mask = None if mask is None else mask.pad(grid)
        if mask is not None and self.R * self.C > 1:
            some, every = mask.blocks(grid)
            row, column = jnp.arange(self.R)[None, None, :, None], jnp.arange(self.C)[None, None, None]
            every &= ((row + 1) * grid.rows <= T) & ((column + 1) * grid.columns <= S)
            spread = lambda a, f: jnp.broadcast_to(f(a, axis=(0, 1)), (self.R, self.C))
            self.kind = spread(some, jnp.any).astype(jnp.int32) + spread(some & every, jnp.all)
        self.query, self.key, self.value = self.rows(x.query), self.columns(x.key), self.columns(x.value)
        self.bias, self.data, self.dropout_key = self.both(x.bias), x.data, x.dropout_key

    def new(self, shape, dtype, fill=0.0):
        """An array to start from, alike on all devices as far as loops are concerned."""
        return vary(jnp.full(shape, fill, dtype), self.axes)

    def rows(self, a):
        return _pad(a, 1, self.R * self.grid.rows)

    def columns(self, a):
        return _pad(a, 1, self.C * self.grid.columns)

    def both(self, a):
        return None if a is None else masks.pad("both", a, self.grid)

    def row(self, a, i):
        """The tile's part of an array [B, T, N, H], heads first."""
        return jax.lax.dynamic_slice_in_dim(a, i * self.grid.rows, self.grid.rows, 1).swapaxes(1, 2)

    def column(self, a, j):
        """The tile's part of an array [B, S, K, H], heads first."""
        return jax.lax.dynamic_slice_in_dim(a, j * self.grid.columns, self.grid.columns, 1).swapaxes(1, 2)

    def of_row(self, a, i):
        """The tile's part of a number for each row, [B, N, T]."""
        return jax.lax.dynamic_slice_in_dim(a, i * self.grid.rows, self.grid.rows, 2)

    def tile(self, a, i, j):
        return None if a is None else masks.cut("both", a, i, j, self.grid)

    def where(self, i, j):
        return masks.tile_at(i, j, self.B, self.N, self.grid)

    def visible(self, i, j):
        return self.mask.cut(i, j, self.grid).visible(self.where(i, j))

    def shape(self, i, j):
        """(scaled products, bias, data) → logits, for the tile in block row i and block column j."""
        return lambda s, bias, data: tiles.shape(self.rules, s, bias, data, self.where(i, j))

    def keep(self, i, j):
        return None if self.rules.dropout_rate == 0 else tiles.keep(self.rules, self.dropout_key, self.where(i, j))

    def by_kind(self, i, j, compute, skip):
        """`skip()`, `compute(visible)` or `compute(None)`, as the tile is empty, crossed by the mask, or whole.

        A call's only tile is taken as one that is crossed: a choice would cost more than it saves.
        """
        if self.kind is None:
            return compute(None if self.mask is None else self.visible(i, j))
        return jax.lax.switch(self.kind[i, j], [skip, lambda: compute(self.visible(i, j)), lambda: compute(None)])


def _pad(a: Array, axis: int, length: int) -> Array:
    more = length - a.shape[axis]
    return jnp.pad(a, [(0, more if n == axis else 0) for n in range(a.ndim)]) if more else a


def _scan(body, carry, n: int):
    """`lax.scan` over 0 … n − 1, without a loop where there is one step."""
    if n == 1:
        carry, y = body(carry, 0)
        return carry, jax.tree.map(lambda a: a[None], y)
    return jax.lax.scan(body, carry, jnp.arange(n, dtype=jnp.int32))


def _rows_first(blocks: Array, n: int) -> Array:
    """Blocks [R, B, rows, …] end to end: [B, n, …]."""
    R, B, rows = blocks.shape[:3]
    return jnp.moveaxis(blocks, 0, 1).reshape(B, R * rows, *blocks.shape[3:])[:, :n]


def _rows_last(blocks: Float[Array, "R B N rows"], n: int) -> Array:
    """Blocks [R, B, N, rows] end to end: [B, N, n]."""
    return jnp.moveaxis(blocks, 0, 2).reshape(*blocks.shape[1:3], -1)[..., :n]


# ---- forward ----------------------------------------------------------------------------------------


def forward(rules: Rules, x: Inputs) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """(output in query's dtype, log-sum-exp of each row's logits, −inf where it sees nothing)."""
    p = _Problem(rules, x)
    dtype = wide(x.query.dtype)

    def row(_, i):
        q = p.row(p.query, i)

        def column(carry, j):
            m, total, acc = carry

            def compute(visible):
                s = p.shape(i, j)(tiles.products(q, p.column(p.key, j)) * rules.scale, p.tile(p.bias, i, j), p.data)
                s = s if visible is None else jnp.where(visible, s, -jnp.inf)
                top = jnp.maximum(m, jnp.max(s, axis=-1))
                base = jnp.where(top > -jnp.inf, top, 0.0)
                e, shrink = jnp.exp(s - base[..., None]), jnp.exp(m - base)
                kept = p.keep(i, j)
                mixed = tiles.mix(e if kept is None else e * kept, p.column(p.value, j))
                return top, total * shrink + jnp.sum(e, axis=-1), acc * shrink[..., None] + mixed

            return p.by_kind(i, j, compute, lambda: carry), None

        shape = (p.B, p.N, p.grid.rows)
        empty = p.new(shape, dtype, -jnp.inf), p.new(shape, dtype), p.new((*shape, x.value.shape[3]), dtype)
        (m, total, acc), _ = _scan(column, empty, p.C)
        lse, factor = tiles.finish(m, total, x.sinks)
        return None, ((acc * factor[..., None]).swapaxes(1, 2).astype(x.query.dtype), lse)

    _, (out, lse) = _scan(row, None, p.R)
    return _rows_first(out, p.T), _rows_last(lse, p.T)


# ---- derivatives ------------------------------------------------------------------------------------


def tangent(rules: Rules, x: Inputs, out: Array, lse: Array, dots: dict[str, Array]) -> tuple[Array, Array]:
    """How output and log-sum-exp move when the arrays named in `dots` do; linear in `dots`.

    "data" in `dots` and in the result of `backward` are tuples for the floating arrays among the data.
    """
    p = _Problem(rules, x, out, dots)
    dtype = wide(x.query.dtype)
    dq, dk, dv, dbias = (dots.get(n) for n in ("query", "key", "value", "bias"))
    dq = None if dq is None else p.rows(dq)
    dk, dv = (None if d is None else p.columns(d) for d in (dk, dv))
    dbias, ddata = p.both(dbias), tuple(map(_zero_tangent, p.data))
    if "data" in dots:
        ddata = _fill(ddata, _floating(p.data), dots["data"])
    lse_rows = _pad(tiles.finite(lse), 2, p.R * p.grid.rows)

    def row(_, i):
        q, lse_i = p.row(p.query, i), p.of_row(lse_rows, i)

        @jax.checkpoint
        def column(carry, j):
            acc, total = carry

            def compute(visible):
                k, v = p.column(p.key, j), p.column(p.value, j)
                s, s_dot = tiles.products(q, k) * rules.scale, jnp.zeros((), dtype)
                if dq is not None:
                    s_dot = s_dot + tiles.products(p.row(dq, i), k) * rules.scale
                if dk is not None:
                    s_dot = s_dot + tiles.products(q, p.column(dk, j)) * rules.scale
                bias, bias_dot = p.tile(p.bias, i, j), p.tile(dbias, i, j)
                bias_dot = jnp.zeros_like(bias) if bias is not None and bias_dot is None else bias_dot
                s, s_dot = jax.jvp(
                    p.shape(i, j), (s, bias, p.data), (jnp.broadcast_to(s_dot, s.shape), bias_dot, ddata)
                )
                e = tiles.weights(s, lse_i, visible)
                moved = e * s_dot
                kept = p.keep(i, j)
                more = tiles.mix(moved if kept is None else moved * kept, v)
                if dv is not None:
                    more = more + tiles.mix(e if kept is None else e * kept, p.column(dv, j))
                return acc + more, total + jnp.sum(moved, axis=-1)

            return p.by_kind(i, j, compute, lambda: carry), None

        shape = (p.B, p.N, p.grid.rows)
        carry, _ = _scan(column, (p.new((*shape, x.value.shape[3]), dtype), p.new(shape, dtype)), p.C)
        acc, total = carry
        return None, (acc.swapaxes(1, 2), total)

    _, (acc, total) = _scan(row, None, p.R)
    acc, lse_dot = _rows_first(acc, p.T), _rows_last(total, p.T)
    if "sinks" in dots:
        lse_dot = lse_dot + _sink_share(x, lse) * dots["sinks"].astype(dtype)[None, :, None]
    out_dot = acc - lse_dot.swapaxes(1, 2)[..., None] * out.astype(dtype)
    return out_dot.astype(out.dtype), lse_dot


def backward(
    rules: Rules, x: Inputs, out: Array, lse: Array, ct_out: Array, ct_lse: Array, wanted: tuple[str, ...]
) -> dict[str, Array]:
    """Gradients of the arrays named in `wanted`, from those of output and log-sum-exp."""
    p = _Problem(rules, x, out, ct_out, ct_lse)
    dtype = wide(x.query.dtype)
    moved = delta(out, lse, ct_out, ct_lse)
    ct_rows = p.rows(ct_out.astype(x.query.dtype))
    lse_rows, delta_rows = (_pad(a, 2, p.R * p.grid.rows) for a in (tiles.finite(lse), moved))
    moving = _floating(p.data)

    def column(carry, j):
        dq, ddata = carry
        k, v = p.column(p.key, j), p.column(p.value, j)

        @jax.checkpoint
        def row(carry, i):
            dq, (dk, dv, ddata) = carry

            def compute(visible):
                q, ct, bias = p.row(p.query, i), p.row(ct_rows, i), p.tile(p.bias, i, j)
                free = lambda s, bias, some: p.shape(i, j)(s, bias, _fill(p.data, moving, some))
                s, pull = jax.vjp(free, tiles.products(q, k) * rules.scale, bias, _choose(p.data, moving))
                e = tiles.weights(s, p.of_row(lse_rows, i), visible)
                ds = tiles.products(ct, v)
                kept = p.keep(i, j)
                e_kept, ds = (e, ds) if kept is None else (e * kept, ds * kept)
                ds, dbias, more = pull(e * (ds - p.of_row(delta_rows, i)[..., None]))
                ds = ds * rules.scale
                dq_part = tiles.mix(ds, k)
                ddata_new = tuple(a + b.astype(a.dtype) for a, b in zip(ddata, more))
                dk_new = dk + tiles.collect(ds, q, k)
                return (dk_new, dv + tiles.collect(e_kept, ct, v), ddata_new), dq_part, dbias

            def skip():
                bias = jax.eval_shape(lambda: p.tile(p.bias, i, j))
                nothing = p.new((p.B, p.N, p.grid.rows, k.shape[3]), dtype)
                return carry[1], nothing, None if bias is None else p.new(bias.shape, bias.dtype)

            sums, part, dbias = p.by_kind(i, j, compute, skip)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, (p.row(dq, i) + part).swapaxes(1, 2), i * p.grid.rows, 1)
            return (dq, sums), dbias

        empty = p.new(k.shape, dtype), p.new(v.shape, dtype), ddata
        (dq, (dk, dv, ddata)), dbias = _scan(row, (dq, empty), p.R)
        return (dq, ddata), (dk.swapaxes(1, 2), dv.swapaxes(1, 2), _bias_rows(dbias, p, x.bias))

    some = tuple(p.new(a.shape, wide(a.dtype)) for a in _choose(p.data, moving))
    (dq, ddata), (dk, dv, dbias) = _scan(column, (p.new(p.query.shape, dtype), some), p.C)
    grads = {
        "query": lambda: dq[:, : p.T].astype(x.query.dtype),
        "key": lambda: _rows_first(dk, p.S).astype(x.key.dtype),
        "value": lambda: _rows_first(dv, p.S).astype(x.value.dtype),
        "bias": lambda: _bias_columns(dbias, p, x.bias),
        "sinks": lambda: sinks_gradient(x, lse, moved),
        "data": lambda: tuple(g.astype(a.dtype) for g, a in zip(ddata, _choose(p.data, moving))),
    }
    return {name: grads[name]() for name in wanted}


def beside_kernels(
    rules: Rules, x: Inputs, out: Array, lse: Array, ct_out: Array, ct_lse: Array, delta: Array, wanted: tuple[str, ...]
) -> dict[str, Array]:
    """Those gradients of `backward` that no kernel computes: of bias, sinks and score_mod's data."""
    by_blocks = tuple(name for name in wanted if name in ("bias", "data"))
    grads = backward(rules, x, out, lse, ct_out, ct_lse, by_blocks) if by_blocks else {}
    if "sinks" in wanted:
        grads["sinks"] = sinks_gradient(x, lse, delta)
    return grads


def delta(out: Array, lse: Array, ct_out: Array, ct_lse: Array) -> Float[Array, "B N T"]:
    """How much each row's weights all pull together: sum(out · ct_out) − ct_lse; 0 for rows that see nothing.

    Whatever comes back for those: of a function of −inf it is easily NaN.
    """
    dtype = wide(out.dtype)
    moved = jnp.sum(out.astype(dtype) * ct_out.astype(dtype), axis=-1).swapaxes(1, 2) - ct_lse.astype(dtype)
    return jnp.where(lse > -jnp.inf, moved, 0.0)


def sinks_gradient(x: Inputs, lse: Array, delta: Float[Array, "B N T"]) -> Float[Array, "N"]:
    """The gradient of the sinks: their share of each row's weight against its pull."""
    return -jnp.sum(_sink_share(x, lse) * delta, axis=(0, 2)).astype(x.sinks.dtype)


def _sink_share(x: Inputs, lse: Float[Array, "B N T"]) -> Array:
    """The part of each row's weight that went to its head's sink."""
    sinks = x.sinks.astype(lse.dtype)[None, :, None]
    return jnp.exp(sinks - lse)  # lse is finite: it holds the sink


def _floating(values) -> tuple[bool, ...]:
    return tuple(jnp.issubdtype(a.dtype, jnp.floating) for a in values)


def _zero_tangent(a: Array):
    return jnp.zeros_like(a) if _floating([a])[0] else np.zeros(a.shape, jax.dtypes.float0)


def _choose(values, flags) -> tuple:
    return tuple(v for v, flag in zip(values, flags) if flag)


def _fill(values, flags, chosen) -> tuple:
    chosen = iter(chosen)
    return tuple(next(chosen) if flag else v for v, flag in zip(values, flags))


def _bias_rows(parts, p: _Problem, bias):
    """Bias gradients of one block column, [R, b, n, rows or 1, columns or 1] → [b, n, T or 1, columns or 1]."""
    if bias is None:
        return None
    if bias.shape[2] == 1:
        return jnp.sum(parts, axis=0)
    return jnp.moveaxis(parts, 0, 2).reshape(*bias.shape[:2], -1, parts.shape[-1])[:, :, : p.T]


def _bias_columns(parts, p: _Problem, bias):
    """[C, b, n, T or 1, columns or 1] → the bias's own shape."""
    if bias.shape[3] == 1:
        return jnp.sum(parts, axis=0)
    return jnp.moveaxis(parts, 0, 3).reshape(*bias.shape[:3], -1)[..., : p.S]
