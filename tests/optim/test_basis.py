"""Bases of the subspace of a gradient: what they capture, and gradients on which a decomposition breaks down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.optim import basis

M, N, RANK = 60, 90, 12


@pytest.fixture(scope="module")
def gradient():
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.standard_normal((M, M)))[0], np.linalg.qr(rng.standard_normal((N, M)))[0]
    return jnp.asarray((u * np.arange(1.0, M + 1) ** -1.0) @ v.T, jnp.float32)


def random(seed, shape=(M, RANK)):
    return jax.random.normal(jax.random.key(seed), shape)


def test_svd_gives_the_leading_directions_with_canonical_signs(gradient):
    p = basis.svd(gradient, RANK)
    largest = np.abs(p).argmax(axis=0)
    assert (np.asarray(p)[largest, np.arange(RANK)] > 0).all()
    np.testing.assert_allclose(p, basis.svd(-gradient, RANK), atol=1e-5)
    s = np.linalg.svd(gradient, compute_uv=False)
    np.testing.assert_allclose(basis.captured(gradient, p), sum(s[:RANK] ** 2) / sum(s**2), rtol=1e-5)


def test_the_cheap_methods_capture_nearly_what_svd_does(gradient):
    best = basis.captured(gradient, basis.svd(gradient, RANK))
    assert basis.captured(gradient, basis.rsvd(gradient, random(0, (M, RANK + 10)), RANK)) > 0.999 * best
    p = random(1)
    for _ in range(basis.FIRST):
        p = basis.power(gradient, p)
    assert basis.captured(gradient, p) > 0.98 * best
    turned = gradient + 5e-4 * random(2, (M, N))
    assert basis.captured(turned, basis.power(turned, basis.svd(gradient, RANK))) > 0.999 * best


UGLY = {
    "zero": lambda g: 0 * g,
    "one direction": lambda g: jnp.outer(g[:, 0], g[0]),
    "tiny": lambda g: 1e-30 * g,
    "huge": lambda g: 1e30 * g,
    "one element": lambda g: (0 * g).at[3, 4].set(1.0),
    "one row a million times larger": lambda g: g.at[7].multiply(1e6),
}


@pytest.mark.parametrize("name", UGLY)
def test_every_gradient_gives_an_orthonormal_basis(gradient, name):
    g = UGLY[name](gradient)
    start = basis.orthonormal(random(3))
    for p in (basis.power(g, start), basis.power(g, random(3)), basis.rsvd(g, random(0, (M, RANK + 10)), RANK)):
        np.testing.assert_allclose(p.T @ p, np.eye(RANK), atol=3e-5)


def test_a_zero_gradient_leaves_the_basis_where_it_is(gradient):
    start = basis.orthonormal(random(3))
    np.testing.assert_allclose(basis.power(0 * gradient, start), start, atol=1e-5)


def test_overlap():
    p = basis.orthonormal(random(0))
    q = basis.orthonormal(random(1))
    np.testing.assert_allclose(basis.overlap(p, p), 1.0, atol=1e-5)
    np.testing.assert_allclose(basis.overlap(q - p @ (p.T @ q), p), 0.0, atol=1e-5)
