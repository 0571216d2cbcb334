"""The backward pass on TPU: the same walk over transposed tiles as the forward pass, deterministic.

Where a head's keys fit in VMEM, one kernel computes all three gradients with five products a tile, and nothing passes
through memory in parts. Where they do not, one kernel walks the queries for the keys' gradients, and another the keys
for the queries'.

Reference:
    Dao 2023, "FlashAttention-2", algorithm 2.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxml.attention import blocks, blockwise
from jaxml.attention.fold import folded_queries, folded_rows, unfold
from jaxml.attention.tiles import HIDDEN, LOG2E, NOTHING, Inputs, Rules, keep, shape2
from jaxml.attention.tpu_arrays import Layout, Place, dot
from jaxml.attention.tpu_ranges import Ranges
from jaxml.axes import Array
from jaxml.kernels import divide
from jaxml.linear import vary
from jaxml.target import INTERPRET, platform


def backward(
    rules: Rules, x: Inputs, out: Array, lse: Array, ct_out: Array, ct_lse: Array, wanted: tuple[str, ...]
) -> dict[str, Array]:
    """Gradients of the arrays named in `wanted`; those of bias and of score_mod's data by `blockwise`."""
    delta = blockwise.delta(out, lse, ct_out, ct_lse)
    grads = blockwise.beside_kernels(rules, x, out, lse, ct_out, ct_lse, delta, wanted)
    asked = [name for name in ("query", "key", "value") if name in wanted]
    if asked:
        p = Layout(rules, x, (out, ct_out, ct_lse), backward=True)
        query, key, value = gradients(p, lse, delta, ct_out)
        found = {"query": query, "key": key, "value": value}
        grads |= {name: found[name].astype(x.query.dtype) for name in asked}
    return {name: grads[name] for name in wanted}


