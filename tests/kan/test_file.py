import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan
from jaxml.kan import file
from jaxml.kan.library import Function
from jaxml.kan.network import Affine

X = jax.random.normal(jax.random.key(0), (20, 2))


def a_network():
    params = kan.init(jax.random.key(1), [2, (1, [2, 3]), 1], grid=7, order=2, outside="clamp")
    params = kan.fix(params, 0, 1, 2, "sin", numbers=[2.0, 0.0, 1.0, 0.5])
    affine = Affine(jnp.full(6, 1.1), jnp.full(6, 0.1), jnp.full(3, 0.9), jnp.full(3, -0.1))
    return kan.KAN(params.layers, (affine, ()), params.arities)


def test_a_network_comes_back_as_it_was(tmp_path):
    params = a_network()
    kan.save(tmp_path / "net.npz", params, {"seed": 3})
    again = kan.load(tmp_path / "net.npz")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    np.testing.assert_array_equal(kan.apply(again, X), kan.apply(params, X))
    assert file.about_of(tmp_path / "net.npz") == {"seed": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["net.npz"]


def test_functions_of_ones_own_are_handed_over(tmp_path):
    cosh = Function("cosh", jnp.cosh, lambda s, u: s.cosh(u), 3)
    params = kan.fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, cosh)
    kan.save(tmp_path / "net.npz", params)
    with pytest.raises(ValueError, match="'cosh' is not in the library"):
        kan.load(tmp_path / "net.npz")
    assert kan.load(tmp_path / "net.npz", {"cosh": cosh}).layers[0].fixed[0].function is cosh


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_damaged_files_are_told(tmp_path, damage):
    path = tmp_path / "net.npz"
    kan.save(path, a_network())
    content = {"cut": path.read_bytes()[:900], "empty": b"", "text": b"hello, this is no network" * 9}
    if damage == "other":
        np.savez(path, a=np.zeros(3))
    else:
        path.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"net\.npz"):
        kan.load(path)


def changed(path, change):
    """The same file with another header or arrays."""
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())
    change(header, arrays)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda h, a: h.update(layers=[], arities=[]), "a network has layers"),
        (lambda h, a: h.update(arities=[[2, 9], []]), "multiplies at most its 6 sums"),
        (lambda h, a: h.update(arities=[[2, -3], []]), "multiplies at most its 6 sums"),
        (lambda h, a: h.update(arities=[[2], []]), "layer 0 has scales of 6 sums and 5 nodes"),
        (lambda h, a: h["layers"][0]["fixed"][0].__setitem__(0, 7), "goes from one of 2 inputs"),
        (lambda h, a: h["layers"][0]["fixed"][0].__setitem__(1, -1), "goes from one of 2 inputs"),
        (lambda h, a: a.update({"0.fixed.0": np.zeros(3, np.float32)}), "with 4 numbers"),
        (lambda h, a: a.update({"0.inner_scale": np.zeros(5, np.float32)}), "scales of 6 sums"),
        (lambda h, a: a.update({"0.coef": np.zeros((2, 2, 6), np.float32)}), "has arrays of the shapes"),
        (lambda h, a: a.update({"0.points": a["0.points"][:, ::-1]}), "are finite and increase"),
        (lambda h, a: a.update({"0.points": a["0.points"] * np.nan}), "are finite and increase"),
        (lambda h, a: h.pop("about"), "damaged"),
        (lambda h, a: h.update(about=3), "is an object, got int"),
    ],
)
def test_networks_whose_parts_do_not_fit_are_told(tmp_path, change, said):
    kan.save(tmp_path / "net.npz", a_network())
    changed(tmp_path / "net.npz", change)
    with pytest.raises(ValueError, match=f"(?s)net.npz.*{said}"):
        kan.load(tmp_path / "net.npz")


def test_bfloat16_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="bfloat16"):
        kan.save(tmp_path / "net.npz", kan.with_dtype(a_network(), jnp.bfloat16))


def test_a_fit_that_was_stopped_goes_on_where_it_was(tmp_path):
    x = jax.random.uniform(jax.random.key(0), (100, 2), minval=-1.0)
    y = x[:, 0] + x[:, 1] ** 2
    params = kan.init(jax.random.key(1), [2, 1], grid=3)
    options = dict(grids=[3, 5], steps=3, held_out=(x[:20], y[:20]))
    whole, told = kan.fit(params, x, y, **options)
    kan.fit(params, x, y, **options, checkpoint=tmp_path)
    (tmp_path / "0-1-5.npz").unlink()
    again, told_again = kan.fit(params, x, y, **options, checkpoint=tmp_path)
    np.testing.assert_allclose(kan.apply(again, x), kan.apply(whole, x), atol=1e-5)
    assert told_again["train"] == pytest.approx(told["train"], rel=1e-3)
    others = [dict(params=kan.init(jax.random.key(2), [2, 1], grid=3)), dict(y=y[::-1]), dict(held_out=None)]
    others += [dict(steps=4), dict(smooth=0.1), dict(key=jax.random.key(3)), dict(method="lbfgs"), dict(restarts=2)]
    for other in others:
        with pytest.raises(ValueError, match="of another fit"):
            kan.fit(**(dict(params=params, x=x, y=y, checkpoint=tmp_path) | options | other))


def test_a_stopped_fit_finds_its_own_functions_and_a_grid_that_comes_twice(tmp_path):
    x = jax.random.uniform(jax.random.key(0), (50, 1), minval=-1.0)
    cosh = kan.Function("cosh of mine", jnp.cosh, lambda x: x, 1)
    params = kan.fix(kan.init(jax.random.key(1), [1, 1]), 0, 0, 0, cosh)
    options = dict(grids=[3, 3], steps=2, checkpoint=tmp_path)
    first = kan.fit(params, x, jnp.cosh(x), **options)
    again = kan.fit(params, x, jnp.cosh(x), **options)
    assert len(list(tmp_path.iterdir())) == 2
    jax.tree.map(np.testing.assert_array_equal, again, first)


def test_nothing_else_in_the_folder_is_touched(tmp_path):
    (tmp_path / "net.tmp").write_text("mine")
    kan.save(tmp_path / "net.npz", kan.init(jax.random.key(0), [2, 1]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.npz", "net.tmp"]
    assert (tmp_path / "net.tmp").read_text() == "mine"


def test_a_function_of_ones_own_has_a_name_of_its_own(tmp_path):
    mine = kan.Function("sin", jnp.cos, lambda s, u: s.cos(u), 1)
    params = kan.fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, mine)
    with pytest.raises(ValueError, match="'sin' is the name of another function in the library"):
        kan.save(tmp_path / "net.npz", params)


@pytest.mark.parametrize("damage", ["text", "a word for numbers", "another spec", "another shape"])
def test_files_that_are_no_network_are_told(tmp_path, damage):
    path = tmp_path / "net.npz"
    kan.save(path, kan.init(jax.random.key(0), [2, 1]))
    with np.load(path) as opened:
        arrays = dict(opened)
    if damage == "text":
        path.write_text("coef = 1")
    else:
        header = arrays["header"].tobytes()
        arrays |= {
            "a word for numbers": {"0.coef": np.array("x")},
            "another spec": {"header": np.frombuffer(header.replace(b'"grid": 5', b'"grid": 9'), np.uint8)},
            "another shape": {"0.base": np.zeros((3, 1), np.float32)},
        }[damage]
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"net\.npz: (not a network|no network)") as told:
        kan.load(path)
    assert "allow_pickle" not in str(told.value)
