"""The methods in one interface: (llm, question, passages) to an answer. Astute RAG, and what it is measured against.

```python
[answer] = rag.answer(llm, ["who keeps the lighthouse?"], [passages], "astute")
```
"""

from collections import Counter
from collections.abc import Callable, Sequence

from jaxml.lm.generate import Prompt
from jaxml.prompts.llm import LLM
from jaxml.prompts.store import Store
from jaxml.rag import wording
from jaxml.rag.astute import documents, prompted
from jaxml.rag.calls import Ask, Steps, run
from jaxml.rag.passages import Passage
from jaxml.rag.store import Hit
from jaxml.rag.trace import Answer, Evidence, Group, Step
from jaxml.rag.weigh import clusters, scored

BRIEF_TOKENS = 24
MODES = ("prompt", "score", "auto")
STOP: dict[str, tuple[str, ...]] = {"chat": (), "lines": ("\n",)}  # form of a prompt → where its reply ends


def closed(llm: LLM, question: str, passages: Sequence[Passage], *, form: str = "chat") -> Steps[Answer]:
    """No retrieval: what the model knows.

    Args:
        form: "chat", a turn that says what is wanted, or "lines", lines after examples, as likelihoods are read from
            (`wording.lines`).

    Raises:
        ValueError: an unknown form.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> llm = Scripted({"who?": "ada"})
        >>> [str(out) for out in run(llm, [closed(llm, "who?", []), closed(llm, "where?", [])])]
        ['ada', 'Insufficient evidence.']
    """
    out = Answer(question, "none")
    yield from _brief(out, "memory", _in(form, _alone(llm, question), wording.lines(llm, question)))
    return out


def plain(llm: LLM, question: str, passages: Sequence[Passage], *, form: str = "chat") -> Steps[Answer]:
    """All passages in one prompt.

    Args:
        form: as in `closed`.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> llm = Scripted({"who?": "ada"})
        >>> [out] = run(llm, [plain(llm, "who?", [Passage("The answer is bob.", "a")])])
        >>> out.text, [step.name for step in out.steps]
        ('bob', ['texts'])
    """
    out, asked = _before(llm, question, passages, "plain")
    lines = wording.lines(llm, question, *(e.text for e in out.evidence))
    yield from _brief(out, "texts", _in(form, asked(wording.PLAIN), lines))
    return out


def consistent(
    llm: LLM, question: str, passages: Sequence[Passage], *, samples: int = 5, temperature: float = 0.7
) -> Steps[Answer]:
    """Self-consistency: the answer that most of several samples over all passages come to.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> llm = Scripted({})
        >>> [out] = run(llm, [consistent(llm, "who?", [Passage("The answer is bob.", "a")], samples=3)])
        >>> out.text, out.confidence, [step.name for step in out.steps]
        ('bob', 1.0, ['sample 1', 'sample 2', 'sample 3'])

    Reference:
        Wang et al. 2023, "Self-Consistency Improves Chain of Thought Reasoning in Language Models".
    """
    out, asked = _before(llm, question, passages, "consistent")
    prompt, said = asked(wording.PLAIN), []
    for seed in range(samples):
        [reply] = yield Ask([prompt], BRIEF_TOKENS, temperature, seed=seed)
        out.steps.append(Step(f"sample {seed + 1}", prompt, reply.text))
        said.append(wording.settled(reply.text))
    _vote(out, said, None)
    return out


def isolated(llm: LLM, question: str, passages: Sequence[Passage], *, form: str = "chat") -> Steps[Answer]:
    """Isolate, then aggregate: each passage is answered from alone, and the answers vote.

    Args:
        form: as in `closed`.

    Raises:
        ValueError: an unknown form.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> llm, said = Scripted({}), ["The answer is bob.", "The answer is carl.", "Nothing.", "The answer is bob."]
        >>> [out] = run(llm, [isolated(llm, "who?", [Passage(text, "a") for text in said])])
        >>> out.text, out.confidence, out.cited, out.irrelevant
        ('bob', 0.5, [1, 4], [3])

    Reference:
        Xiang et al. 2024, "Certifiably Robust RAG against Retrieval Corruption" (RobustRAG), with whole answers in the
        place of keywords.
    """
    out, _ = _before(llm, question, passages, "isolated")
    chats = wording.one_by_one(llm, question, out.evidence)
    prompts = [_in(form, chat, wording.lines(llm, question, e.text)) for chat, e in zip(chats, out.evidence)]
    replies = yield Ask(prompts, BRIEF_TOKENS, stop=STOP[form])
    out.steps = [Step(f"text {e.number}", p, r.text) for e, p, r in zip(out.evidence, prompts, replies)]
    _vote(out, [wording.settled(reply.text) for reply in replies], [e.number for e in out.evidence])
    return out


