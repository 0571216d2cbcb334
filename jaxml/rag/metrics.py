"""What answers are worth, without a model that judges: right, cited rightly, and in which kind of conflict."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxml.rag.passages import Passage
from jaxml.rag.trace import Answer
from jaxml.tune.facts import normalise
from jaxml.tune.r_tuning import judge, metrics
from jaxml.tune.r_tuning.items import Item

CLASSES = {
    (True, True): "both right", (True, False): "retrieval right, memory wrong",
    (False, True): "retrieval wrong, memory right", (False, False): "both wrong",
}  # fmt: skip


def exact(said: str, answers: Sequence[str]) -> bool:
    """Equal to one of the answers, normalised; what normalises to nothing is equal to none.

    Example:
        >>> exact("the Oslo.", ["Oslo", "Kristiania"]), exact("in Oslo", ["Oslo"])
        (True, False)
    """
    return bool(normalise(said)) and normalise(said) in {normalise(a) for a in answers}


def contains(said: str, answers: Sequence[str]) -> bool:
    """One of the answers stands in it as whole words, or it names its number (`r_tuning.judge.right`).

    Example:
        >>> contains("in Oslo", ["Oslo"]), contains("an Osloer", ["Oslo"]), contains("1,200 boats", ["1200"])
        (True, False, True)
    """
    return judge.right(said, Item("?", tuple(answers)))


def f1(said: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, against the answer that fits best.

    Example:
        >>> round(f1("the city of Oslo", ["Oslo"]), 2)
        0.5
    """
    best = 0.0
    for answer in answers:
        a, b = normalise(said).split(), normalise(answer).split()
        shared = sum(min(a.count(w), b.count(w)) for w in set(a))
        best = max(best, 2 * shared / (len(a) + len(b))) if shared else best
    return best


def citation(answer: Answer, supports: Sequence[bool]) -> tuple[float, float]:
    """(precision, recall) of what is cited: of the cited passages the share that supports a right answer, and of those
    that do the share cited. NaN where there is nothing to count: of recall, no passage that supports one.

    Args:
        supports: of each passage given, in order.

    Raises:
        ValueError: not one of `supports` a passage.

    Example:
        >>> from jaxml.rag.trace import Evidence, Group
        >>> found = [Evidence(number, "", Passage("", "a")) for number in (1, 2, 3, 4)]
        >>> out = Answer("who?", "isolated", "ada", evidence=found, groups=[Group("ada", [1, 2])], chosen=0)
        >>> citation(out, [True, False, True, False])
        (0.5, 0.5)
    """
    retrieved = [e.number for e in answer.evidence if not e.memory]
    if len(retrieved) != len(supports):
        raise ValueError(f"metrics.citation: supports has one entry a passage, {len(retrieved)}, got {len(supports)}.")
    good = {n for n, yes in zip(retrieved, supports) if yes}
    cited = {n for n in answer.cited if n in retrieved}
    share = lambda part, whole: len(part) / len(whole) if whole else float("nan")
    return share(good & cited, cited), share(good & cited, good)


