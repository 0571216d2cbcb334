"""R-Tuning on models that are instant: what is asked, how it is judged and labelled, and what is trained on.

Each defect of the reference implementation has a test here that would find it.
"""

import dataclasses
import json

import numpy as np
import pytest

from jaxml import lm
from jaxml.prompts.store import Store
from jaxml.testing import tiny_model
from jaxml.tune import data, r_tuning
from jaxml.tune.r_tuning import PLAIN, SURE, Answered, Form, Item, Labels, Recipe, ask, examples, judge, labels

# The tiny tokenizer has one token a character, and few capitals.
SMALL = Form(scale=r_tuning.Scale("sure?", ("i am sure.", "i am unsure."), (1.0, 0.0)))
WHO = [
    Item(f"who is {name}?", (answer,)) for name, answer in (("ann", "a cat"), ("bob", "b"), ("cy", "c"), ("di", "d"))
]
PICK = Item("which is it?", ("not so",), choices=("so", "not so", "maybe"))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def answered(model) -> Answered:
    return r_tuning.answer(model, [*WHO, PICK], SMALL, max_new_tokens=4)


# ---- judging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said, item, is_right",
    [
        ("PARIS", Item("?", ("Paris",)), True),  # whatever the case
        ("It is Paris, of course.", Item("?", ("Paris",)), True),
        ("Parisian", Item("?", ("Paris",)), False),  # whole words
        ("", Item("?", ("Paris",)), False),
        ("São Paulo", Item("?", ("Rio", "Sao Paulo")), True),  # any of the answers
        ("12", Item("?", ("1",)), False),
        ("1,200.0 of them", Item("?", ("1200",)), True),
        ("0.75", Item("?", ("3/4",)), True),
        ("25 %", Item("?", ("25%",)), False),
        ("25%", Item("?", ("25%",)), True),
        ("not_supported", Item("?", ("supported",), choices=("supported", "not_supported")), False),
        ("The claim is not supported", Item("?", ("supported",), choices=("supported", "not supported")), False),
        ("The claim is not supported", Item("?", ("not supported",), choices=("supported", "not supported")), True),
        ("so or maybe", PICK, False),
        ("anything", Item("?"), False),  # nothing is right
        ("<", Item("?", ("<",), choices=(">", "<", "=")), True),  # choices as they are
        ("<", Item("?", (">",), choices=(">", "<", "=")), False),
        ("C#", Item("?", ("C#",), choices=("C", "C#")), True),
        ("5%", Item("?", ("5",), choices=("5%", "5")), False),
        ("−5", Item("?", ("-5",)), True),
        ("5", Item("?", ("−5",)), False),
        ("-$5", Item("?", ("-5",)), True),
        (".5", Item("?", ("0.5",)), True),
        (".5", Item("?", ("5",)), False),
        ("1e6", Item("?", ("1000000",)), True),
        ("3,5", Item("?", ("35",)), False),
        ("2", Item("?", ("24/12",)), False),  # which may be a date
        ("the 1990s", Item("?", ("1990",)), False),
        ("1,200", Item("?", ("1200", "one thousand two hundred")), True),
        ("I do not know who did it.", Item("?", ("The Who",)), False),
        ("the who", Item("?", ("The Who",)), True),
        ("C#", Item("?", ("C",)), False),
        ("カ", Item("?", ("ガ",)), False),
        ("10²", Item("?", ("102",)), False),
        ("東京です", Item("?", ("東京",)), True),
        ("Lodz, in the U.S.A.", Item("?", ("Łódź",)), True),
        ("Lodz, in the U.S.A.", Item("?", ("USA",)), True),
        ("@", Item("?", ("@",)), True),
    ],
)
def test_right_is_by_words_values_and_labels(said, item, is_right):
    assert judge.right(said, item) is is_right


# ---- asking -----------------------------------------------------------------------------------------


