"""How a question is put, how its answer is written, and how a model says how sure it is."""

import dataclasses
from collections.abc import Sequence

from jaxml.lm import chat
from jaxml.lm.generate import Prompt
from jaxml.lm.tokenizer import Tokenizer
from jaxml.tune.r_tuning.items import Item

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class Scale:
    """A question after the answer, and what may be said to it.

    Args:
        phrases: ways of saying how sure one is.
        values: how sure each is, from 0 to 1.

    Raises:
        ValueError: phrases and values that do not agree, or that are no scale.

    Example:
        >>> WORDS.phrases[0]
        'Certain.'
    """

    question: str
    phrases: tuple[str, ...]
    values: tuple[float, ...]

    def __post_init__(self):
        good = len(self.phrases) == len(self.values) >= 2 and len(set(self.phrases)) == len(self.phrases)
        if not good or not all(0 <= v <= 1 for v in self.values) or len(set(self.values)) < 2:
            raise ValueError(
                "Scale: two or more different phrases, each with a value in [0, 1], not all alike, got "
                f"{list(self.phrases)} and {list(self.values)}."
            )

    def phrase(self, certainty: float) -> str:
        """The phrase whose value is nearest."""
        return self.phrases[min(range(len(self.values)), key=lambda i: abs(self.values[i] - certainty))]


SURE = Scale(
    "Are you sure you accurately answered the question based on your internal knowledge?",
    ("I am sure.", "I am unsure."), (1.0, 0.0),
)  # fmt: skip
GROUNDED = Scale(
    "Are you sure you accurately answered the question based on the given text?",
    ("I am sure.", "I am unsure."), (1.0, 0.0),
)  # fmt: skip
WORDS = Scale(
    "How sure are you of this answer?",
    ("Certain.", "Rather sure.", "Half sure.", "Rather unsure.", "It is a guess."), (1.0, 0.75, 0.5, 0.25, 0.0),
)  # fmt: skip
NUMBERS = Scale(
    "How sure are you of this answer, in percent?",
    tuple(f"{p}%." for p in (100, 80, 60, 40, 20, 0)), (1.0, 0.8, 0.6, 0.4, 0.2, 0.0),
)  # fmt: skip


# What a model may say instead of an answer.
REFUSALS = (
    "I do not know.", "I am not certain of the answer.", "That is beyond what I know.", "I cannot say.",
    "I have no reliable answer to this.", "It is not known to me.", "I would only be guessing.",
    "There is no answer that I could give with confidence.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Form:
    """How questions are put.

    Args:
        shots: questions with answers that are shown first.
        instruction: said before everything.
        scale: how certainty is asked for; not at all where None.
        refusals: said instead of an answer; where there are any, certainty is 1 − p(one of them), and the scale is not
            asked for (R-Tuning-R).
        chat: put through the model's chat template, the question of certainty as the next turn; otherwise plain text,
            an answer a line.

    Example:
        >>> print(Form().prompt(Item("Which is larger?", ("two",), choices=("one", "two"))))
        Question: Which is larger?
        A. one
        B. two
        Answer:
    """

    shots: tuple[Item, ...] = ()
    instruction: str = ""
    scale: Scale | None = SURE
    refusals: tuple[str, ...] = ()
    chat: bool = False

    def prompt(self, item: Item) -> Prompt:
        """What is put before the model, for it to answer."""
        if not self.chat:
            shown = [f"{self._ask(shot)}\nAnswer: {target(shot)}" for shot in self.shots]
            return "\n\n".join(
                [*([self.instruction] if self.instruction else []), *shown, f"{self._ask(item)}\nAnswer:"]
            )
        turns = [
            turn for shot in self.shots
            for turn in (_turn("user", self._ask(shot)), _turn("assistant", target(shot)))
        ]  # fmt: skip
        system = [_turn("system", self.instruction)] if self.instruction else []
        return [*system, *turns, _turn("user", self._ask(item))]

    def parts(self, tokenizer: Tokenizer, item: Item, answer: str) -> tuple[str, str, str]:
        """(the answer as it follows the prompt; what ends it; the question of certainty, up to its answer)."""
        question = "" if self.scale is None else self.scale.question
        if not self.chat:
            return f" {answer}", "\n", f"{question}\n"
        asked, said = self.prompt(item), _turn("assistant", answer)
        opened = chat.render(tokenizer, asked)
        closed = chat.render(tokenizer, [*asked, said], generation_prompt=False)
        again = chat.render(tokenizer, [*asked, said, _turn("user", question)])
        if not closed.startswith(opened + answer) or not again.startswith(closed):
            raise ValueError("r_tuning.Form: this chat template changes earlier turns. Take the form without chat.")
        return answer, closed[len(opened + answer) :], again[len(closed) :]

    @property
    def asked(self) -> tuple[str, ...]:
        """The texts whose likelihood tells how sure the model is."""
        return self.refusals or (self.scale.phrases if self.scale else ())

    @property
    def stop(self) -> tuple[str, ...]:
        """Where an answer ends; a chat's turn ends by itself."""
        return () if self.chat else ("\n",)

    def _ask(self, item: Item) -> str:
        question = item.question if self.chat else f"Question: {item.question}"
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices)]
        return "\n".join([*([item.context, ""] if item.context else []), question, *options])


PLAIN = Form()


def target(item: Item) -> str:
    """The right answer as it is written.

    Example:
        >>> target(Item("1+1?", ("2", "two"))), target(Item("Which is larger?", ("two",), choices=("one", "two")))
        ('2', 'B')
    """
    return said_as(item, item.answers[0])


def said_as(item: Item, answer: str) -> str:
    """An answer as it is written: of a choice its letter.

    Example:
        >>> said_as(Item("1+1?", ("2",)), "3"), said_as(Item("Larger?", ("two",), choices=("one", "two")), "one")
        ('3', 'A')
    """
    return letters(item)[item.choices.index(answer)] if item.choices else answer


def letters(item: Item) -> Sequence[str]:
    """The letters of an item's choices.

    Raises:
        ValueError: more choices than letters.

    Example:
        >>> letters(Item("Which is largest?", ("three",), choices=("one", "two", "three")))
        'ABC'
    """
    if len(item.choices) > len(LETTERS):
        raise ValueError(f"r_tuning.Form: at most {len(LETTERS)} choices, got {len(item.choices)}.")
    return LETTERS[: len(item.choices)]


def _turn(role: str, content: str) -> chat.Message:
    return {"role": role, "content": content}
