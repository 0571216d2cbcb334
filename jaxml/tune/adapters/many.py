"""Many adapters around one model in one batch, each row with its own; changing them compiles nothing anew."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import paths, weights
from jaxml.axes import Array, Int, Params
from jaxml.tune.adapters import starts
from jaxml.tune.adapters.nodes import LoRA, Stack
from jaxml.tune.adapters.tree import check_shapes, of


def stack(adapted: Sequence[Params]) -> Params:
    """One tree that holds the LoRAs of several trees around the weights of the first.

    Ranks may differ (to the largest, with zeros), and so may targets.

    Args:
        adapted: trees with LoRAs around the same model.

    Raises:
        ValueError: no tree, or an adapter that is no LoRA without magnitudes (names its path).

    Example:
        >>> import jax
        >>> from jaxml import lm, testing
        >>> from jaxml.tune import adapters
        >>> model = testing.tiny_model()
        >>> two = [adapters.attach(model.params, jax.random.key(i), start="orthogonal") for i in range(2)]
        >>> params = adapters.select(stack(two), jnp.array([1, 0, -1]))  # -1: none
        >>> lm.decoder.apply(params, model.config, jnp.ones((3, 4), jnp.int32)).shape
        (3, 4, 64)
    """
    if not adapted:
        raise ValueError("adapters.stack: at least one adapted tree, got none.")
    all_of = [of(tree) for tree in adapted]
    new = {}
    for path in dict.fromkeys(path for found in all_of for path in found):
        nodes = [found.get(path) for found in all_of]
        for node in nodes:
            if node is not None and (not isinstance(node, LoRA) or node.magnitude is not None):
                raise ValueError(f"adapters.stack: adapters are LoRAs without magnitudes, {path} is not. Merge it.")
        starts.check_shared_base([n for n in nodes if n is not None], path, "adapters.stack")
        check_shapes([n for n in nodes if n is not None], path, "adapters.stack")
        first = next(n for n in nodes if n is not None)
        most, lead = max(n.rank for n in nodes if n is not None), len(first.shape) - 2
        pairs = [_padded(n if n is not None else _nothing(first), most) for n in nodes]
        a, b = (jnp.stack(part, axis=lead) for part in zip(*pairs))
        new[path] = Stack(first.base, a, b, transposed=first.transposed)
    return paths.replaced(adapted[0], new)


def select(stacked: Params, ids: Int[Array, "B"]) -> Params:
    """Which adapter, or which of several prompts, each row of the batch takes: numbers from 0, or -1 for no adapter.

    Raises:
        ValueError: nothing to choose from, or a number that there is not.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = testing.tiny_model().params
        >>> attached = [adapters.attach(params, jax.random.key(i), rank=2, targets=["q"]) for i in range(3)]
        >>> sorted(of(select(adapters.stack(attached), jnp.array([2, -1, 0]))))
        ['layers/q']
    """
    found = {path: w for path, w in of(stacked).items() if hasattr(w, "ids")}
    if not found:
        raise ValueError("adapters.select: a tree that `adapters.stack` or `prompt.stack` made, got one without.")
    count = min(w.count for w in found.values())
    least = -1 if all(isinstance(w, Stack) for w in found.values()) else 0  # a prompt's places cannot be left out
    if not isinstance(ids, jax.core.Tracer):
        numbers = np.asarray(ids)
        if not ((numbers >= least) & (numbers < count)).all():
            raise ValueError(f"adapters.select: ids are in {least} … {count - 1}, got {numbers.tolist()}.")
    rows = weights.Rows(jnp.asarray(ids, jnp.int32))
    return paths.replaced(stacked, {path: dataclasses.replace(w, ids=rows) for path, w in found.items()})


def tasks(params: Params) -> int | None:
    """How many prompts are trained side by side, one for each task; None where there is one at most.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import prompt
        >>> model = testing.tiny_model()
        >>> tasks(model.params), tasks(prompt.soft(model, length=4, count=3, rank=1).params)
        (None, 3)
    """
    counts = [w.count for w in of(params).values() if w.train and hasattr(w, "ids") and w.count > 1]
    return min(counts, default=None)


def take(stacked: Params, number: int) -> Params:
    """One adapter of a stack, as a LoRA again.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = testing.tiny_model().params
        >>> attached = [adapters.attach(params, jax.random.key(i), rank=2, targets=["q"]) for i in range(3)]
        >>> of(take(adapters.stack(attached), 1))["layers/q"].rank
        2
    """
    found, new = _stacks(stacked, "adapters.take"), {}
    for path, w in found.items():
        lead = len(w.shape) - 2
        if not 0 <= number < w.a.shape[lead]:
            raise ValueError(f"adapters.take: the number is in 0 … {w.a.shape[lead] - 1}, got {number}.")
        a, b = (jnp.take(part, number, axis=lead) for part in (w.a, w.b))
        new[path] = LoRA(w.base, a, b, jnp.ones(w.shape[:-2], jnp.float32), transposed=w.transposed)
    return paths.replaced(stacked, new)


def _stacks(params: Params, name: str) -> dict[str, Stack]:
    found = {path: w for path, w in of(params).items() if isinstance(w, Stack)}
    if not found:
        raise ValueError(f"{name}: a tree that `adapters.stack` made, got one without stacks.")
    return found


def _nothing(like: LoRA) -> LoRA:
    zero = lambda part: jnp.zeros_like(part) if part is not None else None
    return dataclasses.replace(like, a=zero(like._a()), b=zero(like._b()))


def _padded(w: LoRA, rank: int) -> tuple[Array, Array]:
    """(A, s·diag(e) B diag(g)), of that rank."""
    a, b = w._a(), w._b() * w.scale[..., None, None]
    lead = len(w.shape) - 2
    b = b if w.diagonal is None else b * w.diagonal[..., :, None]
    b = b if w.outer is None else b * w.outer[..., None, :]
    a = jnp.broadcast_to(a, (*b.shape[:-2], *a.shape[-2:])) if a.ndim < b.ndim else a
    more = [(0, 0)] * lead
    return (
        jnp.pad(a, [*more, (0, 0), (0, rank - a.shape[-1])]),
        jnp.pad(b, [*more, (0, rank - b.shape[-2]), (0, 0)]),
    )
