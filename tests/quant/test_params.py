import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import lm, quant
from jaxml.lm import decoder, hf
from jaxml.testing import tiny_model

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 9)).astype(np.int32)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra 'oracle' is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize("format", quant.FORMATS)
def test_a_decoder_takes_quantised_weights_stacked_and_unrolled(format):
    model = tiny_model()
    params = quant.quantize_params(model.params, format, targets=["layers/*", "embed"])
    expected = decoder.apply(quant.dequantize_params(params), model.config, TOKENS)
    scale = float(jnp.abs(expected).max())
    for form in (params, decoder.unstack(params)):
        np.testing.assert_allclose(decoder.apply(form, model.config, TOKENS), expected, atol=1e-5 * scale)
    assert float(jnp.abs(decoder.apply(model.params, model.config, TOKENS) - expected).max()) > 1e-4 * scale
    assert decoder.num_params(params) == decoder.num_params(model.params)


def test_casting_leaves_codes_and_scales_as_they_are():
    params = quant.quantize_params(tiny_model().params)
    cast = decoder.cast(params, jnp.bfloat16)
    before, after = params["layers"]["q"], cast["layers"]["q"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(before), jax.tree.leaves(after))
    assert after.dense().dtype == jnp.bfloat16 and cast["norm"].dtype == jnp.bfloat16


def test_loading_quantises_as_it_reads(tmp_path):
    model = tiny_model()
    lm.save(model, tmp_path / "dense")
    for options in (dict(format="nf4"), dict(format="int8", targets=["layers/q", "embed"])):
        how = {"quantize" if k == "format" else k: v for k, v in options.items()}
        read, expected = lm.load(tmp_path / "dense", **how).params, quant.quantize_params(model.params, **options)
        assert jax.tree.structure(read) == jax.tree.structure(expected)
        read, expected = map(quant.dequantize_params, (read, expected))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), read, expected)


def test_a_quantised_folder_is_not_quantised_anew(tmp_path):
    model = tiny_model()
    lm.save(model.replace(params=quant.quantize_params(model.params, "nf4", targets=["q"])), tmp_path / "a")
    read = lm.load(tmp_path / "a", quantize="nf4").params["layers"]
    np.testing.assert_array_equal(read["q"].codes, lm.load(tmp_path / "a").params["layers"]["q"].codes)
    assert read["up"].kind == "nf4"
    with pytest.raises(ValueError, match="layers/q: weights are quantised once, this one is in nf4"):
        lm.load(tmp_path / "a", quantize="int8")


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
def test_a_folder_reads_back_to_the_same_bits(format, tmp_path):
    model = tiny_model()
    model = model.replace(params=quant.quantize_params(model.params, format))
    lm.save(model, tmp_path / "a", shard_bytes=20000)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["load_in_8bit"] == (
        format == "int8"
    )
    again = lm.load(tmp_path / "a", dtype="float32")
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_an_orbax_folder_keeps_any_format(tmp_path):
    model = tiny_model()
    params = quant.quantize_params(model.params, "int4", targets=["layers/q", "embed"])
    params = quant.quantize_params(params, "int8", targets=["layers/up"], block=16)
    model = model.replace(params=params)
    lm.model.save_orbax(model, tmp_path / "o")
    again = lm.load(tmp_path / "o")
    assert jax.tree.structure(again.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again.params, params)
    with pytest.raises(ValueError, match="weights are arrays, or of layers"):
        lm.save(model, tmp_path / "h")
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda t, k: t.pop(k + ".absmax"), "absmax: missing"),
        (lambda t, k: t.update({k + ".absmax": t[k + ".absmax"][:-1]}), "scales, got"),
        (lambda t, k: t.update({k: t[k][:-1]}), "bytes and"),
        (lambda t, k: t.update({k + ".quant_map": t[k + ".quant_map"] * 2}), "another one"),
        (lambda t, k: t.update({k + ".nested_quant_map": t[k + ".quant_map"]}), "another one"),
        (lambda t, k: t.update({k + ".quant_state.bitsandbytes__nf4": np.zeros(4, np.uint8)}), "as JSON"),
        (lambda t, k: t.pop(k + ".quant_state.bitsandbytes__nf4"), "4-bit tensor comes with"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_by_name(change, word, tmp_path):
    model = tiny_model()
    lm.save(model.replace(params=quant.quantize_params(model.params)), tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    with hf.open_safetensors(path) as file:
        tensors = {k: file.get_tensor(k) for k in list(file.keys())}
    change(tensors, "model.layers.1.self_attn.q_proj.weight")
    hf.save_safetensors(path, tensors)
    with pytest.raises(ValueError, match=word) as error:
        lm.load(tmp_path / "a")
    assert "model.layers.1.self_attn.q_proj.weight" in str(error.value)


def test_layers_of_different_formats_and_other_methods_are_refused(tmp_path):
    model = tiny_model()
    lm.save(model.replace(params=quant.quantize_params(model.params)), tmp_path / "a")
    lm.save(model, tmp_path / "b")
    with hf.open_safetensors(tmp_path / "a" / "model.safetensors") as file:
        tensors = {k: file.get_tensor(k) for k in list(file.keys())}
    with hf.open_safetensors(tmp_path / "b" / "model.safetensors") as file:
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors = {k: v for k, v in tensors.items() if not k.startswith(name)} | {name: file.get_tensor(name)}
    hf.save_safetensors(tmp_path / "a" / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="quantised alike in all layers, layer 1"):
        lm.load(tmp_path / "a")
    about = json.loads((tmp_path / "a" / "config.json").read_text())
    about["quantization_config"]["quant_method"] = "gptq"
    (tmp_path / "a" / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="gptq"):
        lm.load(tmp_path / "a")


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(format="nf3"), "one of nf4"),
        (dict(targets=["nope"]), "there are|There are layers|embed"),
        (dict(targets=["layers/q", "zzz"]), "zzz"),
        (dict(format="int8", double=True), "options of int8 are block, got double"),
    ],
)
def test_a_wrong_request_is_refused(options, word):
    with pytest.raises(ValueError, match=word):
        quant.quantize_params(tiny_model().params, **options)


