"""Votes of many samples, weighted as they are said to be."""

import numpy as np
import pytest

from jaxml import lm, prompts
from jaxml.prompts.llm import Reply
from jaxml.testing import tiny_model


class Fixed:
    name = "fixed"

    def __init__(self, replies):
        self.replies = replies

    def sample(self, prompt, n, **_):
        return self.replies[:n]


def test_the_heaviest_answer_wins():
    replies = [
        Reply("It is 4.", 3, 2, np.log(0.02)), Reply("it is 4", 3, 2, np.log(0.02)), Reply("5", 3, 1, np.log(0.3)),
        Reply("", 3, 0, None),
    ]  # fmt: skip
    votes = prompts.self_consistency(Fixed(replies), "2+2?", 4)
    assert votes.answer in ("It is 4.", "it is 4") and votes.shares == {"it is 4": 2 / 3, "5": 1 / 3}
    assert votes.unread == 1 and len(votes.samples) == 4
    likely = prompts.self_consistency(Fixed(replies), "2+2?", 4, weight="likelihood")
    assert likely.answer == "5" and likely.shares["5"] == pytest.approx(0.3 / 0.34)
    per_token = prompts.self_consistency(Fixed(replies), "2+2?", 4, weight="per_token")
    assert per_token.shares["5"] == pytest.approx(0.3 / (0.3 + 2 * 0.02**0.5))


def test_a_likely_sample_without_an_answer_drowns_nobody():
    replies = [Reply("?", 1, 1, -0.1), Reply("4", 3, 900, -900.0), Reply("-4", 3, 900, -901.0)]
    votes = prompts.self_consistency(Fixed(replies), "?", 3, weight="likelihood")
    assert votes.answer == "4" and votes.shares["4"] == pytest.approx(1 / (1 + np.exp(-1))) and votes.unread == 1


def test_no_answer_is_none_and_unknown_likelihoods_are_refused():
    silent = [Reply("hm", 1, 1, None)] * 3
    assert prompts.self_consistency(Fixed(silent), "?", 3, find=lambda _: None).answer is None
    with pytest.raises(NotImplementedError, match="does not tell how likely"):
        prompts.self_consistency(Fixed(silent), "?", 3, weight="likelihood")
    for wrong in (dict(n=0), dict(temperature=0.0), dict(weight="most")):
        with pytest.raises(ValueError, match="self_consistency: "):
            prompts.self_consistency(Fixed(silent), "?", **wrong)


def test_samples_come_from_one_prefill_and_are_those_of_separate_prompts():
    model = tiny_model()
    hot = lm.Sampling(temperature=1.0)
    many = lm.samples(model, "who? ", 4, max_new_tokens=5, sampling=hot, key=3)
    assert many == lm.generate(model, ["who? "] * 4, max_new_tokens=5, sampling=hot, key=3) and len(set(many)) > 1
    replies = prompts.Local(model).sample("who? ", 4, max_new_tokens=5, seed=3)
    assert [r.text for r in replies] == many
    for r in replies:
        if r.text:
            assert r.log_prob == pytest.approx(lm.score(model, ["who? "], [r.text])[0], abs=1e-3)
    with pytest.raises(ValueError, match="n is at least 1"):
        lm.samples(model, "who? ", 0)