def generated(
    llm: LLM, question: str, passages: Sequence[Passage], *, memories: int = 1, max_new_tokens: int = 256
) -> Steps[Answer]:
    """Generate, then read: the answer from what the model itself wrote about the question.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> llm = Scripted({"who?": "ada"})
        >>> [out] = run(llm, [generated(llm, "who?", [Passage("The answer is bob.", "a")])])
        >>> out.text, [(e.source, e.text) for e in out.evidence]
        ('ada', [('memory', 'The answer is ada.')])

    Reference:
        Yu et al. 2023, "Generate rather than Retrieve" (GenRead).
    """
    out = Answer(question, "generated")
    more = wording.REMEMBER_MORE.format(most=memories) if memories > 1 else ""
    prompt = wording.said(wording.REMEMBER.format(question=wording.inert(llm, question), more=more))
    [reply] = yield Ask([prompt], max_new_tokens)
    out.steps.append(Step("memory", prompt, reply.text))
    out.evidence = [Evidence(i, text) for i, text in enumerate(documents(reply.text, memories), 1)]
    if out.evidence:
        yield from _brief(out, "texts", wording.filled(llm, question, out.evidence)(wording.PLAIN))
    return out


def routed(llm: LLM, question: str, passages: Sequence[Passage]) -> Steps[Answer]:
    """Self-route: from the passages, or from memory where the model says that they do not answer.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> llm = Scripted({"who?": "ada"})
        >>> [out] = run(llm, [routed(llm, "who?", [Passage("Boats leave at six.", "a")])])
        >>> out.text, [step.name for step in out.steps]
        ('ada', ['texts', 'memory'])

    Reference:
        Li et al. 2024, "Retrieval Augmented Generation or Long-Context LLMs?" (Self-Route), with memory as the other
        way, as the Astute RAG paper has it.
    """
    out, asked = _before(llm, question, passages, "routed")
    yield from _brief(out, "texts", asked(wording.ROUTE))
    if not out.text:
        out.notes.append("the passages do not answer, says the model: it was asked without them.")
        yield from _brief(out, "memory", _alone(llm, question))
    return out


def instructed(llm: LLM, question: str, passages: Sequence[Passage], *, max_new_tokens: int = 256) -> Steps[Answer]:
    """A word about each passage first, then the answer.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> llm = Scripted({})
        >>> [out] = run(llm, [instructed(llm, "who?", [Passage("The answer is bob.", "a")])])
        >>> out.text, "whether it can be trusted" in out.steps[0].prompt[0]["content"]
        ('bob', True)

    Reference:
        Wei et al. 2024, "InstructRAG: Instructing Retrieval-Augmented Generation via Self-Synthesized Rationales"
        (without training and examples).
    """
    out, asked = _before(llm, question, passages, "instructed")
    yield from _brief(out, "texts", asked(wording.INSTRUCT), max_new_tokens)
    return out


def astute(llm: LLM, question: str, passages: Sequence[Passage], *, mode: str = "auto", **options) -> Steps[Answer]:
    """Astute RAG, as the paper prompts it ("prompt": `astute.prompted`), by likelihoods ("score": `weigh.scored`), or
    by likelihoods where the model gives them ("auto").

    Args:
        options: of the function that is taken.

    Raises:
        ValueError: an unknown mode.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> llm = Scripted({"who?": "ada"})  # tells no likelihoods: it is prompted
        >>> [out] = run(llm, [astute(llm, "who?", [Passage("The answer is bob.", name) for name in ("a", "b")])])
        >>> out.method, out.text, [(group.answer, group.members) for group in out.groups]
        ('astute', 'bob', [('bob', [1, 2]), ('ada', [3])])
    """
    if mode not in MODES:
        raise ValueError(f"rag.astute: mode is one of {', '.join(MODES)}, got {mode!r}.")
    if mode == "auto":
        mode = "score" if scores(llm) else "prompt"
    out = yield from (scored if mode == "score" else prompted)(llm, question, passages, **options)
    return out


