"""Attention to keys and values in pages: the kernel, interpreted, and the gathering, against plain attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.attention import Pages, blocks, flash_attention, paged, paged_attention
from jaxml.target import INTERPRET, INTERPRET_GPU, target
from jaxml.testing import lower_for_gpu

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
BACKENDS = ("blockwise", "mosaic_tpu", "triton")


@pytest.fixture(autouse=True)
def interpreted(request):
    values = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    with target(INTERPRET_GPU if "triton" in values else INTERPRET):
        yield


@dataclasses.dataclass(frozen=True)
class Shape:
    T: int = 1
    N: int = 8
    K: int = 2
    H: int = 16
    H2: int = 16
    page: int = 16
    lengths: tuple[int, ...] = (0, 80, 1, 37, 64)

    def arrays(self, dtype=jnp.float64, n: int = 5):
        """query, pages whose unwritten places hold NaN, table, lengths; keys and values in one piece."""
        B, S, rng = len(self.lengths), n * self.page, np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.standard_normal(shape), dtype)
            for shape in ((B, self.T, self.N, self.H), (B, S, self.K, self.H), (B, S, self.K, self.H2))
        )
        table = jnp.asarray(rng.permutation(B * n + 3)[: B * n].reshape(B, n), jnp.int32)
        lengths = jnp.asarray(self.lengths, jnp.int32)
        pages = paged.init(B * n + 3, self.page, self.K, self.H, self.H2, dtype)
        pages = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), pages)
        for b, length in enumerate(self.lengths):
            if length:
                row = slice(b, b + 1)
                pages = paged.write(pages, k[row, :length], v[row, :length], table[row], lengths[row])
        return q, pages, table, lengths, k, v


def plain(q, k, v, lengths, window=None, **kwargs):
    at = lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])[None]
    positions = dict(q_positions=at, kv_positions=jnp.arange(k.shape[1])[None])
    window = None if window is None else (window, 0)
    return flash_attention(
        q, k, v, is_causal=True, local_window_size=window, return_residual=True, implementation="reference",
        **positions, **kwargs,
    )  # fmt: skip


CALLS = {
    "one token": (Shape(), {}),
    "several tokens": (Shape(T=5), {}),
    "multi-query": (Shape(K=1, N=3), {}),
    "a head each": (Shape(K=4, N=4, T=2, H=24, H2=40), {}),
    "window": (Shape(T=3), dict(window=20)),
    "window of one": (Shape(), dict(window=0)),
    "soft cap": (Shape(page=8, lengths=(40, 3)), dict(logits_soft_cap=1.5, scale=0.7)),
    "many pages a step": (Shape(page=8, lengths=(1200, 511, 512, 513, 8)), {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_pages_equal_one_piece(name, backend):
    shape, options = CALLS[name]
    if backend == "triton":  # whose pages hold a multiple of 16 tokens
        shape = dataclasses.replace(shape, page=16)
    with jax.enable_x64(True):
        q, pages, table, lengths, k, v = shape.arrays(n=-(-max(shape.lengths) // shape.page))
        ours = {("local_window_size" if n == "window" else n): value for n, value in options.items()}
        sinks = jnp.linspace(-1.0, 1.0, shape.N)
        out = paged_attention(
            q, pages, table, lengths, sinks=sinks, return_residual=True, implementation=backend, **ours
        )
        want = plain(q, k, v, lengths, sinks=sinks, **options)
        for a, b in zip(out, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_dtypes(dtype, backend):
    q, pages, table, lengths, k, v = Shape(T=2).arrays(dtype)
    out = paged_attention(q, pages, table, lengths, implementation=backend)
    want, _ = plain(*(a.astype(jnp.float32) for a in (q, k, v)), lengths)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=16 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_grows_token_by_token_under_jit(backend):
    """Equals causal attention of the whole row; pages are taken in any order."""
    T, K, N, H = 20, 2, 4, 8
    q, k, v = (
        jax.random.normal(key, (1, T, n, H)) for key, n in zip(jax.random.split(jax.random.key(0), 3), (N, K, K))
    )
    table = jnp.array([[2, 0]], jnp.int32)

    def step(pages, t):
        one = lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1, axis=1)
        pages = paged.write(pages, one(k), one(v), table, t[None] + 1)
        return pages, paged_attention(one(q), pages, table, t[None] + 1, implementation=backend)[:, 0]

    _, out = jax.jit(lambda: jax.lax.scan(step, paged.init(3, 16, K, H, dtype=jnp.float32), jnp.arange(T)))()
    np.testing.assert_allclose(out.swapaxes(0, 1), flash_attention(q, k, v, is_causal=True), atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_pass_through_the_kernel(backend):
    with jax.enable_x64(True):
        q, pages, table, lengths, _, _ = Shape(T=2).arrays()
        pages = jax.tree.map(lambda a: jnp.where(jnp.isnan(a), 0.0, a), pages)

        def total(backend):
            def of(q, key, value, sinks):
                out, lse = paged_attention(
                    q, Pages(key, value, pages.num_heads), table, lengths, sinks=sinks, return_residual=True,
                    implementation=backend,
                )  # fmt: skip
                return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.cos(lse), 0.0))

            return jax.grad(of, (0, 1, 2, 3))(q, pages.key, pages.value, jnp.ones(q.shape[2]))

        for a, b in zip(total(backend), total("blockwise"), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("axes", [(0, None, 0, 0), (None, 0, None, None), (0, 0, None, 0)])
def test_mapped_over_queries_and_pages(axes, backend):
    with jax.enable_x64(True):
        shapes = [Shape(lengths=lengths).arrays()[:4] for lengths in ((0, 80, 1), (40, 7, 16))]
        shapes = [(q, jax.tree.map(jnp.nan_to_num, p), *rest) for q, p, *rest in shapes]
        shapes[1] = (shapes[1][0] + 1.0, jax.tree.map(lambda a: a + 1.0, shapes[1][1]), *shapes[1][2:])
        pick = lambda n: tuple(shapes[0 if axis is None else n][i] for i, axis in enumerate(axes))
        mapped = jax.tree.map(lambda *a: jnp.stack(a), *shapes)
        calls = tuple(shapes[0][i] if axis is None else mapped[i] for i, axis in enumerate(axes))
        out = jax.vmap(lambda *a: paged_attention(*a, implementation=backend), axes)(*calls)
        for n in range(2):
            np.testing.assert_allclose(out[n], paged_attention(*pick(n), implementation="blockwise"), atol=1e-12)


def test_tokens_before_the_beginning_and_beyond_the_pages_are_left_out():
    pages = paged.init(3, 8, 1, 4, dtype=jnp.float32)
    new = jnp.ones((2, 3, 1, 4))
    written = paged.write(pages, new, new, jnp.array([[0], [1]]), jnp.array([2, 9]))
    assert written.key.sum(axis=(1, 2)).tolist() == [2 * 4, 2 * 4, 0]
    assert (written.key[0, :2] == 1).all() and (written.key[1, 6:] == 1).all()


BAD = {
    "heads": (lambda q, p, t, n: (q[:, :, :3], p, t, n), "multiple of the pages' 2, got 3"),
    "width": (lambda q, p, t, n: (q[..., :3], p, t, n), "K·H = 2 · 3"),
    "axes": (lambda q, p, t, n: (q[0], p, t, n), "query has 4 axes"),
    "table": (lambda q, p, t, n: (q, p, t[:2], n), r"page numbers, \[B, n\] with B = 5"),
    "floating table": (lambda q, p, t, n: (q, p, t * 1.0, n), "page numbers"),
    "lengths": (lambda q, p, t, n: (q, p, t, n[:1]), r"lengths are integers \[B\] = \(5,\)"),
    "value": (lambda q, p, t, n: (q, dataclasses.replace(p, value=p.value[1:]), t, n), "pages.value has the shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said(name):
    change, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence):
        paged_attention(*change(*Shape().arrays(jnp.float32)[:4]))


def test_what_the_kernel_cannot_do_is_said():
    q, pages, table, lengths, _, _ = Shape(page=12).arrays(jnp.float32)
    with pytest.raises(NotImplementedError, match="pages hold a multiple of 8 tokens, these 12"):
        paged_attention(q, pages, table, lengths, implementation="mosaic_tpu")
    with target("cpu"), pytest.raises(NotImplementedError, match="this is 'cpu'"):
        paged_attention(q, pages, table, lengths, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="one of blockwise, mosaic_tpu, triton, jax_triton, got 'cudnn'"):
        paged_attention(q, pages, table, lengths, implementation="cudnn")
    with pytest.raises(ValueError, match="key has the shape"):
        paged.write(pages, q, q, table, lengths)
    with target("NVIDIA H100"), pytest.raises(NotImplementedError, match="multiple of 16 tokens, these 12"):
        paged_attention(q, pages, table, lengths, implementation="triton")


def test_a_gpu_shares_long_rows_among_programs(monkeypatch):
    monkeypatch.setattr(blocks, "splits", lambda programs, blocks: 3)
    with target(INTERPRET_GPU), jax.enable_x64(True):
        q, pages, table, lengths, k, v = Shape(T=2, lengths=(0, 80, 1, 37)).arrays()
        out = paged_attention(q, pages, table, lengths, return_residual=True, implementation="triton")
        for a, b in zip(out, plain(q, k, v, lengths), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", [None, 100])
def test_paged_attention_is_lowered_for_cuda(window):
    q, pages, table, lengths, _, _ = Shape(T=1, H=128, H2=128, page=128, lengths=(500, 3)).arrays("bfloat16")
    attend = lambda *a: paged_attention(*a, local_window_size=window, implementation="triton")
    assert "triton" in lower_for_gpu(attend, (q, pages, table, lengths)).as_text()
