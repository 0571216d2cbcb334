"""Paged decoding on TPU: a few queries of each row against its keys and values in pages.

Decoding reads every key and value once; everything else has to hide behind that. The heads of a token lie side by side
in a page, so that a page is one copy. All query heads are packed into the rows of one product with all of them: each
row has its query at its own key head's place and zeros at the others', which costs the matrix unit no more than a
product a head and leaves one softmax over full registers instead of many over nearly empty ones.

A grid step takes several pages of one row. The steps are a list made outside, as long as the rows need together, so
that short rows cost nothing for long ones, and while a step computes, the next one's pages arrive.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxml.attention import blocks, tiles
from jaxml.attention.tiles import HIDDEN, LOG2E, shape2
from jaxml.attention.tpu_arrays import dot
from jaxml.axes import Array, Float, Int, wide
from jaxml.linear import vary, varying_axes
from jaxml.target import INTERPRET, platform

KEYS = 512  # of a grid step, where VMEM has room for them
MOST_WORDS = 2**17  # of 32 bits, in scalar memory


@dataclasses.dataclass(frozen=True)
class Rules(tiles.Rules):
    """What does not change from call to call."""

    window: int | None = None
    num_heads: int = 1  # K


def supports(query, key, value, table) -> str | None:
    """Why the kernel cannot compute the call, or None."""
    if reason := blocks.unsupported():
        return reason
    if jnp.float64 in (query.dtype, key.dtype) and platform() != INTERPRET:
        return "TPUs have no float64"
    if query.shape[1] * query.shape[2] > 1024:
        return f"it takes at most 1024 queries of all heads of a row together, here are {query.shape[1:3]}"
    if key.shape[1] % 8:
        return f"pages hold a multiple of 8 tokens, these {key.shape[1]}"
    if table.size > MOST_WORDS:
        return f"a table holds at most {MOST_WORDS} pages, this {table.size}"
    if _pages_of_step(query, key, value, table) < 1:
        return f"a page of {key.shape[1]} tokens of width {key.shape[2]} + {value.shape[2]} does not fit in VMEM"
    return None


def _pages_of_step(query, key, value, table) -> int:
    rows, dtype = query.shape[1] * query.shape[2], wide(query.dtype)
    fixed = rows * (key.shape[2] * key.dtype.itemsize + 3 * value.shape[2] * dtype.itemsize)
    page = 3 * key.shape[1] * (key.shape[2] + value.shape[2]) * key.dtype.itemsize  # one in use, two on their way
    room = int((blocks.limits().vmem - fixed) // page)
    return min(room, max(1, KEYS // key.shape[1]), table.shape[1])


def attend(
    rules: Rules, query: Array, key: Array, value: Array, table: Int[Array, "B n"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T N H2"], Float[Array, "B T N"]]:
    """(output in float32 or wider, log-sum-exp)."""
    B, T, N, H = query.shape
    K, page, dtype = rules.num_heads, key.shape[1], wide(query.dtype)
    H2, rows = value.shape[2] // K, T * N
    axes = varying_axes(query, key, value, table, lengths)
    per = _pages_of_step(query, key, value, table)
    work, steps = _work(rules, T, table, lengths.astype(jnp.int32), page, per)
    q = query.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, rows, H)  # the rows of a key head together
    more = -rows % 16
    q = jnp.pad(q, ((0, 0), (0, more), (0, 0))).astype(key.dtype)
    rows += more

    of_row = lambda w, batch, *_: (batch[w], 0, 0)
    of_page = lambda n: lambda w, batch, part, pages, *_: (pages[w * per + n], 0, 0)
    at_pages = lambda a: [pl.BlockSpec((1, page, a.shape[2]), of_page(n)) for n in range(per)]
    like = jax.typeof(vary(query, axes)).manual_axis_type
    out, lse = pl.pallas_call(
        _kernel(rules, T, N, K, H, H2, page, per),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            grid=(steps,),
            in_specs=[pl.BlockSpec((1, rows, H), of_row), *at_pages(key), *at_pages(value)],
            out_specs=[pl.BlockSpec((1, rows, H2), of_row), pl.BlockSpec((1, rows, 1), of_row)],
            scratch_shapes=[
                pltpu.VMEM((rows, K * H), key.dtype),
                pltpu.VMEM((rows, 1), dtype),
                pltpu.VMEM((rows, 1), dtype),
                pltpu.VMEM((rows, K * H2), dtype),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, rows, H2), dtype, manual_axis_type=like),
            jax.ShapeDtypeStruct((B, rows, 1), dtype, manual_axis_type=like),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=blocks.limits().vmem + 8 * blocks.MiB
        ),
        interpret=platform() == INTERPRET,
        name="paged_attention",
    )(*vary([*work, q, *[key] * per, *[value] * per], axes))
    turn = lambda a: a[:, : T * N].reshape(B, K, T, N // K, -1).swapaxes(1, 2).reshape(B, T, N, -1)
    return turn(out), turn(lse)[..., 0]


def _work(rules: Rules, T: int, table: Array, lengths: Array, page: int, per: int) -> tuple[list[Array], Array]:
    """(for each grid step: its row, its place among the row's steps, its pages; the rows' lengths), number of steps."""
    B, n = table.shape
    most = -(-n // per)
    end = jnp.clip(-(-lengths // (page * per)), 1, most)  # every row has a step, which writes its result
    begin = jnp.zeros_like(end)
    if rules.window is not None:
        begin = jnp.clip((lengths - T - rules.window) // (page * per), 0, end - 1)
    count = end - begin
    last = jnp.cumsum(count)
    step = jnp.arange(B * most, dtype=jnp.int32)
    batch = jnp.minimum(jnp.searchsorted(last, step, side="right"), B - 1).astype(jnp.int32)
    part = begin[batch] + jnp.minimum(step - (last - count)[batch], count[batch] - 1)
    column = part[:, None] * per + jnp.arange(per, dtype=jnp.int32)[None]
    used = jnp.clip(-(-lengths // page) - 1, 0, n - 1)[batch, None]
    pages = table[batch[:, None], jnp.minimum(column, used)]  # the last page again, where there are no more
    bounds = jnp.stack([begin, end], axis=1)
    flat = [batch, part, pages.reshape(-1), bounds.reshape(-1), lengths]
    return [a.astype(jnp.int32) for a in flat], last[-1]


def _kernel(rules: Rules, T: int, N: int, K: int, H: int, H2: int, page: int, per: int):
    group = N // K

    def kernel(batch_ref, part_ref, _, bounds, lengths, q_ref, *refs):
        keys, values, (out, lse, packed, m_ref, l_ref, acc_ref) = refs[:per], refs[per : 2 * per], refs[2 * per :]
        w = pl.program_id(0)
        batch, part = batch_ref[w], part_ref[w]
        length, rows = lengths[batch], packed.shape[0]

        @pl.when(part == bounds[2 * batch])
        def _():
            packed[...] = jnp.where(_own(packed.shape, T * group, H), jnp.concatenate([q_ref[0]] * K, axis=1), 0)
            m_ref[...] = jnp.full_like(m_ref, HIDDEN)
            l_ref[...] = jnp.zeros_like(l_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        first, oldest = part * (page * per), length - T  # key of the step, query of the row

        def step(masked: bool):
            end_to_end = lambda refs: jnp.concatenate([ref[0] for ref in refs], axis=0)
            s = shape2(rules, dot(packed[...], end_to_end(keys), (1, 1)), None, (), None)  # [rows, keys]
            v = end_to_end(values)
            if masked:
                at = first + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
                query = oldest + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) // group % T
                visible = at <= query
                if rules.window is not None:
                    visible &= at >= query - rules.window
                s = jnp.where(visible, s, HIDDEN)
                place = first + jax.lax.broadcasted_iota(jnp.int32, (v.shape[0], 1), 0)
                v = jnp.where(place < length, v, 0)  # places never written may hold anything
            m = m_ref[...]
            new = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
            e, shrink = jnp.exp2(s - new), jnp.exp2(m - new)
            if masked:
                e = jnp.where(new > HIDDEN / 2, e, 0.0)
            m_ref[...] = new
            l_ref[...] = shrink * l_ref[...] + jnp.sum(e, axis=1, keepdims=True)
            acc_ref[...] = shrink * acc_ref[...] + dot(e.astype(v.dtype), v, (1, 0))

        whole = first + page * per - 1 <= oldest
        if rules.window is not None:
            whole &= first >= length - 1 - rules.window
        pl.when(whole)(lambda: step(False))
        pl.when(~whole)(lambda: step(True))

        @pl.when(part == bounds[2 * batch + 1] - 1)
        def _():
            total = l_ref[...]
            seen = total > 0
            own = jnp.where(_own(acc_ref.shape, T * group, H2), acc_ref[...], 0.0)
            mixed = sum(own[:, head * H2 : (head + 1) * H2] for head in range(K))
            out[0] = jnp.where(seen, mixed / jnp.where(seen, total, 1.0), 0.0)
            log = m_ref[...] * (1 / LOG2E) + jnp.log(jnp.where(seen, total, 1.0))
            lse[0] = jnp.where(seen, log, -jnp.inf)

    return kernel


def _own(shape: tuple[int, int], rows: int, width: int) -> Array:
    """Whether a place [rows of all heads, widths of all heads] belongs to one head in both."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row // rows == column // width