METHODS: dict[str, Callable[..., Steps[Answer]]] = {
    "none": closed, "plain": plain, "consistent": consistent, "isolated": isolated, "generated": generated,
    "routed": routed, "instructed": instructed, "astute": astute,
}  # fmt: skip


def answer(
    llm: LLM,
    questions: Sequence[str],
    passages: Sequence[Sequence[Passage | Hit]],
    method: str = "astute",
    *,
    store: Store | None = None,
    tick: Callable[[int, int], None] | None = None,
    **options,
) -> list[Answer]:
    """The answer to each question from its passages; all questions' prompts go to the model together.

    Args:
        passages: of each question its passages, or the hits of an index.
        method: of `METHODS`.
        store: keeps each reply, so that nothing is asked, or paid for, twice.
        tick: told (questions answered, prompts put).
        options: of the method.

    Raises:
        ValueError: an unknown method or option, or lists of other lengths.
        TypeError: what is no passage.

    Example:
        >>> from jaxml import prompts, testing
        >>> llm = prompts.Local(testing.tiny_model(max_length=2048))
        >>> [one] = answer(llm, ["who? "], [[Passage("me", "a")]], "plain")
        >>> one.method, len(one.steps)
        ('plain', 1)
    """
    if method not in METHODS:
        raise ValueError(f"rag.answer: method is one of {', '.join(METHODS)}, got {method!r}.")
    if isinstance(questions, str) or len(questions) != len(passages):
        raise ValueError(
            f"rag.answer: questions and passages are lists of equal length, got {len(questions)} and {len(passages)}."
        )
    passages = [[hit.passage if isinstance(hit, Hit) else hit for hit in of] for of in passages]
    if other := [one for of in passages for one in of if not isinstance(one, Passage)]:
        kind = type(other[0]).__name__
        raise TypeError(f"rag.answer: a text is given as Passage(text, source), got {kind} {other[0]!r:.60}.")
    if method == "astute" and options.get("mode", "auto") == "auto":
        options["mode"] = "score" if scores(llm) else "prompt"  # once for all
    return run(llm, [METHODS[method](llm, q, p, **options) for q, p in zip(questions, passages)], store, tick=tick)


def scores(llm: LLM) -> bool:
    """Whether a model tells likelihoods.

    Example:
        >>> from jaxml import prompts, testing
        >>> from jaxml.rag.scripted import Scripted
        >>> scores(Scripted({})), scores(prompts.Local(testing.tiny_model()))
        (False, True)
    """
    try:
        llm.score(["a"], [[" b"]])
    except NotImplementedError:
        return False
    return True


def _before(llm: LLM, question: str, passages: Sequence[Passage], name: str):
    """(an answer with its evidence; template to prompt)."""
    out = Answer(question, name, evidence=[Evidence(i, p.whole, p) for i, p in enumerate(passages, 1)])
    return out, wording.filled(llm, question, out.evidence)


def _alone(llm: LLM, question: str) -> list:
    return wording.said(wording.CLOSED.format(question=wording.inert(llm, question)))


def _in(form: str, chat: list, lines: str) -> Prompt:
    """The prompt of that form."""
    if form not in STOP:
        raise ValueError(f"rag: form is one of {', '.join(STOP)}, got {form!r}.")
    return {"chat": chat, "lines": lines}[form]


def _brief(out: Answer, name: str, prompt: Prompt, max_new_tokens: int = BRIEF_TOKENS):
    [reply] = yield Ask([prompt], max_new_tokens, stop=STOP["lines" if isinstance(prompt, str) else "chat"])
    out.steps.append(Step(name, prompt, reply.text))
    out.text = wording.settled(reply.text)


def _vote(out: Answer, said: Sequence[str], numbers: Sequence[int] | None) -> None:
    """The answer said most often, the first among equals; numbers are those of the evidence that said them."""
    first, of = clusters(said)
    counts = Counter(g for g in of if g is not None)
    order = sorted(counts, key=lambda g: -counts[g])
    if numbers is not None:
        for g in order:
            members = [n for n, at in zip(numbers, of) if at == g]
            others = [i for i, other in enumerate(order) if other != g]
            out.groups.append(Group(first[g], members, others, first[g], counts[g] / sum(counts.values())))
        out.irrelevant = [n for n, at in zip(numbers, of) if at is None]
    if order:
        out.text, out.confidence = first[order[0]], counts[order[0]] / len(said)
        out.chosen = 0 if numbers is not None else None
