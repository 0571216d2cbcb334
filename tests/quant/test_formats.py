import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import quant
from jaxml.quant import codebook, qarray
from tests.golden import quantised

GOLDEN = np.load(quantised.__file__.replace("quantised.py", "quantised.npz"))
FOUR = {"nf4": quant.nf4, "fp4": quant.fp4, "int4": quant.int4}


@pytest.mark.parametrize("kind, shape, dtype, block", quantised.CASES)
def test_bytes_are_those_of_bitsandbytes(kind, shape, dtype, block):
    w = jnp.asarray(quantised.matrix(shape), dtype).T
    golden = lambda name: GOLDEN[f"{kind} {shape} {dtype} {block} {name}"]
    plain = FOUR[kind].quantize(w, block=block, double=False)
    flat = lambda a: np.asarray(a).reshape(-1)
    np.testing.assert_array_equal(flat(plain.codes), golden("codes"))
    np.testing.assert_array_equal(flat(plain.scales), golden("scales"))
    double = FOUR[kind].quantize(w, block=block)
    np.testing.assert_array_equal(flat(double.codes), golden("codes"))
    # The mean's last bits depend on the order of summation, which torch chooses by machine; all else follows from it.
    np.testing.assert_allclose(double.nested.offset, golden("offset"), rtol=3e-7)
    if double.nested.offset == golden("offset"):
        np.testing.assert_array_equal(flat(double.nested.scales), golden("nested scales"))
        np.testing.assert_array_equal(flat(double.scales), golden("nested codes"))
    else:
        np.testing.assert_allclose(flat(double.nested.scales), golden("nested scales"), rtol=1e-5)
        assert (flat(double.scales) != golden("nested codes")).mean() < 0.02


@pytest.mark.parametrize("kind", FOUR)
@pytest.mark.parametrize("shape", [(128, 24), (48, 20), (9, 7), (2, 64, 32), (3, 40, 6)])
@pytest.mark.parametrize("double", [False, True])
def test_a_weight_is_its_codes_value_times_its_blocks_scale(kind, shape, double):
    w = jax.random.normal(jax.random.key(0), shape)
    q = FOUR[kind].quantize(w, double=double)
    assert q.shape == shape and q.ndim == len(shape)
    for i in range(w.size // (w.shape[-1] * w.shape[-2])):
        one = lambda a: a.reshape(-1, *shape[-2:])[i]
        flat = np.asarray(one(w)).T.reshape(-1)
        table, got = codebook.TABLES[kind], np.asarray(one(q.dense())).T.reshape(-1)
        for start in range(0, flat.size, 64):
            part, scale = flat[start : start + 64], np.abs(flat[start : start + 64]).max()
            nearest = table[np.abs(part[:, None] / scale - table).argmin(1)] * scale
            np.testing.assert_allclose(got[start : start + 64], nearest, atol=2e-2 * scale if double else 1e-6)


def test_bits_and_errors_of_normal_weights():
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    error = lambda q: float(jnp.linalg.norm(q.dense() - w) / jnp.linalg.norm(w))
    assert quant.bits_per_weight(quant.nf4.quantize(w)) == pytest.approx(4.127, abs=5e-4)
    assert quant.bits_per_weight(quant.nf4.quantize(w, double=False)) == 4.5
    assert quant.bits_per_weight(quant.int8.quantize(w)) == 8 + 32 / 1024
    assert quant.bits_per_weight(quant.int8.quantize(w, block=64)) == 8.5
    assert error(quant.nf4.quantize(w)) == pytest.approx(0.0920, abs=2e-4)
    assert error(quant.int4.quantize(w)) == pytest.approx(0.1074, abs=5e-4)
    assert error(quant.nf4.quantize(w)) < error(quant.fp4.quantize(w)) < 0.14
    assert error(quant.int8.quantize(w)) < 0.01
    assert error(quant.int8.quantize(w, block=64)) < 0.006


def test_the_tree_of_selections_is_the_table():
    from jaxml.target import target

    codes = jnp.arange(256, dtype=jnp.uint8)
    for table in (codebook.TABLES["nf4"], codebook.dynamic()):
        with target("interpret"):
            chosen = codebook.lookup(table, codes[: len(table)])
        np.testing.assert_array_equal(chosen, table)
    np.testing.assert_array_equal(qarray.unpack(qarray.pack(codes & 15)), codes & 15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_matrix_has_the_dtype_of_the_one_it_was_made_of(dtype):
    w = jax.random.normal(jax.random.key(0), (64, 8), dtype)
    for make in quant.FORMATS.values():
        assert make(w).dense().dtype == dtype
        assert make(w).astype("float32").dense().dtype == jnp.float32


@pytest.mark.parametrize(
    "w, options, word",
    [
        (jnp.ones(8), {}, r"matrix \[\.\.\., D, F\]"),
        (jnp.ones((8, 8), jnp.int32), {}, "floating"),
        (jnp.ones((8, 8)), dict(block=48), "power of two, got 48"),
        (jnp.ones((8, 8)), dict(block=64.0), "power of two, got 64.0"),
        (jnp.ones((8, 8)), dict(block=None), "power of two, got None"),
        (jnp.ones((8, 8)), dict(double=1), "True or False, got 1"),
        (jnp.ones((8, 8)), dict(axis=0), "axis is -2"),
        (jnp.ones((8, 8)).at[1, 1].set(jnp.nan), {}, "finite, got 1"),
    ],
)
def test_what_cannot_be_quantised_is_refused(w, options, word):
    with pytest.raises(ValueError, match=word):
        quant.nf4.quantize(w, **options)
