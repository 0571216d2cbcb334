"""From questions to passages: by meaning, by words, by both; different ones; those that make the question likely."""

from collections.abc import Sequence

import numpy as np

from jaxml.lm.encoder import Encoder
from jaxml.prompts import select
from jaxml.prompts.llm import LLM
from jaxml.rag.passages import Passage
from jaxml.rag.store import Hit


def fuse(lists: Sequence[Sequence[Hit]], *, k: int = 60) -> list[Hit]:
    """One ranking of several: each gives 1 / (k + rank) to a passage, ranks from 1.

    Example:
        >>> a, b = Passage("a", "x"), Passage("b", "x")
        >>> [(hit.passage.text, round(hit.score, 4)) for hit in fuse([[Hit(a, 9.0), Hit(b, 8.0)], [Hit(b, 0.2)]])]
        [('b', 0.0325), ('a', 0.0164)]

    Reference:
        Cormack, Clarke and Büttcher 2009, "Reciprocal Rank Fusion".
    """
    scores: dict[Passage, float] = {}
    for ranked in lists:
        for rank, hit in enumerate(ranked, 1):
            scores[hit.passage] = scores.get(hit.passage, 0.0) + 1 / (k + rank)
    return [Hit(p, s) for p, s in sorted(scores.items(), key=lambda item: -item[1])]


def diverse(encoder: Encoder, question: str, hits: Sequence[Hit], k: int, *, trade: float = 0.7) -> list[Hit]:
    """k of the hits in an order in which each is like the question and unlike those before it (`prompts.select.mmr`).

    Args:
        trade: 1 looks at the question alone, 0 at the other passages alone.

    Example:
        >>> from jaxml import testing
        >>> hits = [Hit(Passage(text, "a"), 0.0) for text in ("the cat sat", "the cat sat down", "a cat ran")]
        >>> [hit.passage.text for hit in diverse(testing.TinyEncoder(), "the cat", hits, 2, trade=0.5)]
        ['the cat sat', 'a cat ran']
    """
    if not hits:
        return []
    vectors = np.asarray(encoder([question, *(hit.passage.whole for hit in hits)]))
    return [hits[i] for i in select.mmr(vectors[1:] @ vectors[0], vectors[1:] @ vectors[1:].T, k, trade=trade)]


def likely(llm: LLM, question: str, hits: Sequence[Hit]) -> list[Hit]:
    """The hits ordered by how likely the question is after each, in nats a token: a decoder as the judge.

    Example:
        >>> from jaxml import prompts, testing
        >>> hits = [Hit(Passage(text, "a"), 0.0) for text in ("the cat sat", "boats leave at six")]
        >>> found = likely(prompts.Local(testing.tiny_model()), "who sat?", hits)
        >>> [(hit.passage.text, round(hit.score, 1)) for hit in found]
        [('the cat sat', -9.4), ('boats leave at six', -9.7)]

    Reference:
        Sachan et al. 2022, "Improving Passage Retrieval with Zero-Shot Question Generation".
    """
    if not hits:
        return []
    asked = [f"{hit.passage.whole}\n\nA question that this text answers:" for hit in hits]
    scores = llm.score(asked, [[f" {question}"]] * len(hits))
    values = [float(s.log_probs[0] / s.tokens[0]) for s in scores]
    return [Hit(hits[i].passage, values[i]) for i in sorted(range(len(hits)), key=lambda i: -values[i])]
