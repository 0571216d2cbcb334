"""The TPU kernels, interpreted, over several blocks and parts of keys; which calls they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.attention import Causal, Fn, Segments, blocks, explain, flash_attention
from jaxml.attention.blocks import cut_evenly
from jaxml.attention.cases import CASES
from jaxml.attention.tpu_arrays import cut
from jaxml.target import INTERPRET, target
from jaxml.testing import tolerance

by_name = {case.name: case for case in CASES}
LARGE = {
    "causal": dict(T=700, S=650),
    "window": dict(T=900),
    "packed, other keys": dict(T=300, S=700),
    "algebra of masks": dict(T=800),
    "grouped heads": dict(T=330),
    "bias of queries": dict(T=600),
    "dropout": dict(T=400),
    "soft cap": dict(T=400),
}
SMALL_MEMORY = blocks.Limits(vmem=2 * 2**20, chunk=128, rows=256, rows_backward=256)


@pytest.fixture(autouse=True)
def interpreted():
    with target(INTERPRET):
        yield


@pytest.mark.parametrize("parts", ["keys at once", "keys in parts"])
@pytest.mark.parametrize("name", [n if n == "causal" else pytest.param(n, marks=pytest.mark.slow) for n in LARGE])
def test_several_blocks_equal_the_definition(name, parts, monkeypatch):
    if parts == "keys in parts":
        monkeypatch.setitem(blocks.TABLE, INTERPRET, SMALL_MEMORY)
    case = by_name[name].scaled(**LARGE[name])
    with jax.enable_x64(True):
        kwargs = case.kwargs(jnp.float64)

        def run(implementation):
            def total(q, k, v):
                out, lse = flash_attention(q, k, v, **kwargs, implementation=implementation, return_residual=True)
                weights = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
                return jnp.sum(out * weights) + jnp.sum(jnp.cos(jnp.where(lse > -jnp.inf, lse, 0.0)))

            return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*case.arrays(jnp.float64))

        for a, b in zip(jax.tree.leaves(run("mosaic_tpu")), jax.tree.leaves(run("reference")), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.slow
def test_a_hundred_random_masks_equal_the_definition():
    q, k, v = by_name["grouped heads"].scaled(T=300, S=400).arrays()

    def run(data, implementation):
        return flash_attention(
            q, k, v, implementation=implementation, is_causal=True, local_window_size=(200, 0), mask=data["mask"],
            q_positions=data["q_at"], kv_positions=data["kv_at"], q_segment_ids=data["q_ids"],
            kv_segment_ids=data["kv_ids"], key_value_seq_lengths=data["lengths"], return_residual=True,
        )  # fmt: skip

    ours, theirs = (jax.jit(functools.partial(run, implementation=i)) for i in ("mosaic_tpu", "reference"))
    for seed in range(100):
        rng = np.random.default_rng(seed)
        ids = lambda n, rng=rng: rng.integers(0, rng.integers(1, 4), (2, n))
        at = lambda n, rng=rng: rng.integers(0, 500, (2, n)) if rng.random() < 0.5 else np.tile(np.arange(n), (2, 1))
        holes = np.repeat(rng.random((2, 1, 1, 4)) < 0.6, 100, axis=3)  # whole chunks of keys that nobody sees
        data = dict(
            mask=holes, q_at=at(300), kv_at=at(400), q_ids=ids(300), kv_ids=ids(400), lengths=rng.integers(0, 401, 2)
        )
        for a, b in zip(ours(data), theirs(data)):
            np.testing.assert_allclose(a, b, atol=tolerance("float32", 400), rtol=1e-5)


def test_short_sequences_share_a_grid_step():
    case = by_name["grouped heads"].scaled(T=100, N=12, K=6)
    arrays = case.arrays()

    def run(implementation):
        attend = functools.partial(flash_attention, is_causal=True, implementation=implementation)
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(attend(*a))), (0, 1, 2))(*arrays)

    for ours, theirs in zip(jax.tree.leaves(run("mosaic_tpu")), jax.tree.leaves(run("reference")), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=tolerance("float32", 100), rtol=1e-5)
    for backward in (False, True):
        assert cut(1, 12, 6, 100, 100, 16, 16, 4, 0, backward).heads > 1


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(score_mod=lambda s, b, h, q, k: s + jnp.arange(99.0)[q - k + 20]), "looks something up"),
        (dict(mask=Fn(lambda b, h, q, k, seen: seen[k], (jnp.ones(20, bool),))), "holds arrays"),
    ],
)
def test_what_a_kernel_cannot_do_it_refuses_with_the_reason(options, reason):
    x = jnp.ones((1, 20, 2, 8))
    with pytest.raises(NotImplementedError, match=reason):
        flash_attention(x, x, x, **options, implementation="mosaic_tpu")
    with target("TPU v6e"):
        explained = explain(x, x, x, **options)
    assert explained.chosen == "blockwise" and reason in explained.refused["mosaic_tpu"]


def test_without_a_tpu_it_says_so_and_with_one_it_comes_first():
    x = jnp.ones((1, 20, 2, 8))
    with target("TPU v5e"):
        assert explain(x, x, x, mask=Causal() & Segments(jnp.zeros((1, 20), int))).chosen == "mosaic_tpu"
        with jax.enable_x64(True):
            double = jnp.ones((1, 20, 2, 8), jnp.float64)
            assert "float64" in explain(double, double, double).refused["mosaic_tpu"]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 600, 1000, 1100, 1500, 4000, 4096, 99_999])
def test_any_length_is_cut_into_whole_chunks_with_little_left_over(length):
    size, number = cut_evenly(length, 512)
    assert size % 128 == 0 and size * (number - 1) < length <= size * number
    if length > 1000:
        assert size * number <= 1.06 * length
