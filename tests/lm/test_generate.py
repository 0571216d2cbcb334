import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxml import lm
from jaxml.lm import cache as caches
from jaxml.lm import decoder
from jaxml.lm.generate import common, decode, encode_prompt, pad, prefill, row_keys, start
from jaxml.lm.sampling import Sampling, filter_logits, sample
from jaxml.testing import tiny_model

PROMPTS = ["hello", "a longer prompt than that", "x"]


def greedy_without_cache(model, prompt, n):
    ids = model.tokenizer.encode(prompt, bos=True)
    start = len(ids)
    forward = jax.jit(decoder.apply, static_argnums=1)
    for _ in range(n):
        padded = np.array([ids + [0] * (64 - len(ids))])  # causality hides what follows
        token = int(jnp.argmax(forward(model.params, model.config, padded)[0, len(ids) - 1]))
        if token in model.config.eos_ids:
            break
        ids.append(token)
    return model.tokenizer.decode(ids[start:])


def test_greedy_text_is_equal_with_and_without_cache_batched_and_alone_padded_left_and_right():
    model = tiny_model()
    expected = [greedy_without_cache(model, p, 12) for p in PROMPTS]
    assert len(set(expected)) > 1
    for padding in ("right", "left"):
        assert lm.generate(model, PROMPTS, max_new_tokens=12, padding=padding) == expected
    assert [lm.generate(model, p, max_new_tokens=12)[0] for p in PROMPTS] == expected
    assert lm.generate(model, PROMPTS, max_new_tokens=12, batch_size=2) == expected
    assert lm.generate(model, PROMPTS, max_new_tokens=12, unroll=True) == expected


def test_a_sampled_row_does_not_depend_on_its_neighbours():
    model, how = tiny_model(), Sampling(temperature=1.0, top_p=0.95)
    keys = jax.random.split(jax.random.key(7), 3)
    together = lm.generate(model, PROMPTS, max_new_tokens=10, sampling=how, keys=keys)
    alone = [
        lm.generate(model, p, max_new_tokens=10, sampling=how, keys=keys[i : i + 1])[0] for i, p in enumerate(PROMPTS)
    ]
    assert together == alone
    assert lm.generate(model, PROMPTS, max_new_tokens=10, sampling=how, key=1) != together


def test_a_stop_string_ends_the_text_before_it_and_streaming_shows_the_same():
    model = tiny_model()
    whole = lm.generate(model, "hello", max_new_tokens=24)[0]
    stop = whole[5:7]
    cut = whole[: whole.find(stop)]
    assert lm.generate(model, "hello", max_new_tokens=24, stop=[stop]) == [cut]
    pieces = []
    lm.generate(model, "hello", max_new_tokens=24, stop=[stop], on_text=lambda row, text: pieces.append(text))
    assert "".join(pieces) == cut


def test_decoding_goes_on_where_it_stopped():
    model = tiny_model()
    tokens, positions = pad([model.tokenizer.encode("hello")], to=8)

    def begin():
        logits, cache = prefill(model.params, model.config, tokens, positions, caches.init(model.config, 1, 32))
        return start(logits, cache, tokens, positions, jax.random.split(jax.random.key(0), 1), Sampling())

    whole, _ = decode(model.params, model.config, begin(), steps=8)
    first, state = decode(model.params, model.config, begin(), steps=3)
    second, _ = decode(model.params, model.config, state, steps=5)
    assert np.concatenate([first, second], 1).tolist() == whole.tolist()


def test_repetition_penalty_changes_greedy_text_away_from_loops():
    model = tiny_model()
    plain = lm.generate(model, "hello", max_new_tokens=30)[0]
    punished = lm.generate(model, "hello", max_new_tokens=30, sampling=Sampling(repetition_penalty=5.0))[0]
    assert len(set(punished)) > len(set(plain))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 20), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.integers(0, 1000))
