"""Prompts as functions of named fields: a missing or an unknown field is an error, not a hole in the text."""

import dataclasses
import json
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxml.lm import chat
from jaxml.lm.generate import Prompt


@dataclasses.dataclass(frozen=True)
class Template:
    """A text, or chat messages, with fields in braces; {{ and }} are braces themselves.

    Calling it with a value for each field gives a prompt. What stands in a value is put in as it is: braces in it are
    no fields.

    Raises:
        ValueError: a field without a name, or with more than a name ("{a.b}", "{0}", "{a!r}").

    Example:
        >>> ask = Template("Question: {question}\\nAnswer:")
        >>> ask.fields, ask(question="Who?")
        (('question',), 'Question: Who?\\nAnswer:')
    """

    body: Prompt

    def __post_init__(self):
        if not isinstance(self.body, str):
            chat.check(self.body)
        for text in self._texts():
            for name in _fields(text):
                if not name.isidentifier():
                    raise ValueError(f"Template: a field is a name, got {{{name}}} in {text!r}.")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names, in the order in which they come first."""
        return tuple(dict.fromkeys(name for text in self._texts() for name in _fields(text)))

    def __call__(self, **values: Any) -> Prompt:
        check_fields(self.fields, values, "Template")
        if isinstance(self.body, str):
            return _fill(self.body, values)
        return [message | {"content": _fill(message["content"], values)} for message in self.body]

    def _texts(self) -> list[str]:
        return [self.body] if isinstance(self.body, str) else [m["content"] for m in self.body]


def check_fields(fields: Sequence[str], values: Mapping[str, Any], who: str) -> None:
    """Raises ValueError unless there is a value for each field, and a field for each value.

    Example:
        >>> check_fields(["question"], {"answer": "4"}, "Template")
        Traceback (most recent call last):
            ...
        ValueError: Template: the fields are question; missing question and unknown answer.
    """
    missing, extra = [f for f in fields if f not in values], [v for v in values if v not in fields]
    if missing or extra:
        said = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(extra)}"] * bool(extra)
        raise ValueError(f"{who}: the fields are {', '.join(fields) or 'none'}; {' and '.join(said)}.")


def few_shot(
    ask: Template, answer: Callable[[Mapping[str, Any]], str], demonstrations: Sequence[Mapping[str, Any]],
    *, instruction: str = "", between: str = "\n\n",
) -> Callable[..., Prompt]:  # fmt: skip
    """A prompt with examples in front: of a text, one after the other; of messages, as turns of a conversation.

    Args:
        ask: the prompt of one question.
        answer: what stands after it in a demonstration.
        demonstrations: values for the fields of `ask`, and whatever `answer` reads.
        instruction: first of all; of messages, the system's.
        between: two demonstrations of a text.

    Returns:
        A function of the fields of `ask`.

    Example:
        >>> ask = Template("Q: {q}\\nA:")
        >>> prompt = few_shot(ask, lambda d: " " + d["a"], [{"q": "1+1", "a": "2"}], instruction="Add.")
        >>> print(prompt(q="2+2"))
        Add.
        <BLANKLINE>
        Q: 1+1
        A: 2
        <BLANKLINE>
        Q: 2+2
        A:
    """

    def shown(demonstration: Mapping[str, Any]) -> tuple[Prompt, str]:
        return ask(**{f: demonstration[f] for f in ask.fields if f in demonstration}), answer(demonstration)

    def prompt(**values: Any) -> Prompt:
        last, before = ask(**values), [shown(d) for d in demonstrations]
        if isinstance(last, str):
            shots = [(q + a).rstrip("\n") for q, a in before]
            return between.join([*([instruction] if instruction else []), *shots, last])
        turns = [m for q, a in before for m in [*_turns(q), {"role": "assistant", "content": a.strip()}]]
        system = [m["content"] for m in last if m["role"] == "system"]
        said = "\n\n".join([*([instruction] if instruction else []), *system])
        return [*([{"role": "system", "content": said}] if said else []), *turns, *_turns(last)]

    return prompt


def chain_of_thought(
    ask: Template, *, cue: str = "Let's think step by step.", answer: str = "The answer is"
) -> Template:
    """The same question, answered after thinking aloud (Kojima et al. 2022); `after(answer)` finds the answer.

    Example:
        >>> chain_of_thought(Template("Q: {q}\\nA:"))(q="2+2?")
        "Q: 2+2?\\nA: Let's think step by step."
        >>> chain_of_thought(Template([{"role": "user", "content": "{q}"}]))(q="2+2?")[0]["content"]
        '2+2? Let\\'s think step by step. End with "The answer is", and the answer.'
    """
    if isinstance(ask.body, str):
        return Template(f"{ask.body} {_escaped(cue)}")
    *before, last = ask.body
    asked = f'{last["content"]} {_escaped(cue)} End with "{_escaped(answer)}", and the answer.'
    return Template([*before, last | {"content": asked}])


def after(marker: str) -> Callable[[str], str | None]:
    """Finds what a reply says after the last `marker`, up to the end of the line; None where it is missing.

    Example:
        >>> after("The answer is")("2 and 2 are 4. The answer is 4."), after("The answer is")("4")
        ('4', None)
    """

    def find(text: str) -> str | None:
        _, found, rest = text.rpartition(marker)
        said = rest.strip().splitlines()[0].strip().strip(":").rstrip(".").strip() if found and rest.strip() else ""
        return said or None

    return find


@dataclasses.dataclass(frozen=True)
class Step:
    """One turn of `react`: a thought, an action with its input, and what came of it.

    Example:
        >>> step = Step("I look it up.", "search", "moon", observation="far")
        >>> react("How far?", {"search": "looks a text up"}, [step]).splitlines()[-3:]
        ['Action: search[moon]', 'Observation: far', 'Thought:']
    """

    thought: str
    action: str
    input: str
    observation: str | None = None


def react(question: str, tools: Mapping[str, str], steps: Sequence[Step] = ()) -> str:
    """A prompt for reasoning and acting in turns (Yao et al. 2023): thought, action, observation, until "finish".

    Args:
        tools: name → what it does; "finish" is added.
        steps: what has happened so far.

    Example:
        >>> print(react("How far?", {"search": "looks a text up"}, [Step("I look it up.", "search", "moon", "far")]))
        Answer the question by turns of Thought, Action and Observation. The actions are:
        search[input]: looks a text up
        finish[answer]: ends with the answer
        <BLANKLINE>
        Question: How far?
        Thought: I look it up.
        Action: search[moon]
        Observation: far
        Thought:
    """
    known = {**{f"{name}[input]": about for name, about in tools.items()}, "finish[answer]": "ends with the answer"}
    for step in steps:
        if step.action not in (*tools, "finish"):
            raise ValueError(f"react: an action is one of {', '.join((*tools, 'finish'))}, got {step.action!r}.")
    lines = ["Answer the question by turns of Thought, Action and Observation. The actions are:"]
    lines += [f"{name}: {about}" for name, about in known.items()] + ["", f"Question: {question}"]
    for step in steps:
        lines += [f"Thought: {step.thought}", f"Action: {step.action}[{step.input}]"]
        lines += [] if step.observation is None else [f"Observation: {step.observation}"]
    return "\n".join([*lines, "Thought:"])


def read_step(reply: str, tools: Sequence[str]) -> Step:
    """The next step that a reply to `react` holds.

    Raises:
        ValueError: no action in it, or an unknown one.

    Example:
        >>> read_step(" It is known.\\nAction: finish[384,400 km]\\nObservation: made up", [])
        Step(thought='It is known.', action='finish', input='384,400 km', observation=None)
    """
    thought, found, rest = reply.partition("Action:")
    line = rest.strip().splitlines()[0] if rest.strip() else ""
    name, opened, inside = line.partition("[")
    if not found or not opened or not inside.rstrip().endswith("]"):
        raise ValueError(f'react: a reply holds "Action: name[input]", got {reply!r}.')
    if name.strip() not in (*tools, "finish"):
        raise ValueError(f"react: an action is one of {', '.join((*tools, 'finish'))}, got {name.strip()!r}.")
    return Step(thought.strip(), name.strip(), inside.rstrip()[:-1])


def structured(ask: Template, schema: Mapping[str, Any]) -> Template:
    """The same question, to be answered as JSON of a schema (`prompts.constrain` makes sure of it).

    Example:
        >>> structured(Template("{q}"), {"type": "object"})(q="Who?")
        'Who?\\nAnswer with JSON of this schema: {"type": "object"}\\n'
    """
    said = f"\nAnswer with JSON of this schema: {_escaped(json.dumps(schema, ensure_ascii=False))}\n"
    if isinstance(ask.body, str):
        return Template(ask.body + said)
    *before, last = ask.body
    return Template([*before, last | {"content": last["content"] + said.rstrip()}])


def _fields(text: str) -> list[str]:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"Template: braces come in pairs ({error}), got {text!r}. Write {{{{ for a brace.") from error
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion):
            raise ValueError(f"Template: a field is a name alone, got {name!r} with {form or conversion!r}.")
    return [name for _, name, _, _ in parts if name is not None]


def _fill(text: str, values: Mapping[str, Any]) -> str:
    parts = string.Formatter().parse(text)
    return "".join(before + ("" if name is None else str(values[name])) for before, name, _, _ in parts)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _turns(messages: Prompt) -> list[chat.Message]:
    return [m for m in messages if m["role"] != "system"]
