"""What is spread over which axis of a mesh: one table of logical axes, one of weights by name.

An array's spec is read off its name and its shape; an axis whose length the mesh does not divide is not spread. The
weights of a layer are whole (over fsdp) only while the layer runs, forwards and backwards: `whole`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml import weights
from jaxml.axes import Array
from jaxml.linear import linear
from jaxml.parallel.mesh import automatic, live

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "replica": ("data", "expert"),  # rows that are gathered over fsdp
    "length": ("context",),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocabulary": ("tensor",),
    "experts": ("expert",),
}

# Matrices [..., in, out] of a decoder. Tables are [V, D]; an adapter of the head leads from D to V.
MATRICES: dict[str, tuple[str, str]] = {
    "q": ("width", "heads"),
    "k": ("width", "heads"),
    "v": ("width", "heads"),
    "o": ("heads", "width"),
    "gate": ("width", "hidden"),
    "up": ("width", "hidden"),
    "down": ("hidden", "width"),
    "up_base": ("width", "hidden"),
    "up_coef": ("width", "hidden"),
    "down_base": ("hidden", "width"),
    "down_coef": ("hidden", "width"),
    "embed": ("vocabulary", "width"),
    "head": ("vocabulary", "width"),
}
TURNED = ("head",)
Axis = str | tuple[str, ...] | None  # a logical axis, several that share one, or none
WHOLE = "whole"  # of gathered weights: they are gathered again backwards, not kept


def logical(path: str, ndim: int, names: Mapping[str, tuple[Axis, ...]] = MATRICES) -> tuple[Axis, ...]:
    """The logical axes of an array by its path in a tree of parameters; of an unknown one, none.

    Axes in front that the table does not speak of (layers, functions of a basis) are not spread.

    Example:
        >>> logical("layers/q", 3), logical("layers/q/b", 3), logical("layers/o_bias", 2)
        ((None, 'width', 'heads'), (None, None, ('heads', 'width')), (None, 'width'))
    """
    nothing = (None,) * ndim
    parts = path.split("/")
    found = [i for i, part in enumerate(parts) if part.removesuffix("_bias") in names]
    if not found:
        return nothing
    name, rest = parts[found[-1]], [part for part in parts[found[-1] + 1 :] if part not in ("base", "value")]
    axes = names[name.removesuffix("_bias")]
    field = rest[-1] if rest else ""
    if len(axes) != 2:
        return _right(axes, ndim) if not field else nothing
    first, last = axes[::-1] if name in TURNED else axes  # from inputs to outputs
    of = {
        "": (last,) if name.endswith("_bias") else axes,
        "a": (_both(first), None),
        "b": (None, _both(last)),
        "inner": (_both(first),),
        "outer": (_both(last),),
        "magnitude": (_both(last),),
        "squares": (_both(last),),
        # Of a quantised matrix the outputs lie in rows, along which its blocks run; of a table the rows are its own.
        "codes": axes if name in ("embed", "head") else axes[::-1],
    }
    of["scales"] = of["codes"] if "nested" not in rest else ()
    return _right(of.get(field, ()), ndim)


def spec(axes: tuple[Axis, ...], shape: tuple[int, ...], sizes: Mapping[str, int], without: str = "") -> P:
    """Logical axes as mesh axes: of each as many of its row in the table as divide the length.

    Example:
        >>> sizes = {"data": 2, "fsdp": 4, "tensor": 2}
        >>> tuple(spec(("batch", None), (8, 3), sizes)), tuple(spec(("width", "heads"), (6, 32), sizes))
        ((('data', 'fsdp'), None), (None, 'tensor'))
    """
    taken = {without}

    def one(axis: Axis, length: int):
        names = [name for part in ((axis,) if isinstance(axis, str) else axis or ()) for name in RULES[part]]
        found = dividing(length, [n for n in names if sizes.get(n, 1) > 1 and n not in taken], sizes)
        taken.update((found,) if isinstance(found, str) else found or ())
        return found

    return P(*(one(axis, length) for axis, length in zip(axes, shape, strict=True)))


def dividing(length: int, names: Sequence[str], sizes: Mapping[str, int]) -> Any:
    """As many of these mesh axes as divide a length, as an entry of a `PartitionSpec`.

    Example:
        >>> dividing(8, ["data", "fsdp"], {"data": 2, "fsdp": 4}), dividing(6, ["data", "fsdp"], {"data": 2, "fsdp": 4})
        (('data', 'fsdp'), 'data')
    """
    found = list(names)
    while found and length % math.prod(sizes[name] for name in found):
        found.pop()
    return tuple(found) if len(found) > 1 else found[0] if found else None


def parts(sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh cuts the rows of a batch.

    Example:
        >>> parts({"data": 2, "fsdp": 4, "expert": 1, "tensor": 8})
        8
    """
    return math.prod(sizes[axis] for axis in RULES["batch"])


