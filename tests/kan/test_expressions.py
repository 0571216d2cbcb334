"""Names and expressions as people write them, and what cannot be read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan


def a_formula():
    params = kan.init(jax.random.key(0), [2, 1])
    params = kan.fix(params, 0, 0, 0, "sin", numbers=[2.0, 0.0, 1.0, 0.0])
    return kan.fix(params, 0, 1, 0, "x", numbers=[1.0, 0.0, 3.0, 0.0])


@pytest.mark.parametrize("names", [["body mass", "x:3"], ["a,b", "lambda"], ["x", "I"]], ids=str)
def test_a_name_is_one_symbol_whatever_it_holds(names):
    (expression,) = kan.formula(a_formula(), names)
    assert sorted(s.name for s in expression.free_symbols) == sorted(names)
    x = jax.random.normal(jax.random.key(1), (5, 2))
    np.testing.assert_allclose(kan.function(expression, names)(x), kan.apply(a_formula(), x), rtol=1e-5)


@pytest.mark.parametrize("names", [["a", "a"], ["", "b"]], ids=str)
def test_a_name_that_stands_for_two_inputs_is_refused(names):
    with pytest.raises(ValueError, match="every input has a name of its own"):
        kan.formula(a_formula(), names)


def test_integers_are_numbers():
    assert float(kan.function("x/2", ["x"])(jnp.array([[1]]))[0, 0]) == 0.5


@pytest.mark.parametrize("text", ["erf(x)", "gamma(x + 2)", "loggamma(x + 2) + erfc(x)"])
def test_special_functions_are_those_of_jax(text):
    x = jnp.array([[0.3]])
    params = kan.from_formula(text, ["x"])
    np.testing.assert_allclose(kan.apply(params, x), kan.function(text, ["x"])(x), rtol=1e-5)


def test_a_number_is_a_network_too():
    assert float(kan.apply(kan.from_formula(3, ["x"]), jnp.ones((1, 1)))[0, 0]) == 3.0


@pytest.mark.parametrize("make", [kan.from_formula, kan.function])
@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("x >", ["x"], "SymPy reads every expression, got 'x >'"),
        ("", ["x"], "SymPy reads every expression"),
        ("x > y", ["x", "y"], "a real number for real inputs"),
        ("sqrt(-1)*x", ["x"], "a real number for real inputs"),
        ("x + z", ["x"], "every symbol is an input, got z"),
        ("besselj(0, x)", ["x"], "functions"),
        ("zeta(x)", ["x"], "functions are those that JAX has"),
        ("3", [], "every input has a name of its own"),
    ],
)
def test_what_cannot_be_read_or_computed_is_told(make, text, names, said):
    with pytest.raises(ValueError, match=said):
        make(text, names)
