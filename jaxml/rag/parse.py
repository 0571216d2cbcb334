"""Groups and answers out of a model's JSON: strictly, after the repairs that JSON from models needs."""

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxml.rag.trace import Group


def groups(reply: str, numbers: Sequence[int]) -> tuple[list[Group], list[int]]:
    """(groups, irrelevant texts) of a consolidation.

    Args:
        numbers: of the texts that were shown.

    Raises:
        ValueError: no JSON, another form, a text that is unknown, missing or named twice; as a sentence for the model.

    Example:
        >>> said = '{"groups": [{"claim": "Oslo", "texts": [1, 2], "conflicts": []}], "irrelevant": [3]}'
        >>> made, rest = groups(said, [1, 2, 3])
        >>> made[0].members, rest
        ([1, 2], [3])
    """
    found = _object(reply)
    _keys(found, {"groups"}, {"irrelevant"}, "the whole")
    if not isinstance(found["groups"], list):
        raise ValueError("groups is not a list.")
    out = []
    for place, one in enumerate(found["groups"], 1):
        if not isinstance(one, dict):
            raise ValueError(f"group {place} is not an object.")
        _keys(one, {"claim", "texts"}, {"conflicts"}, f"group {place}")
        if not isinstance(one["claim"], str) or not one["claim"].strip():
            raise ValueError(f"group {place} has no claim.")
        members = _numbers(one["texts"], f"texts of group {place}")
        if not members:
            raise ValueError(f"group {place} has no texts.")
        out.append(Group(one["claim"].strip(), members, _numbers(one.get("conflicts", []), f"conflicts of {place}")))
    rest = _numbers(found.get("irrelevant", []), "irrelevant")
    named = [n for group in out for n in group.members] + rest
    if unknown := sorted(set(named) - set(numbers)):
        raise ValueError(f"there is no text {unknown[0]}.")
    if twice := sorted({n for n in named if named.count(n) > 1}):
        raise ValueError(f"text {twice[0]} stands in two places.")
    if missing := sorted(set(numbers) - set(named)):
        raise ValueError(f"text {missing[0]} is missing.")
    for place, group in enumerate(out):
        if wrong := [c for c in group.conflicts if not 1 <= c <= len(out)]:
            raise ValueError(f"there is no group {wrong[0]}.")
        group.conflicts = [c - 1 for c in group.conflicts if c - 1 != place]
    for place, group in enumerate(out):  # who contradicts is contradicted
        for other in group.conflicts:
            if place not in out[other].conflicts:
                out[other].conflicts.append(place)
    return out, rest


def answers(reply: str, count: int) -> tuple[list[tuple[str, float]], int]:
    """([(answer, confidence in [0, 1]) of each group], the place of the chosen one from 0).

    Args:
        count: of groups.

    Raises:
        ValueError: as `groups`.

    Example:
        >>> answers('Sure: {"answers": [{"group": 1, "answer": "Oslo", "confidence": 80}], "final": 1}', 1)
        ([('Oslo', 0.8)], 0)
    """
    found = _object(reply)
    _keys(found, {"answers", "final"}, set(), "the whole")
    if not isinstance(found["answers"], list):
        raise ValueError("answers is not a list.")
    out: list[tuple[str, float] | None] = [None] * count
    for one in found["answers"]:
        if not isinstance(one, dict):
            raise ValueError("an answer is not an object.")
        _keys(one, {"group", "answer", "confidence"}, set(), "an answer")
        [place] = _numbers([one["group"]], "group")
        if not 1 <= place <= count or out[place - 1] is not None:
            raise ValueError(f"there is no group {place}, or it has two answers.")
        sure = one["confidence"]
        if not isinstance(one["answer"], str) or isinstance(sure, bool) or not isinstance(sure, int | float):
            raise ValueError(f"the answer of group {place} is no text, or its confidence no number.")
        if not 0 <= sure <= 100:
            raise ValueError(f"the confidence of group {place} is not between 0 and 100.")
        out[place - 1] = (one["answer"].strip(), sure / 100)
    if None in out:
        raise ValueError(f"group {out.index(None) + 1} has no answer.")
    [final] = _numbers([found["final"]], "final")
    if not 1 <= final <= count:
        raise ValueError(f"there is no group {final}.")
    return out, final - 1


def _object(reply: str) -> dict[str, Any]:
    """The JSON object in a reply: out of a fence, without what stands around it, without commas too many."""
    fenced = reply.split("```")
    text = next((part for part in fenced[1::2] if "{" in part), reply) if len(fenced) > 2 else reply
    first, last = text.find("{"), text.rfind("}")
    if first < 0 or last < first:
        raise ValueError("there is no JSON object.")
    text = text[first : last + 1]
    for repaired in (text, re.sub(r",(\s*[\]}])", r"\1", text), re.sub(r"[“”]", '"', text)):
        try:
            found = json.loads(repaired)
        except (ValueError, RecursionError) as error:
            problem = error
            continue
        if isinstance(found, dict):
            return found
        raise ValueError("it is not an object.")
    raise ValueError(f"it is not JSON ({problem}).")


def _keys(found: dict, needed: set[str], more: set[str], who: str) -> None:
    if missing := sorted(needed - set(found)):
        raise ValueError(f"{who} lacks {missing[0]}.")
    if unknown := sorted(set(found) - needed - more):
        raise ValueError(f"{who} has {unknown[0]}, which is not asked for.")


def _numbers(values: Any, who: str) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{who} is not a list of whole numbers.")
    return list(dict.fromkeys(values))
