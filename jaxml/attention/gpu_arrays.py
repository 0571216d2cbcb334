"""How the arrays of a call reach kernels for GPUs: whole and as they are. A tile loads its own part of each.

What lies beyond the end of an array reads as 0; no array is lengthened or turned.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxml.attention import tiles
from jaxml.attention.fold import folded, folds
from jaxml.attention.masks import Grid, Mask, Tile
from jaxml.attention.tiles import HIDDEN, LOG2E, Inputs, Rules, keep, shape2
from jaxml.axes import Array, Bool, Float, Int, wide
from jaxml.kernels import divide, remainder
from jaxml.linear import vary, varying_axes


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a call a tile lies. Its places are [rows, columns], or `turned` [columns, rows]."""

    batch: Array
    head: Array
    row: Array  # the first of the tile
    column: Array
    rows: int
    columns: int
    turned: bool
    rows_end: bool  # whether rows may lie beyond the end
    columns_end: bool


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array for the kernel, and how a tile reads its own part."""

    array: Array
    load: Callable[[Any, Place], Array]  # (ref, place) → broadcasts to the tile


class Call:
    """A call's arrays as the kernels take them."""

    def __init__(self, rules: Rules, x: Inputs, others: Any = ()):
        self.rules, self.original, self.axes = rules, x, varying_axes(x, others)
        self.fold = folds(x)
        self.x = x = folded(x, self.fold) if self.fold else x
        self.B, self.T, self.N, self.H = x.query.shape
        self.S, self.K, self.H2 = x.key.shape[1], x.key.shape[2], x.value.shape[3]
        self.group, self.dtype, self.wide = self.N // self.K, x.query.dtype, wide(x.query.dtype)
        self.operands = self._operands()

    def output(self, *shape: int, dtype) -> jax.ShapeDtypeStruct:
        """What a kernel returns, differing between the devices of a `jax.shard_map` as its inputs do."""
        like = jax.typeof(vary(self.x.query, self.axes))
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=like.manual_axis_type)

    def _operands(self) -> list[Operand]:
        """What shapes logits and masks, in a fixed order."""
        out = []
        if self.x.mask is not None:
            self.x.mask.map(lambda role, a: out.append(self._operand(role, a)))
        if self.x.bias is not None:
            out.append(self._operand("both", self.x.bias))
        if self.rules.score_mod is not None:
            heads = self.N * (self.fold.group if self.fold else 1)
            out += [self._table(t) for t in tiles.tables(self.rules.score_mod, self.x.data, heads, self.B)]
        if self.rules.dropout_rate:
            bits = jax.lax.bitcast_convert_type(self.x.dropout_key, jnp.int32)
            out.append(Operand(bits, lambda ref, place: tuple(ref[n].astype(jnp.uint32) for n in (0, 1))))
        return out

    def read(self, refs, place: Place) -> tuple:
        """(mask with its fields, bias, tables, dropout key, tile), as the tile there sees them."""
        loaded = iter([o.load(ref, place) for o, ref in zip(self.operands, refs, strict=True)])
        mask = self.x.mask
        if mask is not None:
            mask = mask.map(lambda role, a: next(loaded))
        bias = next(loaded) if self.x.bias is not None else None
        tables = ()
        if self.rules.score_mod is not None:
            tables = tuple(next(loaded) for _ in range(tiles.num_tables(self.rules.score_mod)))
        key = next(loaded) if self.rules.dropout_rate else None
        row, column = self.rows_of(place), self.columns_of(place)
        head = place.head
        if self.fold:
            row, head = divide(row, self.fold.group), head * self.fold.group + remainder(row, self.fold.group)
        return mask, bias, tables, key, Tile(place.batch, head, row, column)

    def hide(self, s: Array, mask: Mask | None, tile: Tile, place: Place, hidden: float = HIDDEN) -> Array:
        """The tile's logits, `hidden` where nothing is seen: behind the mask, beyond the last key."""
        parts = [] if mask is None else [mask.visible(tile)]
        if self.S % place.columns:
            parts.append(self.columns_of(place) < self.S)
        seen = _all(parts, shape_of(place))
        return s if seen is None else jnp.where(seen, s, hidden)

    def weights(self, extra, place: Place, masked: bool, s: Array, norm: Array) -> tuple[Array, tuple]:
        """(weights of a tile, what `slopes` needs besides) from its products and the log₂-sum-exp of its rows."""
        mask, bias, tables, dropout_key, at = self.read(extra, place)
        logits = lambda s: shape2(self.rules, s, bias, tables, at)
        s, slope = jax.jvp(logits, (s,), (jnp.ones_like(s),)) if self.bent else (logits(s), None)
        if masked:
            s = self.hide(s, mask, at, place)
        kept = None
        if self.rules.dropout_rate:
            kept = jnp.broadcast_to(keep(self.rules, dropout_key, at), shape_of(place))
        return jnp.exp2(s - norm), (slope, kept)

    def slopes(self, e: Array, more: tuple, pull: Array, shift: Array | None) -> tuple[Array, Array]:
        """(weights that reach the output, gradient of the products / `missing`) from what pulls at the weights.

        `shift`: what pulls at all weights of a row together, None where `pull` is less by that.
        """
        (slope, kept), reached = more, e
        if kept is not None:
            pull, reached = pull * kept, e * kept
        ds = e * (pull if shift is None else pull - shift)
        return reached, ds if slope is None else ds * (slope * (1 / LOG2E))

    @property
    def bent(self) -> bool:
        """Whether a logit depends on its product otherwise than by a factor."""
        return self.rules.soft_cap is not None or self.rules.score_mod is not None

    @property
    def missing(self) -> float:
        """What sums of `slopes` lack: the factor of the products."""
        return 1.0 if self.bent else self.rules.scale

    def rows_of(self, place: Place) -> Int[Array, "..."]:
        """Index of each row, laid to broadcast to the tile."""
        shape = (1, place.rows) if place.turned else (place.rows, 1)
        return place.row + jax.lax.broadcasted_iota(jnp.int32, shape, 1 if place.turned else 0)

    def columns_of(self, place: Place) -> Int[Array, "..."]:
        shape = (place.columns, 1) if place.turned else (1, place.columns)
        return place.column + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if place.turned else 1)

    def _operand(self, role: str, a: Array) -> Operand:
        if role == "data":
            return Operand(a.reshape(1), lambda ref, place: ref[0])
        if role == "batch":
            one = a.shape[0] == 1
            return Operand(a, lambda ref, place: ref[0] if one else ref[place.batch])
        if role in ("row", "column"):
            a = a[:, None, :, None] if role == "row" else a[:, None, None, :]
        small = a.dtype == jnp.bool_
        b, n, t, s = a.shape

        def load(ref, place):
            first = jnp.int32(0)  # an index like any other, where numbers of Python are wider
            at, inside = [place.batch if b > 1 else first, place.head if n > 1 else first], []
            for size, start, count, end, length in (
                (t, place.row, place.rows, place.rows_end, self.T),
                (s, place.column, place.columns, place.columns_end, self.S),
            ):
                at.append(pl.ds(start, count) if size > 1 else pl.ds(first, 1))
                axis = len(at) - 3
                if size > 1 and end:
                    shape = (count, 1) if axis == 0 else (1, count)
                    inside.append(start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < length)
            shape = (place.rows if t > 1 else 1, place.columns if s > 1 else 1)
            out = load_where(ref.at[tuple(at)], inside, shape)
            out = out.T if place.turned else out
            return out.astype(jnp.int32) != 0 if small else out

        return Operand(a.astype(jnp.int8) if small else a, load)

    def _table(self, table: Float[Array, "b n"]) -> Operand:
        """A number for every batch row and head."""
        if self.fold:
            rows = table.reshape(table.shape[0], self.N, self.fold.group)[:, :, self.fold.head[0]]
            return self._operand("both", rows[:, :, :, None])
        one = table.shape[0] == 1
        return Operand(table, lambda ref, place: ref[0 if one else place.batch, place.head])


