"""Answers that can only be what they should be: one of a list, a regular expression, JSON of a schema.

A grammar of llguidance says before each token which tokens may come; the sampler leaves out all others.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array
from jaxml.extras import need
from jaxml.lm import Model, Sampling
from jaxml.lm.generate import Prompt, batches, decode, encode_prompt, read, row_keys, start
from jaxml.lm.tokenizer import Tokenizer


def choose(options: Sequence[str]) -> str:
    """A grammar of these texts alone.

    Example:
        >>> from jaxml import testing
        >>> generate(testing.tiny_model(), ["is it? "], choose(["yes", "no"]))[0] in ("yes", "no")
        True
    """
    if not options or isinstance(options, str) or not all(options):
        raise ValueError(f"constrain.choose: options are texts, none empty, got {options!r}.")
    grammar = "start: " + " | ".join(json.dumps(o, ensure_ascii=False) for o in dict.fromkeys(options))
    return _checked("lark", grammar)


def regex(pattern: str) -> str:
    """A grammar of the texts that a regular expression matches whole (Rust's syntax: no look-around).

    Example:
        >>> import llguidance
        >>> characters = llguidance.LLTokenizer("byte")
        >>> matcher = llguidance.LLMatcher(characters, regex("[0-9]{2}"))
        >>> [matcher.validate_tokens(characters.tokenize_str(text)) for text in ("42", "4x", "x")]   # so many fit
        [2, 1, 0]
    """
    return _checked("regex", pattern)


def json_schema(schema: Mapping[str, Any], *, compact: bool = True) -> str:
    """A grammar of JSON that a schema allows.

    Args:
        compact: no white space between tokens, so that none of the limit is spent on it.

    Example:
        >>> import llguidance
        >>> schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        >>> characters = llguidance.LLTokenizer("byte")
        >>> matcher = llguidance.LLMatcher(characters, json_schema(schema))
        >>> [matcher.validate_tokens(characters.tokenize_str(text)) for text in ('{"a":1}', '{"a": 1}', '{"a":x}')]
        [7, 5, 5]
    """
    whitespace = dict(item_separator=",", key_separator=":", whitespace_flexible=False)
    return _checked("json_schema", json.dumps({**schema, **({"x-guidance": whitespace} if compact else {})}))


def _checked(kind: str, source: str) -> str:
    matcher = need("llguidance", "prompts").LLMatcher
    made = getattr(matcher, f"grammar_from_{kind}")(source)
    if error := matcher.validate_grammar(made):
        raise ValueError(f"constrain: not a {kind.replace('_', ' ')} that can be followed: {error.strip()}")
    return made


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    grammar: str,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008
    key: Array | int = 0,
    batch_size: int | None = None,
) -> list[str]:
    """Continues every prompt by a text of the grammar.

    Args:
        grammar: from `choose`, `regex` or `json_schema`.
        max_new_tokens: at most so many tokens a row.

    Returns:
        The new text of each prompt, which the grammar accepts.

    Raises:
        ValueError: a prompt as in `lm.generate`, or a text that was not finished within the limit (nothing half-made
            is given back).
        TypeError: not a `Model`.

    Example:
        >>> from jaxml import testing
        >>> text = generate(testing.tiny_model(), "count: ", regex("[0-9]{2}"))[0]
        >>> len(text), text.isdigit()
        (2, True)
    """
    if not isinstance(model, Model):
        raise TypeError(f"constrain.generate: model is a Model, of lm.load, got {type(model).__name__}.")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        prompts = [prompts]
    rows = [encode_prompt(model, p) for p in prompts]
    texts: list[str] = []
    for _, here, part, keys in batches(model, rows, row_keys(key, len(rows)), batch_size):
        texts += _batch(here, part, grammar, max_new_tokens, sampling, keys)
    return texts


def _batch(model: Model, rows, grammar: str, limit: int, sampling: Sampling, keys: Array) -> list[str]:
    llguidance = need("llguidance", "prompts")
    masks = need("llguidance.numpy", "prompts")
    config, eos_ids = model.config, model.config.eos_ids or model.tokenizer.eos_ids
    logits, cache, tokens, positions, limit = read(model, rows, limit, who="constrain")
    known = _tokenizer(model.tokenizer, config.vocab_size, eos_ids)
    matchers = [llguidance.LLMatcher(known, grammar) for _ in rows]
    state = start(logits, cache, tokens, positions, keys, sampling)
    ids: list[list[int]] = [[] for _ in rows]
    allowed = masks.allocate_token_bitmask(len(rows), config.vocab_size)
    for _ in range(limit):
        for i, matcher in enumerate(matchers):
            if matcher.is_stopped():
                allowed[i] = -1
            else:
                masks.fill_next_token_bitmask(matcher, allowed, i)
        new, state = decode(model.params, config, state, steps=1, sampling=sampling, allowed=jnp.asarray(allowed))
        for i, token in enumerate(np.asarray(new)[:, 0].tolist()):
            if matchers[i].is_stopped():
                continue
            if token not in eos_ids:
                ids[i].append(token)
            if not matchers[i].consume_token(token):
                raise RuntimeError(f"constrain: the grammar refused a token of its own ({matchers[i].get_error()}).")
        if all(matcher.is_stopped() for matcher in matchers):
            break
        state = state._replace(done=jnp.asarray([matcher.is_stopped() for matcher in matchers]))
    for i, matcher in enumerate(matchers):
        if not matcher.is_stopped() and not matcher.is_accepting():
            raise ValueError(
                f"constrain: an answer of the grammar is finished within {limit} tokens, row {i} is at "
                f"{model.tokenizer.decode(ids[i])!r}. Raise max_new_tokens, or shorten the prompt."
            )
    return [model.tokenizer.decode(of) for of in ids]


@functools.lru_cache(maxsize=4)
def _tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]):
    """llguidance's view of the vocabulary."""
    return need("llguidance", "prompts").LLTokenizer(
        tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(eos_ids) or None
    )
