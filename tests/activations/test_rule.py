"""The mechanism: dtypes, broadcasting, one array kept, memory of a scan over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import activations
from jaxml.activations import CATALOGUE, activation, gated, learnable
from tests.activations.conftest import NAMES


def kept(function, *arguments):
    """Bytes an element that the backward pass keeps, scalars not counted."""
    _, vjp = jax.vjp(function, *arguments)
    return sum(a.nbytes for a in jax.tree.leaves(vjp) if a.ndim) / arguments[0].size


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_pass_keeps_one_array(name):
    x = jnp.linspace(0.1, 0.9, 64)
    mask = 1 if name in ("relu", "relu6") else 0  # jax.nn's own keep a mask beside
    assert kept(CATALOGUE[name].function, x) <= 4 + mask
    assert kept(CATALOGUE[name].function, x.astype(jnp.bfloat16)) <= 2 + mask


@pytest.mark.parametrize("name", ["siglu", "bilinear", "reglu", "geglu", "swiglu", "seglu", "gtu", "clamped_swiglu"])
def test_a_gated_unit_keeps_its_two_inputs(name):
    gate, value = jnp.linspace(-2, 2, 64), jnp.linspace(1, 3, 64)
    assert kept(getattr(gated, name), gate, value) == 8


def layers(act, depth=24, tokens=512, width=64, hidden=256):
    """Temporary bytes of the gradient of a residual feed-forward network, by the compiler's plan."""

    def loss(weights, x):
        def layer(x, w):
            return x + act(x @ w["up"]) @ w["down"], None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    weights = {"up": shape(depth, width, hidden), "down": shape(depth, hidden, width)}
    compiled = jax.jit(jax.grad(loss)).lower(weights, shape(tokens, width)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", ["mish", "gelu", "silu"])
def test_a_scan_over_layers_needs_at_most_0_6_of_jax_nns_memory(name):
    assert layers(getattr(activations, name)) <= 0.6 * layers(getattr(jax.nn, name))


def test_dtypes_numbers_and_integers():
    for dtype in ("float16", "bfloat16", "float32"):
        assert activations.mish(jnp.ones(3, dtype)).dtype == dtype
        assert activations.softmax(jnp.ones(3, dtype)).dtype == dtype
    with jax.enable_x64(True):
        assert activations.mish(jnp.ones(3, "float64")).dtype == "float64"
    assert activations.silu(2).dtype == jnp.float32 and activations.silu(np.arange(3)).shape == (3,)
    assert activations.swiglu(jnp.ones(3, "bfloat16"), jnp.ones(3, "float32")).dtype == "bfloat16"
    with pytest.raises(TypeError, match=r"silu: x has real numbers, got complex64\."):
        activations.silu(1j)


def test_parameters_are_numbers_or_arrays_and_broadcast_from_the_last_axis():
    x, alpha = jnp.ones((2, 3)) * -1.0, jnp.array([1.0, 2.0, 3.0])
    rows = activations.elu(x, alpha)
    for i in range(3):
        np.testing.assert_allclose(rows[:, i], activations.elu(x[:, i], float(alpha[i])), rtol=1e-6)
    assert activations.elu(-1.0, alpha).shape == (3,)
    gradient = jax.grad(lambda a: activations.elu(x, a).sum())(alpha)
    np.testing.assert_allclose(gradient, np.full(3, 2 * np.expm1(-1)), rtol=1e-6)
    assert jax.grad(lambda x: activations.elu(x, alpha).sum())(x).shape == x.shape


def test_jit_vmap_and_eager_agree():
    x = jnp.linspace(-4, 4, 33)
    for name in ("gelu", "entmax15"):
        f = getattr(activations, name)
        np.testing.assert_allclose(jax.jit(f)(x), f(x), rtol=2e-6, atol=1e-7)
        rows = x[:32].reshape(4, 8)
        np.testing.assert_allclose(jax.vmap(f)(rows), jnp.stack([f(r) for r in rows]), rtol=1e-6, atol=1e-7)


def test_an_activation_of_ones_own():
    @activation(lambda x, a: 3 * a * x * x)
    def cube(x, a=1.0):
        return a * x**3

    x = jnp.linspace(-1, 1, 5)
    np.testing.assert_allclose(jax.vmap(jax.grad(cube))(x), 3 * x * x, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda a: cube(x, a).sum())(2.0), (x**3).sum(), atol=1e-6)
    hessian = jax.hessian(lambda v: cube(v[0], v[1]))(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(hessian, [[6.0, 0.75], [0.75, 0.0]], rtol=1e-6)


def test_gradients_pass_through_jvp_of_vjp_with_parameters():
    params = learnable.swish.init((4,))
    x = jnp.linspace(-2, 2, 12).reshape(3, 4)
    f = lambda p, x: learnable.swish.apply(p, x).sum()
    plain = lambda p, x: (x * jax.nn.sigmoid(p["beta"][None] * x)).sum()
    for derivative in (lambda f: jax.jacfwd(jax.grad(f)), lambda f: jax.jacrev(jax.grad(f, 1))):
        ours, theirs = derivative(f)(params, x), derivative(plain)(params, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
