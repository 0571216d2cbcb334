"""The moments inside any Optax state: where they are, and how they follow a basis that turns.

A moment of a target is a leaf of the state whose path ends with the target's own path and whose shape is that of its
projected gradient. Whether it is a mean of gradients or of their squares says the name of its field.

Reference:
    Robert et al. 2025, "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", algorithm 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxml.axes import Array
from jaxml.optim.packed import is_packed

KINDS = ("rotate", "carry", "reset")
LINEAR = ("mu", "m", "trace", "momentum", "velocity", "g", "z", "ema", "prev_updates")
SQUARED = ("nu", "nu_max", "v", "n", "sum_of_squares")


class Moment(NamedTuple):
    """Where one moment is: its leaf's number in the state, and whether it is of squares."""

    leaf: int
    squared: bool


def find(state: Any, targets: dict[tuple, tuple[int, ...]]) -> dict[tuple, list[Moment]]:
    """The moments of each target; `targets` has the shape of R for each key path."""
    out = {path: {} for path in targets}
    lengths = sorted({len(path) for path in targets}, reverse=True)
    for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(state, is_leaf=is_packed)):
        for length in lengths:
            if length >= len(path):
                continue
            own, field = path[len(path) - length :], path[len(path) - length - 1]
            if own in targets and jnp.shape(leaf) == targets[own]:
                out[own][str(getattr(field, "name", getattr(field, "key", "")))] = number
                break
    return {path: _kinds(found) for path, found in out.items()}


def _kinds(found: dict[str, int]) -> list[Moment]:
    """In an order in which a mean comes before the mean of squares that belongs to it."""
    adan = {"m", "v", "n", "g"} <= set(found)  # whose v is a mean of differences
    squared = [name for name in found if name in SQUARED and not (adan and name == "v")]
    linear = [name for name in found if name in LINEAR or (adan and name == "v")]
    return [Moment(found[name], False) for name in linear] + [Moment(found[name], True) for name in squared]


def turn(kind: str, moments: list[Moment], values: list[Array], rotate, rotate_squared) -> list[Array]:
    """The moments of one matrix in its new basis.

    `rotate(x)` gives x in the new basis, `rotate_squared(x)` the same with the squares of the rotation's elements.
    A mean of squares v beside a mean m becomes |Q²(v − m²) + (Qm)²|, which is what the new coordinates' squares would
    average to if the old ones were independent.
    """
    if kind == "carry":
        return values
    if kind == "reset":
        return [jnp.zeros_like(x) for x in values]
    means = [x for moment, x in zip(moments, values) if not moment.squared]
    out = []
    for moment, x in zip(moments, values):
        if not moment.squared:
            out.append(rotate(x))
        elif means:
            out.append(jnp.abs(rotate_squared(x - means[0] ** 2) + rotate(means[0]) ** 2))
        else:
            out.append(rotate_squared(x))
    return out
