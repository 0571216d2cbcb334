"""Every family computes what transformers computes, from files that transformers wrote and back."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from jaxml.lm import decoder, hf
from jaxml.lm.config import DecoderConfig
from jaxml.lm.tensors import disassemble, tensor_names
from jaxml.testing import tolerance
from tests.golden import families
from tests.golden.make import POSITIONS, logits, reference_model

needs_oracle = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the extra 'oracle' is not installed"
)


def write_folder(folder, name):
    config = families.FAMILIES[name]
    ours = DecoderConfig.from_hf(config)
    tree, arrays = decoder.shapes(ours), {}
    for path, key in tensor_names(ours, "hf").items():
        shape = tree[path[0]] if path[0] != "layers" else tree["layers"][path[1]][1:]
        shape = shape[::-1] if path[0] == "layers" and len(shape) == 2 else shape
        for i in range(ours.num_layers if path[0] == "layers" else 1):
            arrays[key.format(i)] = families.weight(key.format(i), shape)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    hf.save_safetensors(folder / "model.safetensors", arrays)
    return folder


@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_equal_transformers(name, tmp_path):
    params, config = hf.read(write_folder(tmp_path / name, name))
    ours = decoder.apply(params, config, families.tokens())
    with np.load("tests/golden/families.npz") as golden:
        np.testing.assert_allclose(ours[:, POSITIONS], golden[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "smollm3", "qwen2"])
def test_unrolled_layers_compute_what_scanned_ones_do(name, tmp_path):
    params, config = hf.read(write_folder(tmp_path / name, name))
    scanned = decoder.apply(params, config, families.tokens())
    unrolled = decoder.apply(decoder.unstack(params), config, families.tokens())
    bound = tolerance("float32", 8 * 4 * 80)  # layers × products × width
    np.testing.assert_allclose(scanned, unrolled, atol=bound, rtol=bound)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", families.FAMILIES)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name, tmp_path):
    import transformers

    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    params, config = hf.read(tmp_path / "theirs")
    expected = logits(theirs, families.tokens())
    np.testing.assert_allclose(decoder.apply(params, config, families.tokens()), expected, atol=1e-4, rtol=1e-4)

    hf.write(tmp_path / "ours", params, config, None, shard_bytes=60_000)
    assert (tmp_path / "ours" / hf.INDEX).is_file()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    np.testing.assert_allclose(logits(back.eval(), families.tokens()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_written_folder_reads_back_to_the_same_bits(name, tmp_path):
    params, config = hf.read(write_folder(tmp_path / name, name))
    hf.write(tmp_path / "out", params, config, None, shard_bytes=50_000)
    again, config_again = hf.read(tmp_path / "out")
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    names = [k for k, _ in disassemble(params, config)]
    assert len(names) == len(set(names))


def test_bfloat16_tensors_stay_bfloat16(tmp_path):
    params, config = hf.read(write_folder(tmp_path / "m", "smollm2"), dtype="bfloat16")
    hf.write(tmp_path / "out", params, config, None)
    again, _ = hf.read(tmp_path / "out")
    assert {a.dtype.name for a in jax.tree.leaves(again)} == {"bfloat16"}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "relu6"}, "relu6"),
        ({"frobnicate": 3}, "frobnicate"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}, "rope_parameters": None}, "longrope"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        DecoderConfig.from_hf(families.FAMILIES["llama3"] | change)


def test_missing_left_over_misshapen_and_truncated_tensors_are_named(tmp_path):
    folder = write_folder(tmp_path / "m", "smollm2")
    path = folder / "model.safetensors"
    with hf.open_safetensors(path) as file:
        arrays = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    gone = "model.layers.1.mlp.up_proj.weight"
    for change, word in (
        ({k: v for k, v in arrays.items() if k != gone}, "missing.*layers.1.mlp.up_proj"),
        (arrays | {"model.layers.0.extra": np.zeros(3, np.float32)}, "left over.*layers.0.extra"),
        (arrays | {gone: np.zeros((3, 4), np.float32)}, "shape"),
    ):
        hf.save_safetensors(path, change)
        with pytest.raises(ValueError, match=word):
            hf.read(folder)
    hf.save_safetensors(path, arrays)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        hf.read(folder)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    params, config = hf.read(write_folder(tmp_path / "m", "smollm2"))
    monkeypatch.setattr(hf, "save_safetensors", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        hf.write(tmp_path / "out", params, config, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
