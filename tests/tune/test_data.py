import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxml.testing import tiny_model
from jaxml.tune import data

TOKENIZER = tiny_model().tokenizer
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "you"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "me"},
]


def learnt(example, **options):
    tokens, learn = data.encode(example, TOKENIZER, **options)
    return TOKENIZER.decode([t for t, counts in zip(tokens, learn) if counts], skip_special=False)


def test_only_responses_are_learnt_unless_asked():
    assert learnt({"prompt": "hi ", "response": "you"}) == "you</s>"
    assert learnt({"prompt": "hi ", "response": "you"}, learn_all=True) == "hi you</s>"
    assert learnt({"text": "abc"}) == "abc</s>"
    assert learnt({"messages": TURNS}) == "you</s>me</s>"


def test_a_chat_is_tokenised_as_its_template_renders_it():
    tokens, _ = data.encode({"messages": TURNS}, TOKENIZER)
    expected = "<user>hi</s><assistant>you</s><user>and</s><assistant>me</s>"
    assert TOKENIZER.decode(tokens, skip_special=False) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 64))
def test_packing_keeps_every_example_whole_and_once(lengths, row):
    examples = [data.Encoded(list(range(100 * i, 100 * i + n)), [True] * n) for i, n in enumerate(lengths)]
    packed = data.pack(examples, row)
    found = []
    for r in range(len(packed.tokens)):
        for segment in range(1, packed.segment_ids[r].max() + 1):
            where = packed.segment_ids[r] == segment
            tokens = packed.tokens[r][where]
            found.append(tokens.tolist())
            assert packed.positions[r][where].tolist() == list(range(len(tokens)))
            assert packed.weights[r][where].tolist() == [1.0] * (len(tokens) - 1) + [0.0]
            assert packed.targets[r][where][:-1].tolist() == tokens[1:].tolist()
    assert sorted(found) == sorted(e.tokens for e in examples)
    assert (packed.weights[packed.segment_ids == 0] == 0).all()


def test_a_batch_is_a_function_of_its_step_and_an_epoch_holds_every_row_once():
    packed = data.pack([data.Encoded([i, i], [True, True]) for i in range(1, 12)], 2)
    first, again = data.Batches(packed, 4, seed=3), data.Batches(packed, 4, seed=3)
    assert first.per_epoch == 3
    for step in (7, 0, 4):
        np.testing.assert_array_equal(first(step)["tokens"], again(step)["tokens"])
    rows = np.concatenate([first(s)["tokens"][:, 0] for s in range(3)])
    assert sorted(rows) == [0, *range(1, 12)]  # one empty row fills the last batch
    assert rows.tolist() != np.concatenate([first(s)["tokens"][:, 0] for s in range(3, 6)]).tolist()


def test_a_wrong_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "d.jsonl"
    for lines, word in (
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "a"}\n\n{"txt": "a"}\n', "line 3.*keys txt"),
        ('{"prompt": "a", "response": ""}', "line 1.*not empty"),
        ('{"prompt": 3, "response": "b"}', "int"),
        ("[1]", "line 1.*list"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "assistant"),
        ("\n\n", "empty file"),
        ("", "empty file"),
    ):
        path.write_text(lines)
        with pytest.raises(ValueError, match=word):
            data.read_jsonl(path)
    path.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ValueError, match="line 1"):
        data.read_jsonl(path)
    with pytest.raises(FileNotFoundError):
        data.read_jsonl(tmp_path / "none.jsonl")


def test_an_example_longer_than_a_row_is_refused_not_cut():
    with pytest.raises(ValueError, match="got one of 9"):
        data.pack([data.Encoded([1] * 9, [True] * 9)], 8)


def test_an_example_has_one_form():
    with pytest.raises(ValueError, match="one form, got text as well as prompt and response"):
        data.check({"text": "a", "prompt": "b", "response": "c"})
    data.check(
        {"prompt": "a title", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )


def test_what_is_too_long_is_told_by_its_number(tmp_path):
    examples = [{"text": "a"}, {"text": "b" * 40}, {"text": "c" * 50}]
    with pytest.raises(ValueError, match=r"got \d+ in example 2 \(blank lines do not count\), and 1 more"):
        data.prepare(examples, TOKENIZER, length=16, batch_size=1)
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        data.read_jsonl(tmp_path)