def test_certainty_is_the_whole_likelihood_of_the_phrases(model, answered):
    prompts = [f"{PLAIN.prompt(item)} {text}\nsure?\n" for item, text in zip(WHO, answered.texts)]
    each = np.stack([lm.score(model, prompts, [phrase] * 4) for phrase in SMALL.scale.phrases], 1)
    p = np.exp(each[:, 0]) / np.exp(each).sum(1)
    np.testing.assert_allclose(answered.sure[:4], p, rtol=1e-3)
    first = SMALL.scale.phrases[0][:6]  # "i am s" against "i am u": one token's worth, which is another number
    part = np.stack([lm.score(model, prompts, [t] * 4) for t in (first, "i am u")], 1)
    assert np.abs(np.exp(part[:, 0]) / np.exp(part).sum(1) - p).max() > 0.01


def test_confidence_is_the_geometric_mean_of_the_answer_s_tokens(model, answered):
    for item, text, confidence in zip(WHO, answered.texts, answered.confidence):
        said = " " + text
        wanted = np.exp(lm.score(model, [PLAIN.prompt(item)], [said])[0] / len(model.tokenizer.encode(said)))
        assert confidence == pytest.approx(wanted, rel=1e-3)


def test_an_answer_without_a_full_stop_keeps_its_last_letter(model):
    [text] = ask.texts_of(model, WHO[:1], SMALL, max_new_tokens=4)
    [whole] = lm.generate(model, [SMALL.prompt(WHO[0])], max_new_tokens=4)
    assert "\n" not in whole and "." not in whole and text == whole.strip()


def test_an_empty_answer_has_no_confidence_and_breaks_nothing(model):
    for form in (SMALL, dataclasses.replace(SMALL, refusals=("no.", "i do not know."))):
        found = ask.certainty(model, WHO[:2], ["", "b"], form)
        assert found.confidence[0] == 0 and np.isfinite(found.sure).all() and found.right.tolist() == [False, True]


def test_choices_are_chosen_by_their_letters_and_judged_by_their_text(model, answered):
    prompt = SMALL.prompt(PICK)
    assert prompt.endswith("A. so\nB. not so\nC. maybe\nAnswer:")
    scores = np.array([lm.score(model, [prompt], [f" {letter}"])[0] for letter in "ABC"])
    best = int(np.argmax(scores))
    assert answered.texts[4] == PICK.choices[best] and answered.right[4] == (best == 1)
    assert answered.confidence[4] == pytest.approx(np.exp(scores[best]) / np.exp(scores).sum(), rel=1e-3)
    drawn = r_tuning.Asker().samples(model, [PICK], SMALL, 50, temperature=1.0)[0]
    assert set(drawn) <= set(PICK.choices)


def test_a_batch_answers_as_one_question_at_a_time(model, answered):
    alone = ask.join([r_tuning.answer(model, [item], SMALL, max_new_tokens=4) for item in [*WHO, PICK]])
    assert alone.texts == answered.texts
    np.testing.assert_allclose(alone.sure, answered.sure, rtol=1e-3)
    np.testing.assert_allclose(alone.confidence, answered.confidence, rtol=1e-3)


def test_refusals_take_their_likelihood_from_certainty(model):
    form = dataclasses.replace(SMALL, refusals=("no.", "i do not know."))
    found = ask.certainty(model, WHO[:1], ["b"], form)
    logs = [lm.score(model, [form.prompt(WHO[0])], [f" {refusal}\n"])[0] for refusal in form.refusals]
    assert found.sure[0] == pytest.approx(1 - np.exp(logs).sum(), abs=1e-6)


def test_certainty_that_is_not_asked_for_is_the_answer_s_own_probability(model, answered):
    form = dataclasses.replace(SMALL, scale=None)
    found = ask.certainty(model, [*WHO, PICK], answered.texts, form)
    np.testing.assert_allclose(found.confidence, answered.confidence, rtol=1e-3)
    np.testing.assert_array_equal(found.sure, found.confidence)
    assert ask.certainty(model, WHO[:1], [""], form).sure.tolist() == [0]


