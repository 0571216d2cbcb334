import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxml.attention import Segments, flash_attention
from jaxml.testing import tolerance


def arrays(B=2, T=6, S=6, N=4, K=2, H=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(k, shape, dtype) for k, shape in zip(keys, ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    )


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.one_of(st.none(), st.integers(0, 4)))
def test_equals_jax_nn_where_that_is_defined(T, K, groups, causal, window):
    q, k, v = arrays(T=T, S=T, N=K * groups, K=K)
    ours = flash_attention(q, k, v, is_causal=causal, local_window_size=window)
    theirs = jax.nn.dot_product_attention(q, k, v, is_causal=causal, local_window_size=window)
    np.testing.assert_allclose(ours, theirs, atol=tolerance("float32", T * 8))


def test_a_row_that_sees_nothing_is_zero_and_so_is_its_gradient():
    q, k, v = arrays()
    mask = jnp.ones((1, 1, 6, 6), bool).at[:, :, 2].set(False)
    loss = lambda q, k, v: jnp.sum(flash_attention(q, k, v, mask=mask) ** 2)
    assert jnp.all(flash_attention(q, k, v, mask=mask)[:, 2] == 0)
    grads = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads) and jnp.all(grads[0][:, 2] == 0)


def test_positions_stand_in_for_indices():
    q, k, v = arrays()
    order = np.array([3, 0, 5, 1, 4, 2])
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    plain = flash_attention(q, k, v, is_causal=True)
    shuffled = flash_attention(
        q, k[:, order], v[:, order], is_causal=True, q_positions=positions, kv_positions=positions[:, order]
    )
    np.testing.assert_allclose(plain, shuffled, atol=tolerance("float32", 48))


def test_soft_cap_and_bias_act_before_the_softmax():
    q, k, v = arrays(N=2)
    bias = jax.random.normal(jax.random.key(3), (2, 2, 6, 6))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5
    expected = jax.nn.softmax(2.0 * jnp.tanh(logits / 2.0) + bias, axis=-1)
    expected = jnp.einsum("bnts,bsnh->btnh", expected, v)
    ours = flash_attention(q, k, v, bias=bias, logits_soft_cap=2.0)
    np.testing.assert_allclose(ours, expected, atol=tolerance("float32", 48))


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(key=jnp.ones((2, 6, 3, 8)), value=jnp.ones((2, 6, 3, 8))), "multiple"),
        (dict(key=jnp.ones((2, 6, 2, 9))), "head dim"),
        (dict(query=jnp.ones((6, 4, 8))), "4 axes"),
        (dict(q_positions=jnp.zeros((2, 6), int)), "together"),
        (dict(value=jnp.ones((2, 5, 2, 8))), r"agree in \[B, S, K\]"),
        (dict(query=jnp.ones((2, 0, 4, 8))), "at least one place"),
        (dict(key=jnp.ones((2, 6, 2, 8), jnp.bfloat16)), "one floating dtype, got float32, bfloat16, float32. Cast"),
        (dict(mask=jnp.zeros((2, 1, 6, 6))), "mask is boolean, got float32. Add floating masks as bias"),
        (dict(mask=jnp.ones((6, 7), bool)), "mask broadcasts to"),
        (dict(mask=Segments(jnp.zeros((2, 5), int))), r"q_ids has the shape \[B, T\] = \(2, 6\)"),
        (dict(bias=jnp.ones((3, 6, 6))), r"bias broadcasts to \[B, N, T, S\] = \(2, 4, 6, 6\)"),
        (dict(sinks=jnp.ones(3)), r"sinks have the shape \[N\]"),
        (dict(local_window_size=(-1, 0)), "at least 0 on both sides"),
        (dict(kv_segment_ids=jnp.zeros((2, 6), int)), "together with q_segment_ids"),
        (dict(q_positions=jnp.zeros((2, 6), int), kv_positions=jnp.zeros((2, 6), int)), "got neither"),
        (dict(key_value_seq_lengths=jnp.ones(3, int)), r"kv_lengths has the shape \[B\]"),
        (dict(dropout_rate=1.0), r"in \[0, 1\)"),
        (dict(dropout_rate=0.1), "needs dropout_key"),
        (dict(logits_soft_cap=-1.0), "above 0"),
        (dict(score_mod=lambda s, b, h, q, k: (s, s)), "returns a scalar"),
        (dict(implementation="none"), "one of reference, mosaic_tpu, mosaic_gpu, .*, cudnn, blockwise, got 'none'"),
    ],
)
def test_bad_input_is_a_sentence(change, word):
    q, k, v = arrays()
    with pytest.raises(ValueError, match=word):
        flash_attention(**dict(query=q, key=k, value=v) | change)
