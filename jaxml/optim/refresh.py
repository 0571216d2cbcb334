"""When and how the bases of all targets are refreshed.

All matrices of all targets are numbered; number k of K has its turn k · gap / K steps after the first step and every
`gap` steps from then on, so that no step does the work of all. In the first step everyone has a turn. Matrices of equal
shape share one loop over those whose turn it is: compiled once, one matrix in work at a time, and no linear algebra
that is batched (which deadlocks XLA on CPU when there is much of it in one program).

Reference:
    Zhang et al. 2024, "Q-GaLore", section 3.2 (a gap that doubles while the subspace stays).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Bool, Float, Int, wide
from jaxml.optim import basis, moments, packed
from jaxml.optim.targets import Target

DTYPES = ("float32", "bfloat16", "int8", "int4")
WINDOW = 5  # refreshes whose overlap is averaged before the gap doubles


class Turns(NamedTuple):
    """Of each matrix of a target, where the gap adapts; [*batch]."""

    next: Int[Array, "..."]  # the step of the next refresh
    gap: Int[Array, "..."]  # steps
    overlaps: Float[Array, "... 5"]  # of the last refreshes, 0 where there were none yet


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Whose turn it is in which step."""

    targets: tuple[Target | None, ...]
    options: Any
    offsets: tuple[int, ...]  # the number of each leaf's first matrix
    total: int

    @classmethod
    def of(cls, targets: list[Target | None], options) -> "Schedule":
        counts = [0 if t is None else t.count for t in targets]
        return cls(tuple(targets), options, tuple(sum(counts[:i]) for i in range(len(counts))), max(1, sum(counts)))

    def init(self, i: int) -> Turns | tuple:
        if self.options.adaptive is None:
            return ()
        target, first = self.targets[i], jnp.asarray(self._offset(i))
        gap = jnp.full(target.batch, self.options.gap, jnp.int32)
        first = jnp.where(first == 0, self.options.gap, first).reshape(target.batch)
        return Turns(first.astype(jnp.int32), gap, jnp.zeros((*target.batch, WINDOW), jnp.float32))

    def due(self, members: list[int], step: Int[Array, ""], turns: list[Turns | tuple]) -> Bool[Array, "B"]:
        """Whether each matrix of some leaves is refreshed in this step."""
        if isinstance(turns[0], Turns):
            return (step == 0) | (jnp.concatenate([t.next.reshape(-1) for t in turns]) <= step)
        return (step == 0) | (jnp.mod(step - self._offsets(members), self.options.gap) == 0)

    def epoch(self, members: list[int], step: Int[Array, ""]) -> Int[Array, "B"]:
        """How many turns each matrix of some leaves has had, this step's included."""
        offset = self._offsets(members)
        return jnp.where((step == 0) | (offset == 0), step // self.options.gap, (step - offset) // self.options.gap + 1)

    def _offsets(self, members: list[int]) -> Int[Array, "B"]:
        return jnp.asarray([n for i in members for n in self._offset(i)], jnp.int32)

    def _offset(self, i: int) -> list[int]:
        """Of each matrix's turns, in steps."""
        count, gap = self.targets[i].count, self.options.gap
        return [(self.offsets[i] + k) * gap // self.total if self.options.spread else 0 for k in range(count)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What a refresh changes of one leaf; all arrays have the number of the matrix as first axis."""

    basis: tuple[Any, ...]
    moments: list[Any]
    turns: Turns | tuple


def first(target: Target, options, i: int, dtype) -> tuple[Any, ...]:
    """The basis before the first step: random directions, or nothing where it is drawn anew in every step."""
    if options.method == "random":
        return ()
    keys = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), i), 2)
    draw = lambda key, shape: jax.random.normal(key, shape, dtype) / shape[-2] ** 0.5
    return tuple(_store(draw(key, shape), options) for key, shape in zip(keys, target.basis_shapes))


def bases(schedule: Schedule, i: int, step: Int[Array, ""], kept: tuple[Any, ...], dtype) -> tuple[Array, ...]:
    """The basis of leaf `i` as arrays [*batch, m or n, r]."""
    target, options = schedule.targets[i], schedule.options
    if options.method != "random":
        return tuple(packed.unpack(b) for b in kept)
    numbers = schedule.offsets[i] + jnp.arange(target.count)
    shapes = [shape[-2:] for shape in target.basis_shapes]
    draw = jax.vmap(lambda number, epoch: _drawn(options, number, epoch, shapes, target.rank, dtype))
    drawn = draw(numbers, schedule.epoch([i], step))
    return tuple(b.reshape(shape) for b, shape in zip(drawn, target.basis_shapes))


