"""Training: errors that splines can reach, every method, restarts, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import kan


def samples(f, count=500, inputs=2, seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (count, inputs))
    return x, f(x)


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