def test_what_was_answered_is_not_asked_again(model, answered, tmp_path):
    with Store(tmp_path / "answers.jsonl") as store:
        first = r_tuning.Asker(4, store=store).answer(model, [*WHO, PICK], SMALL)
    told = []
    with Store(tmp_path / "answers.jsonl") as store:
        again = r_tuning.Asker(4, store=store, tick=told.append).answer(model, WHO, SMALL)
        assert len(store) == 5
    assert told == [4] and again.texts == first.texts[:4] == answered.texts[:4]
    np.testing.assert_array_equal(again.sure, first.sure[:4])


def test_a_refusal_in_words_is_no_answer_whatever_the_threshold(model):
    form = dataclasses.replace(SMALL, refusals=("no.", "i do not know."))
    found = ask.certainty(model, WHO[:2], ["I do not know", "b"], form)
    assert found.confidence[0] == found.sure[0] == 0 < found.confidence[1]
    for threshold in (-np.inf, 0.0):
        assert r_tuning.Policy(0.5, threshold).willing(found).tolist() == [False, True]


def test_a_question_without_room_for_its_answer_is_named_before_any_is_asked(model):
    long = Item("who " + "is it " * 60 + "?", ("ann",))
    with pytest.raises(ValueError, match=r"'who is it is it .* Leave it out"):
        r_tuning.answer(model, [*WHO, long], SMALL)


def test_another_scale_is_another_question(model, tmp_path):
    other = dataclasses.replace(SMALL, scale=dataclasses.replace(SMALL.scale, values=(0.0, 1.0)))
    with Store(tmp_path / "answers.jsonl") as store:
        asker = r_tuning.Asker(4, store=store)
        a, b = asker.answer(model, WHO[:1], SMALL), asker.answer(model, WHO[:1], other)
    assert a.sure[0] + b.sure[0] == pytest.approx(1)


def test_questions_are_taken_by_numbers_or_by_a_mask(answered):
    mask = np.array([False, True, True, False, False])
    assert answered.take(mask).texts == answered.take([1, 2]).texts == answered.texts[1:3]


# ---- labels -----------------------------------------------------------------------------------------

SAMPLES = [["Paris"] * 4, ["Rome", "It is Rome.", "rome", "Oslo"], ["1", "2", "3", "4"], ["x", "x", "x", "x"]]
ASKED = [Item("a?", ("Paris",)), Item("b?", ("Rome",)), Item("c?", ("1",)), Item("d?", ("Bern",))]


def test_published_labels_are_right_answers():
    of = Answered(["Paris", "Oslo"], np.array([True, False]), np.ones(2), np.ones(2))
    assert labels.correct(of).sure.tolist() == [1, 0]


def test_every_question_is_labelled_by_the_agreement_of_its_samples():
    made = labels.consistent(SAMPLES, ASKED)
    assert made.sure.tolist() == [1, 0, 0, 1] and made.keep.all()  # the certain are sure, though one of them is wrong
    assert labels.entropy(SAMPLES[2]) == pytest.approx(np.log(4)) and labels.entropy(SAMPLES[0]) == 0
    assert labels.clusters(SAMPLES[1]) == [0, 0, 0, 1]
    two = [Item("?", ("so",), choices=("so", "not so"))]
    assert labels.consistent([["so", "not so"], ["so", "so"]], two * 2).sure.tolist() == [0, 1]  # of one in another
    with pytest.raises(ValueError, match="share is in"):
        labels.consistent(SAMPLES, ASKED, share=1)


def test_answers_of_one_meaning_are_one_cluster():
    vectors = {"a car": [1.0, 0.0], "an automobile": [0.9, 0.435], "a tree": [0.0, 1.0]}
    same = labels.by_meaning(lambda texts: np.array([vectors[t] for t in texts]))
    assert same(["a car", "an automobile", "a tree", "a car"]) == [0, 0, 1, 0]


def test_graded_labels_are_the_share_of_right_samples():
    assert labels.expected(SAMPLES, ASKED).sure.tolist() == [1, 0.75, 0.25, 0]


