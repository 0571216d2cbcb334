"""Readers on files that are damaged or made to harm; many more by benchmarks/fuzz.py."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxml import files, lm
from jaxml.lm import sandbox
from jaxml.lm.config import DecoderConfig
from jaxml.prompts.store import Store
from jaxml.testing import tiny_config, tiny_model, tiny_tokenizer
from jaxml.tune import data
from tests.scripts import load

FUZZ = load(Path(__file__).parents[1] / "benchmarks" / "fuzz.py")
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
        "{% set _tick = dict %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% block a %}{{ self.b() }}{{ self.b() }}{% endblock %}{% block b %}{% endblock %}",
        "{% macro f(a, a) %}{% endmacro %}",
        "{{ [1] | slice(10000000000) | list }}",
        "{{ 1 | round(20000000, 'ceil') }}",
        "{{ [1] | tojson(indent=2000000000) }}",
        "{% set s = 'a' * 10**6 %}{% for i in range(100) %}{{ s }}{% endfor %}",
        "{% set a = 'aaaaaaaa' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
        "{% set a = ['a'] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
        "{% set a = 'a' %}" + "{% set a = {'b': a, 'c': a} %}" * 60 + "{{ a|string|length }}",
        "{% set a = 'a' %}" + "{% set a = namespace(b=a, c=a) %}" * 60 + "{{ a }}",
        "{% set a = [1] %}" + "{% set a = dict(b=a, c=a) %}" * 60 + "{{ a.items() }}",
        "{{ 'a'.encode().ljust(10**9) }}",
        "{{ (1).to_bytes(10**9, 'big') }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ ('\n' * 10**5)|indent('a' * 10**5) }}",
        "{{ ('\n' * 10**5)|indent(width=10**5) }}",
        "{{ (['a'] * 10**4)|map('replace', 'a', 'b' * 10**5)|list|length }}",
        "{% set a = 'a' * 10**6 %}{% for i in range(9999) %}{% set b %}" + "x" * 10**5 + "{% endset %}{% endfor %}",
        "{% set n = namespace(l=[], s='a' * 10**6) %}{% for i in range(9999) %}"
        "{% set n.l = n.l + [n.s[1:]] %}{% endfor %}",
        "{% set a = ['a'] * 60000 %}{% for i in range(99999) %}{{ a|sort|length }}{% endfor %}",
        "{# " + "a" * 200_000 + " #}",
        "{% macro m() %}{% set ns.a = varargs %}{% endmacro %}{% set ns = namespace(a=0) %}{% for i in range(16) %}"
        + "{{ m(ns.a) }}" * 9000
        + "{% endfor %}{% set d = {ns.a: 1} %}",
        "{{ dict.update(messages[0], role='system') }}",
        "{{ dict.clear(messages[0]) }}",
        "{{ range(7000)|map(attribute='x', default='y' * 10**6)|join|length }}",
        "{{ range(6000)|map('string')|join('x' * 10**6)|length }}",
        "{{ ('x' * 10**6).join(range(6000)|map('string'))|length }}",
        "{{ ('a' * 6000)|replace(new='x' * 10**6, old='a')|length }}",
        "{{ ('a\r' * 6000)|indent('x' * 10**6)|length }}",
        "{% autoescape true %}{{ ('&' * 6000)|replace('amp;'|safe, 'x' * 10**6)|length }}{% endautoescape %}",
        "{{ 'x'|indent(-10**12) }}" + "{% for i in range(400) %}{% set b = 'a' * 10**6 %}{% endfor %}",
        "{{ range(3000)|sort(attribute=',' * 500000)|length }}",
        "{{ range(3000)|sort(false, false, ',' * 500000)|length }}",
        "{{ range(3000)|map(attribute='a.' * 200000 ~ 'a', default=0)|list|length }}",
        "{{ ('€' * 10**6)|trim('₭' * 10**6 ~ '€')|length }}",
        "{{ ('€' * 10**6).strip('₭' * 10**6 ~ '€')|length }}",
        "{% set a0 = 1 %}{% include 'x' %}",
        "{% set x = 1e999 %}{{ x }}",
        "{% set d = dict(a=1) %}{% for k in d %}{{ d.update({k ~ 'x': 1}) }}{% endfor %}",
    ],
)
def test_a_template_that_means_harm_is_a_sentence(template):
    with pytest.raises(ValueError, match="the model's chat template"):
        sandbox.render(template, messages=[{"role": "user", "content": "hi"}])


def test_what_a_template_may_make_grows_with_what_it_is_given():
    template = (
        "{% set n = namespace(s='') %}{% for m in messages %}{% set n.s = n.s + m.content %}{% endfor %}{{ n.s }}"
    )
    messages = [{"role": "user", "content": "word " * 2000} for _ in range(300)]
    assert len(sandbox.render(template, messages=messages)) == 3_000_000


def test_a_default_may_be_a_long_text():
    text = "You are a helpful assistant who answers shortly. " * 9
    assert sandbox.render("{{ said | default('" + text + "') }}") == text


def test_loops_are_left_and_marks_of_generation_are_passed():
    template = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}"
    template += "{% generation %}{{ i }}{% endgeneration %},{% endfor %}"
    assert sandbox.render(template) == "0,2,3,"


def test_a_template_says_what_it_said_before():
    template = (
        "{% for m in messages if m.role == 'user' %}{{ loop.index ~ ': ' ~ m['content'] | trim }}"
        "{{ ' ' + m.content | upper + '\n' }}{% else %}none{% endfor %}{{ messages | tojson(indent=1) | length > 9 }}"
        "{% macro f(x) %}<{{ x | replace('i', 'o') }}>{% endmacro %}"
        "{{ f('hi') }}{{ ['a', 'b'] | join('-') }}{{ 2 ** 3 }}"
    )
    assert sandbox.render(template, messages=[{"role": "user", "content": " hi "}]) == "1: hi  HI \nTrue<ho>a-b8"


# ---- files that were made to harm --------------------------------------------------------------------


def gguf_of(key: bytes, kind: int, value: bytes) -> bytes:
    """A GGUF file of one key and no tensor."""
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    return head + len(key).to_bytes(8, "little") + key + kind.to_bytes(4, "little") + value


@pytest.mark.parametrize("item", [0, 4, 8, 9])  # bytes, numbers, texts, arrays
def test_an_array_that_is_longer_than_its_file_is_refused(item, tmp_path):
    value = item.to_bytes(4, "little") + (2**62).to_bytes(8, "little")
    (tmp_path / "a.gguf").write_bytes(gguf_of(b"x", 9, value))
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        lm.gguf.read_metadata(tmp_path / "a.gguf")


def test_more_texts_than_any_vocabulary_are_refused(tmp_path):
    value = (8).to_bytes(4, "little") + (2**20 + 1).to_bytes(8, "little") + bytes(8 * (2**20 + 1))
    (tmp_path / "a.gguf").write_bytes(gguf_of(b"x", 9, value))
    with pytest.raises(ValueError, match="1,048,577 texts, of which there are at most 1,048,576"):
        lm.gguf.read_metadata(tmp_path / "a.gguf")


def test_a_long_array_of_numbers_takes_as_much_memory_as_the_file(tmp_path):
    value = (0).to_bytes(4, "little") + (10**6).to_bytes(8, "little") + bytes(range(256)) * 3906 + bytes(64)
    (tmp_path / "a.gguf").write_bytes(gguf_of(b"x", 9, value))
    found = lm.gguf.read_metadata(tmp_path / "a.gguf")["x"]
    assert len(found) == 10**6 and list(found[:3]) == [0, 1, 2] and found[255] == 255


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("num_hidden_layers", 10**12, "num_layers is a whole number from 1 to 1,000"),
        ("rms_norm_eps", "x", "norm_eps"),
        ("rms_norm_eps", 10**400, "norm_eps"),
        ("rope_theta", -1.0, "rope_theta is a finite number above 0"),
        ("rope_theta", 1.0, "a rope_theta is above 1"),
        ("rope_scaling", {"rope_type": "linear"}, "has a factor; it is missing"),
        ("tie_word_embeddings", "false", "tied_embeddings is true or false, got 'false'"),
        (
            "rope_scaling",
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor is above low_freq_factor",
        ),
        ("eos_token_id", -1, "eos_ids are token ids from 0, got -1"),
        ("eos_token_id", [[1]], "eos_ids"),
        ("pad_token_id", 10**30, "pad_id"),
    ],
)
def test_numbers_that_no_decoder_has_are_refused(key, value, said):
    with pytest.raises(ValueError, match=said), files.reading("config.json", "a decoder"):
        DecoderConfig.from_hf(tiny_config().to_hf() | {key: value})


@pytest.mark.parametrize(
    "part, step, said",
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 16}, "characters of one"),
        ("decoder", {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 16}, "characters of one"),
        ("normalizer", {"type": "NFKC"}, "characters of one"),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 16}, "characters of one"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAGFhYWFhYQBh"}, "characters of one"),
        ("pre_tokenizer", {"type": "Whitespace"}, "at most 64 steps"),
    ],
)
def test_a_tokenizer_that_makes_very_much_of_little_is_refused(part, step, said, tmp_path):
    tiny_tokenizer().save(tmp_path)
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    inner = {"normalizer": "normalizers", "decoder": "decoders", "pre_tokenizer": "pretokenizers"}[part]
    count = 8 if part != "pre_tokenizer" else 70
    about[part] = {"type": "Sequence", inner: [{"type": "Sequence", inner: [step] * count}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=said):
        lm.tokenizer.from_folder(tmp_path)


def test_tokens_beyond_the_models_embedding_are_refused(tmp_path):
    lm.save(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    about = json.loads(path.read_text())
    about["added_tokens"].append(
        dict(id=tiny_config().vocab_size + 3, content="<far>", special=True, single_word=False, lstrip=False,
             rstrip=False, normalized=False)
    )  # fmt: skip
    path.write_text(json.dumps(about))
    made = lm.load(tmp_path / "model").tokenizer
    assert made.encode("the fox") == tiny_tokenizer().encode("the fox")
    with pytest.raises(ValueError, match=r"the model's embedding has .* rows, got '<far>'"):
        made.encode("the <far>")


def test_very_long_tokens_are_refused():
    metadata = {"model": "llama", "tokens": ["<unk>", "a" * 100_000], "scores": [0.0, 0.0]}
    with pytest.raises(ValueError, match="a token has at most 1,024 characters, got 100,000"):
        lm.tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})


def test_a_file_is_opened_as_often_as_it_is_large_and_not_for_each_tensor(tmp_path, monkeypatch):
    from jaxml.lm import hf

    model = tiny_model(num_layers=6)
    lm.save(model, tmp_path / "model", shard_bytes=20_000)
    opened, original = [], hf.open_safetensors
    monkeypatch.setattr(hf, "open_safetensors", lambda path: opened.append(path) or original(path))
    files_there = len(list((tmp_path / "model").glob("*.safetensors")))
    assert files_there > 2
    lm.load(tmp_path / "model")
    assert len(opened) == 2 * files_there
    monkeypatch.setattr(hf._Tensors, "CLOSED_AFTER", 0)
    again = lm.load(tmp_path / "model")
    assert len(opened) > 20
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("num_attention_heads", 0, "num_heads is a whole number from 1"),
        ("num_attention_heads", 3, "width is a multiple of num_heads"),
        ("layer_norm_eps", float("nan"), "norm_eps is a finite number above 0"),
        ("num_hidden_layers", 10**9, "num_layers is a whole number from 1 to 1,000"),
        ("max_position_embeddings", 1, "max_length is a whole number from 2"),
    ],
)
def test_numbers_that_no_encoder_has_are_refused(key, value, said, tmp_path):
    FUZZ.encoder(tmp_path)
    where = tmp_path / "encoder" / "config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=said):
        lm.encoder.read_config(where.parent)


def test_a_file_that_is_none_of_its_own_is_not_cut(tmp_path):
    (tmp_path / "key.txt").write_text("my only key")
    with pytest.raises(ValueError, match="is it another file"):
        Store(tmp_path / "key.txt")
    assert (tmp_path / "key.txt").read_text() == "my only key"


def test_the_lock_of_an_index_is_no_way_to_another_file(tmp_path):
    from jaxml.rag.index import _alone

    (tmp_path / "index").mkdir()
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "index" / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="a plain file of the index's own"), _alone(tmp_path / "index"):
        pass
    assert (tmp_path / "victim").read_text() == "kept"


def test_pages_with_long_headings_and_endless_tags_stay_small_and_quick(tmp_path):
    from jaxml.rag import read

    (tmp_path / "a.html").write_text("<h1>" + "t" * 200_000 + "</h1><h2>x</h2>" + "<p>a" * 2000)
    assert all(len(block.title) < 400 for block in read.read(tmp_path / "a.html"))
    (tmp_path / "b.html").write_text("<a" + "a" * 300_000)
    assert len(list(read.read(tmp_path / "b.html"))) == 1
    (tmp_path / "c.html").write_text('<meta charset="punycode"><p>a')
    with pytest.raises(ValueError, match="it is in 'punycode'"):
        list(read.read(tmp_path / "c.html"))


def test_tensors_of_whole_numbers_are_no_weights(tmp_path):
    from safetensors.numpy import load_file

    lm.save(tiny_model(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    arrays = {k: v.view(np.int32) if k == "model.norm.weight" else v for k, v in load_file(path).items()}
    lm.hf.save_safetensors(path, arrays)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds floating numbers, got int32"):
        lm.load(tmp_path / "model")


def test_a_first_token_beyond_the_embedding_is_refused():
    import dataclasses

    made = dataclasses.replace(tiny_tokenizer(), bos_id=99, add_bos=True, rows=64)
    assert made.encode("the") and max(made.encode("the")) < 64
    with pytest.raises(ValueError, match="has 64 rows, got"):
        made.encode("the", bos=True)


def test_a_padding_that_is_no_int32_is_refused():
    with pytest.raises(ValueError, match=f"ids are whole numbers .* got the padding {2**31}"):
        dataclasses.replace(tiny_tokenizer(), pad_id=2**31)


def test_many_ids_around_a_text_are_refused(tmp_path):
    tiny_tokenizer().save(tmp_path)
    about = json.loads((tmp_path / "tokenizer.json").read_text())
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    special = {"<s>": {"id": "<s>", "ids": [1] * 600, "tokens": ["<s>"] * 600}}
    about["post_processor"] = {
        "type": "TemplateProcessing", "single": [piece] * 600, "pair": [piece], "special_tokens": special,
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="puts at most 1,000 ids around a text"):
        lm.tokenizer.from_folder(tmp_path)


def test_a_file_whose_last_line_is_another_programs_is_not_cut(tmp_path):
    (tmp_path / "names.json").write_text('["important", "data"]')
    with pytest.raises(ValueError, match="is it another file"):
        Store(tmp_path / "names.json")
    assert (tmp_path / "names.json").read_text() == '["important", "data"]'
