"""Every backend on every case against the definition, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxml.attention import Causal, blockwise, flash_attention
from jaxml.attention.cases import CASES
from jaxml.target import INTERPRET, INTERPRET_GPU, target
from jaxml.testing import tolerance

BACKENDS = ("blockwise", "mosaic_tpu", "triton")
by_name = {case.name: case for case in CASES}
FAST = ("causal", "grouped heads", "packed", "bias of queries", "sinks", "dense mask, rows without keys")
slow = lambda what, *where: pytest.param(what, *where, marks=pytest.mark.slow)
SECOND_ORDER = {
    "blockwise": ("causal", "grouped heads", "packed", "bias of keys", "soft cap", "sinks", "ALiBi", "dropout"),
    "mosaic_tpu": ("causal", "soft cap", "sinks"),  # what is not `blockwise` of them is the first derivative
    "triton": ("causal", "ALiBi"),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """So that the small cases have many tiles, whole, crossed and empty ones; kernels are interpreted."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    tiles = lambda x: (min(32, x.query.shape[1]), min(16, x.key.shape[1]))
    monkeypatch.setattr(blockwise, "_blocks", tiles)
    with target(INTERPRET_GPU if backend == "triton" else INTERPRET):
        yield


def call(case, dtype, backend):
    """(function of the differentiable arrays → (out, lse), those arrays)."""
    kwargs = case.kwargs(dtype)
    names = [n for n in ("bias", "sinks") if n in kwargs]
    arrays = (*case.arrays(dtype), *(kwargs.pop(n) for n in names))

    def function(q, k, v, *rest):
        rest = dict(zip(names, rest))
        return flash_attention(q, k, v, **kwargs, **rest, implementation=backend, return_residual=True)

    return function, arrays


def loss(function):
    """A number that depends on every output, through the log-sum-exp too."""

    def of(*arrays):
        out, lse = function(*arrays)
        weights = jnp.sin(jnp.arange(out.size, dtype=lse.dtype)).reshape(out.shape).astype(out.dtype)
        return jnp.sum(out * weights) + jnp.sum(jnp.cos(jnp.where(lse > -jnp.inf, lse, 0.0)))

    return of


def close(ours, theirs, bound):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=bound, rtol=bound)


@pytest.mark.parametrize(
    "name, backend",
    [(n, b) if b == "blockwise" or n in FAST else slow(n, b) for n in by_name for b in BACKENDS],
)
def test_values_and_gradients_equal_the_definition(name, backend):
    close(values_and_gradients(name, backend), defined(name), bound=1e-10)


def values_and_gradients(name, implementation):
    with jax.enable_x64(True):
        function, arrays = call(by_name[name], jnp.float64, implementation)
        wanted = tuple(range(len(arrays)))
        return jax.jit(lambda *a: (function(*a), jax.grad(loss(function), wanted)(*a)))(*arrays)


