import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.attention import Array, Causal, Chunked, Fn, Lengths, Prefix, Segments, Window, flash_attention
from jaxml.attention.masks import Grid, tile_at, whole

B, N, T, S = 2, 4, 13, 17
RNG = np.random.default_rng(0)
ids = lambda n: jnp.asarray(np.sort(RNG.integers(0, 4, (B, n)), 1))
Q_IDS, KV_IDS = ids(T), ids(S)
Q_AT, KV_AT = jnp.asarray(RNG.permutation(T)[None]), jnp.asarray(RNG.integers(0, T, (B, S)))
MASKS = {
    "causal": Causal(),
    "causal by position": Causal(Q_AT, KV_AT),
    "window": Window(3, 2),
    "window by position": Window(3, None, Q_AT, KV_AT),
    "segments": Segments(Q_IDS, KV_IDS),
    "lengths": Lengths(jnp.array([5, 13]), jnp.array([17, 0])),
    "prefix": Prefix(jnp.array([3, 0])),
    "chunked": Chunked(4),
    "array of rows": Array(jnp.asarray(RNG.random((B, 1, T, 1)) > 0.5)),
    "array of heads": Array(jnp.asarray(RNG.random((1, N, T, S)) > 0.02)),
    "function": Fn(lambda b, h, q, k, n: (q + k + h) % n == 0, (jnp.asarray(2),)),
    "and": Causal() & Segments(Q_IDS, KV_IDS),
    "or": Causal() | Prefix(jnp.array([3, 0])),
    "not": ~Window(3, 2),
    "nested": (Causal(Q_AT, KV_AT) | ~Segments(Q_IDS, KV_IDS)) & Chunked(4),
}


def by_hand(name):
    """The mask written once more, with indices."""
    b, h, q, k = np.ogrid[:B, :N, :T, :S]
    at_q, at_k = np.asarray(Q_AT)[0, q], np.asarray(KV_AT)[b, k]
    causal, same = q >= k, np.asarray(Q_IDS)[b, q] == np.asarray(KV_IDS)[b, k]
    window, prefix = (q - k <= 3) & (k - q <= 2), k < np.array([3, 0])[b]
    return {
        "causal": causal,
        "causal by position": at_q >= at_k,
        "window": window,
        "window by position": at_q - at_k <= 3,
        "segments": same,
        "lengths": (q < np.array([5, 13])[b]) & (k < np.array([17, 0])[b]),
        "prefix": prefix,
        "chunked": q // 4 == k // 4,
        "array of rows": np.asarray(MASKS["array of rows"].array),
        "array of heads": np.asarray(MASKS["array of heads"].array),
        "function": (q + k + h) % 2 == 0,
        "and": causal & same,
        "or": causal | prefix,
        "not": ~window,
        "nested": ((at_q >= at_k) | ~same) & (q // 4 == k // 4),
    }[name]


@pytest.mark.parametrize("name", MASKS)
def test_the_whole_mask_is_what_it_says(name):
    full = (B, N, T, S)
    np.testing.assert_array_equal(
        np.broadcast_to(whole(MASKS[name], B, N, T, S), full), np.broadcast_to(by_hand(name), full)
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("rows, columns", [(4, 5), (13, 17), (1, 3)])
def test_tiles_agree_with_the_whole_and_their_kind_never_errs(name, rows, columns):
    mask, grid = MASKS[name], Grid(T, S, rows, columns)
    mask.check(B, T, S, N)
    R, C = -(-T // rows), -(-S // columns)
    full = np.broadcast_to(whole(mask, B, N, T, S), (B, N, T, S))
    some, every = (np.broadcast_to(a, (B, N, R, C)) for a in jax.jit(lambda m: m.blocks(grid))(mask))
    cut = jax.jit(lambda m, i, j: m.pad(grid).cut(i, j, grid).visible(tile_at(i, j, B, N, grid)))
    for i in range(R):
        for j in range(C):
            part = full[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            seen = np.broadcast_to(cut(mask, i, j), (B, N, rows, columns))[:, :, : part.shape[2], : part.shape[3]]
            np.testing.assert_array_equal(seen, part)
            assert np.all(part.any((2, 3)) <= some[:, :, i, j]) and np.all(part.all((2, 3)) >= every[:, :, i, j])


def test_half_of_the_tiles_of_a_causal_mask_are_empty_and_a_window_leaves_a_band():
    some, every = Causal().blocks(Grid(64, 64, 8, 8))
    assert some.sum() == 36 and every.sum() == 28
    some, _ = (Causal() & Window(left=8)).blocks(Grid(64, 64, 8, 8))
    assert some.sum() == 8 + 7  # the diagonal and the one below


@pytest.mark.parametrize(
    "mask, word",
    [
        (Causal(jnp.zeros((2, 5), int), jnp.zeros((2, 6), int)), r"q_positions has the shape \[B, T\] = \(2, 6\)"),
        (Segments(jnp.zeros((3, 6), int)), "q_ids"),
        (Lengths(jnp.zeros(3, int)), "q_lengths"),
        (Prefix(jnp.zeros(5, int)), "lengths"),
        (Causal() & ~Array(jnp.ones((2, 3, 6, 6), bool)), "broadcasts"),
    ],
)
def test_masks_of_another_shape_are_refused(mask, word):
    x = jnp.ones((2, 6, 4, 8))
    with pytest.raises(ValueError, match=word):
        flash_attention(x, x, x, mask=mask)
