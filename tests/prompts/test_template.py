"""Prompts as functions: fields are all there, and nothing else is."""

import pytest

from jaxml.prompts import Template, after, chain_of_thought, few_shot, react, structured
from jaxml.prompts.template import Step, read_step

CHAT = Template([{"role": "system", "content": "Be {how}."}, {"role": "user", "content": "{q} {{now}}"}])


def test_values_go_in_as_they_are():
    assert Template("{a}{b}")(a="{b}", b="{{") == "{b}{{"
    assert CHAT(how="brief", q="{x}")[1]["content"] == "{x} {now}"
    assert CHAT.fields == ("how", "q")


@pytest.mark.parametrize("values, words", [
    (dict(how="x"), "missing q"), (dict(how="x", q="", z=1), "unknown z"), (dict(p=1), "missing how, q and unknown p"),
])  # fmt: skip
def test_missing_and_unknown_fields_are_named(values, words):
    with pytest.raises(ValueError, match=words):
        CHAT(**values)


@pytest.mark.parametrize("body", ["{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a", "}"])
def test_a_field_is_a_name_alone(body):
    with pytest.raises(ValueError, match=r"Template: (a field is a name|braces come in pairs)"):
        Template(body)
    with pytest.raises(ValueError, match="role"):
        Template([{"role": "nobody", "content": "x"}])


def test_demonstrations_stand_in_front_of_a_text_and_as_turns_of_a_chat():
    shown = [{"q": "1+1", "a": "2\n"}]
    text = few_shot(Template("Q: {q}\nA: "), lambda d: d["a"], shown, instruction="Add.", between="\n")
    assert text(q="2+2") == "Add.\nQ: 1+1\nA: 2\nQ: 2+2\nA: "
    ask = Template([{"role": "system", "content": "Sums."}, {"role": "user", "content": "{q}"}])
    chat = few_shot(ask, lambda d: d["a"], shown, instruction="Add.")(q="2+2")
    assert [(m["role"], m["content"]) for m in chat] == [
        ("system", "Add.\n\nSums."), ("user", "1+1"), ("assistant", "2"), ("user", "2+2"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="missing q"):
        few_shot(ask, lambda d: "", [{"a": "2"}])(q="2+2")


def test_thinking_aloud_ends_in_an_answer_that_is_found():
    assert chain_of_thought(Template("{q}"), cue="Think {well}.")(q="x") == "x Think {well}."
    find = after("The answer is")
    assert find("The answer is 3. No: The answer is: 4.\nBye") == "4" and find("The answer is") is None


def test_acting_in_turns_is_written_and_read():
    steps = [Step("I look.", "search", "moon", "far")]
    assert react("How far?", {"search": "finds"}, steps).endswith("Action: search[moon]\nObservation: far\nThought:")
    assert read_step(" so\nAction: finish[a[1]]", []) == Step("so", "finish", "a[1]")
    for reply in ("no action", "Action: fly[x]", "Action: search moon", "Action:"):
        with pytest.raises(ValueError, match="react: a"):
            read_step(reply, ["search"])
    with pytest.raises(ValueError, match="got 'fly'"):
        react("?", {}, [Step("", "fly", "")])


def test_a_schema_is_part_of_the_question():
    assert '{"type": "object"}' in structured(CHAT, {"type": "object"})(how="a", q="b")[1]["content"]
