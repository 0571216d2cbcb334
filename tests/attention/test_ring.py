import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxml.attention import flash_attention, ring_attention, zigzag_order
from jaxml.attention.cases import CASES

CASE = next(c for c in CASES if c.name == "grouped heads").scaled(T=64)
DEVICES = 4
OPTIONS = {
    "full": {},
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, local_window_size=(20, 0)),
    "packed": dict(is_causal=True, ids=True),
    "soft cap and sinks": dict(is_causal=True, logits_soft_cap=2.0, sinks=True),
}


def mesh():
    return jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def loss(out, lse):
    weights = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    return jnp.sum(out * weights) + jnp.sum(jnp.cos(lse))


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_ring_of_devices_equals_one(name, zigzag):
    options = dict(OPTIONS[name])
    with jax.enable_x64(True):
        q, k, v = CASE.arrays(jnp.float64)
        ids = (
            jnp.asarray(np.repeat([[0, 1, 2], [5, 6, 7]], [13, 30, 21], axis=1)) if options.pop("ids", False) else None
        )
        sinks = jnp.linspace(-1.0, 2.0, CASE.N) if options.pop("sinks", False) else None
        order = zigzag_order(CASE.T, DEVICES) if zigzag else jnp.arange(CASE.T)
        back = jnp.argsort(order)

        def one(q, k, v, sinks):
            return flash_attention(q, k, v, **options, q_segment_ids=ids, sinks=sinks, return_residual=True)

        def ring(q, k, v, sinks):
            def part(q, k, v, sinks, ids):
                return ring_attention(
                    q, k, v, axis_name="context", zigzag=zigzag, q_segment_ids=ids, sinks=sinks,
                    return_residual=True, **options,
                )  # fmt: skip

            spec = P(None, "context")
            spread = jax.shard_map(part, mesh=mesh(), in_specs=(spec, spec, spec, P(), spec), out_specs=(spec, spec))
            turned = [a[:, order] for a in (q, k, v)]
            out, lse = spread(*turned, sinks, None if ids is None else ids[:, order])
            return out[:, back], lse[:, back]

        wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        run = lambda f: jax.jit(lambda *a: (f(*a), jax.grad(lambda *b: loss(*f(*b)), wanted)(*a)))(q, k, v, sinks)
        for a, b in zip(jax.tree.leaves(run(ring)), jax.tree.leaves(run(one)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_zigzag_gives_every_device_the_same_work_under_a_causal_mask():
    order = np.asarray(zigzag_order(64, DEVICES)).reshape(DEVICES, -1)
    seen = (order + 1).sum(axis=1)  # keys that each device's queries see
    assert np.all(seen == seen[0])


@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_memory_of_a_device_does_not_grow_with_the_number_of_devices(what):
    def extra(devices):
        ring = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        x = jax.ShapeDtypeStruct((1, 1024 * devices, 2, 32), jnp.float32)
        part = functools.partial(ring_attention, axis_name="context", is_causal=True)
        spec = P(None, "context")
        spread = jax.shard_map(part, mesh=ring, in_specs=(spec,) * 3, out_specs=spec)
        f = spread if what == "forward" else jax.grad(lambda *a: jnp.sum(spread(*a) ** 2), (0, 1, 2))
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert extra(8) < 1.2 * extra(2)


@pytest.mark.slow
def test_second_order_and_forward_mode_round_a_ring():
    with jax.enable_x64(True):
        q, k, v = CASE.scaled(T=16).arrays(jnp.float64)
        spec = P(None, "context")
        part = functools.partial(ring_attention, axis_name="context", is_causal=True)
        ring = jax.shard_map(part, mesh=mesh(), in_specs=(spec,) * 3, out_specs=spec)
        one = functools.partial(flash_attention, is_causal=True)

        def run(f):
            gradient = jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2))
            return jax.jit(lambda *a: (jax.jvp(f, a, (v, a[1], a[1])), jax.jvp(gradient, a, a)))(*(q[:, :, :2], k, v))

        for a, b in zip(jax.tree.leaves(run(ring)), jax.tree.leaves(run(one)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: zigzag_order(12, 8), r"2 · devices = 16, got 12"),
        (
            lambda: jax.shard_map(
                functools.partial(ring_attention, axis_name="context", zigzag=True),
                mesh=mesh(), in_specs=(P(None, "context"),) * 3, out_specs=P(None, "context"),
            )(*[jnp.ones((1, 12, 2, 8))] * 3),
            "even number of places",
        ),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_spread_are_a_sentence(call, word):
    with pytest.raises(ValueError, match=word):
        call()
