"""Every layout of PEFT's, read by the real PEFT and written by it, with equal logits."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import paths, quant
from jaxml.lm import decoder, hf
from jaxml.testing import tiny_model
from jaxml.tune import adapters
from tests.golden import families
from tests.golden.make import logits, reference_model
from tests.lm.test_families import write_folder

needs_oracle = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the extra 'oracle' is not installed"
)
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 9)).astype(np.int32)
SIX = ["q", "k", "v", "o", "up", "down"]

LAYOUTS = {
    "lora": dict(rank=4, alpha=6),
    "lora rslora": dict(rank=4, rslora=True, targets=["q", "v"]),
    "lora embed": dict(rank=4, targets=["q", "embed"]),
    "lora patterns": dict(ranks={"q": 2, "layers/0/up": 5}, alphas={"layers/1/*": 3, "v": 9}, targets=SIX),
    "lora whole": dict(rank=4, targets=["q"], whole=["norm", "attn_norm"]),
    "dora": dict(method="dora", rank=4),
    "dora embed": dict(method="dora", rank=4, targets=["v", "embed"]),
    "pissa": dict(start="pissa", rank=4, targets=["q", "down"]),
    "olora": dict(start="olora", rank=4, targets=["q", "down"]),
    "orthogonal": dict(start="orthogonal", rank=4, targets=["q"]),
    "vera": dict(method="vera", rank=12, targets=["q", "k", "down"]),
    "ia3": dict(method="ia3"),
    "adalora": dict(method="adalora", rank=5, targets=["q", "up"]),
}
UNTIED = {
    "lora head": dict(rank=4, targets=["q", "head"]),
    "dora head": dict(method="dora", rank=4, targets=["q", "head", "embed"]),
    "whole head": dict(rank=4, targets=["q"], whole=["head", "embed"]),
}


def moved(params, seed=1):
    """Adapters that have been trained, somehow."""
    trainable, frozen = adapters.split(params)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    trainable = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), trainable)
    params = adapters.combine(trainable, frozen)
    new = {}
    for path, w in adapters.tree.of(params).items():
        if getattr(w, "ranks", None):  # what lies beyond a layer's rank has no gradient
            kept = jnp.arange(w.rank)[None] < jnp.array(w.ranks)[:, None]
            new[path] = dataclasses.replace(w, a=w.a * kept[:, None], b=w.b * kept[:, :, None])
    return paths.replaced(params, new)


@pytest.mark.parametrize("name", LAYOUTS | UNTIED)
def test_a_folder_reads_back_to_the_same_adapters(name, tmp_path):
    model = tiny_model(tied_embeddings=name in LAYOUTS)
    params = moved(adapters.attach(model.params, jax.random.key(0), **(LAYOUTS | UNTIED)[name]))
    adapters.save_peft(tmp_path / "a", params, model.config)
    again = adapters.load_peft(tmp_path / "a", model.params, model.config)
    ours, theirs = (decoder.apply(p, model.config, TOKENS) for p in (params, again))
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * float(jnp.abs(ours).max()))
    for path, w in adapters.tree.of(params).items():
        read = adapters.tree.of(again)[path]
        assert (read.method, read.train) == (w.method, w.train)
        for field in w.train:
            a, b = getattr(w, field), getattr(read, field)
            np.testing.assert_allclose(b, a[tuple(slice(n) for n in b.shape)], atol=0)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_real_peft_loads_what_we_write(name, tmp_path):
    import peft

    params, config = hf.read(write_folder(tmp_path / "m", "smollm2"))
    ours = moved(adapters.attach(params, jax.random.key(0), **LAYOUTS[name]))
    adapters.save_peft(tmp_path / "ours", ours, config)
    theirs = peft.PeftModel.from_pretrained(reference_model("smollm2"), tmp_path / "ours").eval()
    expected = np.asarray(decoder.apply(ours, config, families.tokens()))
    np.testing.assert_allclose(logits(theirs, families.tokens()), expected, atol=1e-4, rtol=1e-4)


def untied(tmp_path):
    """A Llama with a head of its own, here and in transformers."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "untied")
    return model, *hf.read(tmp_path / "untied")


