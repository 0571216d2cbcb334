import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.lm import decoder, hf
from jaxml.testing import tiny_model, tolerance
from jaxml.tune import adapters
from tests.golden import families
from tests.golden.make import logits, reference_model
from tests.lm.test_families import write_folder

needs_oracle = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the extra 'oracle' is not installed"
)
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 9)).astype(np.int32)


def adapted(model, seed=1, **options):
    """Adapters whose B is not zero, so that they do something."""
    params = adapters.attach(model.params, jax.random.key(seed), **options)
    trainable, frozen = adapters.split(params)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    trainable = jax.tree.map(lambda a: 0.3 * jax.random.normal(next(keys), a.shape), trainable)
    return adapters.combine(trainable, frozen)


def test_a_new_adapter_changes_nothing_and_a_merged_one_computes_the_same():
    model = tiny_model()
    before = decoder.apply(model.params, model.config, TOKENS)
    fresh = adapters.attach(model.params, jax.random.key(0))
    np.testing.assert_array_equal(decoder.apply(fresh, model.config, TOKENS), before)
    params = adapted(model)
    after = decoder.apply(params, model.config, TOKENS)
    assert float(jnp.abs(after - before).max()) > 0.1
    merged = decoder.apply(adapters.merge(params), model.config, TOKENS)
    np.testing.assert_allclose(merged, after, atol=tolerance("float32", 64 * 48), rtol=1e-4)
    np.testing.assert_array_equal(decoder.apply(adapters.detach(params), model.config, TOKENS), before)


def test_only_the_factors_are_trainable_and_the_base_gets_no_gradient():
    model = tiny_model()
    trainable, frozen = adapters.split(adapted(model, targets=["q", "layers/up"]))
    assert set(trainable["layers"]) == {"q", "up"}
    assert sum(a.size for a in jax.tree.leaves(trainable)) == 2 * 8 * ((32 + 32) + (32 + 48))
    loss = lambda t: jnp.sum(decoder.apply(adapters.combine(t, frozen), model.config, TOKENS) ** 2)
    grads = jax.grad(loss)(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_scanned_and_unrolled_adapters_agree():
    model = tiny_model()
    params = adapted(model)
    unrolled = decoder.apply(decoder.unstack(params), model.config, TOKENS)
    np.testing.assert_allclose(
        decoder.apply(params, model.config, TOKENS), unrolled, atol=tolerance("float32", 64 * 48)
    )


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(targets=["nope"]), "layers/q, layers/up"),
        (dict(rank=0), "1 … 32"),
        (dict(rank=33), "1 … "),
    ],
)
def test_attach_refuses_what_matches_nothing(options, word):
    with pytest.raises(ValueError, match=word):
        adapters.attach(tiny_model().params, jax.random.key(0), **options)


def test_a_folder_reads_back_to_the_same_bits_and_never_overwrites(tmp_path):
    model = tiny_model()
    params = adapted(model, targets=["q", "down"], rank=3, alpha=5)
    adapters.save_peft(tmp_path / "a", params, model.config)
    again = adapters.load_peft(tmp_path / "a", model.params, model.config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(FileExistsError):
        adapters.save_peft(tmp_path / "a", params, model.config)
    with pytest.raises(ValueError, match="at least one LoRA"):
        adapters.save_peft(tmp_path / "b", model.params, model.config)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model, wider, deeper = tiny_model(), tiny_model(hidden_dim=64), tiny_model(num_layers=3)
    adapters.save_peft(tmp_path / "a", adapted(model), model.config)
    for other in (wider, deeper):
        with pytest.raises(ValueError, match="another model"):
            adapters.load_peft(tmp_path / "a", other.params, other.config)
    shallow = tiny_model(num_layers=1)
    with pytest.raises(ValueError, match="another model"):
        adapters.load_peft(tmp_path / "a", shallow.params, shallow.config)
    about = tmp_path / "a" / "adapter_config.json"
    for key, value in (("use_dora", True), ("peft_type", "IA3"), ("modules_to_save", ["lm_head"])):
        config = json.loads(about.read_text())
        about.write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=key):
            adapters.load_peft(tmp_path / "a", model.params, model.config)
        about.write_text(json.dumps(config))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a whole"):
        adapters.load_peft(tmp_path / "a", model.params, model.config)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        adapters.load_peft(tmp_path / "a", model.params, model.config)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["smollm2", "gemma2"])
def test_the_real_peft_loads_our_adapter_and_we_load_its(name, tmp_path):
    import peft
    import torch

    params, config = hf.read(write_folder(tmp_path / "m", name))

    class Loaded:
        pass

    loaded = Loaded()
    loaded.params = params
    ours = adapted(loaded, targets=["q", "v", "gate", "down"], rank=4, alpha=6)
    adapters.save_peft(tmp_path / "ours", ours, config)
    theirs = peft.PeftModel.from_pretrained(reference_model(name), tmp_path / "ours").eval()
    bound = dict(atol=1e-4, rtol=1e-4)
    expected = decoder.apply(ours, config, families.tokens())
    np.testing.assert_allclose(logits(theirs, families.tokens()), expected, **bound)

    made = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["k_proj", "o_proj", "up_proj"], use_rslora=True, init_lora_weights=False
    )
    torch.manual_seed(0)
    made = peft.get_peft_model(reference_model(name), made).eval()
    made.save_pretrained(tmp_path / "theirs")
    read = adapters.load_peft(tmp_path / "theirs", params, config)
    np.testing.assert_allclose(decoder.apply(read, config, families.tokens()), logits(made, families.tokens()), **bound)
