"""Random calls, drawn by hypothesis: shapes, heads and options together, against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from jaxml.attention import Fn, Prefix, blockwise, flash_attention
from jaxml.target import INTERPRET, target

EXAMPLES = {"blockwise": 16, "mosaic_tpu": 5}


@st.composite
def calls(draw):
    """(query, key, value, the other arguments)."""
    yes = lambda: draw(st.booleans())
    B, K, G = (draw(st.integers(1, 3)) for _ in range(3))
    T, S = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    H, H2 = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    N, rng = K * G, np.random.default_rng(draw(st.integers(0, 2**20)))
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    some = lambda *shape: normal(*(n if yes() else 1 for n in shape))
    out = dict(is_causal=yes(), scale=draw(st.sampled_from([None, 0.3])))
    if yes():
        out["local_window_size"] = (draw(st.integers(0, 40)), draw(st.integers(0, 40)))
    if yes():
        out["q_segment_ids"], out["kv_segment_ids"] = (jnp.asarray(rng.integers(0, 3, (B, n))) for n in (T, S))
    if yes():
        out["key_value_seq_lengths"] = jnp.asarray(rng.integers(0, S + 1, B))
    if yes():
        out["bias"] = some(B, N, T, S)
    if yes():
        out["sinks"] = normal(N)
    if yes():
        out["logits_soft_cap"] = 2.0
    if yes():
        out |= dict(dropout_rate=0.3, dropout_key=jax.random.key(1))
    if yes():
        out["score_mod"] = lambda s, b, h, q, k: s - 0.1 * h * abs(q - k)
    if (out["is_causal"] or "local_window_size" in out) and yes():
        out["q_positions"], out["kv_positions"] = (jnp.asarray(rng.integers(0, 150, (B, n))) for n in (T, S))
    masks = {
        "array": lambda: jnp.asarray(rng.random((B, 1, T, S)) < 0.7),
        "prefix": lambda: Prefix(jnp.asarray(rng.integers(0, S + 1, B))),
        "function": lambda: ~Fn(lambda b, h, q, k: (q + 2 * k + h) % 5 == 0),
        "none": lambda: None,
    }
    out["mask"] = masks[draw(st.sampled_from(sorted(masks)))]()
    return normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H2), out


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("backend", EXAMPLES)
def test_random_calls_equal_the_definition(backend, part, monkeypatch):
    tiles = lambda x: (min(64, x.query.shape[1]), min(32, x.key.shape[1]))
    monkeypatch.setattr(blockwise, "_blocks", tiles)

    @seed(part)
    @settings(max_examples=EXAMPLES[backend], deadline=None, database=None)
    @given(calls())
    def check(call):
        q, k, v, options = call

        def total(q, k, v, implementation):
            out, lse = flash_attention(q, k, v, **options, implementation=implementation, return_residual=True)
            weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
            return jnp.sum(out * weights) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.sin(lse), 0.0)), (out, lse)

        gradient = lambda i: jax.grad(lambda *a: total(*a, i), (0, 1, 2), has_aux=True)
        run = lambda i: jax.jit(gradient(i))(q, k, v)
        for a, b in zip(jax.tree.leaves(run(backend)), jax.tree.leaves(run("reference")), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9, rtol=1e-9)

    with jax.enable_x64(True), target(INTERPRET):
        check()
