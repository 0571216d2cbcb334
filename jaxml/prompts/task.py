"""What a prompt is to be good at, and how good it is: one value an example, paid for once."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxml.lm.generate import Prompt
from jaxml.prompts.llm import LLM
from jaxml.prompts.store import Store
from jaxml.prompts.template import Template, few_shot
from jaxml.tune.facts import normalise

Example = Mapping[str, Any]
METRICS = ("likelihood", "accuracy", "match")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A prompt that is tried: what is said first, and which examples are shown."""

    instruction: str = ""
    demonstrations: tuple[int, ...] = ()  # numbers in the task's pool, in the order in which they are shown

    @property
    def words(self) -> str:
        """In a few words, for tables."""
        shown = f" + {len(self.demonstrations)} examples" if self.demonstrations else ""
        return (self.instruction or "(no instruction)") + shown


@dataclasses.dataclass(frozen=True)
class Task:
    """How a question is asked, what its answer is, and what to count.

    Args:
        pool: examples that may be shown.
        ask: the prompt of one question; its fields are keys of an example.
        answer: of an example, as it follows the prompt.
        metric: "likelihood": log p(answer | prompt) in nats; "accuracy": whether the answer is the most likely of the
            example's "choices"; "match": whether what the model writes is the answer, but for case, articles and
            punctuation; or a function (what it writes, example) → number. Larger is better.
        max_new_tokens, stop: of what the model writes, where it has to.
        between: two demonstrations of a text.

    Example:
        >>> task = Task([{"prompt": "1+1=", "response": "2"}])
        >>> task.prompt(Candidate("Add.", (0,)), {"prompt": "2+2=", "response": "4"})
        'Add.\\n\\n1+1=2\\n\\n2+2='
    """

    pool: Sequence[Example] = ()
    ask: Template = Template("{prompt}")  # noqa: RUF009
    answer: Callable[[Example], str] = lambda example: example["response"]
    metric: str | Callable[[str, Example], float] = "likelihood"
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    between: str = "\n\n"

    def __post_init__(self):
        if not callable(self.metric) and self.metric not in METRICS:
            raise ValueError(f"Task: metric is one of {', '.join(METRICS)}, or a function, got {self.metric!r}.")

    def prompt(self, candidate: Candidate, example: Example) -> Prompt:
        """The candidate's prompt for an example; the answer itself is not looked at."""
        shown = [self.pool[i] for i in candidate.demonstrations]
        build = few_shot(self.ask, self.answer, shown, instruction=candidate.instruction, between=self.between)
        return build(**{field: example[field] for field in self.ask.fields})

    def check(self, examples: Sequence[Example], *, shown: bool = False) -> None:
        """Raises ValueError unless every example has what is asked and, unless it is only shown, what is counted."""
        for number, example in enumerate(examples):
            counted = self.metric == "accuracy" and not shown
            wanted = [*self.ask.fields, *(["choices"] if counted else [])]
            if missing := [key for key in wanted if key not in example]:
                raise ValueError(f"Task: an example has {', '.join(wanted)}; number {number} lacks {missing[0]}.")
            if counted and self.answer(example) not in example["choices"]:
                raise ValueError(
                    f"Task: the answer is among the choices, number {number} has {self.answer(example)!r} and "
                    f"{example['choices']}."
                )


def foreseen(llm: LLM, task: Task, candidate: Candidate, examples: Sequence[Example], look: int = 4) -> float:
    """The tokens that measuring will cost, from the first `look` examples."""
    total = 0
    for example in examples[:look]:
        answers = example["choices"] if task.metric == "accuracy" else [task.answer(example)]
        total += llm.count(task.prompt(candidate, example)) + sum(llm.count(a) if a else 0 for a in answers)
    return total * len(examples) / min(look, len(examples))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A candidate on some examples."""

    values: np.ndarray  # [n] float64, the metric of each
    tokens: int  # read and written for them, as if nothing had been kept

    @property
    def mean(self) -> float:
        return float(self.values.mean())


def measure(llm: LLM, task: Task, candidate: Candidate, examples: Sequence[Example], store: Store) -> Measured:
    """How good a candidate is on each example; what the store holds is not asked again."""
    prompts = [task.prompt(candidate, example) for example in examples]
    questions = [_question(llm, task, prompt, example) for prompt, example in zip(prompts, examples)]
    missing = [i for i, question in enumerate(questions) if store.get(question) is None]
    if missing:
        found = _ask(llm, task, [prompts[i] for i in missing], [examples[i] for i in missing])
        for i, answer in zip(missing, found):
            store.put(questions[i], answer)
    answers = [store.get(question) for question in questions]
    return Measured(np.array([value for value, _ in answers], np.float64), sum(tokens for _, tokens in answers))


def _question(llm: LLM, task: Task, prompt: Prompt, example: Example) -> dict[str, Any]:
    metric = task.metric if isinstance(task.metric, str) else f"{task.metric.__module__}.{task.metric.__qualname__}"
    question = {"llm": llm.name, "prompt": prompt, "metric": metric, "answer": task.answer(example)}
    if metric == "accuracy":
        return question | {"choices": list(example["choices"])}
    if metric == "likelihood":
        return question
    return question | {"limit": task.max_new_tokens, "stop": list(task.stop)}


def _ask(llm: LLM, task: Task, prompts: Sequence[Prompt], examples: Sequence[Example]) -> list[tuple[float, int]]:
    """(value, tokens) of each."""
    answers = [task.answer(example) for example in examples]
    if task.metric == "likelihood":
        found = llm.score(prompts, [[answer] for answer in answers])
        return [(float(s.log_probs[0]), s.cost) for s in found]
    if task.metric == "accuracy":
        choices = [list(example["choices"]) for example in examples]
        found = llm.score(prompts, choices)
        best = [of[int(s.log_probs.argmax())] for of, s in zip(choices, found)]
        return [(float(b == a), s.cost) for b, a, s in zip(best, answers, found)]
    replies = llm.generate(prompts, max_new_tokens=task.max_new_tokens, stop=task.stop)
    right = lambda text, example: float(normalise(text) == normalise(task.answer(example)))
    count = task.metric if callable(task.metric) else right
    return [(float(count(r.text, e)), r.prompt_tokens + r.new_tokens) for r, e in zip(replies, examples)]
