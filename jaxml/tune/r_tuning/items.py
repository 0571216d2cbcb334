"""Questions with their answers: from JSONL, and cut into the parts of a run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxml.tune.data import read_lines

KEYS = ("question", "answers", "answer", "context", "choices", "group", "answerable")


@dataclasses.dataclass(frozen=True)
class Item:
    """A question, and what is right.

    Args:
        answers: any of them is right; the first is trained on. Empty where the question has no answer.
        context: a text that the question is about; nothing for what a model is to know.
        choices: the answers that there are to choose from, the right one among them.
        group: what kind of question it is (a relation, a subject).

    Raises:
        ValueError: an empty question, answers or choices that are one text, or choices that lack the answer or hold one
            twice.

    Example:
        >>> Item("Who keeps the lighthouse?", ("Ada", "Ada Lovelace")).answerable
        True
    """

    question: str
    answers: tuple[str, ...] = ()
    context: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self):
        if isinstance(self.answers, str) or isinstance(self.choices, str):
            raise ValueError(f"Item: answers and choices are tuples of texts, got the text {self.answers!r}.")
        if not self.question.strip():
            raise ValueError("Item: a question is not empty.")
        if any(not answer.strip() for answer in self.answers):
            raise ValueError(f"Item: an answer is not empty, one to {self.question!r} is.")
        if self.choices and len(set(self.choices)) < len(self.choices):
            raise ValueError(f"Item: choices are different, got {list(self.choices)}.")
        if self.choices and self.answers and not set(self.answers) <= set(self.choices):
            raise ValueError(
                f"Item: the answer is among the choices, got {self.answers[0]!r} and {list(self.choices)}."
            )

    @property
    def answerable(self) -> bool:
        return bool(self.answers)


def read(path: str | Path) -> list[Item]:
    """Questions from a file, one JSON object a line.

    Keys: question; answers (a list) or answer (a text); and where there is one: context, choices (a list of texts),
    group (a text), answerable (false where nothing answers the question, which then has no answers).

    Raises:
        FileNotFoundError, ValueError: no such file, an empty one, or a wrong line, by its number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(f"{folder}/q.jsonl").write_text('{"question": "1+1?", "answer": "2"}')
        ...     read(f"{folder}/q.jsonl")[0].answers
        ('2',)
    """
    return read_lines(path, item, "question")


def item(row: Any) -> Item:
    """A question from an object of a file.

    Example:
        >>> item({"question": "1+1?", "answer": "2"}).answers
        ('2',)

    Raises:
        ValueError: an unknown key, a missing one, or a value of the wrong kind.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a question is an object with the keys {', '.join(KEYS)}, got {type(row).__name__}.")
    if unknown := sorted(set(row) - set(KEYS)):
        raise ValueError(f"a question has the keys {', '.join(KEYS)}, got {', '.join(unknown)}.")
    if "answer" in row and "answers" in row:
        raise ValueError("a question has answer or answers, got both.")
    answers = [row["answer"]] if "answer" in row else row.get("answers", [])
    for key, value in (("question", row.get("question")), *((k, row.get(k, "")) for k in ("context", "group"))):
        if not isinstance(value, str):
            raise ValueError(f"{key} is a text, got {type(value).__name__}.")
    for key, value in (("answers", answers), ("choices", row.get("choices", []))):
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{key} are a list of texts, got {value!r}.")
    answerable = row.get("answerable", True)
    if not isinstance(answerable, bool) or answerable != bool(answers):
        raise ValueError(f"a question has answers unless answerable is false, got {answers} and {answerable!r}.")
    return Item(
        row["question"], tuple(answers), row.get("context", ""), tuple(row.get("choices", [])), row.get("group", "")
    )


def row(one: Item) -> dict[str, Any]:
    """The object of a file that `item` reads as this question.

    Example:
        >>> row(Item("1+1?", ("2",), group="sums")), row(Item("Who is Quen?"))
        ({'question': '1+1?', 'answers': ['2'], 'group': 'sums'}, {'question': 'Who is Quen?', 'answerable': False})
    """
    out: dict[str, Any] = {"question": one.question}
    out |= {"answers": list(one.answers)} if one.answerable else {"answerable": False}
    out |= {k: v for k, v in (("context", one.context), ("group", one.group)) if v}
    return out | ({"choices": list(one.choices)} if one.choices else {})


