"""The gated feed-forward by its kernels, interpreted, against the definition; compiled for TPUs, lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.activations import feed_forward, gated_feed_forward
from jaxml.target import INTERPRET, INTERPRET_GPU, target
from jaxml.testing import TPU_TOPOLOGIES, compile_for_tpu, lower_for_gpu, tolerance

# Warned of by newer JAX, wherever the kernel is lowered; `feed_forward_gpu.py` is the only file a successor changes.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

ROWS, WIDTH, HIDDEN, WIDTH2 = 70, 150, 200, 300
DEVICES = (INTERPRET, INTERPRET_GPU)


def draw(dtype=jnp.float32):
    """(x, gate, up, down), outputs of order 1."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (ROWS, WIDTH), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH2)
    scales = 1.0, WIDTH**-0.5, WIDTH**-0.5, HIDDEN**-0.5
    return [(s * jax.random.normal(k, shape)).astype(dtype) for k, shape, s in zip(keys, shapes, scales)]


def close(got, want, dtype):
    scale = float(jnp.max(jnp.abs(want)))
    numbers = lambda a: np.asarray(a, np.float32) / scale
    np.testing.assert_allclose(numbers(got), numbers(want), atol=4 * tolerance(dtype, 4))


def value_and_gradients(arrays, function, implementation):
    def total(arrays):
        y = gated_feed_forward(*arrays, function=function, implementation=implementation)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    return gated_feed_forward(*arrays, function=function, implementation=implementation), jax.grad(total)(arrays)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", feed_forward.FUNCTIONS)
def test_the_kernel_and_its_gradients_are_the_definition(function, device):
    arrays = draw()
    with target(device):
        got = value_and_gradients(arrays, function, "kernel")
    want = value_and_gradients(arrays, function, "xla")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        close(a, b, "float32")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outputs", [3, 4], ids=["the unit alone", "with down"])
def test_narrow_inputs_keep_their_dtype(device, outputs):
    arrays = draw(jnp.bfloat16)[:outputs]
    with target(device):
        got = value_and_gradients(arrays, "swiglu", "kernel")
    want = value_and_gradients(arrays, "swiglu", "xla")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype == jnp.bfloat16
        close(a, b, "bfloat16")


def test_it_is_a_product_of_the_sums_rounded_once():
    """A gate and a value that bfloat16 would round, a product that it need not."""
    x, gate, up = jnp.ones((1, 2), jnp.bfloat16), jnp.array([[256.0], [1.0]]), jnp.array([[0.0], [1 / 257]])
    y = gated_feed_forward(x, gate.astype(x.dtype), up.astype(x.dtype), function="bilinear")
    want = 257 * float(up.astype(x.dtype)[1, 0])
    assert float(y[0, 0]) == float(jnp.asarray(want, jnp.bfloat16))


def test_reverse_mode_keeps_nothing_as_wide_as_the_hidden_layer():
    arrays = draw()
    with target(INTERPRET_GPU):
        _, vjp = jax.vjp(lambda x: gated_feed_forward(x, *arrays[1:], implementation="kernel"), arrays[0])
    assert all(a.shape != (ROWS, HIDDEN) for a in jax.tree.leaves(vjp))


@pytest.mark.parametrize("device", DEVICES)
def test_forward_mode_and_second_derivatives(device):
    x, *weights = draw()
    x = x[:16]

    def both(implementation):
        run = lambda x, gate: gated_feed_forward(x, gate, *weights[1:], implementation=implementation)
        total = lambda *a: jnp.sum(jnp.sin(run(*a)))
        moved = jax.jvp(run, (x, weights[0]), (jnp.cos(x), weights[0]))[1]
        return moved, jax.jvp(jax.grad(total, (0, 1)), (x, weights[0]), (jnp.cos(x), weights[0]))[1]

    with target(device):
        got = both("kernel")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(both("xla"))):
        close(a, b, "float32")


def test_a_batch_of_weights():
    x, *weights = draw()
    stacked = [jnp.stack([w, 2 * w]) for w in weights]
    run = lambda implementation: jax.vmap(
        lambda *w: gated_feed_forward(x[None], *w, implementation=implementation)
    )(*stacked)  # fmt: skip
    with target(INTERPRET):
        close(run("kernel"), run("xla"), "float32")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(function="swish"), "function is one of glu, bilinear"),
        (dict(implementation="triton"), "implementation is one of xla, kernel"),
        (dict(up=jnp.zeros((150, 201))), r"\[F, D2\], got \(70, 150\), \(150, 200\), \(150, 201\)"),
        (dict(down=jnp.zeros((150, 150))), r"shapes are \[..., D\]"),
    ],
)
def test_wrong_arguments_are_told(changed, said):
    given = dict(zip(("x", "gate", "up", "down"), draw())) | changed
    with pytest.raises(ValueError, match=said):
        gated_feed_forward(**given)


def test_where_the_kernel_cannot_run_it_says_why():
    arrays = draw()
    with pytest.raises(NotImplementedError, match="needs a GPU or TPU, this is 'cpu'"):
        gated_feed_forward(*arrays, implementation="kernel")
    with target("TPU v3"), pytest.raises(NotImplementedError, match="this is 'v3'"):
        gated_feed_forward(*arrays, implementation="kernel")
    with jax.enable_x64(True), target(INTERPRET), pytest.raises(NotImplementedError, match="x is float64"):
        gated_feed_forward(*[a.astype("float64") for a in arrays], implementation="kernel")


def step(function):
    def run(x, gate, up, down, dy):
        call = lambda *a: gated_feed_forward(*a, function=function, implementation="kernel")
        y, vjp = jax.vjp(call, x, gate, up, down)
        return y, vjp(dy)

    return run


def like(rows: int, width: int, hidden: int, dtype=jnp.bfloat16):
    shape = lambda *n: jax.ShapeDtypeStruct(n, dtype)
    return [shape(rows, width), *[shape(width, hidden)] * 2, shape(hidden, width), shape(rows, width)]


@pytest.mark.parametrize("function", feed_forward.FUNCTIONS)
def test_lowers_for_cuda(function):
    text = lower_for_gpu(step(function), like(1000, 300, 700)).as_text()
    assert "gated_feed_forward_backward" in text


@pytest.mark.parametrize("function", feed_forward.FUNCTIONS)
def test_compiles_for_a_tpu(function):
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with the tpu extra")
    compile_for_tpu(step(function), like(256, 300, 700), "v5e")


@pytest.mark.slow
@pytest.mark.parametrize("chip, dtype", [("v5e", "float32"), *((chip, "bfloat16") for chip in TPU_TOPOLOGIES)])
def test_compiles_for_every_generation(chip, dtype):
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with the tpu extra")
    compiled = compile_for_tpu(step("swiglu"), like(512, 512, 1408, dtype), chip)
    assert "gated_feed_forward" in compiled.as_text()


@pytest.mark.slow
def test_backwards_three_arrays_as_wide_as_the_hidden_layer_exist():
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with the tpu extra")
    compiled = compile_for_tpu(step("swiglu"), like(2048, 1024, 2816), "v5e")
    arrays = 3 * 2048 * 2816 * 2  # h and two cotangents
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * arrays
