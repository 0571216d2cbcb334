"""Readers on files that are damaged or made to harm; many more by benchmarks/fuzz.py."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxml import files
from jaxml.lm import sandbox
from jaxml.lm.config import DecoderConfig
from jaxml.testing import tiny_config, tiny_tokenizer
from jaxml.tune import data

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


def load():
    spec = importlib.util.spec_from_file_location("benchmark_fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = load()
NAMES = [reader.__name__ for reader in FUZZ.READERS]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_gives_a_value_or_a_sentence(name, tmp_path):
    found = FUZZ.run(name, files=400, seed=1, kept=tmp_path)
    assert found["failures"] == [] and found["read"] + found["refused"] == 400
    assert found["refused"] > 40 and found["slowest_s"] < FUZZ.SECONDS


def test_what_a_reader_should_not_do_is_noticed(tmp_path, monkeypatch):
    def broken(folder):
        (folder / "a.json").write_text('{"a": [1, 2, 3]}')
        return [folder / "a.json"], lambda at: len(json.loads((at / "a.json").read_text())["a"])

    monkeypatch.setattr(FUZZ, "READERS", (broken,))
    monkeypatch.setattr(FUZZ, "_limit", lambda: None)
    found = FUZZ.attack("broken", 300, 0, tmp_path)
    kinds = {failure["what"].split(":")[0] for failure in found["failures"]}
    assert {"KeyError", "TypeError"} <= kinds and found["read"] > 0
    assert (tmp_path / found["failures"][0]["file"]).is_file()


def test_spoiled_files_are_the_same_each_time():
    content = json.dumps({"a": [1, {"b": None}], "c": "text"}).encode()
    make = lambda: [FUZZ.spoiled(Path("x.json"), content, [content], random.Random(i)) for i in range(200)]
    assert make() == make() and len(set(make())) > 150


# ---- values of every kind ----------------------------------------------------------------------------

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
EXAMPLE = st.fixed_dictionaries({}, optional=dict.fromkeys(("text", "prompt", "response", "messages", "parts"), ANY))


@settings(max_examples=300, deadline=None)
@given(ANY | EXAMPLE)
def test_an_example_is_encoded_or_refused(example):
    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    try:
        data.prepare([example], tokenizer, length=64, batch_size=1)(0)
    except ValueError as error:
        assert str(error)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(tiny_config().to_hf())), ANY)
def test_a_configuration_is_read_or_refused(key, value):
    try:
        with files.reading("config.json", "a decoder"):
            config = DecoderConfig.from_hf(tiny_config().to_hf() | {key: value})
    except ValueError as error:
        assert str(error)
    else:
        assert config.num_layers <= 10_000


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_json_is_a_value_or_a_sentence(content):
    try:
        files.json_of(content, "here")
    except ValueError as error:
        assert str(error).startswith("here: not JSON")


def test_json_that_is_nested_too_deeply_is_a_sentence():
    with pytest.raises(ValueError, match="nested too deeply"):
        files.json_of("[" * 100_000, "here")


def test_files_that_are_too_large_are_not_read(tmp_path):
    (tmp_path / "a.json").write_text("[" + " " * 100 + "]")
    with pytest.raises(ValueError, match="at most 50 bytes, got 102"):
        files.read_bytes(tmp_path / "a.json", most=50)
    with pytest.raises(ValueError, match="holds a JSON object, got list"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.read_json(tmp_path / "b.json")
    (tmp_path / "lines.jsonl").write_text('{"text": "' + "a" * 200 + '"}')
    limit, data.LINE_BYTES = data.LINE_BYTES, 100
    try:
        with pytest.raises(ValueError, match="line 1: a line has at most 100 bytes"):
            data.read_jsonl(tmp_path / "lines.jsonl")
    finally:
        data.LINE_BYTES = limit


# ---- templates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**9 }}",
        "{{ ['a'] * 10**9 }}",
        "{{ 7 ** (7 ** 7) }}",
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'|indent(10**9) }}",
        "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
        "{{ ('b' * 10**6).join(['a'] * 10**6) }}",
        "{{ (['a'] * 10**6)|join('b' * 10**6) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{% if %}",
    ],
)
def test_a_template_that_means_harm_is_a_sentence(template):
    with pytest.raises(ValueError, match="the model's chat template"):
        sandbox.render(template, messages=[{"role": "user", "content": "hi"}])


def test_a_template_says_what_it_said_before():
    template = (
        "{% for m in messages if m.role == 'user' %}{{ loop.index ~ ': ' ~ m['content'] | trim }}"
        "{{ ' ' + m.content | upper + '\n' }}{% else %}none{% endfor %}{{ messages | tojson(indent=1) | length > 9 }}"
        "{% macro f(x) %}<{{ x | replace('i', 'o') }}>{% endmacro %}"
        "{{ f('hi') }}{{ ['a', 'b'] | join('-') }}{{ 2 ** 3 }}"
    )
    assert sandbox.render(template, messages=[{"role": "user", "content": " hi "}]) == "1: hi  HI \nTrue<ho>a-b8"
