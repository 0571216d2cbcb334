"""Training: errors that splines can reach, every method, restarts, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import kan
from jaxml.kan.fit import _anew


def samples(f, count=500, inputs=2, seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (count, inputs))
    return x, f(x)


@pytest.mark.slow
def test_levenberg_marquardt_reaches_what_the_grid_allows():
    f = lambda x: np.exp(np.sin(np.pi * x[:, 0]) + x[:, 1] ** 2)
    with jax.enable_x64(True):
        params = kan.init(jax.random.key(0), [2, 1, 1], grid=5, dtype=jnp.float64)
        _, info = kan.fit(params, *samples(f), grids=[5, 10], held_out=samples(f, seed=1))
    assert info["held_out"][1] < 6e-4 and info["grids"] == [5, 10]
    assert [len(losses) for losses in info["losses"]] == [120, 40]
    assert all(np.diff(losses[-40:]).max() <= 0 for losses in info["losses"])


def test_a_product_needs_one_multiplying_node():
    with jax.enable_x64(True):
        params = kan.init(jax.random.key(1), [2, (0, 1), 1], dtype=jnp.float64)
        _, info = kan.fit(params, *samples(lambda x: x[:, 0] * x[:, 1]), steps=80)
    assert info["train"][-1] < 1e-4


METHODS = {
    "lm": dict(method="lm"),
    "lbfgs": dict(method="lbfgs", steps=150),
    "adam": dict(method=optax.adam(2e-2), steps=600),
    "adam, small batches": dict(method=optax.adam(1e-2), steps=800, batch_size=64),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_in_float32(name):
    x, y = samples(lambda x: np.stack([np.sin(2 * x[:, 0]) + x[:, 1], x[:, 0] ** 2], axis=1))
    params, info = kan.fit(kan.init(jax.random.key(0), [2, 4, 2]), x, y, **METHODS[name])
    assert info["train"][-1] < 0.05 and params.layers[0].coef.dtype == jnp.float32


def test_fine_cells_without_samples_stay_in_line():
    x, y = samples(lambda x: np.sin(3 * x[:, 0]), count=40, inputs=1)
    test = samples(lambda x: np.sin(3 * x[:, 0]), count=500, inputs=1, seed=1)
    fit = lambda smooth: kan.fit(kan.init(jax.random.key(0), [1, 1]), x, y, grids=[100], smooth=smooth, held_out=test)[
        1
    ]
    assert fit(1e-2)["held_out"][-1] < 2e-2 < 0.3 * fit(0.0)["held_out"][-1] + 2e-2


def test_the_best_of_restarts_is_kept():
    x, y = samples(lambda x: (x[:, 0] + x[:, 1]) / (1 + x[:, 0] * x[:, 1] * 0.9))
    one = kan.fit(kan.init(jax.random.key(0), [2, 1, 1]), x, y, steps=5)[1]["train"][-1]
    many = kan.fit(kan.init(jax.random.key(0), [2, 1, 1]), x, y, steps=5, restarts=4)[1]["train"][-1]
    assert many <= one


def test_bad_input_is_said():
    params = kan.init(jax.random.key(0), [2, 1])
    x, y = samples(lambda x: x[:, 0])
    with pytest.raises(ValueError, match=r"x and y are \[N, 2\] and \[N, 1\] for these widths, got \(500, 3\)"):
        kan.fit(params, np.ones((500, 3)), y)
    with pytest.raises(ValueError, match=r"all values are finite, got 1 in y \(x and y\)"):
        kan.fit(params, x, np.r_[np.nan, y[1:]])
    with pytest.raises(ValueError, match="method is one of lm, lbfgs or an Optax optimizer, got 'sgd'"):
        kan.fit(params, x, y, method="sgd")
    with pytest.raises(ValueError, match="trains at most 6000 numbers, got"):
        kan.fit(kan.init(jax.random.key(0), [2, 333, 1]), x, y, grids=[5], update_grids=False)


def test_rows_that_make_up_a_chunk_do_not_count():
    """300 rows are two chunks of 256; log has no value at 0, which padding would be."""
    x = jax.random.uniform(jax.random.key(0), (300, 1), minval=1.0, maxval=2.0)
    params = kan.fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, "log")
    _, info = kan.fit(params, x, 3 * jnp.log(1.5 * x) + 0.5, update_grids=False)
    assert info["train"][-1] < 1e-5


def test_a_network_without_finite_values_on_the_samples_is_told():
    x, y = samples(lambda x: x[:, 0], count=20, inputs=1)
    params = kan.fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, "log")
    with pytest.raises(ValueError, match=r"finite values on the samples, got an error of nan\. A function fixed"):
        kan.fit(params, x, y, steps=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(batch_size=16), "batch_size is of an Optax optimizer, got it with method='lm'"),
        (dict(steps=0), "steps and batch_size at least 1"),
        (dict(steps=2.5), "steps and batch_size at least 1 and whole, got .* 2.5"),
        (dict(smooth=-1.0), "sparse and entropy are at least 0"),
        (dict(smooth=float("nan")), "sparse and entropy are at least 0"),
        (dict(method=3), "method is one of lm, lbfgs or an Optax optimizer, got 3"),
        (dict(restarts=0), "at least 1, got 0"),
        (dict(grids=[]), r"one at least, got \[\]"),
        (dict(grids=[3.7]), r"whole numbers of cells, one at least, got \[3.7\]"),
        (dict(patience=1), "patience looks at held_out"),
    ],
)
def test_arguments_that_do_nothing_or_harm_are_refused(given, said):
    x, y = samples(lambda x: x[:, 0], count=20)
    with pytest.raises(ValueError, match=said):
        kan.fit(kan.init(jax.random.key(0), [2, 1]), x, y, **given)


def test_a_basis_without_a_grid_refuses_grids():
    x, y = samples(lambda x: x[:, 0], count=20)
    with pytest.raises(ValueError, match="the basis 'chebyshev' has no grid to refine"):
        kan.fit(kan.init(jax.random.key(0), [2, 1], basis="chebyshev"), x, y, grids=[5, 10])


def test_narrow_networks_are_told_to_take_another_method():
    x, y = samples(lambda x: x[:, 0], count=20)
    with pytest.raises(ValueError, match="'lm' solves in float32 or float64, got bfloat16"):
        kan.fit(kan.init(jax.random.key(0), [2, 1], dtype=jnp.bfloat16), x, y)


def test_a_checkpoint_tells_optimizers_functions_and_numbers_apart(tmp_path):
    x, y = samples(lambda x: jnp.sin(x[:, 0]), count=20, inputs=1)
    params = kan.init(jax.random.key(0), [1, 1])
    one = dict(params=params, method=optax.adam(1e-2), steps=np.int64(2), patience=np.int64(1), held_out=(x, y))
    fixed = [dict(params=kan.fix(params, 0, 0, 0, name)) for name in ("sin", "cos")]
    others = [dict(method=optax.adam(1e-3)), dict(method=optax.sgd(1e-2)), dict(steps=np.int64(3)), *fixed]
    for folder, options in (("first", {}), ("fixed", fixed[0])):
        fit = lambda more: kan.fit(x=x, y=y, checkpoint=tmp_path / folder, **(one | more))
        jax.tree.map(np.testing.assert_array_equal, fit(options), fit(options))
        for other in others:
            if other is not options:
                with pytest.raises(ValueError, match="of another fit"):
                    fit(other)


def test_numbers_of_numpy_and_jax_are_numbers():
    x, y = samples(lambda x: x[:, 0], count=20)
    params = kan.init(jax.random.key(0), np.array([2, 1]))
    _, info = kan.fit(params, x, y, grids=np.array([3, 5]), smooth=jnp.float32(0.1), steps=2)
    assert info["grids"] == [3, 5]


def test_an_optimizer_with_a_line_search_is_given_what_it_looks_at():
    x, y = samples(lambda x: x[:, 0] * x[:, 1], count=100)
    _, info = kan.fit(kan.init(jax.random.key(0), [2, 3, 1]), x, y, method=optax.lbfgs(), steps=60)
    assert info["train"][-1] < 0.02


@pytest.mark.slow
def test_grids_that_are_not_even_stay_so():
    x, y = samples(lambda x: jnp.tanh(8 * x[:, 0]), count=200, inputs=1)
    params, _ = kan.fit(kan.init(jax.random.key(0), [1, 1]), x, y, steps=5)
    params, _ = kan.fit(kan.update(params, x, bend=0.5), x, y, steps=5, grids=[5, 10])
    assert not params.layers[0].spec.uniform
    with pytest.raises(ValueError, match="padded grids follow their input, got cells that are not equally wide"):
        kan.fit(params, x, y, padded=True)


def test_a_restart_without_finite_values_does_not_replace_the_first_fit():
    """Random numbers inside a logarithm are negative now and then."""
    x = jax.random.uniform(jax.random.key(0), (20, 1), minval=1.0, maxval=2.0)
    params = kan.fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, "log")
    alone, again = (kan.fit(params, x, jnp.log(x) + 1, steps=3, restarts=n)[1]["train"][-1] for n in (1, 6))
    assert again <= alone


def test_a_restarted_single_edge_has_a_base():
    params = kan.init(jax.random.key(0), [1, 1], grid=1, order=1)
    assert float(jnp.abs(_anew(params, jax.random.key(1)).layers[0].base).min()) > 0
