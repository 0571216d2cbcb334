"""Paged decoding on GPUs from Ampere on: a kernel for Triton, in the terms of Pallas.

A program holds the queries of all heads that share a key head and walks the pages of its row, or a share of them where
there are too few programs to fill a GPU; the parts are put together afterwards.

Reference:
    Kwon et al. 2023, "PagedAttention"; Dao et al. 2023, "Flash-Decoding".
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxml import triton_call
from jaxml.attention import blocks
from jaxml.attention.gpu_arrays import load_heads, pieces, store_heads
from jaxml.attention.tiles import HIDDEN, LOG2E, shape2
from jaxml.attention.tpu_paged import Rules
from jaxml.attention.triton_forward import product, put_together, sum_of
from jaxml.attention.triton_launch import Launch, by_pallas
from jaxml.axes import Array, Float, Int, wide
from jaxml.kernels import divide, remainder
from jaxml.linear import vary, varying_axes
from jaxml.target import INTERPRET_GPU, platform

CUT = blocks.GpuCut(rows=16, columns=64, warps=4, stages=3)  # rows at least, columns where a page has as many


def supports(query, key, value, table) -> str | None:
    """Why the kernel cannot compute the call, or None."""
    if reason := blocks.unsupported_gpu():
        return reason
    if jnp.float64 in (query.dtype, key.dtype) and platform() != INTERPRET_GPU:
        return "it computes in float32, bfloat16 and float16, not in float64"
    if key.shape[1] % 16:
        return f"pages hold a multiple of 16 tokens, these {key.shape[1]}"
    K = key.shape[2] // query.shape[3]
    if query.shape[1] * query.shape[2] // K > 128:
        return f"it takes at most 128 queries of a key head, here are {query.shape[1]} of {query.shape[2] // K} heads"
    if max(query.shape[3], value.shape[2] // K) > 256:
        return f"head dims are at most 256, got {query.shape[3]} and {value.shape[2] // K}"
    return None


def jax_triton_supports(query, key, value, table) -> str | None:
    """Why the kernel cannot compute the call as source of Triton, or None."""
    return supports(query, key, value, table) or triton_call.unsupported()


def attend(
    rules: Rules,
    query: Array,
    key: Array,
    value: Array,
    table: Int[Array, "B n"],
    lengths: Int[Array, "B"],
    launch: Launch = by_pallas,
) -> tuple[Float[Array, "B T N H2"], Float[Array, "B T N"]]:
    """(output in float32 or wider, log-sum-exp)."""
    (B, T, N, H), (P, page, _) = query.shape, key.shape
    K, dtype = rules.num_heads, wide(query.dtype)
    group, H2 = N // K, value.shape[2] // K
    columns = min(CUT.columns, page & -page)
    axes = varying_axes(query, key, value, table, lengths)
    q = query.reshape(B, T, K, group, H).swapaxes(2, 3).reshape(B, T * group, K, H)  # the rows of a key head together
    rows = max(CUT.rows, 1 << (T * group - 1).bit_length())
    splits = blocks.splits(B * K, table.shape[1] * page // columns)
    like = jax.typeof(vary(query, axes)).manual_axis_type
    operands = [
        q.astype(key.dtype),
        key.reshape(P, page, K, H),
        value.reshape(P, page, K, H2),
        table.astype(jnp.int32),
        lengths.astype(jnp.int32),
    ]
    results = [
        jax.ShapeDtypeStruct((splits, B, T * group, K, H2), dtype, manual_axis_type=like),
        jax.ShapeDtypeStruct((splits, B, K, T * group), dtype, manual_axis_type=like),
    ]
    kernel = _kernel(rules, T, group, rows, H, H2, page, columns, splits)
    out, lse = launch(kernel, operands, results, (splits, K, B), CUT, "paged_attention", axes)
    out, lse = put_together(out, lse)
    turn = lambda a: a.reshape(B, T, group, K, -1).swapaxes(2, 3).reshape(B, T, N, -1)
    return turn(out), turn(lse.swapaxes(1, 2))[..., 0]


def _kernel(rules: Rules, T: int, group: int, rows: int, H: int, H2: int, page: int, columns: int, splits: int):
    count = T * group
    some = count if rows > count else None

    def kernel(query, key, value, table, lengths, out, lse):
        split, head, batch = (pl.program_id(axis) for axis in range(3))
        length, dtype, zero = lengths[batch], lse.dtype, jnp.int32(0)
        q = load_heads(query, batch, head, zero, rows, H, some)
        at = length - T + divide(jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0), group)  # of each query
        end = divide(length + columns - 1, columns)
        begin = zero if rules.window is None else divide(jnp.maximum(length - T - rules.window, 0), columns)
        share = divide(end - begin + splits - 1, splits)
        low = begin + split * share

        def turn(j, carry):
            m, total, acc = carry
            of, start = table[batch, divide(j * columns, page)], remainder(j * columns, page)
            place = j * columns + jax.lax.broadcasted_iota(jnp.int32, (1, columns), 1)
            k = load_heads(key, of, head, start, columns, H, None)
            s = shape2(rules, sum_of(product(a, b.T) for a, b in zip(q, k)), None, (), None)
            visible = place <= at
            if rules.window is not None:
                visible &= place >= at - rules.window
            s = jnp.where(visible, s, HIDDEN)
            new = jnp.maximum(m, jnp.max(s, axis=1))
            e, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(m - new)
            total = total * shrink + jnp.sum(e, axis=1)
            left = length - j * columns + start  # places never written may hold anything
            v = load_heads(value, of, head, start, columns, H2, left)
            return new, total, tuple(a * shrink[:, None] + product(e.astype(b.dtype), b) for a, b in zip(acc, v))

        full = lambda *shape, fill=0.0: jnp.full(shape, fill, dtype)
        empty = full(rows, fill=HIDDEN), full(rows), tuple(full(rows, size) for _, size, _ in pieces(H2))
        m, total, acc = jax.lax.fori_loop(low, jnp.minimum(low + share, end), turn, empty)
        seen = m > HIDDEN / 2
        total = jnp.where(seen, total, 1.0)
        factor = jnp.where(seen, 1.0 / total, 0.0)[:, None]
        store_heads(out, ((split, batch), head), [a * factor for a in acc], zero, H2, some)
        log = jnp.where(seen, m * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        inside = None if some is None else jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < count
        plgpu.store(lse.at[split, batch, head, pl.ds(zero, rows)], log, mask=inside)

    return kernel
