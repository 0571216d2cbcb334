"""The kernels for Triton translated to its own source: run by its interpreter, lowered and compiled for GPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.attention import explain, flash_attention, paged, paged_attention
from jaxml.attention.cases import CASES
from jaxml.attention.triton_source import translate
from jaxml.target import INTERPRET_GPU, target
from jaxml.testing import compile_for_gpu, lower_for_gpu, tolerance
from tests.attention.test_triton_kernels import gradients

by_name = {case.name: case for case in CASES}
FAST = ("causal", "narrow heads")
has = lambda *names: all(importlib.util.find_spec(name) is not None for name in names)
by_interpreter = pytest.mark.skipif(not has("triton", "torch"), reason="needs Triton's interpreter, and PyTorch")
with_jax_triton = pytest.mark.skipif(
    not has("triton", "jax_triton") or jax.__version_info__ >= (0, 12), reason="needs jax-triton, and jax below 0.12"
)


def values_and_gradients(case, dtype, implementation):
    kwargs = case.kwargs(dtype)

    def total(q, k, v):
        out, lse = flash_attention(q, k, v, **kwargs, implementation=implementation, return_residual=True)
        weights = jnp.sin(jnp.arange(out.size, dtype=lse.dtype)).reshape(out.shape)
        return jnp.sum(out * weights) + jnp.sum(jnp.cos(jnp.where(lse > -jnp.inf, lse, 0.0)))

    return jax.value_and_grad(total, (0, 1, 2))(*case.arrays(dtype))


@by_interpreter
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in by_name])
def test_values_and_gradients_are_the_definition(name):
    """Narrower than in the table where that has more rows: the interpreter takes a millisecond an operation."""
    case = by_name[name].scaled(B=1) if name != "lengths" else by_name[name].scaled(B=2)
    with jax.enable_x64(True):
        theirs = values_and_gradients(case, jnp.float64, "reference")
        with target(INTERPRET_GPU):
            ours = values_and_gradients(case, jnp.float64, "jax_triton")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # exp2 and tanh of Triton are float32's where it has no float64's
        np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-10)


@by_interpreter
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_of_any_dtype(dtype):
    q, k, v = by_name["causal"].scaled(T=40, N=1, K=1).arrays(jnp.dtype(dtype))
    with target(INTERPRET_GPU):
        ours = flash_attention(q, k, v, is_causal=True, implementation="jax_triton")
    theirs = flash_attention(q, k, v, is_causal=True, implementation="reference")
    assert ours.dtype == q.dtype
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (ours, theirs)), atol=tolerance(dtype, 4))


@by_interpreter
def test_vmap_maps_one_after_the_other():
    q, k, v = (jnp.stack([a, 2 * a]) for a in by_name["causal"].scaled(T=20, N=1, K=1).arrays())
    one = lambda by: jax.vmap(lambda *x: flash_attention(*x, is_causal=True, implementation=by))(q, k, v)
    with target(INTERPRET_GPU):
        np.testing.assert_allclose(one("jax_triton"), one("blockwise"), atol=1e-5)


@by_interpreter
def test_pages_are_read_too():
    q = jax.random.normal(jax.random.key(0), (2, 1, 4, 16))
    new = jax.random.normal(jax.random.key(1), (2, 40, 2, 16))
    table, lengths = jnp.asarray([[4, 0, 2], [1, 3, 5]]), jnp.asarray([40, 33])
    pages = paged.write(paged.init(6, 16, 2, 16, dtype=jnp.float32), new, new, table, lengths)
    of = lambda by: paged_attention(q, pages, table, lengths, implementation=by)
    with target(INTERPRET_GPU):
        np.testing.assert_allclose(of("jax_triton"), of("blockwise"), atol=1e-5)


@by_interpreter
@pytest.mark.parametrize("name", ["tanh", "log1p", "expm1", "sign", "logistic", "integer_pow", "clip", "floor", "pow"])
def test_what_a_score_mod_may_compute(name):
    modify = {
        "tanh": lambda s, q, k: jnp.tanh(s * 0.05) * 20,
        "log1p": lambda s, q, k: jnp.log1p(s * s),
        "expm1": lambda s, q, k: jnp.expm1(s * 0.3),
        "sign": lambda s, q, k: jnp.sign(s) * 0.5,
        "logistic": lambda s, q, k: jax.nn.sigmoid(s),
        "integer_pow": lambda s, q, k: s**3 - s**-2 / 1e6,
        "clip": lambda s, q, k: jnp.clip(s, -0.5, 0.7),
        "floor": lambda s, q, k: jnp.floor(s) + (q - k) % 3 + (q >> 1) // 2 * 0.01,
        "pow": lambda s, q, k: jnp.power(jnp.abs(s) + 0.1, 1.5),
    }[name]
    q, k, v = by_name["plain"].scaled(T=20, N=1, K=1).arrays()
    of = lambda by: flash_attention(q, k, v, score_mod=lambda s, b, h, i, j: modify(s, i, j), implementation=by)
    with target(INTERPRET_GPU):
        np.testing.assert_allclose(of("jax_triton"), of("reference"), atol=1e-5)


def test_what_is_not_translated_is_named():
    def kernel(x, y):
        y[0] = jnp.cumsum(x[0])

    row = jax.ShapeDtypeStruct((1, 16), jnp.float32)
    with pytest.raises(NotImplementedError, match="does not translate 'cumsum'"):
        translate(kernel, [row], [row], (1,), "some")


def test_the_source_is_that_of_a_kernel():
    def kernel(x, y):
        y[0, :] = jax.lax.fori_loop(0, x[0, 0].astype(jnp.int32), lambda i, total: total + i, x[1, :])

    row = jax.ShapeDtypeStruct((2, 16), jnp.float32)
    source = translate(kernel, [row], [row], (1,), "some")
    assert source.startswith("def some(p0, p1):") and "tl.store(p1 + tl.arange(0, 16) * 1, " in source
    assert "in range(0, " in source


@with_jax_triton
@pytest.mark.parametrize("name", [n if n == "packed" else pytest.param(n, marks=pytest.mark.slow) for n in by_name])
def test_lowered_for_cuda(name):
    text = lower_for_gpu(*gradients(by_name[name].scaled(H=64, H2=64), "bfloat16", "jax_triton")).as_text()
    assert text.count("triton_kernel_call") == 3


def test_where_jax_triton_fails_the_reason_says_so():
    q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    with target("NVIDIA H100"):
        why = explain(q, q, q).refused["jax_triton"]
    works = has("triton", "jax_triton") and jax.__version_info__ < (0, 12)
    assert ("name it to take it" if works else "jax-triton" if has("jax_triton") else "needs the package") in why


@with_jax_triton
@pytest.mark.slow
@pytest.mark.skipif(not has("jax_plugins"), reason="needs jax-cuda13-plugin and jax-cuda13-pjrt")
@pytest.mark.parametrize(
    "H, dtype, device",
    [
        (128, "bfloat16", "NVIDIA H100"),
        (256, "bfloat16", "NVIDIA A100"),
        (128, "float32", "NVIDIA A100"),
    ],
)
def test_registers_suffice(H, dtype, device):
    """Triton's own compiler; the bytes that it spills are few."""
    function, arrays = gradients(by_name["causal"].scaled(T=4096, N=8, K=4, H=H), dtype, "jax_triton")
    found = [k for k in compile_for_gpu(function, arrays, device)[1] if k.name.startswith("flash_attention")]
    assert len(found) == 3 and all(k.spilled <= 16 for k in found), found
