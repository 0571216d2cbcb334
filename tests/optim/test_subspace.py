"""Gradients that are born low-rank are GaLore's, through scan, remat, accumulation and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml import optim
from jaxml.lm import decoder
from jaxml.optim import galore, packed, subspace
from jaxml.testing import tiny_config
from jaxml.weights import dot

L, D, F, B, RANK = 3, 20, 12, 16, 4


def problem(dtype=jnp.float64):
    """Layers of two matrices, scanned: D → F → D."""
    normal = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
    params = {"up": normal(0, L, D, F) * 0.2, "down": normal(1, L, F, D) * 0.2, "bias": jnp.zeros((L, F), dtype)}
    return params, (normal(2, B, D), normal(3, B, D))


def loss(params, batch, remat=False):
    x, y = batch

    def layer(x, p):
        return x + dot(jnp.tanh(dot(x, p["up"]) + p["bias"][None]), p["down"]), None

    out, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params)
    return jnp.mean((out - y) ** 2)


def rewind(method, tx, params):
    """The state of both, with the same bases."""
    state = method.init(params)
    return state, tx.init(params)._replace(targets=state.targets)


INNERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
}


@pytest.mark.parametrize("name, remat", [*((name, False) for name in INNERS), ("adam", True)])
def test_equals_galore_step_by_step_and_refresh_by_refresh(name, remat):
    gap = 3
    with jax.enable_x64(True):
        params, batch = problem()
        method = subspace(INNERS[name](), rank=RANK, scale=0.5)
        tx = galore(INNERS[name](), rank=RANK, scale=0.5, gap=gap, spread=False)
        ours, (state, theirs_state) = params, rewind(method, tx, params)
        theirs = params
        theirs_state = theirs_state._replace(step=theirs_state.step + 1)  # its first step would turn the bases
        state = state._replace(step=state.step + 1)
        assert {s.target.side for s in (state.targets["up"], state.targets["down"])} == {"left", "right"}

        @jax.jit
        def step(params, state):
            _, grads = method.value_and_grad(loss)(params, state, batch, remat=remat)
            return method.update(grads, state, params)

        refresh = jax.jit(lambda p, s: method.refresh(loss)(p, s, batch, remat=remat))

        @jax.jit
        def whole(params, state):
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        for n in range(1, 8):
            if n % gap == 0:
                state = refresh(ours, state)
            ours, state = step(ours, state)
            theirs, theirs_state = whole(theirs, theirs_state)
        for key in params:
            np.testing.assert_allclose(ours[key], theirs[key], atol=1e-7)
            assert np.abs(ours[key] - params[key]).max() > 1e-5
        np.testing.assert_allclose(state.targets["up"].basis[0], theirs_state.targets["up"].basis[0], atol=1e-5)


def test_gradients_are_projections_and_add_up_over_small_batches():
    with jax.enable_x64(True):
        params, batch = problem()
        method = subspace(optax.adam(1e-2), rank=RANK)
        state = method.init(params)
        value, grads = method.value_and_grad(loss)(params, state, batch)
        want, g = jax.value_and_grad(loss)(params, batch)
        (p,), (q,) = state.targets["up"].basis, state.targets["down"].basis
        np.testing.assert_allclose(value, want)
        np.testing.assert_allclose(grads["up"], jnp.einsum("lmr,lmn->lrn", p, g["up"]), atol=1e-12)
        np.testing.assert_allclose(grads["down"], jnp.einsum("lmn,lnr->lmr", g["down"], q), atol=1e-12)
        np.testing.assert_allclose(grads["bias"], g["bias"], atol=1e-12)
        half = lambda n: jax.tree.map(lambda a: a[n::2], batch)
        halves = [method.value_and_grad(loss)(params, state, half(n))[1] for n in (0, 1)]
        for key in params:
            np.testing.assert_allclose((halves[0][key] + halves[1][key]) / 2, grads[key], atol=1e-12)


def test_has_aux_and_bfloat16():
    params, batch = problem(jnp.bfloat16)
    method = subspace(optax.adam(1e-2), rank=RANK)
    state = method.init(params)
    (_, aux), grads = method.value_and_grad(lambda p, b: (loss(p, b), 7), has_aux=True)(params, state, batch)
    assert aux == 7 and grads["up"].dtype == jnp.float32 and grads["bias"].dtype == jnp.bfloat16
    state = method.refresh(lambda p, b: (loss(p, b), 7), has_aux=True)(params, state, batch)
    moved, _ = method.update(grads, state, params)
    assert all(moved[k].dtype == jnp.bfloat16 and jnp.any(moved[k] != params[k]) for k in params)


@pytest.mark.parametrize("how", ["jit", "shard_map", "shard_map, unchecked"])
def test_devices_that_share_a_batch_compute_what_one_does(how):
    with jax.enable_x64(True):
        params, batch = problem()
        method = subspace(optax.adam(1e-2), rank=RANK)
        start = method.init(params)
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

        def step(params, state, batch, axis=None, mean=lambda g: g):
            state = method.refresh(loss, axis_name=axis)(params, state, batch)
            _, grads = method.value_and_grad(loss)(params, state, batch)
            return method.update(mean(grads), state, params)

        if how == "jit":
            spread = jax.device_put(batch, NamedSharding(mesh, P("data")))
            got, state = jax.jit(step)(jax.device_put(params, NamedSharding(mesh, P())), start, spread)
        else:
            checked = how == "shard_map"
            mean = lambda g: jax.tree.map(lambda a: a / 4, g) if checked else jax.lax.pmean(g, "data")
            part = lambda p, s, b: step(p, s, b, "data", mean)
            run = jax.shard_map(part, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=checked)
            got, state = jax.jit(run)(params, start, batch)
        want, want_state = jax.jit(step)(params, start, batch)
        for a, b in zip(jax.tree.leaves((got, state)), jax.tree.leaves((want, want_state)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)


def test_only_projections_cross_between_devices():
    """The collectives of a data-parallel step are of R's shape and of whole leaves that are no targets."""
    params, batch = problem(jnp.float32)
    method = subspace(optax.adam(1e-2), rank=RANK)
    state = method.init(params)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    everywhere, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jax.jit(method.value_and_grad(loss), in_shardings=(everywhere, everywhere, rows))
    text = step.lower(params, state, batch).compile().as_text()
    reduced = [line for line in text.splitlines() if " all-reduce" in line and "=" in line]
    assert reduced and not any(f"{D},{F}]" in line or f"{F},{D}]" in line for line in reduced)


