"""The kernels that never store the basis, interpreted, against their definitions; lowered and compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan
from jaxml.kan import kernel
from jaxml.kan import layer as layers
from jaxml.target import INTERPRET, INTERPRET_GPU, target
from jaxml.testing import TPU_TOPOLOGIES, compile_for_tpu, lower_for_gpu, tolerance

# Warned of by newer JAX, wherever the kernel is lowered; `kernel_gpu.py` is the only file that a successor changes.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

SPECS = {
    "cubic": layers.Spec(5),
    "periodic": layers.Spec(7, order=2, outside="periodic"),
    "pykan's end": layers.Spec(3, order=1, outside="zero"),
    "steps": layers.Spec(4, order=0, outside="clamp"),
    "quintic": layers.Spec(9, order=5),
    "fine": layers.Spec(40),  # more functions than a step of the TPU's kernel takes
}
DEVICES = (INTERPRET_GPU, INTERPRET)
MAPS = [(INTERPRET_GPU, name, n) for name in SPECS for n in (0, 1, 2)]
MAPS += [(INTERPRET, name, n) for name, n in (("cubic", 0), ("cubic", 1), ("periodic", 2), ("steps", 0), ("fine", 1))]
ROWS, N_IN, N_OUT = 150, 37, 19


def draw(spec, dtype=jnp.float32):
    """(layer, x beyond the grid at both ends, weight, g)."""
    layer = layers.init(jax.random.key(0), (N_IN, N_OUT), spec, dtype=dtype)
    keys = jax.random.split(jax.random.key(1), 3)
    x, weight = (0.7 * jax.random.normal(k, (ROWS, N_IN), dtype) for k in keys[:2])
    return layer, x, weight, jax.random.normal(keys[2], (ROWS, N_OUT), dtype)


def close(got, want, dtype=jnp.float32, terms: int = 256):
    scale = float(jnp.max(jnp.abs(want))) or 1.0
    np.testing.assert_allclose(got / scale, want / scale, atol=4 * tolerance(dtype, terms))


@pytest.mark.parametrize(("device", "name", "n"), MAPS)
def test_the_maps_are_their_definitions(device, name, n):
    spec = SPECS[name]
    layer, x, weight, g = draw(spec)
    arguments = {
        "spread": (x, weight, layer.coef, layer.points),
        "collect": (x, layer.coef, g, layer.points),
        "outer": (x, weight, g, layer.points),
    }
    with target(device):
        for name, given in arguments.items():
            close(getattr(kernel, name)(spec, n, x.dtype, *given), getattr(kernel, f"define_{name}")(spec, n, *given))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_layer_and_its_gradients_are_those_of_the_contraction(dtype, device):
    layer, x, _, g = draw(SPECS["cubic"], dtype)

    def run(implementation):
        def value(layer, x):
            return jnp.sum((layers.apply(layer, x, implementation=implementation) * g).astype(jnp.float32))

        return jax.value_and_grad(value, (0, 1), allow_int=True)(layer, x)

    with target(device):
        got, want = run("kernel"), run("fused")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        close(a.astype(jnp.float32), b.astype(jnp.float32), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_in_every_mode(device):
    layer, x, *_ = draw(SPECS["cubic"])
    x = x[:4]

    def total(implementation):
        def value(coef, x, points):
            changed = dataclasses.replace(layer, coef=coef, points=points)
            return jnp.sum(jnp.sin(layers.apply(changed, x, implementation=implementation)))

        moved = jax.jvp(lambda x: value(layer.coef, x, layer.points), (x,), (jnp.cos(x),))[1]
        of_gradient = jax.grad(lambda *a: jnp.sum(jax.grad(value, 1)(*a) ** 2), (0, 1))(layer.coef, x, layer.points)
        twice = jax.jvp(jax.grad(value), (layer.coef, x, layer.points), (layer.coef, x, 0 * layer.points))[1]
        return moved, of_gradient, twice, jax.grad(value, 2)(layer.coef, x, layer.points)

    with target(device):
        got, want = total("kernel"), total("fused")
    jax.tree.map(close, got, want)


def test_a_batch_axis_of_layers():
    layers_of = jax.vmap(lambda key: kan.init(key, [3, 4, 2]))(jax.random.split(jax.random.key(0), 2))
    x = jax.random.uniform(jax.random.key(1), (2, 5, 3), minval=-1.0)

    def gradient(implementation):
        value = lambda params, x: jnp.sum(kan.apply(params, x, implementation=implementation) ** 2)
        return jax.vmap(jax.grad(value, 1))(layers_of, x)

    with target(INTERPRET_GPU):
        close(gradient("kernel"), gradient("fused"))


def test_where_it_cannot_run_it_says_why():
    params = kan.init(jax.random.key(0), [2, 1])
    x = jnp.zeros((3, 2))
    with pytest.raises(NotImplementedError, match="needs a GPU or TPU, this is 'cpu'"):
        kan.apply(params, x, implementation="kernel")
    with target(INTERPRET_GPU):
        with pytest.raises(NotImplementedError, match="knows B-splines on uniform grids, the basis is 'rbf'"):
            kan.apply(kan.init(jax.random.key(0), [2, 1], basis="rbf"), x, implementation="kernel")
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match="x is float64"):
            kan.apply(params, x.astype("float64"), implementation="kernel")


def gradients(spec, n_in: int, n_out: int, dtype):
    """(gradients by coefficients and inputs, their arguments)."""
    like = jax.eval_shape(lambda key: layers.init(key, (n_in, n_out), spec, dtype=dtype), jax.random.key(0))

    def total(coef, x, base, points):
        layer = layers.Layer(coef, base, points, None, (), spec)
        return jnp.sum(layers.apply(layer, x, implementation="kernel").astype(jnp.float32) ** 2)

    return jax.grad(total, (0, 1)), (like.coef, jax.ShapeDtypeStruct((1024, n_in), dtype), like.base, like.points)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [5, 100])
def test_lowers_for_cuda_with_its_gradients(grid, dtype):
    spec = layers.Spec(grid)
    text = lower_for_gpu(*gradients(spec, 300, 64, dtype)).as_text()
    assert all(name in text for name in ("kan_spread", "kan_collect", "kan_outer"))
    assert f"1024x{spec.size}x300" not in text and f"1024x300x{spec.size}" not in text  # the basis


@pytest.mark.parametrize(
    ("chip", "dtype", "grid"),
    [("v5e", "bfloat16", 5)]
    + [pytest.param(c, "bfloat16", 5, marks=pytest.mark.slow) for c in TPU_TOPOLOGIES if c != "v5e"]
    + [pytest.param("v4", "float32", n, marks=pytest.mark.slow) for n in (5, 100)],
)
def test_compiles_for_tpus_and_needs_no_memory_beside_its_results(chip, dtype, grid):
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with the tpu extra")
    compiled = compile_for_tpu(*gradients(layers.Spec(grid), 256, 256, dtype), chip)
    y_and_its_cotangent = 2 * 4 * 1024 * 256
    coefficients = 4 * (grid + 4) * 256 * 256  # made up to what a step takes
    assert compiled.memory_analysis().temp_size_in_bytes <= y_and_its_cotangent + (coefficients * 2 if grid > 20 else 0)
