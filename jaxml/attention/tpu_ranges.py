"""Which chunks of keys each block of queries sees: a few numbers that a TPU kernel reads before its arrays arrive."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxml.attention.masks import Grid
from jaxml.attention.tpu_arrays import Layout
from jaxml.axes import Array
from jaxml.kernels import divide

MOST_WORDS = 2**17  # of 32 bits, in scalar memory


class Ranges:
    """The numbers of a call, their arrays, and the loops that follow them.

    bounds: [b, rows, 4], flat: chunks of keys outside [first, last) are empty, those in [whole, again) whole.
    bits: [2, b, rows · fine, words], flat: two for every chunk of keys, set where it is not empty and where it is not
    whole; for every chunk of queries, or for blocks of them where that were too many numbers.
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
        each, self.fine = (some, every), c.chunks
        some = jnp.any(some.reshape(b, c.rows, c.chunks, C), axis=2)
        every = jnp.all(every.reshape(b, c.rows, c.chunks, C), axis=2)
        if 2 * b * chunks * self.words > MOST_WORDS:
            each, self.fine = (some, every), 1
        index = jnp.arange(C, dtype=jnp.int32)[None, None]
        inside = (index + 1) * c.keys <= p.true_S
        every &= some & inside
        lowest = lambda a: jnp.min(jnp.where(a, index, C), axis=2)
        first, last = lowest(some), jnp.max(jnp.where(some, index + 1, 0), axis=2)
        whole = jnp.minimum(lowest(every), last)
        again = jnp.minimum(lowest((index >= whole[..., None]) & ~every), jnp.maximum(last, whole))
        bounds = jnp.stack([jnp.minimum(first, last), whole, again, last], axis=2)
        bits = jnp.stack([each[0], ~(each[1] & inside)])
        self.plane = b * c.rows * self.fine * self.words
        bits = jnp.pad(bits, ((0, 0), (0, 0), (0, 0), (0, self.words * 32 - C))).reshape(self.plane * 2, 32)
        bits = jnp.sum(bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[None], axis=1)
        bits = jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.int32)
        return bounds.astype(jnp.int32).reshape(-1), bits

    def _bound(self, refs, batch, i, n: int):
        return refs[1][((0 if self.shared else batch) * self.rows + i) * 4 + n]

    def _bit(self, refs, batch, i, chunk, j, plane: int):
        """Whether a chunk of queries of block i sees (plane 0), or does not see whole (1), the chunk of keys j."""
        row = (0 if self.shared else batch) * self.rows + i
        row = row * self.fine + chunk if self.fine > 1 else row
        return (refs[2][plane * self.plane + row * self.words + (j >> 5)] >> (j & 31)) & 1 == 1

    def held(self, refs, batch, i, part):
        """The part of the keys to hold in its place: never one that this block of queries does not see."""
        if self.mask is None or self.parts == 1:
            return part
        first, last = (self._bound(refs, batch, i, n) for n in (0, 3))
        return jnp.clip(part, divide(first, self.resident), divide(jnp.maximum(last - 1, 0), self.resident))

    def visit(self, refs, batch, i, part, ahead: Callable, finish: Callable, together: int = 1):
        """What the block of queries i sees of the resident keys, tile by tile, each in two halves.

        ``ahead(j, chunk, masked, buffer)``, then, once the next tile's first half is in another buffer,
        ``finish(j, chunk, buffer)``; so the matrix unit works on one tile while the vector unit does on another. Chunks
        of keys j are counted within the resident ones. Those that all queries see whole go through a loop of their own,
        without the mask, `together` (1 or 2) of them in a turn.
        """
        whole = functools.partial(self._whole, ahead, finish, together)
        if self.mask is None:
            return whole(0, self.resident)
        start = part * self.resident
        within = lambda n: jnp.clip(self._bound(refs, batch, i, n) - start, 0, self.resident)
        first, full, again, last = map(within, range(4))

        @pl.when(again > full)
        def _():
            whole(full, again)

        chunks = self.p.cut.chunks
        total = (full - first + last - again) * chunks

        def tile(n):
            """(chunk of keys, chunk of queries) of the n-th tile, of the last one beyond the end."""
            n = jnp.maximum(jnp.minimum(n, total - 1), 0)
            row = divide(n, chunks)
            j = jnp.where(first + row < full, first + row, again + row - (full - first))
            return jnp.minimum(j, self.resident - 1), n - row * chunks

        def following(n):
            """The first tile from the n-th on that is not empty."""

            def empty(n):
                j, chunk = tile(n)
                return (n < total) & ~self._bit(refs, batch, i, chunk, start + j, 0)

            return jax.lax.while_loop(empty, lambda n: n + 1, n)

        def crossed(n):
            j, chunk = tile(n)
            return self._bit(refs, batch, i, chunk, start + j, 1)

        def turn(one):
            """Two tiles in one stretch of code, masked unless both that it begins are whole."""
            other = following(one + 1)
            after = following(other + 1)
            masks = crossed(other) | crossed(after)
            for masked in (False, True):

                @pl.when((other < total) & (masks == masked))
                def _(masked=masked):
                    ahead(*tile(other), masked, 1)
                    finish(*tile(one), 0)
                    ahead(*tile(after), masked, 0)
                    finish(*tile(other), 1)

            @pl.when(other >= total)
            def _():
                finish(*tile(one), 0)

            return after

        begin = following(jnp.int32(0))

        @pl.when(begin < total)
        def _():
            ahead(*tile(begin), True, 0)
            jax.lax.while_loop(lambda n: n < total, turn, begin)

    def _whole(self, ahead: Callable, finish: Callable, together: int, first, last) -> None:
        """All chunks of queries against the chunks of keys first … last − 1."""
        chunks = self.p.cut.chunks

        def step(j):
            for chunk in range(chunks):
                if chunk + 1 < chunks:
                    ahead(j, chunk + 1, False, chunk + 1)
                elif chunks > 1:
                    ahead(jnp.minimum(j + 1, last - 1), 0, False, 0)
                finish(j, chunk, chunk)
            if chunks == 1:
                ahead(jnp.minimum(j + 1, last - 1), 0, False, 0)

        def turn(n, carry):
            for more in range(together):
                step(first + n * together + more)
            return carry

        ahead(first, 0, False, 0)
        count = last - first
        turns = count // together if isinstance(count, int) else divide(count, together)
        jax.lax.fori_loop(0, turns, turn, None)
        left = count - turns * together if together > 1 else 0  # 0 or 1
        if not isinstance(left, int):
            pl.when(left == 1)(lambda: step(last - 1))
        elif left:
            step(last - 1)
