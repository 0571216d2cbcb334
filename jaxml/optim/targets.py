"""Which leaves of a tree of parameters are treated as matrices of low rank, and how each is seen as one.

A leaf is seen as matrices [..., m, n]: its last two axes, with whatever lies before them as a batch (layers stacked for
`scan`, experts), unless dimension numbers say otherwise.
"""

import dataclasses
import inspect
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float
from jaxml.paths import path_of

SIDES = ("auto", "std", "reverse_std", "left", "right", "full")
NOT_BY_DEFAULT = r"(?i)embed|lm_head|unembed|vocab|(^|/)w[tp]e(/|$)|norm|(^|/|_)(bias|scale|ln(_?\d+)?)(/|$)"
Rank = int | float | Callable[[str, tuple[int, ...]], int | float] | Mapping[str, int | float]


class DimensionNumbers(NamedTuple):
    """Axes that make the matrix, as in `optax.contrib.muon`; all others are batch axes.

    A query kernel [D, N, H] is `DimensionNumbers(0, (1, 2))`, an output kernel [N, H, D] `DimensionNumbers((0, 1), 2)`,
    a convolution [kernel..., in, out] `DimensionNumbers((0, 1, 2), 3)`.

    Example:
        >>> DimensionNumbers(0, (1, 2)).output_axis
        (1, 2)
    """

    reduction_axis: int | Sequence[int] = -2
    output_axis: int | Sequence[int] = -1


@dataclasses.dataclass(frozen=True)
class Target:
    """One leaf as matrices [*batch, m, n] with a basis of `rank` columns on the left, the right or both sides.

    Example:
        >>> target = Target("q", shape=(4, 6), reduction=(0,), output=(1,), rank=2, side="left")
        >>> target.low_shape, target.basis_shapes
        ((2, 6), ((4, 2),))
    """

    path: str
    shape: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    rank: int
    side: str  # "left": R = PᵀG [r, n]; "right": R = G Q [m, r]; "full": R = PᵀG Q [r, r]

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes' lengths."""
        return tuple(self.shape[i] for i in self._batch_axes)

    @property
    def m(self) -> int:
        return math.prod(self.shape[i] for i in self.reduction)

    @property
    def n(self) -> int:
        return math.prod(self.shape[i] for i in self.output)

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return math.prod(self.batch)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Of the projected gradient R."""
        r = self.rank
        return (*self.batch, *{"left": (r, self.n), "right": (self.m, r), "full": (r, r)}[self.side])

    @property
    def basis_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the basis, (P,), (Q,) or (P, Q)."""
        left, right = (*self.batch, self.m, self.rank), (*self.batch, self.n, self.rank)
        return {"left": (left,), "right": (right,), "full": (left, right)}[self.side]

    def matrices(self, x: Array) -> Float[Array, "... m n"]:
        """The leaf (or another array of its shape) as matrices."""
        return x.transpose(self._order).reshape(*self.batch, self.m, self.n)

    def restore(self, matrices: Float[Array, "... m n"]) -> Array:
        """The inverse of `matrices`."""
        order = self._order
        back = [order.index(i) for i in range(len(order))]
        return matrices.reshape([self.shape[i] for i in order]).transpose(back)

    def project(self, basis: tuple[Array, ...], matrices: Float[Array, "... m n"]) -> Float[Array, "... low"]:
        """R from G, accumulated in float32."""
        multiply = _multiply(matrices.dtype)
        if self.side == "left":
            return multiply("...mr,...mn->...rn", basis[0], matrices)
        if self.side == "right":
            return multiply("...mn,...nr->...mr", matrices, basis[0])
        return multiply("...rn,...ns->...rs", multiply("...mr,...mn->...rn", basis[0], matrices), basis[1])

    def lift(self, basis: tuple[Array, ...], low: Float[Array, "... low"]) -> Float[Array, "... m n"]:
        """P R, R Qᵀ or P R Qᵀ in full space."""
        multiply = _multiply(low.dtype)
        if self.side == "left":
            return multiply("...mr,...rn->...mn", basis[0], low)
        if self.side == "right":
            return multiply("...mr,...nr->...mn", low, basis[0])
        return multiply("...ms,...ns->...mn", multiply("...mr,...rs->...ms", basis[0], low), basis[1])

    @property
    def _batch_axes(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.shape)) if i not in self.reduction + self.output)

    @property
    def _order(self) -> tuple[int, ...]:
        return self._batch_axes + self.reduction + self.output


