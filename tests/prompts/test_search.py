"""A search that finds what is better, says how sure it is, and picks up where it was stopped."""

import json

import numpy as np
import pytest

from jaxml import prompts
from jaxml.prompts import Candidate, Task
from jaxml.prompts.llm import Reply, Scores
from jaxml.prompts.search import draw
from jaxml.testing import tiny_model

POOL = [{"prompt": f"{i}*2=", "response": str(2 * i)} for i in range(6)]
DEV = [{"prompt": f"{i}+1=", "response": str(i + 1), "choices": [str(i + 1), "0"]} for i in range(20)]
HELD = [{"prompt": f"{i}+2=", "response": str(i + 2), "choices": [str(i + 2), "0"]} for i in range(15)]


class Pretend:
    """Answers are the likelier, the more often the prompt says "good", and the more examples it shows."""

    name = "pretend"

    def __init__(self):
        self.asked = 0

    def cost(self, prompt, choices=()):
        return len(prompt)

    def score(self, asked, choices):
        self.asked += len(asked)
        out = []
        for prompt, of in zip(asked, choices):
            noise = (sum(map(ord, prompt)) % 7) / 10
            merit = 3.0 * prompt.count("good") + 0.2 * prompt.count("=") - noise
            out.append(Scores(np.array([-10.0 + merit] + [-9.0] * (len(of) - 1)), np.ones(len(of)), len(prompt)))
        return out

    def generate(self, asked, **_):
        self.asked += len(asked)
        return [Reply("The 2." if "good" in p else "?", len(p), 2) for p in asked]

    def sample(self, prompt, n, **_):
        self.said = prompt[0]["content"]
        return [Reply(text, 1, 1) for text in ['"Be good good."', "Instruction: Be bad.", "", "Be good."][:n]]


SAID = ["", "Be bad.", "Be good.", "Hm."]


def find(llm=None, **options):
    options = dict(shots=(0, 2), sets=2, first=4) | options
    return prompts.search(llm or Pretend(), options.pop("task", Task(POOL)), SAID, DEV, HELD, **options)


def test_the_better_prompt_wins_and_its_interval_leaves_out_zero():
    report = find()
    assert report.winner.instruction == "Be good." and report.baseline == Candidate("")
    mean, low, high = report.difference
    assert low < mean < high and report.significant and low > 2
    assert report.shown.startswith("Be good.") and report.shown.endswith("0+2=")
    assert report.spent == report.trials[-1].spent + sum(m.tokens for m in report.held_out.values())
    text = report.markdown()
    assert "better" in text and f"{report.spent:,} tokens" in text and "Be good." in text


def test_halving_tries_many_on_few_and_few_on_many():
    report = find()
    tried = {n: [t for t in report.trials if t.examples == n] for n in (4, 12, 20)}
    assert [len(tried[n]) for n in (4, 12, 20)] == [12, 4, 2] and len(report.dev) == 2


def test_where_nothing_is_better_it_says_so():
    report = prompts.search(Pretend(), Task(), ["", "Hm."], DEV, HELD, shots=(0,))
    assert not report.significant
    assert "not told apart" in report.markdown() or "nothing better was found" in report.markdown()


@pytest.mark.parametrize("kept", [3, [1], [[], 2], [[1.0, 2.0], 2], [["x"], 2], [[1.0], "2"], ["said", 2]])
def test_kept_answers_that_are_damaged_are_told(tmp_path, kept):
    find(folder=tmp_path)
    path = next(tmp_path.glob("*.jsonl"))
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps([json.loads(first)[0], kept]), *rest, ""]))
    with pytest.raises(ValueError, match=r"is kept for .* is damaged"):
        find(folder=tmp_path)


@pytest.mark.parametrize("change, said", [
    ({"choices": "ab"}, "choices are a list of texts"), ({"choices": [1]}, "choices are a list of texts"),
    ({"response": 3}, "an answer is a text"), ({"response": "x"}, "the answer is among the choices"),
])  # fmt: skip
def test_examples_of_another_form_are_told(change, said):
    example = {"prompt": "a", "response": "b", "choices": ["b", "c"]}
    Task(metric="accuracy").check([example])
    with pytest.raises(ValueError, match=said):
        Task(metric="accuracy").check([example | change])


