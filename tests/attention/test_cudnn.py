"""Which calls cuDNN gets, and how; `jax.nn`'s other implementation stands in for the library, which needs a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.attention import Causal, Window, cudnn, explain, flash_attention
from jaxml.attention.cases import CASES
from jaxml.attention.dispatch import BACKENDS, CUDNN
from jaxml.target import target
from jaxml.testing import tolerance

by_name = {case.name: case for case in CASES}
EXACT = ["plain", "causal", "one key", "grouped heads", "multi-query", "window", "lengths", "bias", "bias of heads"]


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setitem(BACKENDS, "cudnn", CUDNN._replace(supports=lambda rules, x: None))


@pytest.mark.parametrize("name", EXACT)
def test_calls_are_passed_on_as_they_are(name, stand_in):
    case = by_name[name]
    case = case.scaled(T=case.T // 2 * 2, H=16, H2=16)
    agree(case.arrays(), case.kwargs())


def test_windows_and_lengths_together_leave_rows_without_keys_0(stand_in):
    arrays = by_name["lengths"].scaled(B=3, T=40, S=20).arrays()
    lengths = dict(query_seq_lengths=jnp.array([40, 30, 0]), key_value_seq_lengths=jnp.array([20, 3, 7]))
    agree(arrays, dict(is_causal=True, local_window_size=(5, 0), **lengths))


def agree(arrays, kwargs):
    def total(by, *qkv):
        out, lse = flash_attention(*qkv, **kwargs, implementation=by, return_residual=True)
        weights = jnp.sin(jnp.arange(out.size, dtype=lse.dtype)).reshape(out.shape)
        return jnp.sum(out * weights) + jnp.sum(jnp.cos(jnp.where(lse > -jnp.inf, lse, 0.0)))

    run = lambda by: jax.jit(jax.value_and_grad(lambda *a: total(by, *a), (0, 1, 2)))(*arrays)
    for a, b in zip(jax.tree.leaves(run("cudnn")), jax.tree.leaves(run("reference")), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance("float32", 256), rtol=1e-4)


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        (dict(local_window_size=(5, 5)), "39576"),
        (dict(mask=Window(left=5)), "39576"),
        (dict(mask=~Causal()), "got Not"),
        (dict(q_segment_ids=jnp.zeros((1, 64), int)), "got Segments"),
        (dict(is_causal=True, q_positions=jnp.zeros((1, 64), int), kv_positions=jnp.zeros((1, 64), int)), "positions"),
        (dict(logits_soft_cap=30.0), "no logits_soft_cap"),
        (dict(sinks=jnp.zeros(2)), "no sinks"),
        (dict(score_mod=lambda s, b, h, q, k: s * 2), "no score_mod"),
        (dict(dropout_rate=0.1, dropout_key=jax.random.key(0)), "other numbers"),
        (dict(bias=jnp.zeros((2, 64, 1))), "all of T and S"),
    ],
)
def test_what_cudnn_does_not_know(kwargs, reason):
    x = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    with target("NVIDIA H100"):
        assert reason in explain(x, x, x, **kwargs).refused["cudnn"]


def test_head_dims_and_dtypes_that_it_does_not_know():
    refused = lambda H, dtype="bfloat16": explain(*[jax.ShapeDtypeStruct((1, 8, 2, H), dtype)] * 3).refused["cudnn"]
    with target("NVIDIA A100"):
        assert "at most 128" in refused(256) and "name it" in refused(128)
    with target("NVIDIA H100"):
        assert "multiples of 8" in refused(20) and "float32" in refused(64, "float32") and "name it" in refused(256)
    assert "needs a GPU" in refused(64)
