"""What a model answers, how likely that is, and how sure it says it is."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxml.lm import tree
from jaxml.lm.generate import encode_prompt, generate
from jaxml.lm.model import Model
from jaxml.lm.sampling import Sampling
from jaxml.lm.score import score_trees, sums
from jaxml.prompts.choices import normalised
from jaxml.prompts.llm import fingerprint
from jaxml.prompts.store import Store
from jaxml.tune.r_tuning import judge
from jaxml.tune.r_tuning.form import PLAIN, Form, letters, said_as
from jaxml.tune.r_tuning.items import Item

Tick = Callable[[int], None]  # told how many more questions were dealt with


class Answered(NamedTuple):
    """A model's answers to n questions."""

    texts: list[str]  # n
    right: np.ndarray  # [n] bool
    confidence: np.ndarray  # [n] float64: geometric mean of the answer's tokens' probabilities, or a choice's own
    # [n] float64: the certainty said, Σ value · p(phrase) over the scale; or 1 − p(a refusal); the confidence where it
    # is not asked for.
    sure: np.ndarray

    def take(self, which: Sequence[int] | np.ndarray) -> "Answered":
        """These questions' part."""
        which = np.asarray(which, int)
        return Answered([self.texts[i] for i in which], *(a[which] for a in self[1:]))


def join(parts: Sequence[Answered]) -> Answered:
    """Answers to questions that were asked in parts."""
    return Answered(
        [t for part in parts for t in part.texts], *(np.concatenate([p[i] for p in parts]) for i in range(1, 4))
    )


def answer(
    model: Model,
    items: Sequence[Item],
    form: Form = PLAIN,
    *,
    max_new_tokens: int = 15,
    batch_size: int = 64,
    tick: Tick | None = None,
) -> Answered:
    """Asks every question once, greedily; of choices, takes the likeliest.

    One forward pass then reads question and answer, and after them every phrase of the form's scale: certainty is told
    by the whole likelihood of the phrases.

    Args:
        max_new_tokens: of an answer; the line or the turn ends it before.
        batch_size: questions in a batch.

    Example:
        >>> from jaxml import testing
        >>> answered = answer(testing.tiny_model(), [Item("who?", ("me",))], max_new_tokens=3)
        >>> answered.right.shape, bool(0 <= answered.sure[0] <= 1)
        ((1,), True)
    """
    parts = []
    for first in range(0, len(items), batch_size):
        part = list(items[first : first + batch_size])
        texts = texts_of(model, part, form, max_new_tokens=max_new_tokens)
        parts.append(certainty(model, part, texts, form))
        if tick:
            tick(len(part))
    return join(parts) if parts else Answered([], np.zeros(0, bool), np.zeros(0), np.zeros(0))


def texts_of(model: Model, items: Sequence[Item], form: Form, *, max_new_tokens: int = 15) -> list[str]:
    """The greedy answer to each question; the likeliest choice, where there are choices."""
    texts = [""] * len(items)
    chosen = [i for i, item in enumerate(items) if item.choices]
    open_ = [i for i, item in enumerate(items) if not item.choices]
    if open_:
        prompts = [form.prompt(items[i]) for i in open_]
        for i, text in zip(open_, generate(model, prompts, max_new_tokens=max_new_tokens, stop=form.stop)):
            texts[i] = text.strip()
    if chosen:
        trees = [_choices(model, items[i], form) for i in chosen]
        for i, nodes in zip(chosen, score_trees(model, trees)):
            texts[i] = items[i].choices[int(np.argmax(sums(nodes)))]
    return texts


