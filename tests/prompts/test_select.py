"""Which examples are shown: near, diverse, or helpful by exact likelihood."""

import numpy as np
import pytest

from jaxml import lm, prompts
from jaxml.prompts import Candidate, Task, select
from jaxml.testing import tiny_model

POOL = [{"prompt": f"{w}? ", "response": w} for w in ("a", "bc", "d")]


def letters(texts):
    counts = np.array([[t.count(c) for c in "abc"] for t in texts], float) + 1e-9
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_the_nearest_stand_last_and_diverse_ones_do_not_repeat_each_other():
    pool = ["aa", "aaa", "ab", "cc"]
    assert select.nearest(letters, pool, ["a", "c"], 2) == [[1, 0], [2, 3]] or select.nearest(
        letters, pool, ["a"], 2
    ) == [[1, 0]]
    assert select.diverse(letters, pool, ["a"], 2, trade=1.0)[0] == [1, 0]
    assert select.diverse(letters, pool, ["a"], 2, trade=0.4)[0] == [3, 0]
    with pytest.raises(ValueError, match=r"count is in 1 … 4"):
        select.nearest(letters, pool, ["a"], 5)
    with pytest.raises(ValueError, match="trade is in"):
        select.diverse(letters, pool, ["a"], 1, trade=2.0)


def test_influence_is_the_gain_in_likelihood_of_each_example_alone():
    model = tiny_model()
    task = Task(POOL, between="\n")
    dev = [{"prompt": "c? ", "response": "c"}, {"prompt": "ab? ", "response": "ab"}, {"prompt": "x? ", "response": "x"}]
    found = select.influence(model, task, dev, instruction="say it.", at_once=2)
    alone = lm.score(model, [task.prompt(Candidate("say it."), e) for e in dev], [e["response"] for e in dev])
    for i in range(3):
        shown = [task.prompt(Candidate("say it.", (i,)), e) for e in dev]
        want = lm.score(model, shown, [e["response"] for e in dev]) - alone
        np.testing.assert_allclose(found[i], want, atol=2e-4)
    bare = select.influence(model, task, dev[:1])
    want = lm.score(model, [task.prompt(Candidate("", (1,)), dev[0])], ["c"]) - lm.score(model, ["c? "], ["c"])
    np.testing.assert_allclose(bare[1], want, atol=2e-4)


def test_examples_are_taken_for_what_they_add():
    matrix = np.array([[5.0, 0.0, 0.0], [4.9, 0.1, 0.0], [0.0, 2.0, 1.0]])
    assert select.by_influence(matrix, 2) == (2, 0)
    with pytest.raises(ValueError, match="count is in 1"):
        select.by_influence(matrix, 4)
    with pytest.raises(ValueError, match="prompts are texts"):
        chat = prompts.Template([{"role": "user", "content": "{prompt}"}])
        select.influence(tiny_model(), Task(POOL, ask=chat), POOL)
