"""Texts that share their beginnings, in one row: equal to each text alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxml import lm
from jaxml.lm import decoder, tree
from jaxml.lm.score import score_trees
from jaxml.lm.tree import Node
from jaxml.testing import tiny_model

MODEL = tiny_model()


def separate(model, root: Node):
    """The scored nodes' log-probabilities, each from a pass over its own text."""
    out = []

    def walk(node, before):
        text = [*before, *node.tokens]
        if node.scored:
            logits = decoder.apply(model.params, model.config, jnp.array([text]))[0]
            logs = jax.nn.log_softmax(logits)
            out.append([logs[i - 1, text[i]] for i in range(len(before), len(text))])
        for child in node.children:
            walk(child, text)

    walk(root, [])
    return out


LEAF = Node([7, 9], scored=True)
DEEP = Node([5, 6, 7], [
    Node([8], [LEAF, Node([3, 4, 5], scored=True)]),
    Node([9, 9], [Node([4], scored=True), Node([10], [LEAF])], scored=True),
    LEAF,
])  # fmt: skip


@pytest.mark.parametrize("fields", [{}, dict(window=3, local_layers=(0,), local_rope_theta=50.0)])
def test_a_tree_gives_what_separate_texts_give(fields):
    model = tiny_model(**fields)
    got = score_trees(model, [DEEP, Node([4, 4], [LEAF])])
    for one, found in zip((DEEP, Node([4, 4], [LEAF])), got):
        for a, b in zip(found, separate(model, one), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_what_all_trees_begin_with_is_read_once_and_changes_nothing():
    common = np.random.default_rng(0).integers(3, 60, 37).tolist()
    trees = [Node([*common, i + 3, 5], [Node([i + 4, 7], scored=True), LEAF]) for i in range(5)]
    apart, shared = (score_trees(MODEL, trees, share=share, batch_size=2) for share in (False, True))
    for a, b in zip(apart, shared):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)


def whole_texts(root):
    """The texts that a tree holds, from the root to each leaf."""
    rest = [text for child in root.children for text in whole_texts(child)] or [[]]
    return [[*root.tokens, *text] for text in rest]


@st.composite
def nodes(draw, depth=3):
    tokens = draw(st.lists(st.integers(3, 60), min_size=1, max_size=4))
    children = draw(st.lists(nodes(depth - 1), max_size=3)) if depth else []
    return Node(tokens, children, draw(st.booleans()))


@settings(max_examples=25, deadline=None)
@given(nodes())
def test_laying_out_keeps_texts_positions_and_ancestors(root):
    root = Node([2], [root])
    row = tree.lay(root)
    index = np.arange(len(row.tokens))
    seen = (index[None] <= index[:, None]) & (index[:, None] < np.array(row.ends)[None])
    # What a token sees is exactly the text that leads to it, at the positions of that text.
    found = [[row.tokens[j] for j in np.flatnonzero(line)] for line in seen]
    assert all([row.positions[j] for j in np.flatnonzero(line)] == list(range(line.sum())) for line in seen)
    begun = {tuple(text[:n]) for text in whole_texts(root) for n in range(1, len(text) + 1)}
    assert {tuple(f) for f in found} == begun
    for source, target in zip(row.sources, row.targets):
        assert (*found[source], target) in begun


def test_score_counts_the_continuation_alone_and_refuses_what_it_cannot_score():
    whole = lm.score(MODEL, ["ab"], ["cd"])[0]
    parts = lm.score(MODEL, ["ab", "abc"], ["c", "d"])
    assert whole == pytest.approx(parts.sum(), abs=1e-4)
    with pytest.raises(ValueError, match="something before it"):
        tree.lay(Node([5], scored=True))
    with pytest.raises(ValueError, match="context of 128 tokens, got 130"):
        score_trees(MODEL, [Node([5] * 128, [LEAF])])
    assert score_trees(MODEL, []) == []
