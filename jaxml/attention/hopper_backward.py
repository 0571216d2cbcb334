"""The backward pass on Hopper GPUs: two Pallas kernels for Mosaic GPU, or one.

In the one for the queries' gradients a warp group holds 64 queries and walks keys; its last product is under way while
it works out the next tile. In the one for the keys' it holds 64 keys and walks the queries of all heads that share
them. Where the head dim is too wide for a group to sum both gradients of its keys, one of two sums the keys' and the
other the values'.

Fused, the latter does all: five products a tile instead of seven. Its programs add to the queries' gradients in memory,
in any order, so that the last bits of those differ from run to run.

Reference:
    Shah et al. 2024, "FlashAttention-3", algorithm 3.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxml.attention import blocks, blockwise
from jaxml.attention.fold import folded_queries, folded_rows, unfold
from jaxml.attention.gpu_arrays import Place, Ranges
from jaxml.attention.hopper_arrays import (
    ROWS,
    WIDE_FLOAT32,
    Call,
    feed,
    load,
    load_along,
    meet,
    registers,
    shared,
    spread,
)
from jaxml.attention.tiles import LOG2E, NOTHING, Inputs, Rules
from jaxml.axes import Array
from jaxml.kernels import divide, padded, remainder
from jaxml.linear import vary

OF_ROWS = plgpu.Layout.WGMMA.reduce(1)
PART = 64  # of the head dim, of which a group adds up the queries' gradients at once


def backward(
    rules: Rules,
    x: Inputs,
    out: Array,
    lse: Array,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[str, ...],
    fused: bool = False,
) -> dict[str, Array]:
    """Gradients of the arrays named in `wanted`; those of bias and of score_mod's data by `blockwise`."""
    delta = blockwise.delta(out, lse, ct_out, ct_lse)
    grads = blockwise.beside_kernels(rules, x, out, lse, ct_out, ct_lse, delta, wanted)
    lse = jnp.where(lse > -jnp.inf, lse * LOG2E, NOTHING)
    (_, T, _, H), H2 = x.query.shape, x.value.shape[3]
    cut = lambda which: blocks.hopper_cut(T, H, H2, x.query.dtype, which)
    fused = fused and {"query", "key", "value"} <= set(wanted)
    if "query" in wanted and not fused:
        p = Call(rules, x, cut("queries"), (lse, ct_out))
        grads["query"] = _unfolded(p, _queries(p, _rows(p, ct_out, lse, delta)))
    if "key" in wanted or "value" in wanted:
        p = Call(rules, x, cut("keys"), (lse, ct_out), turned=True)
        dk, dv, *dq = _keys(p, _rows(p, ct_out, lse, delta), fused)
        if fused:
            grads["query"] = _unfolded(p, dq[0])
        grads["key"], grads["value"] = dk[:, : p.S, :, : p.H], dv[:, : p.S, :, : p.H2]
    return {name: grads[name] for name in wanted}


def _unfolded(p: Call, dq: Array) -> Array:
    """The queries' gradients without what their array was lengthened by."""
    return unfold(dq[:, : p.T, :, : p.H].swapaxes(1, 2), p.fold).swapaxes(1, 2)


def _rows(p: Call, ct_out: Array, lse: Array, delta: Array) -> list[Array]:
    """What the kernels know of each query: cotangent, log₂-sum-exp and `delta`."""
    ct = padded(folded_queries(ct_out.astype(p.dtype), p.fold), 1, 8, 1, 64)
    return [ct, p.of_rows(folded_rows(lse, p.fold), NOTHING), p.of_rows(folded_rows(delta, p.fold))]


