"""Prefix tuning: trained keys and values of every layer, seen by every token."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Params
from jaxml.lm import decoder
from jaxml.lm.model import Model
from jaxml.tune.prompt.nodes import Prefix, Projected, only
from jaxml.tune.prompt.soft import check_new, common_tokens, embeddings

STARTS = ("sink", "text", "random", "zero")


def prefix(
    model: Model,
    key: Array | int = 0,
    *,
    length: int | None = None,
    start: str = "sink",
    text: str | None = None,
    count: int = 1,
    hidden_dim: int | None = None,
    dtype: Any = jnp.float32,
) -> Model:
    """The model with a prefix in front of every layer, ready for `tune.fit`, which then trains the prefix alone.

    Args:
        length: P, places of the prefix (20; of a text its own tokens).
        start: "sink": the cache of a text's first token, which heads look at that have nothing to look at, and then
            zeros, which little attention goes to beside it: the nearest to no prefix at all; "text": the cache of
            `text`, which gives exactly the model's answers to texts that go on from that prompt (with the bos token
            between, where the model's texts begin with one; a longer prefix goes on with it from the beginning);
            "random": the cache of common tokens drawn at random; "zero": zeros.
        count: N, prefixes, with starts of their own where they are random.
        hidden_dim: M, of an MLP that makes the prefix while it is trained (Li and Liang 2021, section 4.3); `settle`
            drops it. It begins by adding nothing to the start.
        dtype: of the prefix.

    Raises:
        ValueError: an unknown start, or "text" without one; a prefix that the context has no room for, or a model that
            has one already.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import prompt
        >>> model = prompt.prefix(testing.tiny_model(), start="text", text="answer in one word.")
        >>> model.params["prefix"].key.shape    # layers, prefixes, heads, places, head dim
        (2, 1, 2, 19, 8)

    Reference:
        Li and Liang 2021, "Prefix-Tuning"; Liu et al. 2022, "P-Tuning v2".
    """
    if start not in STARTS:
        raise ValueError(f"prompt.prefix: start is one of {', '.join(STARTS)}, got {start!r}.")
    if count < 1:
        raise ValueError(f"prompt.prefix: count is at least 1, got {count}.")
    key = jax.random.key(key) if isinstance(key, int) else key
    words = model.tokenizer.encode(text or "", bos=True) if start == "text" else []
    if start == "text" and not model.tokenizer.encode(text or ""):
        raise ValueError(f"prompt.prefix: start 'text' needs a text of at least one token, got {text!r}.")
    length = length or (len(words) if start == "text" else 20)
    check_new(model, length, "prompt.prefix")
    rows = jnp.stack([_ids(model, jax.random.fold_in(key, n), length, start, words) for n in range(count)])
    if start == "sink":
        of = decoder.read(model.params, model.config, decoder.embed(model.params, model.config, rows[:, :1]))
        rest = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, length - 1), (0, 0)))
        node = Prefix(rest(of.key), rest(of.value))
    else:
        of = decoder.read(model.params, model.config, decoder.embed(model.params, model.config, rows))
        node = Prefix(of.key, of.value)
        node = node if start != "zero" else jax.tree.map(jnp.zeros_like, node)
    node = node.astype(dtype)
    if hidden_dim is not None:
        node = _projected(model, node, rows, hidden_dim, jax.random.fold_in(key, count))
    return model.replace(params=model.params | {"prefix": node})


def settle(params: Params) -> Params:
    """A prefix that an MLP makes, as plain keys and values; any other prompt as it is.

    Raises:
        ValueError: no prompt in the tree.

    Example:
        >>> from jaxml import testing
        >>> model = prefix(testing.tiny_model(), length=4, start="random", hidden_dim=8)
        >>> type(model.params["prefix"]).__name__, type(settle(model.params)["prefix"]).__name__
        ('Projected', 'Prefix')
    """
    node = only(params, "prompt.settle")
    return params | {"prefix": node.settled() if isinstance(node, Projected) else node}


def _ids(model: Model, key: Array, length: int, start: str, words: list[int]) -> Array:
    """The tokens whose cache is the start."""
    if start == "text":
        return jnp.resize(jnp.asarray(words), (length,))
    known = jnp.asarray(common_tokens(model))
    if start == "random":
        return jax.random.choice(key, known, (length,), replace=known.size < length)
    first = model.tokenizer.bos_id if model.tokenizer.bos_id is not None else int(known[0])
    return jnp.full(length, first)


def _projected(model: Model, start: Prefix, ids: Array, hidden_dim: int, key: Array) -> Projected:
    if hidden_dim < 1:
        raise ValueError(f"prompt.prefix: hidden_dim is at least 1, got {hidden_dim}.")
    c = model.config
    width, out = c.width, 2 * c.num_layers * c.num_kv_heads * c.head_dim
    return Projected(
        table=embeddings(model, ids).astype(start.dtype),
        w1=(jax.random.normal(key, (width, hidden_dim)) / width**0.5).astype(start.dtype),
        b1=jnp.zeros(hidden_dim, start.dtype),
        w2=jnp.zeros((hidden_dim, out), start.dtype),
        b2=jnp.zeros(out, start.dtype),
        start=start,
        layout=(c.num_layers, c.num_kv_heads, c.head_dim),
    )
