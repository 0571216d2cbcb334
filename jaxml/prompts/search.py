"""A better prompt by successive halving: many tried on few examples, few on many, the best on examples never seen."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxml import log
from jaxml.prompts.llm import LLM
from jaxml.prompts.report import Report, Trial
from jaxml.prompts.store import Store, key
from jaxml.prompts.task import Candidate, Example, Measured, Task, foreseen, measure

Proposer = Callable[[Sequence[tuple[str, float]], int], tuple[Sequence[str], int]]


def search(
    llm: LLM,
    task: Task,
    instructions: Sequence[str],
    dev: Sequence[Example],
    held_out: Sequence[Example],
    *,
    shots: Sequence[int] = (0, 2, 4),
    sets: int = 2,
    candidates: Sequence[Candidate] = (),
    budget: int | None = None,
    first: int = 8,
    eta: int = 3,
    proposer: Proposer | None = None,
    rounds: int = 1,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """The best of instructions × demonstrations, beside the first instruction without any.

    All candidates are tried on the first `first` development examples; the best 1/`eta` of them on `eta` times as many,
    and so on. The winner and the prompt that the search began with are then compared on the held-out examples, which
    nothing was chosen by.

    Args:
        instructions: what may be said first; "" says nothing.
        shots: numbers of demonstrations.
        sets: how many sets of each number are drawn from the task's pool.
        candidates: more of them (from `prompts.select`, perhaps).
        budget: tokens at most, held-out examples included; what is foreseen to go beyond it is not begun.
        proposer: (instructions with their means, the best first, number of the round) → (new ones, tokens that they
            cost), as `propose` makes one.
        rounds: how often the whole is gone through; from the second on with what the proposer made of the best.
        folder: for answers.jsonl (what was asked is not asked again: a search that was stopped goes on, to the same
            report), report.md and search.png.
        seed: of the examples' order and the sets.
        progress: show a line on the console.

    Raises:
        ValueError: no instructions or examples, an example that lacks what the task asks or counts, examples that are
            in two of pool, dev and held_out, or a budget too small for the held-out examples.

    Example:
        >>> from jaxml import prompts, testing
        >>> examples = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(9)]
        >>> task = prompts.Task(examples[:3])
        >>> llm = prompts.Local(testing.tiny_model())
        >>> found = search(llm, task, ["", "Add."], examples[3:6], examples[6:], shots=[0])
        >>> found.winner.instruction in ("", "Add.")
        True

    Reference:
        Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification" (successive halving); Zhou et al. 2023,
        "Large Language Models Are Human-Level Prompt Engineers" (search by likelihood).
    """
    for name, given in (("instructions", instructions), ("dev", dev), ("held_out", held_out)):
        if isinstance(given, str) or not given:
            raise ValueError(f"search: {name} are a list of at least one, got {given!r}.")
    if eta < 2 or first < 1 or rounds < 1:
        raise ValueError(f"search: eta is at least 2, first and rounds at least 1, got {eta}, {first}, {rounds}.")
    if rounds > 1 and proposer is None:
        raise ValueError(f"search: rounds beyond the first need a proposer, got rounds={rounds} without.")
    task.check(task.pool, shown=True)
    task.check([*dev, *held_out])
    _check_apart(task, pool=task.pool, dev=dev, held_out=held_out)
    rng = np.random.default_rng(seed)
    dev = [dev[i] for i in rng.permutation(len(dev))]
    baseline = Candidate(instructions[0])
    demonstrations = draw(task, shots, sets, rng)
    grid = [Candidate(i, d) for i in dict.fromkeys(instructions) for d in demonstrations]
    arms = list(dict.fromkeys([baseline, *grid, *candidates]))
    path = None if folder is None else Path(folder) / "answers.jsonl"
    with Store(path) as store, log.progress("searching", enabled=progress, fields=("best", "tokens")) as bar:
        run = _Run(llm, task, store, budget, baseline, held_out, bar)
        run.task_id = bar.add_task("search", total=_evaluations(len(arms), first, eta, len(dev)), best="–", tokens="0")
        for number in range(rounds):
            if number:
                arms = _proposed(proposer, run, demonstrations, number)
            arms = run.halve(arms, dev, first, eta)
            if run.stopped:
                break
        winner = run.best()
        measured = {c: run.on_held_out(c) for c in dict.fromkeys((winner, baseline))}
    shown = task.prompt(winner, held_out[0])
    shown = shown if isinstance(shown, str) else "\n".join(f"[{m['role']}] {m['content']}" for m in shown)
    report = Report(
        winner=winner,
        baseline=baseline,
        metric=task.metric if isinstance(task.metric, str) else getattr(task.metric, "__name__", repr(task.metric)),
        shown=shown,
        dev={c: m.mean for c, m in run.measured.items() if len(m.values) == len(dev)},
        held_out=measured,
        trials=run.trials,
        spent=run.spent,
        budget=budget,
        stopped=run.stopped or "all rounds were gone through",
    )
    if folder is not None:
        report.save(folder)
    return report


def draw(task: Task, shots: Sequence[int], sets: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Sets of demonstrations, drawn from the task's pool.

    Raises:
        ValueError: more shots than the pool has examples, or fewer than 0.

    Example:
        >>> task = Task([{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(9)])
        >>> [len(shown) for shown in draw(task, [0, 2, 4], sets=2, rng=np.random.default_rng(0))]
        [0, 2, 2, 4, 4]
    """
    out: list[tuple[int, ...]] = []
    for number in shots:
        if not 0 <= number <= len(task.pool):
            raise ValueError(f"search: shots are in 0 … {len(task.pool)}, the size of the pool, got {number}.")
        for _ in range(sets if number else 1):
            out.append(tuple(rng.choice(len(task.pool), number, replace=False).tolist()))
    return list(dict.fromkeys(out))