@needs_oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNTIED)
def test_the_real_peft_loads_heads_and_weights_saved_whole(name, tmp_path):
    import peft

    model, params, config = untied(tmp_path)
    ours = moved(adapters.attach(params, jax.random.key(0), **UNTIED[name]))
    adapters.save_peft(tmp_path / "ours", ours, config)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(theirs, TOKENS), decoder.apply(ours, config, TOKENS), atol=1e-4, rtol=1e-4)


def peft_configs():
    import peft

    lora, some = peft.LoraConfig, ["q_proj", "down_proj"]
    return {
        "lora": lora(r=3, lora_alpha=7, target_modules=["k_proj", "o_proj", "up_proj"], use_rslora=True),
        "all linear": lora(target_modules="all-linear"),
        "regex": lora(target_modules=r".*\.(0|2)\.self_attn\.(q|v)_proj", r=2),
        "layers": lora(target_modules=some, layers_to_transform=[1], r=4),
        "patterns": lora(
            target_modules=some,
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6},
            alpha_pattern={"down_proj": 1},
        ),
        "dora": lora(target_modules=some, use_dora=True),
        "embed": lora(target_modules=[*some, "embed_tokens"], use_dora=True),
        "saved": lora(target_modules=some, modules_to_save=["lm_head", "norm"]),
        "head": lora(target_modules=["q_proj", "lm_head"], use_dora=True),
        "pissa": lora(target_modules=some, init_lora_weights="pissa"),
        "olora": lora(target_modules=some, init_lora_weights="olora"),
        "vera": peft.VeraConfig(r=6, target_modules=["q_proj", "k_proj", "down_proj"]),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "adalora": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=some),
    }


@needs_oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    "lora|all linear|regex|layers|patterns|dora|embed|saved|head|pissa|olora|vera|ia3|adalora".split("|"),
)
def test_we_load_what_the_real_peft_writes(name, tmp_path):
    import peft
    import torch

    model, params, config = untied(tmp_path)
    config_of = peft_configs()[name]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, config_of)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if value.requires_grad and "vera_A" not in key and "vera_B" not in key:
                value.add_(0.1 * torch.randn(value.shape))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    read = adapters.load_peft(tmp_path / "theirs", params, config)
    np.testing.assert_allclose(decoder.apply(read, config, TOKENS), logits(theirs, TOKENS), atol=1e-4, rtol=1e-4)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
def test_ranks_that_adalora_has_taken_away_are_read(tmp_path):
    import peft
    import torch

    model, params, config = untied(tmp_path)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, peft_configs()["adalora"])
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_" in key:
                value.add_(0.1 * torch.randn(value.shape))
    theirs.eval()
    pattern = {}
    for key, _ in theirs.named_parameters():
        if "lora_E" in key:
            kept = [True] * 6
            kept[len(pattern) % 6] = False
            pattern[key.removeprefix("base_model.model.").replace(".default", "")] = kept
    theirs.base_model.resize_modules_by_rank_pattern(pattern, "default")
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(tmp_path / "theirs")
    read = adapters.load_peft(tmp_path / "theirs", params, config)
    np.testing.assert_allclose(decoder.apply(read, config, TOKENS), logits(theirs, TOKENS), atol=1e-4, rtol=1e-4)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
