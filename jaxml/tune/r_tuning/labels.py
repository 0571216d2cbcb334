"""Which questions a model is to be sure of, and which are left out of training."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxml.lm.model import Model
from jaxml.tune.facts import normalise
from jaxml.tune.r_tuning import judge
from jaxml.tune.r_tuning.ask import Answered
from jaxml.tune.r_tuning.items import Item

Tune = Callable[[Model, list[dict], str], Model]  # (model, examples, a name for the run) → the tuned model
Same = Callable[[Sequence[str]], list[int]]  # texts → the number of each one's cluster


class Labels(NamedTuple):
    """Of n questions: how sure the model is to say it is, and whether the question is trained on at all.

    Example:
        >>> Labels(np.array([1.0, 0.0]), np.array([True, True])).sure.tolist()
        [1.0, 0.0]
    """

    sure: np.ndarray  # [n] float64 in [0, 1]; 1 and 0 are the published two
    keep: np.ndarray  # [n] bool


def correct(answered: Answered) -> Labels:
    """R-Tuning as published: sure of what was answered rightly.

    Example:
        >>> answered = Answered(["Paris", "Rome"], np.array([True, False]), np.array([0.4, 0.9]), np.array([0.2, 0.8]))
        >>> correct(answered).sure.tolist()
        [1.0, 0.0]

    Reference:
        Zhang et al. 2024, "R-Tuning", section 3.
    """
    return _all(answered.right.astype(np.float64))


def consistent(
    samples: Sequence[Sequence[str]], items: Sequence[Item], same: Same | None = None, *, share: float = 0.5
) -> Labels:
    """R-Tuning-U: sure of the questions whose sampled answers agree most; right answers are not looked at.

    Args:
        samples: [n][k] answers, of `Asker.samples`.
        same: which of them mean the same (`clusters` where None); choices are compared as they are.
        share: of the questions that are sure; among equal entropies the earlier ones.

    Raises:
        ValueError: a share outside (0, 1).

    Example:
        >>> samples = [["Rome", "Lyon", "Oslo"], ["Rome", "rome.", "Rome"]]
        >>> consistent(samples, [Item("of France?", ("Paris",)), Item("of Italy?", ("Rome",))]).sure.tolist()
        [0.0, 1.0]

    Reference:
        Zhang et al. 2024, section 5.2 (entropy of answers as strings); Kuhn et al. 2023, "Semantic Uncertainty" (of
        meanings).
    """
    if not 0 < share < 1:
        raise ValueError(f"labels.consistent: share is in (0, 1), got {share}.")
    order = np.argsort(_unrest(samples, items, same), kind="stable")
    sure = np.zeros(len(samples))
    sure[order[: round(share * len(samples))]] = 1.0
    return _all(sure)


def expected(samples: Sequence[Sequence[str]], items: Sequence[Item]) -> Labels:
    """Graded: as sure as the share of sampled answers that are right.

    Example:
        >>> samples = [["2", "3", "two", "2"], ["5", "4", "3", "6"]]
        >>> expected(samples, [Item("1+1?", ("2", "two")), Item("2+2?", ("4",))]).sure.tolist()
        [0.75, 0.25]

    Reference:
        Yang et al. 2023, "Alignment for Honesty", section 4 (expected accuracy).
    """
    return _all(accuracy_of(samples, items))


def craft(
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
    items: Sequence[Item],
    same: Same | None = None,
    *,
    right: float = 0.5,
    drop: float = 0.25,
) -> Labels:
    """Sure of what is answered rightly and certainly, unsure of what stays wrong; between them nothing is trained.

    Left out are, of the rightly answered questions, the least certain ones, of the wrongly answered ones the most
    certain (static conflict: neighbours with opposite labels), and those whose answers a rehearsal puts right (dynamic
    conflict: their label would be stale).

    Args:
        before: [n][k] answers of the untuned model.
        after: of the model tuned on what `rehearsal` chooses.
        right: share of right samples from which a question counts as known.
        drop: share of each side that is left out for its certainty.

    Raises:
        ValueError: a drop outside [0, 1).

    Example:
        >>> items = [Item(question, ("a",)) for question in ("known?", "learnt?", "unknown?")]
        >>> made = craft([["a", "a"], ["b", "c"], ["b", "c"]], [["a", "a"], ["a", "a"], ["b", "c"]], items)
        >>> made.sure.tolist(), made.keep.tolist()
        ([1.0, 0.0, 0.0], [True, False, True])

    Reference:
        Zhu et al. 2024, "Utilize the Flow before Stepping into the Same River Twice" (CRaFT): correctness, certainty
        and their flow under rehearsal decide. The two thresholds are this library's.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"labels.craft: drop is in [0, 1), got {drop}.")
    at_first, later = accuracy_of(before, items), accuracy_of(after, items)
    unrest = _unrest(before, items, same)
    known = at_first >= right
    keep = known | (later < right)
    for side, sign in ((known, 1.0), (~known & keep, -1.0)):  # of the known the uncertain, of the unknown the certain
        numbers = np.flatnonzero(side)
        worst = numbers[np.argsort(-sign * unrest[numbers], kind="stable")]
        keep[worst[: int(drop * len(numbers))]] = False
    return Labels(known.astype(np.float64), keep)


def rehearsal(samples: Sequence[Sequence[str]], items: Sequence[Item], same: Same | None = None, *, share: float = 0.5):
    """Numbers of the questions that `craft` rehearses: of those answered rightly most often, the most certain share.

    Example:
        >>> items = [Item(question, ("a",)) for question in ("often?", "always?", "never?")]
        >>> rehearsal([["a", "a", "b"], ["a", "a", "a"], ["b", "b", "b"]], items)
        [1]
    """
    accuracy, unrest = accuracy_of(samples, items), _unrest(samples, items, same)
    order = np.lexsort((unrest, -accuracy))
    known = [int(i) for i in order if accuracy[i] >= 0.5]
    return known[: max(1, round(share * len(known)))]


