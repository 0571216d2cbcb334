"""Arrays in eight and four bits: bitsandbytes' values, nearest codes, blocks, rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.optim import packed, rounding


def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values of Dettmers et al. 2022, appendix F, built decade by decade in float64."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = np.linspace(0.1, 1.0, count + 1)
        middles = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *(-middles if signed else [])]
    return np.sort(values)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_unsigned"])
def test_the_map_is_the_papers_and_every_number_takes_the_nearest_value(kind):
    values = dynamic_map(kind == "dynamic")
    ours = np.asarray(packed._decode(jnp.arange(256), kind, jnp.float32))
    np.testing.assert_allclose(np.sort(ours), values.astype(np.float32), rtol=2e-6)
    x = np.random.default_rng(0).uniform(-1 if kind == "dynamic" else 0, 1, 20_000)
    x *= 10.0 ** np.random.default_rng(1).uniform(-7, 0, x.size)
    off = np.abs(packed._decode(packed._encode(jnp.asarray(x, jnp.float32), kind), kind, jnp.float32) - x)
    best = np.abs(values[None] - x[:, None]).min(axis=1)
    np.testing.assert_array_less(off, best * 1.01 + 1e-9)


def test_the_map_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed=signed).numpy()
        np.testing.assert_allclose(theirs, dynamic_map(signed), rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (300,), (3, 700), (9, 100), (2, 3, 40, 257), (4, 1)])
@pytest.mark.parametrize("kind", packed.KINDS)
def test_any_shape_comes_back_within_its_blocks_step(kind, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    x = jnp.abs(x) if kind == "dynamic_unsigned" else x
    p = packed.pack(x, kind)
    assert p.shape == shape and p.unpack().shape == shape and p.unpack().dtype == x.dtype
    coarsest = {"int8": 1 / 127, "int4": 1 / 7, "dynamic": 0.9 / 64, "dynamic_unsigned": 0.9 / 128}[kind]
    assert jnp.max(jnp.abs(p.unpack() - x)) <= 0.51 * coarsest * jnp.max(jnp.abs(x))


def test_a_block_is_256_elements_and_an_outlier_hurts_no_other():
    x = jax.random.normal(jax.random.key(0), (8, 600)).at[0, 0].set(1e6)
    p = packed.pack(x, "int8")
    assert p.scales.shape == (8, 3) and packed.pack(x.reshape(48, 100), "int8").scales.shape == (24, 1)
    np.testing.assert_allclose(p.unpack()[1:], x[1:], atol=0.02)
    np.testing.assert_allclose(p.unpack()[0, 256:], x[0, 256:], atol=0.02)


@pytest.mark.parametrize("kind", packed.KINDS)
def test_stochastic_rounding_is_right_on_average(kind):
    x = jnp.abs(jax.random.normal(jax.random.key(0), (4, 64)))
    keys = jax.random.split(jax.random.key(1), 4000)
    mean = jnp.mean(jax.vmap(lambda k: packed.pack(x, kind, k).unpack())(keys), axis=0)
    step = {"int8": 1 / 127, "int4": 1 / 7, "dynamic": 0.9 / 64, "dynamic_unsigned": 0.9 / 128}[kind]
    np.testing.assert_allclose(mean, x, atol=0.06 * step * float(jnp.max(x)))


def test_zero_is_exact_and_numbers_out_of_range_are_not_made():
    for kind in packed.KINDS:
        np.testing.assert_array_equal(packed.pack(jnp.zeros((3, 5)), kind).unpack(), 0)
        x = jnp.array([[0.0, 3e-30, 3e30]])
        assert jnp.all(jnp.isfinite(packed.pack(x, kind).unpack()))


def test_narrow_arrays_are_packed_as_exactly_as_wide_ones():
    x = jax.random.normal(jax.random.key(0), (16, 256))
    for dtype in ("float32", "bfloat16"):
        packed_ = packed.pack(x.astype(dtype), "int8")
        off = jnp.abs(packed_.unpack() - x.astype(dtype).astype(jnp.float32))
        assert packed_.scales.dtype == jnp.float32
        assert float(jnp.max(off / jnp.repeat(packed_.scales, 256, axis=1))) * 127 < 0.501


def test_stochastic_rounding_keeps_what_is_not_finite():
    bits = jnp.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000], jnp.uint32)  # NaN as GPUs write it, NaN, ±inf
    x = jax.lax.bitcast_convert_type(bits, jnp.float32)
    got = rounding.stochastic(x, jnp.bfloat16, jax.random.key(0)).astype(jnp.float32)
    np.testing.assert_array_equal(got, np.array([np.nan, np.nan, np.inf, -np.inf]))