# ---- inside a kernel --------------------------------------------------------------------------------


def shape_of(place: Place) -> tuple[int, int]:
    return (place.columns, place.rows) if place.turned else (place.rows, place.columns)


def pieces(width: int) -> list[tuple[int, int, int]]:
    """(start, size, how much of it exists): a head dim as one or two powers of two, as little larger as they can be.

    Example:
        >>> pieces(128), pieces(192), pieces(72), pieces(112)
        ([(0, 128, 128)], [(0, 128, 128), (128, 64, 64)], [(0, 64, 64), (64, 16, 8)], [(0, 128, 112)])
    """
    power = lambda n: max(16, pl.next_power_of_2(n))
    first = power(width) if power(width) <= max(16, width) else power(width) // 2
    rest = power(width - first) if width > first else 0
    if first + rest >= power(width):
        return [(0, power(width), width)]
    return [(0, first, first), (first, rest, width - first)]


def load_heads(ref, batch, head, start, count: int, width: int, length: int | None) -> list[Float[Array, "count _"]]:
    """Rows of an array [B, T, N, H], in pieces of H; `length`: where they end, None where all exist."""
    out = []
    for at, size, exist in pieces(width):
        inside = [] if length is None else [start + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0) < length]
        inside += [] if exist == size else [jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) < exist]
        place = ref.at[batch, pl.ds(start, count), head, pl.ds(jnp.int32(at), size)]
        out.append(load_where(place, inside, (count, size)))
    return out


