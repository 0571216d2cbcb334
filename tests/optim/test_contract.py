"""What every transformation keeps: it runs under every way of JAX, Optax, Flax and Orbax to run one.

A new transformation needs one line in `TRANSFORMS`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml import checkpoint, optim
from jaxml.optim import galore, lora
from jaxml.optim.offload import Offloaded

RATE, DEVICES = 1e-2, 4
TRANSFORMS = {
    "galore in a chain": lambda rate: optax.chain(galore(rank=4, gap=2), optim.adam(rate)),
    "galore around adamw": lambda rate: galore(optax.adamw(rate, weight_decay=0.1), rank=4, gap=2),
    "galore of few bits": lambda rate: galore(
        optim.adamw8bit(rate, min_size=16), rank=4, gap=2, basis_dtype="int8", adaptive=0.4
    ),
    "fira": lambda rate: galore(optax.adam(rate), rank=4, gap=2, mode="fira"),
    "apollo": lambda rate: galore(optax.adam(rate), rank=4, gap=2, mode="apollo"),
    "apollo-mini": lambda rate: galore(optax.adam(rate), gap=2, mode="apollo-mini"),
    "lora": lambda rate: optax.chain(lora(rank=2), optim.adam(rate)),
    "adam8bit": lambda rate: optim.adam8bit(rate, min_size=16, stochastic=True),
    "lion8bit": lambda rate: optim.lion8bit(rate, min_size=16),
    "offload": lambda rate: optim.offload(optax.chain(galore(rank=4, gap=2), optim.adam(rate)), min_size=64),
}
FAST = ("galore in a chain", "lora", "adam8bit")


def parameters(dtype=jnp.float32):
    normal = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
    return {"layers": {"w": normal(0, 2, 24, 16), "v": normal(1, 24, 16)}, "bias": normal(2, 16)}


def gradients(params, n=0):
    """Of step n; of device n where they are spread."""
    return jax.tree.map(lambda p: jnp.sin(3.0 * p + n).astype(p.dtype), params)


@functools.cache
def plain(make, steps=4):
    """What is to come out: the parameters and the state under `jit` alone."""
    return follow(make(RATE), steps)


def follow(tx, steps=4, params=None, grads=gradients, jit=jax.jit):
    """The parameters after some steps, and the state."""
    params = parameters() if params is None else params
    state = tx.init(params)

    @jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for n in range(steps):
        params, state = step(params, state, grads(params, n))
    return params, state


def same(a, b, atol=0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0)


def donation(make):
    same(follow(make(RATE), jit=lambda f: jax.jit(f, donate_argnums=(0, 1))), plain(make))


def scan(make):
    tx, params = make(RATE), parameters()

    def step(carry, n):
        params, state = carry
        updates, state = tx.update(gradients(params, n), state, params)
        return (optax.apply_updates(params, updates), state), None

    (got, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(4)))((params, tx.init(params)))
    same(got, plain(make)[0], 1e-5)


def spread(make, how):
    """Every device has its own gradient; their mean is what one device is given at once."""
    tx, params = make(RATE), parameters()
    mean = lambda params, n: jax.tree.map(
        lambda *g: sum(g) / DEVICES, *(gradients(params, n + k) for k in range(DEVICES))
    )

    def step(params, state, n):
        g = gradients(params, n + jax.lax.axis_index("data"))
        updates, state = tx.update(jax.lax.pmean(g, "data"), state, params)
        return optax.apply_updates(params, updates), state

    want, _ = follow(tx, grads=mean)
    if how == "pmap":
        if isinstance(tx.init(params), Offloaded):
            pytest.skip("pmap knows one memory of a device only")
        state = tx.init(params)
        copy = lambda tree: jax.tree.map(lambda a: jnp.stack([a] * DEVICES), tree)
        params, state = copy(params), copy(state)
        run = jax.pmap(step, axis_name="data", in_axes=(0, 0, None), devices=jax.devices()[:DEVICES])
    else:
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
        params = jax.device_put(params, NamedSharding(mesh, P()))
        state = jax.jit(tx.init, out_shardings=optim.state_sharding(tx, params))(params)
        run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    for n in range(4):
        params, state = run(params, state, jnp.asarray(n))
    got = jax.tree.map(lambda a: a[DEVICES - 1], params) if how == "pmap" else params
    same(got, want, 1e-4)


def sharded(make):
    """Parameters and states spread over two axes; no basis and no moment lies whole on a device that may share it."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    specs = {"layers": {"w": P(None, "fsdp", "tensor"), "v": P("fsdp", "tensor")}, "bias": P("tensor")}
    where = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    tx, params = make(RATE), jax.device_put(parameters(), where)
    shardings = optim.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    same(state, tx.init(parameters()), 1e-6)

    def step(params, state, n):
        updates, state = tx.update(gradients(params, n), state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step, in_shardings=(where, shardings, None), out_shardings=(where, shardings))
    for n in range(4):
        params, state = run(params, state, n)
    same(params, plain(make)[0], 1e-4)
    assert not any(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state) if leaf.size >= 64)


