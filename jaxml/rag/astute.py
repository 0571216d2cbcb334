"""Astute RAG: what the model knows, set against what was retrieved, and an answer from the group that can be trusted.

Here is the paper's way: the model does it all in words. `weigh` reads likelihoods instead, which any model in this
process gives, however small.
"""

import json
import re
from collections.abc import Sequence

from jaxml.prompts.llm import LLM
from jaxml.rag import parse, wording
from jaxml.rag.calls import Ask, Steps
from jaxml.rag.passages import Passage
from jaxml.rag.trace import Answer, Evidence, Group, Step

_DOCUMENT = re.compile(r"^[^\w\n]{0,20}Document(?:[ \t]+\d+)?[*_]{0,3}:?", re.IGNORECASE | re.MULTILINE)


def prompted(
    llm: LLM,
    question: str,
    passages: Sequence[Passage],
    *,
    rounds: int = 1,
    memories: int = 1,
    max_new_tokens: int = 512,
) -> Steps[Answer]:
    """The paper's algorithm: rounds + 2 calls at temperature 0, and one more for each reply that has to be repaired.

    1. The model writes at most `memories` passages from what it knows, or says that it does not know.
    2. `rounds` times it brings retrieved and remembered passages together in groups that agree.
    3. It says which answer follows from each group, how sure it is, and which is the best.

    A reply that is not of the asked form is asked for once more, with what is wrong about it; if that does not help,
    consolidation makes each text a group of its own, and the answer is what the model says to all texts at once. Both
    are said in `Answer.notes`.

    Args:
        rounds: t − 1 in the paper, which tried t in 1, 2, 3: with t = 1 consolidation and answer are one call; here 0
            goes from single texts straight to the answer.
        memories: m̂, at most so many passages from memory; 0 for none.

    Raises:
        ValueError: rounds or memories below 0.

    Example:
        >>> from jaxml.rag import calls, scripted
        >>> llm = scripted.Scripted({"who?": "ada"})  # to whom what it knows is worth one text and a half
        >>> passages = [Passage("The answer is bob.", name) for name in ("a", "b")]
        >>> [out] = calls.run(llm, [prompted(llm, "who?", passages)])
        >>> out.text, out.cited, [(group.answer, group.members) for group in out.groups]
        ('bob', [1, 2], [('bob', [1, 2]), ('ada', [3])])

    Reference:
        Wang et al. 2024, "Astute RAG: Overcoming Imperfect Retrieval Augmentation and Knowledge Conflicts for Large
        Language Models", algorithm 1.
    """
    if rounds < 0 or memories < 0:
        raise ValueError(f"astute: rounds and memories are at least 0, got {rounds} and {memories}.")
    out = Answer(question, "astute")
    remembered = []
    if memories:
        more = wording.REMEMBER_MORE.format(most=memories) if memories > 1 else ""
        text = wording.REMEMBER.format(question=wording.inert(llm, question), more=more)
        reply = yield from _ask(out, "memory", text, max_new_tokens)
        remembered = documents(reply, memories)
    out.evidence = [Evidence(i, p.whole, p) for i, p in enumerate(passages, 1)]
    out.evidence += [Evidence(i, text) for i, text in enumerate(remembered, len(passages) + 1)]
    if not out.evidence:
        out.notes.append("nothing was retrieved, and the model knows nothing of it.")
        return out
    tag, asked, texts = wording.quoted(llm, question, [e.text for e in out.evidence])
    shown, numbers = wording.show(tag, out.evidence, texts), [e.number for e in out.evidence]
    out.groups = [Group(e.text, [e.number]) for e in out.evidence]
    for number in range(rounds):
        groups = wording.inert(llm, _written(out.groups)).replace(tag, "text")
        before = wording.BEFORE.format(tag=tag, groups=groups) if number else ""
        text = wording.CONSOLIDATE.format(tag=tag, texts=shown, before=before, question=asked)
        read = lambda reply: parse.groups(reply, numbers)
        made = yield from _strictly(llm, out, f"consolidation {number + 1}", text, read, max_new_tokens)
        if made is None:
            out.notes.append(f"consolidation {number + 1} could not be read: the groups before it stay.")
            break
        out.groups, out.irrelevant = made
    if not out.groups:
        out.notes.append("no text says anything about the question.")
        return out
    yield from _decide(llm, out, max_new_tokens)
    return out


