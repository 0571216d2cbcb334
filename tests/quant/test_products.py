import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import quant, weights
from jaxml.testing import tolerance

FORMATS = tuple(quant.FORMATS)
SHAPES = [(64, 24), (48, 20), (9, 7)]  # blocks that end with rows and blocks that do not


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_products_are_those_of_the_dense_matrix_in_every_mode(format, shape, axis):
    w = jax.random.normal(jax.random.key(0), shape)
    q = quant.FORMATS[format](w, axis=axis)
    d = q.dense()
    x, y = jax.random.normal(jax.random.key(1), (3, 5, shape[0])), jax.random.normal(jax.random.key(2), (2, shape[1]))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance("float32", max(shape)) * 20, rtol=1e-5)
    close(weights.dot(x, q), x @ d)
    close(weights.dot(x[0, 0], q), x[0, 0] @ d)
    close(weights.einsum("...D,VD->...V", y, q), y @ d.T)
    loss = lambda x, w: jnp.sum(jnp.sin(weights.dot(x, w)))
    close(jax.grad(loss)(x, q), jax.grad(loss)(x, d))
    close(jax.jvp(lambda x: loss(x, q), (x,), (x,))[1], jax.jvp(lambda x: loss(x, d), (x,), (x,))[1])
    close(jax.hessian(loss)(x[0, 0], q), jax.hessian(loss)(x[0, 0], d))
    close(jax.vmap(lambda x: weights.dot(x, q))(x), x @ d)
    close(jax.jit(jax.grad(jax.checkpoint(loss)))(x, q), jax.grad(loss)(x, d))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_rows_that_are_taken_are_those_of_the_dense_matrix_to_the_bit(format, shape, axis):
    q, ids = quant.FORMATS[format](jax.random.normal(jax.random.key(0), shape), axis=axis), jnp.array([[0, 8]])
    with jax.disable_jit():  # a fused product and sum may be rounded once
        np.testing.assert_array_equal(weights.take(q, ids), q.dense()[ids])


@pytest.mark.parametrize("format", FORMATS)
def test_leading_axes_are_matrices_of_their_own(format):
    w = jax.random.normal(jax.random.key(0), (3, 64, 10))
    q = quant.FORMATS[format](w)
    x = jax.random.normal(jax.random.key(1), (3, 4, 64))
    for i in range(3):
        alone = quant.FORMATS[format](w[i])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: a[i], q), alone)
    np.testing.assert_allclose(weights.dot(x, q), x @ q.dense(), atol=1e-4)
    experts = weights.einsum("TED,EDF->TEF", x.swapaxes(0, 1), q)
    np.testing.assert_allclose(experts, jnp.einsum("TED,EDF->TEF", x.swapaxes(0, 1), q.dense()), atol=1e-4)
    scanned = jax.lax.scan(lambda c, qx: (c, weights.dot(qx[1], qx[0])), 0, (q, x))[1]
    np.testing.assert_allclose(scanned, x @ q.dense(), atol=1e-4)
    mapped = jax.vmap(lambda q, x: weights.dot(x, q))(q, x)
    np.testing.assert_allclose(mapped, x @ q.dense(), atol=1e-4)


def test_a_product_has_the_dtype_of_x():
    q = quant.nf4.quantize(jax.random.normal(jax.random.key(0), (64, 8)))
    x = jnp.ones((2, 64), jnp.bfloat16)
    assert weights.dot(x, q).dtype == jnp.bfloat16
    assert jax.grad(lambda x: weights.dot(x, q).astype(jnp.float32).sum())(x).dtype == jnp.bfloat16


def test_rows_that_are_not_numbers_stay_where_they_are():
    """The product waits for x[0]; what x[0] holds must not reach other rows."""
    q = quant.nf4.quantize(jax.random.normal(jax.random.key(0), (64, 8)))
    x = jnp.ones((3, 64))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        got = weights.dot(x.at[0, 0].set(bad), q)
        np.testing.assert_array_equal(got[1:], weights.dot(x, q)[1:])
        assert not np.isfinite(got[0]).all()


# Not unrolled with remat: XLA for CPUs drops the barrier that keeps recomputation behind the cotangents.
@pytest.mark.optimised
@pytest.mark.parametrize("scan, remat", [(False, False), (True, False), (True, True)])
def test_a_gradient_step_holds_one_dequantised_layer_at_most(scan, remat):
    L, D = 6, 512
    q = [quant.nf4.quantize(w) for w in jax.random.normal(jax.random.key(0), (2, L, D, D))]
    factors = (jnp.zeros((L, D, 1)), jnp.zeros((L, 1, D)))
    x = jnp.ones((2, D))

    def layer(x, part):
        (first, second), a, b = part
        return weights.dot(jnp.tanh(weights.dot(x, first) + (x @ a) @ b), second)

    layer = jax.checkpoint(layer) if remat else layer

    def loss(factors, q, x):
        if scan:
            x = jax.lax.scan(lambda x, part: (layer(x, part), None), x, (q, *factors))[0]
        else:
            for i in range(L):
                x = layer(x, jax.tree.map(lambda a: a[i], (q, *factors)))
        return jnp.sum(x**2)

    step = jax.jit(jax.grad(loss)).lower(factors, q, x).compile()
    one_layer = 2 * D * D * 4
    assert step.memory_analysis().temp_size_in_bytes < 1.2 * one_layer


def test_a_second_call_does_not_compile_again():
    q = quant.nf4.quantize(jax.random.normal(jax.random.key(0), (64, 8)))
    f = jax.jit(weights.dot)
    f(jnp.ones((2, 64)), q)
    f(jnp.zeros((2, 64)), quant.nf4.quantize(jnp.ones((64, 8))))
    assert f._cache_size() == 1


def test_a_function_of_arrays_takes_nodes():
    q = quant.int8.quantize(jax.random.normal(jax.random.key(0), (64, 8)))
    f = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]) @ params["b"])
    x, b = jnp.ones((2, 64)), jnp.ones(8)
    wrapped = weights.materialized(f)
    np.testing.assert_allclose(wrapped({"w": q, "b": b}, x), f({"w": q.dense(), "b": b}, x), rtol=1e-6)
    grad = lambda f, w: jax.grad(lambda b, x: f({"w": w, "b": b}, x), argnums=(0, 1))(b, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grad(wrapped, q), grad(f, q.dense()))


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda q: weights.dot(jnp.ones((2, 8)), q), "last axis of x"),
        (lambda q: weights.einsum("TD,DF->TDF", jnp.ones((2, 64)), q), "summed over"),
        (lambda q: weights.einsum("TG,DF->TDF", jnp.ones((2, 64)), q), "summed over"),
    ],
)
def test_other_products_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call(quant.nf4.quantize(jnp.ones((64, 8))))
