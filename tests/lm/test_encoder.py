"""Sentences to vectors: those of transformers, whatever the batch."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import files, lm
from jaxml.lm import encoder, zoo

TEXTS = ["The capital of France is Paris.", "Berlin lies in Germany", "A cat sat on the mat. " * 60, "x"]


@pytest.fixture(scope="module")
def minilm():
    try:
        return encoder.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the extra 'oracle' is not installed")
@pytest.mark.filterwarnings("ignore")
def test_vectors_are_those_of_transformers(minilm):
    import torch
    import transformers

    folder = zoo.find("minilm").parent
    model, tokenizer = (of.from_pretrained(folder) for of in (transformers.AutoModel, transformers.AutoTokenizer))
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    there = batch["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((hidden * there).sum(1) / there.sum(1), dim=-1).numpy()
    np.testing.assert_allclose(minilm(TEXTS), want, atol=1e-5)


def test_neighbours_in_the_batch_change_nothing(minilm):
    together, alone = minilm(TEXTS[:2]), jnp.concatenate([minilm([t]) for t in TEXTS[:2]])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(together, axis=1), 1.0, atol=1e-5)


def test_batches_of_any_size_give_the_same(minilm):
    texts = [" ".join(TEXTS[i % len(TEXTS)].split()[: 1 + i % 40]) for i in range(30)] * 9  # 270: many widths
    want = minilm(texts)
    np.testing.assert_allclose(minilm(texts, batch_size=100), want, atol=1e-5)
    np.testing.assert_allclose(minilm(texts[:7]), want[:7], atol=1e-5)


def test_what_is_no_such_encoder_is_refused(minilm, tmp_path):
    with pytest.raises(ValueError, match=r"lm\.encoder\.load"):
        lm.load("minilm")
    with pytest.raises(ValueError, match=r"Read it with lm\.load"):
        encoder.load("smollm2-135m")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        encoder.load("nowhere")
    with pytest.raises(ValueError, match="at least one text"):
        minilm("one")
    about = files.read_json(zoo.find("minilm").parent / "config.json")
    for key, value in (("model_type", "roberta"), ("hidden_act", "relu")):
        (tmp_path / "config.json").write_text(json.dumps(about | {key: value}))
        with pytest.raises(ValueError, match=f"{key}.*{value}"):
            encoder.read_config(tmp_path)
