"""From a soft prompt to words: the nearest tokens, then swaps that gradients propose."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import weights
from jaxml.axes import Array, Float, Int, Params
from jaxml.lm.model import Model
from jaxml.tune import adapters, data
from jaxml.tune.options import Options
from jaxml.tune.prompt.nodes import SoftPrompt, only
from jaxml.tune.prompt.soft import common_tokens, embeddings
from jaxml.tune.step import batch_loss


@dataclasses.dataclass(frozen=True)
class Hard:
    """A prompt in words, and what they cost: mean losses of a learnt token, in nats.

    Example:
        >>> Hard([5, 9], "the fox", soft_loss=1.0, projected_loss=2.5, loss=1.75, history=[2.0, 1.75]).gap
        0.75
    """

    ids: list[int]
    text: str
    soft_loss: float  # of the trained vectors
    projected_loss: float  # of the tokens nearest to them
    loss: float  # after the swaps
    history: list[float]  # after each step

    @property
    def gap(self) -> float:
        """What words lose against the trained vectors."""
        return self.loss - self.soft_loss


def nearest(model: Model, rows: Float[Array, "P D"], allowed: Sequence[int] | None = None) -> list[int]:
    """The token whose embedding has the largest cosine with each row; special tokens are left out.

    Args:
        allowed: the tokens to choose from.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> nearest(model, model.params["embed"][jnp.array([5, 9])], allowed=[5, 7, 9])
        [5, 9]
    """
    allowed = np.asarray(common_tokens(model, count=model.config.vocab_size) if allowed is None else allowed)
    table = weights.take(model.params["embed"], jnp.asarray(allowed)).astype(jnp.float32)
    unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-9)
    return allowed[np.asarray(jnp.argmax(unit(rows.astype(jnp.float32)) @ unit(table).T, axis=-1))].tolist()


def harden(
    model: Model,
    examples: Sequence[dict[str, Any]],
    *,
    start: Sequence[int] | None = None,
    steps: int = 50,
    candidates: int = 64,
    top_k: int = 128,
    batch_size: int = 8,
    length: int = 512,
    at_once: int = 8,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Hard:
    """Words in the place of a trained prompt.

    Each step takes the gradient of the loss with respect to which token stands where, draws single swaps among the
    `top_k` most promising ones of each place, scores all of them on the same examples, and keeps the best if it is
    better. Only prompts that their own text is tokenised to are considered, so that the text may be given to anyone.

    Args:
        model: with a soft prompt in front (one).
        examples: what the prompt is to be good for, in the forms of `tune.data`; `batch_size` rows of them, packed in
            the order that `seed` gives, with the prompt's tokens in front of everything.
        start: tokens to begin with; the nearest ones to the soft prompt where None.
        candidates: swaps that are scored in a step.
        length: tokens a row of examples.
        at_once: candidates that are computed together.
        on_step: told (step, loss).

    Raises:
        ValueError: no soft prompt, or several; a start that its own text is not tokenised to.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import prompt
        >>> model = prompt.soft(testing.tiny_model(), length=2)
        >>> examples = [{"prompt": "the fox ", "response": "jumps"}]
        >>> found = harden(model, examples, steps=1, candidates=2, top_k=4, batch_size=1, length=32)
        >>> len(found.ids)
        2

    Reference:
        Lester et al. 2021, section 7 (nearest tokens); Zou et al. 2023, "Universal and Transferable Adversarial
        Attacks on Aligned Language Models", algorithm 1 (greedy coordinate gradient).
    """
    node = only(model.params, "prompt.harden")
    if not isinstance(node, SoftPrompt) or node.count > 1:
        raise ValueError(f"prompt.harden: one soft prompt is in front, got {node.count} of {type(node).__name__}.")
    batches = data.prepare(examples, model.tokenizer, length=length, batch_size=batch_size, seed=seed)
    batch = batches(0)
    bare = adapters.split(model.params | {"prefix": SoftPrompt(node.table())})[1]
    options = Options(length=length, batch_size=batch_size)
    losses = functools.partial(_losses, config=model.config, options=options, at_once=at_once)
    loss_of = lambda rows: float(losses(rows[None], bare, batch)[0])

    soft = node.table()[0].astype(jnp.float32)
    allowed = np.asarray(common_tokens(model, count=model.config.vocab_size))
    scale = model.config.embed_scale or 1.0
    projected = nearest(model, soft / scale, allowed)
    ids = list(_readable(model, projected) if start is None else start)
    if not _survives(model, ids):
        raise ValueError(f"prompt.harden: the text of start is tokenised to start, {ids} are not. Give other tokens.")
    projected_loss = loss_of(embeddings(model, projected))
    best = loss_of(embeddings(model, ids))
    rng, history = np.random.default_rng(seed), [best]
    for step in range(1, steps + 1):
        top = np.asarray(
            _promising(embeddings(model, ids), bare, batch, jnp.asarray(allowed), model.config, options, top_k)
        )
        swaps = _swaps(model, ids, allowed[top], candidates, rng)
        if swaps:
            found = np.asarray(losses(embeddings(model, swaps + [ids] * (candidates - len(swaps))), bare, batch))[
                : len(swaps)
            ]
            if (least := float(found.min())) < best:
                best, ids = least, swaps[int(found.argmin())]
        history.append(best)
        if on_step:
            on_step(step, best)
    return Hard(ids, model.tokenizer.decode(ids), loss_of(soft), projected_loss, best, history)


@functools.partial(jax.jit, static_argnames=("config", "options", "at_once"))
def _losses(rows: Float[Array, "C P D"], bare: Params, batch, config, options, at_once) -> Float[Array, "C"]:
    """The mean loss of a learnt token under each prompt."""

    def one(rows):
        total, count = batch_loss({"prefix": {"rows": rows[None]}}, bare, batch, config=config, options=options)
        return total / jnp.maximum(count, 1.0)

    return jax.lax.map(one, rows, batch_size=min(at_once, rows.shape[0]))


@functools.partial(jax.jit, static_argnames=("config", "options", "top_k"))
def _promising(rows, bare, batch, allowed: Int[Array, "A"], config, options, top_k: int) -> Int[Array, "P top_k"]:
    """Of each place, the allowed tokens (their numbers) that a first-order step prefers."""
    slope = jax.grad(lambda r: _losses(r[None], bare, batch, config=config, options=options, at_once=1)[0])(rows)
    table = weights.take(bare["embed"], allowed).astype(jnp.float32)
    return jax.lax.top_k(-slope @ table.T, min(top_k, allowed.shape[0]))[1]


def _swaps(model: Model, ids: list[int], top: np.ndarray, count: int, rng) -> list[list[int]]:
    """Different prompts, one token from `ids` away, that survive being written down."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(4 * count):
        place = int(rng.integers(len(ids)))
        swapped = (*ids[:place], int(rng.choice(top[place])), *ids[place + 1 :])
        if list(swapped) != ids and swapped not in found and _survives(model, swapped):
            found[swapped] = None
        if len(found) == count:
            break
    return [list(s) for s in found]


def _survives(model: Model, ids: Sequence[int]) -> bool:
    return model.tokenizer.encode(model.tokenizer.decode(ids)) == list(ids)


def _readable(model: Model, ids: list[int]) -> list[int]:
    """As many tokens that survive being written down: as many of these, from the left, as do; words for the rest."""
    kept: list[int] = []
    fill = next(i for i in common_tokens(model) if _survives(model, [i]) and _survives(model, [i] * len(ids)))
    for token in ids:
        kept = [*kept, token] if _survives(model, [*kept, token]) else [*kept, fill]
    return kept if _survives(model, kept) else [fill] * len(ids)
