"""What a prompt is to be good at, and how good it is: one value an example, paid for once."""

import dataclasses
import json
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
    """A prompt that is tried: what is said first, and which examples are shown.

    Example:
        >>> Candidate("Add.", (0, 3)).words
        'Add. + 2 examples'
    """

    instruction: str = ""
    demonstrations: tuple[int, ...] = ()  # numbers in the task's pool, in the order in which they are shown
    chosen: int = 0  # how many more the task chooses for each question, to stand after them

    @property
    def words(self) -> str:
        """In a few words, for tables."""
        shown = f" + {len(self.demonstrations)} examples" if self.demonstrations else ""
        shown += f" + {self.chosen} chosen for each question" if self.chosen else ""
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
        choose: (example, number) → numbers in the pool, for candidates that want examples chosen for each question
            (`prompts.select`).
        same: how answers are made equal for "match".
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
    choose: Callable[[Example, int], Sequence[int]] | None = None
    same: Callable[[str], str] = normalise
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
    between: str = "\n\n"

    def __post_init__(self):
        if not callable(self.metric) and self.metric not in METRICS:
            raise ValueError(f"Task: metric is one of {', '.join(METRICS)}, or a function, got {self.metric!r}.")

    def prompt(self, candidate: Candidate, example: Example) -> Prompt:
        """The candidate's prompt for an example; the answer itself is not looked at."""
        numbers = list(candidate.demonstrations)
        if candidate.chosen:
            if self.choose is None:
                raise ValueError(f"Task: a candidate wants {candidate.chosen} chosen examples. Give the task `choose`.")
            numbers += self.choose(example, candidate.chosen)
        shown = [self.pool[i] for i in numbers]
        build = few_shot(self.ask, self.answer, shown, instruction=candidate.instruction, between=self.between)
        return build(**{field: example[field] for field in self.ask.fields})

    def check(self, examples: Sequence[Example], *, shown: bool = False) -> None:
        """Raises ValueError unless every example has what is asked and, unless it is only shown, what is counted."""
        for number, example in enumerate(examples):
            counted = self.metric == "accuracy" and not shown
            wanted = [*self.ask.fields, *(["choices"] if counted else [])]
            if missing := [key for key in wanted if key not in example]:
                raise ValueError(f"Task: an example has {', '.join(wanted)}; number {number} lacks {missing[0]}.")
            choices = example["choices"] if counted else []
            if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
                raise ValueError(f"Task: choices are a list of texts, number {number} has {choices!r}.")
            try:
                answer = "" if callable(self.metric) and not shown else self.answer(example)
            except KeyError as error:
                raise ValueError(f"Task: an example has an answer; number {number} lacks {error}.") from error
            if not isinstance(answer, str):
                raise ValueError(f"Task: an answer is a text, number {number} has {answer!r}.")
            if counted and answer not in choices:
                raise ValueError(
                    f"Task: the answer is among the choices, number {number} has {answer!r} and {choices}."
                )


def foreseen(llm: LLM, task: Task, candidate: Candidate, examples: Sequence[Example], look: int = 4) -> float:
    """The tokens that measuring will cost, from the first `look` examples.

    Example:
        >>> from jaxml.rag.scripted import Scripted  # whose tokens are words
        >>> examples = [{"prompt": "1 + 1 =", "response": " 2"}] * 10
        >>> foreseen(Scripted({}), Task(), Candidate("Add."), examples)
        60.0
    """
    total, look = 0, max(1, min(look, len(examples)))
    for example in examples[:look]:
        prompt = task.prompt(candidate, example)
        scored = _scored(task, prompt, example)
        total += llm.cost(prompt, scored) if scored else llm.cost(prompt) + task.max_new_tokens
    return total * len(examples) / look


@dataclasses.dataclass(frozen=True)
class Measured:
    """A candidate on some examples.

    Example:
        >>> Measured(np.array([1.0, 0.0, 1.0, 1.0]), tokens=40).mean
        0.75
    """

    values: np.ndarray  # [n] float64, the metric of each
    tokens: int  # read and written for them, as if nothing had been kept

    @property
    def mean(self) -> float:
        return float(self.values.mean())


AT_ONCE = 64  # questions that are asked before what came is on disk


def measure(llm: LLM, task: Task, candidate: Candidate, examples: Sequence[Example], store: Store) -> Measured:
    """How good a candidate is on each example; what the store holds is not asked again.

    Example:
        >>> from jaxml.rag.scripted import Scripted
        >>> examples = [{"prompt": "who?", "response": "Ada"}, {"prompt": "where?", "response": "Oslo"}]
        >>> measure(Scripted({"who?": "ada"}), Task(metric="match"), Candidate(), examples, Store(None)).values.tolist()
        [1.0, 0.0]
    """
    prompts = [task.prompt(candidate, example) for example in examples]
    scored = [_scored(task, prompt, example) for prompt, example in zip(prompts, examples)]
    questions = [_question(llm, task, prompt, choices) for prompt, choices in zip(prompts, scored)]
    missing = [i for i, question in enumerate(questions) if store.get(question) is None]
    for first in range(0, len(missing), AT_ONCE):
        part = missing[first : first + AT_ONCE]
        asked = [prompts[i] for i in part]
        if scored[part[0]]:
            found = [([float(v) for v in s.log_probs], s.cost) for s in llm.score(asked, [scored[i] for i in part])]
        else:
            replies = llm.generate(asked, max_new_tokens=task.max_new_tokens, stop=task.stop)
            found = [(r.text, r.prompt_tokens + r.new_tokens) for r in replies]
        for i, answer in zip(part, found):
            store.put(questions[i], answer)
    answers = [store.get(question) for question in questions]
    for question, of, answer in zip(questions, scored, answers):
        if not _sound(answer, len(of)):
            raise ValueError(
                f"{store.path}: the answer that is kept for {json.dumps(question)[:80]} is damaged, "
                f"{json.dumps(answer)[:80]}. Remove the file."
            )
    values = [_value(task, example, of, said) for example, of, (said, _) in zip(examples, scored, answers)]
    return Measured(np.array(values, np.float64), sum(tokens for _, tokens in answers))


def _scored(task: Task, prompt: Prompt, example: Example) -> list[str]:
    """The texts whose likelihood the metric looks at; of a chat as a turn holds them, without space around."""
    if task.metric not in ("likelihood", "accuracy"):
        return []
    texts = list(example["choices"]) if task.metric == "accuracy" else [task.answer(example)]
    return texts if isinstance(prompt, str) else [text.strip() for text in texts]


def _question(llm: LLM, task: Task, prompt: Prompt, scored: list[str]) -> dict[str, Any]:
    """What is asked of the model; how its answer is counted is no part of that."""
    question = {"llm": llm.name, "prompt": prompt}
    if scored:
        return question | {"choices": scored}
    return question | {"limit": task.max_new_tokens, "stop": list(task.stop)}


def _sound(answer: Any, choices: int) -> bool:
    """Whether it is [likelihoods of so many choices, or what was written; tokens]."""
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e300  # nor NaN
    if not isinstance(answer, list) or len(answer) != 2 or not number(answer[1]):
        return False
    said = answer[0]
    if not choices:
        return isinstance(said, str)
    return isinstance(said, list) and len(said) == choices and all(map(number, said))


def _value(task: Task, example: Example, scored: list[str], said: Any) -> float:
    if task.metric == "likelihood":
        return float(said[0])
    if task.metric == "accuracy":
        return float(example["choices"][int(np.argmax(said))] == task.answer(example))
    if callable(task.metric):
        return float(task.metric(said, example))
    return float(task.same(said) == task.same(task.answer(example)))
