"""LoRA as a gradient transformation: the adapters themselves, and what becomes of weights in few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import optim
from jaxml.optim import lora

M, N, RANK, STEPS = 24, 16, 3, 60


def problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 32, M), dtype)
    y = jax.random.normal(keys[1], (2, 32, N), dtype)
    w = jax.random.normal(keys[2], (2, M, N), dtype) * 0.2
    return {"w": w, "b": jnp.zeros(N, dtype)}, lambda p: jnp.mean((x @ p["w"] + p["b"][None, None] - y) ** 2)


def run(tx, params, loss, steps=STEPS):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("inner", ["adam", "adamw", "lion"])
def test_equals_adapters_that_are_trained_themselves(inner):
    inner = {"adam": optax.adam(3e-2), "adamw": optax.adamw(3e-2, weight_decay=0.1), "lion": optax.lion(3e-3)}[inner]
    params, loss = problem()
    tx = lora(inner, rank=RANK, alpha=9.0)
    ours, state = run(tx, params, loss)
    first = tx.init(params).factors["w"]
    adapted = lambda f: {"w": params["w"] + 9.0 / RANK * f["a"] @ f["b"], "b": params["b"]}
    factors, _ = run(inner, {"a": first.a, "b": first.b}, lambda f: loss(adapted(f)))
    moved = np.linalg.norm(ours["w"] - params["w"])
    assert moved > 0.5 and np.linalg.norm(ours["w"] - adapted(factors)["w"]) < 1e-5 * moved
    np.testing.assert_array_equal(ours["b"], params["b"])  # all that is no target is frozen
    np.testing.assert_allclose(state.factors["w"].b, factors["b"], atol=1e-4)


def test_every_spelling_is_the_same_to_the_bit():
    params, loss = problem()
    want, _ = run(lora(optax.adam(1e-2), rank=RANK), params, loss)
    for tx in (
        optax.chain(lora(rank=RANK), optim.adam(1e-2)),
        optim.chain(lora(rank=RANK), optax.adam(1e-2)),
    ):
        assert (run(tx, params, loss)[0]["w"] == want["w"]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_move_as_wide_ones_do_unless_rounded_to_the_nearest(dtype):
    params, loss = problem()
    tx = lambda rounding: lora(optax.adam(1e-4), rank=RANK, rounding=rounding)
    want, _ = run(tx("auto"), params, loss, 200)
    narrow = jax.tree.map(lambda a: a.astype(dtype), params)
    off = {}
    for rounding in ("nearest", "auto", "stochastic", "base"):
        got, state = run(tx(rounding), narrow, loss, 200)
        assert got["w"].dtype == dtype and state.factors["w"].a.dtype == jnp.float32
        moved = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), (got, want), (narrow, params))
        along = jnp.vdot(moved[0]["w"], moved[1]["w"]) / jnp.vdot(moved[1]["w"], moved[1]["w"])
        off[rounding] = abs(float(along) - 1)
    assert off["base"] < 0.1 and off["stochastic"] < 0.2 and off["auto"] == off["stochastic"]
    if dtype == "bfloat16":
        assert off["nearest"] > 0.7


def test_dimension_numbers_and_ranks_by_leaf():
    params = {"q": jnp.ones((20, 4, 6)), "o": jnp.ones((4, 6, 20)), "b": jnp.ones(3)}
    dims = {"q": optim.DimensionNumbers(0, (1, 2)), "o": optim.DimensionNumbers((0, 1), 2)}
    state = lora(optax.adam(1e-3), rank={"q": 2, "o": 0.25}, dims=dims).init(params)
    assert state.factors["q"].a.shape == (20, 2) and state.factors["q"].b.shape == (2, 24)
    assert state.factors["o"].a.shape == (24, 5) and state.factors["o"].b.shape == (5, 20)


def test_bad_options_are_said():
    params, loss = problem()
    with pytest.raises(ValueError, match="rounding is one of auto, nearest, stochastic, base, got 'up'"):
        lora(optax.adam(1e-3), rounding="up")
    with pytest.raises(ValueError, match=r"lora: an aware optimizer follows, got none. Write optax.chain"):
        optax.chain(lora(), optax.adam(1e-3)).init(params)
    with pytest.raises(ValueError, match=r"got 'nothing'. There are b, w"):
        lora(optax.adam(1e-3), targets="nothing").init(params)
    tx = lora(optax.adam(1e-3), rank=2, rounding="base")
    with pytest.raises(ValueError, match="rounding 'base' needs the parameters"):
        tx.update(jax.grad(loss)(params), tx.init(params))