def samples(
    model: Model,
    items: Sequence[Item],
    form: Form = PLAIN,
    count: int = 5,
    *,
    temperature: float = 0.7,
    max_new_tokens: int = 15,
    batch_size: int = 64,
    seed: int = 0,
    tick: Tick | None = None,
) -> list[list[str]]:
    """`count` answers to each question, drawn at a temperature.

    Returns:
        [n][count] texts; of a question with choices, choices drawn by their probabilities.
    """
    rng, out = np.random.default_rng(seed), [[] for _ in items]
    chosen = [i for i, item in enumerate(items) if item.choices]
    for i, nodes in zip(chosen, score_trees(model, [_choices(model, items[i], form) for i in chosen])):
        p = np.exp(normalised(sums(nodes) / temperature))
        out[i] = [items[i].choices[j] for j in rng.choice(len(p), count, p=p / p.sum())]
    open_ = [i for i, item in enumerate(items) if not item.choices]
    at_once = max(1, batch_size // count)
    for first in range(0, len(open_), at_once):
        part = open_[first : first + at_once]
        prompts = [form.prompt(items[i]) for i in part for _ in range(count)]
        texts = generate(
            model, prompts, max_new_tokens=max_new_tokens, stop=form.stop, key=hash_of(seed, first),
            sampling=Sampling(temperature=temperature),
        )  # fmt: skip
        for n, i in enumerate(part):
            out[i] = [text.strip() for text in texts[n * count : (n + 1) * count]]
        if tick:
            tick(len(part))
    return out


def keeping(store: Store, *, max_new_tokens: int = 15, batch_size: int = 64, tick: Tick | None = None):
    """`answer` that asks no model the same question twice: what was answered is in the store.

    Returns:
        (model, items, form) → answers.
    """

    def kept(model: Model, items: Sequence[Item], form: Form = PLAIN) -> Answered:
        name = fingerprint(model)
        limits = {"model": name, "limit": max_new_tokens, "asked": [form.scale and form.scale.question, *form.asked]}
        keys = [limits | {"prompt": form.prompt(item), "choices": item.choices} for item in items]
        missing = [i for i, key in enumerate(keys) if store.get(key) is None]
        if tick and len(items) > len(missing):
            tick(len(items) - len(missing))
        for first in range(0, len(missing), batch_size):
            part = missing[first : first + batch_size]
            found = answer(model, [items[i] for i in part], form, max_new_tokens=max_new_tokens, tick=tick)
            for i, text, confidence, sure in zip(part, found.texts, found.confidence, found.sure):
                store.put(keys[i], [text, float(confidence), float(sure)])
        texts, confidence, sure = zip(*map(store.get, keys)) if keys else ((), (), ())
        right = [judge.right(text, item) for text, item in zip(texts, items)]
        return Answered(list(texts), np.array(right, bool), np.array(confidence, float), np.array(sure, float))

    return kept


def hash_of(seed: int, number: int) -> int:
    """A seed of its own for each part of a job."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)


def certainty(
    model: Model,
    items: Sequence[Item],
    texts: Sequence[str],
    form: Form = PLAIN,
    *,
    batch_size: int = 16,
) -> Answered:
    """How likely given answers are, and how sure the model says it is of them.

    Args:
        texts: an answer to each question; of one with choices, a choice. An empty one has the confidence 0.
    """
    trees = [_tree(model, item, text, form) for item, text in zip(items, texts, strict=True)]
    confidence, sure = np.zeros(len(items)), np.zeros(len(items))
    for i, nodes in enumerate(score_trees(model, trees, batch_size=batch_size)):
        after = len(nodes) - len(form.asked)
        said, phrases = nodes[:after], sums(nodes[after:])
        if items[i].choices:
            confidence[i] = np.exp(normalised(sums(said)))[items[i].choices.index(texts[i])]
        elif said:
            confidence[i] = np.exp(said[0].mean(dtype=np.float64))
        if form.refusals:
            sure[i] = 1 - np.exp(phrases).sum()
        else:
            sure[i] = np.exp(normalised(phrases)) @ form.scale.values if form.scale else confidence[i]
    right = [judge.right(text, item) for text, item in zip(texts, items)]
    return Answered(list(texts), np.array(right, bool), confidence, sure)


def _tree(model: Model, item: Item, text: str, form: Form) -> tree.Node:
    """The prompt; after it the answer, scored, and after that the scale; beside the answer the other choices."""
    encode = model.tokenizer.encode
    said = said_as(item, text)
    answer, end, question = form.parts(model.tokenizer, item, said)
    ids = encode(answer) if text else []
    if form.refusals:
        ending = lambda refusal: "".join(form.parts(model.tokenizer, item, refusal)[:2])
        after, beside = [], [tree.Node(encode(ending(refusal)), scored=True) for refusal in form.refusals]
    else:
        phrases = [tree.Node(encode(phrase), scored=True) for phrase in form.asked]
        after, beside = [tree.Node(encode(end) + encode(question), phrases)] if phrases else [], []
    if item.choices:
        root = _choices(model, item, form)
        return tree.Node(root.tokens, [*root.children, tree.Node(ids, after), *beside])
    answered = [tree.Node(ids, after, scored=True)] if ids else after
    return tree.Node(encode_prompt(model, form.prompt(item)), [*answered, *beside])


def _choices(model: Model, item: Item, form: Form) -> tree.Node:
    follow = [form.parts(model.tokenizer, item, letter)[0] for letter in letters(item)]
    nodes = [tree.Node(model.tokenizer.encode(text), scored=True) for text in follow]
    return tree.Node(encode_prompt(model, form.prompt(item)), nodes)
