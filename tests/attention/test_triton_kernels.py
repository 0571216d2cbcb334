"""The GPU kernels in Triton where tiles are cut otherwise than in test_backends, interpreted; what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.attention import Fn, blocks, explain, flash_attention
from jaxml.attention.cases import CASES
from jaxml.attention.gpu_arrays import pieces
from jaxml.target import INTERPRET_GPU, target
from jaxml.testing import lower_for_gpu, tolerance

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
by_name = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def interpreted():
    with target(INTERPRET_GPU):
        yield


def both(case, dtype=jnp.float32):
    """((value, gradients) of triton, of the definition)."""
    kwargs = case.kwargs(dtype)

    def run(implementation):
        def total(q, k, v):
            out, lse = flash_attention(q, k, v, **kwargs, implementation=implementation, return_residual=True)
            weights = jnp.sin(jnp.arange(out.size, dtype=lse.dtype)).reshape(out.shape)
            return jnp.sum(out * weights) + jnp.sum(jnp.cos(jnp.where(lse > -jnp.inf, lse, 0.0)))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*case.arrays(dtype))

    return run("triton"), run("reference")


def equal(ours, theirs, bound):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=bound, rtol=bound)


@pytest.mark.parametrize("name", ["one query", "packed, other keys", "lengths", "algebra of masks"])
def test_keys_that_are_split_among_programs_are_put_together(name, monkeypatch):
    monkeypatch.setattr(blocks, "splits", lambda programs, blocks: min(3, blocks))
    with jax.enable_x64(True):
        equal(*both(by_name[name].scaled(S=150), jnp.float64), 1e-10)


def test_few_programs_split_their_keys():
    assert blocks.splits(8, 512) == 33 and blocks.splits(1000, 512) == 1 and blocks.splits(8, 3) == 1


@pytest.mark.slow
@pytest.mark.parametrize("H, H2", [(48, 80), (20, 20), (192, 128), (256, 256)])
def test_any_head_dim_is_made_of_one_or_two_powers_of_two(H, H2):
    with jax.enable_x64(True):
        equal(*both(by_name["causal"].scaled(T=40, H=H, H2=H2), jnp.float64), 1e-10)


@pytest.mark.parametrize("width", [1, 3, 16, 20, 40, 64, 72, 80, 96, 112, 128, 160, 192, 200, 256])
def test_pieces_cover_a_head_dim(width):
    parts = pieces(width)
    assert sum(exist for *_, exist in parts) == width and len(parts) <= 2
    assert all(size & (size - 1) == 0 and size >= max(16, exist) for _, size, exist in parts)
    assert [at for at, *_ in parts] == [0, parts[0][1]][: len(parts)]


@pytest.mark.slow
def test_a_hundred_random_masks_equal_the_definition():
    q, k, v = by_name["grouped heads"].scaled(T=70, S=90).arrays()

    def run(data, implementation):
        return flash_attention(
            q, k, v, implementation=implementation, is_causal=True, local_window_size=(50, 0), mask=data["mask"],
            q_positions=data["q_at"], kv_positions=data["kv_at"], q_segment_ids=data["q_ids"],
            kv_segment_ids=data["kv_ids"], key_value_seq_lengths=data["lengths"], return_residual=True,
        )  # fmt: skip

    ours, theirs = (jax.jit(functools.partial(run, implementation=i)) for i in ("triton", "reference"))
    for seed in range(100):
        rng = np.random.default_rng(seed)
        ids = lambda n, rng=rng: rng.integers(0, rng.integers(1, 4), (2, n))
        at = lambda n, rng=rng: rng.integers(0, 100, (2, n)) if rng.random() < 0.5 else np.tile(np.arange(n), (2, 1))
        holes = np.repeat(rng.random((2, 1, 1, 3)) < 0.6, 30, axis=3)
        data = dict(
            mask=holes, q_at=at(70), kv_at=at(90), q_ids=ids(70), kv_ids=ids(90), lengths=rng.integers(0, 91, 2)
        )
        equal(ours(data), theirs(data), tolerance("float32", 90))


def test_on_a_gpu_it_is_taken_by_name():
    x = jnp.ones((1, 20, 2, 8))
    with target("NVIDIA A100"):
        explained = explain(x, x, x, is_causal=True)
        assert explained.chosen == "blockwise" and "name it" in explained.refused["triton"]
        assert explain(x, x, x, is_causal=True, implementation="triton").chosen == "triton"
    with target("TPU v5e"):
        assert "it needs a GPU" in explain(x, x, x).refused["triton"]


@pytest.mark.parametrize(
    "width, options, reason",
    [
        (8, dict(score_mod=lambda s, b, h, q, k: s + jnp.arange(99.0)[q - k + 20]), "looks something up"),
        (8, dict(mask=Fn(lambda b, h, q, k, seen: seen[k], (jnp.ones(20, bool),))), "holds arrays"),
        (320, {}, "head dims are at most 256, got 320"),
    ],
)
def test_what_a_kernel_cannot_do_it_refuses_with_the_reason(width, options, reason):
    x = jnp.ones((1, 20, 2, width))
    with pytest.raises(NotImplementedError, match=reason):
        flash_attention(x, x, x, **options, implementation="triton")


def gradients(case, dtype, by="triton"):
    """(function of the arrays → gradients, the arrays' shapes)."""
    kwargs = case.kwargs(jnp.dtype(dtype))
    names = [n for n in ("bias", "sinks") if n in kwargs]
    arrays = (*case.arrays(jnp.dtype(dtype)), *(kwargs.pop(n) for n in names))

    def total(*arrays):
        rest = dict(zip(names, arrays[3:]))
        out, lse = flash_attention(*arrays[:3], **kwargs, **rest, implementation=by, return_residual=True)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    return jax.grad(total, (0, 1, 2)), [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]


LOWERED = [(n, 16, d) for n in by_name for d in ("bfloat16", "float32")]
LOWERED += [(n, H, "float16") for n in by_name for H in (32, 64, 80, 128, 192, 256)]


@pytest.mark.parametrize(
    "name, H, dtype", [c if c[0] == "packed" else pytest.param(*c, marks=pytest.mark.slow) for c in LOWERED]
)
def test_every_case_is_lowered_for_cuda(name, H, dtype):
    case = by_name[name]
    case = case.scaled(T=case.T * 4 if case.T > 1 else 1, H=H if case.H == 16 else case.H)
    text = lower_for_gpu(*gradients(case, dtype)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") + text.count("@triton_kernel_call") == 3
