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
from jaxml.attention.tiles import Inputs, Rules, keep
from jaxml.attention.tpu_arrays import HIDDEN, LOG2E, Layout, Place, divide, dot, shape_logits, unfold
from jaxml.axes import Array, Float


def forward(rules: Rules, x: Inputs) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """(output in query's dtype, log-sum-exp of each row's logits, −inf where it sees nothing)."""
    out, lse = attend(Layout(rules, x))
    if x.sinks is not None:  # a sink only makes the sum larger: all that it does can be done afterwards
        with_sink = jnp.logaddexp(lse, x.sinks.astype(lse.dtype)[None, :, None])
        out = out * jnp.exp(lse - with_sink)[..., None]
        lse = with_sink
    return out.swapaxes(1, 2).astype(x.query.dtype), lse


def attend(p: Layout) -> tuple[Float[Array, "B N T H2"], Float[Array, "B N T"]]:
    """The kernel's call; no sinks."""
    c, per_key_head = p.cut, max(1, p.group // p.cut.heads)
    key_heads = max(1, c.heads // p.group)
    bounds, holes = p.ranges()
    prefetched = [jnp.zeros(2, jnp.int32), *([] if bounds is None else [bounds, holes])]

    def resident(batch, i, part, _, *ranges):
        """The part of the keys to hold: never one that this block of queries does not see."""
        if not ranges or c.parts == 1:
            return part
        first, last = (_bound(ranges[0], p, batch, i, n) for n in (0, 3))
        return jnp.clip(part, divide(first, c.resident), divide(jnp.maximum(last - 1, 0), c.resident))

    at = lambda batch, head, i, part, *ranges: (batch, head, i, resident(batch, i, part, *ranges))
    query_index = lambda batch, head, i, part, *_: (batch, head, i, 0)

    def key_index(batch, head, i, part, *ranges):
        return batch, divide(head, per_key_head), resident(batch, i, part, *ranges), 0

    def turned_index(*grid):
        batch, head, part, _ = key_index(*grid)
        return batch, head, 0, part

    operands = p.operands(at)
    query, key, value = p.queries(p.x.query), p.keys(p.x.key), p.keys_turned(p.x.value)
    (H, H2), per = (query.shape[3], value.shape[2]), c.keys * c.resident
    in_specs = [
        pl.BlockSpec((1, c.heads, c.block, H), query_index),
        pl.BlockSpec((1, key_heads, per, H), key_index),
        pl.BlockSpec((1, key_heads, H2, per), turned_index),
        *(o.spec for o in operands),
    ]
    row_index = lambda batch, head, i, part, *_: (batch, head, 0, i)
    out_specs = [
        pl.BlockSpec((1, c.heads, c.block, H2), query_index),
        pl.BlockSpec((1, c.heads, 1, c.block), row_index),
    ]
    out_shape = [
        jax.ShapeDtypeStruct((p.B, p.N, c.T, H2), p.dtype),
        jax.ShapeDtypeStruct((p.B, p.N, 1, c.T), p.wide),
    ]
    scratch = [
        *[pltpu.VMEM((c.keys, c.columns), p.wide)] * max(2, c.chunks),
        *[pltpu.VMEM((8, c.columns), p.wide)] * max(2, c.chunks),
        pltpu.VMEM((8, c.block), p.wide),
        pltpu.VMEM((8, c.block), p.wide),
        pltpu.VMEM((H2, c.block), p.wide),
    ]
    itemsize = p.dtype.itemsize
    places = p.B * p.N * c.T * c.S
    out, lse = pl.pallas_call(
        _kernel(p, operands, len(prefetched)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
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
            flops=2 * places * (H + H2),
            transcendentals=places,
            bytes_accessed=itemsize * (query.size + (key.size + value.size) * c.rows + out_shape[0].size),
        ),
        interpret=blocks.platform() == blocks.INTERPRET,
        name="flash_attention_forward",
    )(*prefetched, query, key, value, *(o.array for o in operands))
    out, lse = out[:, :, : p.true_T, : p.H2], lse[:, :, 0, : p.true_T]
    return unfold(out, p.fold), unfold(lse, p.fold)


def _bound(bounds, p: Layout, batch, i, n: int):
    """The n-th bound of a block of queries: first seen, first whole, first crossed again, end."""
    one = bounds.shape[0] == p.cut.rows * 4
    return bounds[((0 if one else batch) * p.cut.rows + i) * 4 + n]


def _seen(holes, p: Layout, batch, i, j):
    """Whether the block of queries i sees anything of the chunk of keys j of the call."""
    words = -(-p.cut.resident * p.cut.parts // 32)
    one = holes.shape[0] == p.cut.rows * words
    word = holes[((0 if one else batch) * p.cut.rows + i) * words + (j >> 5)]
    return (word >> (j & 31)) & 1 == 1


def _kernel(p: Layout, operands, num_prefetched: int):
    c, rules = p.cut, p.rules

    def kernel(*refs):
        (zeros, *ranges), refs = refs[:num_prefetched], refs[num_prefetched:]
        (query, key, value), refs = refs[:3], refs[3:]
        extra, refs = refs[: len(operands)], refs[len(operands) :]
        (out, lse), refs = refs[:2], refs[2:]
        n = max(2, c.chunks)
        buffers, tops, (m_ref, l_ref, acc_ref) = refs[:n], refs[n : 2 * n], refs[2 * n :]
        read = p.rebuild(extra, operands)
        batch, head_block, i, part = (pl.program_id(axis) for axis in range(4))
        here, there = (pl.multiple_of(zeros[n], 8) for n in (0, 1))
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
                k = key[0, key_local, pl.ds(pl.multiple_of(j * c.keys, c.keys), c.keys)]
                q = query[0, local, chunk * c.columns : (chunk + 1) * c.columns]
                mask, bias, tables, _, tile = read(place(j, chunk))
                s = shape_logits(rules, dot(k, q, (1, 1)), bias, tables, tile)
                if masked:
                    s = jnp.where(mask.visible(tile), s, HIDDEN)
                buffers[buffer][pl.ds(here, c.keys)] = s
                tops[buffer][...] = jnp.max(s.reshape(c.keys // 8, 8, c.columns), axis=0)

            def softmax(j, chunk, buffer: int):
                """Takes a tile's logits into the running softmax of its queries."""
                columns = pl.ds(chunk * c.columns, c.columns)
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
                v = value[0, key_local, :, pl.ds(pl.multiple_of(j * c.keys, c.keys), c.keys)]
                mixed = dot(v, e.astype(v.dtype), (1, 0))
                acc = acc_ref[:, columns].reshape(-1, 8, c.columns) * shrink[None]
                acc_ref[:, columns] = acc.reshape(mixed.shape) + mixed

            def run(first, last, masked: bool):
                """All chunks of queries against the chunks of keys first … last − 1."""

                def step(j, carry):
                    for chunk in range(c.chunks):
                        if chunk + 1 < c.chunks:
                            logits(j, chunk + 1, masked, chunk + 1)
                        elif c.chunks > 1 and not masked:
                            logits(jnp.minimum(j + 1, last - 1), 0, masked, 0)
                        softmax(j, chunk, chunk)
                    if c.chunks == 1 and not masked:
                        logits(jnp.minimum(j + 1, last - 1), 0, masked, 0)
                    return carry

                logits(first, 0, masked, 0)
                jax.lax.fori_loop(first, last, step, None)

            if not ranges:
                run(0, c.resident, masked=False)
            else:
                start = part * c.resident
                within = lambda n: jnp.clip(_bound(ranges[0], p, batch, i, n) - start, 0, c.resident)
                first, whole, again, last = map(within, range(4))

                @pl.when(again > whole)
                def _():
                    run(whole, again, masked=False)

                def crossed(n, carry):
                    j = jnp.where(first + n < whole, first + n, again + n - (whole - first))

                    @pl.when(_seen(ranges[1], p, batch, i, start + j))
                    def _():
                        run(j, j + 1, masked=True)

                    return carry

                jax.lax.fori_loop(0, whole - first + last - again, crossed, None)

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
