"""The kernels against the definition: interpreted, compiled for TPUs, lowered for GPUs."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import quant, testing, weights
from jaxml.target import target

# Newer versions of JAX announce that it is to go; jaxml's kernels for GPUs are written in it as long as it is there.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

ON = {"mosaic_tpu": "interpret", "triton": "interpret gpu"}
has = lambda *packages: all(importlib.util.find_spec(package) for package in packages)
if has("triton", "torch"):
    ON |= {"jax_triton": "interpret gpu"}
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


def matrix(kind, shape=(320, 72), **options):
    return quant.FORMATS[kind](jax.random.normal(jax.random.key(0), shape), **options)


def both(by, q, *, rows=5, transpose=False, dtype="float32"):
    """(the kernel's product and gradient, those of the dense matrix in float64)."""
    inner, outer = q.matrix[::-1] if transpose else q.matrix
    lead = q.shape[:-2]
    x = jax.random.normal(jax.random.key(1), (*lead, rows, inner), dtype)
    g = jax.random.normal(jax.random.key(2), (*lead, rows, outer), dtype)
    q = quant.with_implementation(q, by)
    with target(ON[by]):
        y, vjp = jax.vjp(lambda x: weights.dot(x, q, transpose), x)
        dx = vjp(g)[0]
    assert y.dtype == dx.dtype == x.dtype
    d = np.asarray(q.dense().astype(dtype), np.float64)
    d = d.swapaxes(-1, -2) if transpose else d
    return (y, dx), (np.asarray(x, np.float64) @ d, np.asarray(g, np.float64) @ d.swapaxes(-1, -2))


def close(got, wanted, q, dtype="float32"):
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=20 * testing.tolerance(dtype, max(q.matrix)))


@pytest.mark.parametrize("by", ON)
@pytest.mark.parametrize(
    "kind, options",
    [
        ("nf4", {}),
        ("nf4", {"double": False, "block": 32}),
        ("nf4", {"axis": -1, "block": 8}),
        ("fp4", {}),
        ("int4", {}),
        ("int8", {}),
        ("int8", {"block": 64}),
    ],
)
@pytest.mark.parametrize("transpose", [False, True])
def test_products_and_gradients_are_those_of_the_dense_matrix(by, kind, options, transpose):
    if by != "mosaic_tpu" and options.get("block") == 8:
        options = options | {"block": 32}
    q = matrix(kind, (320, 64) if "axis" in options else (320, 72), **options)
    close(*both(by, q, transpose=transpose), q)


@pytest.mark.parametrize("by", ON)
def test_many_rows(by):
    q = matrix("nf4")
    close(*both(by, q, rows={"mosaic_tpu": 520, "triton": 70}.get(by, 20)), q)


@pytest.mark.slow
def test_long_rows_whose_scales_have_many_scales_of_their_own():
    q = matrix("nf4", (8704, 40), block=8)
    own = q.nested.scales * jnp.linspace(1, 3, q.nested.scales.size)
    q = dataclasses.replace(q, nested=dataclasses.replace(q.nested, scales=own))
    close(*both("mosaic_tpu", q, rows=2), q)


@pytest.mark.parametrize("by", ON)
def test_bfloat16_is_rounded_where_the_definition_rounds(by):
    q = matrix("nf4", (256, 64))
    close(*both(by, q, dtype="bfloat16"), q, "bfloat16")


@pytest.mark.parametrize("by", ON)
def test_stacked_matrices(by):
    q = matrix("nf4", (2, 3, 128, 40))
    close(*both(by, q), q)


def test_on_tpus_the_kernel_comes_first_and_says_why_not():
    q, x = matrix("nf4"), jax.ShapeDtypeStruct((4, 320), jnp.bfloat16)
    with target("TPU v5e"):
        assert quant.explain(x, q).chosen == "mosaic_tpu"
        assert "comes first" in quant.explain(x, q).refused["xla"]
        half = jax.ShapeDtypeStruct((4, 320), jnp.float16)
        assert "bfloat16" in quant.explain(half, q).refused["mosaic_tpu"]
        over = matrix("nf4", (48, 20))
        assert "whole blocks" in quant.explain(jax.ShapeDtypeStruct((4, 48), jnp.bfloat16), over).refused["mosaic_tpu"]
    with target("NVIDIA H100"):
        assert "by name" in quant.explain(x, q).refused["triton"]
        assert quant.explain(x, quant.with_implementation(q, "triton")).chosen == "triton"
    assert quant.explain(x, q).chosen == "xla"


def test_an_implementation_that_cannot_run_says_so():
    q = quant.with_implementation(matrix("nf4"), "triton")
    with pytest.raises(NotImplementedError, match=r"needs a GPU.*Take 'xla'"):
        weights.dot(jnp.ones((2, 320)), q)
    with pytest.raises(ValueError, match="one of mosaic_tpu, mosaic_gpu, jax_triton, triton, xla, got 'cuda'"):
        quant.with_implementation(q, "cuda")