def shardings(tree: Any, on: Mesh, names: Mapping[str, tuple[Axis, ...]] | None = None) -> Any:
    """A tree like `tree` with a `NamedSharding` for each array (shapes are enough).

    Args:
        tree: parameters of a decoder, with adapters and quantised weights anywhere, or the trainable part of them.
        names: logical axes of matrices of one's own, by the last part of their paths that is in the table.

    Example:
        >>> from jaxml import parallel, testing
        >>> on = parallel.mesh(fsdp=-1)
        >>> found = shardings(testing.tiny_model(width=8 * on.size).params, on)["layers"]["q"]
        >>> found.shard_shape((2, 8 * on.size, 32))
        (2, 8, 32)
    """
    if not isinstance(on, Mesh):
        raise TypeError(f"parallel.shard: on is a mesh (`jaxml.parallel.mesh`, or `parse`), got {on!r}.")
    sizes = dict(on.shape)
    place = lambda axes, a: NamedSharding(on, spec(axes, jnp.shape(a), sizes))
    return _with_axes(place, tree, MATRICES | dict(names or {}))


def shard(tree: Any, on: Mesh, names: Mapping[str, tuple[Axis, ...]] | None = None) -> Any:
    """The same arrays, each spread over the devices of a mesh as `shardings` says.

    Where several processes make up the mesh, each is given the whole arrays and keeps the parts of its own devices.

    Example:
        >>> from jaxml import parallel, testing
        >>> params = shard(testing.tiny_model().params, parallel.mesh(fsdp=-1))
        >>> sorted(params)
        ['embed', 'layers', 'norm']
    """
    return jax.tree.map(put, tree, shardings(tree, on, names))


def put(a: Any, sharding: NamedSharding) -> Array:
    """An array that this process has whole, on the devices of all processes.

    Example:
        >>> from jaxml import parallel
        >>> put(jnp.ones((8, 4)), NamedSharding(parallel.mesh(data=-1), P())).shape
        (8, 4)
    """
    if isinstance(a, jax.Array) and a.sharding == sharding:
        return a
    if sharding.is_fully_addressable or (isinstance(a, jax.Array) and not a.is_fully_addressable):
        return jax.device_put(a, sharding)
    return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])


# ---- within a program -------------------------------------------------------------------------------


def hint(x: Array, *axes: Axis) -> Array:
    """The same array, spread by its logical axes over the mesh that is set; as it is where there is none.

    Example:
        >>> hint(jnp.ones((4, 8)), "batch", None).shape
        (4, 8)
    """
    if unknown := [axis for axis in axes if not _known(axis)]:
        raise ValueError(f"parallel.hint: an axis is one of {', '.join(RULES)}, or None, got {unknown[0]!r}.")
    sizes = live()
    if sizes and len(axes) != x.ndim:
        raise ValueError(f"parallel.hint: each axis of the array has its own, got {len(axes)} for {x.ndim}.")
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes)) if sizes else x


def whole(layer: Any) -> Any:
    """A layer's weights without their spread over fsdp, to be used and let go.

    Their gradients come back spread. Of quantised weights it is the codes that are gathered.

    Example:
        >>> from jaxml import parallel
        >>> on = parallel.mesh(fsdp=-1)
        >>> layer = shard({"q": jnp.ones((8 * on.size, 4))}, on)
        >>> with jax.set_mesh(on):
        ...     gathered = jax.jit(whole)(layer)["q"]
        >>> layer["q"].addressable_shards[0].data.shape, gathered.addressable_shards[0].data.shape == gathered.shape
        ((8, 4), True)
    """
    sizes = live()
    if "fsdp" not in sizes:
        return layer

    def one(axes, w):
        spread, gathered = spec(axes, w.shape, sizes), spec(axes, w.shape, sizes, without="fsdp")
        return w if spread == gathered else _gather(w, gathered, spread)

    return _with_axes(one, layer, MATRICES)


