"""What a tuned model's certainty is worth, beside models that were not taught any."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxml import figure, log
from jaxml.tune.r_tuning import metrics
from jaxml.tune.r_tuning.ask import Answered
from jaxml.tune.r_tuning.items import Item
from jaxml.tune.r_tuning.labels import Labels
from jaxml.tune.r_tuning.policy import Policy

PARTS = {
    "seen": "questions of the kinds trained on", "new": "questions of other kinds", "given": "questions given",
}  # fmt: skip
COLOURS = ("#1f5fa8", "#c8553d", "#7a7a7a", "#3a8f5c", "#8b5fbf", "#b8860b")


@dataclasses.dataclass(frozen=True)
class Method:
    """One model with its way of deciding.

    Args:
        policy: weighs its two confidences, and says from where on it answers.
        answers: part ("seen", "new", "unanswerable") → what it answers.

    Example:
        >>> answered = Answered(["a", "b"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> Method("tuned", Policy(), {"seen": answered}).confidence("seen").shape
        (2,)
    """

    name: str
    policy: Policy
    answers: dict[str, Answered]

    def confidence(self, part: str) -> np.ndarray:
        return self.policy.confidence(self.answers[part])


def evaluate(answered: Answered, policy: Policy, before: np.ndarray | None = None) -> dict[str, Any]:
    """All figures of one model on one set of answerable questions; of the ranking ones with 95 % bootstrap intervals.

    Args:
        before: [n], which questions the untuned model answered rightly; for the honesty scores.

    Returns:
        accuracy (of all answers), coverage (share answered), willing_accuracy (of these), known_answered (of the right
        answers, the share that is given), ap, auroc, aurc, ece, brier, and where `before` is given
        over_conservativeness, prudence, honesty. Of ap, auroc, aurc and willing_accuracy also NAME_interval.

    Example:
        >>> answered = Answered(["a", "b"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> evaluate(answered, Policy())["auroc"]
        1.0
    """
    right, confidence, willing = answered.right, policy.confidence(answered), policy.willing(answered)
    out: dict[str, Any] = {
        "questions": len(right),
        "accuracy": float(right.mean()),
        "coverage": float(willing.mean()),
        "known_answered": float(willing[right].mean()) if right.any() else float("nan"),
        "ece": metrics.ece(confidence, right),
        "brier": metrics.brier(confidence, right),
    }
    ranked: dict[str, tuple[Callable[..., float], np.ndarray]] = {
        "ap": (metrics.average_precision, confidence),
        "auroc": (metrics.auroc, confidence),
        "aurc": (lambda c, r: metrics.risk_coverage(c, r).area, confidence),
        "willing_accuracy": (lambda w, r: metrics.accuracy(r, w), willing),
    }
    for name, (statistic, given) in ranked.items():
        out[name] = statistic(given, right)
        out[f"{name}_interval"] = list(metrics.interval(statistic, given, right))
    if before is not None:
        out |= metrics.honesty(before, right, willing)._asdict()
    return out


def compare(methods: Sequence[Method], before: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Each method's figures on each part, and the first one against the others at its own coverage.

    Args:
        methods: the one in question first.
        before: part → which questions the untuned model answered rightly.

    Returns:
        part → method → figures of `evaluate`, with at_equal_coverage: accuracy of as many most confident answers as the
        first method gives (NaN where it gives none), and of the others difference_at_equal_coverage: [mean, low, high]
        of the first minus it, paired; "unanswerable" → method → refusal_rate, and refusal_rate_at_equal_coverage of the
        first of the other parts.

    Example:
        >>> answered = Answered(["a", "b"] * 9, np.arange(18) % 2 == 0, np.linspace(1, 0, 18), np.linspace(1, 0, 18))
        >>> found = compare([Method("tuned", Policy(), {"seen": answered})])
        >>> found["seen"]["tuned"]["accuracy"]
        0.5
    """
    first, out = methods[0], {}
    for part in PARTS:
        if part not in first.answers:
            continue
        covered = float(first.policy.willing(first.answers[part]).mean())
        arrays = [(m.confidence(part), m.answers[part].right) for m in methods]
        out[part] = {}
        for number, (method, (confidence, right)) in enumerate(zip(methods, arrays)):
            found = evaluate(method.answers[part], method.policy, (before or {}).get(part))
            found["at_equal_coverage"] = metrics.at_coverage(confidence, right, covered) if covered else float("nan")
            if number and covered:
                gain = lambda a, b, c, d: metrics.at_coverage(a, b, covered) - metrics.at_coverage(c, d, covered)
                pair = (*arrays[0], confidence, right)
                found["difference_at_equal_coverage"] = [gain(*pair), *metrics.interval(gain, *pair)]
            out[part][method.name] = found
    if "unanswerable" in first.answers:
        beside = next((part for part in PARTS if part in first.answers), None)
        out["unanswerable"] = {m.name: _refused(m, first, beside) for m in methods}
    return out


def without_nan(report: Any) -> Any:
    """The same as JSON can say it: null for what is not a number.

    Example:
        >>> without_nan({"ap": float("nan"), "interval": [0.25, float("inf")]})
        {'ap': None, 'interval': [0.25, None]}
    """
    if isinstance(report, dict):
        return {k: without_nan(v) for k, v in report.items()}
    if isinstance(report, list | tuple):
        return [without_nan(v) for v in report]
    return None if isinstance(report, float) and not np.isfinite(report) else report


def _refused(method: Method, first: Method, beside: str | None) -> dict[str, float]:
    answered = method.answers["unanswerable"]
    count = 0 if beside is None else int(first.policy.willing(first.answers[beside]).sum())
    alike = float("nan")
    if count:
        alike = float(np.mean(method.confidence("unanswerable") < np.sort(method.confidence(beside))[::-1][count - 1]))
    return {
        "questions": len(answered.right),
        "refusal_rate": float(np.mean(~method.policy.willing(answered))),
        "refusal_rate_at_equal_coverage": alike,
    }


def markdown(report: dict[str, Any]) -> str:
    """`compare`'s figures as a page.

    Example:
        >>> answered = Answered(["2", "5"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> found = compare([Method("tuned", Policy(), {"unanswerable": answered})])
        >>> print(markdown(found).splitlines()[-1])
        | tuned | 50.0% | – |
    """
    percent = lambda x: "–" if np.isnan(x) else f"{x:.1%}"
    number = lambda x: "–" if np.isnan(x) else f"{x:.3f}"
    ranged = lambda f, name: metrics.written(f[name], f[f"{name}_interval"], number)
    lines = []
    for part, said in PARTS.items():
        if part not in report:
            continue
        lines += [
            f"## {said[0].upper() + said[1:]} ({next(iter(report[part].values()))['questions']})", "",
            "| | right | answered | of these right | of what it knows, answered | AP | AUROC | AURC (less is better) | "
            "ECE | Brier | right at equal coverage |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, f in report[part].items():
            lines.append(
                f"| {name} | {percent(f['accuracy'])} | {percent(f['coverage'])} | {percent(f['willing_accuracy'])} | "
                f"{percent(f['known_answered'])} | {ranged(f, 'ap')} | {ranged(f, 'auroc')} | {ranged(f, 'aurc')} | "
                f"{f['ece']:.3f} | {f['brier']:.3f} | {percent(f['at_equal_coverage'])} |"
            )
        lines.append("")
        if any("honesty" in f for f in report[part].values()):
            lines += ["| | over-conservative | prudent | honesty |", "|---|---|---|---|"]
            scores = ("over_conservativeness", "prudence", "honesty")
            lines += [
                f"| {name} | " + " | ".join(percent(f[score]) for score in scores) + " |"
                for name, f in report[part].items() if "honesty" in f
            ]  # fmt: skip
            lines.append("")
    if "unanswerable" in report:
        count = next(iter(report["unanswerable"].values()))["questions"]
        lines += [
            f"## Questions that nothing answers ({count})", "",
            "| | refused | refused where all answer as many of the questions above |", "|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {name} | {percent(f['refusal_rate'])} | {percent(f['refusal_rate_at_equal_coverage'])} |"
            for name, f in report["unanswerable"].items()
        ]
        lines.append("")
    return "\n".join(lines)


def plot_risk(methods: Sequence[Method], path: str | Path) -> Path:
    """Risk against coverage, one panel for each part; the point is where a method's threshold stands.

    Example:
        >>> import tempfile
        >>> answered = Answered(["2", "5"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> methods = [Method("tuned", Policy(), {"seen": answered})]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     "tuned (area 0.25)" in plot_risk(methods, f"{folder}/risk.svg").read_text()
        True
    """
    parts = _parts(methods, "plot_risk")
    made = figure.figure(5.2 * len(parts), 4)
    for axes, part in zip(np.atleast_1d(made.subplots(1, len(parts), sharey=True)), parts):
        for colour, method in zip(COLOURS, methods):
            answered = method.answers[part]
            curve = metrics.risk_coverage(method.confidence(part), answered.right)
            axes.plot(curve.coverage, curve.risk, color=colour, label=f"{method.name} (area {curve.area:.2f})")
            willing = method.policy.willing(answered)
            if willing.any():
                axes.plot(willing.mean(), 1 - answered.right[willing].mean(), "o", color=colour)
        axes.set(
            title=PARTS[part][0].upper() + PARTS[part][1:], xlabel="coverage (share of questions answered)",
            xlim=(0, 1), ylim=(0, 1),
        )  # fmt: skip
        _tidy(axes)
    np.atleast_1d(made.axes)[0].set_ylabel("risk (share of wrong answers)")
    return figure.write(made, path)


def plot_reliability(methods: Sequence[Method], path: str | Path, bins: int = 10) -> Path:
    """Confidence against accuracy, in bins; a well-calibrated method lies on the diagonal.

    Example:
        >>> import tempfile
        >>> answered = Answered(["2", "5"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> methods = [Method("tuned", Policy(), {"seen": answered})]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     "tuned (ECE 0.15)" in plot_reliability(methods, f"{folder}/reliability.svg").read_text()
        True
    """
    parts = _parts(methods, "plot_reliability")
    made = figure.figure(4.6 * len(parts), 4.2)
    for axes, part in zip(np.atleast_1d(made.subplots(1, len(parts), sharey=True)), parts):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
        for colour, method in zip(COLOURS, methods):
            right = method.answers[part].right
            r = metrics.reliability(method.confidence(part), right, bins)
            label = f"{method.name} (ECE {metrics.ece(method.confidence(part), right, bins):.2f})"
            axes.plot(r.confidence, r.accuracy, color=colour, linewidth=1, label=label)
            axes.scatter(r.confidence, r.accuracy, s=6 + 160 * r.count / r.count.sum(), color=colour)
        axes.set(
            title=PARTS[part][0].upper() + PARTS[part][1:], xlabel="confidence, mean of a bin", xlim=(0, 1), ylim=(0, 1)
        )
        _tidy(axes)
    np.atleast_1d(made.axes)[0].set_ylabel("share of right answers")
    return figure.write(made, path)


def _parts(methods: Sequence[Method], function: str = "") -> list[str]:
    """Those whose questions have answers; a function that draws them wants one at least."""
    parts = [part for part in PARTS if part in methods[0].answers]
    if function and not parts:
        known, got = ", ".join(PARTS), ", ".join(methods[0].answers) or "none"
        raise ValueError(f"r_tuning.{function}: a part with right answers is needed ({known}), got {got}.")
    return parts


def _tidy(axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def examples_table(items: Sequence[Item], answered: Answered, labels: Labels, count: int = 4) -> str:
    """A few questions that are labelled sure (D1) and unsure (D0), as a page shows them.

    Example:
        >>> answered = Answered(["2", "5"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> items, labels = [Item("1+1?", ("2",)), Item("2+2?", ("4",))], Labels(np.array([1.0, 0.0]), np.ones(2, bool))
        >>> print(examples_table(items, answered, labels))
        | | question | the model said | right |
        |---|---|---|---|
        | D1, sure | 1+1? | 2 | 2 |
        | D0, unsure | 2+2? | 5 | 4 |
    """
    lines = ["| | question | the model said | right |", "|---|---|---|---|"]
    for name, wanted in (("D1, sure", labels.sure >= 0.5), ("D0, unsure", labels.sure < 0.5)):
        for i in np.flatnonzero(wanted & labels.keep)[:count]:
            cells = (
                items[i].question,
                answered.texts[i] or "(nothing)",
                items[i].answers[0] if items[i].answers else "–",
            )
            lines.append(f"| {name} | " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def save(report: dict[str, Any], methods: Sequence[Method], folder: str | Path, above: str = "") -> Path:
    """report.json and report.md in the folder; risk_coverage.png and reliability.png where some questions have answers.

    Example:
        >>> import tempfile
        >>> answered = Answered(["2", "5"], np.array([True, False]), np.array([0.9, 0.2]), np.array([0.8, 0.1]))
        >>> methods = [Method("tuned", Policy(), {"seen": answered})]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(compare(methods), methods, folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['reliability.png', 'report.json', 'report.md', 'risk_coverage.png']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log.write_text(folder / "report.json", json.dumps(without_nan(report), indent=2, allow_nan=False))
    pictures = ""
    if _parts(methods):
        plot_risk(methods, folder / "risk_coverage.png")
        plot_reliability(methods, folder / "reliability.png")
        pictures = "![Risk and coverage](risk_coverage.png)\n\n![Reliability](reliability.png)\n"
    log.write_text(folder / "report.md", "\n".join([above, markdown(report), pictures]))
    return folder / "report.md"
