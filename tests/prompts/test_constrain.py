"""Answers that are what the grammar says, whatever the model would have liked."""

import json
import re

import pytest

from jaxml import lm
from jaxml.prompts import constrain
from jaxml.testing import tiny_model

MODEL = tiny_model()
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_each_row_answers_by_the_grammar():
    asked = ["is it? ", "b"]
    chosen = constrain.generate(MODEL, asked, constrain.choose(["yes", "yes sir", "no"]), max_new_tokens=9)
    assert all(text in ("yes", "yes sir", "no") for text in chosen)
    hot = lm.Sampling(temperature=1.5)
    for text in constrain.generate(MODEL, asked * 2, constrain.regex("[a-c]{2,5}[0-9]"), sampling=hot, batch_size=3):
        assert re.fullmatch("[a-c]{2,5}[0-9]", text)
    assert constrain.generate(MODEL, asked[1:], constrain.choose(["yes", "no"])) == constrain.generate(
        MODEL, asked, constrain.choose(["yes", "no"])
    )[1:]  # fmt: skip


@pytest.mark.slow
def test_smollm2_answers_in_json(smollm2):
    asked = [[{"role": "user", "content": q}] for q in ("How old is a child of five?", "Is it cold in winter?")]
    for text in constrain.generate(smollm2, asked, constrain.json_schema(SCHEMA), max_new_tokens=40):
        found = json.loads(text)
        assert set(found) == {"a", "b"} and 0 <= found["a"] <= 99 and found["b"] in (True, False)


def test_what_cannot_be_followed_is_refused():
    for call, words in (
        (lambda: constrain.regex("(a"), "not a regex"),
        (lambda: constrain.json_schema({"type": "nothing"}), "not a json schema"),
        (lambda: constrain.choose([]), "options are texts"),
        (lambda: constrain.choose("yes"), "options are texts"),
        (lambda: constrain.generate(MODEL, ["a"], constrain.regex("b{20}"), max_new_tokens=5), "finished within"),
        (lambda: constrain.generate(MODEL, ["a" * 128], constrain.choose(["b"])), "context of 128"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