def orders(candidate: Candidate, most: int = 24, seed: int = 0) -> list[Candidate]:
    """The candidate with its demonstrations in other orders: all of them, or `most` at random.

    Give them to `search` as candidates: the order alone moves the results of small models (Lu et al. 2022).

    Example:
        >>> [c.demonstrations for c in orders(Candidate("", (3, 5)))]
        [(3, 5), (5, 3)]
    """
    of = candidate.demonstrations
    if math.factorial(len(of)) <= most:
        found = [tuple(o) for o in itertools.permutations(of)]
    else:
        rng = np.random.default_rng(seed)
        found = [of]
        while len(found) < most:
            if (turned := tuple(rng.permutation(of).tolist())) not in found:
                found.append(turned)
    return [dataclasses.replace(candidate, demonstrations=o) for o in found]


def propose(llm: LLM, examples: Sequence[tuple[str, str]], count: int = 4, *, temperature: float = 1.0, seed: int = 0):
    """A proposer that asks a model for instructions like the best so far (APE's and OPRO's idea).

    Args:
        llm: that writes them; any, not only the one that is prompted.
        examples: (question, answer) pairs that it is shown.
        count: instructions each time.

    Example:
        >>> from jaxml import prompts, testing
        >>> model = testing.tiny_model(max_length=1024)
        >>> proposer = propose(prompts.Local(model), [("1+1=", "2")], count=2)
        >>> texts, tokens = proposer([("Add.", -1.0)], 1)
        >>> tokens > 0
        True

    Reference:
        Zhou et al. 2023 (APE); Yang et al. 2024, "Large Language Models as Optimizers" (OPRO).
    """

    def proposer(scored: Sequence[tuple[str, float]], number: int) -> tuple[list[str], int]:
        shown = "\n".join(f"Question: {q.strip()}\nAnswer: {a.strip()}" for q, a in examples)
        # Worst first, as OPRO does: what stands last weighs most.
        best = "\n".join(f"score {score:.3f}: {text or '(none)'}" for text, score in reversed(scored))
        asked = (
            f"A model is given an instruction and then a question, and is to answer like this:\n\n{shown}\n\n"
            f"Instructions that were tried, from the worst to the best:\n{best}\n\n"
            "Write one new instruction that will score higher. Write the instruction alone, in one line."
        )
        replies = llm.sample(
            [{"role": "user", "content": asked}], count, max_new_tokens=64, temperature=temperature, stop=["\n"],
            seed=seed + 1000 * number,
        )  # fmt: skip
        known = {text for text, _ in scored}
        found = [r.text.strip().strip('"').removeprefix("Instruction:").strip() for r in replies]
        tokens = sum(r.prompt_tokens + r.new_tokens for r in replies)
        return [text for text in dict.fromkeys(found) if text and text not in known], tokens

    return proposer


