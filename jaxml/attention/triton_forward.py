"""The forward pass on GPUs from Ampere on: a kernel for Triton, in the terms of Pallas.

A program holds a block of queries of one head and walks the keys that it sees; blocks that the mask leaves whole have a
loop of their own. Few queries share their keys among programs, whose parts are put together afterwards.

Reference:
    Dao 2023, "FlashAttention-2", algorithm 1; Dao et al. 2023, "Flash-Decoding".
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxml.attention import blocks
from jaxml.attention.fold import unfold
from jaxml.attention.gpu_arrays import Call, Place, Ranges, load_heads, pieces, shape_of, store_heads
from jaxml.attention.tiles import HIDDEN, LOG2E, Inputs, Rules, add_sinks, keep, shape2
from jaxml.attention.triton_launch import Launch, by_pallas
from jaxml.axes import Array, Float, wide
from jaxml.kernels import divide, remainder
from jaxml.target import INTERPRET_GPU, platform


def forward(
    rules: Rules, x: Inputs, launch: Launch = by_pallas
) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """(output in query's dtype, log-sum-exp of each row's logits, −inf where it sees nothing)."""
    p = Call(rules, x)
    out, lse = _attend(p, launch)
    out, lse = unfold(out.swapaxes(1, 2), p.fold), unfold(lse, p.fold)
    if x.sinks is not None:
        out, lse = add_sinks(out, lse, x.sinks[None, :, None])
    return out.swapaxes(1, 2).astype(x.query.dtype), lse


def _attend(p: Call, launch: Launch) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """The kernel's call; no sinks."""
    cut = blocks.gpu_cut(p.T, p.H, p.H2, p.dtype)
    ranges = Ranges(p, cut.rows, cut.columns, of_rows=True)
    splits = blocks.splits(p.B * p.N * ranges.blocks, ranges.others)
    out_dtype = p.dtype if splits == 1 else p.wide
    operands = [p.x.query, p.x.key, p.x.value, *ranges.arrays, *(o.array for o in p.operands)]
    cost = pl.CostEstimate(
        flops=2 * p.B * p.N * p.T * p.S * (p.H + p.H2),
        transcendentals=p.B * p.N * p.T * p.S,
        bytes_accessed=p.dtype.itemsize * (p.x.query.size + p.x.key.size + p.x.value.size),
    )
    results = [
        p.output(splits, p.B, p.T, p.N, p.H2, dtype=out_dtype),
        p.output(splits, p.B, p.N, p.T, dtype=p.wide),
    ]
    kernel, grid = _kernel(p, cut, ranges, splits), (ranges.blocks * splits, p.N, p.B)
    out, lse = launch(kernel, operands, results, grid, cut, "flash_attention_forward", p.axes, cost)
    return put_together(out, lse)


def _kernel(p: Call, cut: blocks.GpuCut, ranges: Ranges, splits: int):
    rules, rows, columns = p.rules, cut.rows, cut.columns
    some_rows = p.T if p.T % rows else None  # where rows end, if a block may reach beyond

    def kernel(query, key, value, *refs):
        (bounds, extra), (out, lse) = (refs[: len(ranges.arrays)], refs[len(ranges.arrays) : -2]), refs[-2:]
        block, head, batch = (pl.program_id(axis) for axis in range(3))
        split, i = remainder(block, splits), ranges.blocks - 1 - divide(block, splits)  # the longest first
        start, key_head = i * rows, divide(head, p.group)
        q = load_heads(query, batch, head, start, rows, p.H, some_rows)

        def tile(j, carry, masked: bool):
            m, total, acc = carry
            place = Place(batch, head, start, j * columns, rows, columns, False, some_rows is not None, masked)
            end = p.S if masked else None
            k = load_heads(key, batch, key_head, place.column, columns, p.H, end)
            mask, bias, tables, dropout_key, at = p.read(extra, place)
            s = shape2(rules, sum_of(product(a, b.T) for a, b in zip(q, k)), bias, tables, at)
            if masked:
                s = p.hide(s, mask, at, place)
            new = jnp.maximum(m, jnp.max(s, axis=1))
            e, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(m - new)
            total = total * shrink + jnp.sum(e, axis=1)
            if rules.dropout_rate:
                e = e * jnp.broadcast_to(keep(rules, dropout_key, at), shape_of(place))
            e = e.astype(p.dtype)
            v = load_heads(value, batch, key_head, place.column, columns, p.H2, end)
            acc = tuple(a * shrink[:, None] + product(e, b) for a, b in zip(acc, v))
            return new, total, acc

        full = lambda *shape, fill=0.0: jnp.full(shape, fill, p.wide)
        empty = full(rows, fill=HIDDEN), full(rows), tuple(full(rows, size) for _, size, _ in pieces(p.H2))
        part = None if splits == 1 else (split, splits)
        m, total, acc = ranges.visit(bounds, batch, i, tile, empty, part)
        seen = m > HIDDEN / 2
        total = jnp.where(seen, total, 1.0)
        factor = jnp.where(seen, 1.0 / total, 0.0)
        store_heads(out, ((split, batch), head), [a * factor[:, None] for a in acc], start, p.H2, some_rows)
        log = jnp.where(seen, m * (1 / LOG2E) + jnp.log(total), -jnp.inf)
        inside = None if some_rows is None else start + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < p.T
        plgpu.store(lse.at[split, batch, head, pl.ds(start, rows)], log, mask=inside)

    return kernel


def product(a: Array, b: Array) -> Array:
    """a · b in float32 or wider; float32 as three products of TF32, nearly exact and on the tensor cores."""
    precision = None
    if a.dtype == jnp.float32 and platform() != INTERPRET_GPU:
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jnp.dot(a, b, precision=precision, preferred_element_type=wide(a.dtype))


def sum_of(parts) -> Array:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def put_together(out: Float[Array, "splits B T N H2"], lse: Float[Array, "splits B N T"]) -> tuple[Array, Array]:
    """One attention of those to parts of the keys."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    top = jnp.max(lse, axis=0)
    base = jnp.where(top > -jnp.inf, top, 0.0)
    share = jnp.exp(lse - base[None])
    total = jnp.sum(share, axis=0)
    weight = share / jnp.where(total > 0, total, 1.0)[None]
    out = jnp.sum(out * weight.swapaxes(2, 3)[..., None], axis=0)
    return out, jnp.where(total > 0, base + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
