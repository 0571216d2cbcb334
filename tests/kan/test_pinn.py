import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan
from jaxml.kan import pinn


def test_the_laplacian_is_the_trace_of_the_hessian():
    u = lambda x: jnp.sin(x[0]) * x[1] ** 3 + x[2]
    x = jnp.array([0.3, 0.7, 0.1])
    np.testing.assert_allclose(pinn.laplacian(u, x), jnp.trace(jax.hessian(u)(x)), rtol=1e-5)


@pytest.mark.slow
def test_an_equation_of_two_dimensions_is_solved():
    """u_xx + u_yy = −2 sin x cos y with its values on the boundary of a square."""
    exact = lambda x: jnp.sin(x[..., 0]) * jnp.cos(x[..., 1])
    inside = lambda u, x: pinn.laplacian(u, x) + 2 * exact(x)
    boundary = lambda u, x: u(x) - exact(x)
    side, one = np.linspace(-1, 1, 12), np.ones(12)
    edges = np.concatenate([np.stack(p, 1) for p in ((side, one), (side, -one), (one, side), (-one, side))])
    points = jax.random.uniform(jax.random.key(0), (100, 2), minval=-1.0)
    params = kan.init(jax.random.key(1), [2, 3, 1], grid=4)
    params, info = pinn.solve(
        params, [(inside, points, 0.1), (boundary, jnp.asarray(edges, jnp.float32), 1.0)], steps=20
    )
    test = jax.random.uniform(jax.random.key(2), (200, 2), minval=-1.0)
    np.testing.assert_allclose(kan.apply(params, test)[:, 0], exact(test), atol=2e-2)
    assert info["losses"][-1][-1] < 1e-3


def test_attention_follows_the_residuals():
    w = jnp.zeros(3)
    for _ in range(2000):
        w = pinn.attention_weights(w, jnp.array([1.0, 0.5, 0.0]))
    assert w[0] > 1.9 * w[1] > 0 and w[2] == 0
    assert np.all(np.isfinite(pinn.attention_weights(w, jnp.zeros(3))))


def test_points_are_drawn_where_residuals_are_large():
    x = jnp.linspace(0.0, 1.0, 1000)[:, None]
    drawn = pinn.resample(jax.random.key(0), x, jnp.where(x[:, 0] > 0.9, 10.0, 0.01), 100, floor=0.0)
    assert np.mean(drawn > 0.9) > 0.9 and len(np.unique(drawn)) == 100
    with pytest.raises(ValueError, match="at most the 1000"):
        pinn.resample(jax.random.key(0), x, x[:, 0], 1001)


def test_later_times_wait_for_earlier_ones():
    w = pinn.causal_weights(jnp.array([0.5, 1.0, 2.0]), 2.0)
    np.testing.assert_allclose(w, np.exp([0.0, -1.0, -3.0]), rtol=1e-5)
    assert np.all(jax.jacobian(pinn.causal_weights)(jnp.ones(3)) == 0)


def test_annealed_terms_pull_equally():
    grads = [{"a": jnp.array([30.0])}, {"a": jnp.array([0.1])}]
    w = pinn.annealed(jnp.ones(2), grads, decay=0.0)
    np.testing.assert_allclose(w[0] * 30, w[1] * 0.1, rtol=1e-5)


def test_points_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match=r"points \[N, 2\]"):
        pinn.solve(kan.init(jax.random.key(0), [2, 1]), [(lambda u, x: u(x), jnp.zeros((4, 3)), 1.0)])


def test_the_number_of_points_is_any():
    """u'' + u' / r = 4 has no value at 0, which rows that make up a chunk would be."""
    r = jnp.linspace(0.1, 1.0, 257)[:, None]
    slope = lambda u: lambda x: jax.grad(u)(x)[0]
    equation = lambda u, x: jax.grad(slope(u))(x)[0] + slope(u)(x) / x[0] - 4
    terms = [(equation, r, 1.0), (lambda u, x: u(x) - x[0] ** 2, r[jnp.array([0, -1])], 100.0)]
    params, _ = pinn.solve(kan.init(jax.random.key(0), [1, 1], domain=(0.1, 1.0)), terms, grids=[5], steps=30)
    np.testing.assert_allclose(kan.apply(params, r), r**2, atol=1e-3)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ([], "there are terms, their weights and smooth at least 0"),
        ([(lambda u, x: u(x), jnp.ones((3, 1)), -1.0)], "weights and smooth at least 0"),
        ([(lambda u, x: u(x), jnp.ones((3, 1)), float("nan"))], "weights and smooth at least 0"),
        ([(lambda u, x: u(x) / x[0], jnp.zeros((3, 1)), 1.0)], "residuals are finite at all points, got"),
    ],
)
def test_what_cannot_be_solved_is_told(terms, said):
    with pytest.raises(ValueError, match=said):
        pinn.solve(kan.init(jax.random.key(0), [1, 1]), terms, steps=3)


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        ({}, dict(steps=0), "steps at least 1, got .* 0"),
        ({}, dict(smooth=-1.0), "smooth at least 0"),
        ({}, dict(grids=[]), r"kan.pinn.solve: grids are whole numbers of cells, one at least, got \[\]"),
        (dict(basis="chebyshev"), dict(grids=[3, 10]), "kan.pinn.solve: the basis 'chebyshev' has no grid to refine"),
        (dict(dtype=jnp.bfloat16), {}, "solves in float32 or float64, got bfloat16"),
    ],
)
def test_options_of_solve_that_do_nothing_or_harm_are_refused(made, given, said):
    with pytest.raises(ValueError, match=said):
        pinn.solve(kan.init(jax.random.key(0), [1, 1], **made), [(lambda u, x: u(x), jnp.ones((3, 1)), 1.0)], **given)


def test_uneven_grids_stay_so_and_numbers_of_jax_are_numbers():
    x = jnp.linspace(-1.0, 1.0, 20)[:, None]
    params = kan.update(kan.init(jax.random.key(0), [1, 1]), x, bend=0.5)
    one = jnp.float32(1.0)
    solved, _ = pinn.solve(params, [(lambda u, x: u(x) - x[0], x, one)], steps=2, smooth=1e-5 * one)
    assert not solved.layers[0].spec.uniform
    np.testing.assert_array_equal(solved.layers[0].points, params.layers[0].points)
