import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan
from jaxml.kan import symbolic
from jaxml.kan.library import LIBRARY

sympy = pytest.importorskip("sympy")
X = jnp.linspace(-1.0, 1.0, symbolic.POINTS)
INSIDE = {"sqrt": 1.3, "x^1.5": 1.2, "1/sqrt(x)": 1.4, "log": 1.5, "arcsin": 0.0, "arccos": 0.0, "arctanh": 0.0}


@pytest.mark.parametrize("name", [n for n in LIBRARY if n not in ("0", "sgn")])
def test_the_function_itself_is_found_with_its_numbers(name):
    f = LIBRARY[name]
    a, b = (0.8, INSIDE.get(name, 0.0 if "1/" not in name else 2.0) + 0.1)
    y = 1.7 * f.call(a * X + b) - 0.4
    ranked = symbolic._ranked(X, y, LIBRARY, 0.0)
    found = next(s for s in ranked if s.name == name)
    assert 1 - found.r2 < 1e-6
    a, b, c, d = found.numbers
    np.testing.assert_allclose(c * f.call(a * X + b) + d, y, atol=2e-3 * float(jnp.std(y)))


@pytest.mark.parametrize("name", list(LIBRARY))
def test_plainer_numbers_are_the_same_function(name):
    f = LIBRARY[name]
    for a, b, c, d in ((0.7, 1.1, 2.0, -1.0), (-0.7, 1.1, -2.0, 0.5), (0.3, 0.6, 1.0, 0.0)):
        one = c * f.call(a * X + b) + d
        a, b, c, d = f.simpler((a, b, c, d))
        other = c * f.call(a * X + b) + d
        np.testing.assert_allclose(other, one, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", list(LIBRARY))
def test_expression_and_function_agree(name):
    f, x = LIBRARY[name], sympy.Symbol("x", real=True)
    at = jnp.array([0.3, 0.6, 0.9])
    np.testing.assert_allclose(kan.function(f.expression(sympy, x), ["x"])(at[:, None])[:, 0], f.call(at), rtol=1e-5)


def test_simplest_of_those_that_are_as_good_as_the_best_wins_without_a_weight():
    y = jnp.tanh(X)
    assert symbolic._ranked(X, y, LIBRARY, None)[0].name == "tanh"
    assert symbolic._ranked(X, y, LIBRARY, 0.8)[0].name == "sin"  # pykan's score prefers it


def test_functions_without_a_value_on_the_range_are_left_out():
    names = [s.name for s in symbolic._ranked(jnp.linspace(-1e30, 1e30, symbolic.POINTS), X, LIBRARY, 0.8)]
    assert "x" in names


def test_a_fixed_edge_is_the_function_and_can_be_given_back():
    params = kan.init(jax.random.key(0), [2, 3, 1])
    x = jax.random.normal(jax.random.key(1), (20, 2))
    fixed = kan.fix(params, 0, 1, 2, "sin", numbers=[2.0, 0.5, 3.0, -1.0])
    values = kan.apply(fixed, x, edges=True)[1][0]["edges"]
    np.testing.assert_allclose(values[:, 1, 2], 3 * jnp.sin(2 * x[:, 1] + 0.5) - 1, atol=1e-5)
    back = kan.unfix(fixed, 0, 1, 2)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    np.testing.assert_array_equal(kan.apply(back, x), kan.apply(params, x))
    assert kan.unfix(params, 0, 0, 0) is params


def test_numbers_of_fixed_edges_are_trained_and_the_formula_follows():
    x = jax.random.uniform(jax.random.key(0), (300, 2), minval=-1.0)
    y = 2 * jnp.sin(3 * x[:, 0] + 0.2) * 1.0 + x[:, 1] ** 2
    params = kan.fix(kan.init(jax.random.key(1), [2, 1]), 0, 0, 0, "sin", numbers=[2.7, 0.0, 1.0, 0.0])
    params = kan.fix(params, 0, 1, 0, "x^2")
    params, info = kan.fit(params, x, y, update_grids=False)
    assert info["train"][-1] < 1e-5
    found = kan.formula(kan.simplify(params), ["a", "b"], digits=4)
    a, b = sympy.symbols("a b", real=True)
    assert found == [b**2 + 2 * sympy.sin(3 * a + sympy.Float(0.2, 15))]
    assert kan.latex(kan.simplify(params), ["a", "b"], digits=4) == [sympy.latex(found[0])]


def test_a_formula_is_the_network_products_and_affine_parts_too():
    params = kan.init(jax.random.key(0), [2, (1, 1), 1])
    x = jax.random.uniform(jax.random.key(1), (50, 2))
    for n, layer in enumerate(params.layers):
        for i in range(layer.width[0]):
            for o in range(layer.width[1]):
                params = kan.fix(params, n, i, o, "x^2", numbers=[1.0, 0.1 * i, 0.5 + o, 0.2])
    from jaxml.kan.network import Affine

    first = Affine(jnp.array([1.0, 2.0, 0.5]), jnp.array([0.1, 0.0, 0.2]), jnp.array([1.5, 1.0]), jnp.array([0.0, 1.0]))
    params = kan.KAN(params.layers, (first, ()), params.arities)
    written = kan.function(kan.formula(params, ["a", "b"]), ["a", "b"])
    np.testing.assert_allclose(written(x), kan.apply(params, x), rtol=1e-4)
    assert np.isfinite(jax.grad(lambda x: written(x).sum())(x)).all()


def test_what_is_wrong_is_told():
    params = kan.init(jax.random.key(0), [2, 1])
    x = jnp.zeros((20, 2))
    with pytest.raises(ValueError, match="a function is one of 0, x, x"):
        kan.fix(params, 0, 0, 0, "sine")
    with pytest.raises(ValueError, match=r"layer is in 0 … 0, got 1"):
        kan.fix(params, 1, 0, 0, "sin")
    with pytest.raises(ValueError, match=r"got \(0, 4\)"):
        kan.suggest(params, x, 0, 0, 4)
    with pytest.raises(ValueError, match="given or fitted"):
        kan.fix(params, 0, 0, 0, "sin", x=x, numbers=[1, 0, 1, 0])
    with pytest.raises(ValueError, match=r"splines on 2 edges"):
        kan.formula(params)
    with pytest.raises(ValueError, match="every symbol is an input, got z"):
        kan.function(sympy.Symbol("z"), ["x"])


@pytest.mark.slow
def test_data_become_a_formula_by_one_call():
    one, two = jax.random.split(jax.random.key(0))
    x = jax.random.uniform(one, (1000, 2), minval=-1.0)
    y = jnp.exp(jnp.sin(jnp.pi * x[:, 0]) + x[:, 1] ** 2)
    discovery = kan.discover(two, x, y, widths=[2, 5, 1], names=["x", "y"])
    assert str(discovery.formulas[0]) == "exp(y**2 + sin(3.1416*x))"


@pytest.mark.slow
def test_discovery_speaks_in_the_units_of_the_data():
    x = jax.random.uniform(jax.random.key(0), (300, 1), minval=100.0, maxval=300.0)
    y = 5e4 + 2e4 * jnp.exp(-x[:, 0] / 50)
    found = kan.discover(jax.random.key(1), x, y, widths=[1, 1], names=["t"], digits=3)
    t = sympy.Symbol("t", real=True)
    assert found.formulas == [20000 * sympy.exp(-sympy.Float(0.02, 15) * t) + 50000]
    deviation = float(jnp.std(y))
    for params in (found.params, found.splines):
        np.testing.assert_allclose(kan.apply(params, x)[:, 0], y, atol=1e-3 * deviation)