def multi_steps(make):
    def halves(params, n):  # of two small batches whose mean is the gradient
        g = gradients(params, n // 2)
        return jax.tree.map(lambda a: a * (0.5 if n % 2 else 1.5), g)

    tx = optax.MultiSteps(make(RATE), every_k_schedule=2)
    got, _ = follow(tx, steps=4, grads=halves)
    same(got, plain(make, 2)[0], 1e-5)


def sum_of_gradients(leaf):
    """What gradients move a leaf by that is updated with the gradient itself."""
    moved = leaf
    for n in range(4):
        moved = moved + gradients(moved, n)
    return moved - leaf


def masked(make):
    tx = optax.masked(make(RATE), {"layers": {"w": True, "v": False}, "bias": False})
    got, _ = follow(tx)
    start = parameters()
    want, _ = follow(make(RATE), params={"layers": {"w": start["layers"]["w"]}})
    same(got["layers"]["w"], want["layers"]["w"], 1e-5)
    same(got["bias"] - start["bias"], sum_of_gradients(start["bias"]), 1e-5)  # what is masked gets the gradient itself


def partition(make):
    labels = {"layers": {"w": "low", "v": "low"}, "bias": "sgd"}
    got, _ = follow(optax.partition({"low": make(RATE), "sgd": optax.sgd(0.1)}, labels))
    want, _ = follow(make(RATE), params={"layers": parameters()["layers"]})
    same(got["layers"], want["layers"], 1e-5)


def inject_hyperparams(make):
    tx = optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate=RATE)
    got, state = follow(tx)
    same(got, plain(make)[0], 1e-5)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    updates, _ = tx.update(gradients(got), state, got)
    same(updates, jax.tree.map(jnp.zeros_like, updates), 1e-12)


def apply_if_finite(make):
    tx = optax.apply_if_finite(make(RATE), max_consecutive_errors=3)
    holes = lambda params, n: jax.tree.map(lambda g: g * (jnp.nan if n == 0 else 1.0), gradients(params, max(n - 1, 0)))
    got, _ = follow(tx, steps=5, grads=holes)
    same(got, plain(make)[0], 1e-5)


def nnx_optimizer(make):
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.Linear(24, 16, rngs=nnx.Rngs(0))

    model = Model()
    optimizer = nnx.Optimizer(model, make(RATE), wrt=nnx.Param)
    loss = lambda model: jnp.mean((model.layers(jnp.ones((3, 24))) - 1.0) ** 2)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer)) for _ in range(5)]
    assert values[-1] < values[0]


def orbax(make, folder):
    tx = make(RATE)
    params, state = plain(make)
    with checkpoint.Checkpoints(folder) as saved:
        saved.save(3, {"params": params, "state": state})
        saved.wait()
        template = {"params": params, "state": jax.eval_shape(tx.init, params)}
        back = saved.restore(template)
    assert jax.tree.structure(back["state"]) == jax.tree.structure(state)
    same(back["state"], state)


def dtypes_and_programs(make):
    """A narrow parameter stays narrow, a state has the same types after a step as before, and one program does all."""
    tx, params = make(RATE), parameters(jnp.bfloat16)
    state, programs = tx.init(params), jax.jit(tx.update)
    if isinstance(state, Offloaded):  # whose state has a place
        params = jax.device_put(params, jax.devices()[0])
    types = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), tree)
    before = types(state)
    for n in range(3):
        updates, state = programs(gradients(params, n), state, params)
        assert types(state) == before and types(updates) == types(params)
        params = optax.apply_updates(params, updates)
    assert programs._cache_size() == 1


def size_of_program(make):
    """Equal matrices in leaves of their own share what is heavy: another leaf costs a few Adams, not a refresh."""

    def lines(tx, leaves):
        params = {f"w{n}": jax.ShapeDtypeStruct((24, 16), jnp.float32) for n in range(leaves)}
        state = jax.eval_shape(tx.init, params)
        return jax.jit(tx.update).lower(params, state, params).as_text().count("\n")

    grow = lambda tx: (lines(tx, 24) - lines(tx, 8)) / 16
    assert grow(make(RATE)) < 8 * grow(optax.adam(RATE))


CONTRACTS = {
    "donation": donation,
    "scan": scan,
    "pmap": lambda make: spread(make, "pmap"),
    "shard_map": lambda make: spread(make, "shard_map"),
    "sharded state": sharded,
    "MultiSteps": multi_steps,
    "masked": masked,
    "partition": partition,
    "inject_hyperparams": inject_hyperparams,
    "apply_if_finite": apply_if_finite,
    "NNX optimizer": nnx_optimizer,
    "dtypes and programs": dtypes_and_programs,
    "size of program": size_of_program,
}
NAMES = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in TRANSFORMS]


@pytest.mark.parametrize("what", CONTRACTS)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, what):
    CONTRACTS[what](TRANSFORMS[name])


@pytest.mark.parametrize("name", NAMES)
def test_orbax_round_trip(name, tmp_path):
    orbax(TRANSFORMS[name], tmp_path)
