"""Exact log-likelihoods of whole continuations."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import weights
from jaxml.axes import Array, Float, Int, Params
from jaxml.lm import decoder, tree
from jaxml.lm.cache import Cache
from jaxml.lm.config import DecoderConfig
from jaxml.lm.generate import Prompt, common, encode_prompt, read
from jaxml.lm.model import Model
from jaxml.lm.tree import Node


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def tree_log_probs(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    ends: Int[Array, "B T"] | None,
    sources: Int[Array, "B M"],
    targets: Int[Array, "B M"],
    past: Cache | None = None,
    *,
    chunk: int = 32,
) -> Float[Array, "B M"]:
    """log p of each target after the token at its source, float32 (`lm.tree` makes the arrays).

    Logits are made for the sources alone, `chunk` of each row at a time.
    """
    x = decoder.hidden(params, config, tokens, positions=positions, ends=ends, past=past)
    x = jnp.take_along_axis(x, sources[..., None], axis=1)
    B, M = targets.shape
    chunk = min(chunk, M)
    more = -M % chunk
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0))).reshape(B, -1, chunk, x.shape[-1]).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, more))).reshape(B, -1, chunk).swapaxes(0, 1)

    def part(args):
        x, targets = args
        logits = decoder.logits(params, config, x)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    return jax.lax.map(part, (x, targets)).swapaxes(0, 1).reshape(B, -1)[:, :M]


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

    Example:
        >>> from jaxml import testing
        >>> scores = score(testing.tiny_model(), ["the fox"] * 2, [" jumps", " sleeps"])
        >>> scores.shape, bool((scores < 0).all())
        ((2,), True)
    """
    if isinstance(prompts, str) or len(prompts) != len(continuations):
        raise ValueError(
            f"score: prompts and continuations are lists of equal length, got {len(prompts)} and {len(continuations)}."
        )
    trees = []
    for prompt, continuation in zip(prompts, continuations):
        trees.append(Node(encode_prompt(model, prompt), [Node(encode_continuation(model, continuation), scored=True)]))
    return np.array([sums(nodes)[0] for nodes in score_trees(model, trees, batch_size=batch_size)])


def encode_continuation(model: Model, continuation: str) -> list[int]:
    """Token ids of what follows a prompt.

    Raises:
        ValueError: there are none.

    Example:
        >>> from jaxml import testing
        >>> encode_continuation(testing.tiny_model(), " fox")
        [3, 9, 18, 27]
    """
    ids = model.tokenizer.encode(continuation)
    if not ids:
        raise ValueError("score: a continuation has at least one token, got an empty one.")
    return ids


def sums(nodes: Sequence[np.ndarray]) -> np.ndarray:
    """Of each scored node, the log-likelihood of all its tokens: [nodes] float64.

    Example:
        >>> sums([np.array([-0.5, -1.0]), np.array([-0.25])]).tolist()
        [-1.5, -0.25]
    """
    return np.array([values.sum(dtype=np.float64) for values in nodes])


def score_trees(
    model: Model, trees: Sequence[Node], *, batch_size: int = 16, share: bool = True
) -> list[list[np.ndarray]]:
    """The log-likelihood of each token of each scored node, one row of one forward pass for each tree.

    Args:
        trees: texts that share their beginnings (`lm.tree`), as tokens.
        batch_size: trees in a batch, sorted by length.
        share: read what all trees begin with once, and keep its keys and values for all.

    Returns:
        For each tree, for each scored node depth first: [its tokens] float32, in nats.

    Raises:
        ValueError: a text longer than the context.

    Example:
        >>> from jaxml import testing
        >>> two = Node([4, 5], [Node([6], scored=True), Node([7, 8], scored=True)])
        >>> [values.shape for values in score_trees(testing.tiny_model(), [two])[0]]
        [(1,), (2,)]
    """
    if not trees:
        return []
    share = share and not weights.has_rows(model.params) and not any(one.scored for one in trees)
    shared = common([one.tokens for one in trees]) if share else 0
    rows = [tree.lay(Node(one.tokens[shared:], one.children, one.scored)) for one in trees]
    longest = decoder.num_places(model.params) + shared + 1 + max(max(row.positions, default=-1) for row in rows)
    if longest > model.config.max_length:
        raise ValueError(
            f"score: prompt and continuation fit the context of {model.config.max_length} tokens, got {longest}."
        )
    past = read(model, [trees[0].tokens[:shared]], 0, who="score").cache if shared else None
    out: list[list[np.ndarray]] = [[] for _ in trees]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for first in range(0, len(rows), batch_size):
        part = order[first : first + batch_size]
        size = batch_size if len(rows) > batch_size else len(part)
        params = weights.of_rows(model.params, part + part[:1] * (size - len(part)))
        arrays = tree.batch([rows[i] for i in part], size)
        values = np.asarray(tree_log_probs(params, model.config, *arrays, past))
        for i, of_row in zip(part, values):
            owners = rows[i].owners
            bounds = [0, *(j for j in range(1, len(owners)) if owners[j] != owners[j - 1]), len(owners)]
            out[i] = [of_row[a:b] for a, b in itertools.pairwise(bounds) if b > a]
    return out


def perplexity(model: Model, text: str, *, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of a token, in windows of at most `window` tokens.

    The first token of each window has no past and is not counted. A prompt that the model was tuned with stands
    before each window.

    Raises:
        ValueError: a text of fewer than two tokens.

    Example:
        >>> from jaxml import testing
        >>> perplexity(testing.tiny_model(), "the quick brown fox") > 1
        True
    """
    ids = model.tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"perplexity: the text has at least 2 tokens, got {len(ids)}.")
    rows = [ids[i : i + window] for i in range(0, len(ids) - 1, window)]
    trees = [Node(row[:1], [Node(row[1:], scored=True)]) for row in rows if len(row) > 1]
    scored = [value for nodes in score_trees(model, trees, batch_size=8) for value in nodes]
    return float(np.exp(-sums(scored).sum() / sum(map(len, scored))))
