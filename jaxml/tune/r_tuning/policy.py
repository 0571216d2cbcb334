"""When to answer: a confidence from two, and a threshold that keeps a promise."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxml import files, log
from jaxml.lm.model import Model
from jaxml.tune.r_tuning import ask, metrics
from jaxml.tune.r_tuning.ask import Answered
from jaxml.tune.r_tuning.form import PLAIN, Form
from jaxml.tune.r_tuning.items import Item

GUARANTEES = ("selective", "marginal")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Answers with a confidence above the threshold are given; one without any (nothing said, or a refusal in words)
    never is.

    Args:
        weight: of the certainty said; the answer's own probability has the rest. The paper's is 0.5.
        threshold: an answer needs more than that.
        promise: what was asked of the threshold, in words.

    Raises:
        ValueError: a weight outside [0, 1], or a threshold that is no number.

    Example:
        >>> from jaxml.tune.r_tuning.ask import Answered
        >>> answered = Answered(["a", "b"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> Policy(weight=0.5, threshold=0.6).willing(answered).tolist()
        [True, False]
    """

    weight: float = 0.5
    threshold: float = 0.5
    promise: str = ""

    def __post_init__(self):
        if not 0 <= self.weight <= 1 or math.isnan(self.threshold):
            raise ValueError(
                f"Policy: weight is in [0, 1] and threshold a number, got {self.weight} and {self.threshold}."
            )

    def confidence(self, answered: Answered) -> np.ndarray:
        """[n] in [0, 1]."""
        return self.weight * answered.sure + (1 - self.weight) * answered.confidence

    def willing(self, answered: Answered) -> np.ndarray:
        """[n] bool: which answers are given."""
        return self.confidence(answered) > max(self.threshold, 0.0)

    def save(self, path: str | Path) -> None:
        """As JSON."""
        kept = dataclasses.asdict(self)
        if math.isinf(self.threshold):
            kept["threshold"] = str(self.threshold)  # "inf" or "-inf", which JSON has no number for
        log.write_text(path, json.dumps(kept, indent=2))

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """What `save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or not one of these.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file.")
        try:
            kept = files.read_json(path)
            return cls(float(kept["weight"]), float(kept["threshold"]), str(kept["promise"]))
        except (ValueError, *files.IMPOSSIBLE) as error:
            raise ValueError(f"{path}: a policy has weight, threshold and promise ({error}).") from error


def best_weight(answered: Answered, steps: int = 20) -> float:
    """The weight of the certainty said with the least area under the risk–coverage curve of a calibration set; of equal
    ones the nearest to the paper's ½.

    Example:
        >>> answered = Answered(["a", "b"], np.array([True, False]), np.array([0.1, 0.9]), np.array([0.8, 0.3]))
        >>> best_weight(answered)  # the answers' own probabilities mislead
        0.65
    """
    weights = np.linspace(0, 1, steps + 1)
    areas = [metrics.risk_coverage(Policy(float(w)).confidence(answered), answered.right).area for w in weights]
    best = weights[np.isclose(areas, min(areas), rtol=0, atol=1e-12)]
    return float(best[int(np.argmin(np.abs(best - 0.5)))])


def halves(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the calibration questions that choose the weight, and of those that choose the threshold, where a
    promise is to be kept.

    Example:
        >>> choose, keep = halves(5)
        >>> len(choose), len(keep), sorted([*choose.tolist(), *keep.tolist()])
        (2, 3, [0, 1, 2, 3, 4])
    """
    order = np.random.default_rng(0).permutation(count)
    return order[: count // 2], order[count // 2 :]


def needed(risk: float, delta: float = 0.1) -> int:
    """How many calibration questions the "selective" promise needs at least: fewer prove nothing, even if all are
    right.

    Example:
        >>> needed(0.2), needed(0.1)
        (21, 44)
    """
    _check_risk(risk, delta)
    return math.ceil(math.log(delta / RANKS) / math.log(1 - risk))


def calibrate(
    answered: Answered,
    *,
    weight: float | None = None,
    risk: float | None = None,
    coverage: float | None = None,
    guarantee: str = "selective",
    delta: float = 0.1,
) -> Policy:
    """A policy from a calibration set: questions like those to come, never trained on.

    Args:
        weight: of the certainty said; the best one (`best_weight`) where None. A weight chosen here is chosen on the
            questions that the threshold is: with a guarantee, half of them are kept for each.
        risk: the share of wrong answers that is wanted at most, with the guarantee of `threshold`; or
        coverage: the share of questions to answer. Where neither is given, the threshold is the one that best tells
            right answers from wrong ones (the largest true minus false positive rate).

    Raises:
        ValueError: no questions, or options that are unknown or do not go together.

    Example:
        >>> from jaxml.tune.r_tuning.ask import Answered
        >>> answered = Answered(["a", "b"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> calibrate(answered).willing(answered).tolist()
        [True, False]
    """
    if risk is not None and coverage is not None:
        raise ValueError("policy.calibrate: risk or coverage is given, got both.")
    if risk is None and (guarantee, delta) != ("selective", 0.1):
        raise ValueError(f"policy.calibrate: guarantee and delta go with risk, got {guarantee!r}, {delta} and no risk.")
    count, chosen = len(answered.right), weight is None
    if count < 1 + (chosen and risk is not None):
        raise ValueError(f"policy.calibrate: at least one question, or two to choose the weight too, got {count}.")
    choose = keep = np.arange(count)
    if chosen and risk is not None:
        choose, keep = halves(count)
    weight = best_weight(answered.take(choose)) if chosen else float(weight)
    held = answered.take(keep)
    confidence = Policy(weight).confidence(held)
    if risk is not None:
        value = threshold(confidence, held.right, risk, guarantee=guarantee, delta=delta)
        said = {
            "selective": f"at most {100 * risk:g}% of the answers given are wrong, with probability "
            f"{100 * (1 - delta):g}%",
            "marginal": f"at most {100 * risk:g}% of all questions are answered wrongly, on average",
        }[guarantee]
    elif coverage is not None:
        if not 0 < coverage <= 1:
            raise ValueError(f"policy.calibrate: coverage is in (0, 1], got {coverage}.")
        ordered = np.sort(confidence)[::-1]
        place = max(0, math.ceil(round(coverage * len(ordered), 9)) - 1)
        value = float(np.nextafter(ordered[place], -1.0))
        said = f"{100 * np.mean(confidence > value):.3g}% of the calibration questions are answered"
    else:
        value, said = _youden(confidence, held.right)
    return Policy(weight, value, said)


def threshold(
    confidence: np.ndarray, right: np.ndarray, risk: float, *, guarantee: str = "selective", delta: float = 0.1
) -> float:
    """The lowest threshold that keeps a promise about questions drawn as the calibration set was.

    "selective": with probability at least 1 − delta over the calibration set, P(wrong | answered) ≤ risk. Ten ranks,
    fixed beforehand, are tested with exact binomial tails at delta / 10 each: given the confidence at a rank, the
    answers above it are independent draws.

    "marginal": P(answered and wrong) ≤ risk, on average over calibration sets (conformal risk control; the loss falls
    as the threshold rises).

    Args:
        confidence, right: [n], of the calibration set.
        risk: wanted at most, in (0, 1).
        delta: how often the first promise may fail.

    Returns:
        Answer above it; infinity where no threshold keeps the promise on so few questions.

    Reference:
        Geifman and El-Yaniv 2017, "Selective Classification for Deep Neural Networks", theorem 3.2; Angelopoulos et al.
        2021, "Learn then Test", and 2022, "Conformal Risk Control", theorem 1.

    Example:
        >>> sure = np.linspace(0, 1, 200)
        >>> 0.3 < threshold(sure, sure > 0.5, risk=0.2) < 0.7
        True
    """
    confidence, right = np.asarray(confidence, np.float64), np.asarray(right, bool)
    if confidence.shape != right.shape or confidence.ndim != 1 or not len(right):
        raise ValueError(f"policy.threshold: confidence and right are [n], got {confidence.shape} and {right.shape}.")
    _check_risk(risk, delta)
    if guarantee not in GUARANTEES:
        raise ValueError(f"policy.threshold: guarantee is one of {', '.join(GUARANTEES)}, got {guarantee!r}.")
    n, ordered = len(right), np.sort(confidence)[::-1]
    if guarantee == "marginal":
        candidates = np.concatenate([[-math.inf], np.unique(confidence)])
        for value in candidates:  # from the loosest
            if (np.sum(~right & (confidence > value)) + 1) / (n + 1) <= risk:
                return float(value)
        return math.inf
    least = needed(risk, delta)
    for rank in sorted({*np.linspace(least, n, RANKS).astype(int)} if least <= n else (), reverse=True):
        value = float(ordered[rank]) if rank < n else -math.inf
        given = confidence > value
        if _binomial_tail(int(np.sum(~right & given)), int(given.sum()), risk) <= delta / RANKS:
            return value
    return math.inf


RANKS = 10


def sure(model: Model, policy: Policy, form: Form = PLAIN) -> Callable[[str, str], float]:
    """(question, answer) → how sure the tuned model is of that answer, by the policy's weights: what
    `jaxml.rag.astute` takes as the weight of memory.

    Example:
        >>> from jaxml import testing
        >>> 0 <= sure(testing.tiny_model(), Policy())("who? ", "me") <= 1
        True
    """

    def of(question: str, answer: str) -> float:
        return float(policy.confidence(ask.certainty(model, [Item(question)], [answer], form))[0])

    return of


def _check_risk(risk: float, delta: float) -> None:
    if not 0 < risk < 1 or not 0 < delta < 1:
        raise ValueError(f"policy.threshold: risk and delta are in (0, 1), got {risk} and {delta}.")


def _binomial_tail(wrong: int, answered: int, risk: float) -> float:
    """P(at most so many wrong) where each answer is wrong with probability `risk`."""
    logs = [
        math.lgamma(answered + 1) - math.lgamma(k + 1) - math.lgamma(answered - k + 1)
        + k * math.log(risk) + (answered - k) * math.log1p(-risk)
        for k in range(wrong + 1)
    ]  # fmt: skip
    most = max(logs)
    return min(1.0, math.exp(most) * math.fsum(math.exp(value - most) for value in logs))


def _youden(confidence: np.ndarray, right: np.ndarray) -> tuple[float, str]:
    """(threshold, what it does)."""
    if right.all() or not right.any():
        return 0.5, f"the confidence is above ½ (all calibration answers are {'right' if right.all() else 'wrong'})"
    values = np.unique(confidence)
    gain = [np.mean(confidence[right] > v) - np.mean(confidence[~right] > v) for v in values]
    best = int(np.argmax(gain))
    if gain[best] <= 0:
        return -math.inf, "everything is answered (the confidence does not tell right answers from wrong ones)"
    return float((values[best] + values[min(best + 1, len(values) - 1)]) / 2), (
        "right and wrong answers are told apart best"
    )


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer, or none.

    Example:
        >>> str(Said("Paris", 0.9, "Paris")), str(Said(None, 0.1, "Lyon"))
        ('Paris', 'I do not know.')
    """

    answer: str | None  # None: refused
    confidence: float
    draft: str  # what would have been answered

    def __str__(self) -> str:
        return self.answer if self.answer is not None else "I do not know."


def answer_or_refuse(
    model: Model,
    questions: Sequence[str | Item],
    threshold: float | Policy,
    form: Form = PLAIN,
    *,
    max_new_tokens: int = 15,
) -> list[Said]:
    """Answers the questions that the model is sure enough of.

    Args:
        threshold: a policy of `calibrate`, or a number for the paper's mixture of confidences.

    Example:
        >>> from jaxml import testing
        >>> [said] = answer_or_refuse(testing.tiny_model(), ["who?"], 1.0, max_new_tokens=3)
        >>> print(said)
        I do not know.
    """
    if isinstance(questions, str):
        raise ValueError("answer_or_refuse: questions are a list, got a single string.")
    policy = threshold if isinstance(threshold, Policy) else Policy(threshold=float(threshold))
    asked = [q if isinstance(q, Item) else Item(q) for q in questions]
    answered = ask.answer(model, asked, form, max_new_tokens=max_new_tokens)
    given = zip(answered.texts, policy.confidence(answered), policy.willing(answered))
    return [Said(text if willing else None, float(value), text) for text, value, willing in given]