def refresh(
    schedule: Schedule,
    step: Int[Array, ""],
    matrices: list[Array | None],
    kept: list[Kept | None],
    kinds: list,
    products: bool = False,
) -> list[Kept | None]:
    """Everything kept, after those matrices whose turn it is have had it.

    Args:
        matrices: the gradients G [*batch, m, n] of the targets.
        kinds: of each leaf's moments, a list of `moments.Moment`.
        products: `matrices` are G GᵀP (or GᵀG Q) [*batch, m or n, r] already.
    """
    if schedule.options.method == "random" and schedule.options.moments == "carry":
        return kept
    groups: dict[Any, list[int]] = {}
    for i, target in enumerate(schedule.targets):
        if target is not None:
            leaf = _Leaf.of(target, kept[i], products)
            like = jax.tree.map(lambda a: (a.shape, a.dtype), jax.eval_shape(leaf.row, matrices[i], kept[i], 0))
            squared = tuple(moment[1:] for moment in kinds[i])
            groups.setdefault((leaf.side, target.rank, str(like), squared), []).append(i)
    out = list(kept)
    for members in groups.values():
        for i, new in zip(members, _refresh_group(schedule, step, matrices, kept, kinds, members, products)):
            out[i] = new
    return out


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """How one leaf's matrices take part: those with a basis on the right are turned over, to share a program with
    others, unless their moments are packed in blocks."""

    side: str  # as the program sees it
    flipped: bool
    products: bool

    @classmethod
    def of(cls, target: Target, kept: Kept, products: bool) -> "_Leaf":
        flipped = target.side == "right" and not any(map(packed.is_packed, kept.moments))
        return cls("left" if flipped else target.side, flipped, products)

    def row(self, matrices: Array, kept: Kept, row: Array) -> tuple[Array, Kept]:
        """(G, what is kept) of matrix number `row`."""
        g = _at(matrices.reshape(-1, *matrices.shape[-2:]), row)
        g = g.T if self.flipped and not self.products else g
        return g, self._turned(jax.tree.map(lambda a: _at(a, row), kept))

    def put(self, kept: Kept, row: Array, new: Kept, mine: Bool[Array, ""]) -> Kept:
        """`new` as matrix number `row`, where it is this leaf's."""

        def put(arrays, values):
            write = lambda array, value: jax.lax.dynamic_update_index_in_dim(
                array, value, 0 if array.shape[0] == 1 else row, 0, allow_negative_indices=False
            )
            return jax.tree.map(write, arrays, values)

        return jax.lax.cond(mine, put, lambda arrays, values: arrays, kept, self._turned(new))

    def _turned(self, kept: Kept) -> Kept:
        return dataclasses.replace(kept, moments=[x.T for x in kept.moments]) if self.flipped else kept


def _at(array: Array, row: Array) -> Array:
    if array.shape[0] == 1:
        return array[0]
    return jax.lax.dynamic_index_in_dim(array, row, keepdims=False, allow_negative_indices=False)


def _refresh_group(schedule, step, matrices, kept, kinds, members: list[int], products: bool) -> list[Kept]:
    targets = [schedule.targets[i] for i in members]
    leaves = [_Leaf.of(t, kept[i], products) for t, i in zip(targets, members)]
    if all(leaf.flipped for leaf in leaves):
        leaves = [_Leaf("right", False, products)] * len(members)
    due, epoch = schedule.due(members, step, [kept[i].turns for i in members]), schedule.epoch(members, step)
    rows = [(k, n, schedule.offsets[i] + n) for k, i in enumerate(members) for n in range(targets[k].count)]
    owner, local, number = (jnp.asarray(column, jnp.int32) for column in zip(*rows))
    order = jnp.argsort(~due, stable=True)
    kind = kinds[members[0]]
    shapes = [shape[-2:] for shape in targets[0].basis_shapes]
    one = functools.partial(_turn, leaves[0].side, targets[0].rank, shapes, schedule.options, kind, products)

    def turn(n, carry: list[Kept]) -> list[Kept]:
        at = order[n]
        k, row = owner[at], local[at]
        pick = [functools.partial(leaf.row, matrices[i], c, row) for leaf, i, c in zip(leaves, members, carry)]
        new = one((number[at], epoch[at], step), *_select(k, pick))
        return [leaf.put(c, row, new, k == j) for j, (leaf, c) in enumerate(zip(leaves, carry))]

    return jax.lax.fori_loop(0, jnp.sum(due), turn, [kept[i] for i in members])