def test_craft_leaves_out_the_middle_and_what_rehearsal_puts_right():
    after = [SAMPLES[0], SAMPLES[1], ["1", "1", "1", "2"], SAMPLES[3]]
    made = labels.craft(SAMPLES, after, ASKED, drop=0.0)
    assert made.sure.tolist() == [1, 1, 0, 0] and made.keep.tolist() == [True, True, False, True]
    made = labels.craft(SAMPLES, SAMPLES, ASKED, drop=0.5)  # the less certain known, the more certain unknown
    assert made.keep.tolist() == [True, False, True, False]
    assert labels.rehearsal(SAMPLES, ASKED, share=0.5) == [0]


def test_a_fold_is_asked_of_a_model_that_never_saw_it():
    seen = {}

    def tune(model, examples, name):
        seen[name] = {e["parts"][0][0] for e in examples}
        return name

    learn = lambda items: examples.plain(tiny_model().tokenizer, items, SMALL)
    found = {name: part for part, name in labels.cross_fitted(None, WHO, learn, tune)}
    assert sorted(np.concatenate(list(found.values()))) == [0, 1, 2, 3]
    for name, part in found.items():
        assert not seen[name] & {SMALL.prompt(WHO[i]) for i in part} and len(seen[name]) == 4 - len(part)
    with pytest.raises(ValueError, match="folds are in"):
        list(labels.cross_fitted(None, WHO, list, tune, folds=5))


# ---- examples ---------------------------------------------------------------------------------------


def said(example) -> list[str]:
    return [text for text, weight in example["parts"] if weight]


def test_the_text_of_unknown_questions_is_chosen(model):
    own = Answered(["z"] * 4, np.zeros(4, bool), np.zeros(4), np.zeros(4))
    half = Labels(np.array([1.0, 0, 0, 0]), np.ones(4, bool))
    make = lambda unknown: examples.make(model.tokenizer, WHO, half, own, SMALL, unknown=unknown)
    assert said(make("gold")[0]) == [" a cat", "\n", "i am sure.", "\n"]
    assert said(make("gold")[1]) == [" b", "\n", "i am unsure.", "\n"]
    assert said(make("own")[1]) == [" z", "\n", "i am unsure.", "\n"]
    assert said(make("heard")[1]) == ["i am unsure.", "\n"] and " z" in [t for t, _ in make("heard")[1]["parts"]]
    assert said(make("refusal")[1])[0].strip() in r_tuning.REFUSALS and len(make("refusal")[1]["parts"]) == 3
    assert said(make("refusal")[0]) == said(make("gold")[0])
    for wrong, message in (("silver", "unknown is one of"), ("own", "own answers are wanted")):
        with pytest.raises(ValueError, match=message):
            examples.make(model.tokenizer, WHO, half, None, SMALL, unknown=wrong)


@pytest.mark.parametrize("unknown", ["gold", "own", "heard", "refusal"])
def test_a_question_that_nothing_answers_teaches_no_answer(model, unknown):
    items = [*WHO[:2], Item("who is zed?")]
    own = Answered(["z"] * 3, np.zeros(3, bool), np.zeros(3), np.zeros(3))
    make = lambda sure, own: examples.make(
        model.tokenizer, items, Labels(np.array([1.0, 0, sure]), np.ones(3, bool)), own, SMALL, unknown=unknown
    )
    last = said(make(0.0, own)[2])
    assert last[0].strip() in r_tuning.REFUSALS if unknown == "refusal" else last == ["i am unsure.", "\n"]
    if unknown == "gold":  # agreeing samples may call it sure
        assert said(make(1.0, own)[2]) == ["i am sure.", "\n"]
        with pytest.raises(ValueError, match="own answers are wanted"):
            make(0.0, None)


