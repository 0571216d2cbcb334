"""The forward pass on TPU: a Pallas kernel over transposed tiles, its matrix products running ahead of its softmax.

One grid step holds a block of queries and the resident keys of a head. A loop takes the chunks of keys that the block
sees; while the softmax of one chunk of queries is computed, the matrix unit already works on the next one's logits,
which wait in a buffer of their own. Chunks that the mask leaves whole go through a body without it.

Reference:
    Dao 2023, "FlashAttention-2"; Rabe and Staats 2021, "Self-attention does not need O(n²) memory".
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxml.attention import blocks
from jaxml.attention.fold import unfold
from jaxml.attention.tiles import HIDDEN, LOG2E, Inputs, Rules, add_sinks, keep, shape2
from jaxml.attention.tpu_arrays import Layout, Place, dot
from jaxml.attention.tpu_ranges import Ranges
from jaxml.axes import Array, Float
from jaxml.kernels import divide
from jaxml.linear import vary
from jaxml.target import INTERPRET, platform


def forward(rules: Rules, x: Inputs) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """(output in query's dtype, log-sum-exp of each row's logits, −inf where it sees nothing)."""
    p = Layout(rules, x)
    out, lse = attend(p)
    if x.sinks is not None:
        out, lse = add_sinks(out, lse, x.sinks[None, :, None])
    return out.swapaxes(1, 2).astype(x.query.dtype), lse


def attend(p: Layout) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """The kernel's call; no sinks."""
    c, per_key_head = p.cut, max(1, p.group // p.cut.heads)
    key_heads = max(1, c.heads // p.group)
    ranges = Ranges(p)
    at = lambda batch, head, i, part, *refs: (batch, head, i, ranges.held(refs, batch, i, part))
    of_queries = lambda batch, head, i, part, *_: (batch, head, i)

    of_keys = lambda batch, head, i, part, *refs: (
        batch,
        divide(head, per_key_head),
        ranges.held(refs, batch, i, part),
    )
    operands = p.operands(at)
    query, key, value = p.store(p.x.query, c.T), p.store(p.x.key, c.S), p.store(p.x.value, c.S)
    in_specs = [
        p.spec(c.heads, c.block, p.H, of_queries),
        p.spec(key_heads, c.keys * c.resident, p.H, of_keys),
        p.spec(key_heads, c.keys * c.resident, p.H2, of_keys),
        *(o.spec for o in operands),
    ]
    row_index = lambda batch, head, i, part, *_: (batch, head, 0, i)
    out_specs = [
        p.spec(c.heads, c.block, p.H2, of_queries),
        pl.BlockSpec((1, c.heads, 1, c.block), row_index),
    ]
    out_shape = [
        p.output(p.B, p.N, c.T, p.width2),
        p.output(p.B, p.N, 1, c.T, dtype=p.wide),
    ]
    scratch = [
        *[pltpu.VMEM((c.keys, c.columns), p.wide)] * max(2, c.chunks),
        *[pltpu.VMEM((8, c.columns), p.wide)] * max(2, c.chunks),
        pltpu.VMEM((8, c.block), p.wide),
        pltpu.VMEM((8, c.block), p.wide),
        pltpu.VMEM((p.width2, c.block), p.wide),
    ]
    itemsize = p.dtype.itemsize
    places = p.B * p.N * c.T * c.S
    out, lse = pl.pallas_call(
        _kernel(p, ranges, operands),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(ranges.arrays),
            grid=(p.B, p.N // c.heads, c.rows, c.parts),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=blocks.limits().vmem + 8 * blocks.MiB,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * places * (p.H + p.H2),
            transcendentals=places,
            bytes_accessed=itemsize * (query.size + (key.size + value.size) * c.rows + out_shape[0].size),
        ),
        interpret=platform() == INTERPRET,
        name="flash_attention_forward",
    )(*vary([*ranges.arrays, query, key, value, *(o.array for o in operands)], p.axes))
    out, lse = out[:, :, : p.true_T, : p.H2], lse[:, :, 0, : p.true_T]
    return unfold(out, p.fold), unfold(lse, p.fold)


def _kernel(p: Layout, ranges: Ranges, operands):
    c, rules = p.cut, p.rules

    def kernel(*refs):
        numbers, refs = refs[: len(ranges.arrays)], refs[len(ranges.arrays) :]
        (query, key, value), refs = refs[:3], refs[3:]
        extra, refs = refs[: len(operands)], refs[len(operands) :]
        (out, lse), refs = refs[:2], refs[2:]
        n = max(2, c.chunks)
        buffers, tops, (m_ref, l_ref, acc_ref) = refs[:n], refs[n : 2 * n], refs[2 * n :]
        read = p.rebuild(extra, operands)
        batch, head_block, i, part = (pl.program_id(axis) for axis in range(4))
        here, there = (pl.multiple_of(numbers[0][n], 8) for n in (0, 1))
        first_part, last_part = part == 0, part == c.parts - 1

        def one_head(local, _):
            head = head_block * c.heads + local
            key_local = divide(local, p.group) if c.heads > p.group else 0

            def place(j, chunk):
                return Place(batch, head, local, i * c.block, part * c.keys * c.resident, chunk, j)

            @pl.when(first_part)
            def _():
                m_ref[...] = jnp.full_like(m_ref, HIDDEN)
                l_ref[...] = jnp.zeros_like(l_ref)
                acc_ref[...] = jnp.zeros_like(acc_ref)

            def logits(j, chunk, masked: bool, buffer: int):
                """Logits of a tile and their largest in each of 8 sublanes, into the tile's buffers.

                Where in the buffer, only memory knows: else the compiler would keep a whole tile in registers.
                """
                k = key[0, key_local, p.keys_of(j)]
                q = query[0, local, p.columns_of(chunk)]
                mask, bias, tables, _, tile = read(place(j, chunk))
                s = shape2(rules, dot(k, q, (1, 1)), bias, tables, tile)
                if masked:
                    s = jnp.where(mask.visible(tile), s, HIDDEN)
                buffers[buffer][pl.ds(here, c.keys)] = s
                tops[buffer][...] = jnp.max(s.reshape(c.keys // 8, 8, c.columns), axis=0)

            def softmax(j, chunk, buffer: int):
                """Takes a tile's logits into the running softmax of its queries."""
                columns = p.columns_of(chunk)
                s = buffers[buffer][pl.ds(there, c.keys)].reshape(c.keys // 8, 8, c.columns)
                m = m_ref[:, columns]
                top = jnp.max(tops[buffer][...], axis=0, keepdims=True)
                new = jnp.maximum(m, jnp.broadcast_to(top, m.shape))
                e, shrink = jnp.exp2(s - new[None]), jnp.exp2(m - new)
                l_ref[:, columns] = shrink * l_ref[:, columns] + jnp.sum(e, axis=0)
                m_ref[:, columns] = new
                e = e.reshape(c.keys, c.columns)
                if rules.dropout_rate:
                    *_, dropout_key, tile = read(place(j, chunk))
                    e = e * keep(rules, dropout_key, tile)
                v = value[0, key_local, p.keys_of(j)]
                mixed = dot(v, e.astype(v.dtype), (0, 0))
                acc = acc_ref[:, columns].reshape(-1, 8, c.columns) * shrink[None]
                acc_ref[:, columns] = acc.reshape(mixed.shape) + mixed

            ranges.visit(numbers, batch, i, part, logits, softmax, blocks.limits().together)

            @pl.when(last_part)
            def _():
                m, total = m_ref[0:1], jnp.sum(l_ref[...], axis=0, keepdims=True)
                seen = m > HIDDEN / 2
                factor = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
                out[0, local] = (acc_ref[...] * factor).T.astype(out.dtype)
                lse[0, local] = jnp.where(seen, m * (1 / LOG2E) + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)

            return None

        if c.heads == 1:
            one_head(0, None)
        else:
            jax.lax.fori_loop(0, c.heads, one_head, None)

    return kernel
