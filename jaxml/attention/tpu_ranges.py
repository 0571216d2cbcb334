"""Which chunks of keys each block of queries sees: a few numbers that a TPU kernel reads before its arrays arrive."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxml.attention.masks import Grid
from jaxml.attention.tpu_arrays import Layout, divide
from jaxml.axes import Array

MOST_WORDS = 2**17  # of 32 bits, in scalar memory


class Ranges:
    """The numbers of a call, their arrays, and the loops that follow them.

    bounds: [b, rows, 4], flat: chunks of keys outside [first, last) are empty, those in [whole, again) whole.
    holes: [b, rows · fine, words], flat: a bit for every chunk of keys, set where it is not empty; for every chunk of
    queries, or for blocks of them where that were too many numbers.
    """

    def __init__(self, p: Layout):
        self.p = p
        self.resident, self.rows, self.parts = p.cut.resident, p.cut.rows, p.cut.parts
        self.words = -(-self.resident * self.parts // 32)
        zeros = jnp.zeros(2, jnp.int32)  # numbers that only memory knows
        self.mask = p.ended(p.original.mask)
        self.fine = 1
        self.arrays = [zeros] if self.mask is None else [zeros, *self._make()]
        self.shared = self.mask is None or self.arrays[1].shape[0] == self.rows * 4  # by all batch rows

    def _make(self) -> tuple[Array, Array]:
        p, c = self.p, self.p.cut
        C, true_C = c.resident * c.parts, -(-p.true_S // c.keys)
        T = p.original.query.shape[1]
        some, every = self.mask.blocks(Grid(T, p.true_S, T if p.fold else c.columns, c.keys))
        b, chunks = max(some.shape[0], every.shape[0]), c.rows * c.chunks
        some, every = jnp.any(some, axis=1), jnp.all(every, axis=1)

        def spread(a, beyond: bool):
            """[b, chunks of queries, chunks of keys]; `beyond`: what queries beyond the end count as."""
            R = 1 if p.fold else -(-p.true_T // c.columns)
            a = jnp.broadcast_to(a, (b, chunks if p.fold else R, true_C))
            a = jnp.pad(a, ((0, 0), (0, chunks - a.shape[1]), (0, 0)), constant_values=beyond)
            return jnp.pad(a, ((0, 0), (0, 0), (0, C - true_C)))

        some, every = (spread(a, beyond) for a, beyond in ((some, False), (every, True)))
        each, self.fine = some, c.chunks
        some = jnp.any(some.reshape(b, c.rows, c.chunks, C), axis=2)
        every = jnp.all(every.reshape(b, c.rows, c.chunks, C), axis=2)
        if b * chunks * self.words > MOST_WORDS:
            each, self.fine = some, 1
        index = jnp.arange(C, dtype=jnp.int32)[None, None]
        every &= some & ((index + 1) * c.keys <= p.true_S)
        lowest = lambda a: jnp.min(jnp.where(a, index, C), axis=2)
        first, last = lowest(some), jnp.max(jnp.where(some, index + 1, 0), axis=2)
        whole = jnp.minimum(lowest(every), last)
        again = jnp.minimum(lowest((index >= whole[..., None]) & ~every), jnp.maximum(last, whole))
        bounds = jnp.stack([jnp.minimum(first, last), whole, again, last], axis=2)
        bits = jnp.pad(each, ((0, 0), (0, 0), (0, self.words * 32 - C))).reshape(b, c.rows * self.fine, self.words, 32)
        bits = jnp.sum(bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[None, None, None], axis=3)
        holes = jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.int32)
        return bounds.astype(jnp.int32).reshape(-1), holes.reshape(-1)

    def _bound(self, refs, batch, i, n: int):
        return refs[1][((0 if self.shared else batch) * self.rows + i) * 4 + n]

    def _seen(self, refs, batch, i, chunk, j):
        """Whether a chunk of queries of block i sees anything of the chunk of keys j of the call."""
        row = (0 if self.shared else batch) * self.rows + i
        row = row * self.fine + chunk if self.fine > 1 else row
        return (refs[2][row * self.words + (j >> 5)] >> (j & 31)) & 1 == 1

    def held(self, refs, batch, i, part):
        """The part of the keys to hold in its place: never one that this block of queries does not see."""
        if self.mask is None or self.parts == 1:
            return part
        first, last = (self._bound(refs, batch, i, n) for n in (0, 3))
        return jnp.clip(part, divide(first, self.resident), divide(jnp.maximum(last - 1, 0), self.resident))

    def visit(self, refs, batch, i, part, whole: Callable, crossed: Callable) -> None:
        """What the block of queries i sees of the resident keys, chunks of keys counted within them.

        ``whole(first, last)`` for those that all its queries see whole, ``crossed(j, chunk)`` for the other tiles.
        """
        if self.mask is None:
            return whole(0, self.resident)
        start = part * self.resident
        within = lambda n: jnp.clip(self._bound(refs, batch, i, n) - start, 0, self.resident)
        first, full, again, last = map(within, range(4))

        @pl.when(again > full)
        def _():
            whole(full, again)

        def tiles_of(n, carry):
            j = jnp.where(first + n < full, first + n, again + n - (full - first))

            def tile(chunk, carry):
                @pl.when(self._seen(refs, batch, i, chunk, start + j))
                def _():
                    crossed(j, chunk)

                return carry

            return jax.lax.fori_loop(0, self.p.cut.chunks, tile, carry)

        jax.lax.fori_loop(0, full - first + last - again, tiles_of, None)
