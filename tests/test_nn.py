import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxml import kan, nn

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
