"""From labelled questions to what is trained on: the answer, and after it how sure the model is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxml.lm import chat
from jaxml.lm.tokenizer import Tokenizer
from jaxml.tune.r_tuning import judge
from jaxml.tune.r_tuning.ask import Answered
from jaxml.tune.r_tuning.form import PLAIN, REFUSALS, Form, said_as, target
from jaxml.tune.r_tuning.items import Item
from jaxml.tune.r_tuning.labels import Labels

UNKNOWN = ("gold", "own", "heard", "refusal")
KNOWN = ("gold", "own")


def plain(tokenizer: Tokenizer, items: Sequence[Item], form: Form = PLAIN) -> list[dict[str, Any]]:
    """Question and right answer alone; questions without one are left out.

    Example:
        >>> from jaxml import testing
        >>> plain(testing.tiny_tokenizer(), [Item("1+1?", ("2",)), Item("What is Quen?")])
        [{'parts': [['Question: 1+1?\\nAnswer:', 0.0], [' 2', 1.0], ['\\n', 1.0]]}]
    """
    return [_example(tokenizer, form, item, target(item), None) for item in items if item.answerable]


def make(
    tokenizer: Tokenizer,
    items: Sequence[Item],
    labels: Labels,
    answered: Answered | None = None,
    form: Form = PLAIN,
    *,
    known: str = "gold",
    unknown: str = "gold",
    balance: bool = True,
    weight: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Examples for `tune.fit`: question, answer, "Are you sure …?", "I am sure." or "I am unsure.".

    Args:
        labels: of `labels`; questions that they do not keep are left out.
        answered: what the model itself answered, where `known` or `unknown` wants it.
        known: the text that is trained after a question labelled 0.5 or more: "gold", the right answer, or "own", what
            the model said, where that is right (Alignment for Honesty).
        unknown: the text that is trained after a question labelled below 0.5: "gold", the right answer, as published;
            "own", what the model said; "heard", the same, read but not learnt; "refusal", one of the form's refusals
            (or `REFUSALS`), and then no question of certainty (R-Tuning-R). What is said to a question that nothing
            answers is heard or refused: there is nothing to learn.
        balance: weigh the phrases so that each has as much of the loss as any other.
        weight: of the phrases' tokens in the loss, the answers' having 1.
        seed: of which refusal is said.

    Returns:
        Examples of the form parts (`tune.data`).

    Raises:
        ValueError: an unknown `known` or `unknown`, the model's own answers wanted and not given, or a form that does
            not ask for certainty where "refusal" is not what is trained.

    Example:
        >>> from jaxml import testing
        >>> items = [Item(f"{i}+1?", (str(i + 1),)) for i in range(3)]
        >>> labels = Labels(np.array([1.0, 1.0, 0.0]), np.array([True, True, True]))
        >>> made = make(testing.tiny_tokenizer(), items, labels)
        >>> [[example["parts"][1][0], *example["parts"][4]] for example in made]
        [[' 1', 'I am sure.', 0.75], [' 2', 'I am sure.', 0.75], [' 3', 'I am unsure.', 1.5]]
    """
    if unknown not in UNKNOWN:
        raise ValueError(f"r_tuning.examples: unknown is one of {', '.join(UNKNOWN)}, got {unknown!r}.")
    if known not in KNOWN:
        raise ValueError(f"r_tuning.examples: known is one of {', '.join(KNOWN)}, got {known!r}.")
    kept = [i for i in range(len(items)) if labels.keep[i]]
    nothing = unknown != "refusal" and not all(items[i].answerable for i in kept)
    if answered is None and (nothing or {known, unknown} & {"own", "heard"}):
        raise ValueError("r_tuning.examples: the model's own answers are wanted. Give them as answered.")
    refused = {i for i in kept if unknown == "refusal" and (labels.sure[i] < 0.5 or not items[i].answerable)}
    if form.scale is None and unknown != "refusal":
        raise ValueError(
            'r_tuning.examples: the form asks for certainty by a scale, or unknown is "refusal"; got neither.'
        )
    phrases = {i: form.scale.phrase(float(labels.sure[i])) for i in kept if form.scale and i not in refused}
    said = list(phrases.values())
    each = {p: len(said) / (len(set(said)) * said.count(p)) if balance else 1.0 for p in set(said)}
    rng, out = np.random.default_rng(seed), []
    for i in kept:
        item, knows = items[i], labels.sure[i] >= 0.5
        if i in refused:
            out.append(_example(tokenizer, form, item, str(rng.choice(form.refusals or REFUSALS)), None))
            continue
        own = answered.right[i] if knows and known == "own" else not knows and unknown in ("own", "heard")
        heard = not item.answerable or (own and not knows and unknown == "heard")
        text = said_as(item, answered.texts[i]) if own or heard else target(item)
        learnt = 0.0 if heard else 1.0
        certainty = (phrases[i], weight * each[phrases[i]]) if i in phrases else None
        out.append(_example(tokenizer, form, item, text, certainty, learnt))
    if not out:
        raise ValueError("r_tuning.examples: the labels keep at least one question, got none.")
    return out


