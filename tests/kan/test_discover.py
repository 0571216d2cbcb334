"""What `discover` gives back where there is little or nothing to find, and what it refuses before it begins."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan
from jaxml.kan.prune import mask


@pytest.mark.slow
def test_a_constant_is_found():
    x = jax.random.uniform(jax.random.key(0), (40, 2), minval=-1.0)
    found = kan.discover(jax.random.key(1), x, jnp.full(40, 7.0), widths=[2, 1], functions=["x"], restarts=1)
    assert found.error < 1e-5
    formula = kan.function(found.formulas, ["x_1", "x_2"])
    for predict in (formula, lambda x: kan.apply(found.params, x), lambda x: kan.apply(found.splines, x)):
        np.testing.assert_allclose(predict(x), 7.0, rtol=1e-5)


def test_where_no_edge_is_left_the_mean_is():
    x = jax.random.uniform(jax.random.key(0), (40, 2), minval=-1.0)
    units = sys.modules["jaxml.kan.discover"]._Units.of(x, 100.0 + x[:, :1])
    empty = mask(kan.init(jax.random.key(1), [2, 1], base="zero"), x, [jnp.zeros((2, 1), bool)])
    empty = units.outside(empty)
    np.testing.assert_allclose(kan.apply(empty, x), jnp.mean(100.0 + x[:, 0]), rtol=1e-6)
    assert float(kan.formula(empty, digits=3)[0]) == 100.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(functions=["foo"]), "a function is one of"),
        (dict(functions=[]), "functions name one at least"),
        (dict(functions="foo"), "got 'foo'"),
        (dict(names=["a"]), "names are of the 2 inputs, got 1"),
        (dict(restarts=0), "there is a restart"),
        (dict(y=jnp.full(20, jnp.nan).at[1:].set(0.0)), "all values are finite, got 1 that are not"),
        (dict(x=jnp.zeros((0, 2)), y=jnp.zeros(0)), r"got \(0, 2\) and \(0, 1\)"),
    ],
)
def test_what_is_wrong_is_told_before_the_work_begins(given, said, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxml.kan.discover"], "fit", None)
    with pytest.raises(ValueError, match=said):
        kan.discover(jax.random.key(0), **(dict(x=jnp.ones((20, 2)), y=jnp.ones(20)) | given))


@pytest.mark.parametrize("call", [kan.auto_symbolic, kan.plot])
def test_samples_are_rows_of_finite_values(call):
    params = kan.init(jax.random.key(0), [2, 1])
    with pytest.raises(ValueError, match="rows"):
        call(params, jnp.full((5, 2), jnp.nan))
    with pytest.raises(ValueError, match="rows"):
        call(params, jnp.zeros((0, 2)))


def test_a_pruned_edge_has_nothing_to_fit():
    x = jax.random.normal(jax.random.key(1), (20, 2))
    pruned = mask(kan.init(jax.random.key(0), [2, 1]), x, [jnp.array([[True], [False]])])
    with pytest.raises(ValueError, match="is pruned, x has nothing to fit"):
        kan.fix(pruned, 0, 1, 0, "sin", x=x)
