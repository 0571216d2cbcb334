"""Prompts that are trained: exact against the text that they stand for, and nothing else moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import lm, quant, tune
from jaxml.lm import decoder, hf
from jaxml.lm.score import score_trees
from jaxml.lm.tree import Node
from jaxml.testing import tiny_model
from jaxml.tune import adapters, data, prompt
from tests.golden.make import reference_model
from tests.lm.test_families import write_folder
from tests.tune.test_peft import moved, needs_oracle

TEXT = "you are a bot. "
ROWS = np.random.default_rng(0).integers(3, 64, (2, 9)).astype(np.int32)
KINDS = {
    "soft": lambda m, **o: prompt.soft(m, start="text", text=TEXT, **o),
    "prefix": lambda m, **o: prompt.prefix(m, start="text", text=TEXT, **o),
    "projected": lambda m, **o: prompt.prefix(m, start="text", text=TEXT, hidden_dim=5, **o),
}
EVERY = {
    **KINDS,
    "multitask": lambda m, **o: prompt.soft(m, length=4, start="random", rank=2, **o),
}


SLOW = {"projected", "multitask"}
EACH = [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in EVERY]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["plain", "local", "gemma", "nf4"])
def test_a_prompt_from_a_text_gives_exactly_the_logits_after_that_text(kind, family):
    fields = {
        "plain": {},
        "nf4": {},
        "local": dict(window=6, local_layers=(0, 2), num_layers=3, local_rope_theta=50.0),
        "gemma": dict(embed_scale=5.5, logits_soft_cap=9.0, attention_soft_cap=7.0),
    }[family]
    model = tiny_model(**fields)
    if family == "nf4":
        model = model.replace(params=quant.quantize_params(model.params, "nf4"))
    text = jnp.array(model.tokenizer.encode(TEXT, bos=kind != "soft"))[None]
    whole = decoder.apply(model.params, model.config, jnp.concatenate([jnp.repeat(text, 2, 0), ROWS], 1))
    tuned = KINDS[kind](model)
    for params in (tuned.params, decoder.unstack(tuned.params)):
        got = decoder.apply(params, model.config, ROWS)
        np.testing.assert_allclose(got, whole[:, text.shape[1] :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", EACH)
def test_packed_rows_generation_and_scores_see_the_prompt(kind):
    model = tiny_model()
    tuned = EVERY[kind](model)
    tuned = tuned.replace(params=moved(tuned.params))
    alone = [decoder.apply(tuned.params, model.config, ROWS[i : i + 1, :n]) for i, n in ((0, 4), (1, 5))]
    row = jnp.concatenate([ROWS[0, :4], ROWS[1, :5]])[None]
    packed = decoder.apply(
        tuned.params, model.config, row,
        positions=jnp.array([[*range(4), *range(5)]]), segment_ids=jnp.array([[1] * 4 + [2] * 5]),
    )  # fmt: skip
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=1e-4)

    greedy = lm.generate(tuned, ["a b", "who is it"], max_new_tokens=3)
    ids = model.tokenizer.encode("a b", bos=True)
    for _ in range(3):
        ids.append(int(decoder.apply(tuned.params, model.config, jnp.array([ids]))[0, -1].argmax()))
    assert model.tokenizer.decode(ids[-3:]).startswith(greedy[0])
    assert lm.generate(tuned, ["a b", "who is it"], max_new_tokens=3, padding="left") == greedy

    logs = jax.nn.log_softmax(decoder.apply(tuned.params, model.config, ROWS[:1, :4]))
    scored = score_trees(tuned, [Node(ROWS[0, :2].tolist(), [Node(ROWS[0, 2:4].tolist(), scored=True)])])[0][0]
    np.testing.assert_allclose(scored, [logs[0, 1, ROWS[0, 2]], logs[0, 2, ROWS[0, 3]]], atol=1e-4)


@pytest.mark.parametrize(
    "kind, quantised",
    [
        ("soft", False),
        ("prefix", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("projected", False), ("multitask", False), ("prefix", False), ("soft", True),
        )),
    ],
)  # fmt: skip
def test_gradients_reach_only_the_prompt_and_training_lowers_the_loss(kind, quantised):
    model = tiny_model()
    if quantised:
        model = model.replace(params=quant.quantize_params(model.params, "nf4"))
    tuned = EVERY[kind](model)
    trainable, _ = adapters.split(tuned.params)
    assert set(trainable) == {"prefix"}
    examples = [{"prompt": "who? ", "response": "me"}, {"prompt": "what? ", "response": "it"}]
    options = tune.Options(steps=12, batch_size=1, length=32, learning_rate=0.1, schedule="constant", warmup=0)
    after, _ = tune.fit(tuned, examples, options, eval_examples=examples, progress=False)
    before = -lm.score(tuned, [e["prompt"] for e in examples], [e["response"] for e in examples]).mean()
    now = -lm.score(after, [e["prompt"] for e in examples], [e["response"] for e in examples]).mean()
    assert now < before
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, adapters.detach(after.params), model.params)


@pytest.mark.slow
def test_the_gradient_of_a_soft_prompt_is_the_definition_s():
    model = tiny_model()
    tuned = prompt.soft(model, length=5, start="random")

    def ours(rows):
        node = prompt.SoftPrompt(rows)
        return decoder.apply(model.params | {"prefix": node}, model.config, ROWS).sum()

    def definition(rows):  # the vectors laid before the tokens' own, and one ordinary pass
        words = decoder.embed(model.params, model.config, jnp.asarray(ROWS))
        x = jnp.concatenate([jnp.repeat(rows, 2, 0), words], 1)
        x, _ = decoder._layers(model.params, model.config, x, jnp.arange(14)[None], {}, None, None)
        x = decoder._norm(x, model.params["norm"], model.config)
        return decoder.logits(model.params, model.config, x)[:, 5:].sum()

    rows = tuned.params["prefix"].rows
    np.testing.assert_allclose(jax.grad(ours)(rows), jax.grad(definition)(rows), rtol=2e-3, atol=2e-3)
    remat = jax.grad(lambda r: decoder.apply(
        model.params | {"prefix": prompt.SoftPrompt(r)}, model.config, ROWS, remat=True).sum())  # fmt: skip
    np.testing.assert_allclose(remat(rows), jax.grad(ours)(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [prompt.soft, pytest.param(prompt.prefix, marks=pytest.mark.slow)])
def test_each_row_of_a_batch_takes_its_own_prompt(make):
    model = tiny_model()
    tuned = [make(model, k, length=4, start="random") for k in range(3)]
    stacked = prompt.stack([m.params for m in tuned])
    chosen = adapters.select(stacked, jnp.array([2, 0]))
    got = jax.jit(decoder.apply, static_argnums=1)(chosen, model.config, ROWS)
    for row, number in ((0, 2), (1, 0)):
        want = decoder.apply(tuned[number].params, model.config, ROWS[row : row + 1])
        np.testing.assert_allclose(got[row : row + 1], want, atol=1e-4)
    one = prompt.take(stacked, 1)
    np.testing.assert_allclose(
        decoder.apply(one, model.config, ROWS), decoder.apply(tuned[1].params, model.config, ROWS), atol=1e-4
    )
    many = model.replace(params=adapters.select(stacked, jnp.array([2, 0, 1, 1])))
    texts = ["a", "a longer one", "who", "b"]
    each = [lm.generate(tuned[i], t, max_new_tokens=4)[0] for i, t in zip((2, 0, 1, 1), texts)]
    assert lm.generate(many, texts, max_new_tokens=4, batch_size=3) == each
    want = [lm.score(tuned[i], [t], ["x"])[0] for i, t in zip((2, 0, 1, 1), texts)]
    np.testing.assert_allclose(lm.score(many, texts, ["x"] * 4, batch_size=3), want, atol=1e-4)
    with pytest.raises(ValueError, match=r"0 … 2"):
        adapters.select(stacked, jnp.array([-1, 0]))
    with pytest.raises(ValueError, match="which of them each row takes is not said"):
        decoder.apply(stacked, model.config, ROWS)


def test_tasks_share_a_prompt_and_learn_their_own_factors():
    model = tiny_model()
    tuned = prompt.soft(model, length=4, start="random", count=2, rank=4)
    examples = [
        {"prompt": "who? ", "response": "me", "task": 0},
        {"prompt": "who? ", "response": "it", "task": 1},
    ]
    options = tune.Options(steps=100, batch_size=2, length=16, learning_rate=0.1, warmup=0)
    after, _ = tune.fit(tuned, examples, options, progress=False)
    assert lm.generate(after.replace(params=prompt.take(after.params, 0)), "who? ", max_new_tokens=2) == ["me"]
    assert lm.generate(after.replace(params=prompt.take(after.params, 1)), "who? ", max_new_tokens=2) == ["it"]
    for wrong in ({"text": "x"}, {"text": "x", "task": 2}, {"text": "x", "task": "a"}):
        with pytest.raises(ValueError, match=r"task is a number in 0 … 1, got"):
            tune.fit(tuned, [examples[0], wrong], options, progress=False)
    with pytest.raises(ValueError, match="anchors are for one prompt"):
        tune.fit(tuned, examples, options, anchors=[{"text": "x"}], progress=False)
    assert (
        data.prepare([{"text": "x", "task": "of somebody's"}], model.tokenizer, length=4, batch_size=1).per_epoch == 1
    )


def test_a_run_with_a_prompt_is_resumed_to_the_same_bits(tmp_path):
    examples = [{"prompt": "who? ", "response": "me"}, {"prompt": "what? ", "response": "it"}]
    options = lambda steps: tune.Options(steps=6, batch_size=1, length=16, learning_rate=0.05, save_every=3)
    start = prompt.soft(tiny_model(), length=3)
    whole, _ = tune.fit(start, examples, options(6), folder=tmp_path / "a", progress=False)
    again, _ = tune.fit(start, examples, options(6), folder=tmp_path / "a", progress=False)
    np.testing.assert_array_equal(whole.params["prefix"].rows, again.params["prefix"].rows)


@pytest.mark.parametrize("kind", EVERY)
def test_a_folder_reads_back_to_the_same_prompt(kind, tmp_path):
    model = tiny_model()
    params = moved(EVERY[kind](model).params)
    adapters.save_peft(tmp_path / "a", params, model.config)
    again = adapters.load_peft(tmp_path / "a", model.params, model.config)
    ours, theirs = (decoder.apply(p, model.config, ROWS) for p in (params, again))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["smollm2", pytest.param("gemma2", marks=pytest.mark.slow), "qwen3"])
@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_the_real_peft_loads_what_we_write_and_we_what_it_writes(kind, family, tmp_path):
    import peft
    import torch

    folder = write_folder(tmp_path / "model", family)
    params, config = hf.read(folder)
    model, tokens = tiny_model().replace(params=params, config=config), ROWS
    make = dict(soft=prompt.soft, prefix=prompt.prefix)[kind]
    tuned = make(model, length=4, start="random")
    params = moved(tuned.params)
    adapters.save_peft(tmp_path / "ours", params, model.config)
    theirs = peft.PeftModel.from_pretrained(reference_model(family), tmp_path / "ours")
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.ones(tokens.shape)).logits.float().numpy()
    want = want[:, -tokens.shape[1] :]
    got = decoder.apply(params, model.config, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))

    theirs.save_pretrained(tmp_path / "theirs")
    again = adapters.load_peft(tmp_path / "theirs", model.params, model.config)
    np.testing.assert_allclose(decoder.apply(again, model.config, tokens), got, atol=1e-5)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
def test_the_real_peft_gives_each_task_the_prompt_that_we_give_it(tmp_path):
    import peft
    import torch

    params, config = hf.read(write_folder(tmp_path / "model", "smollm2"))
    model = tiny_model().replace(params=params, config=config)
    tuned = moved(prompt.soft(model, length=4, start="random", count=3, rank=2).params)
    adapters.save_peft(tmp_path / "ours", tuned, config)
    theirs = peft.PeftModel.from_pretrained(reference_model("smollm2"), tmp_path / "ours")
    ids = torch.tensor([2, 0])
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(ROWS), attention_mask=torch.ones(ROWS.shape), task_ids=ids
        ).logits.float().numpy()[:, -ROWS.shape[1] :]  # fmt: skip
    got = decoder.apply(adapters.select(tuned, jnp.array([2, 0])), config, ROWS)
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))


def test_what_cannot_be_is_said(tmp_path):
    model = tiny_model()
    tuned = prompt.soft(model, length=3)
    for call, words in (
        (lambda: prompt.soft(model, start="nice"), "start is one of"),
        (lambda: prompt.soft(model, start="text"), "at least one token"),
        (lambda: prompt.soft(model, start="labels", labels=["yes", ""]), "at least one token each"),
        (lambda: prompt.soft(model, length=128), "leaves room in the context of 128"),
        (lambda: prompt.soft(tuned, length=3), "has a prompt in front already"),
        (lambda: prompt.prefix(model, start="common"), "start is one of"),
        (lambda: prompt.prefix(model, start="text", text=""), "at least one token"),
        (lambda: prompt.prefix(model, hidden_dim=0), "hidden_dim is at least 1"),
        (lambda: prompt.take(model.params, 0), "have a prompt in front, got none"),
        (lambda: prompt.stack([tuned.params, prompt.soft(model, length=4).params]), "one kind and length"),
        (lambda: adapters.merge(tuned.params), "cannot be merged"),
        (lambda: lm.save(tuned, tmp_path / "x"), "prefix is a SoftPrompt"),
        (lambda: adapters.save_peft(tmp_path / "y", prompt.soft(model, length=3, count=2).params, model.config),
         "one prompt, got 2"),
        (lambda: adapters.save_peft(
            tmp_path / "z", adapters.attach(tuned.params, jax.random.key(0), targets=["q"]), model.config),
         "Save them apart"),
        (lambda: lm.generate(tuned, ["a" * 126], max_new_tokens=4), "context of 128 tokens"),
        (lambda: lm.score(tuned, ["a" * 125], ["b"]), "context of 128 tokens, got 129"),
        (lambda: tune.fit(tuned, [{"text": "a"}], tune.Options(length=126)), "got 126 and 3 of a prompt"),
        (lambda: prompt.harden(tuned, [{"text": "a"}], start=[0, 1]), "is tokenised to start"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    model = tiny_model()
    adapters.save_peft(tmp_path / "a", prompt.soft(model, length=3).params, model.config)
    other = tiny_model(width=16, num_heads=2, num_kv_heads=1)
    with pytest.raises(ValueError, match=r"\[places, 16\], got \[3, 32\]"):
        adapters.load_peft(tmp_path / "a", other.params, other.config)
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        adapters.load_peft(tmp_path / "a", model.params, model.config)


def test_starts_are_what_they_say():
    model = tiny_model()
    table = model.params["embed"]
    words = prompt.soft(model, start="text", text="ab", length=5).params["prefix"].rows[0]
    a, b = (table[model.tokenizer.encode(c)[0]] for c in "ab")
    np.testing.assert_array_equal(words, jnp.stack([a, b, a, b, a]))
    labels = prompt.soft(model, start="labels", labels=["ab", "c"], length=3).params["prefix"].rows[0]
    np.testing.assert_allclose(labels[0], (a + b) / 2, rtol=1e-6)
    counted = prompt.soft(model, start="common", corpus=["aab"], common=1, length=2).params["prefix"].rows[0]
    np.testing.assert_array_equal(counted, jnp.stack([a, a]))
    random = prompt.soft(model, start="random", length=50).params["prefix"].rows
    assert float(jnp.abs(random).max()) <= 0.5 and float(random.std()) > 0.25
    two = prompt.soft(model, start="random", count=2).params["prefix"].rows
    assert float(jnp.abs(two[0] - two[1]).max()) > 0.1


def test_an_ensemble_votes_by_probability_or_by_majority():
    logs = np.log([[[0.6, 0.4]], [[0.6, 0.4]], [[0.05, 0.95]]])
    assert prompt.vote(logs).argmax() == 1 and prompt.vote(logs, "majority").argmax() == 0
    with pytest.raises(ValueError, match="mean or majority"):
        prompt.vote(logs, "most")


@pytest.mark.slow
def test_words_come_nearer_to_the_trained_prompt_step_by_step():
    model = tiny_model()
    examples = [{"prompt": "who? ", "response": "me"}, {"prompt": "what? ", "response": "it"}]
    options = tune.Options(steps=40, batch_size=1, length=32, learning_rate=0.3, warmup=0)
    tuned, _ = tune.fit(prompt.soft(model, length=4), examples, options, progress=False)
    told = []
    found = prompt.harden(
        tuned, examples, steps=6, candidates=12, top_k=16, length=32, batch_size=1, on_step=lambda *s: told.append(s)
    )
    assert len(found.ids) == 4 and model.tokenizer.encode(found.text) == found.ids
    assert found.history == sorted(found.history, reverse=True) and found.history[-1] == found.loss
    assert found.loss < found.projected_loss and found.gap == found.loss - found.soft_loss
    assert [step for step, _ in told] == list(range(1, 7))
    words = lm.score(model, [found.text + e["prompt"] for e in examples], [e["response"] + "</s>" for e in examples])
    assert -words.sum() / 6 == pytest.approx(found.loss, abs=2e-2)
    again = prompt.harden(tuned, examples, steps=1, candidates=4, length=32, batch_size=1, start=found.ids)
    assert again.history[0] == pytest.approx(found.loss, rel=1e-4)


def test_the_nearest_tokens_of_embeddings_are_their_own():
    model = tiny_model()
    ids = model.tokenizer.encode("abc 9")
    assert prompt.nearest(model, model.params["embed"][jnp.array(ids)] * 3.0) == ids
    assert prompt.nearest(model, model.params["embed"][jnp.array([1])])[0] > 2  # no special token
    with pytest.raises(ValueError, match="one soft prompt is in front"):
        prompt.harden(prompt.prefix(model), [{"text": "a"}])


def test_a_model_in_the_place_of_its_parameters_is_told():
    model = prompt.soft(tiny_model(), length=3)
    for take in (prompt.settle, lambda m: prompt.stack([m])):
        with pytest.raises(TypeError, match=r"got Model. Of a model give model.params"):
            take(model)
