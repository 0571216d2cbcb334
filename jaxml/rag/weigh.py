"""Astute RAG by likelihood: who says what is read off the model's scores, and told together by Bayes' rule.

Each passage alone, and memory alone, gives an answer; every answer is then scored under every passage, under a text
that says nothing, and under none. A passage speaks for an answer as far as it makes it likelier than the text that says
nothing does; memory has a belief in each of them.
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
DOUBT = 0.15  # share of memory's belief that is spread evenly over them


def scored(
    llm: LLM,
    question: str,
    passages: Sequence[Passage],
    *,
    sure: float | Callable[[str, str], float] | None = None,
    trust: float = 0.5,
    reliability: float | Callable[[Passage], float] = 0.9,
    least: float = 0.05,
    max_new_tokens: int = 24,
) -> Steps[Answer]:
    """The answer that memory and retrieval, taken together, support best.

    Among the passages: one that is right with probability ρ says an answer g with v(g), and otherwise says any of
    `ALTERNATIVES` answers, so that they come to

        r(g) ∝ Π (ρ v(g) + (1 − ρ) / ALTERNATIVES)

    v(g) is in proportion to exp(gain / √tokens), gain = log p(g | question, passage) − log p(g | question, a text that
    says that nothing was found); "none of them" has a gain of 0, so that what a passage does not make likelier it does
    not say, nor what the form of the question brings about. (By the root of its tokens a
    long sentence that is copied, which gains at each of them, does not outweigh a short answer.) A passage that gave no
    answer does not speak; those of one document, or of nearly the same words, speak once (their v averaged, the largest
    ρ).

    Then with memory, which has a belief m(g) in every answer, in those too that it would not have given (`believed`):

        p(g) ∝ m(g) (trust r(g) + (1 − trust) / ALTERNATIVES)

    However many passages agree, they were found by one search, and what misled one may have misled all; and an answer
    that memory finds implausible needs a search that is trusted the more.

    Args:
        sure: how sure memory is of its own answer, or (question, answer) → it: R-Tuning's p(sure). Where None, the
            answer's probability. A model that says it does not know has none.
        trust: how likely retrieval as a whole is right.
        reliability: ρ of a passage where retrieval is right, or passage → it: what is thought of a source beforehand.
        least: confidence below which the evidence is insufficient. Confidence is the margin: the probability of the
            best answer less that of the next.

    Raises:
        ValueError: a probability, or `least`, outside [0, 1].
        NotImplementedError: a model that gives no likelihoods.

    Example:
        >>> from types import SimpleNamespace
        >>> from jaxml import prompts
        >>> from jaxml.rag import calls
        >>> thinks = lambda text: "bob" if "bob" in text else "ada"  # what it answers after a text, and finds likely
        >>> says = lambda asked, **_: [prompts.Reply(thinks(text), 1, 1) for text in asked]
        >>> logs = lambda text, choices: np.log([0.9 if choice.strip() == thinks(text) else 0.1 for choice in choices])
        >>> finds = lambda asked, choices: [prompts.Scores(logs(*both), np.ones(2), 1) for both in zip(asked, choices)]
        >>> llm = SimpleNamespace(name="known", generate=says, score=finds)
        >>> [out] = calls.run(llm, [scored(llm, "who?", [Passage("It was bob.", "a")])])
        >>> out.text, [(group.answer, round(group.confidence, 2)) for group in out.groups]
        ('bob', [('bob', 0.8), ('ada', 0.18)])
    """
    if not 0 <= least <= 1:
        raise ValueError(f"weigh.scored: least is in [0, 1], got {least}.")
    out = Answer(question, "astute, by scores")
    out.evidence = [Evidence(i, p.whole, p) for i, p in enumerate(passages, 1)]
    # Memory is asked apart from the passages: what all prompts of a request begin with is read once.
    memory, without = wording.lines(llm, question), wording.lines(llm, question, wording.NOTHING)
    prompts = [memory, *(wording.lines(llm, question, e.text) for e in out.evidence)]
    replies = yield Ask(prompts[:1], max_new_tokens, stop=("\n",))
    if passages:
        replies += yield Ask(prompts[1:], max_new_tokens, stop=("\n",))
    names = ["memory", *(f"text {e.number}" for e in out.evidence)]
    out.steps = [Step(name, prompt, reply.text) for name, prompt, reply in zip(names, prompts, replies)]
    said = [wording.settled(reply.text) for reply in replies]
    if not any(said):
        out.notes.append("neither the passages nor memory gave an answer.")
        return out
    if said[0]:
        out.evidence.append(Evidence(len(passages) + 1, said[0]))
    candidates, of = clusters(said)
    follow = [f" {text}" for text in candidates]
    [alone] = yield Weigh([memory], [follow])
    scores = yield Weigh([without, *prompts[1:]], [follow] * len(prompts))
    logs = np.array([s.log_probs for s in scores])  # [1 + passages, candidates]
    gain = np.pad((logs[1:] - logs[:1]) / np.sqrt(alone.tokens), ((0, 0), (0, 1)))  # of none of them: 0
    spoke = [i for i in range(len(passages)) if of[i + 1] is not None]
    rho = [reliability(passages[i]) if callable(reliability) else reliability for i in spoke]
    says, rho = once(np.exp(normalised(gain))[spoke], np.array(rho), independent([passages[i] for i in spoke]))
    if callable(sure):
        sure = sure(question, said[0]) if said[0] else None
    both = combined(believed(np.exp(alone.log_probs), of[0], sure), posterior(says, rho), trust if spoke else 0.0)
    p = both[:-1]  # the rest is the probability of none of them
    order = np.argsort(-p, kind="stable")
    out.groups = [_group(candidates[g], g, of, out, float(p[g])) for g in order]
    for place, group in enumerate(out.groups):
        group.conflicts = [i for i in range(len(out.groups)) if i != place]
    out.irrelevant = [e.number for e in out.evidence if e.passage is not None and of[e.number] is None]
    best = float(p[order[0]])
    out.confidence = best - max([0.0, *(float(p[g]) for g in order[1:])])
    if out.confidence >= least:
        out.text, out.chosen = candidates[order[0]], 0
    else:
        out.notes.append(f"the margin {out.confidence:.2f} is below {least:g}.")
    return out


def posterior(says: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """p of each answer, "none of them" last: [answers + 1].

    Args:
        says: [speakers, answers + 1] v(g) of each, rows that add up to 1.
        rho: [speakers] how likely each is right.

    Example:
        >>> posterior(np.array([[1.0, 0.0, 0.0]]), np.array([0.6])).round(3).tolist()   # one, right three times of five
        [0.604, 0.004, 0.392]
    """
    if not ((rho >= 0) & (rho <= 1)).all():
        raise ValueError(f"weigh.posterior: reliabilities and certainties are in [0, 1], got {rho.tolist()}.")
    logs = _of_each(says, rho[:, None]).sum(0)
    logs[-1] += np.log(_others(says))
    return np.exp(normalised(logs))


def believed(p: np.ndarray, own: int | None = None, sure: float | None = None) -> np.ndarray:
    """What memory holds of each answer, "none of them" last: [answers + 1].

    Args:
        p: [answers] their probabilities without a passage. `DOUBT` of the whole is spread evenly over `ALTERNATIVES`:
            memory's likelihoods are not taken at their word.
        own: the answer that memory gave, and
        sure: how likely that one is, if known; the others share what is left.

    Example:
        >>> believed(np.array([0.4, 0.0]), 0, 0.9).round(3).tolist()
        [0.9, 0.0, 0.1]
    """
    if sure is not None and not 0 <= sure <= 1:
        raise ValueError(f"weigh.believed: certainties are in [0, 1], got {sure}.")
    given = (1 - DOUBT) * p / max(p.sum(), 1.0) + DOUBT / max(ALTERNATIVES, len(p))
    m = np.append(given, max(1 - given.sum(), 0.0))
    if own is None or sure is None:
        return m
    left = 1 - m[own]
    m = m * (1 - sure) / left
    m[own] = sure
    return m


def combined(memory: np.ndarray, retrieved: np.ndarray, trust: float) -> np.ndarray:
    """p of each answer, "none of them" last, when retrieval is right with the probability `trust`: [answers + 1].

    Example:
        >>> combined(np.array([0.3, 0.01, 0.69]), np.array([0.0, 1.0, 0.0]), 0.5).round(2).tolist()
        [0.15, 0.5, 0.35]
    """
    if not 0 <= trust <= 1:
        raise ValueError(f"weigh.combined: trust is in [0, 1], got {trust}.")
    return np.exp(normalised(np.log(memory + 1e-12) + _of_each(retrieved, trust)))


def _of_each(says: np.ndarray, rho: np.ndarray | float) -> np.ndarray:
    """log(ρ v(g) + (1 − ρ) / ALTERNATIVES): [..., answers + 1], last of a single one of those that nobody gave."""
    each = np.append(says[..., :-1], says[..., -1:] / _others(says), axis=-1)
    return np.log(rho * each + (1 - rho) / ALTERNATIVES + 1e-12)


def _others(says: np.ndarray) -> int:
    """How many answers there are that nobody gave."""
    return max(ALTERNATIVES - says.shape[-1] + 1, 1)


def once(says: np.ndarray, rho: np.ndarray, source: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(v, ρ) of sources rather than of passages: of each the mean v and the largest ρ of its passages.

    Example:
        >>> says = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
        >>> v, rho = once(says, np.array([0.9, 0.6, 0.8]), [0, 0, 1])
        >>> v.tolist(), rho.tolist()
        ([[0.75, 0.25], [0.0, 1.0]], [0.9, 0.8])
    """
    groups = [[i for i, s in enumerate(source) if s == number] for number in dict.fromkeys(source)]
    mean = np.array([says[of].mean(0) for of in groups]).reshape(len(groups), says.shape[1])
    return mean, np.array([rho[of].max() for of in groups])


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
    the same but for a few.

    Example:
        >>> texts, sources = ("boats leave at six", "soup", "Boats leave at six.", "no boats"), ("a", "a", "b", "c")
        >>> independent([Passage(text, source) for text, source in zip(texts, sources)])
        [0, 0, 0, 1]
    """
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