def gradients(p: Layout, lse: Array, delta: Array, ct: Array) -> tuple[Array, Array, Array]:
    """(dq [B, T, N, H], dk [B, S, K, H], dv [B, S, K, H2])."""
    lse = jnp.where(lse > -jnp.inf, lse * LOG2E, NOTHING)
    rows = [p.rows(folded_rows(lse, p.fold), NOTHING), p.rows(folded_rows(delta, p.fold))]
    ct = p.store(folded_queries(ct.astype(p.dtype), p.fold), p.cut.T)
    if p.cut.parts == 1:
        dq, dk, dv = _call(p, rows, ct, queries=True, keys=True)
    else:
        (dq,), (dk, dv) = _call(p, rows, ct, queries=True, keys=False), _call(p, rows, ct, queries=False, keys=True)
    dq = unfold(dq[:, :, : p.true_T, : p.H], p.fold)
    dk, dv = dk[:, :, : p.true_S, : p.H], dv[:, :, : p.true_S, : p.H2]
    return dq.swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def _call(p: Layout, rows: list[Array], ct: Array, *, queries: bool, keys: bool) -> list[Array]:
    """One kernel: the gradients of queries, of keys and values, or all."""
    c, ranges = p.cut, Ranges(p)
    key_heads = max(1, c.heads // p.group)  # of a grid step
    G = 1 if c.heads > 1 else p.group  # grid steps of a key head
    per = c.keys * c.resident
    if keys:  # keys stay, queries pass by
        grid = (p.B, p.K // key_heads, c.parts, G, c.rows)
        name = lambda batch, k, part, g, i: (batch, k, g, i, part)
        held = lambda refs, batch, i, part: part
    else:  # queries stay, keys pass by
        grid = (p.B, p.K // key_heads, G, c.rows, c.parts)
        name = lambda batch, k, g, i, part: (batch, k, g, i, part)
        held = ranges.held

    def at(*indices):
        batch, k, g, i, part = name(*indices[:5])
        return batch, k * G + g, i, held(indices[5:], batch, i, part)

    def of_queries(*indices):
        return at(*indices)[:3]

    def of_keys(*indices):
        batch, k, _, i, part = name(*indices[:5])
        return batch, k, held(indices[5:], batch, i, part)

    def of_rows(*indices):
        batch, head, i, _ = at(*indices)
        return batch, head, 0, i

    operands = p.operands(at)
    inputs = [p.store(p.x.query, c.T), p.store(p.x.key, c.S), p.store(p.x.value, c.S), ct, *rows]
    in_specs = [
        p.spec(c.heads, c.block, p.H, of_queries),
        p.spec(key_heads, per, p.H, of_keys),
        p.spec(key_heads, per, p.H2, of_keys),
        p.spec(c.heads, c.block, p.H2, of_queries),
        *[pl.BlockSpec((1, c.heads, 1, c.block), of_rows)] * 2,
        *(o.spec for o in operands),
    ]
    n, tile = max(2, c.chunks), pltpu.VMEM((c.keys, c.columns), p.wide)
    scratch = [tile] * (3 * n if _bent(p) else 2 * n)
    out_specs, out_shape = [], []
    for heads, several, length, block, width, where, asked in (
        (p.N, c.heads, c.T, c.block, p.H, of_queries, queries),
        (p.K, key_heads, c.S, per, p.H, of_keys, keys),
        (p.K, key_heads, c.S, per, p.H2, of_keys, keys),
    ):
        if asked:
            spec = p.spec(several, block, width, where)
            out_specs.append(spec)
            out_shape.append(p.output(p.B, heads, length, spec.block_shape[-1]))
            scratch.append(pltpu.VMEM((spec.block_shape[-1], block), p.wide))
    places = p.B * p.N * c.T * c.S
    products = (3 if keys else 2) * p.H + 2 * p.H2 if queries else 2 * (p.H + p.H2)
    return pl.pallas_call(
        _kernel(p, ranges, operands, name, queries, keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(ranges.arrays),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.limits().vmem + 8 * blocks.MiB,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * places * products,
            transcendentals=places,
            bytes_accessed=p.dtype.itemsize * (2 * inputs[0].size + 2 * ct.size + 4 * inputs[1].size),
        ),
        interpret=platform() == INTERPRET,
        name="flash_attention_backward" + ("" if queries and keys else "_queries" if queries else "_keys"),
    )(*vary([*ranges.arrays, *inputs, *(o.array for o in operands)], p.axes))


def _bent(p: Layout) -> bool:
    """Whether a logit depends on its product otherwise than by a factor."""
    return p.rules.soft_cap is not None or p.rules.score_mod is not None


def _kernel(p: Layout, ranges: Ranges, operands, name, queries: bool, keys: bool):
    c, rules, bent = p.cut, p.rules, _bent(p)

    def kernel(*refs):
        numbers, refs = refs[: len(ranges.arrays)], refs[len(ranges.arrays) :]
        (query, key, value, ct, lse, delta), refs = refs[:6], refs[6:]
        extra, refs = refs[: len(operands)], refs[len(operands) :]
        count = queries + 2 * keys
        outs, refs = refs[:count], refs[count:]
        n = max(2, c.chunks)
        products, pulls, slopes = refs[:n], refs[n : 2 * n], refs[2 * n : 3 * n]
        sums = refs[-count:]
        read = p.rebuild(extra, operands)
        batch, head_block, g, i, part = name(*(pl.program_id(axis) for axis in range(5)))
        here, there = (pl.multiple_of(numbers[0][n], 8) for n in (0, 1))
        dq_ref = sums[0] if queries else None
        dk_ref, dv_ref = sums[-2:] if keys else (None, None)

        def one_head(local, _):
            if c.heads > 1:
                head, key_local = head_block * c.heads + local, divide(local, p.group)
                member = local - key_local * p.group  # of the query heads of a key head
            else:
                head, key_local, member = head_block * p.group + g, 0, g

            if queries:

                @pl.when((part == 0) | keys)
                def _():
                    dq_ref[...] = jnp.zeros_like(dq_ref)

            if keys:

                @pl.when((member == 0) & (i == 0))
                def _():
                    dk_ref[...] = jnp.zeros_like(dk_ref)
                    dv_ref[...] = jnp.zeros_like(dv_ref)

            def place(j, chunk):
                return Place(batch, head, local, i * c.block, part * c.keys * c.resident, chunk, j)

            def logits(j, chunk, masked: bool, buffer: int):
                """Logits of a tile, and what pulls at its weights, into the tile's buffers (see `tpu_forward`)."""
                q, k = query[0, local, p.columns_of(chunk)], key[0, key_local, p.keys_of(j)]
                mask, bias, tables, _, tile = read(place(j, chunk))
                shape = lambda s: shape2(rules, s, bias, tables, tile)
                s = dot(k, q, (1, 1))
                if bent:
                    s, slope = jax.jvp(shape, (s,), (jnp.ones_like(s),))
                    slopes[buffer][pl.ds(here, c.keys)] = slope * (1 / LOG2E)
                else:
                    s = shape(s)
                if masked:
                    s = jnp.where(mask.visible(tile), s, HIDDEN)
                products[buffer][pl.ds(here, c.keys)] = s
                pulls[buffer][pl.ds(here, c.keys)] = dot(
                    value[0, key_local, p.keys_of(j)], ct[0, local, p.columns_of(chunk)], (1, 1)
                )

            def gradients(j, chunk, buffer: int):
                """Adds what a tile gives to the sums."""
                columns, those_keys = p.columns_of(chunk), p.keys_of(j)
                e = jnp.exp2(products[buffer][pl.ds(there, c.keys)] - lse[0, local, :, columns])
                pull, kept = pulls[buffer][pl.ds(there, c.keys)], e
                if rules.dropout_rate:
                    *_, dropout_key, tile = read(place(j, chunk))
                    factor = keep(rules, dropout_key, tile).astype(e.dtype)
                    pull, kept = pull * factor, e * factor
                ds = e * (pull - delta[0, local, :, columns])
                if bent:
                    ds = ds * slopes[buffer][pl.ds(there, c.keys)]
                ds = ds.astype(p.dtype)
                if keys:
                    dv_ref[:, those_keys] += dot(ct[0, local, columns], kept.astype(p.dtype), (0, 1))
                    dk_ref[:, those_keys] += dot(query[0, local, columns], ds, (0, 1))
                if queries:
                    dq_ref[:, columns] += dot(key[0, key_local, those_keys], ds, (0, 0))

            ranges.visit(numbers, batch, i, part, logits, gradients)
            scale = 1.0 if bent else rules.scale

            if queries:

                @pl.when((part == c.parts - 1) | keys)
                def _():
                    outs[0][0, local] = (dq_ref[...] * scale).T.astype(p.dtype)

            if keys:

                @pl.when((member == p.group - 1) & (i == c.rows - 1))
                def _():
                    def write(j, carry):
                        outs[-2][0, key_local, p.keys_of(j)] = (dk_ref[:, p.keys_of(j)] * scale).T.astype(p.dtype)
                        outs[-1][0, key_local, p.keys_of(j)] = dv_ref[:, p.keys_of(j)].T.astype(p.dtype)
                        return carry

                    jax.lax.fori_loop(0, c.resident, write, None)

            return None

        if c.heads == 1:
            one_head(0, None)
        else:
            jax.lax.fori_loop(0, c.heads, one_head, None)

    return kernel
