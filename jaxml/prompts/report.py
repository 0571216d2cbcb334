"""What a search found, with intervals: a better prompt, or chance?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxml import figure
from jaxml.extras import need
from jaxml.log import write_text
from jaxml.prompts.task import Candidate, Measured
from jaxml.tune.r_tuning.metrics import ENOUGH


def bootstrap(values: np.ndarray, *, level: float = 0.95, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean.

    Args:
        values: [n]; of a comparison, the difference on each example (paired).

    Example:
        >>> low, high = bootstrap(np.array([0.0, 1.0] * 50))
        >>> 0.35 < low < 0.45 < 0.55 < high < 0.65
        True
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap: values are [n] with n at least 1, got the shape {values.shape}.")
    rng = np.random.default_rng(seed)
    means = np.concatenate([
        values[rng.integers(0, len(values), (min(1000, draws - i), len(values)))].mean(1)
        for i in range(0, draws, 1000)
    ])  # fmt: skip
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One evaluation of a search, in order.

    Example:
        >>> trials = [Trial(Candidate(""), 8, mean=-2.0, spent=90), Trial(Candidate("Add."), 8, mean=-1.5, spent=200)]
        >>> max(trials, key=lambda trial: trial.mean).candidate.words
        'Add.'
    """

    candidate: Candidate
    examples: int
    mean: float
    spent: int  # tokens of the whole search, after it


@dataclasses.dataclass(frozen=True)
class Report:
    """The winner of a search beside the prompt that it began with, on examples that the search never saw.

    Example:
        >>> from jaxml import prompts, testing
        >>> examples = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(9)]
        >>> task = prompts.Task(examples[:3])
        >>> llm = prompts.Local(testing.tiny_model())
        >>> found = prompts.search(llm, task, ["", "Add."], examples[3:6], examples[6:], shots=[0])
        >>> isinstance(found, Report), found.metric
        (True, 'likelihood')
    """

    winner: Candidate
    baseline: Candidate
    metric: str
    shown: str  # the winner's prompt for one question, as the model reads it
    dev: dict[Candidate, float]  # means on all the development examples, of those that got so far
    held_out: dict[Candidate, Measured]  # winner and baseline
    trials: list[Trial]
    spent: int  # tokens
    budget: int | None
    stopped: str  # why the search ended

    @property
    def difference(self) -> tuple[float, float, float]:
        """(mean, low, high) of winner − baseline on the held-out examples, paired, 95 %."""
        values = self.held_out[self.winner].values - self.held_out[self.baseline].values
        return (float(values.mean()), *bootstrap(values))

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference leaves out 0, of enough examples to tell (`ENOUGH`)."""
        _, low, high = self.difference
        return (low > 0 or high < 0) and len(self.held_out[self.winner].values) >= ENOUGH

    def markdown(self) -> str:
        """A page to read."""
        rows = []
        for name, candidate in (("winner", self.winner), ("where it began", self.baseline)):
            of = self.held_out[candidate]
            low, high = bootstrap(of.values)
            rows.append(
                f"| {name} | {candidate.words.replace('|', '/').replace(chr(10), ' ')} | {of.mean:.4f} | "
                f"{low:.4f} to {high:.4f} | {of.tokens / len(of.values):.0f} |"
            )
        mean, low, high = self.difference
        verdict = "better" if low > 0 else "worse" if high < 0 else "not told apart by these examples"
        if len(self.held_out[self.winner].values) < ENOUGH:
            verdict = f"fewer than {ENOUGH} examples tell nothing"
        if self.winner == self.baseline:
            verdict = "the same prompt: nothing better was found"
        budget = "" if self.budget is None else f" of {self.budget:,}"
        count = len(self.held_out[self.winner].values)
        return "\n".join([
            "# Prompt search", "",
            f"{len({t.candidate for t in self.trials})} prompts, {len(self.trials)} evaluations, "
            f"{self.spent:,} tokens{budget}; {self.stopped}.", "",
            f"Metric: {self.metric} (larger is better), on {count} held-out examples:", "",
            "| | prompt | mean | 95 % interval | tokens a question |", "|---|---|---|---|---|", *rows, "",
            f"Difference {mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (paired bootstrap): {verdict}.", "",
            "## The winning prompt, for one question", "", "```", self.shown.rstrip("\n"), "```", "",
        ])  # fmt: skip

    def save(self, folder: str | Path) -> Path:
        """report.md and search.png in the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.md", self.markdown())
        plot(self.trials, folder / "search.png", metric=self.metric)
        return folder / "report.md"


_LABELS = {"likelihood": "log-likelihood of an answer, nats", "accuracy": "accuracy", "match": "exact match"}


def plot(trials: Sequence[Trial], path: str | Path, *, metric: str = "score") -> Path:
    """Score against budget: each evaluation, and the best so far among the longest ones.

    Example:
        >>> import tempfile
        >>> trials = [Trial(Candidate(""), 8, -2.0, 90), Trial(Candidate("Add."), 8, -1.5, 200)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = plot(trials, f"{folder}/search.svg", metric="likelihood")
        ...     made.name, made.read_text().count("<svg")
        ('search.svg', 1)
    """
    sizes = sorted({t.examples for t in trials})
    made = figure.figure(7, 4)
    axes = made.subplots()
    colours = need("matplotlib", "plot").colormaps["viridis"](np.linspace(0.85, 0.15, len(sizes)))
    for size, colour in zip(sizes, colours):
        of = [t for t in trials if t.examples == size]
        axes.plot(
            [t.spent for t in of], [t.mean for t in of], "o", color=colour, markersize=5, label=f"{size} examples"
        )
    best, line = {}, []
    for t in trials:  # what one would take, had the search ended here
        best[t.candidate] = t
        longest = max(b.examples for b in best.values())
        line.append(max(b.mean for b in best.values() if b.examples == longest))
    axes.plot(
        [t.spent for t in trials],
        line,
        drawstyle="steps-post",
        color="0.4",
        linewidth=1.2,
        label="best so far, on the most examples",
    )
    axes.set(xlabel="tokens spent", ylabel=_LABELS.get(metric, metric) + ", mean", title="Prompt search")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,.0f}k" if x >= 1000 else f"{x:.0f}")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure.write(made, path)