class _Run:
    """A search under way: what was measured, and what it cost."""

    def __init__(self, llm, task, store, budget, baseline: Candidate, held_out: Sequence[Example], bar):
        self.llm, self.task, self.store, self.budget, self.bar = llm, task, store, budget, bar
        self.held_out = held_out
        self.least = self.last = foreseen(llm, task, baseline, held_out)  # what must still be paid: baseline, winner
        self.measured: dict[Candidate, Measured] = {}
        self.trials: list[Trial] = []
        self.spent, self.stopped, self.task_id = 0, "", None

    def halve(self, arms: list[Candidate], dev: Sequence[Example], first: int, eta: int) -> list[Candidate]:
        """The best of them, of those that were tried on the most examples."""
        n = min(first, len(dev))
        while True:
            for candidate in arms:
                if not self.affordable(candidate, dev[:n]):
                    self.stopped = "the budget was spent"
                    return arms
                self.on_dev(candidate, dev[:n])
            # On the same examples for all: some may have been tried on more.
            arms = sorted(arms, key=lambda c: -self.measured[c].values[:n].mean())
            if n == len(dev):
                return arms
            arms = arms[: max(1, math.ceil(len(arms) / eta))]
            n = min(n * eta, len(dev))

    def affordable(self, candidate: Candidate, examples: Sequence[Example]) -> bool:
        """Whether the budget holds this evaluation, and then that of the baseline and the dearest winner."""
        if self.budget is None:
            return True
        known = self.measured.get(candidate)
        here = foreseen(self.llm, self.task, candidate, examples) - (known.tokens if known else 0)
        last = max(self.last, foreseen(self.llm, self.task, candidate, self.held_out))
        needed = self.spent + max(here, 0) + self.least + last
        if needed > self.budget:
            if not self.measured:
                raise ValueError(
                    f"search: the budget pays for one evaluation and the held-out examples, {needed:,.0f} tokens as "
                    f"far as can be foreseen, got {self.budget:,}."
                )
            return False
        self.last = last
        return True

    def on_dev(self, candidate: Candidate, examples: Sequence[Example]) -> None:
        before = self.measured.get(candidate)
        if before is not None and len(before.values) >= len(examples):
            return
        found = measure(self.llm, self.task, candidate, examples, self.store)
        self.spent += found.tokens - (before.tokens if before else 0)
        self.measured[candidate] = found
        self.trials.append(Trial(candidate, len(examples), found.mean, self.spent))
        top = self.best()
        self.bar.update(self.task_id, advance=1, best=f"{self.measured[top].mean:.3f}", tokens=f"{self.spent:,}")

    def ranked(self) -> list[Candidate]:
        """The best first of those that were tried on the most examples, then the others; the first of equals first."""
        longest = max(len(m.values) for m in self.measured.values())
        order = lambda c: (-(len(self.measured[c].values) == longest), -self.measured[c].mean)
        return sorted(self.measured, key=order)

    def best(self) -> Candidate:
        return self.ranked()[0]

    def on_held_out(self, candidate: Candidate) -> Measured:
        found = measure(self.llm, self.task, candidate, self.held_out, self.store)
        self.spent += found.tokens
        return found


def _proposed(proposer: Proposer, run: _Run, demonstrations: Sequence[tuple[int, ...]], number: int) -> list[Candidate]:
    """The best candidates again, and each new instruction with the best ones' demonstrations."""
    ranked = run.ranked()
    means: dict[str, float] = {}
    for c in ranked:
        means.setdefault(c.instruction, run.measured[c].mean)
    kept = ranked[:2]
    best = [[text, mean] for text, mean in list(means.items())[:8]]
    question = {"propose": best, "round": number}
    if run.store.get(question) is None:
        new, tokens = proposer([(text, mean) for text, mean in best], number)
        run.store.put(question, [[text for text in new if text not in means], tokens])
    new, tokens = run.store.get(question)
    run.spent += tokens
    shown = dict.fromkeys(c.demonstrations for c in ranked[:4])
    return [*kept, *(Candidate(text, d) for text in new for d in shown)]


def _check_apart(task: Task, **parts: Sequence[Example]) -> None:
    """Refuses an example that is in two parts: what was shown or chosen by would be measured on itself."""
    seen: dict[str, str] = {}
    for name, examples in parts.items():
        for example in examples:
            asked = task.prompt(Candidate(), example)
            other = seen.setdefault(key(asked), name)
            if other != name:
                raise ValueError(f"search: no question is in both {other} and {name}, got {asked!r} in both.")


def _evaluations(arms: int, first: int, eta: int, dev: int) -> int:
    """How many evaluations a round has."""
    n, total = min(first, dev), 0
    while True:
        total += arms
        if n == dev:
            return total
        arms, n = max(1, math.ceil(arms / eta)), min(n * eta, dev)
