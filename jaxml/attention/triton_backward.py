"""The backward pass on GPUs from Ampere on, deterministic: two kernels for Triton, in the terms of Pallas.

In the one for the keys' gradients a program holds keys and walks the queries of all heads that share them; in the one
for the queries' it holds queries and walks keys.

Reference:
    Dao 2023, "FlashAttention-2", algorithm 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxml.attention import blocks, blockwise
from jaxml.attention.fold import folded_queries, folded_rows, unfold
from jaxml.attention.gpu_arrays import Call, Place, Ranges, load_heads, load_rows, pieces, store_heads
from jaxml.attention.tiles import LOG2E, NOTHING, Inputs, Rules
from jaxml.attention.triton_forward import product, sum_of
from jaxml.attention.triton_launch import Launch, by_pallas
from jaxml.axes import Array
from jaxml.kernels import divide


def backward(
    rules: Rules,
    x: Inputs,
    out: Array,
    lse: Array,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[str, ...],
    launch: Launch = by_pallas,
) -> dict[str, Array]:
    """Gradients of the arrays named in `wanted`; those of bias and of score_mod's data by `blockwise`."""
    delta = blockwise.delta(out, lse, ct_out, ct_lse)
    grads = blockwise.beside_kernels(rules, x, out, lse, ct_out, ct_lse, delta, wanted)
    p = Call(rules, x, (out, ct_out, ct_lse))
    lse = folded_rows(jnp.where(lse > -jnp.inf, lse * LOG2E, NOTHING), p.fold)
    rows = [folded_queries(ct_out.astype(p.dtype), p.fold), lse, folded_rows(delta, p.fold)]
    if "query" in wanted:
        dq = unfold(_queries(p, rows, launch).swapaxes(1, 2), p.fold).swapaxes(1, 2)
        grads["query"] = dq
    if "key" in wanted or "value" in wanted:
        grads["key"], grads["value"] = _keys(p, rows, launch)
    return {name: grads[name] for name in wanted}


def _queries(p: Call, rows: list[Array], launch: Launch) -> Array:
    """dq [B, T, N, H]."""
    cut = blocks.gpu_cut(p.T, p.H, p.H2, p.dtype, "queries")
    ranges = Ranges(p, cut.rows, cut.columns, of_rows=True)
    some_rows = p.T if p.T % cut.rows else None

    def kernel(query, key, value, ct, lse, delta, *refs):
        (bounds, extra), dq = (refs[: len(ranges.arrays)], refs[len(ranges.arrays) : -1]), refs[-1]
        block, head, batch = (pl.program_id(axis) for axis in range(3))
        i = ranges.blocks - 1 - block  # the longest first
        start, key_head = i * cut.rows, divide(head, p.group)
        of_rows = lambda ref, width: load_heads(ref, batch, head, start, cut.rows, width, some_rows)
        q, g = of_rows(query, p.H), of_rows(ct, p.H2)
        slopes = functools.partial(_slopes, p, extra)
        norm = load_rows(lse, batch, head, start, cut.rows, some_rows, NOTHING)[:, None]
        shift = load_rows(delta, batch, head, start, cut.rows, some_rows)[:, None]

        def tile(j, dq, masked: bool):
            place = Place(
                batch, head, start, j * cut.columns, cut.rows, cut.columns, False, some_rows is not None, masked
            )
            end = p.S if masked else None
            k = load_heads(key, batch, key_head, place.column, cut.columns, p.H, end)
            v = load_heads(value, batch, key_head, place.column, cut.columns, p.H2, end)
            s = sum_of(product(a, b.T) for a, b in zip(q, k))
            pull = sum_of(product(a, b.T) for a, b in zip(g, v))
            _, ds = slopes(place, masked, s, pull, norm, shift)
            return tuple(a + product(ds, b) for a, b in zip(dq, k))

        empty = tuple(jnp.zeros((cut.rows, size), p.wide) for _, size, _ in pieces(p.H))
        found = ranges.visit(bounds, batch, i, tile, empty)
        store_heads(dq, ((batch,), head), [a * p.missing for a in found], start, p.H, some_rows)

    return _call(launch, p, cut, ranges, kernel, rows, p.N, [p.x.query], 3 * p.H + 2 * p.H2, "queries")[0]