def store_heads(ref, at: tuple, parts: list[Array], start, width: int, length: int | None) -> None:
    """The inverse of `load_heads`; `at`: indices before and after the rows, as in (batch, head)."""
    batch, head = at
    for (first, size, exist), part in zip(pieces(width), parts):
        count = part.shape[0]
        inside = [] if length is None else [start + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0) < length]
        inside += [] if exist == size else [jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) < exist]
        place = ref.at[(*batch, pl.ds(start, count), head, pl.ds(jnp.int32(first), size))]
        plgpu.store(place, part.astype(ref.dtype), mask=_all(inside, (count, size)))


def load_rows(ref, batch, head, start, count: int, length: int | None, other: float = 0.0) -> Float[Array, "count"]:
    """A number for each row of an array [B, N, T]."""
    inside = None if length is None else start + jax.lax.broadcasted_iota(jnp.int32, (count,), 0) < length
    return plgpu.load(
        ref.at[batch, head, pl.ds(start, count)],
        mask=inside,
        other=None if inside is None else jnp.asarray(other, ref.dtype),
    )


def load_where(ref, inside: list[Array], shape: tuple[int, ...]) -> Array:
    mask = _all(inside, shape)
    return plgpu.load(ref, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def _all(inside: list[Array], shape: tuple[int, ...]) -> Array | None:
    mask = None
    for part in inside:
        part = jnp.broadcast_to(part, shape)
        mask = part if mask is None else mask & part
    return mask


# ---- which tiles are visited -------------------------------------------------------------------------


class Ranges:
    """For every block along one axis, which blocks along the other it needs: first those that need no mask.

    arrays: without a mask, how many blocks have no end in them: in memory, since compilers unroll a loop whose turns
        they can count. With one, bounds [b, blocks, 4]: blocks outside [first, last) are empty, those in [whole, again)
        need no mask. Of masks that may have empty blocks in between: how many need no mask and how many are needed
        [b, blocks, 2], and all in that order [b, blocks, others].
    """

    def __init__(self, call: Call, rows: int, columns: int, of_rows: bool):
        self.mask, p = call.x.mask, call
        length, size, other, step = (p.T, rows, p.S, columns) if of_rows else (p.S, columns, p.T, rows)
        self.blocks, self.others, self.full = -(-length // size), -(-other // step), other // step
        if self.mask is None:
            self.arrays = [jnp.full(1, self.full, jnp.int32)] if self.others > self.full else []
            return
        T = p.original.query.shape[1]
        some, every = p.original.mask.blocks(Grid(T, p.S, T if p.fold else rows, columns))
        b = max(some.shape[0], every.shape[0])
        some, every = jnp.any(some, axis=1), jnp.all(every, axis=1)
        shape = (b, -(-p.T // rows), -(-p.S // columns))
        some, every = jnp.broadcast_to(some, shape), jnp.broadcast_to(every, shape)
        if not of_rows:
            some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
        index = jnp.arange(self.others, dtype=jnp.int32)[None, None]
        every &= some & (index < self.full)
        self.shared = b == 1
        self.arrays = _order(some, every) if p.original.mask.scattered else [_bounds(some, every)]

    def of(self, refs, batch, i) -> "Needed":
        """What block i needs, of the kernel's references to `arrays`."""
        if self.mask is None:
            return Needed(refs[0][0] if refs else self.full, self.others, lambda n: n, lambda n: n)
        b = 0 if self.shared else batch
        if len(refs) == 2:
            nth = lambda n: refs[1][b, i, n]
            return Needed(refs[0][b, i, 0], refs[0][b, i, 1], nth, nth)
        first, whole, again, last = (refs[0][b, i, n] for n in range(4))
        free = again - whole
        return Needed(
            free, last - first, lambda n: n + whole, lambda n: n + jnp.where(n < again - first, first - free, first)
        )

    def visit(self, refs, batch, i, body: Callable, carry: Any, part: tuple | None = None) -> Any:
        """``carry = body(j, carry, masked)`` for the blocks j that block i needs; `part` (n, of): of those a share."""
        needed = self.of(refs, batch, i)
        loop = lambda low, high, masked, carry: jax.lax.fori_loop(
            low, high, lambda n, carry: body((needed.crossed if masked else needed.whole)(n), carry, masked), carry
        )
        if part is None:
            carry = loop(0, needed.free, False, carry)
            return loop(needed.free, needed.all, True, carry) if refs else carry
        low, high = (divide(jnp.asarray(needed.all, jnp.int32) * n, part[1]) for n in (part[0], part[0] + 1))
        carry = loop(low, jnp.minimum(high, needed.free), False, carry)
        return loop(jnp.maximum(low, needed.free), high, True, carry)


@dataclasses.dataclass(frozen=True)
class Needed:
    """The blocks that a block needs, in the order in which they are visited."""

    free: Array | int  # how many of them, the first, need no mask
    all: Array | int  # how many there are
    whole: Callable[[Array], Array]  # n → the n-th, if it needs none
    crossed: Callable[[Array], Array]  # n → the n-th, if it needs one

    def at(self, n: Array) -> Array:
        return jnp.where(n < self.free, self.whole(n), self.crossed(n))


def _bounds(some: Bool[Array, "b n m"], every: Bool[Array, "b n m"]) -> Int[Array, "b n 4"]:
    index, end = jnp.arange(some.shape[2], dtype=jnp.int32)[None, None], some.shape[2]
    lowest = lambda a: jnp.min(jnp.where(a, index, end), axis=2)
    last = jnp.max(jnp.where(some, index + 1, 0), axis=2)
    first = jnp.minimum(lowest(some), last)
    whole = jnp.minimum(lowest(every), last)
    again = jnp.minimum(lowest((index >= whole[..., None]) & ~every), last)
    return jnp.stack([first, whole, again, last], axis=2).astype(jnp.int32)


def _order(some: Bool[Array, "b n m"], every: Bool[Array, "b n m"]) -> list[Array]:
    order = jnp.argsort(2 - some.astype(jnp.int32) - every, axis=2, stable=True)
    counts = jnp.stack([jnp.sum(a, axis=2) for a in (every, some)], axis=2)
    return [counts.astype(jnp.int32), order.astype(jnp.int32)]
