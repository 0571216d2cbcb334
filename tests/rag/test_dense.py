"""Exact search is exact, in blocks, over devices, and after codes."""

import jax
import numpy as np
import pytest

from jaxml.rag import dense

rng = np.random.default_rng(0)
ROWS = rng.normal(size=(1001, 24)).astype(np.float32)
ASKED = rng.normal(size=(5, 24)).astype(np.float32)
DEAD = rng.random(1001) < 0.3
EXACT = np.argsort(-(ASKED @ ROWS.T) + np.where(DEAD, 1e9, 0)[None], 1)[:, :7]


@pytest.mark.parametrize("options", [{}, dict(block=128), dict(block=2000), dict(block=128, devices="all")])
def test_the_best_rows_are_those_of_numpy(options):
    if "devices" in options:
        options = options | {"devices": jax.devices()}
    matrix = dense.place(ROWS, dead=DEAD, **options)
    scores, rows = dense.search(matrix, ASKED, 7)
    np.testing.assert_array_equal(rows, EXACT)
    np.testing.assert_allclose(scores, np.take_along_axis(ASKED @ ROWS.T, EXACT, 1), rtol=1e-5)
    assert matrix.count == 1001
    if "devices" in options:
        assert len(matrix.blocks[0].sharding.device_set) == jax.device_count()


def test_codes_find_what_is_then_ranked_exactly():
    codes, scales = dense.quantize(ROWS)
    assert np.abs(codes * scales[:, None] - ROWS).max() <= scales.max() / 2 + 1e-6
    matrix = dense.place(codes, scales=scales, dead=DEAD, block=256)
    assert matrix.nbytes < ROWS.nbytes / 2
    _, rows = dense.search(matrix, ASKED, 28)
    scores, best = dense.refine(ROWS, ASKED, rows, 7)
    np.testing.assert_array_equal(best, EXACT)
    np.testing.assert_allclose(scores, np.take_along_axis(ASKED @ ROWS.T, EXACT, 1), rtol=1e-5)
    assert dense.recall(best, EXACT) == 1.0 and dense.recall(best[:, :3], np.full((5, 3), -2)) == 0.0


def test_any_number_of_devices_takes_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(dense, "BLOCK", 64)
    for n in (5, 100):
        _, rows = dense.search(dense.place(ROWS[:n], devices=jax.devices()[:3]), ASKED, 3)
        np.testing.assert_array_equal(rows, np.argsort(-(ASKED @ ROWS[:n].T), 1)[:, :3])


def test_where_there_are_fewer_rows_than_wanted_the_rest_is_none():
    matrix = dense.place(ROWS[:4], dead=np.array([0, 1, 0, 0], bool))
    scores, rows = dense.search(matrix, ASKED[:1], 6)
    assert set(rows[0, :3].tolist()) == {0, 2, 3} and rows[0, 3:].tolist() == [-1] * 3
    assert np.isneginf(scores[0, 3:]).all()
    assert dense.refine(ROWS, ASKED[:1], rows, 5)[1][0, 3:].tolist() == [-1] * 2


def test_the_same_shapes_are_compiled_once():
    matrix = dense.place(ROWS, block=256)
    dense.search(matrix, ASKED, 3)
    before = dense._best._cache_size()
    dense.search(matrix, ASKED + 1, 3)
    assert dense._best._cache_size() == before


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: dense.place(ROWS[:0]), "n at least 1"), (lambda: dense.place(ROWS, dead=DEAD[:3]), "dead is"),
        (lambda: dense.place(ROWS, scales=np.ones(1001)), "scales are given with int8"),
        (lambda: dense.place(ROWS.astype(np.int8)), "scales are given with int8"),
        (lambda: dense.place(ROWS, block=100, devices=jax.devices()), "divides over 8"),
        (lambda: dense.search(dense.place(ROWS), ASKED[:, :3], 1), r"queries are \[Q, 24\]"),
        (lambda: dense.search(dense.place(ROWS), ASKED, 0), "k is at least 1"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_fewer_candidates_than_are_wanted_leave_places_empty():
    scores, rows = dense.refine(ROWS, ASKED[:2], np.array([[3, -1], [1, 2]]), 4)
    assert scores.shape == rows.shape == (2, 4)
    assert rows[0].tolist() == [3, -1, -1, -1] and np.isneginf(scores[0, 1:]).all() and rows[1, 2:].tolist() == [-1, -1]
