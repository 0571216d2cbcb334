"""Self-consistency: many ways of thinking, one answer."""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxml.lm.generate import Prompt
from jaxml.prompts.llm import LLM, Reply
from jaxml.tune.facts import normalise

WEIGHTS = ("count", "likelihood", "per_token")


@dataclasses.dataclass(frozen=True)
class Votes:
    """What n samples answered.

    Example:
        >>> Votes("Paris", {"paris": 0.75, "lyon": 0.25}, unread=0, samples=[]).answer
        'Paris'
    """

    answer: str | None  # the winner, as its likeliest sample wrote it; None where no sample has an answer
    shares: dict[str, float]  # normalised answer → its share of the weight, largest first
    unread: int  # samples without an answer
    samples: list[Reply]


def self_consistency(
    llm: LLM,
    prompt: Prompt,
    n: int = 16,
    *,
    find: Callable[[str], str | None] = lambda text: text.strip() or None,
    same: Callable[[str], str] = normalise,
    weight: str = "count",
    temperature: float = 0.7,
    max_new_tokens: int = 256,
    stop: tuple[str, ...] = (),
    seed: int = 0,
) -> Votes:
    """The answer that most of n samples come to.

    Args:
        find: the answer in a sample (`template.after`), or None where there is none.
        same: how answers are made equal.
        weight: of a sample's vote: "count": 1; "likelihood": its probability under the model; "per_token": the
            geometric mean of its tokens' probabilities.
        temperature: above 0, since samples are to differ.

    Raises:
        ValueError: n below 1, temperature 0, or an unknown weight.
        NotImplementedError: weights by likelihood from a model that tells none.

    Reference:
        Wang et al. 2023, "Self-Consistency Improves Chain of Thought Reasoning" (unweighted, weighted and normalised
        weighted sums).

    Example:
        >>> from jaxml import testing
        >>> from jaxml.prompts import Local
        >>> votes = self_consistency(Local(testing.tiny_model()), "who? ", 4, max_new_tokens=2)
        >>> len(votes.samples), round(sum(votes.shares.values()), 6)
        (4, 1.0)
    """
    if weight not in WEIGHTS:
        raise ValueError(f"self_consistency: weight is one of {', '.join(WEIGHTS)}, got {weight!r}.")
    if n < 1 or temperature <= 0:
        raise ValueError(f"self_consistency: n is at least 1 and temperature above 0, got {n} and {temperature}.")
    samples = llm.sample(
        prompt, n, max_new_tokens=max_new_tokens, temperature=temperature, stop=stop, seed=seed
    )  # fmt: skip
    answers = [find(sample.text) for sample in samples]
    names = [None if answer is None else same(answer) or None for answer in answers]
    weights = _weights(samples, [name is not None for name in names], weight, llm.name)
    total: dict[str, float] = {}
    best: dict[str, tuple[float, str]] = {}
    for answer, name, of in zip(answers, names, weights):
        if name is None:
            continue
        total[name] = total.get(name, 0.0) + of
        best[name] = max(best.get(name, (-1.0, "")), (of, answer), key=lambda pair: pair[0])
    if not total:
        return Votes(None, {}, n, samples)
    whole = sum(total.values())
    shares = {name: float(t / whole) for name, t in sorted(total.items(), key=lambda pair: -pair[1])}
    unread = sum(name is None for name in names)
    return Votes(best[next(iter(shares))][1], shares, unread, samples)


def _weights(samples: list[Reply], read: list[bool], weight: str, name: str) -> np.ndarray:
    if weight == "count":
        return np.ones(len(samples))
    if any(s.log_prob is None and s.text for s in samples):
        raise NotImplementedError(
            f"self_consistency: {name} does not tell how likely its samples are. Take weight='count'."
        )
    logs = np.array([-np.inf if s.log_prob is None else s.log_prob for s in samples])
    if weight == "per_token":
        logs = logs / np.maximum([s.new_tokens for s in samples], 1)
    most = max((log for log, r in zip(logs, read) if r), default=-np.inf)
    return np.ones(len(samples)) if np.isneginf(most) else np.exp(np.minimum(logs - most, 0.0))
