"""How the arrays of a call are laid out for the TPU kernels, and which parts of them a grid step needs.

The kernels work on transposed tiles, [keys, queries]: the softmax then reduces along sublanes, which is a handful of
vector operations, and the weights of the softmax enter the matrix unit as its stationary operand, which fills it
where the head dim alone would not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxml.attention import blocks, masks, tiles
from jaxml.attention.fold import folded, folds
from jaxml.attention.masks import Mask, Tile
from jaxml.attention.tiles import Inputs, Rules
from jaxml.axes import Array, wide
from jaxml.linear import vary, varying_axes


@dataclasses.dataclass(frozen=True)
class Cut:
    """How queries and keys are cut."""

    heads: int  # query heads of a grid step
    columns: int  # queries of a chunk
    chunks: int  # chunks of a block of queries
    rows: int  # blocks of queries
    keys: int  # keys of a chunk
    resident: int  # chunks of keys that lie in VMEM at once
    parts: int  # times that the resident keys change

    @property
    def block(self) -> int:
        return self.columns * self.chunks

    @property
    def T(self) -> int:
        return self.block * self.rows

    @property
    def S(self) -> int:
        return self.keys * self.resident * self.parts


def cut(
    B: int, N: int, K: int, T: int, S: int, H: int, H2: int, itemsize: int, dense: int, backward: bool = False
) -> Cut:
    """The blocks for these shapes on the device that runs; `dense`: bytes of [T, S]-shaped operands a place."""
    limits = blocks.limits()
    columns, chunks_all = blocks.cut_evenly(T, min(limits.chunk, max(-(-T // 2), blocks.LANES)))
    most = max(1, (limits.rows_backward if backward else limits.rows) // columns)
    if dense:
        most = min(most, 2)
    chunks = min(chunks_all, most)
    if chunks_all % chunks and chunks > 1:
        chunks = min(range(2, chunks + 1), key=lambda n: (-(-chunks_all // n) * n, -n))
    rows = -(-chunks_all // chunks)
    keys, keys_all = blocks.cut_evenly(S, limits.chunk)
    padded = lambda n: -(-n // blocks.LANES) * blocks.LANES
    block, widths = columns * chunks, padded(H) + padded(H2)
    a_query = 2 * itemsize * widths + 4 * padded(H2) + 4 * 24
    a_key = 2 * itemsize * widths + 64 + 2 * dense * block
    buffers = 4 * chunks * keys * columns
    if backward:
        a_query += 2 * itemsize * padded(H) + 4 * 32
        a_key += (4 + 2 * itemsize) * widths
        buffers *= 3
    fixed = block * a_query + buffers
    room = max(1, int((limits.vmem - fixed) // (a_key * keys)))
    fewest = -(-keys_all // room)
    parts = next((n for n in range(fewest, 2 * fewest) if keys_all % n == 0), fewest)  # evenly: no copy to lengthen
    resident = -(-keys_all // parts)
    heads = 1
    if parts == 1 and rows == 1:  # short sequences: several heads a grid step
        group = N // K
        work = (2**20 if backward else 2**21) // (block * keys_all * keys)
        whole_groups = lambda n: n % group == 0 or (group % n == 0 and not backward)
        options = [n for n in range(1, N + 1) if N % n == 0 and whole_groups(n)]
        fits = lambda n: n * fixed + max(1, n // group) * a_key * keys * keys_all <= limits.vmem
        heads = max([n for n in options if n <= max(1, work) and fits(n)], default=1)
    return Cut(heads, columns, chunks, rows, keys, resident, parts)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a call a tile lies: indices within the grid step, for loading, and within the call, for masks."""

    batch: Array
    head: Array  # of the call
    local: Array  # among the heads of the grid step
    row: Array  # first query of the block, in the call
    part: Array  # first key of the resident keys, in the call
    chunk: Array | int  # which chunk of queries in the block
    key: Array  # which chunk of keys among the resident ones


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array for the kernel, the part of it that a grid step needs, and how a tile reads its own part."""

    array: Array
    spec: pl.BlockSpec
    load: Callable[[Any, Place], Array]  # (ref, place) → broadcasts to [keys, columns]


class Layout:
    """A call's arrays as the kernels take them."""

    def __init__(self, rules: Rules, x: Inputs, others: Any = (), backward: bool = False):
        if x.query.dtype == jnp.float16:  # TPUs compute with float32 and bfloat16
            x = x._replace(**{name: getattr(x, name).astype(jnp.float32) for name in ("query", "key", "value")})
        self.rules, self.original, self.axes = rules, x, varying_axes(x, others)
        self.fold = fold = folds(x)
        if fold:
            x = folded(x, fold)
        B, self.N, self.true_T, H = x.query.shape[0], x.query.shape[2], x.query.shape[1], x.query.shape[3]
        self.B, self.K, self.true_S, self.H2 = B, x.key.shape[2], x.key.shape[1], x.value.shape[3]
        self.group = self.N // self.K
        self.dtype = x.query.dtype
        self.wide = wide(x.query.dtype)
        both = [] if x.bias is None else [x.bias]
        if x.mask is not None:
            x.mask.map(lambda role, a: both.append(a) if role == "both" else None)
        dense = sum(4 if a.dtype == jnp.bool_ else a.dtype.itemsize for a in both if 1 not in a.shape[2:])
        self.H, self.width2 = H, _width(self.H2)
        self.cut = cut(B, self.N, self.K, self.true_T, self.true_S, H, self.H2, self.dtype.itemsize, dense, backward)
        self.x = x

    # ---- arrays ---------------------------------------------------------------------------------------

    def output(self, *shape: int, dtype=None) -> jax.ShapeDtypeStruct:
        """What a kernel returns, differing between the devices of a `jax.shard_map` as its inputs do."""
        like = jax.typeof(vary(self.x.query, self.axes))
        return jax.ShapeDtypeStruct(shape, dtype or self.dtype, manual_axis_type=like.manual_axis_type)

    def store(self, a: Array, length: int) -> Array:
        """[B, T, N, H] → [B, N, T′, H′], as the kernels take it; zeros in the new places."""
        return _lengthen(a.swapaxes(1, 2), {2: length, 3: _width(a.shape[3])})

    def spec(self, heads: int, block: int, width: int, at: Callable) -> pl.BlockSpec:
        """The block of some heads; `at(*grid)` → (batch, block of heads, block along the sequence)."""
        return pl.BlockSpec((1, heads, block, _width(width)), lambda *grid: (*at(*grid), 0))

    def keys_of(self, j):
        """The places of a chunk of keys among the resident ones."""
        return pl.ds(pl.multiple_of(j * self.cut.keys, blocks.LANES), self.cut.keys)

    def columns_of(self, chunk):
        """The places of a chunk of queries in its block."""
        start = chunk * self.cut.columns
        start = start if isinstance(start, int) else pl.multiple_of(start, blocks.LANES)
        return pl.ds(start, self.cut.columns)

    def rows(self, a: Array, fill=0.0) -> Array:
        """[B, N, T] → [B, N, 1, T′]."""
        more = self.cut.T - a.shape[2]
        return jnp.pad(a, ((0, 0), (0, 0), (0, more)), constant_values=fill)[:, :, None]

    # ---- operands of a tile ---------------------------------------------------------------------------

    def mask(self) -> Mask | None:
        """The call's mask, and the end of the keys where they were lengthened."""
        return self.ended(self.x.mask)

    def ended(self, mask: Mask | None) -> Mask | None:
        if self.true_S < self.cut.S:
            end = masks.Lengths(kv_lengths=jnp.full((1,), self.true_S, jnp.int32))
            mask = end if mask is None else mask & end
        return mask

    def operands(self, at: Callable) -> list[Operand]:
        """The arrays that shape logits and masks, in a fixed order; `at(b, h, i, s, …)` → the block of each axis."""
        out = []
        mask = self.mask()
        if mask is not None:
            mask.map(lambda role, a: out.append(self._operand(role, a, at)))
        if self.x.bias is not None:
            out.append(self._operand("both", self.x.bias, at))
        if self.rules.score_mod is not None:
            for table in tiles.tables(self.rules.score_mod, self.x.data, self._true_heads(), self.B):
                out.append(self._table(table, at))
        if self.rules.dropout_rate:
            bits = jax.lax.bitcast_convert_type(self.x.dropout_key, jnp.int32)
            load = lambda ref, place: tuple(ref[n].astype(jnp.uint32) for n in (0, 1))
            out.append(Operand(bits, pl.BlockSpec(memory_space=pltpu.SMEM), load))
        if self.fold:
            out.append(self._operand("row", self.fold.index, at))
            if self._needs_heads():
                out.append(self._operand("row", self.fold.head, at))
        return out

    def rebuild(self, refs, operands: list[Operand]) -> Callable[[Place], tuple]:
        """place → (mask with its fields, bias, tables, dropout key, tile), as the tile there sees them."""

        def read(place):
            loaded = iter([o.load(ref, place) for o, ref in zip(operands, refs, strict=True)])
            mask = self.mask()
            if mask is not None:
                mask = mask.map(lambda role, a: next(loaded))
            bias = next(loaded) if self.x.bias is not None else None
            tables = ()
            if self.rules.score_mod is not None:
                tables = tuple(next(loaded) for _ in range(tiles.num_tables(self.rules.score_mod)))
            key = next(loaded) if self.rules.dropout_rate else None
            row = place.row + place.chunk * self.cut.columns + _iota((1, self.cut.columns), 1)
            head = place.head
            if self.fold:
                row = next(loaded)
                if self._needs_heads():
                    head = place.head * self.fold.group + next(loaded)
            column = place.part + place.key * self.cut.keys + _iota((self.cut.keys, self.cut.columns), 0)
            return mask, bias, tables, key, Tile(place.batch, head, row, column)

        return read

    def _needs_heads(self) -> bool:
        return bool(self.rules.dropout_rate) or self.x.mask is not None

    def _true_heads(self) -> int:
        return self.N * (self.fold.group if self.fold else 1)

    def _operand(self, role: str, a: Array, at: Callable) -> Operand:
        c = self.cut
        if role == "data":
            a = a.reshape(1)
            return Operand(a, pl.BlockSpec(memory_space=pltpu.SMEM), lambda ref, place: ref[0])
        if role == "batch":
            one = a.shape[0] == 1
            spec = pl.BlockSpec(memory_space=pltpu.SMEM)
            return Operand(a, spec, lambda ref, place: ref[0] if one else ref[place.batch])
        if role in ("row", "column"):
            a = a[:, None, :, None] if role == "row" else a[:, None, None, :]
        small = a.dtype == jnp.bool_
        a = jnp.moveaxis(a.astype(jnp.int8) if small else a, 2, 3)  # [b, n, s, t]
        b, n, s, t = a.shape
        heads = c.heads if n > 1 else 1
        turn = t == 1 and s > 1  # along keys alone: a row in memory, turned where it is used
        if turn:
            a = jnp.swapaxes(a, 2, 3)
        sizes = {2: (c.S if s > 1 else 1), 3: (c.T if t > 1 else 1)}
        if turn:
            sizes = {2: 1, 3: c.S}
        a = _lengthen(a, sizes, mode="edge" if role in ("row", "column") else "constant")
        per = c.keys * c.resident
        shape = (1, heads, 1, per) if turn else (1, heads, per if s > 1 else 1, c.block if t > 1 else 1)

        def index(*grid):
            batch, head, i, part = at(*grid)
            key = part if s > 1 else 0
            place = (0, key) if turn else (key, i if t > 1 else 0)
            return (batch if b > 1 else 0, head if n > 1 else 0, *place)

        def load(ref, place):
            h = place.local if n > 1 else 0
            lanes = self.columns_of(place.chunk) if t > 1 else slice(None)
            down = self.keys_of(place.key)
            if turn:
                return _turned(ref[0, h, :, down], c.keys)
            out = ref[0, h, down if s > 1 else slice(None), lanes]
            return out.astype(jnp.int32) != 0 if small else out

        return Operand(a, pl.BlockSpec(shape, index), load)

    def _table(self, table: Array, at: Callable) -> Operand:
        """A number for every batch row and head, [b, n]."""
        if self.fold:
            rows = table.reshape(table.shape[0], self.N, self.fold.group)[:, :, self.fold.head[0]]
            return self._operand("both", rows[:, :, :, None], at)
        b, n = table.shape
        table = table.reshape(-1)
        at_place = lambda place: (place.batch if b > 1 else 0) * n + place.head
        return Operand(table, pl.BlockSpec(memory_space=pltpu.SMEM), lambda ref, place: ref[at_place(place)])


# ---- inside a kernel --------------------------------------------------------------------------------


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """a · b contracted over those axes, in float32 or wider; exact products for float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=wide(a.dtype)
    )


def _turned(row: Array, n: int) -> Array:
    """[1, n] along lanes → [n, 1] along sublanes."""
    wide_enough = row.astype(jnp.int32 if jnp.issubdtype(row.dtype, jnp.integer) else wide(row.dtype))
    return jnp.broadcast_to(wide_enough, (blocks.LANES, n)).T[:, :1].astype(row.dtype)


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _lengthen(a: Array, sizes: dict[int, int], mode: str = "constant") -> Array:
    widths = [(0, sizes.get(axis, n) - n) for axis, n in enumerate(a.shape)]
    return jnp.pad(a, widths, mode=mode) if any(w for _, w in widths) else a


def _width(n: int) -> int:
    """Head dims are lengthened to what the matrix unit takes in one piece."""
    return -(-n // 64) * 64
