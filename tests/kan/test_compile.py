import jax
import numpy as np
import pytest

from jaxml import kan

sympy = pytest.importorskip("sympy")
X = jax.random.uniform(jax.random.key(0), (64, 3), minval=0.2, maxval=0.9)
FORMULAS = [
    "exp(sin(pi*x) + y**2)", "x*y", "x*y*z + 2", "sqrt(x**2 + y**2)/z", "x/(1 + exp(-y))*cos(x*y - z)", "3", "x",
    "(x + y)*(y - z)**2*exp(-x)", "sinh(x) + y**z", "2**x - log(y)", "x**0.3 + Abs(y - 0.5)", "sin(x)*sin(x) + x",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_the_network_is_the_formula(text):
    params = kan.from_formula(text, ["x", "y", "z"])
    want = kan.function(sympy.sympify(text), ["x", "y", "z"])(X)
    np.testing.assert_allclose(kan.apply(params, X), want, rtol=2e-4, atol=2e-5)
    back = kan.function(kan.formula(params, ["x", "y", "z"]), ["x", "y", "z"])(X)
    np.testing.assert_allclose(back, want, rtol=2e-4, atol=2e-5)


def test_several_outputs_share_their_nodes():
    params = kan.from_formula(["exp(x + y)", "sin(x + y)"], ["x", "y"])
    assert params.widths == (2, 1, 2)


def test_products_are_multiplying_nodes():
    assert kan.from_formula("x*y*z", ["x", "y", "z"]).widths == (3, (0, (3,)), 1)


@pytest.mark.slow
def test_a_loosened_network_starts_as_the_formula_and_trains():
    params = kan.from_formula("exp(sin(pi*x) + y**2)", ["x", "y", "z"])
    loose = kan.loosen(params, X, grid=10)
    assert not any(layer.fixed for layer in loose.layers)
    np.testing.assert_allclose(kan.apply(loose, X), kan.apply(params, X), atol=5e-3)
    fitted, info = kan.fit(loose, X, 1.1 * kan.apply(params, X), steps=10)
    assert info["train"][-1] < 1e-3
    assert [np.asarray(layer.kept).sum() for layer in fitted.layers] == [2, 1]


def test_unknown_symbols_are_told():
    with pytest.raises(ValueError, match="got w beside"):
        kan.from_formula("w + x", ["x"])
    with pytest.raises(ValueError, match="one argument"):
        kan.from_formula(sympy.Function("f")(sympy.Symbol("x"), sympy.Symbol("y")), ["x", "y"])
