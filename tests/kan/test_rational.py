import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.kan import rational


def test_it_starts_as_the_identity_and_every_coefficient_can_move():
    params = rational.init(jax.random.key(0), (16, 4))
    x = jax.random.normal(jax.random.key(1), (64, 16))
    np.testing.assert_allclose(rational.functions(params, x), x, atol=1e-6)
    grads = jax.grad(lambda p: jnp.sum(rational.apply(p, x) ** 2))(params)
    assert np.all(grads["numerator"] != 0) and np.all(grads["denominator"] != 0)


@pytest.mark.parametrize("function", [None, jax.nn.silu, jnp.tanh])
def test_it_keeps_the_variance_of_normal_inputs(function):
    params = rational.init(jax.random.key(0), (256, 256), function=function)
    y = rational.apply(params, jax.random.normal(jax.random.key(1), (1024, 256)))
    np.testing.assert_allclose(jnp.std(y), 1, atol=0.05)


def test_groups_have_functions_of_their_own():
    params = rational.init(jax.random.key(0), (8, 4), groups=2)
    params["numerator"] = params["numerator"].at[1, 1].set(3.0)
    x = jnp.full((2, 8), 0.5)
    y = rational.functions(params, x)
    np.testing.assert_allclose(y[:, :4], 0.5, rtol=1e-6)
    assert np.all(y[:, 4:] > 1)
    with pytest.raises(ValueError, match="3 groups of 8 channels"):
        rational.init(jax.random.key(0), (8, 4), groups=3)


def test_integers_are_numbers():
    params = rational.init(jax.random.key(0), (16, 4))
    x = jnp.arange(32).reshape(2, 16)
    np.testing.assert_array_equal(rational.apply(params, x), rational.apply(params, x.astype(jnp.float32)))


def test_sums_over_many_tokens_lose_less_than_one_long_sum():
    """Gradients of coefficients, float32, against float64, rows that all add with one sign."""
    x = np.random.default_rng(0).uniform(0.5, 1.5, (1 << 16, 8)).astype(np.float32)
    params = rational.init(jax.random.key(0), (8, 4), groups=1)
    loss = lambda p, x: jnp.sum(rational.functions(p, x))
    mine = jax.jit(jax.grad(loss))(params, jnp.asarray(x))["numerator"]
    with jax.enable_x64(True):
        wide = {k: jnp.asarray(np.asarray(v), jnp.float64) for k, v in params.items()}
        exact = jax.grad(loss)(wide, jnp.asarray(x.astype(np.float64)))["numerator"]
    np.testing.assert_allclose(mine, exact, rtol=2e-5)


def test_tiles_divide_the_rows():
    for rows in (1, 7, 64, 96, 1000, 4096):
        assert rows % rational._tiles(rows) == 0
    assert rational._tiles(4096) == 64


def test_the_feed_forward_of_a_transformer_is_two_layers():
    params = rational.feed_forward_init(jax.random.key(0), 16, 32)
    x = jax.random.normal(jax.random.key(1), (2, 5, 16)).astype(jnp.bfloat16)
    y = rational.feed_forward(params, x)
    assert y.shape == x.shape and y.dtype == jnp.bfloat16
    hidden = x.astype(jnp.float32) @ params["up"]["weight"]
    want = jax.nn.silu(hidden) @ params["down"]["weight"]
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.05)