def _queries(p: Call, rows: list[Array]) -> Array:
    """dq, of the shape of `p.query`."""
    cut, groups = p.cut, p.cut.rows // ROWS
    columns, stages = cut.columns, cut.stages
    ranges = Ranges(p, cut.rows, columns, of_rows=True)

    def flash_attention_backward_queries(query, key, value, ct, lse, delta, *refs):
        *refs, dq, q_s, g_s, lse_s, delta_s, k_s, v_s, here, k_here, v_here, k_free, v_free = refs
        bounds, extra = refs[: len(ranges.arrays)], refs[len(ranges.arrays) :]
        group = jax.lax.axis_index("group")
        head, batch, block = p.program(p.N)
        i = ranges.blocks - 1 - block  # the longest first
        needed = ranges.of(bounds, batch, i)
        count = jnp.maximum(needed.all, 1)
        slot = lambda n: remainder(n, stages)

        @pl.when(group == groups)
        def _():
            registers(groups, of_memory=True)

            @pl.loop(0, count)
            def _(n):
                at = batch, pl.ds(needed.at(n) * columns, columns), divide(head, p.group)
                feed(n, stages, at, (key, k_s, k_here, k_free), (value, v_s, v_here, v_free))

        @pl.when(group < groups)
        def _():
            registers(groups)
            start = i * cut.rows + group * ROWS
            at, of = (batch, pl.ds(start, ROWS), head), (batch, head, pl.ds(start, ROWS))
            q, g = q_s.at[group], g_s.at[group]
            plgpu.copy_gmem_to_smem(query.at[at], q, here.at[group])
            plgpu.copy_gmem_to_smem(ct.at[at], g, here.at[group])
            plgpu.copy_gmem_to_smem(lse.at[of], lse_s.at[group], here.at[group])
            plgpu.copy_gmem_to_smem(delta.at[of], delta_s.at[group], here.at[group])
            plgpu.barrier_wait(here.at[group])
            norm, shift = load(lse_s.at[group], OF_ROWS), load(delta_s.at[group], OF_ROWS)
            empty = jnp.zeros((ROWS, columns), jnp.float32)

            def slopes(n, j, s_ref, pull_ref, masked: bool, behind: int):
                """Of the tile whose two products are under way, with `behind` more products behind them."""
                place = Place(batch, head, start, j * columns, ROWS, columns, False, False, masked)
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1 + behind)
                e, more = p.weights(extra, place, masked, s, spread(norm, place, of_rows=True))
                pull = plgpu.wgmma_accumulator_load(pull_ref, wait_n=behind)
                plgpu.barrier_arrive(v_free.at[slot(n)])
                return p.slopes(e, more, pull, spread(shift, place, of_rows=True))[1]

            def products(n, s_ref, pull_ref):
                plgpu.barrier_wait(k_here.at[slot(n)])
                plgpu.wgmma(s_ref, q, k_s.at[slot(n)].transpose((1, 0)))
                plgpu.barrier_wait(v_here.at[slot(n)])
                plgpu.wgmma(pull_ref, g, v_s.at[slot(n)].transpose((1, 0)))

            def first(s_ref, pull_ref):
                n = jnp.int32(0)
                products(n, s_ref, pull_ref)
                return slopes(n, needed.at(n), s_ref, pull_ref, True, 0)

            accumulator = plgpu.ACC((ROWS, columns), jnp.float32)
            ds = pl.run_scoped(first, accumulator, accumulator).astype(p.dtype)

            def step(n, carry, masked: bool):
                ds, total = carry
                j = (needed.crossed if masked else needed.whole)(n)

                def tile(refs):
                    s_ref, pull_ref, total_ref, ds_ref = refs
                    products(n, s_ref, pull_ref)
                    plgpu.wgmma(total_ref, ds, k_s.at[slot(n - 1)])
                    ds_ref[...] = slopes(n, j, s_ref, pull_ref, masked, 1)

                begin = plgpu.ACC.init(empty), plgpu.ACC.init(empty), plgpu.ACC.init(total), empty
                _, _, total, ds = pl.run_state(tile)(begin)
                plgpu.barrier_arrive(k_free.at[slot(n - 1)])
                total, ds = jax.lax.optimization_barrier((total, ds))  # `ds` may still be an operand until here
                return ds.astype(p.dtype), total

            carry = ds, jnp.zeros((ROWS, p.width), jnp.float32)
            carry = jax.lax.fori_loop(1, needed.free, lambda n, c: step(n, c, False), carry)
            carry = jax.lax.fori_loop(jnp.maximum(needed.free, 1), count, lambda n, c: step(n, c, True), carry)
            ds, total = carry
            last = lambda ref: plgpu.wgmma(ref, ds, k_s.at[slot(count - 1)])
            total = pl.run_state(last)(plgpu.ACC.init(total))
            q[...] = (total * p.missing).astype(p.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq.at[at])
            plgpu.wait_smem_to_gmem(0)

    scratch = [
        shared(groups, ROWS, p.width, dtype=p.dtype),
        shared(groups, ROWS, p.width2, dtype=p.dtype),
        *[plgpu.SMEM((groups, ROWS), jnp.float32) for _ in range(2)],
        shared(stages, columns, p.width, dtype=p.dtype),
        shared(stages, columns, p.width2, dtype=p.dtype),
        plgpu.Barrier(num_arrivals=4, num_barriers=groups),
        *[plgpu.Barrier(num_barriers=stages) for _ in range(2)],
        *[plgpu.Barrier(num_arrivals=groups, num_barriers=stages) for _ in range(2)],
    ]
    out = [p.output(*p.query.shape, dtype=p.dtype)]
    return p.launch(flash_attention_backward_queries, ranges, rows, p.N, out, groups, scratch)[0]


