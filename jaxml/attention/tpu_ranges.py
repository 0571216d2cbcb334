"""Which chunks of keys each block of queries sees: a few numbers that a TPU kernel reads before its arrays arrive."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxml.attention.masks import Grid
from jaxml.attention.tpu_arrays import Layout, divide
from jaxml.axes import Array


class Ranges:
    """The numbers of a call, their arrays, and the loops that follow them.

    bounds: [b, rows, 4], flat: chunks outside [first, last) are empty, those in [whole, again) whole.
    holes: [b, rows, words], flat: a bit for every chunk, set where it is not empty.
    """

    def __init__(self, p: Layout):
        self.p = p
        self.resident, self.rows, self.parts = p.cut.resident, p.cut.rows, p.cut.parts
        self.words = -(-self.resident * self.parts // 32)
        zeros = jnp.zeros(2, jnp.int32)  # numbers that only memory knows
        self.mask = p.ended(p.original.mask)
        self.arrays = [zeros] if self.mask is None else [zeros, *self._make()]
        self.shared = self.mask is None or self.arrays[1].shape[0] == self.rows * 4  # by all batch rows

    def _make(self) -> tuple[Array, Array]:
        p, c = self.p, self.p.cut
        C, true_C = c.resident * c.parts, -(-p.true_S // c.keys)
        T = p.original.query.shape[1]
        some, every = self.mask.blocks(Grid(T, p.true_S, T if p.fold else c.block, c.keys))
        b = max(some.shape[0], every.shape[0])
        some, every = jnp.any(some, axis=1), jnp.all(every, axis=1)
        spread = lambda a: jnp.broadcast_to(a, (b, c.rows, true_C))
        some, every = (jnp.pad(spread(a), ((0, 0), (0, 0), (0, C - true_C))) for a in (some, every))
        index = jnp.arange(C, dtype=jnp.int32)[None, None]
        every &= some & ((index + 1) * c.keys <= p.true_S)
        lowest = lambda a: jnp.min(jnp.where(a, index, C), axis=2)
        first, last = lowest(some), jnp.max(jnp.where(some, index + 1, 0), axis=2)
        whole = jnp.minimum(lowest(every), last)
        again = jnp.minimum(lowest((index >= whole[..., None]) & ~every), jnp.maximum(last, whole))
        bounds = jnp.stack([jnp.minimum(first, last), whole, again, last], axis=2)
        bits = jnp.pad(some, ((0, 0), (0, 0), (0, self.words * 32 - C))).reshape(b, c.rows, self.words, 32)
        bits = jnp.sum(bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[None, None, None], axis=3)
        holes = jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.int32)
        return bounds.astype(jnp.int32).reshape(-1), holes.reshape(-1)

    def _bound(self, refs, batch, i, n: int):
        return refs[1][((0 if self.shared else batch) * self.rows + i) * 4 + n]

    def _seen(self, refs, batch, i, j):
        """Whether the block of queries i sees anything of the chunk of keys j of the call."""
        word = refs[2][((0 if self.shared else batch) * self.rows + i) * self.words + (j >> 5)]
        return (word >> (j & 31)) & 1 == 1

    def held(self, refs, batch, i, part):
        """The part of the keys to hold in its place: never one that this block of queries does not see."""
        if self.mask is None or self.parts == 1:
            return part
        first, last = (self._bound(refs, batch, i, n) for n in (0, 3))
        return jnp.clip(part, divide(first, self.resident), divide(jnp.maximum(last - 1, 0), self.resident))

    def visit(self, refs, batch, i, part, run: Callable) -> None:
        """``run(first, last, masked)`` over the chunks of the resident keys that the block of queries i sees."""
        if self.mask is None:
            return run(0, self.resident, False)
        start = part * self.resident
        within = lambda n: jnp.clip(self._bound(refs, batch, i, n) - start, 0, self.resident)
        first, whole, again, last = map(within, range(4))

        @pl.when(again > whole)
        def _():
            run(whole, again, False)

        def crossed(n, carry):
            j = jnp.where(first + n < whole, first + n, again + n - (whole - first))

            @pl.when(self._seen(refs, batch, i, start + j))
            def _():
                run(j, j + 1, True)

            return carry

        jax.lax.fori_loop(0, whole - first + last - again, crossed, None)