def test_filters_keep_the_most_likely_and_what_they_promise(top_k, top_p, min_p, seed):
    logits = jax.random.normal(jax.random.key(seed), (3, 20)) * 3
    kept = np.asarray(filter_logits(logits, Sampling(1.0, top_k, top_p, min_p))) > -np.inf
    p = np.asarray(jax.nn.softmax(logits, -1))
    assert kept[np.arange(3), p.argmax(-1)].all()
    assert top_k == 0 or (kept.sum(-1) <= top_k).all()
    for row, keep in zip(p, kept):
        assert not keep.any() or row[keep].min() >= row[~keep].max(initial=0)
        assert min_p == 0 or row[keep].min() >= min_p * row.max() * (1 - 1e-5)
    if top_k == 0 and min_p == 0:
        for row, keep in zip(p, kept):  # the smallest set that reaches top_p
            assert row[keep].sum() >= top_p - 1e-5
            assert row[keep].sum() - row[keep].min() < top_p + 1e-5


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = sample(jnp.repeat(logits, 4000, 0), Sampling(temperature=1.0), keys)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, [0.6, 0.3, 0.1], atol=0.03)


@pytest.mark.parametrize("fields", [dict(temperature=-1), dict(top_p=0), dict(min_p=1), dict(top_k=-1)])
def test_sampling_out_of_range_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)


def test_a_prompt_longer_than_the_context_and_an_empty_one_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="context of 128"):
        lm.generate(model, "a" * 200)
    with pytest.raises(ValueError, match="empty"):
        lm.generate(model, "")


def test_score_sums_the_log_likelihood_of_the_continuation():
    model = tiny_model()
    prompts, continuations = ["hello", "a much longer one"], [" you", "x"]
    scores = lm.score(model, prompts, continuations)
    for s, p, c in zip(scores, prompts, continuations):
        ids = model.tokenizer.encode(p) + model.tokenizer.encode(c)
        log_probs = jax.nn.log_softmax(decoder.apply(model.params, model.config, np.array([ids]))[0])
        n = len(model.tokenizer.encode(c))
        expected = sum(float(log_probs[t - 1, ids[t]]) for t in range(len(ids) - n, len(ids)))
        np.testing.assert_allclose(s, expected, rtol=1e-4)
    np.testing.assert_allclose(lm.score(model, prompts * 3, continuations * 3, batch_size=4), [*scores] * 3, rtol=1e-5)
    with pytest.raises(ValueError, match="equal length"):
        lm.score(model, prompts, ["x"])
    with pytest.raises(ValueError, match="empty"):
        lm.score(model, ["a"], [""])


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = tiny_model()
    flat = model.replace(params=dict(model.params, embed=jnp.zeros_like(model.params["embed"])))
    np.testing.assert_allclose(lm.perplexity(flat, "any text at all", window=8), 64.0, rtol=1e-5)


def test_smollm2_answers(smollm2):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answers = lm.generate(smollm2, [question, [{"role": "user", "content": "Say hello."}]], max_new_tokens=12)
    assert answers[0] == "The capital of France is Paris."
    scores = lm.score(smollm2, ["The capital of France is"] * 2, [" Paris", " Rome"])
    assert scores[0] > scores[1] + 3


@pytest.mark.slow
def test_smollm2_greedy_text_is_equal_with_and_without_cache_batched_and_alone(smollm2):
    prompts = ["Once upon a time", "The three primary colours are red,"]
    expected = [greedy_without_cache(smollm2, p, 8) for p in prompts]
    assert lm.generate(smollm2, prompts, max_new_tokens=8) == expected
    assert [lm.generate(smollm2, p, max_new_tokens=8)[0] for p in prompts] == expected


def test_what_all_prompts_begin_with_is_read_once_and_changes_nothing():
    model, shown = tiny_model(), "a and b, c and d, e and f, g and h, "
    prompts = [shown + rest for rest in ("who? ", "i and ", "what is it? ")]
    rows = [encode_prompt(model, prompt) for prompt in prompts]
    assert common(rows) >= len(shown) and common([rows[0], rows[0][10:]]) == 0
    for sampling in (lm.Sampling(), lm.Sampling(temperature=1.0, repetition_penalty=1.3)):
        keys = row_keys(0, 3)
        alone = [
            lm.generate(model, prompt, max_new_tokens=6, sampling=sampling, keys=keys[i : i + 1])[0]
            for i, prompt in enumerate(prompts)
        ]
        for padding in ("left", "right"):
            assert lm.generate(model, prompts, max_new_tokens=6, sampling=sampling, key=0, padding=padding) == alone


def test_fewer_tokens_than_none_are_refused():
    with pytest.raises(ValueError, match="max_new_tokens is at least 0, got -3"):
        lm.generate(tiny_model(), "the fox", max_new_tokens=-3)