def test_ranks_that_adalora_has_taken_away_are_not_written(tmp_path):
    import peft

    model, params, config = untied(tmp_path)
    ours = moved(adapters.attach(params, jax.random.key(0), method="adalora", rank=5, targets=["q", "up"]))
    q, up = ours["layers"]["q"], ours["layers"]["up"]
    ours["layers"]["q"] = dataclasses.replace(q, diagonal=q.diagonal.at[0, 1:4].set(0).at[1].set(0))
    expected = np.asarray(decoder.apply(ours, config, TOKENS))
    adapters.save_peft(tmp_path / "ours", ours, config)
    about = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    kept = {name: sum(flags) for name, flags in about["rank_pattern"].items() if "q_proj" in name}
    assert list(kept.values()) == [2, 0] and up.rank == about["init_r"] == 5
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(theirs, TOKENS), expected, atol=1e-4, rtol=1e-4)
    again = adapters.load_peft(tmp_path / "ours", params, config)
    assert again["layers"]["q"].ranks == (2, 0)
    np.testing.assert_allclose(decoder.apply(again, config, TOKENS), expected, atol=1e-4, rtol=1e-4)
    adapters.save_peft(tmp_path / "again", again, config)  # whose matrices are narrower than PEFT's first rank
    twice = adapters.load_peft(tmp_path / "again", params, config)
    np.testing.assert_allclose(decoder.apply(twice, config, TOKENS), expected, atol=1e-4, rtol=1e-4)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa_niter_4", "olora", "pissa"])
def test_starts_that_move_weights_are_exported_as_plain_lora_of_twice_the_rank(start, tmp_path):
    import peft

    params, config = hf.read(write_folder(tmp_path / "m", "smollm2"))
    begun = adapters.attach(
        params, jax.random.key(0), rank=3, start=start, targets=["q", "up"], ranks={"layers/0/q": 2}
    )
    ours = moved(begun)
    plain = adapters.plain(ours, begun, params)
    expected = np.asarray(decoder.apply(ours, config, families.tokens()))
    np.testing.assert_allclose(decoder.apply(plain, config, families.tokens()), expected, atol=1e-4, rtol=1e-4)
    adapters.save_peft(tmp_path / "ours", plain, config)
    theirs = peft.PeftModel.from_pretrained(reference_model("smollm2"), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(theirs, families.tokens()), expected, atol=1e-4, rtol=1e-4)
    if start == "pissa_niter_4":
        with pytest.raises(ValueError, match=r"adapters\.plain"):
            adapters.save_peft(tmp_path / "not", ours, config)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
def test_starts_are_those_of_peft(tmp_path):
    """The same frozen weights and the same product A B, for starts without chance."""
    import peft

    _, params, _ = untied(tmp_path)
    for start in ("pissa", "olora"):
        reference = peft.get_peft_model(untied(tmp_path)[0], peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=start
        ))  # fmt: skip
        ours = adapters.attach(params, jax.random.key(0), rank=4, alpha=6, start=start, targets=["q"])["layers"]["q"]
        module = reference.base_model.model.model.layers[1].self_attn.q_proj
        np.testing.assert_allclose(ours.base[1], module.base_layer.weight.detach().numpy().T, atol=1e-5)
        np.testing.assert_allclose(ours.delta()[1], module.get_delta_weight("default").detach().numpy().T, atol=1e-5)


def test_another_model_is_described_by_the_names_of_its_modules(tmp_path):
    params = {"blocks": {"query": jnp.ones((3, 8, 6))}, "out": jnp.ones((6, 4)), "other": jnp.ones((4, 4))}
    modules = {"blocks/query": "encoder.layer.{}.attention.query", "out": "classifier"}
    ours = moved(adapters.attach(params, jax.random.key(0), rank=2, targets=["query", "out"]))
    adapters.save_peft(tmp_path / "a", ours, modules)
    with hf.open_safetensors(tmp_path / "a" / "adapter_model.safetensors") as file:
        names = set(file.keys())
    assert "base_model.model.encoder.layer.2.attention.query.lora_A.weight" in names
    again = adapters.load_peft(tmp_path / "a", params, modules)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, ours)


def test_an_adapter_goes_around_a_quantised_model(tmp_path):
    model = tiny_model()
    params = quant.quantize_params(model.params, "nf4")
    for options in (dict(rank=4), dict(method="dora", rank=4)):
        ours = moved(adapters.attach(params, jax.random.key(0), **options))
        folder = tmp_path / options.get("method", "lora")
        adapters.save_peft(folder, ours, model.config)
        again = adapters.load_peft(folder, params, model.config)
        expected = decoder.apply(ours, model.config, TOKENS)
        np.testing.assert_allclose(decoder.apply(again, model.config, TOKENS), expected, rtol=1e-4, atol=1e-3)