@pytest.mark.slow
def test_int8_weights_are_trained_as_dense_ones_are():
    params, batch = problem(jnp.float32)
    method = subspace(optax.adam(3e-2), rank=RANK, scale=1.0)
    narrow = {k: packed.pack(v, "int8") if k != "bias" else v for k, v in params.items()}

    def train(params):
        state = method.init(params)

        def step(carry, n):
            params, state = carry
            state = jax.lax.cond(n % 10 == 0, lambda s: method.refresh(loss)(params, s, batch), lambda s: s, state)
            value, grads = method.value_and_grad(loss)(params, state, batch)
            return method.update(grads, state, params), value

        (params, _), values = jax.lax.scan(step, (params, state), jnp.arange(60))
        return params, values

    (wide, want), (got, values) = jax.jit(train)(params), jax.jit(train)(narrow)
    assert got["up"].codes.dtype == jnp.int8 and wide["up"].dtype == jnp.float32
    assert want[-1] < 0.05 * want[0] and abs(values[-1] - want[-1]) < 0.01 * want[0]


def test_a_step_makes_no_array_of_a_stacked_weights_size():
    shape = (8, 256, 512)
    method = subspace(optax.sgd(0.1, momentum=0.9), rank=16)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(method.init, params)
    scanned = lambda p, x: jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(dot(x, w))[:, :256], None), x, p["w"])[0])

    def step(params, state, x):
        _, grads = method.value_and_grad(scanned)(params, state, x)
        return method.update(grads, state, params)

    x = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * np.prod(shape)


@pytest.mark.slow
def test_the_decoder_learns():
    config = tiny_config()
    params = decoder.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, config.vocab_size)
    method = subspace(optim.adamw8bit(2e-2, min_size=256), rank=8, scale=1.0)

    def loss(params, tokens):
        logits = decoder.apply(params, config, tokens, remat=True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

    def step(carry, n):
        params, state = carry
        turn = lambda s: method.refresh(loss)(params, s, tokens)
        state = jax.lax.cond((n < 4) | (n % 10 == 0), turn, lambda s: s, state)
        value, grads = method.value_and_grad(loss)(params, state, tokens)
        return method.update(grads, state, params), value

    start = (params, method.init(params))
    _, values = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(40)))(start)
    assert values[-1] < 0.5 * values[0]


def test_bad_calls_are_said():
    with pytest.raises(ValueError, match="side is one of auto, std, reverse_std, left, right, got 'full'"):
        subspace(optax.adam(1e-3), side="full")
    with pytest.raises(ValueError, match="rounding is one of auto, nearest, stochastic, got 'base'"):
        subspace(optax.adam(1e-3), rounding="base")
    with pytest.raises(ValueError, match="got one"):
        subspace(galore(rank=2))
    params = {"w": jnp.zeros((2, 8, 4))}
    method = subspace(optax.adam(1e-3), rank=2)
    with pytest.raises(ValueError, match=r"a target is a matrix \[in, out\] where it is used, got \(2, 8, 4\)"):
        method.value_and_grad(lambda p: jnp.sum(dot(jnp.ones((3, 8)), p["w"])))(params, method.init(params))
