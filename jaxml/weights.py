"""What may stand where a weight matrix stands.

A weight is either an array of shape [..., in, out] or a *weight node*: a registered pytree that multiplies (a LoRA
pair around a frozen matrix, a quantised matrix, ...). The decoder calls `dot`, `einsum` and `take` and never asks which
one it has, so that one model file serves every way of adapting. Any other pure function does the same, or is given
arrays by `materialized`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Int, wide


class Weight(Protocol):
    """A pytree that stands for a matrix [..., in, out].

    Example:
        >>> from jaxml import quant
        >>> w: Weight = quant.nf4.quantize(jnp.ones((64, 2)), double=False)
        >>> w.shape, w.matmul(jnp.ones((1, 64))).tolist(), w.take(jnp.array([3])).tolist()
        ((64, 2), [[64.0, 64.0]], [[1.0, 1.0]])
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that this node stands for."""
        ...

    def matmul(self, x: Array, transpose: bool = False) -> Array:
        """x [..., in] → [..., out]; with `transpose`, x [..., out] → [..., in]."""
        ...

    def take(self, ids: Array) -> Array:
        """Rows of the matrix: ids [...] → [..., out]."""
        ...

    def dense(self) -> Array:
        """The matrix that this node stands for, [..., in, out]."""
        ...

    def astype(self, dtype: Any) -> "Weight":
        """The same node for products in that dtype."""
        ...


def is_node(w: Any) -> bool:
    """Whether `w` is a weight node rather than an array (use as ``is_leaf`` in tree functions).

    Example:
        >>> from jaxml import quant
        >>> w = jnp.ones((64, 2))
        >>> is_node(w), is_node(quant.nf4.quantize(w))
        (False, True)
    """
    return all(hasattr(w, name) for name in ("matmul", "take", "dense", "astype"))


def dot(x: Array, w: Array | Weight, transpose: bool = False) -> Array:
    """x·w over the last axis of `x` and the first of `w`, or x·wᵀ; the result has x's dtype.

    Raises:
        ValueError: these axes differ in length.

    Example:
        >>> import jax.numpy as jnp
        >>> dot(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
        (2, 4)
    """
    summed = w.shape[-1 if transpose else -2]
    if x.shape[-1] != summed:
        raise ValueError(
            f"weights.dot: the last axis of x is as long as the one it is summed over with, {summed}, got x {x.shape} "
            f"and a weight {w.shape}{', transposed' if transpose else ''}."
        )
    if is_node(w):
        return w.matmul(x, transpose)
    w = w.astype(x.dtype)
    return jnp.matmul(x, w.swapaxes(-1, -2) if transpose else w)


def einsum(spec: str, x: Array, w: Array | Weight) -> Array:
    """``jnp.einsum(spec, x, w)`` with a weight on the right, accumulated in float32.

    With a node, one letter of its last two axes is summed over, the other one stays, and letters before them are of a
    batch: "...D,DF->...F", "...D,VD->...V", "ETD,EDF->ETF".

    Example:
        >>> import jax.numpy as jnp
        >>> einsum("...D,VD->...V", jnp.ones((2, 3)), jnp.ones((5, 3))).shape
        (2, 5)
    """
    if not is_node(w):
        return jnp.einsum(spec, x, w.astype(x.dtype), preferred_element_type=wide(x.dtype))
    left, right, out = (part.replace("...", "") for part in spec.replace("->", ",").split(","))
    *batch, first, second = right
    transpose = second in left
    summed, kept = (second, first) if transpose else (first, second)
    rest = [letter for letter in left if letter not in (*batch, summed)]
    if summed not in left or summed in out or kept not in out or kept in left or not set(batch) <= set(left):
        raise ValueError(
            f"einsum: with a weight node one of its last two axes is summed over and the other one kept, got {spec!r}. "
            "Give the array (w.dense())."
        )
    free = x.ndim - len(left) if "..." in spec else 0
    if not batch:
        x = jnp.einsum(f"...{left}->...{''.join(rest)}{summed}", x)
        return jnp.einsum(f"...{''.join(rest)}{kept}->...{out}", dot(x, w, transpose))
    x = jnp.einsum(f"...{left}->{''.join(batch)}...{''.join(rest)}{summed}", x)
    lead, middle = x.shape[: len(batch)], x.shape[len(batch) : -1]
    y = dot(x.reshape(*lead, -1, x.shape[-1]), w, transpose)
    y = y.reshape(*lead, *middle, y.shape[-1])
    y = jnp.moveaxis(y, range(len(batch), len(batch) + free), range(free))
    return jnp.einsum(f"...{''.join(batch)}{''.join(rest)}{kept}->...{out}", y)


def take(w: Array | Weight, ids: Int[Array, "..."]) -> Array:
    """Rows of a table [V, D].

    Example:
        >>> import jax.numpy as jnp
        >>> take(jnp.ones((5, 3)), jnp.array([[0, 4]])).shape
        (1, 2, 3)
    """
    return w.take(ids) if is_node(w) else jnp.take(w, ids, axis=0)


def dense(w: Array | Weight) -> Array:
    """The array that a weight stands for.

    Example:
        >>> from jaxml import quant
        >>> w = jnp.ones((64, 2))
        >>> bool((dense(quant.nf4.quantize(w, double=False)) == w).all()), dense(w) is w
        (True, True)
    """
    return w.dense() if is_node(w) else w


def materialized(function: Callable) -> Callable:
    """A function of ordinary parameters that may be given weight nodes anywhere in its first argument.

    The nodes become arrays inside a checkpoint, so that a backward pass keeps the nodes and not the arrays: all arrays
    of the call exist at once, but no longer than it runs. Wrap a layer rather than the whole model, or call `dot`,
    which is faster and needs less.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxml import quant
        >>> layer = materialized(lambda params, x: jnp.tanh(x @ params["kernel"]))
        >>> w = jax.random.normal(jax.random.key(0), (64, 8))
        >>> layer({"kernel": quant.nf4.quantize(w)}, jnp.ones((2, 64))).shape
        (2, 8)
    """

    @functools.wraps(function)
    def call(params, *args, **kwargs):
        inside = lambda params, *args: function(jax.tree.map(dense, params, is_leaf=is_node), *args, **kwargs)
        return jax.checkpoint(inside)(params, *args)

    return call


# ---- layers that are stacked ------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """A part of a node that all stacked layers have in common: no axis of layers in front.

    Example:
        >>> layers = {"w": jnp.ones((3, 4, 5)), "scale": Shared(jnp.ones(4))}
        >>> second = layer_of(layers, lambda stacked: stacked[1])
        >>> second["w"].shape, second["scale"].value.shape
        ((4, 5), (4,))
    """

    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(Shared):
    """A part of a node that has a number for each row of the batch: which of many adapters or prompts it takes.

    Example:
        >>> params = {"adapter": Rows(jnp.array([2, 0, 1]))}  # of a batch of three
        >>> of_rows(params, [0, 2])["adapter"].value.tolist()
        [2, 1]
    """

    value: Int[Array, "B"]


def of_rows(params: Any, rows: Any) -> Any:
    """The same parameters for a part of the batch, whose rows are named by their numbers.

    Raises:
        IndexError: a row that the parameters say nothing about.

    Example:
        >>> params = {"w": jnp.ones((4, 4)), "adapter": Rows(jnp.array([2, 0, 1]))}
        >>> part = of_rows(params, [1])
        >>> part["w"].shape, part["adapter"].value.tolist()
        ((4, 4), [0])
    """

    def one(x):
        if not isinstance(x, Rows):
            return x
        if max(rows, default=-1) >= x.value.shape[0]:
            raise IndexError(
                f"weights: `select` said what {x.value.shape[0]} rows take, and row {max(rows)} is asked for. "
                "Select for all rows."
            )
        return Rows(x.value[jnp.asarray(rows, jnp.int32)])

    return jax.tree.map(one, params, is_leaf=is_shared)


def has_rows(params: Any) -> bool:
    """Whether any part has a number for each row of the batch.

    Example:
        >>> has_rows({"adapter": Rows(jnp.array([2, 0]))}), has_rows({"adapter": Shared(jnp.array([2, 0]))})
        (True, False)
    """
    return any(isinstance(x, Rows) for x in jax.tree.leaves(params, is_leaf=is_shared))


def is_shared(x: Any) -> bool:
    """Whether all stacked layers have this part in common.

    Example:
        >>> is_shared(Shared(1.0)), is_shared(Rows(jnp.array([2, 0]))), is_shared(1.0)
        (True, True, False)
    """
    return isinstance(x, Shared)


def value(x: Any) -> Any:
    """What a part holds, shared or not.

    Example:
        >>> value(Shared(2.0)), value(3.0)
        (2.0, 3.0)
    """
    return x.value if is_shared(x) else x


def layer_of(layers: Any, pick: Callable[[Array], Array]) -> Any:
    """`pick` of every stacked array; shared parts as they are.

    Example:
        >>> layers = {"bias": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "scale": Shared(jnp.array([5.0, 6.0]))}
        >>> first = layer_of(layers, lambda stacked: stacked[0])
        >>> first["bias"].tolist(), value(first["scale"]).tolist()
        ([1.0, 2.0], [5.0, 6.0])
    """
    return jax.tree.map(lambda a: a if is_shared(a) else pick(a), layers, is_leaf=is_shared)


def apart(layers: Any) -> tuple[Any, Callable[[Any], Any]]:
    """(stacked parts alone, to scan over; what puts shared parts back into a slice of them).

    Example:
        >>> stacked, join = apart({"bias": jnp.array([1.0, 2.0, 3.0]), "scale": Shared(jnp.array(10.0))})
        >>> def add(x, part):
        ...     layer = join(part)
        ...     return x + layer["bias"] * value(layer["scale"]), None
        >>> float(jax.lax.scan(add, jnp.array(0.0), stacked)[0])
        60.0
    """
    leaves, tree = jax.tree.flatten(layers, is_leaf=is_shared)
    common = [leaf if is_shared(leaf) else None for leaf in leaves]
    join = lambda leaves: tree.unflatten([leaf if c is None else c for leaf, c in zip(leaves, common)])
    return [None if is_shared(leaf) else leaf for leaf in leaves], join
