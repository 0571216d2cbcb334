"""The kernels that never store the basis, interpreted, against their definitions; and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import kan
from jaxml.kan import kernel
from jaxml.kan import layer as layers
from jaxml.target import INTERPRET_GPU, target
from jaxml.testing import lower_for_gpu, tolerance

# Warned of by newer JAX, wherever the kernel is lowered; `kernel_gpu.py` is the only file that a successor changes.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

SPECS = {
    "cubic": layers.Spec(5),
    "periodic": layers.Spec(7, order=2, outside="periodic"),
    "pykan's end": layers.Spec(3, order=1, outside="zero"),
    "steps": layers.Spec(4, order=0, outside="clamp"),
    "quintic": layers.Spec(9, order=5),
}
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


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_maps_are_their_definitions(spec, n):
    layer, x, weight, g = draw(spec)
    arguments = {
        "spread": (x, weight, layer.coef, layer.points),
        "collect": (x, layer.coef, g, layer.points),
        "outer": (x, weight, g, layer.points),
    }
    with target(INTERPRET_GPU):
        for name, given in arguments.items():
            close(getattr(kernel, name)(spec, n, *given), getattr(kernel, f"define_{name}")(spec, n, *given))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_layer_and_its_gradients_are_those_of_the_contraction(dtype):
    layer, x, _, g = draw(SPECS["cubic"], dtype)

    def run(implementation):
        def value(layer, x):
            return jnp.sum((layers.apply(layer, x, implementation=implementation) * g).astype(jnp.float32))

        return jax.value_and_grad(value, (0, 1), allow_int=True)(layer, x)

    with target(INTERPRET_GPU):
        got, want = run("kernel"), run("fused")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        close(a.astype(jnp.float32), b.astype(jnp.float32), dtype)


def test_second_derivatives_in_every_mode():
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

    with target(INTERPRET_GPU):
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
    with pytest.raises(NotImplementedError, match="needs a GPU, this is 'cpu'"):
        kan.apply(params, x, implementation="kernel")
    with target(INTERPRET_GPU):
        with pytest.raises(NotImplementedError, match="knows B-splines on uniform grids, the basis is 'rbf'"):
            kan.apply(kan.init(jax.random.key(0), [2, 1], basis="rbf"), x, implementation="kernel")
        with jax.enable_x64(True), pytest.raises(NotImplementedError, match="x is float64"):
            kan.apply(params, x.astype("float64"), implementation="kernel")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [5, 100])
def test_lowers_for_cuda_with_its_gradients(grid, dtype):
    spec = layers.Spec(grid)
    like = jax.eval_shape(lambda key: layers.init(key, (300, 64), spec, dtype=dtype), jax.random.key(0))
    x = jax.ShapeDtypeStruct((1024, 300), dtype)

    def step(coef, x, base, points):
        layer = layers.Layer(coef, base, points, None, (), spec)
        return jnp.sum(layers.apply(layer, x, implementation="kernel").astype(jnp.float32) ** 2)

    text = lower_for_gpu(jax.grad(step, (0, 1)), (like.coef, x, like.base, like.points)).as_text()
    assert all(name in text for name in ("kan_spread", "kan_collect", "kan_outer"))
    assert f"1024x{spec.size}x300" not in text and f"1024x300x{spec.size}" not in text  # the basis
