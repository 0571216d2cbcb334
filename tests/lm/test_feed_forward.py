import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml.lm import cache as caches
from jaxml.lm import decoder, feed_forward
from jaxml.testing import tiny_config, tiny_model
from jaxml.tune.loss import cross_entropy

TOKENS = np.random.default_rng(0).integers(3, 64, (4, 17)).astype(np.int32)


@pytest.mark.parametrize("kind", [pytest.param("kan", marks=pytest.mark.slow), "rational"])
def test_a_decoder_of_learnt_functions_trains(kind):
    config = tiny_config(feed_forward=kind)
    params = decoder.init(jax.random.key(0), config)
    tx = optax.adam(3e-3)

    def loss(params):
        x = decoder.hidden(params, config, TOKENS[:, :-1])
        total, count = cross_entropy(x, decoder.head(params), TOKENS[:, 1:], jnp.ones((4, 16)))
        return total / count

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value, grads

    state, first = tx.init(params), None
    for _ in range(30):
        params, state, value, grads = step(params, state)
        first = value if first is None else first
    assert value < 0.7 * first
    moved = {k for k, g in grads["layers"].items() if jnp.any(g != 0)}
    assert moved == set(grads["layers"])


@pytest.mark.parametrize("kind", ["kan", "rational"])
def test_its_layers_change_the_size_of_what_goes_through_by_less_than_three(kind):
    config = tiny_config(feed_forward=kind, width=64, hidden_dim=128)
    params = decoder.init(jax.random.key(0), config)
    layer = jax.tree.map(lambda a: a[0], params["layers"])
    x = jax.random.normal(jax.random.key(1), (256, 64))
    y = feed_forward.apply(layer, config, x, decoder._dense)
    assert 1 / 3 < float(jnp.std(y)) < 3


@pytest.mark.parametrize("kind", ["kan", "rational"])
def test_a_cache_equals_the_whole(kind):
    model = tiny_model(feed_forward=kind)
    empty = caches.init(model.config, 4, 8)
    positions = jnp.broadcast_to(jnp.arange(8)[None], (4, 8))
    cached, _ = decoder.apply_cached(model.params, model.config, TOKENS[:, :8], empty, positions=positions)
    np.testing.assert_allclose(cached, decoder.hidden(model.params, model.config, TOKENS[:, :8]), atol=1e-4)


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="feed_forward is one of gated"):
        tiny_config(feed_forward="mlp")
    with pytest.raises(ValueError, match="multiples of 8"):
        decoder.shapes(tiny_config(feed_forward="rational", hidden_dim=50))
    with pytest.raises(ValueError, match="no feed-forward of kind 'kan'"):
        tiny_config(feed_forward="kan").to_hf()
