import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan
from jaxml.kan import attribution
from jaxml.kan import layer as layers

X = jax.random.normal(jax.random.key(0), (100, 3))


@pytest.fixture(scope="module")
def params():
    return kan.init(jax.random.key(1), [3, (4, 2), 2], outside="zero")


def test_spread_of_an_edge_is_the_deviation_of_its_values(params):
    for layer, spread in zip(params.layers[:1], attribution.spreads(params, X)):
        np.testing.assert_allclose(spread.edges, jnp.std(layers.edges(layer, X), axis=0, ddof=1), rtol=1e-4)


def test_spread_counts_fixed_functions_for_edges_but_not_for_splines(params):
    fixed = kan.fix(params, 0, 1, 2, "sin", numbers=[2.0, 0.0, 1.5, 0.0])
    spread = attribution.spreads(fixed, X)[0]
    assert spread.splines[1, 2] == 0
    np.testing.assert_allclose(spread.edges[1, 2], jnp.std(1.5 * jnp.sin(2 * X[:, 1]), ddof=1), rtol=1e-5)


def test_scores_of_a_layer_without_waste_are_shares_of_the_output():
    """Of independent inputs that are summed by one linear layer, squared scores add up to 1."""
    x = jax.random.normal(jax.random.key(0), (20000, 2))
    params = kan.init(jax.random.key(1), [2, 1], base="identity")
    layer = dataclasses.replace(params.layers[0], coef=0 * params.layers[0].coef, base=jnp.array([[3.0], [4.0]]))
    params = dataclasses.replace(params, layers=(layer,))
    np.testing.assert_allclose(kan.attribute(params, x).nodes[0], [0.6, 0.8], rtol=2e-2)


@pytest.mark.parametrize("metric", attribution.METRICS)
def test_penalty_has_finite_gradients_also_of_constant_inputs(params, metric):
    x = X.at[:, 1].set(0.3)
    value, grads = jax.jit(jax.value_and_grad(lambda p: kan.regularizer(p, x, metric=metric, coef=0.1, coef_diff=0.1)))(
        params
    )
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_layer_and_metric_that_do_not_exist_are_told(params):
    with pytest.raises(ValueError, match="1 … 2, got 3"):
        kan.attribute(params, X, layer=3)
    with pytest.raises(ValueError, match="metric is one of edge_forward"):
        kan.regularizer(params, X, metric="edges")


def test_interactions_name_the_inputs_that_meet():
    params = kan.init(jax.random.key(0), [3, 2, 1])
    first = dataclasses.replace(params.layers[0], mask=jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    params = dataclasses.replace(params, layers=(first, params.layers[1]))
    assert kan.interactions(params, X, 1, node=0.0) == {(0, 1): 1, (2,): 1}


def test_penalty_makes_no_array_of_samples_inputs_and_outputs():
    """Its temporary memory does not grow with the outputs as the batch does."""
    x = jnp.zeros((1024, 64))

    def memory(outputs):
        params = kan.init(jax.random.key(0), [64, outputs])
        grad = jax.jit(jax.grad(lambda p: kan.regularizer(p, x)))
        return grad.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory(256) - memory(64) < 0.25 * 4 * 1024 * 64 * (256 - 64)
