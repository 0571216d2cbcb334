import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import parallel
from jaxml.parallel.step import HOWS

tx = optax.adam(1e-2)


def step(state, batch, total):
    params, opt_state = state

    def loss(params):
        off = jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]
        return jnp.sum(batch["weight"] * off**2)

    value, grads = jax.value_and_grad(loss)(params)
    value, grads, count = total((value, grads, jnp.sum(batch["weight"])))
    updates, opt_state = tx.update(jax.tree.map(lambda g: g / count, grads), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value / count


def run(step, steps=5):
    w, v = (0.3 * jax.random.normal(jax.random.key(i), (8,) * n) for i, n in ((0, 2), (1, 1)))
    state, losses = ({"w": w, "v": v}, tx.init({"w": w, "v": v})), []
    for i in range(steps):
        x, weight = jax.random.normal(jax.random.key(i + 2), (32, 8)), jax.random.uniform(jax.random.key(i), (32,))
        state, loss = step(state, {"x": x, "y": jnp.sin(x.sum(1)), "weight": weight})
        losses.append(float(loss))
    return losses, state[0]


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
def test_all_ways_give_the_numbers_of_one_device(mesh):
    one = run(jax.jit(lambda state, batch: step(state, batch, lambda tree: tree)))
    for how in HOWS:
        many = run(parallel.data_parallel(step, how, mesh=parallel.parse(mesh)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), many, one)


def test_what_cannot_be_done_is_a_sentence():
    with pytest.raises(ValueError, match="one of jit, shard_map, pmap, got 'xmap'"):
        parallel.data_parallel(step, "xmap", mesh=parallel.mesh(data=8))
    with pytest.raises(ValueError, match="rows alone"):
        parallel.data_parallel(step, "jit", mesh=parallel.mesh(data=4, tensor=2))
    with pytest.raises(ValueError, match="a multiple of 8 devices, got"):
        parallel.data_parallel(step, "jit", mesh=parallel.mesh(data=8))((0.0,), jnp.ones((4, 2)))
