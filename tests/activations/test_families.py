"""Learnable, gated, to the simplex, noisy, rational, spline: their definitions and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import activations
from jaxml.activations import CATALOGUE, fit_rational, gated, learnable, noisy, rational, simplex
from tests.activations.conftest import quick

X = jnp.linspace(-3, 3, 24).reshape(2, 3, 4)
KEY = jax.random.key(0)
LEARNABLE = [name.partition(".")[2] for name, a in CATALOGUE.items() if a.kind == "learnable"]


@pytest.fixture(autouse=True)
def quick_here():
    with quick(True):
        yield


def started(name):
    """(params, x) of a learnable one."""
    pair = getattr(learnable, name)
    with_key = {"frelu": (KEY, 4), "meta_acon": (KEY, 4), "apl": (KEY, (4,)), "polynorm": ()}
    return pair, pair.init(*with_key.get(name, ((4,),))), X[None] if name == "frelu" else X


# What each one is, in plain JAX, at parameters that are not those of the start.
PLAIN = {
    "prelu": lambda p, x: jnp.where(x > 0, x, p["alpha"] * x),
    "swish": lambda p, x: x * jax.nn.sigmoid(p["beta"] * x),
    "acon_c": lambda p, x: (p["p1"] - p["p2"]) * x * jax.nn.sigmoid(p["beta"] * (p["p1"] - p["p2"]) * x) + p["p2"] * x,
    "xielu": lambda p, x: jnp.where(
        x > 0,
        jax.nn.softplus(p["alpha_p"]) * x * x + p["beta"] * x,
        (p["beta"] + jax.nn.softplus(p["alpha_n"])) * (jnp.expm1(jnp.minimum(x, 0)) - x) + p["beta"] * x,
    ),
    "pelu": lambda p, x: jnp.where(x > 0, p["a"] / p["b"] * x, p["a"] * jnp.expm1(jnp.minimum(x, 0) / p["b"])),
    "squareplus": lambda p, x: (x + jnp.sqrt(x * x + p["b"])) / 2,
    "snake": lambda p, x: x + jnp.sin(p["alpha"] * x) ** 2 / p["alpha"],
    "snakebeta": lambda p, x: x + jnp.sin(jnp.exp(p["alpha"]) * x) ** 2 / jnp.exp(p["beta"]),
    "sinusoid": lambda p, x: jnp.sin(p["omega"] * x),
    "dyt": lambda p, x: p["gamma"] * jnp.tanh(p["alpha"] * x) + p["beta"],
    "srelu": lambda p, x: jnp.where(
        x >= p["right"],
        p["right"] + p["right_slope"] * (x - p["right"]),
        jnp.where(x <= p["left"], p["left"] + p["left_slope"] * (x - p["left"]), x),
    ),
}


@pytest.mark.parametrize("name", LEARNABLE)
def test_learnable_ones_are_finite_in_any_dtype_and_keep_their_arguments_only(name):
    pair, params, x = started(name)
    value, gradients = jax.value_and_grad(lambda p, x: jnp.sum(pair.apply(p, x) ** 2), (0, 1))(params, x)
    assert np.isfinite(value) and all(np.isfinite(a).all() for a in jax.tree.leaves(gradients))
    assert pair.apply(params, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert pair.about and all(a.dtype == jnp.float32 for a in jax.tree.leaves(params))
    many = jnp.broadcast_to(x, (50, *x.shape)).reshape(-1, *x.shape[1:])
    _, vjp = jax.vjp(lambda x: pair.apply(params, x), many)
    if name != "meta_acon":
        assert sum(a.nbytes for a in jax.tree.leaves(vjp) if a.size >= many.size) <= many.nbytes


@pytest.mark.parametrize("name", PLAIN)
def test_learnable_ones_are_their_formulas_with_gradients(name):
    pair, params, x = started(name)
    keys = iter(jax.random.split(KEY, 8))
    params = jax.tree.map(lambda a: a + 0.2 * jax.random.uniform(next(keys), a.shape), params)
    wide = lambda p: jax.tree.map(lambda a: a.reshape((1,) * (3 - a.ndim) + a.shape) if a.ndim else a, p)
    ours = lambda p, x: jnp.sum(jnp.cos(X) * pair.apply(p, x))
    plain = lambda p, x: jnp.sum(jnp.cos(X) * PLAIN[name](wide(p), x))
    np.testing.assert_allclose(pair.apply(params, x), PLAIN[name](wide(params), x), rtol=2e-5, atol=2e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, jax.grad(ours, (0, 1))(params, x), jax.grad(plain, (0, 1))(params, x))


def test_starts_are_those_of_the_papers():
    x = jnp.linspace(-2, 2, 9)
    at_start = lambda name: getattr(learnable, name).apply(getattr(learnable, name).init(), x)
    np.testing.assert_allclose(at_start("swish"), activations.silu(x), rtol=1e-6)
    np.testing.assert_allclose(at_start("acon_c"), activations.silu(x), rtol=1e-6)
    np.testing.assert_allclose(at_start("pelu"), activations.elu(x), rtol=1e-6)
    np.testing.assert_allclose(at_start("snakebeta"), activations.snake(x), rtol=1e-6)
    np.testing.assert_allclose(at_start("xielu")[-1], 0.8 * 4 + 0.5 * 2, rtol=1e-6)
    np.testing.assert_allclose(at_start("spline"), activations.silu(x), atol=2e-3)
    np.testing.assert_allclose(at_start("rational"), activations.silu(x), atol=1e-5)
    with pytest.raises(ValueError, match=r"snake: params has alpha, got beta\. Make them with init\."):
        learnable.snake.apply({"beta": 1.0}, x)


def test_xielu_is_accurate_where_its_left_side_cancels():
    x = -(10.0 ** np.linspace(-6, 1, 200))
    params = learnable.xielu.init() | {"beta": jnp.zeros(())}
    n = np.log1p(np.exp(np.float64(params["alpha_n"])))
    with jax.enable_x64(True):
        true = n * np.asarray(jnp.where(x < -1e-3, jnp.expm1(x) - x, x * x / 2 + x**3 / 6 + x**4 / 24))
    np.testing.assert_allclose(learnable.xielu.apply(params, x.astype(np.float32)), true, rtol=2e-6)


@pytest.mark.parametrize("name", ["leaky_relu", "tanh", "silu", "gelu", "mish"])
@pytest.mark.parametrize("version", rational.VERSIONS)
def test_fit_rational_comes_close(name, version):
    function = getattr(activations, name)
    x = jnp.linspace(-3, 3, 777)
    error = np.abs(rational.apply(fit_rational(function, version=version), x, version) - function(x)).max()
    assert error < {"leaky_relu": 0.02, "gelu": 3e-3, "mish": 3e-3}.get(name, 1e-5)


def test_fit_rational_and_spline_refuse_by_name():
    with pytest.raises(ValueError, match=r"rational: version is one of A, B, got 'C'"):
        fit_rational(jnp.tanh, version="C")
    with pytest.raises(ValueError, match="interval has low < high"):
        fit_rational(jnp.tanh, interval=(1.0, -1.0))
    with pytest.raises(ValueError, match=r"the function is finite on .*, got nan"):
        fit_rational(jnp.log)
    with pytest.raises(ValueError, match="grid ≥ 1 and low < high"):
        learnable.spline.init(grid=0)


def test_a_rational_of_a_huge_number_is_finite():
    params = fit_rational(activations.silu)
    x = jnp.array([-3e38, -1e20, 1e20, 3e38, jnp.inf])
    assert np.isfinite(rational.apply(params, x)).all()
    assert np.isfinite(jax.grad(lambda x: rational.apply(params, x).sum())(x)).all()


def test_a_spline_is_smooth_inside_and_straight_outside():
    params = learnable.spline.init(function=jnp.sin)
    f = lambda x: learnable.spline.apply(params, x)
    x = jnp.linspace(-4, 4, 201)
    np.testing.assert_allclose(f(x), jnp.sin(x), atol=4e-3)
    second = jax.vmap(jax.grad(jax.grad(f)))
    np.testing.assert_allclose(second(jnp.array([-9.0, 5.0, 30.0])), 0, atol=1e-6)
    assert np.abs(np.diff(second(jnp.linspace(-3.9, 3.9, 2000)))).max() < 0.02


GATES = {
    "siglu": jax.nn.sigmoid, "bilinear": lambda g: g, "reglu": jax.nn.relu, "geglu": jax.nn.gelu, "swiglu": jax.nn.silu,
    "seglu": jax.nn.selu, "mishglu": jax.nn.mish,
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_gated_units_are_their_definition(name):
    gate, value = jax.random.normal(KEY, (2, 5, 8))
    ours, plain = getattr(gated, name), lambda g, v: GATES[name](g) * v
    np.testing.assert_allclose(ours(gate, value), plain(gate, value), rtol=1e-5, atol=1e-6)
    for a, b in zip(*(jax.grad(lambda g, v: jnp.sin(f(g, v)).sum(), (0, 1))(gate, value) for f in (ours, plain))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_clamped_swiglu_is_its_definition_and_flat_beyond_the_limit():
    gate, value = jnp.array([-9.0, 0.5, 6.0, 8.0]), jnp.array([-9.0, 2.0, 6.0, 8.0])
    g, v = jnp.minimum(gate, 7), jnp.clip(value, -7, 7)
    np.testing.assert_allclose(gated.clamped_swiglu(gate, value), g * jax.nn.sigmoid(1.702 * g) * (v + 1), rtol=1e-6)
    dg, dv = jax.grad(lambda g, v: gated.clamped_swiglu(g, v).sum(), (0, 1))(gate, value)
    assert dg[3] == 0 and dv[0] == dv[3] == 0 and dg[2] != 0


def test_glu_and_halves():
    x = jax.random.normal(KEY, (3, 6, 4))
    for axis in (-1, 1):
        np.testing.assert_allclose(gated.glu(x, axis), jax.nn.glu(x, axis), rtol=1e-6)
    with pytest.raises(ValueError, match=r"halves: the axis has an even length, got 3\."):
        gated.halves(jnp.ones(3))
    np.testing.assert_allclose(gated.geglu(x, x, approximate=False), activations.gelu(x, False) * x, rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "softmin", "sparsemax", "entmax15"])
def test_the_simplex_is_reached_along_any_axis(name):
    function = getattr(simplex, name)
    x = 3 * jax.random.normal(KEY, (4, 7, 5))
    for axis in (-1, 0, 1):
        p = function(x, axis)
        assert (p >= 0).all()
        np.testing.assert_allclose(p.sum(axis), 1, rtol=1e-5)
    np.testing.assert_allclose(function(x + 100, -1), function(x, -1), atol=2e-5)
    assert np.isfinite(function(jnp.array([0.0, -jnp.inf, 1.0]))).all() or name == "softmin"


@pytest.mark.parametrize("name, alpha", [("sparsemax", 2.0), ("entmax15", 1.5)])
def test_sparse_maps_solve_their_optimality_conditions(name, alpha):
    x = 2 * jax.random.normal(KEY, (50, 9))
    p = np.asarray(getattr(simplex, name)(x))
    assert (p == 0).any()
    tau = (alpha - 1) * np.asarray(x) - p ** (alpha - 1)  # the same for all of the support, not less elsewhere
    top = np.where(p > 0, tau, -np.inf).max(-1, keepdims=True)
    assert (np.where(p > 0, np.abs(tau - top), 0) < 1e-5).all() and (tau <= top + 1e-5).all()


@pytest.mark.parametrize("name", ["softmax1", "sparsemax", "entmax15"])
def test_gradients_to_the_simplex_are_numerical_ones_to_order_two(name):
    function = getattr(simplex, name)
    with jax.enable_x64(True):
        x, w = jnp.array([0.3, -0.2, 1.1, 0.9, -2.5]), jnp.array([1.0, -2.0, 0.5, 3.0, 0.7])
        f = lambda x: jnp.sum(w * function(x))
        numeric = lambda g: jnp.stack([(g(x + 1e-6 * e) - g(x - 1e-6 * e)) / 2e-6 for e in jnp.eye(5)])
        np.testing.assert_allclose(jax.grad(f)(x), numeric(f), atol=1e-8)
        np.testing.assert_allclose(jax.jacfwd(jax.grad(f))(x), numeric(jax.grad(f)), atol=1e-7)
        np.testing.assert_allclose(jax.hessian(f)(x), jax.jacrev(jax.jacrev(f))(x), atol=1e-12)


def test_softmax1_is_softmax_with_a_zero_that_is_dropped():
    x = jax.random.normal(KEY, (3, 6)) * 30
    padded = jax.nn.softmax(jnp.concatenate([x, jnp.zeros((3, 1))], -1))[:, :-1]
    np.testing.assert_allclose(simplex.softmax1(x), padded, rtol=1e-5, atol=1e-30)
    assert simplex.softmax1(jnp.full(4, -jnp.inf)).tolist() == [0, 0, 0, 0]


def test_features():
    x = jax.random.normal(KEY, (2, 6))
    np.testing.assert_allclose(activations.maxout(x, 3), x.reshape(2, 2, 3).max(-1))
    assert activations.crelu(x, 0).shape == (4, 6)
    ordered = activations.group_sort(x, 2)
    np.testing.assert_allclose(jnp.sort(ordered), jnp.sort(x))
    jacobian = jax.jacobian(activations.group_sort)(x[0])
    np.testing.assert_allclose(jacobian @ jacobian.T, np.eye(6), atol=1e-6)
    with pytest.raises(ValueError, match=r"maxout: the axis is a multiple of the group, got 6 and 4\."):
        activations.maxout(x, 4)


def test_noise_is_that_of_the_key_and_has_the_right_mean():
    x = jnp.zeros(20000)
    for name in ("rrelu", "bernoulli", "concrete", "hard_concrete", "gumbel_softmax"):
        function = getattr(noisy, name)
        np.testing.assert_array_equal(function(KEY, X), function(KEY, X))
        assert np.isfinite(jax.grad(lambda x: function(KEY, x).sum())(X)).all()
        assert function(KEY, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert abs(noisy.bernoulli(KEY, x + 1).mean() - jax.nn.sigmoid(1.0)) < 0.02
    assert abs((noisy.hard_concrete(KEY, x) == 0).mean() - jax.nn.sigmoid(-2 / 3 * np.log(11))) < 0.02
    assert abs((noisy.concrete(KEY, x + 1) > 0.5).mean() - jax.nn.sigmoid(1.0)) < 0.02
    hot = noisy.gumbel_softmax(KEY, jnp.broadcast_to(jnp.log(jnp.array([0.2, 0.8])), (20000, 2)), hard=True)
    np.testing.assert_allclose(hot.mean(0), [0.2, 0.8], atol=0.02)
    np.testing.assert_allclose(
        jax.grad(lambda x: noisy.bernoulli(KEY, x).sum())(X), jax.grad(lambda x: jax.nn.sigmoid(x).sum())(X), rtol=1e-5
    )
    with pytest.raises(ValueError, match="rrelu: lower ≤ upper"):
        noisy.rrelu(KEY, X, 0.5, 0.1)