def test_a_stopped_search_goes_on_to_the_same_report_and_pays_nothing_twice(tmp_path):
    class Dies(Pretend):
        def score(self, *args):
            if self.asked > 40:
                raise KeyboardInterrupt
            return super().score(*args)

    whole = find(folder=tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        find(Dies(), folder=tmp_path / "b")
    llm, all_of = Pretend(), Pretend()
    again = find(llm, folder=tmp_path / "b")
    find(all_of)
    assert again.markdown() == whole.markdown() and again.trials == whole.trials
    assert 0 < llm.asked < all_of.asked
    final = Pretend()
    find(final, folder=tmp_path / "b")
    assert final.asked == 0
    assert (tmp_path / "b" / "report.md").read_text() == whole.markdown()
    assert (tmp_path / "b" / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_the_budget_holds_and_too_small_a_one_is_refused():
    free = find().spent
    report = find(budget=free // 2)
    assert report.spent <= free // 2 and report.stopped == "the budget was spent" and len(report.held_out) >= 1
    assert "of " in report.markdown().splitlines()[2]


def test_other_metrics_count_choices_matches_and_whatever_one_likes():
    assert find(task=Task(POOL, metric="accuracy")).held_out[Candidate("")].values.tolist() == [0.0] * 15
    report = find(task=Task(POOL, metric="match"), first=20)  # "The 2." is right of one question in twenty
    assert report.winner.instruction == "Be good." and report.held_out[report.winner].values.sum() == 1
    assert find(task=Task(POOL, metric="match", same=lambda _: "")).held_out[Candidate("")].mean == 1.0
    long = lambda text, example: float(len(text))
    assert find(task=Task(POOL, metric=long)).held_out[Candidate("")].mean == 1.0


def test_functions_count_what_is_kept_anew_and_questions_may_choose_their_examples(tmp_path):
    llm = Pretend()
    first = find(llm, task=Task(POOL, metric=lambda text, e: 1.0), folder=tmp_path)
    asked = llm.asked
    again = find(llm, task=Task(POOL, metric=lambda text, e: 2.0), folder=tmp_path)
    assert (first.held_out[Candidate("")].mean, again.held_out[Candidate("")].mean) == (1.0, 2.0)
    assert llm.asked == asked  # what the model wrote is kept, not how it was counted
    near = Task(POOL, choose=lambda example, n: [int(example["prompt"][0]) % 6] * n)
    assert near.prompt(Candidate("", (), 2), DEV[3]) == "3*2=6\n\n3*2=6\n\n3+1="
    with pytest.raises(ValueError, match="Give the task `choose`"):
        Task(POOL).prompt(Candidate("", (), 1), DEV[0])


def test_what_was_tried_on_more_examples_is_compared_on_the_same_ones():
    class Tide(Pretend):  # the first questions are easy for everybody
        def score(self, asked, choices):
            found = super().score(asked, choices)
            easy = lambda p: 50.0 * (int(p.rsplit("+", 1)[0].split()[-1].split("\n")[-1]) in EASY)
            return [s._replace(log_probs=s.log_probs + easy(p)) for p, s in zip(asked, found)]

    order = np.random.default_rng(0).permutation(len(DEV))
    EASY = [int(i) for i in order[:4]]
    proposer = lambda scored, number: (["Be worse."], 7)
    report = prompts.search(
        Tide(), Task(), ["", "Be good."], DEV, HELD, shots=(0,), first=4, proposer=proposer, rounds=2
    )
    assert report.winner.instruction == "Be good."
    assert report.spent == report.trials[-1].spent + sum(m.tokens for m in report.held_out.values())


def test_a_question_that_is_shown_or_chosen_by_is_not_measured():
    for name, dev, held in (
        ("dev and held_out", DEV, DEV),
        ("pool and held_out", DEV, POOL),
        ("pool and dev", POOL, HELD),
    ):
        with pytest.raises(ValueError, match=f"in both {name}"):
            prompts.search(Pretend(), Task(POOL), SAID, dev, held)


def test_few_examples_tell_nothing():
    report = prompts.search(Pretend(), Task(), ["", "Be good."], DEV, HELD[:9], shots=(0,))
    assert not report.significant and "fewer than 10 examples" in report.markdown()


def test_a_proposer_s_instructions_are_tried_in_the_next_round():
    llm = Pretend()
    proposer = prompts.propose(llm, [("1+1=", "2")], 4)
    report = find(llm, proposer=proposer, rounds=2)
    assert report.winner.instruction == "Be good good."
    assert "Question: 1+1=\nAnswer: 2" in llm.said and llm.said.rindex("Be good.") > llm.said.index("Be bad.")
    assert {t.candidate.instruction for t in report.trials} == {*SAID, "Be good good."}


def test_orders_and_draws_are_different_ones():
    turned = prompts.orders(Candidate("x", (0, 1, 2)))
    assert len({c.demonstrations for c in turned}) == 6
    some = prompts.orders(Candidate("x", tuple(range(6))), most=10)
    assert len({c.demonstrations for c in some}) == 10 and some[0].demonstrations == tuple(range(6))
    sets = draw(Task(POOL), (0, 3), 3, np.random.default_rng(0))
    assert sets[0] == () and len(sets) == 4 and all(len(set(s)) == len(s) for s in sets)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(200):
        low, high = prompts.bootstrap(rng.normal(1.0, 2.0, 60), draws=1000, seed=i)
        inside += low <= 1.0 <= high
    assert 180 <= inside <= 200


@pytest.mark.parametrize("options, words", [
    (dict(shots=(9,)), "shots are in 0 … 6"), (dict(eta=1), "eta is at least 2"), (dict(rounds=2), "need a proposer"),
    (dict(budget=3), "budget pays for one evaluation"),
])  # fmt: skip
def test_wrong_input_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        find(**options)


def test_metrics_and_answers_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="metric is one of"):
        Task(metric="best")
    with pytest.raises(ValueError, match="the answer is among the choices"):
        Task(metric="accuracy").check([{"prompt": "a", "response": "b", "choices": ["c"]}])
    with pytest.raises(ValueError, match="number 0 lacks choices"):
        prompts.search(Pretend(), Task(metric="accuracy"), SAID, POOL, HELD, shots=(0,))
    with pytest.raises(ValueError, match="instructions are a list"):
        prompts.search(Pretend(), Task(), "Be good.", DEV, HELD)


def test_a_model_in_this_process_is_searched_by_its_own_likelihood(tmp_path):
    local = prompts.Local(tiny_model())
    report = prompts.search(local, Task(POOL[:2]), ["", "add."], DEV[:6], HELD[:3], shots=(0, 1), sets=1, first=3)
    best = report.held_out[report.winner].values
    task = Task(POOL[:2])
    asked = [task.prompt(report.winner, e) for e in HELD[:3]]
    want = [prompts.score_choices(local, [p], [e["response"]])[0][0] for p, e in zip(asked, HELD)]
    np.testing.assert_allclose(best, want, atol=1e-4)
    json.dumps([t.mean for t in report.trials])