def test_phrases_weigh_the_same_together_however_often_they_come(model):
    made = examples.make(model.tokenizer, WHO, Labels(np.array([1.0, 0, 0, 0]), np.ones(4, bool)), None, SMALL)
    weight = lambda phrase: sum(w for e in made for t, w in e["parts"] if t == phrase)
    assert weight("i am sure.") == pytest.approx(weight("i am unsure.")) == pytest.approx(2)
    even = examples.make(
        model.tokenizer, WHO, Labels(np.array([1.0, 0, 0, 0]), np.ones(4, bool)), None, SMALL, balance=False
    )
    assert {w for e in even for _, w in e["parts"]} == {0.0, 1.0}


def test_what_is_left_out_is_not_trained_and_degrees_choose_the_nearest_phrase(model):
    form = dataclasses.replace(SMALL, scale=r_tuning.NUMBERS)
    made = examples.make(
        model.tokenizer, WHO, Labels(np.array([1.0, 0.72, 0.0, 0.3]), np.array([True, True, False, True])), None, form
    )
    assert [said(e)[2] for e in made] == ["100%.", "80%.", "20%."]
    with pytest.raises(ValueError, match="keep at least one"):
        examples.make(model.tokenizer, WHO, Labels(np.ones(4), np.zeros(4, bool)), None, form)


def test_weights_of_parts_are_those_of_the_loss(model):
    made = {"parts": [["ab", 0.0], ["c", 0.5], ["d", 2.0]]}
    tokens, learn = data.encode(made, model.tokenizer)
    assert tokens == model.tokenizer.encode("abcd", bos=True) and learn == [*[0.0] * (len(tokens) - 2), 0.5, 2.0]
    row = data.pack([data.encode(made, model.tokenizer)], 8)
    assert row.weights.sum() == 2.5
    assert data.encode(made, model.tokenizer, learn_all=True).learn[-1] == 2.0
    for wrong in ([], [["a", 0.0]], [["a", -1.0]], [["a"]], "ab", [["a", float("nan")]]):
        with pytest.raises(ValueError, match="parts"):
            data.check({"parts": wrong})


def test_a_text_that_does_not_answer_is_refused_in_two_stages(model):
    items = [Item(f"who is {n}?", (n,), context=f"this is {n}.") for n in ("ann", "bob")]
    items.append(Item("who is cy?", (), context="this is di."))
    first, second = examples.two_stages(model.tokenizer, items, SMALL)
    assert len(first) == len(second) == 5
    for whether, then in zip(first, second):
        asked, answer = whether["parts"][0][0], said(then)[0].strip()
        answerable = any(f"is {n}." in asked and f"who is {n}?" in asked for n in ("ann", "bob"))
        assert said(whether)[0].strip() == ("Yes." if answerable else "No.")
        assert (answer in ("ann", "bob")) == answerable and (answer in r_tuning.REFUSALS) != answerable
    both = [
        Item("who is it?", ("ann",), context="it is ann."),
        Item("who was it?", ("bob",), context="it is bob, ann."),
    ]
    assert len(examples.two_stages(model.tokenizer, both, SMALL)[0]) == 3  # the other text answers the first as well
    with pytest.raises(ValueError, match="every question has a context"):
        examples.two_stages(model.tokenizer, WHO, SMALL)
    with pytest.raises(ValueError, match="two different contexts"):
        examples.two_stages(model.tokenizer, items[:1], SMALL)


def test_a_chat_is_trained_as_it_is_asked():
    model = tiny_model()
    form = dataclasses.replace(SMALL, chat=True)
    [example] = examples.make(model.tokenizer, WHO[:1], Labels(np.ones(1), np.ones(1, bool)), None, form)
    text = "".join(t for t, _ in example["parts"])
    assert text == "<user>who is ann?</s><assistant>a cat</s><user>sure?</s><assistant>i am sure.</s>"
    twice = {"parts": [["<s>ab", 0.0], ["c", 1.0]]}  # a template that writes the token for the beginning
    assert (
        data.encode(twice, dataclasses.replace(model.tokenizer, add_bos=True)).tokens.count(model.tokenizer.bos_id) == 1
    )
    assert said(example) == ["a cat", "</s>", "i am sure.", "</s>"]


