"""Methods as conversations with a model: each yields what it asks, and the requests of all questions go out together.

def method(question):
    [reply] = yield Ask([question])
    return reply.text

calls.run(llm, [method("who?"), method("where?")])
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxml.lm.generate import Prompt
from jaxml.prompts.llm import LLM, Reply, Scores
from jaxml.prompts.store import Store, key

T = TypeVar("T")


class Ask(NamedTuple):
    """Continuations of prompts: a `Reply` for each comes back.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> def method(question):
        ...     [reply] = yield Ask([question], max_new_tokens=8)
        ...     return reply.text.capitalize()
        >>> run(Scripted({"who?": "ada", "where?": "oslo"}), [method("who?"), method("where?")])
        ['Ada', 'Oslo']
    """

    prompts: Sequence[Prompt]
    max_new_tokens: int = 64
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0


class Weigh(NamedTuple):
    """The likelihood of each prompt's choices: `Scores` for each prompt come back.

    Example:
        >>> from types import SimpleNamespace
        >>> def method(question, choices):
        ...     [scores] = yield Weigh([question], [choices])
        ...     return choices[scores.log_probs.argmax()]
        >>> score = lambda prompts, choices: [Scores(-np.array([*map(len, of)]), np.ones(len(of)), 1) for of in choices]
        >>> llm = SimpleNamespace(name="terse", score=score)  # the shorter a text, the likelier
        >>> run(llm, [method("Is it?", ["perhaps", "no"])])
        ['no']
    """

    prompts: Sequence[Prompt]
    choices: Sequence[Sequence[str]]


Steps = Generator[Ask | Weigh, list, T]
PART = 64  # requests that are sent, and kept, at once


def run(
    llm: LLM,
    methods: Sequence[Steps],
    store: Store | None = None,
    *,
    tick: Callable[[int, int], None] | None = None,
) -> list:
    """What each method returns.

    In each round the methods that wait are asked what they want, and all of it is put to the model in batches.

    Args:
        store: keeps each reply as it comes; what it has is not asked again.
        tick: told (methods that are done, requests put so far).

    Example:
        >>> from jaxml import prompts, testing
        >>> def method(question):
        ...     [reply] = yield Ask([question], max_new_tokens=3)
        ...     return len(reply.text)
        >>> run(prompts.Local(testing.tiny_model()), [method("who? ")])
        [3]
    """
    results: list[Any] = [None] * len(methods)
    waiting: dict[int, Ask | Weigh] = {}
    done, put = 0, 0

    def go_on(i: int, replies: list | None) -> None:
        nonlocal done
        try:
            waiting[i] = methods[i].send(replies)
        except StopIteration as stop:
            results[i] = stop.value
            waiting.pop(i, None)
            done += 1

    for i in range(len(methods)):
        go_on(i, None)
    while waiting:
        asked = dict(waiting)
        replies: dict[int, list] = {i: [None] * len(request.prompts) for i, request in asked.items()}
        for group in _alike(asked):
            for first in range(0, len(group), PART):
                part = group[first : first + PART]
                for (i, n), reply in zip(part, _put(llm, [(asked[i], n) for i, n in part], store)):
                    replies[i][n] = reply
                put += len(part)
                if tick:
                    tick(done, put)
        for i in asked:
            go_on(i, replies[i])
        if tick:
            tick(done, put)
    return results


def _alike(asked: dict[int, Ask | Weigh]) -> list[list[tuple[int, int]]]:
    """(method, number of its prompt) of requests that can go out together."""
    groups: dict[tuple, list[tuple[int, int]]] = {}
    for i, request in asked.items():
        kind = tuple(request[1:]) if isinstance(request, Ask) else ()
        for n in range(len(request.prompts)):
            groups.setdefault((type(request).__name__, *kind), []).append((i, n))
    return list(groups.values())


def _put(llm: LLM, requests: list[tuple[Ask | Weigh, int]], store: Store | None) -> list:
    """Replies to requests of one kind; those that are kept come from the store."""
    keys = [key(_asked(llm, request, n)) for request, n in requests]
    kept = {name: None if store is None else store.get(name) for name in keys}
    missing = {name: i for i, name in reversed(list(enumerate(keys))) if kept[name] is None}  # the same asked once
    first = requests[0][0]
    prompts = [requests[i][0].prompts[requests[i][1]] for i in missing.values()]
    if missing and isinstance(first, Ask):
        options = dict(zip(Ask._fields[1:], first[1:]))
        found = [list(reply) for reply in llm.generate(prompts, **options)]
    elif missing:
        scores = llm.score(prompts, [list(requests[i][0].choices[requests[i][1]]) for i in missing.values()])
        found = [[s.log_probs.tolist(), s.tokens.tolist(), int(s.cost)] for s in scores]
    for name, one in zip(missing, found if missing else ()):
        kept[name] = one
        if store is not None:
            store.put(name, one)
    if isinstance(first, Ask):
        return [Reply(*kept[name]) for name in keys]
    return [Scores(np.array(p, np.float64), np.array(n), cost) for p, n, cost in map(kept.get, keys)]


def _asked(llm: LLM, request: Ask | Weigh, n: int) -> dict[str, Any]:
    if isinstance(request, Ask):
        return {"llm": llm.name, "prompt": request.prompts[n], "how": list(request[1:])}
    return {"llm": llm.name, "prompt": request.prompts[n], "choices": list(request.choices[n])}
