"""Moments of eight bits: what they weigh, and that training hardly notices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import optim
from jaxml.optim import packed

SHAPES = {"w": (128, 96), "small": (20, 20)}


def bytes_of(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["adam", "adamw", "lion"])
def test_a_moment_is_a_byte_and_a_64th_and_small_ones_stay(name):
    params = {k: jnp.zeros(s) for k, s in SHAPES.items()}
    ours, theirs = getattr(optim, f"{name}8bit")(1e-3).init(params), getattr(optax, name)(1e-3).init(params)
    number = 1 if name == "lion" else 2
    assert bytes_of(theirs) - bytes_of(ours) > number * 0.97 * 3 * 128 * 96
    kinds = [p.kind for p in jax.tree.leaves(ours, is_leaf=packed.is_packed) if packed.is_packed(p)]
    assert kinds == ["dynamic", "dynamic_unsigned"][:number]


def last_loss(tx, batch, steps=250):
    """Of a regression on columns of very different size, `batch` of the 64 rows in each step."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 128)) * 10.0 ** rng.uniform(-1, 1, 128), jnp.float32)
    y = x @ jnp.asarray(rng.standard_normal((128, 96)), jnp.float32)
    loss = lambda p, rows: jnp.mean((x[rows] @ p["w"] - y[rows]) ** 2)

    def step(carry, key):
        params, state = carry
        rows = jax.random.permutation(key, 64)[:batch]
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"w": jnp.zeros((128, 96))}
    keys = jax.random.split(jax.random.key(1), steps)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, tx.init(params)))
    assert loss(params, jnp.arange(64)) < 0.1 * jnp.mean(y**2)
    return float(loss(params, jnp.arange(64)))


RATE = optax.linear_schedule(3e-2, 0.0, 250)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("name", ["adam", "lion"])
def test_follows_the_optimizer_in_32_bits(name, stochastic):
    ours = last_loss(getattr(optim, f"{name}8bit")(RATE, stochastic=stochastic), batch=8)
    assert abs(ours / last_loss(getattr(optax, name)(RATE), batch=8) - 1) < 0.1


def test_a_mean_that_moves_by_less_than_a_step_moves_by_stochastic_rounding_only():
    """Where the gradient has no noise; a share of 1 % of it is then rounded away to the nearest."""
    wide = last_loss(optax.lion(RATE), batch=64)
    assert last_loss(optim.lion8bit(RATE, stochastic=True), batch=64) < 1.1 * wide
    assert last_loss(optim.lion8bit(RATE), batch=64) > 1.5 * wide


def test_an_optimizer_without_known_moments_is_said():
    tx = optim.eight_bit(optax.scale(0.1))
    with pytest.raises(ValueError, match="keeps moments of the parameters' shape under a name in mu, m, "):
        tx.init({"w": jnp.zeros((128, 128))})


def test_a_galore_inside_is_said():
    with pytest.raises(ValueError, match=r"got a galore. Write galore\(eight_bit\(optimizer\), ...\)"):
        optim.eight_bit(optim.galore(optax.adam(1e-3), rank=2)).init({"w": jnp.ones((64, 128))})