def documents(reply: str, most: int) -> list[str]:
    """The passages in a reply from memory; none where it says that nothing is known.

    Example:
        >>> documents("Document: Oslo is big.\\nDocument: I don't know.", 2), documents("I don't know.", 1)
        (['Oslo is big.'], [])
    """
    parts = [part.strip() for part in _DOCUMENT.split(reply)] if most > 1 else [reply.strip()]
    return [part for part in parts if not wording.unknown(part)][:most]


def _decide(llm: LLM, out: Answer, max_new_tokens: int) -> Steps[None]:
    """An answer for each group, and the choice."""
    by_number = {e.number: e for e in out.evidence}
    tag, asked, claims = wording.quoted(llm, out.question, [g.claim for g in out.groups])
    lines = []
    for place, (group, claim) in enumerate(zip(out.groups, claims), 1):
        kinds = ["memory" if by_number[n].memory else "retrieved" for n in group.members]
        against = f" against={','.join(str(c + 1) for c in group.conflicts)}" if group.conflicts else ""
        lines.append(f"<{tag} group={place} from={','.join(kinds)}{against}>\n{claim}\n</{tag}>")
    text = wording.DECIDE.format(tag=tag, groups="\n".join(lines), question=asked)
    read = lambda reply: parse.answers(reply, len(out.groups))
    made = yield from _strictly(llm, out, "answer", text, read, max_new_tokens)
    if made is not None:
        found, out.chosen = made
        for group, (answer, sure) in zip(out.groups, found):
            group.answer, group.confidence = answer, sure
        chosen = out.groups[out.chosen]
        out.text, out.confidence = ("" if wording.unknown(chosen.answer) else chosen.answer), chosen.confidence
        return
    out.notes.append("the answers could not be read: the model was asked for the answer alone, from all claims.")
    tag, asked, claims = wording.quoted(llm, out.question, [g.claim for g in out.groups])
    shown = "\n".join(f"<{tag} number={i}>\n{claim}\n</{tag}>" for i, claim in enumerate(claims, 1))
    reply = yield from _ask(out, "fallback", wording.PLAIN.format(tag=tag, texts=shown, question=asked), 64)
    out.text = wording.settled(reply)


def _strictly(llm: LLM, out: Answer, name: str, text: str, read, max_new_tokens: int):
    """What `read` makes of the reply, or of a second one, after what is wrong was said; None where neither is good."""
    turns = wording.said(text)
    for attempt in range(2):
        [reply] = yield Ask([turns], max_new_tokens)
        out.steps.append(Step(name if not attempt else f"{name}, again", turns, reply.text))
        try:
            made = read(reply.text)
        except ValueError as error:
            out.notes.append(f"{name}: {error}")
            again = {"role": "user", "content": wording.AGAIN.format(problem=wording.inert(llm, str(error)))}
            turns = [*turns, {"role": "assistant", "content": wording.inert(llm, reply.text)}, again]
            continue
        return made
    return None


def _ask(out: Answer, name: str, text: str, max_new_tokens: int):
    [reply] = yield Ask([wording.said(text)], max_new_tokens)
    out.steps.append(Step(name, wording.said(text), reply.text))
    return reply.text


def _written(groups: Sequence[Group]) -> str:
    said = [{"claim": g.claim, "texts": g.members, "conflicts": [c + 1 for c in g.conflicts]} for g in groups]
    return json.dumps({"groups": said}, ensure_ascii=False)