def _turn(side: str, rank: int, shapes, options, kinds, products: bool, when, g: Array, old: Kept) -> Kept:
    """One matrix's."""
    number, epoch, step = when
    if options.method == "random":
        before, after = (_drawn(options, number, e, shapes, rank, wide(g.dtype)) for e in (epoch - 1, epoch))
        basis_after = ()
    else:
        before = [packed.unpack(b).astype(wide(g.dtype)) for b in old.basis]
        if products:
            after = [basis.follow(g.astype(wide(g.dtype)), before[0])]
        else:
            g = g if options.axis_name is None else jax.lax.pmean(g, options.axis_name)
            sides = {"left": [g], "right": [g.T], "full": [g, g.T]}[side]
            after = [_next(options, _key(options, number, step), step, x, p) for x, p in zip(sides, before)]
        basis_after = tuple(_store(p, options) for p in after)
    rotations = [jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST) for a, b in zip(after, before)]

    def rotate(x: Array, q=rotations) -> Array:
        left = q[0] @ x if side != "right" else x
        return left @ q[-1].T if side != "left" else left

    rotate_squared = functools.partial(rotate, q=[q * q for q in rotations])
    values = [packed.unpack(x) for x in old.moments]
    values = moments.turn(options.moments, kinds, values, rotate, rotate_squared, step)
    values = [packed.pack_like(x, was) for x, was in zip(values, old.moments)]
    turns = old.turns
    if isinstance(turns, Turns):
        turns = _adapt(turns, step, options, jnp.sum(rotations[0] ** 2) / rank)
    return Kept(basis_after, values, turns)


def _key(options, number: Array, step: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(options.seed), number), step)


def _drawn(options, number: Array, epoch: Array, shapes, rank: int, dtype) -> tuple[Float[Array, "m r"], ...]:
    """The random basis of one matrix, elements of variance 1 / r."""
    keys = jax.random.split(_key(options, number, epoch), 2)
    return tuple(jax.random.normal(k, s, dtype) / rank**0.5 for k, s in zip(keys, shapes))


def _next(options, key: Array, step: Array, g: Array, p: Array) -> Array:
    if options.method == "power":
        times = jnp.where(step == 0, basis.FIRST, 1)
        return jax.lax.fori_loop(0, times, lambda _, p: basis.power(g, p), p)
    if options.method == "rsvd":
        columns = min(p.shape[1] + basis.OVERSAMPLE, *g.shape)
        return basis.rsvd(g, jax.random.normal(key, (g.shape[0], columns), p.dtype), p.shape[1])
    return basis.svd(g.astype(p.dtype), p.shape[1])


def _store(p: Array, options) -> Array | packed.Packed:
    kind = options.basis_dtype
    if kind in packed.KINDS:
        return packed.pack(p, kind)
    return p.astype(jnp.promote_types(kind, p.dtype) if kind == "float32" else kind)


def _adapt(turns: Turns, step: Array, options, overlap: Array) -> Turns:
    """The gap doubles when the mean of the last overlaps is at least the threshold; counting then begins anew."""
    counted = jnp.where(step == 0, turns.overlaps, jnp.roll(turns.overlaps, 1).at[0].set(overlap))
    stays = (counted[-1] > 0) & (jnp.mean(counted) >= options.adaptive)
    gap = jnp.where(stays, 2 * turns.gap, turns.gap)
    following = jnp.where(step == 0, turns.next, step + gap)
    return Turns(following, gap, jnp.where(stays, 0.0, counted))


def _select(k: Array, branches: list):
    """branches[k](), by eights: a switch hands the arrays of all branches to each of them."""
    if len(branches) <= 8:
        return jax.lax.switch(k, branches) if len(branches) > 1 else branches[0]()
    size = 8
    while 8 * size < len(branches):
        size *= 8
    parts = [branches[i : i + size] for i in range(0, len(branches), size)]
    return jax.lax.switch(k // size, [functools.partial(_select, k % size, part) for part in parts])
