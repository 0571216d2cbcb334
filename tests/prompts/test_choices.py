"""All answers in one pass, as likely as each alone; corrections as they are defined."""

import numpy as np
import pytest

from jaxml import lm, prompts
from jaxml.testing import tiny_model

MODEL = tiny_model()
PROMPTS = ["is it? ", "who are you, and where? "]
CHOICES = ["yes", "no", "maybe so"]


def alone(prompt, choices):
    return np.array([lm.score(MODEL, [prompt], [c])[0] for c in choices])


def test_one_pass_gives_what_each_choice_alone_gives():
    for found, prompt in zip(prompts.score_choices(MODEL, PROMPTS, CHOICES), PROMPTS):
        np.testing.assert_allclose(found, alone(prompt, CHOICES), atol=1e-4)
    own = [["a", "b"], ["c", "dd", "e"]]
    for found, prompt, choices in zip(prompts.score_choices(MODEL, PROMPTS, own), PROMPTS, own):
        np.testing.assert_allclose(found, alone(prompt, choices), atol=1e-4)


def test_choices_after_messages_are_scored_after_the_rendered_chat():
    chat = [{"role": "user", "content": "is it?"}]
    np.testing.assert_allclose(prompts.score_choices(MODEL, [chat], CHOICES)[0], alone(chat, CHOICES), atol=1e-4)


def test_corrections_are_their_definitions():
    one = [PROMPTS[0]]
    plain = alone(PROMPTS[0], CHOICES)
    of = lambda correction, **o: prompts.score_choices(MODEL, one, CHOICES, correction=correction, **o)[0]
    np.testing.assert_allclose(of("tokens"), plain / np.array([3, 2, 8]), atol=1e-4)
    np.testing.assert_allclose(of("bytes"), plain / np.array([3, 2, 8]), atol=1e-4)
    np.testing.assert_allclose(of("domain", domain="a: "), plain - alone("a: ", CHOICES), atol=2e-4)
    np.testing.assert_allclose(of("pmi"), plain - alone("<s>", CHOICES), atol=2e-4)


def test_calibration_takes_the_prompt_s_bias_away():
    free = np.log([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    bias = np.exp(free).mean(0)
    p = np.array([[0.5, 0.4, 0.1], [0.6, 0.25, 0.15]])
    want = p / bias / (p / bias).sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(prompts.calibrate(np.log(p) - 3.0, free)), want, rtol=1e-9)
    np.testing.assert_allclose(np.exp(prompts.calibrate(np.log(bias), free)), 1 / 3)
    with pytest.raises(ValueError, match="of the same choices"):
        prompts.calibrate(np.log(p), free[:, :2])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: prompts.score_choices(MODEL, "is it?", CHOICES), "prompts are a list"),
        (lambda: prompts.score_choices(MODEL, PROMPTS, ["yes", ""]), "none empty"),
        (lambda: prompts.score_choices(MODEL, PROMPTS, "yes"), "the single string 'yes'"),
        (lambda: prompts.score_choices(MODEL, PROMPTS, ["yes", "yes"]), "different texts"),
        (lambda: prompts.score_choices(MODEL, PROMPTS, [["yes"]]), "one for each of 2 prompts, got 1"),
        (lambda: prompts.score_choices(MODEL, PROMPTS, CHOICES, correction="best"), "correction is one of"),
        (lambda: prompts.score_choices(MODEL, PROMPTS, CHOICES, correction="domain"), "domain is given with"),
        (lambda: prompts.score_choices(MODEL, PROMPTS, CHOICES, domain="a"), "domain is given with"),
    ],
)
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_fingerprint_tells_weights_apart_and_nothing_else():
    one, again, other = (prompts.Local(tiny_model(seed=seed)) for seed in (0, 0, 1))
    assert one.name == again.name != other.name


@pytest.mark.slow
def test_smollm2_knows_capitals_by_choice(smollm2):
    asked = {"France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid"}
    choices = [f" {c}" for c in asked.values()]
    questions = [f"The capital of {country} is" for country in asked]
    found = prompts.score_choices(smollm2, questions, choices)
    assert [int(s.argmax()) for s in found] == [0, 1, 2, 3]
    for question, scores in zip(questions, found):
        each = [lm.score(smollm2, [question], [c])[0] for c in choices]
        np.testing.assert_allclose(scores, each, atol=1e-4)
