"""Soft prompts: a few trained vectors in front of every text, and nothing else trained."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float
from jaxml.lm import decoder
from jaxml.lm.model import Model
from jaxml.tune.prompt.nodes import SoftPrompt

STARTS = ("random", "common", "text", "labels")


def soft(
    model: Model,
    key: Array | int = 0,
    *,
    length: int | None = None,
    start: str = "common",
    text: str | None = None,
    labels: Sequence[str] = (),
    corpus: Sequence[str] = (),
    common: int = 5000,
    count: int = 1,
    rank: int | None = None,
    dtype: Any = jnp.float32,
) -> Model:
    """The model with a soft prompt in front, ready for `tune.fit`, which then trains the prompt alone.

    Its keys and values are computed once a step and serve every text of the batch.

    Args:
        length: P, places of the prompt (20; of a text its own tokens).
        start: "random": uniform in ±0.5, as published; "common": the embeddings of tokens drawn from the most common
            ones; "text": those of `text`, from the beginning again where it is shorter than the prompt; "labels": the
            mean embedding of each of `labels`, and common tokens for the places that are left.
        corpus: texts in which tokens are counted for "common"; where it is empty, the tokens that the vocabulary
            learnt first count as common.
        common: how many tokens are common.
        count: N, prompts (of tasks, or of an ensemble), each with a start of its own.
        rank: one prompt that all tasks share, times a matrix of this rank for each (multitask prompt tuning).
        dtype: of the prompt.

    Raises:
        ValueError: an unknown start, or one without the text or labels that it is made of; a prompt that the context
            has no room for, or a model that has one already.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import prompt
        >>> model = prompt.soft(testing.tiny_model(), length=4)
        >>> model.params["prefix"].rows.shape
        (1, 4, 32)

    Reference:
        Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 3.2 (starts); Wang et
        al. 2023, "Multitask Prompt Tuning", section 3.1 (the rank-one factors begin at 1 here, so that every task
        begins with the shared prompt).
    """
    if start not in STARTS:
        raise ValueError(f"prompt.soft: start is one of {', '.join(STARTS)}, got {start!r}.")
    if count < 1:
        raise ValueError(f"prompt.soft: count is at least 1, got {count}.")
    key = jax.random.key(key) if isinstance(key, int) else key
    words = _tokens(model, start, text, labels)
    length = length or (len(words) if start == "text" else 20)
    check_new(model, length, "prompt.soft")
    draw = lambda k: _rows(model, k, length, start, words, corpus, common)
    if rank is None:
        rows = jnp.stack([draw(jax.random.fold_in(key, n)) for n in range(count)])
        node = SoftPrompt(rows.astype(dtype))
    else:
        if rank < 1:
            raise ValueError(f"prompt.soft: rank is at least 1, got {rank}.")
        one = draw(key)
        # Each of the `rank` products adds 1 / rank everywhere; noise tells tasks and ranks apart.
        noise = lambda k, *shape: 1 + 0.02 * jax.random.normal(jax.random.fold_in(key, k), (count, *shape))
        node = SoftPrompt(
            one[None].astype(dtype),
            columns=(noise(1, length, rank) / rank).astype(dtype),
            tasks=noise(2, rank, one.shape[-1]).astype(dtype),
            train=("rows", "columns", "tasks"),
        )
    return model.replace(params=model.params | {"prefix": node})


def check_new(model: Model, length: int, who: str) -> None:
    """Refuses a second prompt, and one that the context has no room for.

    Example:
        >>> from jaxml import testing
        >>> check_new(testing.tiny_model(), 128, "prompt.soft")
        Traceback (most recent call last):
            ...
        ValueError: prompt.soft: a prompt has at least one place and leaves room in the context of 128 tokens, got 128.
    """
    if "prefix" in model.params:
        raise ValueError(f"{who}: the model has a prompt in front already. Take it away: `adapters.detach`.")
    if not 0 < length < model.config.max_length:
        raise ValueError(
            f"{who}: a prompt has at least one place and leaves room in the context of {model.config.max_length} "
            f"tokens, got {length}."
        )


def embeddings(model: Model, ids: Any) -> Float[Array, "... P D"]:
    """What the first layer reads for these tokens, [..., P].

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> bool((embeddings(model, [[4, 9]]) == model.params["embed"][jnp.array([[4, 9]])]).all())
        True
    """
    return decoder.embed(model.params, model.config, jnp.asarray(ids)).astype(jnp.float32)


def common_tokens(model: Model, corpus: Sequence[str] = (), count: int = 5000) -> list[int]:
    """Tokens by how common they are: in the corpus, or else by when the vocabulary learnt them; no special ones.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> common_tokens(model, count=3), common_tokens(model, corpus=["abba a"], count=2)
        ([3, 4, 5], [4, 5])
    """
    special = {i for i, token in model.tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    special |= {model.tokenizer.pad_id, model.tokenizer.bos_id, *model.tokenizer.eos_ids}
    counted = Counter(i for text in corpus for i in model.tokenizer.encode(text))
    ids = [i for i, _ in counted.most_common()] if corpus else range(model.config.vocab_size)
    return [i for i in ids if i not in special][:count]


def _tokens(model: Model, start: str, text: str | None, labels: Sequence[str]) -> list[Any]:
    """The text's tokens, or each label's."""
    if start == "text":
        ids = model.tokenizer.encode(text or "")
        if not ids:
            raise ValueError(f"prompt.soft: start 'text' needs a text of at least one token, got {text!r}.")
        return ids
    if start == "labels":
        each = [model.tokenizer.encode(label) for label in labels]
        if not each or not all(each):
            raise ValueError(
                f"prompt.soft: start 'labels' needs labels of at least one token each, got {list(labels)}."
            )
        return each
    return []


def _rows(model, key, length, start, words, corpus, common) -> Float[Array, "P D"]:
    if start == "random":
        return jax.random.uniform(key, (length, model.config.width), minval=-0.5, maxval=0.5)
    if start == "text":
        return embeddings(model, (words * math.ceil(length / len(words)))[:length])
    known = common_tokens(model, corpus, common)
    drawn = np.asarray(jax.random.choice(key, np.asarray(known), (length,), replace=len(known) < length))
    rows = embeddings(model, drawn)
    if start == "common":
        return rows
    means = jnp.stack([embeddings(model, ids).mean(0) for ids in words])[:length]
    return jnp.concatenate([means, rows[len(means) :]])