@dataclasses.dataclass(frozen=True)
class Split:
    """The parts of a run; no question stands in two of them.

    Example:
        >>> parts = split([Item(f"what is {i}?", (str(i),)) for i in range(100)], new_groups=[])
        >>> isinstance(parts, Split), len(parts.new)
        (True, 0)
    """

    shots: list[Item]  # shown to the untuned model, that it may know the form
    train: list[Item]
    calibration: list[Item]  # chooses thresholds and weights
    seen: list[Item]  # held out, of groups that are trained on ("in-domain")
    new: list[Item]  # held out, of groups that are not ("out-of-domain")
    unanswerable: list[Item]


def split(
    items: Sequence[Item],
    *,
    train: int = 400,
    calibration: int = 150,
    test: int = 200,
    new: int = 200,
    shots: int = 4,
    new_groups: Sequence[str] | float = 0.25,
    unanswerable: Sequence[Item] = (),
    train_unanswerable: Sequence[Item] = (),
    seed: int = 0,
) -> Split:
    """Cuts questions into parts, in the proportions given where there are fewer.

    Args:
        items: those without an answer go to `Split.unanswerable`, as do those of `unanswerable`. What several say of
            one question is all right.
        train_unanswerable: more questions to train on, which nothing answers; in random places among the others.
        new_groups: that are kept out of training: their names, or their share of all groups (rounded down to none
            where there are fewer than 4).

    Raises:
        ValueError: fewer than 20 different questions with an answer, an unknown group, a part without questions, or an
            answer to a question that is said to have none.

    Example:
        >>> items = [Item(f"what is {i}?", (str(i),), group=str(i % 4)) for i in range(100)]
        >>> parts = split(items, train=40, calibration=10, test=10, new=10)
        >>> len(parts.train), len(parts.seen)
        (40, 10)
    """
    asked: dict[tuple, Item] = {}
    for one in items:
        before = asked.setdefault((one.question, one.context, one.choices), one)
        both = tuple(dict.fromkeys((*before.answers, *one.answers)))
        asked[one.question, one.context, one.choices] = dataclasses.replace(before, answers=both)
    known = [one for one in asked.values() if one.answerable]
    for name, given in (("unanswerable", unanswerable), ("train_unanswerable", train_unanswerable)):
        if wrong := [one.question for one in given if one.answerable]:
            raise ValueError(f"r_tuning.split: {name} are questions without an answer, {wrong[0]!r} has one.")
    taught = {(one.question, one.context) for one in train_unanswerable}
    nothing = [one for one in (*asked.values(), *unanswerable) if not one.answerable]
    nothing = [one for one in dict.fromkeys(nothing) if (one.question, one.context) not in taught]
    if len(known) < 20:
        raise ValueError(f"r_tuning.split: at least 20 different questions have an answer, got {len(known)}.")
    rng = np.random.default_rng(seed)
    groups = sorted({one.group for one in known})
    if isinstance(new_groups, float | int):
        if not 0 <= new_groups < 1:
            raise ValueError(f"r_tuning.split: new_groups is a share in [0, 1), or names, got {new_groups}.")
        count = round(new_groups * len(groups)) if len(groups) >= 4 else 0
        new_groups = [groups[i] for i in rng.permutation(len(groups))[:count]]
    if missing := sorted(set(new_groups) - set(groups)):
        raise ValueError(f"r_tuning.split: groups are {', '.join(map(repr, groups))}; unknown: {', '.join(missing)}.")
    known = [known[i] for i in rng.permutation(len(known))]
    fresh = [one for one in known if one.group in new_groups][:new]
    rest = [one for one in known if one.group not in new_groups]
    shown, rest = rest[:shots], rest[shots:]
    wanted = np.array([train, calibration, test], float)
    counts = (wanted * min(1.0, len(rest) / wanted.sum())).astype(int)
    if not counts.all():
        raise ValueError(
            f"r_tuning.split: at least one question to train on, to calibrate and to test, got {counts.tolist()} of "
            f"{len(rest)} (wanted: {train}, {calibration}, {test})."
        )
    a, b, c = np.cumsum(counts)
    asked_to = [*rest[:a], *train_unanswerable]
    if train_unanswerable:
        asked_to = [asked_to[i] for i in rng.permutation(len(asked_to))]
    return Split(shown, asked_to, rest[a:b], rest[b:c], fresh, nothing)
