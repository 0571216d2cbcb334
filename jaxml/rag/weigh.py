"""Astute RAG by likelihood: who says what is read off the model's scores, and told together by Bayes' rule.

Each passage alone, and memory alone, gives an answer; every answer is then scored under every passage and under none,
in one pass. A passage speaks for an answer as far as it makes it likelier than it was without the passage.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxml.prompts.choices import normalised
from jaxml.prompts.llm import LLM
from jaxml.rag import wording
from jaxml.rag.calls import Ask, Steps, Weigh
from jaxml.rag.passages import Passage
from jaxml.rag.trace import Answer, Evidence, Group, Step
from jaxml.tune.facts import normalise

ALTERNATIVES = 100  # answers that there might be to a question


def scored(
    llm: LLM,
    question: str,
    passages: Sequence[Passage],
    *,
    sure: float | Callable[[str, str], float] | None = None,
    reliability: float | Callable[[Passage], float] = 0.6,
    least: float = 0.1,
    max_new_tokens: int = 24,
) -> Steps[Answer]:
    """The answer that the independent sources support best, memory among them.

    Beforehand, one of `ALTERNATIVES` answers is as likely as another: those that were given, and all the others, "none
    of them". A source s is reliable with probability ρₛ and then says an answer g with vₛ(g); otherwise it says
    anything. So

        p(g | sources) ∝ Πₛ (ρₛ vₛ(g) + (1 − ρₛ) / ALTERNATIVES),

    and a single source is right with the probability ρ. Of a passage, v(g) is in proportion to p(g | question, passage)
    / p(g | question), "none of them" having 1: what the passage does not make likelier it does not say. A passage that
    gave no answer is no source. Memory says its answer, and ρ is how sure it is of that. Passages of one document, or
    of nearly the same words, are one source: their v are averaged, the largest ρ counts.

    Args:
        sure: ρ of memory, or (question, answer) → it: R-Tuning's p(sure). Where None, the geometric mean probability of
            the tokens of memory's answer. A model that says it does not know has none.
        reliability: ρ of retrieved passages, or passage → it: what is thought of a source beforehand.
        least: confidence below which the evidence is insufficient. Confidence is the margin: the probability of the
            best answer less that of the next, or of none of them.

    Raises:
        ValueError: a probability, or `least`, outside [0, 1].
        NotImplementedError: a model that gives no likelihoods.
    """
    if not 0 <= least <= 1:
        raise ValueError(f"weigh.scored: least is in [0, 1], got {least}.")
    out = Answer(question, "astute, by scores")
    out.evidence = [Evidence(i, p.whole, p) for i, p in enumerate(passages, 1)]
    prompts = [wording.said(wording.CLOSED.format(question=wording.inert(llm, question)))]
    prompts += wording.one_by_one(llm, question, out.evidence)
    replies = yield Ask(prompts, max_new_tokens)
    names = ["memory", *(f"text {e.number}" for e in out.evidence)]
    out.steps = [Step(name, prompt, reply.text) for name, prompt, reply in zip(names, prompts, replies)]
    said = [wording.brief(reply.text) for reply in replies]
    said = ["" if wording.unknown(text) else text for text in said]
    if not any(said):
        out.notes.append("neither the passages nor memory gave an answer.")
        return out
    if said[0]:
        out.evidence.append(Evidence(len(passages) + 1, said[0]))
    candidates, of = clusters(said)
    scores = yield Weigh(prompts, [candidates] * len(prompts))
    logs = np.array([s.log_probs for s in scores])  # [1 + passages, candidates]
    if callable(sure) and said[0]:
        trust = sure(question, said[0])
    elif sure is None:
        trust = float(np.exp(logs[0, of[0]] / scores[0].tokens[of[0]])) if said[0] else 0.0
    else:
        trust = float(sure) if said[0] and not callable(sure) else 0.0
    own = np.arange(len(candidates) + 1) == (len(candidates) if of[0] is None else of[0])
    gain = np.pad(logs[1:] - logs[:1], ((0, 0), (0, 1)))  # of none of them: 0
    says = np.concatenate([own[None].astype(float), np.exp(normalised(gain))])
    rho = [trust, *(reliability(p) if callable(reliability) else reliability for p in passages)]
    spoke = [0, *(e.number for e in out.evidence if not e.memory and of[e.number] is not None)]
    sources = independent([passages[i - 1] for i in spoke[1:]])
    p, none = posterior(says[spoke], np.array(rho, np.float64)[spoke], sources)
    order = np.argsort(-p, kind="stable")
    out.groups = [_group(candidates[g], g, of, out, float(p[g])) for g in order]
    for place, group in enumerate(out.groups):
        group.conflicts = [i for i in range(len(out.groups)) if i != place]
    out.irrelevant = [e.number for e in out.evidence if e.passage is not None and of[e.number] is None]
    best = float(p[order[0]])
    out.confidence = best - max([none, *(float(p[g]) for g in order[1:])])
    if out.confidence >= least:
        out.text, out.chosen = candidates[order[0]], 0
    else:
        out.notes.append(f"the margin {out.confidence:.2f} is below {least:g}.")
    return out


def posterior(says: np.ndarray, rho: np.ndarray, source: Sequence[int]) -> tuple[np.ndarray, float]:
    """(p of each answer, p of none of them).

    Args:
        says: [sources, answers + 1] vₛ(g), memory first, "none of them" last; rows add up to 1.
        rho: [sources] how reliable each is.
        source: of each passage the number of its source, so that passages of one count once.

    Example:
        >>> p, none = posterior(np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), np.array([0.0, 0.6]), [0])
        >>> p.round(3).tolist(), round(none, 3)   # a passage of reliability 0.6, alone
        ([0.604, 0.004], 0.392)
    """
    if not ((rho >= 0) & (rho <= 1)).all():
        raise ValueError(f"weigh.posterior: reliabilities and certainties are in [0, 1], got {rho.tolist()}.")
    rows, trust = [says[0]], [rho[0]]
    for number in dict.fromkeys(source):
        members = [i + 1 for i, s in enumerate(source) if s == number]
        rows.append(says[members].mean(0))
        trust.append(rho[members].max())
    rows, trust = np.array(rows), np.array(trust)[:, None]
    rest = max(ALTERNATIVES - rows.shape[1] + 1, 1)  # answers that nobody gave
    rows[:, -1] /= rest
    logs = np.log(trust * rows + (1 - trust) / ALTERNATIVES + 1e-12).sum(0)
    logs[-1] += np.log(rest)
    p = np.exp(normalised(logs))
    return p[:-1], float(p[-1])


def clusters(said: Sequence[str]) -> tuple[list[str], list[int | None]]:
    """(answers that differ once normalised, as they were first said; of each reply its answer, None of an empty one).

    Example:
        >>> clusters(["Oslo", "", "the oslo.", "Rome"])
        (['Oslo', 'Rome'], [0, None, 0, 1])
    """
    places: dict[str, int] = {}
    first: list[str] = []
    of: list[int | None] = []
    for text in said:
        key = normalise(text) or text
        if text and key not in places:
            places[key] = len(first)
            first.append(text)
        of.append(places[key] if text else None)
    return first, of


def independent(passages: Sequence[Passage], alike: float = 0.8) -> list[int]:
    """The number of each passage's source: one for those of the same `Passage.source`, or whose runs of three words are
    the same but for a few."""
    runs = []
    for p in passages:
        words = normalise(p.text).split()
        runs.append({tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))})
    out: list[int] = []
    for i, p in enumerate(passages):
        same = (
            j for j in range(i)
            if p.source == passages[j].source or len(runs[i] & runs[j]) >= alike * len(runs[i] | runs[j])
        )  # fmt: skip
        out.append(next((out[j] for j in same), len(set(out))))
    return out


def _group(text: str, g: int, of: Sequence[int | None], out: Answer, p: float) -> Group:
    members = [e.number for e in out.evidence if of[0 if e.memory else e.number] == g]
    return Group(text, members, answer=text, confidence=p)