def _keys(p: Call, rows: list[Array], fused: bool = False) -> list[Array]:
    """dk and dv, of the shapes of `p.key` and `p.value`; fused, also dq, of that of `p.query`."""
    cut, groups, tiles = p.cut, 2, p.cut.columns // ROWS  # with fewer tiles than groups, each sums one gradient
    stages = cut.stages
    ranges = Ranges(p, cut.rows, cut.columns, of_rows=False)

    def flash_attention_backward_keys(query, key, value, ct, lse, delta, *refs):
        if fused:
            *refs, ds_s, part_s = refs
        *refs, dk, dv, k_s, v_s, q_s, g_s, lse_s, delta_s, here, q_here, g_here, q_free, g_free, done = refs
        if fused:
            *refs, dq = refs
        bounds, extra = refs[: len(ranges.arrays)], refs[len(ranges.arrays) :]
        group = jax.lax.axis_index("group")
        key_head, batch, j = p.program(p.K)
        needed = ranges.of(bounds, batch, j)
        slot = lambda n: remainder(n, stages)

        @pl.when(group == groups)
        def _():
            registers(groups, of_memory=True)
            for t in range(tiles):
                at = batch, pl.ds(j * cut.columns + t * ROWS, ROWS), key_head
                plgpu.copy_gmem_to_smem(key.at[at], k_s.at[t], here)
                plgpu.copy_gmem_to_smem(value.at[at], v_s.at[t], here)

            @pl.loop(0, p.group)
            def _(member):
                head = key_head * p.group + member

                @pl.loop(0, needed.all)
                def _(n):
                    start = needed.at(n) * cut.rows
                    at, of = (batch, pl.ds(start, cut.rows), head), (batch, head, pl.ds(start, cut.rows))
                    m = member * needed.all + n
                    feed(m, stages, at, (query, q_s, q_here, q_free), (ct, g_s, g_here, g_free))
                    plgpu.copy_gmem_to_smem(lse.at[of], lse_s.at[slot(m)], q_here.at[slot(m)])
                    plgpu.copy_gmem_to_smem(delta.at[of], delta_s.at[slot(m)], g_here.at[slot(m)])

        def add_to_queries(m, head, i):
            """Of the slopes that both groups have written: a group takes half of the head dim, or every other tile."""
            plgpu.barrier_wait(done)  # by now the slopes of the tile before the last are read: two have room

            def share(columns):
                def product(ref):
                    for t in range(tiles):
                        plgpu.wgmma(ref, ds_s.at[remainder(m, 2), t].transpose((1, 0)), k_s.at[t, :, columns])
                    return ref[...]

                part = pl.run_scoped(product, plgpu.ACC((ROWS, PART), jnp.float32))
                plgpu.wait_smem_to_gmem(0)
                part_s.at[group][...] = part
                plgpu.commit_smem()
                at = batch, pl.ds(i * cut.rows, ROWS), head, columns
                plgpu.copy_smem_to_gmem(part_s.at[group], dq.at[at], reduction_op="add")

            if p.width == groups * PART:
                share(pl.ds(group * PART, PART))
            else:
                pl.when(remainder(m, groups) == group)(lambda: share(pl.ds(0, PART)))

        def sums(t, of_key: bool, of_value: bool):
            """The gradients that a group holds, of the keys of tile t."""
            start = j * cut.columns + t * ROWS
            k, v = k_s.at[t], v_s.at[t]
            plgpu.barrier_wait(here)
            zeros = lambda width: jnp.zeros((ROWS, width), jnp.float32)
            shape = ROWS, cut.rows
            late = p.rules.dropout_rate > 0  # then what pulls is less by `delta` only after dropout

            def step(n, m, head, carry, masked: bool):
                i = (needed.crossed if masked else needed.whole)(n)
                place = Place(batch, head, i * cut.rows, start, cut.rows, ROWS, True, False, masked)
                q, g = q_s.at[slot(m)], g_s.at[slot(m)]

                of = lambda ref: load_along(ref.at[slot(m)], place, of_rows=True)

                def tile(refs):
                    s_ref, pull_ref, reached_ref, ds_ref = refs
                    plgpu.wgmma(s_ref, k, q.transpose((1, 0)))
                    if of_key:
                        plgpu.wgmma(pull_ref, v, g.transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=int(of_key))
                    e, more = p.weights(extra, place, masked, s, of(lse_s))
                    if of_key:
                        e, ds = p.slopes(
                            e, more, plgpu.wgmma_accumulator_load(pull_ref, wait_n=0), of(delta_s) if late else None
                        )
                        ds_ref[...] = ds.astype(p.dtype)
                    else:
                        e, _ = p.slopes(e, more, e, None)
                    reached_ref[...] = e.astype(p.dtype)

                plgpu.barrier_wait(q_here.at[slot(m)])
                plgpu.barrier_wait(g_here.at[slot(m)])
                empty = jnp.zeros(shape, jnp.float32)
                pull = empty if late or not of_key else -of(delta_s)
                low = jnp.zeros(shape, p.dtype)
                _, _, reached, ds = pl.run_state(tile)((plgpu.ACC.init(empty), plgpu.ACC.init(pull), low, low))

                def add(refs):
                    if of_value:
                        plgpu.wgmma(refs[0], reached, g)
                    if of_key:
                        plgpu.wgmma(refs[-1], slopes if fused else ds, q)

                if fused:
                    slopes = ds_s.at[remainder(m, 2), t]
                    slopes[...] = ds
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(done)
                carry = pl.run_state(add)(tuple(map(plgpu.ACC.init, carry)))
                if fused:
                    add_to_queries(m, head, i)
                plgpu.barrier_arrive(q_free.at[slot(m)])
                plgpu.barrier_arrive(g_free.at[slot(m)])
                return carry

            def one_head(member, carry):
                head, base = key_head * p.group + member, member * needed.all
                loop = lambda low, high, masked, carry: jax.lax.fori_loop(
                    low, high, lambda n, c: step(n, base + n, head, c, masked), carry
                )
                return loop(needed.free, needed.all, True, loop(0, needed.free, False, carry))

            found = (zeros(p.width2),) * of_value + (zeros(p.width),) * of_key
            found = one_head(0, found) if p.group == 1 else jax.lax.fori_loop(0, p.group, one_head, found)
            if tiles < groups or fused:  # whose memory the results take, the other one may still read
                meet(done)
            at = batch, pl.ds(start, ROWS), key_head
            if of_value:
                v[...] = found[0].astype(p.dtype)
            if of_key:
                k[...] = (found[-1] * p.missing).astype(p.dtype)
            plgpu.commit_smem()
            for has, source, target in ((of_value, v, dv), (of_key, k, dk)):
                if has:
                    plgpu.copy_smem_to_gmem(source, target.at[at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group < groups)
        def _():
            registers(groups)
            if tiles == groups:
                sums(group, True, True)
            else:
                first = jax.lax.rem(group, jnp.int32(tiles))
                pl.when(group == 0)(lambda: sums(first, False, True))
                pl.when(group == 1)(lambda: sums(first, True, False))

    scratch = [
        shared(tiles, ROWS, p.width, dtype=p.dtype),
        shared(tiles, ROWS, p.width2, dtype=p.dtype),
        shared(stages, cut.rows, p.width, dtype=p.dtype),
        shared(stages, cut.rows, p.width2, dtype=p.dtype),
        *[plgpu.SMEM((stages, cut.rows), jnp.float32) for _ in range(2)],
        plgpu.Barrier(num_arrivals=2 * tiles),
        *[plgpu.Barrier(num_arrivals=2, num_barriers=stages) for _ in range(2)],
        *[plgpu.Barrier(num_arrivals=groups, num_barriers=stages) for _ in range(2)],
        plgpu.Barrier(num_arrivals=groups),
    ]
    out = [p.output(*a.shape, dtype=p.dtype) for a in (p.key, p.value)]
    if not fused:
        return p.launch(flash_attention_backward_keys, ranges, rows, p.K, out, groups, scratch)
    assert cut.rows == ROWS and tiles == groups and p.width in (PART, groups * PART), (cut, p.width)
    scratch += [
        shared(2, tiles, ROWS, ROWS, dtype=p.dtype),
        plgpu.SMEM((groups, ROWS, PART), jnp.float32, transforms=WIDE_FLOAT32),
    ]

    def run(refs):
        dk, dv, dq = refs
        dk[...], dv[...] = p.launch(flash_attention_backward_keys, ranges, rows, p.K, out, groups, scratch, (dq,))

    zeros = lambda like, dtype: vary(jnp.zeros(like.shape, dtype), p.axes)
    dk, dv, dq = pl.run_state(run)((zeros(p.key, p.dtype), zeros(p.value, p.dtype), zeros(p.query, jnp.float32)))
    return [dk, dv, (dq * p.missing).astype(p.dtype)]