@functools.lru_cache
def defined(name):
    return jax.tree.map(np.asarray, values_and_gradients(name, "reference"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, backend", [(n, b) if n == "causal" else slow(n, b) for b, names in SECOND_ORDER.items() for n in names]
)
def test_forward_mode_and_second_derivatives_equal_the_definition(name, backend):
    with jax.enable_x64(True):
        results = []
        for implementation in (backend, "reference"):
            function, arrays = call(by_name[name], jnp.float64, implementation)
            wanted = tuple(range(len(arrays)))
            dots = tuple(jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in arrays)

            f = loss(function)

            def derivatives(arrays, dots, f=f, n=wanted):
                grad = lambda *a: jax.grad(f, n)(*a)
                along = jax.jvp(f, arrays, dots)[1]
                forward_over_reverse = jax.jvp(grad, arrays, dots)[1]
                inner = lambda *a: sum(jnp.vdot(g, d) for g, d in zip(grad(*a), dots))
                return along, forward_over_reverse, jax.grad(inner, n)(*arrays)

            results.append(jax.jit(derivatives)(arrays, dots))
        close(*results, bound=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["causal", "sinks"])
def test_low_precision_errs_no_more_than_the_definition_in_it(name, dtype, backend):
    function, arrays = call(by_name[name], dtype, backend)
    exact, _ = call(by_name[name], jnp.float32, "reference")
    rounded, _ = call(by_name[name], dtype, "reference")
    run = lambda f, a: jax.jit(lambda *a: (f(*a), jax.grad(loss(f), (0, 1, 2))(*a)))(*a)
    ours, theirs = run(function, arrays), run(rounded, arrays)
    true = run(exact, [a.astype(jnp.float32) for a in arrays])
    for a, b, t in zip(*map(jax.tree.leaves, (ours, theirs, true))):
        error = lambda x, t=t: float(jnp.max(jnp.abs(x.astype(jnp.float32) - t)))
        assert error(a) <= 2 * error(b) + tolerance("float32", 64)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_after_a_token_moves_it(backend):
    q, k, v = by_name["causal"].arrays()
    early = lambda k, v: jnp.sum(flash_attention(q, k, v, is_causal=True, implementation=backend)[:, :40] ** 2)
    for grad in jax.grad(early, (0, 1))(k, v):
        assert not np.any(grad[:, 40:]) and np.all(np.any(grad[:, :40], axis=(2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_to_the_left_alone_does_not_see_the_future(backend):
    q, k, v = by_name["causal"].arrays()
    out = lambda k: flash_attention(q, k, v, local_window_size=(9, 0), implementation=backend)
    grad = jax.grad(lambda k: jnp.sum(out(k)[:, 30] ** 2))(k)
    seen = np.any(np.asarray(grad), axis=(0, 2, 3))
    assert list(np.flatnonzero(seen)) == list(range(21, 31))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_other_segments_and_beyond_the_lengths_change_nothing(backend):
    q, k, v = by_name["causal"].arrays()
    ids = jnp.asarray(np.repeat([0, 1, 2], [20, 24, 20])[None])
    attend = functools.partial(flash_attention, implementation=backend, q_segment_ids=ids)
    changed = attend(q, k.at[:, :20].set(7.0), v.at[:, 44:].set(-9.0))
    np.testing.assert_array_equal(attend(q, k, v)[:, 20:44], changed[:, 20:44])
    attend = functools.partial(flash_attention, implementation=backend, key_value_seq_lengths=jnp.array([31]))
    np.testing.assert_array_equal(attend(q, k, v), attend(q, k.at[:, 31:].set(jnp.inf), v.at[:, 31:].set(5.0)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_back_for_a_row_that_sees_nothing_is_ignored(backend):
    """The gradient of a function of its log-sum-exp, −inf, is easily NaN, even behind a `where`."""
    q, k, v = by_name["causal"].scaled(T=20).arrays()
    ids = jnp.zeros((1, 20), int).at[0, 5].set(9)

    def total(q, k, v):
        _, lse = flash_attention(
            q, k, v, q_segment_ids=ids, kv_segment_ids=ids * 0, implementation=backend, return_residual=True
        )
        return jnp.sum(jnp.where(lse > -jnp.inf, jnp.sin(lse), 0.0))

    grads = jax.grad(total, (0, 1, 2))(q, k, v)
    assert all(jnp.all(jnp.isfinite(g)) for g in grads) and jnp.all(grads[0][0, 5] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["blockwise", slow("mosaic_tpu"), slow("triton")])
def test_transformations_change_nothing(backend):
    case = by_name["causal"].scaled(B=4, T=40)
    q, k, v = case.arrays()
    f = loss(lambda *a: flash_attention(*a, is_causal=True, implementation=backend, return_residual=True))
    grad = jax.grad(f, (0, 1, 2))
    plain = jax.jit(grad)(q, k, v)
    bound = tolerance("float32", 40)
    close(jax.jit(jax.grad(jax.checkpoint(f), (0, 1, 2)))(q, k, v), plain, bound)
    of_rows = loss(lambda *a: flash_attention(*a, is_causal=True, implementation=backend, return_residual=True))
    per_row = lambda q, k, v: jax.vmap(jax.grad(of_rows, (0, 1, 2)))(q[:, None], k[:, None], v[:, None])
    rows = jax.jit(per_row)(q, k, v)
    one = jax.jit(grad)(q[3:4], k[3:4], v[3:4])
    close([r[3] for r in rows], one, bound)
    shared = jax.jit(lambda q, k, v: jax.vmap(grad, (0, None, None))(q[:, None], k[:1], v[:1]))(q, k, v)
    close([g[2] for g in shared], jax.jit(grad)(q[2:3], k[:1], v[:1]), bound)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    part = lambda q, k, v: flash_attention(q, k, v, is_causal=True, implementation=backend)
    spec = P("data")
    checked = backend == "blockwise"  # Pallas's interpreter does not know of varying axes; the compiler does
    sharded = jax.shard_map(part, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=checked)
    squares = lambda f: jax.jit(jax.grad(lambda q, k, v: jnp.sum(f(q, k, v) ** 2), (0, 1, 2)))(q, k, v)
    close(squares(sharded), squares(part), bound)


def test_traced_masks_need_no_array_of_their_own_and_memory_grows_with_the_length(monkeypatch):
    monkeypatch.undo()

    def extra(T, derivative):
        x = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
        f = lambda q, k, v, ids: jnp.sum(flash_attention(q, k, v, is_causal=True, q_segment_ids=ids) ** 2)
        f = jax.grad(f, (0, 1, 2)) if derivative else f
        return jax.jit(f).lower(x, x, x, ids).compile().memory_analysis().temp_size_in_bytes

    for derivative in (False, True):
        short, long = extra(4096, derivative), extra(32768, derivative)
        assert long < 8.5 * short  # 64 times were the square
        assert long < 32768**2 * 4 / 50


def test_lengths_that_no_block_divides_at_the_real_block_size(monkeypatch):
    monkeypatch.undo()
    q, k, v = by_name["causal"].scaled(T=1100, S=1061, N=2, K=1).arrays()
    ours = jax.jit(functools.partial(flash_attention, is_causal=True))(q, k, v)
    theirs = flash_attention(q, k, v, mask=Causal(), implementation="reference")
    np.testing.assert_allclose(ours, theirs, atol=tolerance("float32", 1061))


def test_hundreds_of_random_masks_and_lengths_equal_the_definition():
    case = by_name["sinks"].scaled(T=37, S=45, B=2)
    q, k, v = case.arrays()

    def run(data, implementation):
        return flash_attention(
            q, k, v, implementation=implementation, is_causal=True, local_window_size=(20, 0), sinks=data["sinks"],
            mask=data["mask"], q_positions=data["q_at"], kv_positions=data["kv_at"], q_segment_ids=data["q_ids"],
            kv_segment_ids=data["kv_ids"], key_value_seq_lengths=data["lengths"], return_residual=True,
        )  # fmt: skip

    ours, theirs = (jax.jit(functools.partial(run, implementation=i)) for i in ("blockwise", "reference"))
    for seed in range(300):
        rng = np.random.default_rng(seed)
        ids = lambda n, rng=rng: np.sort(rng.integers(0, rng.integers(1, 5), (2, n)), 1)
        data = dict(
            sinks=rng.standard_normal(4).astype(np.float32) * rng.integers(0, 9),
            mask=rng.random((2, 1, 37, 45)) < rng.random(),
            q_at=rng.integers(0, 50, (2, 37)),
            kv_at=rng.integers(0, 50, (2, 45)),
            q_ids=ids(37),
            kv_ids=ids(45),
            lengths=rng.integers(0, 46, 2),
        )
        close(ours(data), theirs(data), tolerance("float32", 45))


def test_score_mod_sees_indices_of_one_dtype_whatever_the_tiles():
    """With 64-bit types, a loop over rows of tiles and none over columns: positions stay int32, as it was traced."""
    with jax.enable_x64(True):
        q, k, v = by_name["causal"].scaled(T=70, S=10).arrays(jnp.float64)
        mod = lambda s, b, h, i, j: s - 0.1 * abs(i - j)
        ours, theirs = (flash_attention(q, k, v, score_mod=mod, implementation=i) for i in ("blockwise", "reference"))
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_score_mod_may_close_over_integers_beside_what_is_learnt():
    q, k, v = by_name["causal"].arrays()
    buckets = jnp.arange(64) // 9

    def total(table, implementation):
        mod = lambda s, b, h, i, j: s + table[buckets[jnp.abs(i - j)]]
        out = flash_attention(q, k, v, is_causal=True, score_mod=mod, implementation=implementation)
        return jnp.sum(out**2)

    ours, theirs = (jax.grad(total)(jnp.ones(8), i) for i in ("blockwise", "reference"))
    np.testing.assert_allclose(ours, theirs, atol=tolerance("float32", 64 * 64))
