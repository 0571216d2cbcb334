import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxml import quant, weights
from jaxml.lm import decoder
from jaxml.testing import tiny_model
from jaxml.tune import adapters
from jaxml.tune.loss import cross_entropy

ROWS = PartitionSpec("data")


def test_codes_spread_over_devices_give_the_same_products_and_gradients():
    mesh = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    params = quant.quantize_params({"w": jax.random.normal(jax.random.key(0), (64, 24))}, targets=["w"])
    spread, specs = quant.shard(params, "data", 4)
    x = jax.random.normal(jax.random.key(1), (8, 64))

    def loss(x, params, dot):
        return jnp.sum(jnp.sin(dot(x, params["w"])))

    whole = lambda x: jax.shard_map(
        lambda params, x: jax.lax.psum(loss(x, params, weights.dot), "data"),
        mesh=mesh, in_specs=(specs, ROWS), out_specs=PartitionSpec(),
    )(spread, x)  # fmt: skip
    np.testing.assert_allclose(whole(x), loss(x, params, weights.dot), rtol=1e-5)
    grads = jax.jit(jax.grad(whole))(x), jax.grad(loss)(x, params, weights.dot)
    np.testing.assert_allclose(*grads, atol=1e-5)
    placed = jax.device_put(spread, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    assert placed["w"].whole.codes.addressable_shards[0].data.shape == (6, 32)


@pytest.mark.slow
@pytest.mark.parametrize("head", [False, True])
def test_a_decoder_trains_adapters_on_weights_that_are_spread_out(head):
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    model = tiny_model(width=64, head_dim=16, hidden_dim=64, tied_embeddings=False)
    params = adapters.attach(
        quant.quantize_params(model.params), jax.random.key(0), rank=4, start="gaussian",
        targets=["q", "head"] if head else ["q", "up"], whole=["norm"] if head else ["head"],
    )  # fmt: skip
    trainable, frozen = adapters.split(params)
    tokens = np.random.default_rng(0).integers(3, 64, (8, 6)).astype(np.int32)

    def loss(trainable, frozen, tokens):
        params = adapters.combine(trainable, frozen)
        x = decoder.hidden(params, model.config, tokens, remat=True)
        weights = jnp.ones(tokens.shape).at[:, -1].set(0)
        return cross_entropy(x, decoder.head(params), jnp.roll(tokens, -1, 1), weights)[0]

    spread, specs = quant.shard(frozen, "data", 8)
    whole = jax.shard_map(
        lambda t, f, x: jax.lax.psum(loss(t, f, x), "data"),
        mesh=mesh, in_specs=(PartitionSpec(), specs, ROWS), out_specs=PartitionSpec(),
    )  # fmt: skip
    got = jax.jit(jax.grad(whole))(trainable, spread, tokens)
    expected = jax.jit(jax.grad(loss))(trainable, frozen, tokens)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
    jax.tree.map(close, got, expected)


def test_rows_that_do_not_divide_are_named():
    params = quant.quantize_params({"w": jnp.ones((64, 24)), "v": jnp.ones((48, 24))}, targets=["w", "v"])
    with pytest.raises(ValueError, match=r"multiple of 5 devices, got 24 rows .* for w"):
        quant.shard({"w": params["w"]}, "data", 5)
    with pytest.raises(ValueError, match=r"whole blocks .* for v"):
        quant.shard({"v": params["v"]}, "data", 4)