def evaluate(
    answers: Sequence[Answer],
    right: Sequence[Sequence[str]],
    *,
    wrong: Sequence[Sequence[str]] | None = None,
    supports: Sequence[Sequence[bool]] | None = None,
    memory: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """All figures of one method, those of accuracy with 95 % bootstrap intervals, NaN below ten questions.

    Args:
        right: of each question its right answers.
        wrong: its answers that are known to be wrong: how often one is given.
        supports: of each question, which of its passages support a right answer; for citations and classes.
        memory: which questions the model answers rightly without passages; for the classes.

    Returns:
        questions, answered, exact, contains, f1 (each with NAME_interval), and where there is what they need:
        wrong, citation_precision, citation_recall (where any answer cites), classes (name → questions and contains).

    Example:
        >>> said = [Answer("who?", "plain", text) for text in ("Ada", "It is Ada.", "Bob", "")]
        >>> found = evaluate(said, [["Ada"]] * 4, wrong=[["Bob"]] * 4)
        >>> {name: found[name] for name in ("answered", "exact", "contains", "wrong")}
        {'answered': 0.75, 'exact': 0.25, 'contains': 0.5, 'wrong': 0.25}
    """
    columns = {
        "exact": np.array([exact(a.text, r) for a, r in zip(answers, right, strict=True)], float),
        "contains": np.array([contains(a.text, r) for a, r in zip(answers, right)], float),
        "f1": np.array([f1(a.text, r) for a, r in zip(answers, right)]),
    }
    out: dict[str, Any] = {"questions": len(answers), "answered": float(np.mean([bool(a.text) for a in answers]))}
    for name, values in columns.items():
        out[name] = float(values.mean())
        out[f"{name}_interval"] = list(metrics.interval(np.mean, values))
    if wrong is not None:
        given = [bool(w) and contains(a.text, w) for a, w in zip(answers, wrong, strict=True)]
        out["wrong"] = float(np.mean(given))
    if supports is not None:
        cites = any(a.cited for a in answers)  # a method that never does has no such figures
        pairs = [citation(a, s) for a, s in zip(answers, supports, strict=True)] if cites else []
        for name, values in zip(("citation_precision", "citation_recall"), zip(*pairs) if pairs else ((), ())):
            known = [v for v in values if not np.isnan(v)]
            out[name] = float(np.mean(known)) if known else float("nan")
    if supports is not None and memory is not None:
        kinds = [CLASSES[any(s), bool(m)] for s, m in zip(supports, memory, strict=True)]
        out["classes"] = {
            name: {"questions": len(here), "contains": float(columns["contains"][here].mean())}
            for name in CLASSES.values() if (here := [i for i, kind in enumerate(kinds) if kind == name])
        }  # fmt: skip
    return out


def markdown(report: dict[str, Any]) -> str:
    """`evaluate`'s figures of several methods as tables.

    Example:
        >>> found = evaluate([Answer("who?", "plain", "It is Ada.")], [["Ada"]])
        >>> print(markdown({"plain": found}).splitlines()[2])
        | plain | 100.0% | 0.0% | 0.500 | 100.0% | – | – | – |
    """
    percent = lambda x: "–" if x is None or np.isnan(x) else f"{x:.1%}"
    ranged = lambda f, name: metrics.written(f[name], f[f"{name}_interval"], percent)
    lines = [
        "| method | contains the answer | exact | F1 | answered | a wrong one | cited rightly | support cited |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, f in report.items():
        cells = [ranged(f, "contains"), ranged(f, "exact"), f"{f['f1']:.3f}"]
        cells += [percent(f.get(key)) for key in ("answered", "wrong", "citation_precision", "citation_recall")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    kinds = [kind for kind in CLASSES.values() if any(kind in f.get("classes", {}) for f in report.values())]
    if kinds:
        counts = {kind: f["classes"][kind]["questions"] for f in report.values() for kind in kinds if "classes" in f}
        lines += ["", "| contains the answer | " + " | ".join(f"{kind} ({counts[kind]})" for kind in kinds) + " |"]
        lines.append("|---|" + "---|" * len(kinds))
        for name, f in report.items():
            of = f.get("classes", {})
            lines.append(
                f"| {name} | " + " | ".join(percent(of.get(kind, {}).get("contains")) for kind in kinds) + " |"
            )
    return "\n".join([*lines, ""])


def supporting(passages: Sequence[Passage], answers: Sequence[str]) -> list[bool]:
    """Which passages hold one of the answers, in words or as one of their numbers.

    Example:
        >>> supporting([Passage("In 1900 it had 1,200 boats.", "a"), Passage("It had boats.", "b")], ["1200"])
        [True, False]
    """
    values = {value for a in answers if (value := judge.number(a)) is not None}
    return [contains(p.whole, answers) or bool(values & set(judge.numbers(p.whole))) for p in passages]
