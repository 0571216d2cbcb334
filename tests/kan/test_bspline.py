"""Splines against scipy's: values and derivatives, on uniform and other grids, inside and outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.kan import bspline

interpolate = pytest.importorskip("scipy.interpolate")
CELLS = 7


def points_of(uniform):
    inner = np.random.default_rng(1).uniform(-1, 2, CELLS - 1)
    return np.linspace(-1, 2, CELLS + 1) if uniform else np.sort(np.r_[-1.0, inner, 2.0])


@pytest.mark.optimised
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("order", bspline.ORDERS)
def test_equals_scipy_in_value_and_two_derivatives(order, uniform):
    with jax.enable_x64(True):
        points = points_of(uniform)
        rng = np.random.default_rng(0)
        coef = rng.standard_normal(CELLS + order)
        knots = np.asarray(bspline.knots(jnp.asarray(points)[None], order))[0]
        reference = interpolate.BSpline(knots, coef, order, extrapolate=False)
        x = jnp.asarray(np.r_[rng.uniform(-1, 2, 50), points[1:-1]])  # knots as well

        def spline(x, outside="zero"):
            b = bspline.values(
                x.reshape(1, 1), jnp.asarray(points)[None], order=order, outside=outside, uniform=uniform
            )
            return jnp.tensordot(coef, b, (0, 1))[0, 0]

        orders = [spline, jax.grad(spline), jax.grad(jax.grad(spline))][: max(1, order)]  # where they are continuous
        got = jax.jit(lambda x: [jax.vmap(f)(x) for f in orders])(x)
        for n, derivative in enumerate(got):
            want = reference(x) if n == 0 else reference.derivative(n)(x)
            np.testing.assert_allclose(derivative, want, atol=1e-12 * 30**n)
        if order > 1:
            slope = reference.derivative()
            outside = jax.jit(lambda x: [jax.vmap(lambda x: spline(x, how))(x) for how in ("linear", "clamp")])
            at, end = np.array([3.5, -1.5]), np.array([2.0, -1.0])
            straight, flat = outside(jnp.asarray(at))
            np.testing.assert_allclose(straight, reference(end) + slope(end) * (at - end), atol=1e-11)
            np.testing.assert_allclose(flat, reference(end), atol=1e-12)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("outside", bspline.OUTSIDE)
def test_one_by_one_they_are_the_same_and_add_up_to_one(order, outside):
    points = jnp.asarray([[-1.0, 1.0], [0.0, 4.0]])[:, :1] + jnp.linspace(0, 1, 9)[None] * jnp.asarray([[2.0], [4.0]])
    x = jax.random.uniform(jax.random.key(0), (3, 50, 2), minval=-2.0, maxval=5.0)
    options = dict(order=order, outside=outside)
    both, each = jax.jit(lambda x: (bspline.values(x, points, **options), bspline.each(x, points, **options)))(x)
    np.testing.assert_allclose(both, np.stack(each, -2), atol=1e-6)
    assert both.shape == (3, 50, bspline.size(8, order, outside), 2)
    inside = (x >= points[:, 0][None, None]) & (x <= points[:, -1][None, None])
    inside = inside if outside == "zero" else jnp.ones_like(inside)
    np.testing.assert_allclose(jnp.where(inside, both.sum(-2), 1.0), 1.0, atol=2e-6)


def test_a_periodic_spline_has_a_period():
    points = jnp.linspace(-1.0, 1.0, 9)[None]
    x = jnp.linspace(-1.0, 1.0, 41)[:, None]
    b = lambda x: bspline.values(x, points, order=3, outside="periodic")
    np.testing.assert_allclose(b(x), b(x + 6.0), atol=1e-5)
    with pytest.raises(ValueError, match="more cells than its order 3, got 3"):
        bspline.values(x, jnp.linspace(-1.0, 1.0, 4)[None], order=3, outside="periodic")
    with pytest.raises(ValueError, match="on uniform grids only"):
        bspline.values(x, points, order=3, outside="periodic", uniform=False)


@pytest.mark.parametrize("outside", ["linear", "clamp"])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("order", bspline.ORDERS)
def test_at_the_ends_of_a_grid_derivatives_are_those_from_within(order, uniform, outside):
    """Where minima and maxima would halve them, and where the cell beyond has other ones."""
    with jax.enable_x64(True):
        points = jnp.asarray(points_of(uniform))[None]
        coef = np.random.default_rng(2).standard_normal(CELLS + order)

        def spline(x):
            b = bspline.values(x.reshape(1, 1), points, order=order, outside=outside, uniform=uniform)
            return jnp.tensordot(coef, b, (0, 1))[0, 0]

        orders = [spline, jax.grad(spline), jax.grad(jax.grad(spline))]
        at = jax.jit(lambda x: [jax.vmap(f)(x) for f in orders])
        near = 1e-9
        for got, want in zip(at(jnp.array([-1.0, 2.0])), at(jnp.array([-1.0 + near, 2.0 - near]))):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        beyond = jnp.array([-1.5, 2.5])
        slope = at(jnp.array([-1.0, 2.0]))[1] if outside == "linear" else 0
        np.testing.assert_allclose(at(beyond)[1], slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("outside", ["linear", "clamp"])
@pytest.mark.parametrize(("order", "cells"), [(1, 5), (2, 5), (3, 10), (5, 20)])
def test_the_last_point_of_a_grid_lies_on_it_however_its_place_is_rounded(order, cells, outside):
    """In float32 one in a hundred grids puts its last point a bit beyond its last cell."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-3.0, 3.0, 500).astype(np.float32)
    high = (low + rng.uniform(0.5, 4.0, 500)).astype(np.float32)
    width = high - low
    assert np.any(np.float32(order) + width * (np.float32(cells) / width) > order + cells)
    points = np.linspace(low, high, cells + 1, axis=1, dtype=np.float32)
    coef = rng.standard_normal(cells + order)

    @jax.jit
    def derivatives(x, points):
        c = jnp.asarray(coef, x.dtype)
        of = lambda x: jnp.einsum("k,ki->i", c, bspline.values(x, points, order=order, outside=outside))
        return [bspline.derivative(of, n)(x) for n in range(3)]

    got = derivatives(jnp.asarray(high), jnp.asarray(points))
    with jax.enable_x64(True):
        exact = jnp.asarray(points, jnp.float64)
        want = derivatives(exact[:, -1] - 1e-9 * width, exact)
    for n, (a, b) in enumerate(zip(map(np.asarray, got), map(np.asarray, want))):
        np.testing.assert_allclose(a * (width / cells) ** n, b * (width / cells) ** n, atol=1e-3)


def test_a_whole_turn_less_a_rounding_is_a_place_on_a_periodic_grid():
    b = bspline.values(jnp.array([[-1e-9]]), jnp.linspace(0.0, 5.0, 6)[None], order=0, outside="periodic")
    assert float(b.sum()) == 1.0
