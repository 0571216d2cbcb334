"""Against pykan itself, where it is installed."""

import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan as ours
from jaxml.kan import attribution, pykan

torch = pytest.importorskip("torch")
kan = pytest.importorskip("kan")
yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(0)
    return torch.randn(200, 3) * 0.6


def theirs(tmp_path, monkeypatch, x, width=None, k=3):
    monkeypatch.chdir(tmp_path)
    model = kan.KAN(width=width or [3, [4, 2], 2], grid=5, k=k, seed=1, auto_save=False)
    model(x)
    model.update_grid(x)
    return model


def value(y):
    return y.detach().numpy()


@pytest.mark.parametrize("width,k", [([3, [4, 2], 2], 3), ([3, [2, 1], 1], 2)])
def test_a_checkpoint_of_pykan_is_the_same_function_there_and_back(tmp_path, monkeypatch, x, width, k):
    model = theirs(tmp_path, monkeypatch, x, width, k)
    model(x)
    model.fix_symbolic(0, 0, 0, "sin", verbose=False, log_history=False)
    model.node_scale[0].data *= 1.5
    model.act_fun[0].mask.data[1, 1] = 0
    y = value(model(x))
    model.saveckpt("m")
    params = pykan.load("m")
    np.testing.assert_allclose(ours.apply(params, jnp.asarray(x.numpy())), y, atol=1e-6)
    pykan.save("n", params, x.numpy())
    np.testing.assert_allclose(value(kan.KAN.loadckpt("n")(x)), y, atol=1e-6)


def test_products_of_different_arity_are_written(tmp_path, monkeypatch, x):
    monkeypatch.chdir(tmp_path)
    params = ours.init(jax.random.key(0), [3, (2, [2, 3]), 1], outside="zero")
    pykan.save("q", params)
    np.testing.assert_allclose(value(kan.KAN.loadckpt("q")(x)), ours.apply(params, jnp.asarray(x.numpy())), atol=1e-6)


def test_scores_and_interactions_are_pykans(tmp_path, monkeypatch, x):
    model = theirs(tmp_path, monkeypatch, x)
    model(x)
    model.attribute()
    model.saveckpt("m")
    scores = ours.attribute(pykan.load("m"), jnp.asarray(x.numpy()))
    for mine, other in zip(scores.edges, model.edge_scores):
        np.testing.assert_allclose(mine.T, value(other), rtol=1e-4, atol=1e-5)
    for mine, other in zip(scores.nodes, model.node_scores):
        np.testing.assert_allclose(mine, value(other), rtol=1e-4, atol=1e-5)
    assert ours.interactions(pykan.load("m"), jnp.asarray(x.numpy()), 1) == model.feature_interaction(1)


@pytest.mark.parametrize("metric", attribution.METRICS)
def test_penalty_and_its_gradient_are_pykans(tmp_path, monkeypatch, x, metric):
    model = theirs(tmp_path, monkeypatch, x)
    model(x)
    model.saveckpt("m")
    params = pykan.load("m")
    if metric == "node_backward":
        model.attribute()
        model.node_attribute()
    else:
        model.attribute()
    loss = model.reg(metric, 1.0, 2.0, 0.0, 0.0)
    mine, grads = jax.value_and_grad(lambda p: ours.regularizer(p, jnp.asarray(x.numpy()), metric=metric))(params)
    np.testing.assert_allclose(mine, value(loss), rtol=1e-5)
    if metric != "edge_forward_sum":  # which has none
        loss.backward()
        for layer, other in zip(grads.layers, model.act_fun):
            np.testing.assert_allclose(layer.base, value(other.scale_base.grad), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    "damage",
    ["absent", "cut", "yaml", "key", "empty", "text", "pickle", "null", "number", "another shape", "expanded",
     "compressed", "whole", "aliases", "base", "sixties"],
)  # fmt: skip
def test_damaged_checkpoints_are_told(tmp_path, monkeypatch, x, damage):
    theirs(tmp_path, monkeypatch, x).saveckpt("m")
    state, config = tmp_path / "m_state", tmp_path / "m_config.yml"
    if damage == "absent":
        state.unlink()
    elif damage == "cut":
        state.write_bytes(state.read_bytes()[:500])
    elif damage in ("empty", "text", "pickle"):
        state.write_bytes({"empty": b"", "text": b"epoch 3\n", "pickle": pickle.dumps({"a": 1}, protocol=2)}[damage])
    elif damage in ("null", "number"):
        told = yaml.safe_load(config.read_text()) | {"width": None}
        config.write_text(yaml.safe_dump(told if damage == "null" else 3))
    elif damage == "another shape":
        tensors = torch.load(state)
        torch.save(tensors | {"act_fun.0.coef": tensors["act_fun.0.coef"][..., :3]}, state)
    elif damage == "expanded":  # a billion numbers that are one in the file
        torch.save(torch.load(state) | {"node_bias_0": torch.zeros(1).expand(10**9)}, state)
    elif damage == "compressed":
        with zipfile.ZipFile(state) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(state, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in parts.items():
                new.writestr(name, content)
    elif damage == "whole":
        torch.save(torch.load(state) | {"node_bias_0": torch.zeros(6, dtype=torch.int64)}, state)
    elif damage == "aliases":  # each list holds the one before 60 times
        told = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 60)}]\n" for n in range(1, 12))
        config.write_text(f"a0: &a0 [1]\n{told}width: *a11\nk: 3\nbase_fun_name: silu\nmult_arity: 2\n")
    elif damage == "base":
        config.write_text(config.read_text().replace("base_fun_name: silu", "base_fun_name: &b [*b]"))
    elif damage == "sixties":
        config.write_text(config.read_text().replace("k: 3\n", "k: 1" + ":59" * 10_000 + "\n"))
    elif damage == "yaml":
        config.write_text("width: [1, {")
    else:
        config.write_text("width: [1, 1]\n")
    with pytest.raises((ValueError, FileNotFoundError), match=r"m_|m:"):
        pykan.load("m")


def test_what_pykan_does_not_have_is_told(tmp_path):
    with pytest.raises(ValueError, match="got 'fourier'"):
        pykan.save(tmp_path / "f", ours.init(jax.random.key(0), [2, 1], basis="fourier"))
    with pytest.raises(ValueError, match="no periodic splines"):
        pykan.save(tmp_path / "p", ours.init(jax.random.key(0), [2, 1], outside="periodic"))
