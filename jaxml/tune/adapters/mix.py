"""One adapter of several: sums, and sums that settle where adapters disagree."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxml import paths
from jaxml.axes import Array, Params
from jaxml.tune.adapters import starts
from jaxml.tune.adapters.nodes import LoRA
from jaxml.tune.adapters.tree import check_shapes, of

METHODS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def mix(
    adapted: Sequence[Params],
    factors: Sequence[float],
    method: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    sign: str = "total",
    key: Array | None = None,
) -> Params:
    """A tree with one LoRA around each weight, made of the LoRAs of several trees around the same model.

    | method | |
    |---|---|
    | linear | Σ f·s·A B taken apart into Σ √(f·s)·A and Σ √(f·s)·B: exact for one adapter only |
    | cat | A side by side, B one above the other: exactly Σ f·s·A B; ranks add up |
    | svd | the closest matrix of that rank to Σ f·s·A B |
    | ties | values that are not among the largest go, then those against the majority's sign |
    | dare_linear | values go by chance, the others grow in turn |
    | dare_ties | both |
    | magnitude_prune | values that are not among the largest go |

    The last four on A and B each, or, with "_svd" at the end of the name, on A B.

    Args:
        adapted: trees with LoRAs on the same weights, of one rank unless the method is cat or ends in svd.
        factors: of each tree; below 0 takes one away.
        method: as above.
        rank: of the result of svd and what ends in it (the largest of the ranks where None).
        density: share of the values that stay; of the last four.
        sign: how a majority is found: "total" of the values, or "frequency" of their signs.
        key: of chance.

    Raises:
        ValueError: a method that does not exist, what it needs missing, what it does not take, a factor that is not
            finite, trees that do not match.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = testing.tiny_model().params
        >>> two = [adapters.attach(params, jax.random.key(i), start="gaussian", rank=4) for i in range(2)]
        >>> mix(two, [0.7, 0.3], "cat")["layers"]["q"].rank
        8

    Reference:
        Yadav et al. 2023 (TIES); Yu et al. 2023 (DARE); as PEFT's `add_weighted_adapter` has them.
    """
    whole = method.removesuffix("_svd")
    product = method == "svd" or method.endswith("_svd")
    if whole not in METHODS or (method.endswith("_svd") and whole not in _PRUNED):
        names = (*METHODS, *(f"{name}_svd" for name in _PRUNED))
        raise ValueError(f"adapters.mix: method is one of {', '.join(names)}, got {method!r}.")
    if whole in _PRUNED and (density is None or not 0 < density <= 1):
        raise ValueError(f"adapters.mix: method {method!r} takes a density in (0, 1], got {density}.")
    if whole.startswith("dare") and key is None:
        raise ValueError(f"adapters.mix: method {method!r} takes a key, got None.")
    idle = {"density": density if whole not in _PRUNED else None, "rank": rank if not product else None}
    if unused := [name for name, value in idle.items() if value is not None]:
        raise ValueError(f"adapters.mix: method {method!r} takes no {unused[0]}, got {idle[unused[0]]}. Leave it out.")
    if sign not in ("total", "frequency"):
        raise ValueError(f"adapters.mix: sign is 'total' or 'frequency', got {sign!r}.")
    if not adapted or len(adapted) != len(factors):
        raise ValueError(f"adapters.mix: one factor for each tree, got {len(adapted)} and {len(factors)}.")
    if wrong := [f for f in factors if not isinstance(f, jax.core.Tracer) and not math.isfinite(f)]:
        raise ValueError(f"adapters.mix: factors are finite, got {wrong[0]}.")
    found = [of(tree) for tree in adapted]
    for other in found:
        for path, w in other.items():
            if not isinstance(w, LoRA) or w.magnitude is not None or w.diagonal is not None or w.ranks:
                raise ValueError(f"adapters.mix: adapters are plain LoRAs of one rank, that of {path} is not.")
        if set(other) != set(found[0]):
            raise ValueError(f"adapters.mix: trees adapt the same weights, got {set(other) ^ set(found[0])} in some.")
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(found[0]))
    reduce = _reduction(whole, density, sign)
    new = {}
    for k, path in zip(keys, found[0]):
        nodes = [other[path] for other in found]
        first, ranks = nodes[0], [w.rank for w in nodes]
        starts.check_shared_base(nodes, path, "adapters.mix")
        check_shapes(nodes, path, "adapters.mix")
        if not product and whole != "cat" and len(set(ranks)) > 1:
            raise ValueError(f"adapters.mix: method {method!r} takes one rank, got {ranks}. Take 'cat' or 'svd'.")
        each = lambda w, f: jnp.asarray(f) * w.scale[..., None, None]
        if whole == "cat":
            a = jnp.concatenate([w.a * each(w, f) for w, f in zip(nodes, factors)], axis=-1)
            b = jnp.concatenate([w.b for w in nodes], axis=-2)
        elif product:
            delta = reduce(k, [w.delta() for w in nodes], [jnp.asarray(f) for f in factors])
            a, b = _halves(delta, max(ranks) if rank is None else rank)
        else:
            sizes = [each(w, f) for w, f in zip(nodes, factors)]
            k1, k2 = jax.random.split(k)
            a = reduce(k1, [w.a for w in nodes], [jnp.sign(s) * jnp.sqrt(jnp.abs(s)) for s in sizes])
            b = reduce(k2, [w.b for w in nodes], [jnp.sqrt(jnp.abs(s)) for s in sizes])
        new[path] = dataclasses.replace(first, a=a, b=b, scale=jnp.ones_like(first.scale), start="default")
    return paths.replaced(adapted[0], new)


def _reduction(method: str, density: float | None, sign: str) -> Callable[[Array, list[Array], list[Array]], Array]:
    """(key, tensors, factors) → one tensor."""

    def reduce(key, tensors, factors):
        if method.startswith("dare"):
            keys = jax.random.split(key, len(tensors))
            tensors = [
                jnp.where(jax.random.bernoulli(k, density, t.shape), t / density, 0) for k, t in zip(keys, tensors)
            ]
        elif method in ("ties", "magnitude_prune"):
            tensors = [_largest(t, density) for t in tensors]
        stacked = jnp.stack(tensors)
        scaled = jnp.stack([t * f for t, f in zip(tensors, factors)])
        if not method.endswith("ties"):
            return scaled.sum(0)
        majority = (stacked if sign == "total" else jnp.sign(stacked)).sum(0)
        agree = jnp.sign(stacked) == jnp.where(majority >= 0, 1, -1)[None]
        return jnp.sum(scaled * agree, 0) / jnp.maximum(agree.sum(0), 1)

    return reduce


def _largest(t: Array, density: float) -> Array:
    """The share of each matrix's values that are largest, 0 elsewhere."""
    flat = jnp.abs(t).reshape(*t.shape[:-2], -1)
    count = int(density * flat.shape[-1])
    if count == 0:
        return jnp.zeros_like(t)
    _, where = jax.lax.top_k(flat, count)
    kept = jnp.put_along_axis(jnp.zeros_like(flat), where, 1, axis=-1, inplace=False)
    return t * kept.reshape(t.shape)


def _halves(delta: Array, rank: int) -> tuple[Array, Array]:
    """(A, B) of the closest matrices of that rank, one after the other."""
    if not 1 <= rank <= min(delta.shape[-2:]):
        raise ValueError(f"adapters.mix: rank is in 1 … {min(delta.shape[-2:])}, got {rank}.")

    def one(d: Array) -> Any:
        u, s, vt = jnp.linalg.svd(d, full_matrices=False)
        return u[:, :rank], s[:rank, None] * vt[:rank]

    flat = delta.reshape(-1, *delta.shape[-2:])
    return jax.tree.map(lambda p: p.reshape(*delta.shape[:-2], *p.shape[1:]), jax.lax.map(one, flat))
