"""Which keys a query may see, as small values that are combined with ``&``, ``|`` and ``~``.

A mask never makes a [T, S] array of its own. It answers two questions: which places of one tile are visible
(`visible`), and for every tile of a grid whether any place is, and whether all are (`blocks`), from the
smallest and largest position or segment in each block. So empty tiles are skipped and full ones need no mask,
for traced masks as well. Masks are pytrees; they pass through `jit`, `vmap` and `scan`.

    Causal() & Window(left=1023)              a sliding window
    Causal() | Prefix(lengths)                a prefix that sees itself in both directions
    Segments(ids) & ~Fn(lambda b, h, q, k: (q - k) % 2 == 1)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Bool, Int


class Tile(NamedTuple):
    """Indices of the places of a tile; each broadcasts to [B, N, rows, columns].

    Example:
        >>> tile = tile_at(1, 1, B=1, N=1, grid=Grid(T=4, S=4, rows=2, columns=2))
        >>> Causal().visible(tile)[0, 0].astype(int).tolist()
        [[1, 0], [1, 1]]
    """

    batch: Int[Array, "B 1 1 1"]
    head: Int[Array, "1 N 1 1"]
    row: Int[Array, "1 1 rows 1"]
    column: Int[Array, "1 1 1 columns"]


class Grid(NamedTuple):
    """How T × S is cut into tiles.

    Example:
        >>> some, every = Causal().blocks(Grid(T=4, S=4, rows=2, columns=2))
        >>> some[0, 0].astype(int).tolist(), every[0, 0].astype(int).tolist()
        ([[1, 0], [1, 1]], [[0, 0], [1, 0]])
    """

    T: int
    S: int
    rows: int
    columns: int


class Mask:
    """What all masks can do. `_roles` says along which axes each field of data lies.

    "row" [b, T], "column" [b, S], "both" [b, n, t, s], "batch" [B], or "data": what a function is given.

    Example:
        >>> shown = lambda mask: whole(mask, 1, 1, 4, 4)[0, 0].astype(int).tolist()
        >>> shown(Causal() & Window(left=1))
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
        >>> shown(~Causal())
        [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    """

    _roles: ClassVar[dict[str, str]] = {}
    scattered: ClassVar[bool] = False  # whether empty tiles may lie between others

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)

    def visible(self, tile: Tile) -> Bool[Array, "b n rows columns"]:
        """Whether each place is visible; the fields broadcast to the tile's indices (cutting has laid them so)."""
        raise NotImplementedError

    def blocks(self, grid: Grid) -> tuple[Bool[Array, "b n R C"], Bool[Array, "b n R C"]]:
        """(may any place of the tile be visible, are all of them surely) for every tile of the grid."""
        raise NotImplementedError

    def map(self, function: Callable[[str, Array], Any]) -> "Mask":
        """The same mask with ``function(role, x)`` in place of every array of data that it holds."""
        given = {k: getattr(self, k) for k in self._roles if getattr(self, k) is not None}
        each = lambda k, x: jax.tree.map(lambda a: function(self._roles[k], a), x)
        return dataclasses.replace(self, **{k: each(k, x) for k, x in given.items()})

    def pad(self, grid: Grid) -> "Mask":
        """Fields lengthened to whole blocks."""
        return self.map(lambda role, x: pad(role, x, grid))

    def cut(self, i: Array, j: Array, grid: Grid) -> "Mask":
        """Fields of the tile in block row i and block column j, laid to broadcast; the mask has been padded."""
        return self.map(lambda role, x: lay(role, cut(role, x, i, j, grid)))

    def check(self, B: int, T: int, S: int, N: int) -> None:
        """Raises ValueError where a field does not fit queries [B, T] and keys [B, S]."""
        wanted = {"row": (T,), "column": (S,)}
        for name, role in self._roles.items():
            x = getattr(self, name)
            if x is None or role == "data":
                continue
            if role == "batch":
                if x.shape != (B,):
                    raise ValueError(f"mask: {name} has the shape [B] = {(B,)}, got {x.shape}.")
            elif role == "both":
                if x.ndim != 4 or any(n not in (1, full) for n, full in zip(x.shape, (B, N, T, S))):
                    raise ValueError(f"mask: an array broadcasts to [B, N, T, S] = {(B, N, T, S)}, got {x.shape}.")
            elif x.ndim != 2 or x.shape[0] not in (1, B) or x.shape[1:] != wanted[role]:
                letters = "[B, T]" if role == "row" else "[B, S]"
                raise ValueError(
                    f"mask: {name} has the shape {letters} = {(B, *wanted[role])}, or 1 in place of B, got {x.shape}."
                )


def _mask(**static):
    """A frozen dataclass that is a pytree; the named fields are not data."""

    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        meta = [n for n in names if n in static]
        return jax.tree_util.register_dataclass(cls, [n for n in names if n not in static], meta)

    return wrap


@_mask()
class Causal(Mask):
    """A query sees keys at its own position and before.

    Args:
        q_positions, kv_positions: [B, T] and [B, S], or 1 in place of B; the index where None.

    Example:
        >>> whole(Causal(), 1, 1, 3, 3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    q_positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None
    _roles: ClassVar = {"q_positions": "row", "kv_positions": "column"}

    def visible(self, tile):
        return _at(self.q_positions, tile.row) >= _at(self.kv_positions, tile.column)

    def blocks(self, grid):
        (q_low, q_high), (k_low, k_high) = _extent_pair(self.q_positions, self.kv_positions, grid)
        return q_high >= k_low, q_low >= k_high


@_mask(left=True, right=True)
class Window(Mask):
    """A query sees keys at most `left` places before it and `right` places after it (None: any number).

    Example:
        >>> whole(Window(left=1, right=0), 1, 1, 3, 3)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    left: int | None = None
    right: int | None = None
    q_positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None
    _roles: ClassVar = {"q_positions": "row", "kv_positions": "column"}

    def visible(self, tile):
        distance = _at(self.q_positions, tile.row) - _at(self.kv_positions, tile.column)
        parts = [] if self.left is None else [distance <= self.left]
        parts += [] if self.right is None else [distance >= -self.right]
        return _all(parts, distance)

    def blocks(self, grid):
        (q_low, q_high), (k_low, k_high) = _extent_pair(self.q_positions, self.kv_positions, grid)
        least, most = q_low - k_high, q_high - k_low  # distances in the tile
        left = (least <= self.left, most <= self.left) if self.left is not None else None
        right = (most >= -self.right, least >= -self.right) if self.right is not None else None
        parts = [p for p in (left, right) if p is not None]
        return _all([p[0] for p in parts], least), _all([p[1] for p in parts], least)


@_mask()
class Segments(Mask):
    """A query sees keys of its own segment (packed sequences); `kv_ids` are the queries' own where None.

    Example:
        >>> whole(Segments(jnp.array([[1, 1, 2]])), 1, 1, 3, 3)[0, 0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    q_ids: Int[Array, "B T"]
    kv_ids: Int[Array, "B S"] | None = None
    _roles: ClassVar = {"q_ids": "row", "kv_ids": "column"}

    def __post_init__(self):
        if self.kv_ids is None:
            object.__setattr__(self, "kv_ids", self.q_ids)

    def visible(self, tile):
        return self.q_ids == self.kv_ids

    def blocks(self, grid):
        return _equal(*_extent_pair(self.q_ids, self.kv_ids, grid))


@_mask()
class Lengths(Mask):
    """Only the first `q_lengths[b]` queries and `kv_lengths[b]` keys of row b exist, [B] each (None: all).

    Example:
        >>> whole(Lengths(kv_lengths=jnp.array([2])), 1, 1, 2, 3)[0, 0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 0]]
    """

    q_lengths: Int[Array, "B"] | None = None
    kv_lengths: Int[Array, "B"] | None = None
    _roles: ClassVar = {"q_lengths": "batch", "kv_lengths": "batch"}

    def visible(self, tile):
        parts = [] if self.q_lengths is None else [tile.row < self.q_lengths]
        parts += [] if self.kv_lengths is None else [tile.column < self.kv_lengths]
        return _all(parts, tile.row)

    def blocks(self, grid):
        (q_low, q_high), (k_low, k_high) = _extent_pair(None, None, grid)
        any_parts, all_parts = [], []
        for lengths, low, high in ((self.q_lengths, q_low, q_high), (self.kv_lengths, k_low, k_high)):
            if lengths is not None:
                any_parts.append(low < lay("batch", lengths))
                all_parts.append(high < lay("batch", lengths))
        return _all(any_parts, q_low + k_low), _all(all_parts, q_low + k_low)


@_mask()
class Prefix(Mask):
    """Keys among the first `lengths[b]` are visible to every query; use it as ``Causal() | Prefix(lengths)``.

    Example:
        >>> whole(Causal() | Prefix(jnp.array([2])), 1, 1, 3, 3)[0, 0].astype(int).tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    """

    lengths: Int[Array, "B"]
    _roles: ClassVar = {"lengths": "batch"}

    def visible(self, tile):
        return tile.column < self.lengths

    def blocks(self, grid):
        _, (low, high) = _extent_pair(None, None, grid)
        return low < lay("batch", self.lengths), high < lay("batch", self.lengths)


@_mask(size=True)
class Chunked(Mask):
    """A query sees keys of its own chunk of `size` positions (Llama 4's local layers).

    Example:
        >>> whole(Chunked(2), 1, 1, 4, 4)[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    size: int
    q_positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None
    _roles: ClassVar = {"q_positions": "row", "kv_positions": "column"}

    def visible(self, tile):
        return _at(self.q_positions, tile.row) // self.size == _at(self.kv_positions, tile.column) // self.size

    def blocks(self, grid):
        extents = _extent_pair(self.q_positions, self.kv_positions, grid)
        return _equal(*([x // self.size for x in pair] for pair in extents))


@_mask()
class Dense(Mask):
    """A boolean array, True where visible; axes of length 1 are broadcast and never made longer.

    Example:
        >>> seen = jnp.array([[True, False], [True, True]])[None, None]
        >>> whole(Dense(seen) & Causal(), 1, 1, 2, 2)[0, 0].astype(int).tolist()
        [[1, 0], [1, 1]]
    """

    array: Bool[Array, "b n t s"]
    _roles: ClassVar = {"array": "both"}
    scattered: ClassVar = True

    def visible(self, tile):
        return self.array

    def blocks(self, grid):
        x = self.array
        for axis, size in ((2, grid.rows), (3, grid.columns)):
            if x.shape[axis] > 1:
                blocks = -(-x.shape[axis] // size)
                x = jnp.pad(
                    x, [(0, blocks * size - x.shape[a]) if a == axis else (0, 0) for a in range(4)], mode="edge"
                )
        rows = (x.shape[2] // grid.rows, grid.rows) if x.shape[2] > 1 else (1, 1)
        columns = (x.shape[3] // grid.columns, grid.columns) if x.shape[3] > 1 else (1, 1)
        x = x.reshape(*x.shape[:2], *rows, *columns)
        return jnp.any(x, axis=(3, 5)), jnp.all(x, axis=(3, 5))


@_mask(function=True)
class Fn(Mask):
    """Visible where ``function(batch, head, query, key, *data)`` is true, of broadcasting index arrays.

    Which tiles are empty is not known of a function, so that none is skipped on its account.

    Example:
        >>> whole(Fn(lambda batch, head, query, key: (query + key) % 2 == 0), 1, 1, 2, 3)[0, 0].astype(int).tolist()
        [[1, 0, 1], [0, 1, 0]]
    """

    function: Callable[..., Array]
    data: tuple[Any, ...] = ()
    _roles: ClassVar = {"data": "data"}

    def visible(self, tile):
        return self.function(tile.batch, tile.head, tile.row, tile.column, *self.data)

    def blocks(self, grid):
        one = jnp.ones((1, 1, 1, 1), bool)
        return one, ~one


class _Pair(Mask):
    def map(self, function):
        return type(self)(self.left.map(function), self.right.map(function))

    def check(self, B, T, S, N):
        self.left.check(B, T, S, N)
        self.right.check(B, T, S, N)


@_mask()
class And(_Pair):
    """Visible in both.

    Example:
        >>> whole(And(Causal(), Chunked(2)), 1, 1, 4, 4)[0, 0].astype(int).tolist()  # Causal() & Chunked(2)
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    left: Mask
    right: Mask

    @property
    def scattered(self):
        return self.left.scattered or self.right.scattered

    def visible(self, tile):
        return self.left.visible(tile) & self.right.visible(tile)

    def blocks(self, grid):
        (a, b), (c, d) = self.left.blocks(grid), self.right.blocks(grid)
        return a & c, b & d


@_mask()
class Or(_Pair):
    """Visible in either.

    Example:
        >>> whole(Or(Causal(), Chunked(2)), 1, 1, 4, 4)[0, 0].astype(int).tolist()  # Causal() | Chunked(2)
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """

    left: Mask
    right: Mask
    scattered: ClassVar = True

    def visible(self, tile):
        return self.left.visible(tile) | self.right.visible(tile)

    def blocks(self, grid):
        (a, b), (c, d) = self.left.blocks(grid), self.right.blocks(grid)
        return a | c, b | d


@_mask()
class Not(Mask):
    """Visible where the other is not.

    Example:
        >>> whole(Not(Chunked(2)), 1, 1, 4, 4)[0, 0].astype(int).tolist()  # ~Chunked(2)
        [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    """

    mask: Mask
    scattered: ClassVar = True

    def visible(self, tile):
        return ~self.mask.visible(tile)

    def blocks(self, grid):
        some, every = self.mask.blocks(grid)
        return ~every, ~some

    def map(self, function):
        return Not(self.mask.map(function))

    def check(self, B, T, S, N):
        self.mask.check(B, T, S, N)


def whole(mask: Mask, B: int, N: int, T: int, S: int) -> Bool[Array, "b n T S"]:
    """The mask as one array: for the definition and for tests.

    Example:
        >>> seen = whole(Causal() & Lengths(kv_lengths=jnp.array([1, 2])), B=2, N=1, T=2, S=2)
        >>> seen.shape, seen[:, 0].astype(int).tolist()
        ((2, 1, 2, 2), [[[1, 0], [1, 0]], [[1, 0], [1, 1]]])
    """
    visible = mask.map(lay).visible(tile_at(0, 0, B, N, Grid(T, S, T, S)))
    return jnp.broadcast_to(visible, (*visible.shape[:2], T, S))


def tile_at(i: Array, j: Array, B: int, N: int, grid: Grid) -> Tile:
    """The indices of the tile in block row i and block column j.

    Example:
        >>> tile = tile_at(1, 0, B=2, N=1, grid=Grid(T=6, S=6, rows=2, columns=3))
        >>> tile.row.shape, tile.row.ravel().tolist(), tile.column.ravel().tolist()
        ((1, 1, 2, 1), [2, 3], [0, 1, 2])
    """
    return Tile(
        _index(B, 0), _index(N, 1), i * grid.rows + _index(grid.rows, 2), j * grid.columns + _index(grid.columns, 3)
    )


# ---- one axis at a time -----------------------------------------------------------------------------


def _index(n: int, axis: int) -> Int[Array, "..."]:
    return jax.lax.broadcasted_iota(jnp.int32, tuple(n if a == axis else 1 for a in range(4)), axis)


def lay(role: str, x: Array) -> Array:
    """An array of data, its axes where [B, N, rows, columns] has them.

    Example:
        >>> [lay(role, jnp.ones((2, 5))).shape for role in ("row", "column")], lay("batch", jnp.ones(2)).shape
        ([(2, 1, 5, 1), (2, 1, 1, 5)], (2, 1, 1, 1))
    """
    axes = {"row": (1, 3), "column": (1, 2), "batch": (1, 2, 3)}.get(role, ())
    return jnp.expand_dims(jnp.asarray(x), axes) if axes else x


def _at(x: Array | None, index: Array) -> Array:
    return index if x is None else x


def _all(parts: list[Array], like: Array) -> Array:
    out = jnp.ones(like.shape, bool)
    for part in parts:
        out = out & part
    return out


def _equal(rows, columns) -> tuple[Array, Array]:
    """(may any row's value equal a column's, do all) from the least and most of each block."""
    (q_low, q_high), (k_low, k_high) = rows, columns
    same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return (q_low <= k_high) & (k_low <= q_high), same


def _extent_pair(rows: Array | None, columns: Array | None, grid: Grid):
    """((least, most) of each block of rows, [b, 1, R, 1]; the same of columns, [b, 1, 1, C])."""
    q, k = _extent(rows, grid.T, grid.rows), _extent(columns, grid.S, grid.columns)
    return [x[:, None, :, None] for x in q], [x[:, None, None, :] for x in k]


def _extent(x: Array | None, length: int, size: int) -> tuple[Array, Array]:
    """(least, most) value in each block of `size` places, [b, blocks]; the index where x is None."""
    blocks = -(-length // size)
    if x is None:
        low = jnp.arange(blocks, dtype=jnp.int32)[None] * size
        return low, jnp.minimum(low + size, length) - 1
    x = jnp.pad(x[:, :length], ((0, 0), (0, blocks * size - length)), mode="edge").reshape(-1, blocks, size)
    return jnp.min(x, axis=2), jnp.max(x, axis=2)


def pad(role: str, x: Array, grid: Grid) -> Array:
    """An array along rows, columns or both ([b, n, t, s], axes of length 1 stay) lengthened to whole blocks.

    Example:
        >>> pad("column", jnp.array([[1, 2, 3]]), Grid(T=3, S=3, rows=1, columns=2)).tolist()
        [[1, 2, 3, 3]]
    """
    if role in ("batch", "data"):
        return x
    more_rows, more_columns = -grid.T % grid.rows, -grid.S % grid.columns
    if role == "both":
        widths = [(0, 0), (0, 0)] + [
            (0, more if n > 1 else 0) for n, more in zip(x.shape[2:], (more_rows, more_columns))
        ]
        return jnp.pad(x, widths)
    return jnp.pad(x, ((0, 0), (0, more_rows if role == "row" else more_columns)), mode="edge")


def cut(role: str, x: Array, i: Array, j: Array, grid: Grid) -> Array:
    """The part of a padded array that belongs to the tile in block row i and block column j.

    Example:
        >>> cut("column", jnp.array([[1, 2, 3, 3]]), 0, 1, Grid(T=3, S=3, rows=1, columns=2)).tolist()
        [[3, 3]]
    """
    if role in ("batch", "data"):
        return x
    if role != "both":
        at, size = (i, grid.rows) if role == "row" else (j, grid.columns)
        return jax.lax.dynamic_slice_in_dim(x, at * size, size, axis=1)
    for axis, at, size in ((2, i, grid.rows), (3, j, grid.columns)):
        if x.shape[axis] > 1:
            x = jax.lax.dynamic_slice_in_dim(x, at * size, size, axis=axis)
    return x
