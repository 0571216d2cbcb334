"""An answer with all that led to it: evidence, groups, prompts and replies."""

import dataclasses
from typing import Any, NamedTuple

from jaxml.lm.generate import Prompt
from jaxml.rag.passages import Passage


class Evidence(NamedTuple):
    """A text that the answer may rest on.

    Example:
        >>> Evidence(1, "Oslo is the capital.").source
        'memory'
    """

    number: int  # from 1, as it is cited
    text: str
    passage: Passage | None = None  # None where the model wrote it from memory

    @property
    def memory(self) -> bool:
        return self.passage is None

    @property
    def source(self) -> str:
        return "memory" if self.passage is None else self.passage.place


@dataclasses.dataclass
class Group:
    """Evidence that says the same.

    Example:
        >>> Group("the capital is Oslo", members=[1, 3], answer="Oslo").conflicts
        []
    """

    claim: str
    members: list[int]  # numbers of evidence
    conflicts: list[int] = dataclasses.field(default_factory=list)  # places of groups that say otherwise, from 0
    answer: str = ""  # what follows from it
    confidence: float = 0.0


class Step(NamedTuple):
    """A prompt and what came back.

    Example:
        >>> out = Answer("who?", "none", "ada", steps=[Step("memory", "Question: who?\\nAnswer:", " ada")])
        >>> [(step.name, step.reply.strip()) for step in out.steps]
        [('memory', 'ada')]
    """

    name: str
    prompt: Prompt
    reply: str


@dataclasses.dataclass
class Answer:
    """What was found, and how.

    Args:
        text: empty where the evidence is insufficient.
        confidence: from 0 to 1, by the method's own measure; None where it has none.
        groups: of the last round, the chosen one at `chosen`.
        irrelevant: numbers of evidence that says nothing about the question.
        notes: what did not go as it should, in sentences: repairs, fallbacks.

    Example:
        >>> str(Answer("who?", "plain", "Ada")), str(Answer("who?", "plain"))
        ('Ada', 'Insufficient evidence.')
    """

    question: str
    method: str
    text: str = ""
    confidence: float | None = None
    evidence: list[Evidence] = dataclasses.field(default_factory=list)
    groups: list[Group] = dataclasses.field(default_factory=list)
    chosen: int | None = None
    irrelevant: list[int] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return self.text or "Insufficient evidence."

    @property
    def cited(self) -> list[int]:
        """Numbers of the evidence that the answer rests on."""
        return self.groups[self.chosen].members if self.chosen is not None and self.text else []

    @property
    def citations(self) -> list[Passage]:
        """The retrieved passages that the answer rests on."""
        return [e.passage for e in self.evidence if e.number in self.cited and e.passage is not None]


def row(answer: Answer) -> dict[str, Any]:
    """As JSON keeps it.

    Example:
        >>> found = [Evidence(1, "Ada keeps it.", Passage("Ada keeps it.", "a.md")), Evidence(2, "Bob does.")]
        >>> kept = row(Answer("who?", "isolated", "Ada", evidence=found, groups=[Group("Ada", [1])], chosen=0))
        >>> kept["cited"], [(e["source"], e["memory"]) for e in kept["evidence"]]
        ([1], [('a.md', False), ('memory', True)])
    """
    return dataclasses.asdict(answer) | {
        "evidence": [
            {"number": e.number, "text": e.text, "source": e.source, "memory": e.memory} for e in answer.evidence
        ],
        "steps": [step._asdict() for step in answer.steps],
        "cited": answer.cited,
    }  # fmt: skip


def report(answer: Answer) -> str:
    """The answer and its evidence as text for a terminal.

    Example:
        >>> print(report(Answer("who?", "plain", "Ada", confidence=0.9)).strip())
        who?
        → Ada (confidence 0.90)
    """
    sure = "" if answer.confidence is None else f" (confidence {answer.confidence:.2f})"
    lines = [_short(answer.question, 1000), f"→ {_short(str(answer), 1000)}{sure}", ""]
    by_number = {e.number: e for e in answer.evidence}
    for place, group in enumerate(answer.groups):
        mark = "*" if place == answer.chosen else " "
        against = f"  against {', '.join(str(c + 1) for c in group.conflicts)}" if group.conflicts else ""
        lines.append(
            f"{mark} group {place + 1}: {_short(group.answer or group.claim)} ({group.confidence:.2f}){against}"
        )
        if group.claim and group.claim != group.answer:
            lines.append(f"    {_short(group.claim)}")
        lines += [f"    [{n}] {_short(by_number[n].source)}: {_short(by_number[n].text)}" for n in group.members]
    if answer.irrelevant:
        lines.append(f"  not used: {', '.join(f'[{n}] {_short(by_number[n].source)}' for n in answer.irrelevant)}")
    return "\n".join([*lines, *(f"! {note}" for note in answer.notes)])


def _short(text: str, most: int = 100) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else line[: most - 1] + "…"