def _keys(p: Call, rows: list[Array], launch: Launch) -> list[Array]:
    """dk [B, S, K, H] and dv [B, S, K, H2]."""
    cut = blocks.gpu_cut(p.T, p.H, p.H2, p.dtype, "keys")
    ranges = Ranges(p, cut.rows, cut.columns, of_rows=False)
    some_rows, some_keys = p.T if p.T % cut.rows else None, p.S if p.S % cut.columns else None

    def kernel(query, key, value, ct, lse, delta, *refs):
        (bounds, extra), (dk, dv) = (refs[: len(ranges.arrays)], refs[len(ranges.arrays) : -2]), refs[-2:]
        j, key_head, batch = (pl.program_id(axis) for axis in range(3))
        start = j * cut.columns
        of_keys = lambda ref, width: load_heads(ref, batch, key_head, start, cut.columns, width, some_keys)
        k, v = of_keys(key, p.H), of_keys(value, p.H2)
        slopes = functools.partial(_slopes, p, extra)

        def one_head(member, sums):
            head = key_head * p.group + member

            def tile(i, sums, masked: bool):
                place = Place(batch, head, i * cut.rows, start, cut.rows, cut.columns, True, masked, masked)
                end = some_rows if masked else None
                q = load_heads(query, batch, head, place.row, cut.rows, p.H, end)
                g = load_heads(ct, batch, head, place.row, cut.rows, p.H2, end)
                norm = load_rows(lse, batch, head, place.row, cut.rows, end, NOTHING)[None, :]
                shift = load_rows(delta, batch, head, place.row, cut.rows, end)[None, :]
                s = sum_of(product(a, b.T) for a, b in zip(k, q))
                pull = sum_of(product(a, b.T) for a, b in zip(v, g))
                e, ds = slopes(place, masked, s, pull, norm, shift)
                dk, dv = sums
                dv = tuple(a + product(e, b) for a, b in zip(dv, g))
                return tuple(a + product(ds, b) for a, b in zip(dk, q)), dv

            return ranges.visit(bounds, batch, j, tile, sums)

        zeros = lambda width: tuple(jnp.zeros((cut.columns, size), p.wide) for _, size, _ in pieces(width))
        sums = zeros(p.H), zeros(p.H2)
        sums = one_head(0, sums) if p.group == 1 else jax.lax.fori_loop(0, p.group, one_head, sums)
        store_heads(dk, ((batch,), key_head), [a * p.missing for a in sums[0]], start, p.H, some_keys)
        store_heads(dv, ((batch,), key_head), list(sums[1]), start, p.H2, some_keys)

    return _call(launch, p, cut, ranges, kernel, rows, p.K, [p.x.key, p.x.value], 2 * p.H + 2 * p.H2, "keys")


def _slopes(p: Call, extra, place: Place, masked: bool, s, pull, norm, shift) -> tuple[Array, Array]:
    """(weights, gradient of the products), in the dtype of the products that follow."""
    e, more = p.weights(extra, place, masked, s, norm)
    return tuple(a.astype(p.dtype) for a in p.slopes(e, more, pull, shift))


def _call(
    launch: Launch,
    p: Call,
    cut: blocks.GpuCut,
    ranges: Ranges,
    kernel,
    rows: list[Array],
    heads: int,
    like: list[Array],
    widths: int,
    name: str,
) -> list[Array]:
    operands = [p.x.query, p.x.key, p.x.value, *rows, *ranges.arrays, *(o.array for o in p.operands)]
    cost = pl.CostEstimate(
        flops=2 * p.B * p.N * p.T * p.S * widths,
        transcendentals=p.B * p.N * p.T * p.S,
        bytes_accessed=2 * p.dtype.itemsize * (2 * p.x.query.size + p.x.key.size + p.x.value.size),
    )
    results, grid = [p.output(*a.shape, dtype=p.dtype) for a in like], (ranges.blocks, heads, p.B)
    return launch(kernel, operands, results, grid, cut, f"flash_attention_backward_{name}", p.axes, cost)
