"""The forward pass on Hopper GPUs: a Pallas kernel for Mosaic GPU.

Of a program's three warp groups one copies keys and values; the other two hold 64 queries each. While the tensor cores
weigh values, a group already has the next products and works out their softmax, and the two take turns at the tensor
cores.

Reference:
    Shah et al. 2024, "FlashAttention-3", algorithms 1 and 2.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxml.attention import blocks
from jaxml.attention.fold import unfold
from jaxml.attention.gpu_arrays import Place, Ranges
from jaxml.attention.hopper_arrays import ROWS, Call, feed, meet, registers, shared
from jaxml.attention.tiles import HIDDEN, LOG2E, Inputs, Rules, add_sinks, keep, shape2
from jaxml.axes import Array, Float
from jaxml.kernels import divide, remainder

GROUPS = 2


def forward(rules: Rules, x: Inputs) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """(output in query's dtype, log-sum-exp of each row's logits, −inf where it sees nothing)."""
    p = Call(rules, x, blocks.hopper_cut(x.query.shape[1], x.query.shape[3], x.value.shape[3], x.query.dtype))
    out, lse = _attend(p)
    out, lse = unfold(out[:, : p.T, :, : p.H2].swapaxes(1, 2), p.fold), unfold(lse[..., : p.T], p.fold)
    if x.sinks is not None:
        out, lse = add_sinks(out, lse, x.sinks[None, :, None])
    return out.swapaxes(1, 2), lse


def _attend(p: Call) -> tuple[Float[Array, "B T N width2"], Float[Array, "B N rows"]]:
    """The kernel's call; no sinks."""
    ranges = Ranges(p, p.cut.rows, p.cut.columns, of_rows=True)
    columns, stages = p.cut.columns, p.cut.stages
    out = [
        p.output(*p.query.shape[:3], p.width2, dtype=p.dtype),
        p.output(p.B, p.N, ranges.blocks * p.cut.rows, dtype=jnp.float32),
    ]
    scratch = [
        shared(GROUPS, ROWS, p.width, dtype=p.dtype),
        shared(stages, columns, p.width, dtype=p.dtype),
        shared(stages, columns, p.width2, dtype=p.dtype),
        plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=GROUPS),
        *[plgpu.Barrier(num_barriers=stages) for _ in range(2)],
        *[plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages) for _ in range(2)],
        plgpu.Barrier(num_arrivals=GROUPS),
    ]
    return p.launch(_kernel(p, ranges), ranges, [], p.N, out, GROUPS, scratch)


