"""Short queries: the heads that share keys become more rows of one head, so that a kernel's tiles are full."""

import dataclasses

import jax.numpy as jnp

from jaxml.attention.tiles import Inputs
from jaxml.axes import Array

MOST = 64  # queries; longer ones fill tiles by themselves


@dataclasses.dataclass(frozen=True)
class Fold:
    """Query heads that share keys lie one after the other along the queries."""

    group: int
    index: Array  # [1, T · group]: which query
    head: Array  # [1, T · group]: which of the group


def folds(x: Inputs) -> Fold | None:
    T, N, K = x.query.shape[1], x.query.shape[2], x.key.shape[2]
    group = N // K
    if group == 1 or T > MOST:
        return None
    place = jnp.arange(T * group, dtype=jnp.int32)[None]
    return Fold(group, place // group, place % group)


def folded(x: Inputs, fold: Fold) -> Inputs:
    """The same call with one query head for each key head and `group` times as many queries."""
    T, N = x.query.shape[1:3]
    G, K = fold.group, N // fold.group

    def four(a):
        b, n, t, s = a.shape
        if n > 1:
            a = jnp.broadcast_to(a, (b, n, T, s)).reshape(b, K, G, T, s)
            return jnp.swapaxes(a, 2, 3).reshape(b, K, T * G, s)
        return jnp.repeat(a, G, axis=2) if t > 1 else a

    lay = {"row": lambda a: jnp.repeat(a, G, axis=1), "both": four}
    mask = None if x.mask is None else x.mask.map(lambda role, a: lay.get(role, lambda a: a)(a))
    bias = None if x.bias is None else four(x.bias)
    return x._replace(query=folded_queries(x.query, fold), mask=mask, bias=bias)


def unfold(a: Array, fold: Fold | None) -> Array:
    """[B, K, T · group, …] → [B, N, T, …]."""
    if fold is None:
        return a
    B, K, rows = a.shape[:3]
    a = a.reshape(B, K, rows // fold.group, fold.group, *a.shape[3:])
    return jnp.swapaxes(a, 2, 3).reshape(B, K * fold.group, rows // fold.group, *a.shape[4:])


def folded_queries(a: Array, fold: Fold | None) -> Array:
    """[B, T, N, H] → [B, T · group, K, H]."""
    if fold is None:
        return a
    B, T, N, H = a.shape
    return a.reshape(B, T, N // fold.group, fold.group, H).swapaxes(2, 3).reshape(B, T * fold.group, -1, H)


def folded_rows(a: Array, fold: Fold | None) -> Array:
    """[B, N, T] → [B, K, T · group]; what `unfold` undoes."""
    if fold is None:
        return a
    B, N, T = a.shape
    return a.reshape(B, N // fold.group, fold.group, T).swapaxes(2, 3).reshape(B, N // fold.group, T * fold.group)
