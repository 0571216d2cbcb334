"""Moments follow a basis that turns: against averages kept in the new basis from the beginning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import optim
from jaxml.optim import galore, moments
from jaxml.optim.moments import Moment

M, N, B1, B2 = 12, 200, 0.9, 0.999


def averages(steps, signal, seed=0):
    """(Adam's mean and mean of squares of some gradients, the gradients)."""
    rng = np.random.default_rng(seed)
    mean = signal * rng.standard_normal((M, N))
    gradients = [mean + rng.standard_normal((M, N)) for _ in range(steps)]
    m, v = np.zeros((M, N)), np.zeros((M, N))
    for g in gradients:
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
    return m, v, gradients


@pytest.mark.parametrize("steps", [10, 50, 200, 1000])
@pytest.mark.parametrize("signal", [0.3, 1.0])
def test_a_mean_of_squares_is_what_it_would_be_in_the_new_basis(steps, signal):
    m, v, gradients = averages(steps, signal)
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((M, M)))[0]
    want = np.zeros((M, N))
    for g in gradients:
        want = B2 * want + (1 - B2) * (q @ g) ** 2
    kinds = [Moment(0, False, None, B1), Moment(1, True, 0, B2)]
    values = [jnp.asarray(m), jnp.asarray(v)]
    got = moments.turn("rotate", kinds, values, lambda x: q @ x, lambda x: (q * q) @ x, jnp.asarray(steps))
    np.testing.assert_allclose(got[0], q @ m, atol=1e-5)
    ratio = np.asarray(got[1]) / want
    assert 0.95 < np.median(ratio) < 1.05 and np.sqrt(np.mean(np.log(ratio) ** 2)) < 0.4
    assert np.quantile(ratio, 0.01) > 0.45 and np.quantile(ratio, 0.99) < 3.3


INNERS = {
    "schedule free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "rmsprop with momentum": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "rms, then a mean": lambda: optax.chain(optax.scale_by_rms(), optax.ema(0.9)),
    "adabelief": lambda: optax.adabelief(1e-2),
    "adam": lambda: optax.adam(1e-2),
}


@pytest.mark.parametrize("name", INNERS)
def test_a_refresh_leaves_the_size_of_squares(name):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((24, 16))
    steps = [jnp.asarray(1e-3 * (base + 0.5 * rng.standard_normal((24, 16))), jnp.float32) for _ in range(13)]
    tx = galore(INNERS[name](), rank=4, gap=12, moments="rotate")
    params = {"w": jnp.asarray(rng.standard_normal((24, 16)), jnp.float32)}
    state, sizes, update = tx.init(params), [], jax.jit(tx.update)
    for g in steps:
        _, state = update({"w": g}, state, params)
        squares = [a for p, a in jax.tree.leaves_with_path(state.inner) if "nu" in str(p)]
        sizes.append(float(squares[0].mean()))
    assert 0.7 < sizes[-1] / sizes[-2] < 1.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_decays_of_averages_are_found_where_the_program_is_built(dtype):
    params = {"w": jnp.ones((8, 6), dtype), "b": jnp.ones(6, dtype)}
    path = jax.tree.leaves_with_path(params)[1][0]

    @jax.jit
    def step(rate, g):
        tx = optax.chain(optax.scale_by_adam(b1=0.8, b2=0.95), optax.scale_by_learning_rate(rate))
        tx = galore(tx, rank=2)
        state = tx.init(params)
        low = {"w": jnp.zeros((8, 2)), "b": jnp.zeros(6)}
        decays = lambda: moments.decays_of(optax.scale_by_adam(b1=0.8, b2=0.95), low, {})
        found = moments.find(optax.scale_by_adam().init(low), {path: (8, 2)}, decays)[path]
        assert [m.decay for m in found] == [0.8, 0.95]
        return tx.update(g, state, params)[0]

    assert jnp.isfinite(step(jnp.asarray(0.1), params)["w"].astype(jnp.float32)).all()


def test_all_moments_of_a_name_are_found_and_unknown_ones_are_said():
    two = galore(optax.chain(optax.trace(0.9), optax.trace(0.5), optax.scale(-1e-2)), rank=2)
    state = two.init({"w": jnp.ones((8, 6))})
    path = jax.tree.leaves_with_path({"w": 0})[0][0]
    assert len(moments.find(state.inner, {path: state.targets["w"].target.low_shape})[path]) == 2

    def init(params):
        return {"strange": jax.tree.map(jnp.zeros_like, params)}

    strange = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
    with pytest.warns(UserWarning, match="arrays called strange, which are not known to be moments"):
        galore(strange, rank=2).init({"w": jnp.ones((8, 6))})
    galore(strange, rank=2, moments="carry").init({"w": jnp.ones((8, 6))})


def test_schedule_free_of_eight_bits_learns():
    target = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)
    tx = optim.eight_bit(optax.contrib.schedule_free_adamw(1e-2))
    params = {"w": target + 0.2}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update({"w": params["w"] - target}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(40):
        params, state = step(params, state)
    assert float(jnp.mean(jnp.abs(params["w"] - target))) < 0.1