def _kernel(p: Call, ranges: Ranges):
    cut, columns, stages = p.cut, p.cut.columns, p.cut.stages
    softmax = Softmax(p)

    def flash_attention_forward(query, key, value, *refs):
        *refs, out, lse, q_s, k_s, v_s, lse_s, q_here, k_here, v_here, k_free, v_free, turns = refs
        bounds, extra = refs[: len(ranges.arrays)], refs[len(ranges.arrays) :]
        group = jax.lax.axis_index("group")
        head, batch, block = p.program(p.N)
        i = ranges.blocks - 1 - block  # the longest first
        key_head = divide(head, p.group)
        needed = ranges.of(bounds, batch, i)
        count = jnp.maximum(needed.all, 1)
        slot = lambda n: remainder(n, stages)

        @pl.when(group == GROUPS)
        def _():
            registers(GROUPS, of_memory=True)

            @pl.loop(0, count)
            def _(n):
                at = batch, pl.ds(needed.at(n) * columns, columns), key_head
                feed(n, stages, at, (key, k_s, k_here, k_free), (value, v_s, v_here, v_free))

        @pl.when(group < GROUPS)
        def _():
            registers(GROUPS)
            start = i * cut.rows + group * ROWS
            rows = batch, pl.ds(start, ROWS), head
            q = q_s.at[group]
            plgpu.copy_gmem_to_smem(query.at[rows], q, q_here.at[group])
            plgpu.barrier_wait(q_here.at[group])

            turn = lambda: meet(turns)

            def soften(s, j, state, masked: bool):
                place = Place(batch, head, start, j * columns, ROWS, columns, False, False, masked)
                return softmax(s, extra, place, state, masked)

            def first(s_ref):
                plgpu.wgmma(s_ref, q, k_s.at[0].transpose((1, 0)))
                return s_ref[...]

            plgpu.barrier_wait(k_here.at[0])
            s = pl.run_scoped(first, plgpu.ACC((ROWS, columns), jnp.float32))
            plgpu.barrier_arrive(k_free.at[0])
            state, e = soften(s, needed.at(jnp.int32(0)), softmax.empty(), True)
            weights = e.astype(p.dtype)
            acc = jnp.zeros((ROWS, p.width2), jnp.float32)

            def step(n, carry, masked: bool):
                (m, total), weights, acc = carry
                j = (needed.crossed if masked else needed.whole)(n)

                def products(refs):
                    s_ref, acc_ref, m_ref, total_ref, e_ref = refs
                    plgpu.barrier_wait(k_here.at[slot(n)])
                    turn()
                    plgpu.wgmma(s_ref, q, k_s.at[slot(n)].transpose((1, 0)))
                    plgpu.barrier_wait(v_here.at[slot(n - 1)])
                    plgpu.wgmma(acc_ref, weights, v_s.at[slot(n - 1)])
                    turn()
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    plgpu.barrier_arrive(k_free.at[slot(n)])
                    (m_ref[...], total_ref[...]), e_ref[...] = soften(s, j, (m, total), masked)

                empty = jnp.zeros((ROWS, columns), jnp.float32)
                begin = plgpu.ACC.init(empty), plgpu.ACC.init(acc), m, total, empty
                _, acc, new, total, e = pl.run_state(products)(begin)
                plgpu.barrier_arrive(v_free.at[slot(n - 1)])
                acc, e = jax.lax.optimization_barrier((acc, e))  # operands of a product under way are not overwritten
                return (new, total), e.astype(p.dtype), acc * along_rows(jnp.exp2(m - new), acc.shape)

            pl.when(group == 1)(turn)
            carry = state, weights, acc
            carry = jax.lax.fori_loop(1, needed.free, lambda n, c: step(n, c, False), carry)
            carry = jax.lax.fori_loop(jnp.maximum(needed.free, 1), count, lambda n, c: step(n, c, True), carry)
            pl.when(group == 0)(turn)
            (m, total), weights, acc = carry

            def last(acc_ref):
                plgpu.barrier_wait(v_here.at[slot(count - 1)])
                plgpu.wgmma(acc_ref, weights, v_s.at[slot(count - 1)])

            acc = pl.run_state(last)(plgpu.ACC.init(acc))
            factor, log = softmax.finish(m, total)
            result = (acc * along_rows(factor, acc.shape)).astype(p.dtype)
            lse_s.at[group][...] = log

            def leave(done):
                done[...] = result
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(done, out.at[rows])
                plgpu.copy_smem_to_gmem(lse_s.at[group], lse.at[batch, head, pl.ds(start, ROWS)])
                plgpu.wait_smem_to_gmem(0)

            if p.width == p.width2:
                leave(q)
            else:  # where values were, once both groups have weighed them
                turn()
                for g in range(GROUPS):
                    place = v_s.at[g * ROWS // columns, pl.ds(g * ROWS % columns, ROWS)]
                    pl.when(group == g)(lambda place=place: leave(place))

    return flash_attention_forward


class Softmax:
    """Of a call's tiles: the running maximum and sum of each row, in powers of two."""

    def __init__(self, p: Call):
        self.p = p
        # Where logits are products times a positive factor, it is applied in the exponent, where it costs nothing.
        self.plain = not p.bent and p.x.bias is None and p.rules.scale > 0
        self.factor = p.rules.scale * LOG2E if self.plain else 1.0
        self.hidden = HIDDEN / max(1.0, self.factor)

    def empty(self):
        return jnp.full((ROWS,), self.hidden * self.factor, jnp.float32), jnp.zeros((ROWS,), jnp.float32)

    def __call__(self, s: Array, extra, place: Place, state, masked: bool):
        """((new maximum, new sum), weights for the product with values)."""
        p, (m, total) = self.p, state
        mask, bias, tables, dropout_key, at = p.read(extra, place)
        if not self.plain:
            s = shape2(p.rules, s, bias, tables, at)
        if masked:
            s = p.hide(s, mask, at, place, self.hidden)
        new = jnp.maximum(m, jnp.max(s, axis=1) * self.factor)
        e = jnp.exp2(s * self.factor - along_rows(new, s.shape))
        total = total * jnp.exp2(m - new) + jnp.sum(e, axis=1)
        if p.rules.dropout_rate:
            e = e * keep(p.rules, dropout_key, at)
        return (new, total), e

    def finish(self, m: Array, total: Array) -> tuple[Array, Array]:
        """(factor of the weighted values, log-sum-exp) of each row."""
        seen = m > self.hidden * self.factor / 2
        total = jnp.where(seen, total, 1.0)
        return jnp.where(seen, 1.0 / total, 0.0), jnp.where(seen, m * (1 / LOG2E) + jnp.log(total), -jnp.inf)


def along_rows(a: Array, shape: tuple[int, int]) -> Array:
    return jax.lax.broadcast_in_dim(a, shape, (0,))