@pytest.mark.slow
def test_within_shard_map_on_several_devices():
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    n = len(jax.devices())
    w = jax.random.normal(jax.random.key(0), (128, 8 * n))
    params = {"w": quant.with_implementation(quant.nf4.quantize(w), "mosaic_tpu")}
    x = jax.random.normal(jax.random.key(1), (2 * n, 128))
    spread, specs = quant.shard(params, "data", n)
    rows = jax.sharding.PartitionSpec("data")
    run = lambda params, x: jax.value_and_grad(lambda x: jnp.sum(weights.dot(x, params["w"]) ** 2))(x)[1]
    with target("interpret"):
        got = jax.shard_map(run, mesh=mesh, in_specs=(specs, rows), out_specs=rows, check_vma=False)(
            spread, x
        )  # interpreted kernels mix what varies and what does not
    d = params["w"].dense()
    np.testing.assert_allclose(got, 2 * (x @ d) @ d.T, rtol=1e-4, atol=1e-2)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("rows, D, F", [(8, 4096, 1024), (2048, 4096, 1024), (8, 576, 1536), (8, 4160, 1000)])
def test_compiled_for_a_tpu_no_dequantised_matrix_is_stored(kind, rows, D, F):
    q = jax.eval_shape(quant.FORMATS[kind], jax.ShapeDtypeStruct((D, F), jnp.bfloat16))
    x, g = (jax.ShapeDtypeStruct((rows, n), jnp.bfloat16) for n in (D, F))
    step = lambda x, q, g: jax.vjp(lambda x: weights.dot(x, q), x)[1](g)
    compiled = testing.compile_for_tpu(step, (x, q, g), "v5e")
    assert "quantised_product" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < D * F * 2 / 2


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    "by, call",
    [("triton", "__gpu$xla.gpu.triton"), ("jax_triton", "triton_kernel_call"), ("mosaic_gpu", "mosaic_gpu_v2")],
)
def test_lowered_for_gpus(by, call, kind, dtype):
    if by == "mosaic_gpu" and dtype == "float32":
        pytest.skip("tensor cores take 16 bits from registers")
    q = jax.eval_shape(quant.FORMATS[kind], jax.ShapeDtypeStruct((1024, 256), dtype))
    q = dataclasses.replace(q, implementation=by)
    x, g = (jax.ShapeDtypeStruct((8, n), dtype) for n in (1024, 256))
    step = lambda x, q, g: (weights.dot(x, q), *jax.vjp(lambda x: weights.dot(x, q), x)[1](g))
    if by == "jax_triton" and not has("jax_triton", "triton"):
        pytest.skip("needs jax-triton")
    if by == "jax_triton" and jax.__version_info__ >= (0, 12):
        with pytest.raises(NotImplementedError, match=r"jax-triton \S+ fails with jax"):
            testing.lower_for_gpu(step, (x, q, g))
        return
    assert testing.lower_for_gpu(step, (x, q, g)).as_text().count(call) == 2


@pytest.mark.skipif(not has("triton", "torch"), reason="needs Triton's interpreter")
@pytest.mark.parametrize("kind, shape", [("nf4", (1024, 96)), ("int8", (1024, 96))])
def test_long_sums_are_split_over_programs(kind, shape):
    q = matrix(kind, shape)
    close(*both("jax_triton", q), q)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("along", [True, False])
def test_each_thread_of_hoppers_kernel_finds_its_own_weights(halves, along):
    from jaxml.quant import kernel_mosaic_gpu as hopper

    height = hopper.GROUPS * hopper.HEIGHT
    tile = hopper.tile_of(along, halves)
    codes = np.random.default_rng(0).integers(0, 256, (tile.rows, tile.bytes))
    offset = np.arange(codes.size)
    memory = np.zeros(codes.size, int)  # the copy engine's swizzle: pieces of 16 bytes, by the number of 128 bytes
    memory[offset ^ (offset >> 7 & tile.bytes // 16 - 1) << 4] = codes.reshape(-1)
    stored = np.stack([codes >> 4, codes & 15], -1).reshape(tile.rows, -1) if halves == 2 else codes
    wanted = stored if along else stored.T  # outputs × weights that are summed
    thread = np.arange(128 * hopper.GROUPS)
    place = thread // 128, thread // 32 % 4, thread // 4 % 8, thread % 4
    got = np.full((height, hopper.STEP), -1)
    for row in (0, 8):
        for column in (n + e for n in range(0, hopper.STEP, 8) for e in (0, 1)):
            first = (row, column // 2 * 2) if along else (0, column)
            byte = memory[tile.address(*place, *(first if halves == 2 else (row, column)))]
            code = byte if halves == 1 else byte >> 4 if first == (row, column) else byte & 15
            group, warp, g, c = place
            got[group * 64 + warp * 16 + g + row, c * 2 + column] = code
    if not along and halves == 2:
        got = got.reshape(-1, 2, 8, hopper.STEP).swapaxes(1, 2).reshape(got.shape)
    np.testing.assert_array_equal(got, wanted)
