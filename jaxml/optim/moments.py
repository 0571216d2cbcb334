"""The moments inside any Optax state: where they are, and how they follow a basis that turns.

A moment of a target is a leaf of the state whose path ends with the target's own path and whose shape is that of its
projected gradient. Whether it is a mean of gradients or of their squares says the name of its field.

Reference:
    Robert et al. 2025, "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", algorithm 1, whose
    with a floor of a tenth of Q²v.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxml.axes import Array, Int
from jaxml.optim.packed import is_packed

KINDS = ("rotate", "carry", "reset")
FLOOR = 0.1  # of a mean of squares that has turned, as a share of Q²v
LINEAR = ("mu", "m", "m1", "m2", "trace", "momentum", "velocity", "g", "ema", "prev_updates", "exp_avg")
SQUARED = ("nu", "nu_max", "v", "n", "sum_of_squares", "exp_avg_sq", "e_g", "e_x")
SUMS = ("z", "params0", "acc_grads", "grad_sum")  # rotated as means are; parameters and sums, whose bits count


class Moment(NamedTuple):
    """Where one moment is: its leaf's number in the state, whether it is of squares, and of squares of what."""

    leaf: int
    squared: bool
    mean: int | None = None  # its place among the target's moments of the mean that belongs to it
    decay: float | None = None  # of an average that began at 0, where it is known


def find(
    state: Any, targets: dict[tuple, tuple[int, ...]], decays: Callable[[], dict[int, float]] = dict
) -> dict[tuple, list[Moment]]:
    """The moments of each target; `targets` has the shape of R of each key path, `decays()` is `decays_of`'s answer."""
    found, _ = _search(state, targets)
    out = {path: _paired(fields) for path, fields in found.items()}
    if any(m.mean is not None for found in out.values() for m in found):
        known = decays()
        out = {path: [m._replace(decay=known.get(m.leaf)) for m in found] for path, found in out.items()}
    return out


def decays_of(inner: optax.GradientTransformationExtraArgs, low: Any, extra: dict[str, Any]) -> dict[int, float]:
    """The decay b of each average in the optimizer's state, by its leaf's number.

    Of a gradient that is 1, the first value is 1 − b. Found where the program is built, on leaves of one element.
    """
    with jax.ensure_compile_time_eval():
        ones = jax.tree.map(lambda a: jnp.ones((1,) * jnp.ndim(a), a.dtype), low)
        _, state = inner.update(ones, inner.init(ones), ones, **extra)
    out = {}
    for n, leaf in enumerate(jax.tree.leaves(state, is_leaf=is_packed)):
        if not is_packed(leaf) and jnp.size(leaf) == 1 and not isinstance(leaf, jax.core.Tracer):
            value = float(np.asarray(leaf, np.float32).item())
            if 0 < value <= 1:
                out[n] = round(1 - value, 6)
    return out


def unknown(state: Any, targets: dict[tuple, tuple[int, ...]]) -> list[str]:
    """Names of fields that hold arrays of R's shape and are not known to be moments."""
    return _search(state, targets)[1]


def packable(state: Any, targets: dict[tuple, tuple[int, ...]]) -> dict[int, bool]:
    """Number of each moment's leaf that bears to be rounded, and whether it is of squares."""
    found, _ = _search(state, targets)
    wanted = [f for fields in found.values() for f in fields if f.name not in SUMS]
    return {f.leaf: f.squared for f in wanted}


class _Field(NamedTuple):
    leaf: int
    name: str
    squared: bool
    parent: tuple  # the sub-state that it is a field of
    is_centred: bool  # of squares of what is left after the mean


def _search(state: Any, targets: dict[tuple, tuple[int, ...]]) -> tuple[dict[tuple, list[_Field]], list[str]]:
    out: dict[tuple, list[_Field]] = {path: [] for path in targets}
    lengths = sorted({len(path) for path in targets}, reverse=True)
    is_belief = lambda node: isinstance(node, optax.ScaleByBeliefState)
    centred = {path for path, node in jax.tree.leaves_with_path(state, is_leaf=is_belief) if is_belief(node)}
    strange = []
    for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(state, is_leaf=is_packed)):
        for length in lengths:
            own = path[len(path) - length :]
            if length >= len(path) or own not in targets or jnp.shape(leaf) != targets[own]:
                continue
            field, parent = path[len(path) - length - 1], path[: len(path) - length - 1]
            name = str(getattr(field, "name", getattr(field, "key", "")))
            out[own].append(_Field(number, name, name in SQUARED, parent, parent in centred))
            break
    for fields in out.values():
        for n, f in enumerate(fields):
            names = {other.name for other in fields if other.parent == f.parent}
            if {"m", "v", "n", "g"} <= names and f.name == "v":  # Adan's, a mean of differences
                fields[n] = f._replace(squared=False)
            if f.name not in LINEAR + SQUARED + SUMS:
                strange.append(f.name)
        fields[:] = [f for f in fields if f.name in LINEAR + SQUARED + SUMS]
    return out, sorted(set(strange))


def _paired(fields: list[_Field]) -> list[Moment]:
    """Means before the squares, each of which is given the mean of gradients beside it in the same sub-state."""
    linear, squared = [f for f in fields if not f.squared], [f for f in fields if f.squared]
    out = [Moment(f.leaf, False) for f in linear]
    for f in squared:
        beside = [n for n, m in enumerate(linear) if m.parent == f.parent and m.name in ("mu", "m", "exp_avg")]
        out.append(Moment(f.leaf, True, beside[0] if len(beside) == 1 and not f.is_centred else None))
    return out


def turn(
    kind: str, moments: list[Moment], values: list[Array], rotate, rotate_squared, steps: Int[Array, ""]
) -> list[Array]:
    """The moments of one matrix in its new basis, after so many steps.

    `rotate(x)` gives x in the new basis, `rotate_squared(x)` the same with the squares of the rotation's elements.
    A mean of squares v beside a mean m becomes |Q²(v − m²) + (Qm)²|, which is what the new coordinates' squares would
    average to if the old ones were independent; alone it becomes Q²v. Both are averages that began at 0 with decays of
    their own, and m² is far above v for a thousand steps unless both are divided by what they have seen, 1 − bᵗ.
    """
    if kind == "carry":
        return values
    if kind == "reset":
        return [jnp.zeros_like(x) for x in values]
    out = []
    for moment, x in zip(moments, values):
        if not moment.squared:
            out.append(rotate(x))
        elif moment.mean is None:
            out.append(rotate_squared(x))
        else:
            seen = [_seen(m.decay, steps, x.dtype) for m in (moments[moment.mean], moment)]
            mean, square = values[moment.mean] / seen[0], x / seen[1]
            turned = rotate_squared(square)
            new = jnp.abs(turned + rotate(mean) ** 2 - rotate_squared(mean * mean))
            out.append(seen[1] * jnp.maximum(new, FLOOR * turned))  # never so small that a step is out of all measure
    return out


def _seen(decay: float | None, steps: Int[Array, ""], dtype) -> Array:
    """1 − bᵗ: how much of an average that began at 0 is of what it averages."""
    share = 1.0 if decay is None else -jnp.expm1(steps * jnp.log(jnp.asarray(decay, dtype)))
    return jnp.where(steps > 0, share, 1.0).astype(dtype)
