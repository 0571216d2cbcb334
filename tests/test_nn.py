import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxml import kan, nn
from jaxml.tune import adapters

X = jax.random.uniform(jax.random.key(0), (100, 2), minval=-1.0)
Y = X[:, :1] * X[:, 1:]


def test_an_nnx_module_is_the_pure_function_and_trains_what_is_trained():
    model = nn.KAN([2, (3, 1), 1], rngs=nnx.Rngs(0), grid=4)
    np.testing.assert_array_equal(model(X), kan.apply(model.network, X))
    points = model.network.layers[0].points
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    np.testing.assert_array_equal(model.network.layers[0].points, points)


def test_an_nnx_module_takes_a_refined_network_and_survives_split_and_merge():
    model = nn.KAN([2, 12, 1], rngs=nnx.Rngs(0))  # layer 10 comes after layer 2 by number, before it by letter
    before = model(X)
    model.set_network(kan.refine(model.network, 10))
    np.testing.assert_allclose(model(X), before, atol=1e-5)
    again = nnx.merge(*nnx.split(model))
    np.testing.assert_array_equal(again(X), model(X))


def test_a_linen_module_keeps_grids_apart_from_parameters():
    model = nn.LinenKAN((2, 5, 1), dict(grid=4))
    variables = model.init(jax.random.key(1), X)
    same = model.init(jax.random.key(1), X)
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    loss = lambda params: jnp.mean((model.apply(variables | {"params": params}, X) - Y) ** 2)
    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert set(grads) == {"layers_0_coef", "layers_0_base", "layers_1_coef", "layers_1_base"}
    assert all(np.any(g != 0) for g in grads.values())
    again = jax.jit(lambda key: nn.LinenKAN((2, 5, 1), dict(grid=4, start="pykan")).init(key, X))(jax.random.key(1))
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables)
    other = model.init(jax.random.key(2), X)
    assert np.any(other["params"]["layers_0_coef"] != variables["params"]["layers_0_coef"])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(32, 32, use_bias=False, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        return x


@pytest.mark.parametrize(
    "options", [dict(), dict(method="dora"), dict(quantize="nf4"), dict(targets="blocks/*")], ids=str
)
def test_an_adapted_nnx_model_trains_its_adapters_alone(options):
    model = Net(nnx.Rngs(0))
    small = nn.adapt(model, jax.random.key(0), rank=4, **options)
    x = jax.random.normal(jax.random.key(1), (3, 64))
    if "quantize" not in options:
        np.testing.assert_allclose(small(x), model(x), atol=1e-5)
    kept = jax.tree.map(jnp.copy, nnx.state(small, nn.Fixed))
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(small, nnx.Param))}
    assert names == {"kernel_a", "kernel_b"} | ({"kernel_magnitude"} if "method" in options else set())
    optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(small, optimizer, x)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, kept, nnx.state(small, nn.Fixed))
    with pytest.raises(ValueError, match="There are blocks/0"):
        nn.adapt(model, jax.random.key(0), targets=["nope"])


def test_linen_layers_multiply_with_weight_nodes():
    model = linen.Sequential([linen.Dense(32), jnp.tanh, linen.Dense(4, use_bias=False)])
    x = jax.random.normal(jax.random.key(1), (3, 64))
    params = model.init(jax.random.key(0), x)["params"]
    adapted = adapters.attach(params, jax.random.key(2), rank=4, targets=["kernel"], start="orthogonal", quantize="nf4")
    trainable, frozen = adapters.split(adapted)

    @jax.jit
    def loss(trainable):
        with linen.intercept_methods(nn.linen_weights):
            return jnp.sum(model.apply({"params": adapters.combine(trainable, frozen)}, x) ** 2)

    plain = jnp.sum(model.apply({"params": adapters.merge(adapted)}, x) ** 2)
    np.testing.assert_allclose(loss(trainable), plain, rtol=1e-5)
    grads = jax.grad(loss)(trainable)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