def test_what_peft_cannot_say_is_refused(tmp_path):
    model = tiny_model()
    attach = lambda **options: adapters.attach(model.params, jax.random.key(0), rank=4, **options)
    mixed = attach(targets=["q"]) | {}
    mixed["layers"] = mixed["layers"] | {"v": attach(method="vera", targets=["v"])["layers"]["v"]}
    dora = attach(targets=["q"]) | {}
    dora["layers"] = dora["layers"] | {"v": attach(method="dora", targets=["v"])["layers"]["v"]}
    for params, word in (
        (mixed, "one method"),
        (dora, "got both"),
        (attach(start="loftq", quantize="nf4", targets=["q"]), None),
        (attach(targets=[], whole=["norm"]), "at least one LoRA"),
        (adapters.stack([attach(targets=["q"])]), "adapters.take"),
        (attach(start="pissa", quantize="nf4", targets=["q"]), "without it the adapter is of no use"),
    ):
        if word is None:
            adapters.save_peft(tmp_path / "quantised", params, model.config, base_model="rest")
            continue
        with pytest.raises(ValueError, match=word):
            adapters.save_peft(tmp_path / "a", params, model.config)
    with pytest.raises(ValueError, match="PEFT has no module for"):
        adapters.save_peft(tmp_path / "a", attach(targets=["q"]), {"layers/v": "v"})


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda a: a.update(fan_in_fan_out=True), "fan_in_fan_out=True is not implemented"),
        (lambda a: a.update(init_lora_weights="pissa_niter_4"), "path_initial_model"),
        (lambda a: a.update(use_dora=True), "use_dora"),
        (lambda a: a.update(modules_to_save=["lm_head"]), "modules_to_save names 'lm_head'"),
        (lambda a: a.update(peft_type="VERA"), "VeRA's projections"),
        (lambda a: a.update(peft_type="LOHA"), "peft_type is one of LORA, VERA"),
        (lambda a: a.update(bias="all"), "bias='all'"),
        (lambda a: a.update(target_parameters=["x"]), "target_parameters"),
        (lambda a: a.update(init_lora_weights="corda"), "'corda' is none of gaussian.* path_initial_model"),
        (lambda a: a.update(lora_dropout=7), r"lora_dropout is in \[0, 1\), got 7"),
        (lambda a: a.update(lora_alpha="16"), "lora_alpha is a number, got '16'"),
        (lambda a: a.update(lora_alpha=float("nan")), "lora_alpha is a number, got nan"),
        (
            lambda a: a.update(alpha_pattern={"q_proj": "x"}),
            "alpha_pattern is an object of regular expressions and num",
        ),
        (lambda a: a.update(alpha_pattern={"(": 2}), "alpha_pattern is an object of regular expressions and num"),
        (lambda a: a.update(alpha_pattern=[1]), "alpha_pattern is an object of regular expressions and num"),
        (lambda a: a.update(modules_to_save="lm_head"), "modules_to_save is a list of names, got 'lm_head'"),
        (lambda a: a.update(target_modules=3), "target_modules is a regular expression or a list of names, got 3"),
        (lambda a: a.update(layers_to_transform="all"), "layers_to_transform is a layer's number or a list"),
        (lambda a: a.update(use_rslora="no"), "use_rslora is true or false, got 'no'"),
    ],
)
def test_an_option_that_changes_what_is_computed_is_refused(change, word, tmp_path):
    model = tiny_model()
    adapters.save_peft(tmp_path / "a", adapters.attach(model.params, jax.random.key(0), targets=["q"]), model.config)
    path = tmp_path / "a" / "adapter_config.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=word):
        adapters.load_peft(tmp_path / "a", model.params, model.config)


def test_a_second_adapter_is_refused(tmp_path):
    model = tiny_model()
    params = adapters.attach(model.params, jax.random.key(0), targets=["q"])
    adapters.save_peft(tmp_path / "a", params, model.config)
    with pytest.raises(ValueError, match="layers/q has an adapter already"):
        adapters.load_peft(tmp_path / "a", params, model.config)


