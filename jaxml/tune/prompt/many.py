"""Several prompts around one model: a row of the batch each, or all of them for every question."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxml.axes import Params
from jaxml.tune.prompt.nodes import Prefix, Prompt, SoftPrompt, only
from jaxml.tune.prompt.prefix import settle


def stack(tuned: Sequence[Params]) -> Params:
    """One tree with the prompts of several; `adapters.select` says which of them each row of a batch takes.

    Args:
        tuned: trees around the same model, whose prompts are of one kind and length.

    Raises:
        ValueError: none, or prompts of different kinds or lengths.

    Example:
        >>> from jaxml import lm, testing
        >>> from jaxml.tune import adapters, prompt
        >>> model = testing.tiny_model()
        >>> two = [prompt.soft(model, key, length=3).params for key in (0, 1)]
        >>> params = adapters.select(stack(two), jnp.array([1, 0]))
        >>> lm.decoder.apply(params, model.config, jnp.ones((2, 4), jnp.int32)).shape
        (2, 4, 64)
    """
    if not tuned:
        raise ValueError("prompt.stack: at least one tree with a prompt, got none.")
    nodes = [_plain(only(settle(params), "prompt.stack")) for params in tuned]
    shape = lambda n: (type(n).__name__, n.places)
    if len(kinds := {shape(n) for n in nodes}) > 1:
        raise ValueError(f"prompt.stack: prompts are of one kind and length, got {sorted(kinds)}.")
    if isinstance(nodes[0], Prefix):
        one = Prefix(*(jnp.concatenate([getattr(n, name) for n in nodes], 1) for name in ("key", "value")))
    else:
        one = SoftPrompt(jnp.concatenate([n.rows for n in nodes]))
    return tuned[0] | {"prefix": one}


def take(stacked: Params, number: int) -> Params:
    """One prompt of several, alone.

    Raises:
        ValueError: no prompt, or no such number.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import prompt
        >>> take(prompt.soft(testing.tiny_model(), length=4, count=3).params, 1)["prefix"].count
        1
    """
    node = _plain(only(settle(stacked), "prompt.take"))
    if not 0 <= number < node.count:
        raise ValueError(f"prompt.take: the number is in 0 … {node.count - 1}, got {number}.")
    at = slice(number, number + 1)
    if isinstance(node, Prefix):
        return stacked | {"prefix": Prefix(node.key[:, at], node.value[:, at])}
    return stacked | {"prefix": SoftPrompt(node.rows[at])}


def vote(log_probs: np.ndarray, how: str = "mean") -> np.ndarray:
    """What an ensemble of prompts says together.

    Args:
        log_probs: [members, questions, choices], as `prompts.score_choices` gives them for each member.
        how: "mean": the mean of the members' probabilities; "majority": the share of members whose best choice it is
            (Lester et al. 2021, section 6).

    Returns:
        [questions, choices], adding up to 1 over choices.

    Example:
        >>> one, two = np.log([[[0.9, 0.1]]]), np.log([[[0.4, 0.6]]])
        >>> vote(np.concatenate([one, two])).round(2).tolist(), vote(np.concatenate([one, two]), "majority").tolist()
        ([[0.65, 0.35]], [[0.5, 0.5]])
    """
    log_probs = np.asarray(log_probs, np.float64)
    if log_probs.ndim != 3 or how not in ("mean", "majority"):
        raise ValueError(
            f"prompt.vote: log_probs are [members, questions, choices] and how is mean or majority, got the shape "
            f"{log_probs.shape} and {how!r}."
        )
    if how == "majority":
        return (log_probs.argmax(-1)[..., None] == np.arange(log_probs.shape[-1])).mean(0)
    p = np.exp(log_probs - log_probs.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)).mean(0)


def _plain(node: Prompt) -> Prompt:
    """Without what made it: multitask factors multiplied out, no choice of rows."""
    if isinstance(node, SoftPrompt):
        return SoftPrompt(node.table())
    return dataclasses.replace(node, ids=None)
