"""Grids that follow samples of every kind, and finer grids for the same functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import kan

SAMPLES = 256
COLUMNS = {
    "constant": lambda rng: np.full(SAMPLES, 3.0),
    "zero": lambda rng: np.zeros(SAMPLES),
    "binary": lambda rng: rng.integers(0, 2, SAMPLES),
    "three values": lambda rng: rng.integers(0, 3, SAMPLES),
    "even": lambda rng: rng.uniform(-1, 1, SAMPLES),
    "heavy tails": lambda rng: rng.standard_t(1.5, SAMPLES),
    "one outlier": lambda rng: np.r_[1e6, rng.standard_normal(SAMPLES - 1)],
    "huge": lambda rng: 1e12 * rng.standard_normal(SAMPLES),
    "tiny": lambda rng: 1e-12 * rng.standard_normal(SAMPLES),
    "far from zero": lambda rng: 1e4 + rng.standard_normal(SAMPLES),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("eps", [1.0, 0.02])
def test_no_samples_give_nan(eps, dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(np.stack([column(rng) for column in COLUMNS.values()], axis=1), dtype)
        params = kan.init(jax.random.key(0), [len(COLUMNS), 2], grid=20, dtype=dtype)

        @jax.jit
        def run(params, x):
            new = kan.update(params, x, eps=eps)
            return new, kan.apply(new, x), jax.grad(lambda x: kan.apply(new, x).sum())(x)

        for rows in (SAMPLES, 3):  # fewer than functions as well
            new, y, slope = run(params, x[:rows])
            assert all(jnp.isfinite(a).all() for a in (y, slope, *jax.tree.leaves(new)))
            assert (jnp.diff(new.layers[0].points, axis=1) > 0).all()


@pytest.mark.parametrize("name", ["constant", "binary", "three values"])
def test_functions_stay_what_they_were(name):
    x = jnp.asarray(COLUMNS[name](np.random.default_rng(0))[:, None], jnp.float32)
    params = kan.init(jax.random.key(0), [1, 2, 1], grid=20)
    before, after = kan.apply(params, x), kan.apply(kan.update(params, x), x)
    np.testing.assert_allclose(after, before, atol=2e-3 * float(jnp.max(jnp.abs(before))))


def test_samples_that_are_not_finite_do_not_count():
    x = jnp.asarray([[0.0], [1.0], [jnp.nan], [jnp.inf], [2.0]])
    points = kan.update(kan.init(jax.random.key(0), [1, 1]), x, margin=0.0).layers[0].points
    np.testing.assert_allclose(points[0, [0, -1]], [0.0, 2.0])
    points = kan.update(kan.init(jax.random.key(0), [1, 1]), x[2:4]).layers[0].points
    assert jnp.isfinite(points).all()


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("uniform, order", [(True, 3), (True, 2), pytest.param(False, 3, marks=pytest.mark.slow)])
def test_a_multiple_of_the_cells_gives_the_same_function(uniform, order, dtype, atol):
    with jax.enable_x64(True):
        x = jax.random.uniform(jax.random.key(1), (300, 3), dtype, -1.0, 1.0)
        params = kan.init(jax.random.key(0), [3, 4, 2], order=order, grid=5, dtype=dtype)
        params = kan.update(params, x, eps=1.0 if uniform else 0.3)
        want = kan.apply(params, x)
        for cells in (10, 40):
            got = kan.apply(kan.refine(params, cells), x)
            np.testing.assert_allclose(got, want, atol=3 * atol * max(1.0, float(jnp.max(jnp.abs(want)))))


def test_the_optimizers_state_follows_as_gradients_do():
    x = jax.random.uniform(jax.random.key(1), (200, 2), minval=-1.0)
    params = kan.init(jax.random.key(0), [2, 1])
    tx = optax.adam(1e-2)

    def gradient(params):
        trained, rest = kan.split(params)
        return jax.grad(lambda t: jnp.mean(kan.apply(kan.combine(t, rest), x) ** 2))(trained)

    trained, _ = kan.split(params)
    _, state = tx.update(gradient(params), tx.init(trained))
    finer, moved = kan.refine(params, 10, state)
    # A step along the carried mean changes the function as a step along the old one did.
    shape = lambda s: s[0].mu.layers[0].coef.shape
    assert shape(state) == (8, 2, 1) and shape(moved) == (13, 2, 1)
    assert jax.tree.structure(moved[0].mu) == jax.tree.structure(kan.split(finer)[0])
    assert (moved[0].nu.layers[0].coef >= 0).all()
    back = kan.refine(finer, 10)
    np.testing.assert_allclose(back.layers[0].coef, finer.layers[0].coef, atol=1e-5)
    tx.update(gradient(finer), moved)


def test_bad_options_are_said():
    params = kan.init(jax.random.key(0), [1, 1])
    with pytest.raises(ValueError, match=r"eps and bend are in \[0, 1\], got 2"):
        kan.update(params, jnp.ones((3, 1)), eps=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        kan.refine(params, 0)
    periodic = kan.init(jax.random.key(0), [1, 1], outside="periodic")
    with pytest.raises(ValueError, match=r"cells of equal width all over, got eps=0\.5"):
        kan.update(periodic, jnp.ones((3, 1)), eps=0.5)


@pytest.mark.slow
def test_cells_gather_where_the_splines_bend():
    """A steep step: cells that follow the bends make a grid of 12 cells ten times better."""
    x = jnp.linspace(-1.0, 1.0, 400)[:, None]
    y = jnp.tanh(10 * x[:, 0])
    params, info = kan.fit(kan.init(jax.random.key(0), [1, 1]), x, y, grids=[12])
    for _ in range(2):
        params, after = kan.fit(kan.update(params, x, bend=0.7), x, y, update_grids=False)
    assert np.all(np.diff(params.layers[0].points) > 0)
    assert after["train"][-1] < 0.1 * info["train"][-1]


@pytest.mark.slow
def test_padded_grids_are_as_fine_and_keep_their_shape():
    x = jax.random.uniform(jax.random.key(0), (300, 2), minval=-1.0)
    y = jnp.sin(3 * x[:, 0]) * x[:, 1]
    start = kan.init(jax.random.key(2), [2, 3, 1], grid=3)
    params, padded = kan.fit(start, x, y, grids=[3, 6, 12], padded=True)
    _, plain = kan.fit(start, x, y, grids=[3, 6, 12])
    assert params.layers[0].spec.grid == 12
    assert padded["train"][-1] < 3 * plain["train"][-1]
    assert padded["train"][0] > 2 * padded["train"][-1]  # the first one is coarse
    with pytest.raises(ValueError, match=r"cells are 1 … 12"):
        kan.update(params, x, cells=13)


def test_no_samples_and_negative_margins_are_told():
    params = kan.init(jax.random.key(0), [2, 1])
    for x, margin in ((jnp.zeros((0, 2)), 0.0), (jnp.zeros((3, 2)), -1.0), (jnp.zeros((3, 2)), float("nan"))):
        with pytest.raises(ValueError, match="margin is at least 0 and there are samples"):
            kan.update(params, x, margin=margin)
    with pytest.raises(ValueError, match=r"the layer's 2 inputs, got shape \(3, 1\)"):
        kan.update(params, jnp.zeros((3, 1)))


@pytest.mark.parametrize("eps", [1.0, 0.3])
def test_without_a_margin_a_grid_ends_where_the_samples_do(eps):
    """To the last bit: a sample beyond lies on a straight line, whose second derivative is 0."""
    x = jax.random.normal(jax.random.key(0), (30, 64))
    points = kan.update(kan.init(jax.random.key(1), [64, 1]), x, eps=eps, margin=0.0).layers[0].points
    np.testing.assert_array_equal(points[:, [0, -1]], jnp.stack([x.min(axis=0), x.max(axis=0)], axis=1))


def test_integers_are_samples():
    params, x = kan.init(jax.random.key(0), [2, 3, 1]), jnp.array([[1, 0], [0, 1], [2, 3]])
    jax.tree.map(np.testing.assert_array_equal, kan.update(params, x), kan.update(params, x.astype(jnp.float32)))
