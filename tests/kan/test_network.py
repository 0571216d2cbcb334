"""Networks: shapes, both implementations, nodes that multiply, what is trained, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import checkpoint, kan
from jaxml.kan import bases

WIDTHS = [2, (3, 2), (1, [3]), 2]


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (4, 5, 2), minval=-1.5, maxval=1.5)


@pytest.mark.parametrize("basis", bases.BASES)
def test_every_basis_is_the_sum_of_its_edges_by_both_implementations(basis, x):
    params = kan.init(jax.random.key(0), WIDTHS, basis=basis)
    assert params.widths == (2, (3, (2, 2)), (1, (3,)), 2)
    run = lambda params, x: [kan.apply(params, x, implementation=name) for name in ("split", "fused", None)]
    split, fused, chosen = jax.jit(run)(params, x)
    told, layers = jax.jit(lambda params, x: kan.apply(params, x, edges=True))(params, x)
    assert (
        split.shape == (4, 5, 2)
        and layers[0]["edges"].shape == (4, 5, 2, 7)
        and layers[0]["outputs"].shape == (4, 5, 5)
    )
    np.testing.assert_allclose(split, fused, atol=2e-5)
    np.testing.assert_allclose(split, told, atol=2e-5)
    np.testing.assert_allclose(chosen, split, atol=1e-6)  # what the CPU takes


STARTS = [("bspline", "pykan"), ("bspline", "glorot"), *((name, "power") for name in bases.BASES)]


@pytest.mark.parametrize("basis, start", STARTS)
def test_outputs_are_of_the_size_of_inputs_at_the_start(basis, start):
    params = kan.init(jax.random.key(0), [64, 64, 64], basis=basis, start=start)
    y = kan.apply(params, jax.random.normal(jax.random.key(1), (256, 64)))
    assert 0.01 < float(jnp.std(y)) < 10


def test_multiplying_nodes_multiply():
    params = kan.init(jax.random.key(0), [2, (1, [2, 3]), 1])
    x = jax.random.normal(jax.random.key(1), (7, 2))
    _, (first, _) = kan.apply(params, x, edges=True)
    sums, outputs = first["sums"], first["outputs"]
    want = jnp.stack([sums[:, 0], sums[:, 1] * sums[:, 2], sums[:, 3] * sums[:, 4] * sums[:, 5]], axis=1)
    np.testing.assert_allclose(outputs, want, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_of_inputs_are_those_of_outputs(dtype, x):
    params = kan.init(jax.random.key(0), [2, 5, 1])
    y = kan.apply(params, x.astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), kan.apply(params, x), atol=0.1)


def test_derivatives_of_every_order_in_both_modes():
    with jax.enable_x64(True):
        params = kan.init(jax.random.key(0), [2, 1], order=5, dtype=jnp.float64)
        line = lambda t: kan.apply(params, jnp.stack([0.3 + t, -0.2 + 0.5 * t])[None], implementation="fused")[0, 0]
        forward, reverse = jax.jacfwd, jax.grad

        @jax.jit
        def run(t):
            second, third = reverse(reverse(line)), reverse(forward(reverse(line)))
            return reverse(line)(t), forward(line)(t), second(t), forward(forward(line))(t), third(t), second(t + 1e-4)

        by_reverse, by_forward, second, other, third, beside = run(0.0)
        np.testing.assert_allclose(by_reverse, by_forward, atol=1e-12)
        np.testing.assert_allclose(second, other, atol=1e-10)
        np.testing.assert_allclose(third, (beside - second) / 1e-4, rtol=1e-2, atol=1e-3)


def test_what_is_trained_apart_from_the_rest():
    params = kan.init(jax.random.key(0), WIDTHS)
    trained, rest = kan.split(params)
    assert jax.tree.structure(kan.combine(trained, rest)) == jax.tree.structure(params)
    loss = lambda trained, x: jnp.sum(kan.apply(kan.combine(trained, rest), x) ** 2)
    grads = jax.jit(jax.grad(loss))(trained, jnp.ones((3, 2)))
    assert len(jax.tree.leaves(grads)) == 2 * 3 and all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_one_pytree_is_a_checkpoint(tmp_path):
    params = kan.update(kan.init(jax.random.key(0), WIDTHS), jnp.linspace(0, 5, 40).reshape(20, 2), eps=0.5)
    with checkpoint.Checkpoints(tmp_path) as saved:
        saved.save(1, params)
        saved.wait()
        back = saved.restore(jax.eval_shape(lambda: params))
    jax.tree.map(np.testing.assert_array_equal, back, params)


BAD = {
    "one width": (dict(widths=[2]), "at least two"),
    "empty width": (dict(widths=[2, 0, 1]), "every width has a node"),
    "arity": (dict(widths=[2, (1, [1]), 1]), "multiplies at least two sums"),
    "basis": (dict(basis="hermite"), "basis is one of bspline"),
    "order": (dict(order=6), "order is in 0 … 5, got 6"),
    "grid": (dict(grid=0), "grid is a number of cells, at least 1, got 0"),
    "outside": (dict(outside="cubic"), "outside is one of linear"),
    "base": (dict(base="swish"), "base is one of silu"),
    "start": (dict(start="he"), "start is one of power"),
    "periodic": (dict(outside="periodic", grid=3), "more cells than the order 3, got 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_said(name):
    options, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence):
        kan.init(jax.random.key(0), **({"widths": [2, 1]} | options))


def test_bad_inputs_are_said():
    params = kan.init(jax.random.key(0), [2, 1])
    with pytest.raises(ValueError, match=r"the layer's 2 inputs, got shape \(4, 3\)"):
        kan.apply(params, jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="implementation is one of split, fused, kernel or None, got 'gather'"):
        kan.apply(params, jnp.ones((4, 2)), implementation="gather")


def test_integers_and_booleans_are_numbers():
    params = kan.init(jax.random.key(0), [2, 3, 1])
    want = kan.apply(params, jnp.array([[1.0, 0.0]]))
    for x in (jnp.array([[1, 0]]), np.array([[True, False]])):
        got, told = kan.apply(params, x, edges=True)
        np.testing.assert_allclose(kan.apply(params, x), want, rtol=1e-6)
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert told[0]["inputs"].dtype == told[0]["edges"].dtype == jnp.float32


def test_edges_as_well_take_the_layers_inputs_only():
    with pytest.raises(ValueError, match=r"the layer's 2 inputs, got shape \(4, 1\)"):
        kan.apply(kan.init(jax.random.key(0), [2, 3, 1]), jnp.ones((4, 1)), edges=True)


def test_every_start_is_made_inside_jit():
    for start in ("power", "pykan", "glorot"):
        made = jax.jit(lambda key, start=start: kan.init(key, [2, 3, 1], start=start))(jax.random.key(0))
        assert jax.tree.all(jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), made))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(domain=(0.0, 0.0)), "low < high"),
        (dict(domain=(0.0, float("inf"))), "both finite"),
        (dict(widths=[2, (1, -1), 1]), "counts nodes"),
        (dict(widths=[2, 3.0, 1]), r"a width is n, \(n, m\)"),
        (dict(widths=[2, (3.0, 1), 1]), "all whole numbers, got"),
        (dict(widths=[2, (1, 1.0), 1]), "all whole numbers, got"),
        (dict(widths=[2, (1, [2.0]), 1]), "all whole numbers, got"),
        (dict(order=2.0), "order is in 0 … 5, got 2.0"),
    ],
)
def test_numbers_that_mean_nothing_are_told(given, said):
    with pytest.raises(ValueError, match=said):
        kan.init(jax.random.key(0), **(dict(widths=[2, 1]) | given))


def test_integers_of_numpy_are_those_of_python():
    """So that a file, whose header is JSON, takes them."""
    one, two = np.int64(1), np.int64(2)
    params = kan.init(jax.random.key(0), [two, (one, [two, two]), one], grid=np.int64(3), order=two)
    assert repr(params.widths) == "(2, (1, (2, 2)), 1)"
    assert repr(params.layers[0].spec).startswith("Spec(grid=3, order=2,")