def _multiply(dtype):
    """einsum whose factors take `dtype` and whose sums are float32 or wider."""

    def multiply(spec: str, a: Array, b: Array) -> Array:
        wide = jnp.promote_types(dtype, jnp.float32)
        return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), preferred_element_type=wide)

    return multiply


def check_mesh(name: str, leaves: list[Array]) -> None:
    """Raises where a leaf is spread over a mesh axis whose shardings are part of types: products would need theirs.

    Example:
        >>> on = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
        >>> sharding = jax.sharding.NamedSharding(on, jax.sharding.PartitionSpec("x"))
        >>> check_mesh("galore", [jax.device_put(jnp.ones(on.size), sharding)])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        NotImplementedError: galore: parameters lie on mesh axes of type Auto, got x of type Explicit. Make ...
    """
    for leaf in leaves:
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        explicit = set(getattr(mesh, "explicit_axes", ()))
        used = {a for axes in getattr(sharding, "spec", ()) for a in (axes if isinstance(axes, tuple) else (axes,))}
        if explicit & used:
            raise NotImplementedError(
                f"{name}: parameters lie on mesh axes of type Auto, got {', '.join(sorted(explicit & used))} of type "
                "Explicit. Make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * its number of axes."
            )


def find(
    params: Any,
    *,
    rank: Rank,
    targets: str | Sequence[str] | Callable[[str, tuple[int, ...]], bool] | None = None,
    side: str = "auto",
    dims: DimensionNumbers | Mapping[str, Any] | Callable[[str, tuple[int, ...]], Any] | None = None,
    name: str = "galore",
) -> list[Target | None]:
    """A `Target` for each leaf that is one, None for the others, in the order of `jax.tree.leaves`.

    Args:
        params: arrays or shapes.
        rank: a number, a share of the smaller side (in (0, 1)), a function of (path, shape), or a mapping from
            patterns to either, of which the first that matches counts.
        targets: regular expressions searched in the path ("layers/attn/q/kernel"), or a function of (path, shape).
            None takes every leaf that has two axes or more and is wider than the rank, but embeddings, output heads,
            norms, biases and scales.
        side: which side the basis stands on; "auto" leaves the smallest state. "std" is the authors' rule (the
            shorter side is projected), "reverse_std" its opposite, "left" projects the input axis, "right" the output
            axis, "full" both.
        dims: dimension numbers of all targets, or a mapping from patterns, or a function of (path, shape); the last
            two axes where none is given.
        name: of the caller, for errors.

    Raises:
        ValueError: nothing matched, a rank out of range, axes that do not exist.

    Example:
        >>> found = find({"bias": jnp.zeros(32), "kernel": jnp.zeros((64, 32))}, rank=8)
        >>> [target and (target.path, target.side, target.low_shape) for target in found]
        [None, ('kernel', 'left', (8, 32))]
    """
    if side not in SIDES:
        raise ValueError(f"{name}: side is one of {', '.join(SIDES)}, got {side!r}.")
    leaves = [(path_of(path), jnp.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(params)]
    dims = _by_path(dims, params)
    chosen = _chosen(leaves, targets, name)
    out = []
    for (path, shape), wanted in zip(leaves, chosen):
        out.append(_target(path, shape, rank, side, dims, wanted == "named", name) if wanted else None)
    if leaves and not any(out):
        shapes = ", ".join(f"{path} {shape}" for path, shape in leaves[:50])
        raise ValueError(
            f"{name}: at least one leaf is a target, got none with targets={targets!r} and rank={rank!r}. "
            f"There are {shapes}{', …' if len(leaves) > 50 else ''}."
        )
    return out


def _by_path(dims, params: Any):
    """Dimension numbers as `optax.contrib.muon` takes them, a tree like the parameters or a function of them."""
    if callable(dims) and len(inspect.signature(dims).parameters) == 1:
        dims = dims(params)
    is_numbers = lambda x: x is None or hasattr(x, "reduction_axis")
    if is_numbers(dims) or callable(dims):
        return dims
    if jax.tree.structure(dims, is_leaf=is_numbers) != jax.tree.structure(params):
        return dims  # patterns
    known = {path_of(path): d for path, d in jax.tree.leaves_with_path(dims, is_leaf=is_numbers)}
    return lambda path, shape: known[path]


def _chosen(leaves: list[tuple[str, tuple[int, ...]]], targets, name: str) -> list[str]:
    """ "named", "by default" or "" for each leaf."""
    if targets is None:
        return ["by default" if len(s) >= 2 and not re.search(NOT_BY_DEFAULT, p) else "" for p, s in leaves]
    if callable(targets):
        return ["named" if targets(path, shape) else "" for path, shape in leaves]
    patterns = [targets] if isinstance(targets, str) else list(targets)
    for pattern in patterns:
        if leaves and not any(re.search(pattern, path) for path, _ in leaves):
            raise ValueError(
                f"{name}: a pattern of targets matches at least one path, got {pattern!r}. "
                f"There are {', '.join(path for path, _ in leaves[:50])}{', …' if len(leaves) > 50 else ''}."
            )
    return ["named" if any(re.search(pattern, path) for pattern in patterns) else "" for path, _ in leaves]


def _target(path: str, shape, rank: Rank, side: str, dims, named: bool, name: str) -> Target | None:
    if len(shape) < 2:
        raise ValueError(f"{name}: a target has at least two axes, got {path} of shape {shape}.")
    given = _of(dims, path, shape) or _of_flax(path, len(shape))
    axes = []
    for axis in (given.reduction_axis, given.output_axis):
        some = (axis,) if isinstance(axis, int) else tuple(axis)
        if any(not -len(shape) <= i < len(shape) for i in some):
            raise ValueError(f"{name}: axes of {path} are within its {len(shape)}, got {given}.")
        axes.append(tuple(i % len(shape) for i in some))
    if not all(axes) or len(set(axes[0] + axes[1])) < len(axes[0] + axes[1]):
        raise ValueError(f"{name}: {path} has axes of both kinds and no axis of both, got {given}.")
    one = Target(path, shape, *axes, rank=1, side="left")
    least = min(one.m, one.n)
    r = _of(rank, path, shape) if not isinstance(rank, numbers.Real) else rank
    if r is None:
        said = ", ".join(rank) if isinstance(rank, Mapping) else "a function that gives None"
        raise ValueError(f"{name}: a pattern of rank matches each target, got {said} and {path}.")
    r = int(r) if isinstance(r, numbers.Integral) and not isinstance(r, bool) else r
    if isinstance(r, float) and 0 < r < 1:
        r = max(1, round(r * least))
    if not isinstance(r, int) or isinstance(r, bool) or r < 1 or (named and r > least):
        raise ValueError(
            f"{name}: the rank is in 1 … {least} for {path}, seen as {one.m} × {one.n}, or a share of that in (0, 1), "
            f"got {r}. Give a rank that depends on the leaf, or dims=."
        )
    if r >= least and not named:
        return None
    return dataclasses.replace(one, rank=r, side=_side(side, one.m, one.n))


def _of_flax(path: str, axes: int) -> DimensionNumbers:
    """Of Flax's attention kernels by name: query, key, value [D, N, H], out [N, H, D]; else the last two axes."""
    if axes >= 3 and re.search(r"(^|/)(query|key|value)/kernel(/|$)", path):
        return DimensionNumbers(-3, (-2, -1))
    if axes >= 3 and re.search(r"(^|/)out/kernel(/|$)", path):
        return DimensionNumbers((-3, -2), -1)
    return DimensionNumbers()


def _of(choice, path: str, shape):
    """The value that a constant, a mapping from patterns or a function gives for a leaf."""
    if callable(choice):
        return choice(path, shape)
    if isinstance(choice, Mapping):
        return next((value for pattern, value in choice.items() if re.search(pattern, path)), None)
    return choice


def _side(side: str, m: int, n: int) -> str:
    """The longer side is projected for the smallest state: two moments of the shorter side's length and one basis."""
    longer = "left" if m > n else "right"  # square: as the authors' code does on its [out, in]
    shorter = "left" if m <= n else "right"
    return {"auto": longer, "reverse_std": longer, "std": shorter}.get(side, side)