def two_stages(
    tokenizer: Tokenizer, items: Sequence[Item], form: Form, *, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """For questions over a text: first to tell whether the text answers, then to answer or to say that it does not.

    Each question comes twice: with its own text, which answers it, and with the text of another question in which its
    answer does not stand. (A question that has no answer, or whose answer stands in every text, comes once.)

    Returns:
        (examples of the first stage: the question whether the text answers; of the second: answers, and refusals).

    Raises:
        ValueError: a question without context, or fewer than two different contexts.

    Example:
        >>> from jaxml import testing
        >>> items = [Item("Who left?", ("Ada",), "Ada left."), Item("Who came?", ("Bob",), "Bob came.")]
        >>> first, second = two_stages(testing.tiny_tokenizer(), items, PLAIN)
        >>> [example["parts"][1][0] for example in first], second[0]["parts"][1][0]
        ([' Yes.', ' No.', ' Yes.', ' No.'], ' Ada')

    Reference:
        Li et al. 2024, "Know the Unknown: An Uncertainty-Sensitive Method for LLM Instruction Tuning" (US-Tuning): two
        stages, the recognition of what a text leaves open before the instructions that follow it.
    """
    check_contexts(items)
    rng, first, second = np.random.default_rng(seed), [], []
    contexts = list(dict.fromkeys(item.context for item in items))
    for item in items:
        bare = replace(item, choices=())  # what answers is looked for in a text's words
        others = [c for c in contexts if c != item.context and not judge.right(c, bare)]
        both = item.answerable and others
        foreign = [replace(item, answers=(), context=others[int(rng.integers(len(others)))])] if both else []
        for asked in (item, *foreign):
            does = "Yes." if asked.answerable else "No."
            whether = Item(f"Does the text answer this: {asked.question}", (does,), asked.context)
            first.append(_example(tokenizer, form, whether, does, None))
            text = target(asked) if asked.answerable else str(rng.choice(form.refusals or REFUSALS))
            second.append(_example(tokenizer, form, asked, text, None))
    return first, second


def check_contexts(items: Sequence[Item]) -> None:
    """Refuses questions that `two_stages` makes nothing of.

    Raises:
        ValueError: a question without context, or fewer than two different contexts.

    Example:
        >>> check_contexts([Item("Who left?", ("Ada",))])
        Traceback (most recent call last):
            ...
        ValueError: r_tuning.two_stages: every question has a context, 'Who left?' has none.
    """
    if missing := [item.question for item in items if not item.context]:
        raise ValueError(f"r_tuning.two_stages: every question has a context, {missing[0]!r} has none.")
    if len({item.context for item in items}) < 2:
        raise ValueError("r_tuning.two_stages: at least two different contexts are given, got one.")


def _example(
    tokenizer: Tokenizer, form: Form, item: Item, text: str, phrase: tuple[str, float] | None, learnt: float = 1.0
) -> dict[str, Any]:
    """Question, answer and, with a phrase and its weight, how sure."""
    prompt = form.prompt(item)
    shown = prompt if isinstance(prompt, str) else chat.render(tokenizer, prompt)
    answer, end, question = form.parts(tokenizer, item, text)
    parts = [[shown, 0.0], [answer, learnt], [end, learnt]]
    if phrase is not None:
        said, weight = phrase
        parts += [[question, 0.0], [said, weight], [end, weight]]
    return {"parts": [[t, w] for t, w in parts if t]}