def take(table: Any, tokens: Array) -> Array:
    """Rows of a table [V, D] for tokens [B, T], wherever they lie.

    Every device looks in its own part of the rows and of the width for all tokens of its replica; what it found then
    goes where the token's row of the batch is. The table itself stays where it is.

    Example:
        >>> from jaxml import parallel
        >>> table = jnp.arange(16.0).reshape(2, 8)
        >>> with jax.set_mesh(parallel.mesh(fsdp=-1)):
        ...     jax.jit(take)(table, jnp.array([[1, 0, 1]]))[..., 0].tolist()
        [[8.0, 0.0, 8.0]]
    """
    sizes = live()
    if not sizes:
        return weights.take(table, tokens)
    tokens = hint(tokens, "replica", "length")
    if weights.is_node(table):
        return hint(weights.take(table, tokens), "replica", "length", "width")
    of_tokens, of_table = spec(("replica", "length"), tokens.shape, sizes), spec(MATRICES["embed"], table.shape, sizes)

    def part(table, tokens):
        if of_table[0] is None:
            return jnp.take(table, tokens, axis=0)
        at = tokens - jax.lax.axis_index(of_table[0]) * table.shape[0]
        found = jnp.take(table, at, axis=0, mode="fill", fill_value=0)
        return jax.lax.psum(jnp.where((at >= 0)[..., None], found, 0), of_table[0])  # -1 would be the last row

    specs = dict(in_specs=(of_table, of_tokens), out_specs=P(*of_tokens, of_table[1]))
    return jax.shard_map(part, **specs, axis_names=automatic())(table, tokens)


def gathering(run: Any, scanned: bool, static_argnums: tuple[int, ...] = ()) -> Any:
    """A layer whose gathered weights are gathered again for its backward pass, so that none is kept.

    Example:
        >>> run = lambda x, layer: jnp.matmul(x, whole(layer)["q"])
        >>> on = jax.sharding.AbstractMesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> with jax.sharding.use_abstract_mesh(on):
        ...     made = jax.make_jaxpr(gathering(run, scanned=False))(jnp.ones((2, 8)), {"q": jnp.ones((8, 4))})
        >>> [str(eqn.primitive).startswith(("remat", "checkpoint")) for eqn in made.eqns]
        [True]
    """
    if "fsdp" not in live():
        return run
    kept = lambda primitive, *_, **how: primitive.name != "sharding_constraint" and how.get("name") != WHOLE
    return jax.checkpoint(run, policy=kept, prevent_cse=not scanned, static_argnums=static_argnums)


def _gather(w: Array, gathered: P, spread: P) -> Array:
    constrain = jax.lax.with_sharding_constraint
    if not jnp.issubdtype(w.dtype, jnp.floating):
        return constrain(w, gathered)
    return linear(lambda _, w: constrain(w, gathered), lambda _, ct: constrain(ct, spread), (), w, name=WHOLE)


def _with_axes(function: Any, tree: Any, names: Mapping[str, tuple[Axis, ...]]) -> Any:
    """function(logical axes, array) of every array."""
    in_one_run = lambda w: not getattr(w, "in_rows", True)  # a quantised matrix without rows: nothing to cut along

    def one(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if in_one_run(leaf):
            return jax.tree.map(lambda a: function((None,) * jnp.ndim(a), a), leaf)
        return function(logical(path, jnp.ndim(leaf), names), leaf)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=in_one_run)


def _known(axis: Any) -> bool:
    return axis is None or all(name in RULES for name in ((axis,) if isinstance(axis, str) else axis))


def _both(axis: str) -> Axis:
    """Of an array with one long axis: over fsdp as well."""
    return axis if axis == "width" else (axis, "width")


def _right(axes: tuple[Axis, ...], ndim: int) -> tuple[Axis, ...]:
    """These axes as the last ones of an array."""
    return (None,) * (ndim - len(axes)) + axes if len(axes) <= ndim else (None,) * ndim