def cross_fitted(
    model: Model,
    items: Sequence[Item],
    learn: Callable[[Sequence[Item]], list[dict]],
    tune: Tune,
    *,
    folds: int = 2,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, Model]]:
    """Of each fold, (the numbers of its questions, a model that was tuned on all questions but these).

    What such a model answers is what a tuned model knows by itself. Labels from an untuned model are stale once it is
    tuned: it then answers what it was marked as not knowing.

    Args:
        learn: questions to training examples (`examples.plain`).
        tune: trains a model on examples.

    Raises:
        ValueError: fewer than two folds, or fewer questions than folds.

    Example:
        >>> items = [Item(f"what is {i}?", (str(i),)) for i in range(4)]
        >>> learn = lambda part: [item.answers[0] for item in part]
        >>> tune = lambda model, examples, name: sorted(examples)  # the "model" is what it was tuned on
        >>> [(sorted(part.tolist()), tuned) for part, tuned in cross_fitted(None, items, learn, tune)]
        [([0, 2], ['1', '3']), ([1, 3], ['0', '2'])]
    """
    check_folds(len(items), folds)
    parts = np.array_split(np.random.default_rng(seed).permutation(len(items)), folds)
    for number, part in enumerate(parts):
        rest = [items[i] for other in parts if other is not part for i in other]
        yield part, tune(model, learn(rest), f"fold-{number}")


def check_folds(questions: int, folds: int) -> None:
    """Refuses a number of folds that `cross_fitted` cannot make of so many questions.

    Raises:
        ValueError: fewer than two folds, or fewer questions than folds.

    Example:
        >>> check_folds(4, 5)
        Traceback (most recent call last):
            ...
        ValueError: labels.cross_fitted: folds are in 2 … 4, the number of questions, got 5.
    """
    if not 2 <= folds <= questions:
        raise ValueError(f"labels.cross_fitted: folds are in 2 … {questions}, the number of questions, got {folds}.")


# ---- agreement --------------------------------------------------------------------------------------


def accuracy_of(samples: Sequence[Sequence[str]], items: Sequence[Item]) -> np.ndarray:
    """Of each question, the share of its samples that are right: [n] float64.

    Example:
        >>> accuracy_of([["2", "two", "3", "2"]], [Item("1+1?", ("2", "two"))]).tolist()
        [0.75]
    """
    return np.array(
        [np.mean([judge.right(t, item) for t in texts]) for texts, item in zip(samples, items, strict=True)]
    )


def entropy(texts: Sequence[str], same: Same | None = None) -> float:
    """Of the shares of different meanings among sampled answers, in nats.

    Example:
        >>> round(entropy(["Paris", "paris.", "Lyon", "The Paris"]), 4)   # three of one meaning, one of another
        0.5623
    """
    counts = Counter((same or clusters)(texts)).values()
    return sum(-c / len(texts) * math.log(c / len(texts)) for c in counts) + 0.0


def clusters(texts: Sequence[str]) -> list[int]:
    """Answers that say the same: equal numbers, equal words, or the words of one within the other's.

    Example:
        >>> clusters(["Paris", "It is Paris.", "1,000", "1000.0", "Lyon"])
        [0, 0, 1, 1, 2]
    """
    return _greedy(texts, _same_words)


def by_meaning(embed: Callable[[Sequence[str]], np.ndarray], *, alike: float = 0.8) -> Same:
    """Clusters by the cosine of sentence vectors, beside what `clusters` finds.

    Args:
        embed: texts to unit vectors (`lm.encoder.load()`).
        alike: the least cosine of two answers that mean the same.

    Example:
        >>> from jaxml import testing
        >>> same, texts = by_meaning(testing.TinyEncoder(), alike=0.6), ["the old port", "a port, old", "the inn"]
        >>> same(texts), clusters(texts)
        ([0, 0, 1], [0, 1, 2])
    """

    def same(texts: Sequence[str]) -> list[int]:
        different = list(dict.fromkeys(texts))
        near = (lambda v: v @ v.T)(np.asarray(embed([t or " " for t in different])))
        place = {text: i for i, text in enumerate(different)}
        return _greedy(texts, lambda a, b: _same_words(a, b) or near[place[a], place[b]] >= alike)

    return same


def _unrest(samples: Sequence[Sequence[str]], items: Sequence[Item], same: Same | None) -> np.ndarray:
    exactly = lambda texts: [list(texts).index(text) for text in texts]
    pairs = zip(samples, items, strict=True)
    return np.array([entropy(texts, exactly if item.choices else same) for texts, item in pairs])


def _greedy(texts: Sequence[str], same: Callable[[str, str], bool]) -> list[int]:
    firsts: list[str] = []
    out = []
    for text in texts:
        number = next((i for i, first in enumerate(firsts) if same(text, first)), len(firsts))
        if number == len(firsts):
            firsts.append(text)
        out.append(number)
    return out


@functools.lru_cache(maxsize=65536)
def _same_words(a: str, b: str) -> bool:
    x, y = judge.number(a), judge.number(b)
    if x is not None and y is not None:
        return x == y
    short, long = sorted((normalise(a), normalise(b)), key=len)
    return short == long or (bool(short) and f" {short} " in f" {long} ")


def _all(sure: np.ndarray) -> Labels:
    return Labels(sure, np.ones(len(sure), bool))
