"""Adapted trees taken apart and put together: what is trained, what is not, and the plain model of both."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxml import paths, weights
from jaxml.axes import Array, Params
from jaxml.quant import QArray
from jaxml.tune.adapters.nodes import Adapter, LoRA, Scaled, Stack, Whole
from jaxml.weights import is_node


def is_adapter(w: Any) -> bool:
    """Whether a weight is one of the nodes of this package, or a trained prompt.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> layers = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, targets=["q"])["layers"]
        >>> is_adapter(layers["q"]), is_adapter(layers["k"])
        (True, False)
    """
    return isinstance(w, Adapter)


def of(params: Params) -> dict[str, Any]:
    """Adapters by path.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, targets=["q", "v"])
        >>> {path: w.rank for path, w in of(params).items()}
        {'layers/q': 2, 'layers/v': 2}
    """
    return {path: w for path, w in paths.named(params).items() if is_adapter(w)}


def check_shapes(nodes: Sequence[Any], path: str, name: str) -> None:
    """Refuses adapters around weights of different shapes. `name` is the caller's, for errors.

    Example:
        >>> check_shapes([jnp.ones((2, 3)), jnp.ones((2, 4))], "layers/q", "adapters.stack")
        Traceback (most recent call last):
            ...
        ValueError: adapters.stack: the adapters are of one model, layers/q is of the shapes [(2, 3), (2, 4)].
    """
    if len(shapes := {tuple(w.shape) for w in nodes}) > 1:
        raise ValueError(f"{name}: the adapters are of one model, {path} is of the shapes {sorted(shapes)}.")


def has_adapters(params: Params) -> bool:
    """Whether an adapter stands anywhere in the tree.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, targets=["q"])
        >>> has_adapters(params), has_adapters(detach(params))
        (True, False)
    """
    return bool(of(params))


def split(params: Params) -> tuple[Params, Params]:
    """(trainable, frozen): what adapters train, by path and name, and everything else.

    Without adapters all is trainable.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=4, targets=["q"])
        >>> jax.tree.map(jnp.shape, split(params)[0])
        {'layers': {'q': {'a': (2, 32, 4), 'b': (2, 4, 32)}}}
    """
    found = of(params)
    if not found:
        return params, {}
    trainable: dict[str, Any] = {}
    for path, w in found.items():
        *above, name = path.split("/")
        place = trainable
        for part in above:
            place = place.setdefault(part, {})
        place[name] = {field: getattr(w, field) for field in w.train}
    bare = {path: dataclasses.replace(w, **dict.fromkeys(w.train)) for path, w in found.items()}
    return trainable, paths.replaced(params, bare)


def combine(trainable: Params, frozen: Params) -> Params:
    """The tree that `split` took apart; the frozen part may be unrolled (`decoder.unstack`) in between.

    Raises:
        ValueError: parts of different trees (names the first adapter that lacks its own).

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, targets=["q"])
        >>> has_adapters(combine(*split(params)))
        True
    """
    if not frozen:
        return trainable

    def put(path, leaf):
        if not is_adapter(leaf) or not leaf.train:
            return leaf
        place, layer = trainable, None
        for entry in path:
            part = jax.tree_util.keystr((entry,), simple=True)
            if isinstance(place, Mapping) and part in place:
                place = place[part]
            else:  # a layer of those that lie stacked in the trainable tree
                layer = getattr(entry, "idx", None)
        if not isinstance(place, Mapping) or set(place) != set(leaf.train):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"adapters.combine: {where} is trained in {', '.join(leaf.train)}, which the trainable part lacks. "
                "Both parts come from one `split`."
            )
        return dataclasses.replace(leaf, **(place if layer is None else jax.tree.map(lambda a: a[layer], place)))

    return jax.tree_util.tree_map_with_path(put, frozen, is_leaf=is_node)


def detach(params: Params) -> Params:
    """The model under the adapters.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, targets=["q"])
        >>> detach(params)["layers"]["q"].shape
        (2, 32, 32)
    """
    bare = jax.tree.map(lambda w: w.base if is_adapter(w) else w, params, is_leaf=is_node)
    return (
        {k: w for k, w in bare.items() if w is not None} if isinstance(bare, Mapping) else bare
    )  # prompts: of nothing


def merge(params: Params, *, requantize: bool = False) -> Params:
    """A plain model that computes the same: adapters in their matrices, and every weight an array.

    An embedding that is adapted no longer serves as head: the tree then holds a head of its own.

    Args:
        requantize: leave quantised weights so, and quantise anew those that an adapter went into (the sum is rounded
            again).

    Raises:
        ValueError: many adapters in one stack (`take` one first).

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, targets=["q"])
        >>> merge(params)["layers"]["q"].shape
        (2, 32, 32)
    """

    def one(w):
        if not is_node(w) or (requantize and isinstance(w, QArray)):
            return w
        if requantize and is_adapter(w) and isinstance(w.base, QArray):
            return w.base.like(w.dense())
        return w.dense()

    out = jax.tree.map(one, params, is_leaf=is_node)
    embed = params.get("embed") if isinstance(params, Mapping) else None
    if is_adapter(embed) and "head" not in params:
        out["head"] = one(getattr(embed, "untied", embed))
    return out


def unmerge(merged: Params, adapted: Params) -> Params:
    """Adapters around what is left of merged matrices when their part is taken out again.

    Args:
        merged: as `merge` gave it.
        adapted: the adapters; their own matrices are not looked at, and may be None (but of what is trained `whole`).

    Raises:
        ValueError: merged weights that are missing, of another shape or quantised; what merging has lost: of IA³ where
            a factor is 0, of DoRA where a magnitude is 0 or an output has grown by more than it was (two matrices then
            merge into the same), of a `Whole` without its base.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), start="orthogonal")
        >>> again = unmerge(merge(params), params)
        >>> float(jnp.abs(again["layers"]["q"].base - params["layers"]["q"].base).max()) < 1e-6
        True
    """
    plain, found, new = paths.named(merged), of(adapted), {}
    for path, w in found.items():
        if path not in plain or is_node(plain[path]):
            got = "nothing" if path not in plain else f"a {type(plain[path]).__name__}"
            raise ValueError(f"adapters.unmerge: {path} is an array that `merge` gave, got {got}.")
        if w.base is not None and w.shape != plain[path].shape:
            raise ValueError(f"adapters.unmerge: {path} is of the shape {w.shape}, got {plain[path].shape}.")
        new[path] = dataclasses.replace(w, base=_without(path, w, plain[path]))
    out = paths.replaced(merged, new)
    if "embed" in found and "head" not in adapted:
        out.pop("head", None)
    return out


def _without(path: str, w: Any, merged: Array) -> Array:
    if isinstance(w, Whole):
        if w.base is None:
            raise ValueError(f"adapters.unmerge: {path} was trained whole; what it was before is not in its values.")
        return w.base
    if isinstance(w, Scaled):
        if any(_some(v == 0) for v in (w.inner, w.outer) if v is not None):
            raise ValueError(f"adapters.unmerge: a factor of {path} is 0; what it was multiplied with is lost.")
        inverse = lambda v: None if v is None else 1 / v
        return Scaled(merged, inverse(w.inner), inverse(w.outer)).dense()
    if isinstance(w, Stack):
        raise ValueError(f"adapters.unmerge: {path} has many adapters. Take one first.")
    wide = merged.astype(jnp.float32)
    delta = dataclasses.replace(w, base=merged).delta()
    delta = delta.swapaxes(-1, -2) if w.transposed else delta
    if delta.shape != merged.shape:
        raise ValueError(f"adapters.unmerge: {path} is of the shape {delta.shape}, got {merged.shape}.")
    if w.magnitude is not None:
        # W = W′·c/m − Δ where c = ‖W + Δ‖ for each output; ‖W‖² is known, which makes c a root.
        axis = -1 if w.transposed else -2
        m = w.magnitude.astype(jnp.float32)
        grown = jnp.sum(delta**2, axis)
        if _some((m == 0) | (grown >= w.squares)):
            raise ValueError(
                f"adapters.unmerge: an output of {path} has the magnitude 0 or has grown by more than it was; what it "
                "was cannot be told from that. Keep the adapter apart instead."
            )
        half = jnp.sum(wide * delta, axis) / m
        c = half + jnp.sqrt(jnp.maximum(half**2 - grown + w.squares, 0))
        wide = wide * jnp.expand_dims(c / m, axis)
    return (wide - delta).astype(merged.dtype)


def _some(wrong: Array) -> bool:
    """Whether it is so anywhere; nothing is known of traced values."""
    return not isinstance(wrong, jax.core.Tracer) and bool(wrong.any())


def delta(params: Params) -> dict[str, Array]:
    """What each adapter adds to its weight, as stored, by path.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, targets=["q"])
        >>> {path: change.shape for path, change in delta(params).items()}
        {'layers/q': (2, 32, 32)}
    """

    def one(w):
        if isinstance(w, LoRA) and w.magnitude is None:
            of = w.delta()
            return of.swapaxes(-1, -2) if w.transposed else of
        return w.dense().astype(jnp.float32) - weights.dense(w.base).astype(jnp.float32)

    return {path: one(w) for path, w in of(params).items()}


def plain(adapted: Params, begun: Params, params: Params) -> Params:
    """Adapters whose start moved a part of W, as ordinary LoRAs of twice the rank around W itself.

    s·(A B − A₀ B₀) is a LoRA with A and A₀ side by side, B and −B₀ one above the other, and the same s.

    Args:
        adapted: after training.
        begun: as `attach` gave it.
        params: the model before `attach`.

    Raises:
        ValueError: an adapter that is no LoRA, or with magnitudes.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = testing.tiny_model().params
        >>> begun = adapters.attach(params, jax.random.key(0), rank=2, targets=["q"], start="pissa")
        >>> of(plain(begun, begun, params))["layers/q"].rank
        4
    """
    new, found, before = {}, of(begun), paths.named(params)
    for path, w in of(adapted).items():
        if not isinstance(w, LoRA) or w.method != "lora" or w.magnitude is not None or path not in found:
            raise ValueError(f"adapters.plain: adapters are LoRAs without magnitudes, {path} is none of `begun`'s.")
        a = jnp.concatenate([w.a, found[path].a], axis=-1)
        b = jnp.concatenate([w.b, -found[path].b], axis=-2)
        if w.ranks:  # each layer's own columns first
            turn = [[*range(r), *range(w.rank, w.rank + r)] for r in w.ranks]
            turn = jnp.array([t + [j for j in range(2 * w.rank) if j not in t] for t in turn])
            a, b = jnp.take_along_axis(a, turn[:, None], -1), jnp.take_along_axis(b, turn[:, :, None], -2)
        ranks = w.ranks and tuple(2 * r for r in w.ranks)
        new[path] = dataclasses.replace(w, base=before[path], a=a, b=b, ranks=ranks, start="default")
    return paths.replaced(params, new)


def with_key(params: Params, key: Array) -> Params:
    """The same adapters, which drop out what `key` decides; one for each step of training.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, targets=["q"])
        >>> with_key(params, jax.random.key(1))["layers"]["q"].dropout
        0.0
    """
    found = {path: w for path, w in of(params).items() if getattr(w, "dropout", 0)}
    new = {}
    for i, (path, w) in enumerate(found.items()):
        keys = jax.random.split(jax.random.fold_in(key, i), w.scale.shape or 1)
        new[path] = dataclasses.replace(w, key=keys if w.scale.shape else keys[0])
    return paths.replaced(params, new) if new else params
