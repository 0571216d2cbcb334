"""Matrices of a tree of parameters by name, and patterns that choose among them."""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Params
from jaxml.weights import Weight, is_node

# Of a decoder: matrices of layers [..., in, out], and tables [V, D] that are only meant where they are named.
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
ALL_LINEAR = tuple(f"layers/{name}" for name in MATRICES)
TABLES = ("embed", "head")


def path_of(path: Any) -> str:
    """ "layers/attn/kernel" of a key path; fields, keys and places are spelled alike, as Orbax stores them.

    Example:
        >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"a": [1]})
        >>> path_of(path)
        'a/0'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(params: Params) -> dict[str, Array | Weight]:
    """Every weight, array or node, by its path.

    Example:
        >>> import jax.numpy as jnp
        >>> list(named({"layers": [{"q": jnp.ones(2)}], "norm": jnp.ones(2)}))
        ['layers/0/q', 'norm']
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node)
    return {path_of(path): leaf for path, leaf in leaves}


def replaced(params: Params, new: dict[str, Any]) -> Params:
    """The tree with other weights at some paths.

    Example:
        >>> replaced({"layers": [{"k": 1, "q": 2}], "norm": 3}, {"layers/0/q": 10})
        {'layers': [{'k': 1, 'q': 10}], 'norm': 3}
    """
    put = lambda path, leaf: new.get(path_of(path), leaf)
    return jax.tree_util.tree_map_with_path(put, params, is_leaf=is_node)


def matrices(params: Params) -> dict[str, Array | Weight]:
    """The weights that products are taken with, by path: of a decoder's tree by name, of any other by shape.

    Example:
        >>> stack = jnp.ones((2, 4, 4))
        >>> list(matrices({"embed": stack[0], "layers": {"q": stack, "norm": stack[0]}}))
        ['embed', 'layers/q']
        >>> list(matrices({"dense": {"kernel": stack[0], "bias": stack[0, 0]}}))
        ['dense/kernel']
    """
    found = named(params)
    if {"embed", "layers"} <= set(params):
        # Stacked vectors have the shape of matrices; layers are a dictionary of stacks or a tuple of layers.
        kept = lambda path: path in TABLES or (path.startswith("layers/") and path.rsplit("/", 1)[-1] in MATRICES)
        return {path: w for path, w in found.items() if kept(path)}
    is_matrix = lambda w: is_node(w) or (w.ndim >= 2 and jnp.issubdtype(w.dtype, jnp.floating))
    return {path: w for path, w in found.items() if is_matrix(w)}


def match(paths: Iterable[str], patterns: str | Sequence[str], who: str) -> list[str]:
    """The paths that any pattern matches, in their order.

    Raises:
        ValueError: a pattern that matches nothing (lists the paths).

    Example:
        >>> match(["layers/q", "layers/k", "layers/up"], ["up", "layers/q"], "lora")
        ['layers/q', 'layers/up']
        >>> match(["layers/q", "layers/k"], "query", "lora")
        Traceback (most recent call last):
            ...
        ValueError: lora: a pattern matches at least one weight, got 'query'. There are layers/q, layers/k.
    """
    paths = list(paths)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise ValueError(
                f"{who}: a pattern matches at least one weight, got {pattern!r}. There are {', '.join(paths)}."
            )
    return [path for path in paths if any(matches(pattern, path) for pattern in patterns)]


def matches(pattern: str, path: str) -> bool:
    """Whether a shell pattern matches a path; one without "/" is matched with the last part alone.

    A decoder's embedding and head are matched by their names only.

    Example:
        >>> matches("q", "layers/q"), matches("layers/*", "layers/q"), matches("*", "embed"), matches("embed", "embed")
        (True, True, False, True)
    """
    if path in TABLES:
        return pattern == path
    return fnmatch.fnmatchcase(path if "/" in pattern else path.rsplit("/", 1)[-1], pattern)