def test_the_scale_of_ranks_by_layer_is_kept(tmp_path):
    model = tiny_model()
    params = adapters.attach(model.params, jax.random.key(0), ranks={"layers/0/q": 2}, rank=4, alpha=6, targets=["q"])
    adapters.save_peft(tmp_path / "a", params, model.config)
    about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert about["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 4} and about["r"] == 2
    again = adapters.load_peft(tmp_path / "a", model.params, model.config)["layers"]["q"]
    assert again.ranks == (2, 4)
    np.testing.assert_allclose(again.scale, [3.0, 1.5])
    assert dataclasses.replace(again, base=None).a.shape == (2, 32, 4)


@pytest.mark.parametrize(
    "method, name, damage, words",
    [
        ("dora", "lora_magnitude_vector", lambda a: a[:1], "magnitude has the shape"),
        ("adalora", "lora_E", lambda a: a[:2], "lora_E has the shape"),
        ("vera", "vera_lambda_d", lambda a: a[:1], "vera_lambda_d has the shape"),
        ("lora", "lora_A.weight", lambda a: a[None], "are matrices"),
        ("lora", "lora_A.weight", lambda a: a.astype(np.int32), "holds floating numbers, got int32"),
        ("lora", "lora_B.weight", lambda a: a + np.nan, "every number of .*lora_B.weight is finite"),
        ("lora", "weight", lambda a: a[:0] if a.shape[0] == 4 else a[:, :0], "rank of layers/q is at least 1, got 0"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, method, name, damage, words):
    model = tiny_model()
    params = adapters.attach(model.params, jax.random.key(0), method=method, rank=4, targets=["q"])
    adapters.save_peft(tmp_path / "a", params, model.config)
    file = tmp_path / "a" / "adapter_model.safetensors"
    with hf.open_safetensors(file) as opened:
        tensors = {key: np.asarray(opened.get_tensor(key)) for key in opened.keys()}  # noqa: SIM118
    hf.save_safetensors(file, {k: damage(a) if k.endswith(name) else a for k, a in tensors.items()})
    with pytest.raises(ValueError, match=words):
        adapters.load_peft(tmp_path / "a", model.params, model.config)


def respelled(folder, change):
    """The same adapter with other tensors."""
    from safetensors.numpy import load_file

    path = folder / "adapter_model.safetensors"
    hf.save_safetensors(path, change(load_file(path)))


@pytest.mark.parametrize(
    "ending, make, said",
    [
        ("vera_A", lambda a: a[None], "VeRA's projections are"),
        ("vera_A", lambda a: a[:-1], "VeRA's projections are"),
        ("vera_A", lambda a: a[:, :8], "is of another model"),
        ("vera_lambda_b", lambda a: a[None], "vera_lambda_b has the shape"),
        ("vera_lambda_b", lambda a: a[:-1], "vera_lambda_b has the shape"),
        ("vera_lambda_d", lambda a: a[None], "vera_lambda_d has the shape"),
    ],
)
def test_veras_vectors_and_projections_fit_the_model(ending, make, said, tmp_path):
    model = tiny_model()
    params = adapters.attach(model.params, jax.random.key(0), **LAYOUTS["vera"])
    adapters.save_peft(tmp_path / "a", params, model.config)
    respelled(tmp_path / "a", lambda t: {k: make(v) if k.endswith(ending) else v for k, v in t.items()})
    with pytest.raises(ValueError, match=said):
        adapters.load_peft(tmp_path / "a", model.params, model.config)


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_a_prompt_without_places_is_refused(kind, tmp_path):
    from jaxml.tune import prompt

    model = tiny_model()
    made = prompt.soft(model, length=3) if kind == "soft" else prompt.prefix(model, length=3)
    adapters.save_peft(tmp_path / "a", made.params, model.config)
    respelled(tmp_path / "a", lambda t: {k: v[:0] for k, v in t.items()})
    with pytest.raises(ValueError, match="a prompt has places"):
        adapters.load_peft(tmp_path / "a", model.params, model.config)
