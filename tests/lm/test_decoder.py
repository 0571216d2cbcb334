import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.lm import cache as caches
from jaxml.lm import decoder
from jaxml.testing import tiny_config, tolerance

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12)).astype(np.int32)
WINDOWED = dict(window=4, local_layers=(0,))


def model(seed=0, **fields):
    config = tiny_config(**fields)
    params = decoder.init(jax.random.key(seed), config)
    return jax.tree.map(lambda w: w * 8 if w.ndim > 2 else w, params), config


@pytest.mark.parametrize("fields", [{}, WINDOWED, dict(qk_norm=True, post_norms=True, norm_plus_one=True)])
def test_no_gradient_flows_from_a_later_token(fields):
    params, config = model(**fields)
    embedded = jnp.take(params["embed"], TOKENS, axis=0)

    def at(x, t):
        replaced = dict(params, embed=jnp.concatenate([x.reshape(-1, 32), params["embed"][24:]]))
        ids = jnp.arange(24).reshape(2, 12)
        return decoder.hidden(replaced, config, ids)[:, t].sum()

    g = jax.grad(at)(embedded, 5)
    assert jnp.all(g[:, 6:] == 0) and jnp.all(jnp.any(g[:, 5] != 0, axis=-1))


def test_a_window_hides_what_is_further_away():
    params, config = model(num_layers=1, window=4, local_layers=(0,))
    changed = TOKENS.copy()
    changed[:, 3] = 7
    same = decoder.apply(params, config, TOKENS) == decoder.apply(params, config, changed)
    assert jnp.all(same[:, 7:]) and not jnp.any(jnp.all(same[:, 3:7], axis=-1))


def test_jitted_equals_not_jitted_and_compiles_once():
    params, config = model()
    jitted = jax.jit(decoder.apply, static_argnums=1)
    np.testing.assert_allclose(
        jitted(params, config, TOKENS), decoder.apply(params, config, TOKENS), atol=tolerance("float32", 32)
    )
    jitted(params, config, TOKENS + 1)
    assert jitted._cache_size() == 1


def test_packed_segments_compute_what_they_do_alone():
    params, config = model()
    packed = np.concatenate([TOKENS[0, :5], TOKENS[1, :7]])[None]
    segments = np.array([[1] * 5 + [2] * 7])
    positions = np.concatenate([np.arange(5), np.arange(7)])[None]
    together = decoder.apply(params, config, packed, positions=positions, segment_ids=segments)
    bound = tolerance("float32", 128)
    np.testing.assert_allclose(together[:, :5], decoder.apply(params, config, TOKENS[:1, :5]), atol=bound)
    np.testing.assert_allclose(together[:, 5:], decoder.apply(params, config, TOKENS[1:, :7]), atol=bound)


@pytest.mark.parametrize("fields", [{}, WINDOWED])
def test_remat_changes_memory_not_gradients(fields):
    params, config = model(**fields)
    loss = lambda p, remat: jnp.sum(decoder.apply(p, config, TOKENS, remat=remat) ** 2)
    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in (False, True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(a).max())), plain, again
    )


@pytest.mark.parametrize("fields", [{}, WINDOWED, dict(no_rope_layers=(1,))])
def test_a_cache_in_two_pieces_gives_what_one_pass_gives(fields):
    params, config = model(**fields)
    whole = decoder.hidden(params, config, TOKENS)
    cache = caches.init(config, 2, 16)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    for part in (slice(0, 7), slice(7, 12)):
        x, cache = decoder.apply_cached(params, config, TOKENS[:, part], cache, positions=positions[:, part])
        np.testing.assert_allclose(x, whole[:, part], atol=tolerance("float32", 128))
    assert int(cache.length) == 12


def test_a_prefix_is_kept_broadcast_and_continued():
    params, config = model()
    prefix = caches.init(config, 1, 8)
    row = np.arange(5, dtype=np.int32)[None]
    _, prefix = decoder.apply_cached(params, config, TOKENS[:1, :5], prefix, positions=row)
    many = caches.grow(caches.broadcast(prefix, 3), 12)
    tails = np.array([[9, 8], [7, 6], [5, 4]], np.int32)
    x, _ = decoder.apply_cached(params, config, tails, many, positions=np.array([[5, 6]] * 3, np.int32))
    for i in range(3):
        alone = decoder.hidden(params, config, np.concatenate([TOKENS[:1, :5], tails[i : i + 1]], 1))
        np.testing.assert_allclose(x[i], alone[0, 5:], atol=tolerance("float32", 128))
    with pytest.raises(ValueError, match="one row"):
        caches.broadcast(many, 2)
    with pytest.raises(ValueError, match="at least the present"):
        caches.grow(many, 3)


def test_bfloat16_stays_bfloat16_inside_and_logits_are_float32():
    params, config = model()
    params = decoder.cast(params, jnp.bfloat16)
    assert decoder.hidden(params, config, TOKENS).dtype == jnp.bfloat16
    assert decoder.apply(params, config, TOKENS).dtype == jnp.float32


def test_gradients_equal_finite_differences():
    params, config = model()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        loss = lambda w: jnp.sum(jnp.tanh(decoder.hidden(dict(wide, norm=w), config, TOKENS)))
        w = jnp.asarray(wide["norm"])
        direction = jnp.asarray(np.random.default_rng(1).standard_normal(w.shape))
        slope = (loss(w + 1e-5 * direction) - loss(w - 1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(w), direction), slope, rtol=1e-4)


def test_tokens_of_one_axis_are_refused():
    params, config = model()
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        decoder.apply(params, config, TOKENS[0])