def test_a_weight_that_is_not_finite_or_quantised_already_is_named():
    params = tiny_model().params
    bad = params | {"layers": params["layers"] | {"up": params["layers"]["up"].at[1, 2, 3].set(jnp.nan)}}
    with pytest.raises(ValueError, match=r"layers/up: .* finite, got 1"):
        quant.quantize_params(bad)
    with pytest.raises(ValueError, match="quantised once, this one is in nf4"):
        quant.quantize_params(quant.quantize_params(params))


def test_a_file_with_a_weight_that_is_not_finite_is_refused_by_tensor(tmp_path):
    model = tiny_model()
    up = model.params["layers"]["up"].at[1, 2, 3].set(jnp.inf)
    lm.save(model.replace(params=model.params | {"layers": model.params["layers"] | {"up": up}}), tmp_path / "a")
    with pytest.raises(ValueError, match=r"up_proj.*finite"):
        lm.load(tmp_path / "a", quantize="nf4")


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_bitsandbytes_reads_our_tensors_and_we_read_its(format):
    import bitsandbytes.functional as bnb
    import torch

    w = np.random.default_rng(0).standard_normal((24, 128)).astype(np.float32)
    ours = quant.bnb.write("w", quant.FORMATS[format](jnp.asarray(w.T)))
    state = {k.removeprefix("w."): torch.from_numpy(np.array(v)) for k, v in ours.items() if k != "w"}
    state = bnb.QuantState.from_dict(state, torch.device("cpu"))
    theirs = bnb.dequantize_4bit(torch.from_numpy(ours["w"]), state).numpy()
    np.testing.assert_allclose(theirs.T, quant.FORMATS[format](jnp.asarray(w.T)).dense(), rtol=1e-6)

    codes, state = bnb.quantize_4bit(torch.from_numpy(w), compress_statistics=True, quant_type=format)
    stored = {f"w.{k}": v.numpy() for k, v in state.as_dict(packed=True).items()} | {"w": codes.numpy()}
    read = quant.bnb.read("w", stored.__getitem__, stored)
    np.testing.assert_allclose(bnb.dequantize_4bit(codes, state).numpy().T, read.dense(), rtol=1e-6)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_our_quantised_folder(tmp_path):
    import torch
    import transformers

    model = tiny_model(width=64, head_dim=16, hidden_dim=128)  # bitsandbytes' kernel for CPUs wants whole blocks a row
    params = quant.quantize_params(model.params, "nf4")
    hf.write(tmp_path / "q", params, model.config, None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    theirs.train()  # its kernel for inference on CPUs rounds to bfloat16; there is no dropout in the model
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()
    expected = np.asarray(decoder.apply(params, model.config, TOKENS))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
