"""Exact log-likelihoods of whole continuations."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, Int, Params
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.lm.generate import Prompt, encode_prompt
from jaxml.lm.model import Model


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def token_log_probs(
    params: Params, config: DecoderConfig, tokens: Int[Array, "B T"], *, chunk: int = 128
) -> Float[Array, "B T"]:
    """log p(token t | tokens before it), float32; 0 for the first token of a row.

    The logits of `chunk` positions are held at a time, never all of [B, T, V].
    """
    x = decoder.hidden(params, config, tokens)[:, :-1]
    targets = tokens[:, 1:]
    B, T = targets.shape
    chunk = min(chunk, T)
    more = -T % chunk
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0))).reshape(B, -1, chunk, x.shape[-1]).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, more))).reshape(B, -1, chunk).swapaxes(0, 1)

    def part(args):
        x, targets = args
        logits = decoder.logits(params, config, x)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    out = jax.lax.map(part, (x, targets)).swapaxes(0, 1).reshape(B, -1)[:, :T]
    return jnp.pad(out, ((0, 0), (1, 0)))


def score(model: Model, prompts: Sequence[Prompt], continuations: Sequence[str], *, batch_size: int = 16) -> np.ndarray:
    """log p(continuation | prompt) in nats, summed over the continuation's tokens.

    Prompt and continuation are tokenised apart and joined, as in training on prompt and response.

    Args:
        prompts, continuations: of equal number, in pairs.
        batch_size: pairs scored together, sorted by length.

    Returns:
        [number of pairs] float64.

    Raises:
        ValueError: numbers that differ, an empty continuation, or a pair longer than the context.
    """
    if isinstance(prompts, str) or len(prompts) != len(continuations):
        raise ValueError(
            f"score: prompts and continuations are lists of equal length, got {len(prompts)} and {len(continuations)}."
        )
    rows, starts = [], []
    for prompt, continuation in zip(prompts, continuations):
        before, after = encode_prompt(model, prompt), model.tokenizer.encode(continuation)
        if not after:
            raise ValueError("score: a continuation has at least one token, got an empty one.")
        rows.append(before + after)
        starts.append(len(before))
    out = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(rows), batch_size):
        part = order[first : first + batch_size]
        log_probs = _log_probs(model, [rows[i] for i in part], batch_size if len(rows) > batch_size else len(part))
        for i, values in zip(part, log_probs):
            out[i] = values[starts[i] : len(rows[i])].sum(dtype=np.float64)
    return out


def perplexity(model: Model, text: str, *, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of a token, in windows of at most `window` tokens.

    The first token of each window has no past and is not counted.

    Raises:
        ValueError: a text of fewer than two tokens.
    """
    ids = model.tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"perplexity: the text has at least 2 tokens, got {len(ids)}.")
    rows = [ids[i : i + window] for i in range(0, len(ids) - 1, window)]
    total = sum(v[: len(r)].sum(dtype=np.float64) for r, v in zip(rows, _log_probs(model, rows, len(rows))))
    return float(np.exp(-total / sum(len(r) - 1 for r in rows)))


def _log_probs(model: Model, rows: list[list[int]], batch: int) -> np.ndarray:
    longest = max(map(len, rows))
    if longest > model.config.max_length:
        raise ValueError(
            f"score: prompt and continuation fit the context of {model.config.max_length} tokens, got {longest}."
        )
    tokens = np.zeros((batch, -(-longest // 32) * 32), np.int32)  # right padding: causality hides it
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return np.asarray(token_log_probs(model.params, model.config, tokens))
