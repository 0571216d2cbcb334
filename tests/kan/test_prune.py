import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan
from jaxml.kan.prune import mask

X = jax.random.uniform(jax.random.key(0), (200, 3), minval=-1.0)


def test_nodes_that_count_for_nothing_go_and_the_function_stays():
    params = kan.init(jax.random.key(1), [3, 4, 2])
    first, last = params.layers
    last = dataclasses.replace(last, mask=last.kept.at[1].set(0).at[3].set(0))
    params = dataclasses.replace(params, layers=(first, last))
    smaller = kan.prune_nodes(params, X)
    assert smaller.widths == (3, 2, 2)
    np.testing.assert_allclose(kan.apply(smaller, X), kan.apply(params, X), atol=1e-6)


def test_products_are_kept_with_all_their_factors():
    params = kan.init(jax.random.key(1), [3, (2, [2, 3]), 1])
    smaller = kan.keep(params, X, [[1, 3]])
    assert smaller.widths == (3, (1, (3,)), 1)
    with_both = kan.keep(params, X, [[0, 1, 2, 3]])
    np.testing.assert_allclose(kan.apply(with_both, X), kan.apply(params, X), atol=1e-6)


def test_the_mean_of_a_removed_edge_stays():
    params = kan.init(jax.random.key(1), [3, 1])
    masked = mask(params, X, [jnp.array([[True], [False], [True]])])
    assert float(masked.layers[0].mask.sum()) == 2
    np.testing.assert_allclose(jnp.mean(kan.apply(masked, X)), jnp.mean(kan.apply(params, X)), atol=1e-6)


def test_inputs_that_do_not_count_are_left_out():
    params = kan.init(jax.random.key(1), [3, 2, 1])
    first, last = params.layers
    params = dataclasses.replace(params, layers=(dataclasses.replace(first, mask=first.kept.at[1].set(0)), last))
    smaller, kept = kan.prune_inputs(params, X)
    assert kept == [0, 2]
    np.testing.assert_allclose(kan.apply(smaller, X[:, [0, 2]]), kan.apply(params, X), atol=1e-6)


def test_fixed_functions_move_with_their_nodes():
    params = kan.fix(kan.init(jax.random.key(1), [3, 3, 1]), 0, 2, 2, "exp", numbers=[1.0, 0.0, 1.0, 0.0])
    smaller = kan.keep(params, X, [[2]])
    (edge,) = smaller.layers[0].fixed
    assert (edge.into, edge.out) == (2, 0)


@pytest.mark.parametrize("kept", [[], [[]], [[0, 5]], [[0, 0]]])
def test_nodes_that_do_not_exist_are_told(kept):
    with pytest.raises(ValueError, match=r"kan\.keep"):
        kan.keep(kan.init(jax.random.key(1), [3, 4, 2]), X, kept)


def test_of_a_layer_without_any_important_node_the_best_stays():
    assert kan.prune(kan.init(jax.random.key(1), [3, 4, 1]), X, node=1e9, edge=0.0).widths == (3, 1, 1)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (jnp.zeros((1, 2)), "in rows that are not all equal, got 0 not finite in 1 rows"),
        (jnp.ones((5, 2)), "in rows that are not all equal, got 0 not finite in 5 rows"),
        (jnp.array([[0.0, 1.0], [jnp.nan, 0.0], [1.0, 1.0]]), "finite values only, .*, got 1 not finite in 3 rows"),
    ],
)
def test_samples_that_cannot_tell_what_counts_are_refused(x, said):
    params = kan.init(jax.random.key(0), [2, 2, 1])
    for function in (kan.prune, kan.prune_inputs):
        with pytest.raises(ValueError, match=said):
            function(params, x)
