import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.testing import tolerance
from jaxml.tune.loss import cross_entropy, divergence


def inputs(dtype=jnp.float32, share=0.6):
    k = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(k[0], (2, 9, 16), dtype)
    head = jax.random.normal(k[1], (50, 16), dtype)
    targets = jax.random.randint(k[2], (2, 9), 0, 50)
    weights = jnp.where(jax.random.uniform(k[3], (2, 9)) < share, 0.5, 0.0)
    return hidden, head, targets, weights


def definition(hidden, head, targets, weights, soft_cap=None):
    logits = jnp.einsum("btd,vd->btv", hidden, head).astype(jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -jnp.sum(weights * log_probs)


@pytest.mark.parametrize("chunk", [1, 4, 5, 256])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_value_and_every_gradient_equal_the_definition(chunk, soft_cap, share):
    hidden, head, targets, weights = inputs(share=share)
    ours = functools.partial(cross_entropy, soft_cap=soft_cap, chunk=chunk)
    loss = lambda h, w, u: ours(h, w, targets, u)[0]
    plain = lambda h, w, u: definition(h, w, targets, u, soft_cap)
    bound = tolerance("float32", 50 * 16)
    np.testing.assert_allclose(loss(hidden, head, weights), plain(hidden, head, weights), rtol=bound)
    got = jax.jit(jax.grad(loss, (0, 1, 2)))(hidden, head, weights)
    expected = jax.grad(plain, (0, 1, 2))(hidden, head, weights)
    for a, b in zip(got[:2], expected[:2]):
        np.testing.assert_allclose(a, b, atol=bound)
    kept = weights != 0  # places without weight are not computed
    np.testing.assert_allclose(got[2][kept], expected[2][kept], rtol=bound)


def test_a_frozen_head_has_no_gradient_computed():
    hidden, head, targets, weights = inputs()
    text = jax.jit(jax.grad(lambda h: cross_entropy(h, head, targets, weights)[0])).lower(hidden).as_text()
    both = jax.jit(jax.grad(lambda h, w: cross_entropy(h, w, targets, weights)[0], (0, 1))).lower(hidden, head)
    assert text.count("dot_general") < both.as_text().count("dot_general")


def test_all_logits_never_exist_at_once():
    hidden = jax.ShapeDtypeStruct((4, 1024, 32), jnp.float32)
    head = jax.ShapeDtypeStruct((20_000, 32), jnp.float32)
    where = jax.ShapeDtypeStruct((4, 1024), jnp.float32)
    loss = lambda h, w, t, u: cross_entropy(h, w, t.astype(jnp.int32), u)[0]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head, where, where).compile()
    logits = 4 * 1024 * 20_000 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 3


def test_bfloat16_gradients_keep_their_dtype():
    hidden, head, targets, weights = inputs(jnp.bfloat16)
    grads = jax.grad(lambda h, w: cross_entropy(h, w, targets, weights)[0], (0, 1))(hidden, head)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_divergence_and_its_gradient_equal_the_definition(chunk, soft_cap):
    hidden, head, _, weights = inputs()
    base = hidden + 0.3 * jax.random.normal(jax.random.key(9), hidden.shape)

    def plain(base, hidden):
        logits = [jnp.einsum("btd,vd->btv", x, head) for x in (base, hidden)]
        logits = [x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap) for x in logits]
        p, q = (jax.nn.log_softmax(x) for x in logits)
        return jnp.sum(weights * jnp.sum(jnp.exp(p) * (p - q), -1))

    ours = lambda base, hidden: divergence(base, hidden, head, weights, soft_cap=soft_cap, chunk=chunk)[0]
    bound = tolerance("float32", 50 * 16)
    np.testing.assert_allclose(ours(base, hidden), plain(base, hidden), rtol=bound)
    to_base, to_hidden = jax.jit(jax.grad(ours, (0, 1)))(base, hidden)
    np.testing.assert_allclose(to_hidden, jax.grad(plain, 1)(base, hidden), atol=bound)
    assert not np.any(to_base)