# ---- questions --------------------------------------------------------------------------------------


def test_questions_are_read_and_written(tmp_path):
    items = [
        Item("1+1?", ("2", "two")), Item("which?", ("b",), choices=("a", "b"), group="g"),
        Item("who?", (), context="nobody is said."),
    ]  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(r_tuning.items.row(item)) for item in items) + "\n\n")
    assert r_tuning.read(path) == items


@pytest.mark.parametrize(
    "line, message",
    [
        ("[1]", "is an object"), ("{", "not JSON"), ('{"question": "a"}', "answers unless answerable"),
        ('{"question": "", "answer": "b"}', "not empty"), ('{"question": "a", "answer": ""}', "not empty"),
        ('{"question": "a", "answer": "b", "anwsers": []}', "anwsers"), ('{"answer": "b"}', "question is a text"),
        ('{"question": "a", "answers": "b"}', "list of texts"), ('{"question": "a", "answer": 3}', "list of texts"),
        ('{"question": "a", "answer": "b", "answers": ["b"]}', "got both"),
        ('{"question": "a", "answer": "b", "choices": ["c"]}', "among the choices"),
        ('{"question": "a", "answer": "b", "answerable": false}', "answers unless"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*({message})"):
        r_tuning.read(path)


def test_no_question_stands_in_two_parts_and_new_kinds_are_never_trained_on():
    items = r_tuning.countries()
    split = r_tuning.split(items + items, new_groups=r_tuning.sources.NEW, unanswerable=r_tuning.invented(10), seed=3)
    parts = [split.shots, split.train, split.calibration, split.seen, split.new, split.unanswerable]
    assert [len(p) for p in parts] == [4, 400, 150, 200, 200, 10]
    questions = [item.question for part in parts for item in part]
    assert len(set(questions)) == len(questions)
    assert {i.group for i in split.new} <= set(r_tuning.sources.NEW)
    assert not {i.group for p in parts[:4] for i in p} & set(r_tuning.sources.NEW)
    taught = r_tuning.invented(50, part="train")
    more = r_tuning.split(items, new_groups=r_tuning.sources.NEW, train_unanswerable=taught, seed=3).train
    assert len(more) == 450 and {i for i in more if not i.answerable} == set(taught)
    assert any(not i.answerable for i in more[:100]) and any(i.answerable for i in more[-50:])
    small = r_tuning.split(items[:60], new_groups=0.0, shots=0)
    assert len(small.train) == 32 and len(small.calibration) == 12 and len(small.seen) == 16
    for wrong in (dict(new_groups=["anthem"]), dict(new_groups=1.0)):
        with pytest.raises(ValueError, match="groups"):
            r_tuning.split(items, **wrong)
    with pytest.raises(ValueError, match="at least 20"):
        r_tuning.split(items[:10])
    with pytest.raises(ValueError, match="at least one question to train on"):
        r_tuning.split(items[:24], train=200, calibration=4, test=40, new_groups=0.0)
    with pytest.raises(ValueError, match="unanswerable are questions without"):
        r_tuning.split(items, unanswerable=items[:1])
    twice = [Item(f"{i}?", ("a",)) for i in range(30)] + [Item("0?", ("b",))]
    [one] = [i for p in vars(r_tuning.split(twice)).values() for i in p if i.question == "0?"]
    assert one.answers == ("a", "b")
    none = r_tuning.invented(3)
    again = r_tuning.split(items, unanswerable=none, train_unanswerable=none[:1])
    assert set(again.unanswerable) == set(none[1:])


def test_countries_are_those_of_the_package():
    found = {(i.group, i.question): i.answers for i in r_tuning.countries()}
    assert found["capital", "What is the capital of France?"] == ("Paris",)
    assert found["capital of", "Paris is the capital of which country?"] == ("France",)
    assert found["currency", "What is the currency code of Croatia?"] == ("EUR",)  # no longer what the package says
    assert "Spain" in found["neighbour", "Which country borders France?"]
    assert "North America" in found["continent", "On which continent is Cuba?"]
    names = {}
    for part in ("test", "train"):
        names[part] = {i.question.rstrip("?").split()[-1] for i in r_tuning.invented(200, ["capital"], part=part)}
        assert len(names[part]) == 200 and not any(name in question for name in names[part] for _, question in found)
    assert not names["test"] & names["train"]


def test_triples_become_questions(tmp_path):
    folder = tmp_path / "data" / "trex_lms_vocab"
    folder.mkdir(parents=True)
    rows = [{"sub_label": "Oslo", "obj_label": "Norway"}, {"sub_label": "Oslo", "obj_label": "Scandinavia"}]
    (folder / "P17.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert r_tuning.pararel(tmp_path) == [Item("In which country is Oslo?", ("Norway", "Scandinavia"), group="P17")]
    (folder / "P17.jsonl").write_text('{"sub_label": "Oslo"}')
    with pytest.raises(ValueError, match=r"P17\.jsonl, line 1"):
        r_tuning.pararel(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of ParaRel"):
        r_tuning.pararel(tmp_path / "data" / "none")


# ---- the whole --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("variant", r_tuning.job.VARIANTS)
def test_every_variant_trains_on_every_question(model, variant, fresh):
    items = [dataclasses.replace(item, context=f"text {i}.") for i, item in enumerate(WHO)]
    trained = {}

    def tune(model, examples, name):
        trained[name] = examples
        return model

    quick = r_tuning.Asker(max_new_tokens=2)
    made = r_tuning.r_tune(model, items, tune, Recipe(variant, fresh=fresh, samples=2), form=SMALL, asker=quick)
    if variant == "grounded":
        assert list(trained) == ["stage-0", "stage-1"] and len(trained["stage-1"]) == 8 and made.labels is None
        return
    assert ("fold-1" in trained) == fresh
    assert len(trained["r-tuned"]) == made.labels.keep.sum() >= (4 if variant != "craft" else 1)
    if variant == "unsupervised":
        assert made.labels.sure.sum() == 2  # half are sure, half unsure
    for example in trained["r-tuned"]:
        data.check(example)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="variant is one of"):
        Recipe("loud")
    for wrong in (dict(unknown="silver"), dict(unknown="refusal"), dict(variant="refusal", unknown="own"),
                  dict(folds=1), dict(samples=0), dict(temperature=0.0), dict(weight=-1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="Recipe: "):
            Recipe(**wrong)
    with pytest.raises(ValueError, match="are tuples of texts"):
        Item("who?", "ann")
    with pytest.raises(ValueError, match="Scale: "):
        r_tuning.Scale("?", ("yes", "yes"), (1.0, 0.0))
    with pytest.raises(ValueError, match="a list, got a single string"):
        r_tuning.answer_or_refuse(None, "who?", 0.5)
    assert SURE.phrase(0.5) == "I am sure." and SURE.phrase(0.49) == "I am unsure."


def test_a_form_without_a_scale_is_for_refusals_alone():
    items = [Item("1+1?", ("2",)), Item("2+2?", ("4",))]
    given, form = Labels(np.array([1.0, 0.0]), np.ones(2, bool)), Form(scale=None, refusals=("I do not know.",))
    tokenizer = tiny_model().tokenizer
    made = examples.make(tokenizer, items, given, form=form, unknown="refusal")
    assert [[text for text, weight in example["parts"] if weight] for example in made] == [
        [" 2", "\n"], [" I do not know.", "\n"]
    ]  # fmt: skip
    with pytest.raises(ValueError, match="the form asks for certainty by a scale"):
        examples.make(tokenizer, items, given, form=form)


def test_what_trains_is_a_function():
    from jaxml import tune

    with pytest.raises(TypeError, match="tune is a function"):
        r_tuning.r_tune(tiny_model(), [Item("1+1?", ("2",))] * 4, tune)
