"""What a model answers, how likely that is, and how sure it says it is."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxml import paths
from jaxml.lm import tree
from jaxml.lm.decoder import num_places
from jaxml.lm.generate import encode_prompt, generate
from jaxml.lm.model import Model
from jaxml.lm.sampling import Sampling
from jaxml.lm.score import score_trees, sums
from jaxml.prompts.choices import normalised
from jaxml.prompts.llm import fingerprint
from jaxml.prompts.store import Store
from jaxml.quant import QArray
from jaxml.tune import adapters
from jaxml.tune.facts import normalise
from jaxml.tune.r_tuning import judge
from jaxml.tune.r_tuning.form import PLAIN, Form, letters, said_as
from jaxml.tune.r_tuning.items import Item

Tick = Callable[[int], None]  # told how many more questions were dealt with


class Answered(NamedTuple):
    """A model's answers to n questions.

    Example:
        >>> answered = Answered(["Paris", "Rome"], np.array([True, False]), np.array([0.9, 0.4]), np.array([0.8, 0.2]))
        >>> answered.take([0]).texts
        ['Paris']
    """

    texts: list[str]  # n
    right: np.ndarray  # [n] bool
    confidence: np.ndarray  # [n] float64: geometric mean of the answer's tokens' probabilities, or a choice's own
    # [n] float64: the certainty said, Σ value · p(phrase) over the scale; or 1 − p(a refusal); the confidence where it
    # is not asked for.
    sure: np.ndarray

    def take(self, which: Sequence[int] | np.ndarray) -> "Answered":
        """These questions' part: their numbers, or [n] bool."""
        which = np.asarray(which)
        which = np.flatnonzero(which) if which.dtype == bool else which.astype(int)
        return Answered([self.texts[i] for i in which], *(a[which] for a in self[1:]))


def join(parts: Sequence[Answered]) -> Answered:
    """Answers to questions that were asked in parts.

    Example:
        >>> one = Answered(["Rome"], np.array([True]), np.array([0.9]), np.array([0.8]))
        >>> other = Answered(["Oslo"], np.array([False]), np.array([0.4]), np.array([0.3]))
        >>> join([one, other]).texts, join([one, other]).confidence.tolist()
        (['Rome', 'Oslo'], [0.9, 0.4])
    """
    return Answered(
        [t for part in parts for t in part.texts], *(np.concatenate([p[i] for p in parts]) for i in range(1, 4))
    )


@dataclasses.dataclass(frozen=True)
class Asker:
    """How questions are put before models.

    Args:
        max_new_tokens: of an answer; the line or the turn ends it before.
        batch_size: answers in a batch.
        store: keeps what was answered, that no model is asked the same twice.
        tick: told how many more questions were dealt with.

    Example:
        >>> from jaxml import testing
        >>> found = Asker(max_new_tokens=3).answer(testing.tiny_model(), [Item("who?", ("me",))], PLAIN)
        >>> len(found.texts), found.right.shape
        (1, (1,))
    """

    max_new_tokens: int = 15
    batch_size: int = 64
    store: Store | None = None
    tick: Tick | None = None

    def answer(self, model: Model, items: Sequence[Item], form: Form = PLAIN) -> Answered:
        """Asks every question once, greedily; of choices, takes the likeliest.

        One forward pass then reads question and answer, and after them every phrase of the form's scale: certainty is
        told by the whole likelihood of the phrases.
        """
        model = merged(model)
        asked = {"asked": [form.scale and [form.scale.question, form.scale.values], *form.asked]}

        def work(part: list[Item]) -> list:
            texts = texts_of(model, part, form, max_new_tokens=self.max_new_tokens)
            _, _, confidence, sure = certainty(model, part, texts, form)
            return [list(row) for row in zip(texts, map(float, confidence), map(float, sure))]

        rows = self._each(model, items, form, asked, lambda numbers: work([items[i] for i in numbers]), self.batch_size)
        texts, confidence, sure = zip(*rows) if rows else ((), (), ())
        right = [judge.right(text, item) for text, item in zip(texts, items)]
        return Answered(list(texts), np.array(right, bool), np.array(confidence, float), np.array(sure, float))

    def samples(
        self,
        model: Model,
        items: Sequence[Item],
        form: Form = PLAIN,
        count: int = 5,
        *,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> list[list[str]]:
        """`count` answers to each question, drawn at a temperature.

        Returns:
            [n][count] texts; of a question with choices, choices drawn by their probabilities.
        """
        model = merged(model)

        def work(numbers: list[int]) -> list:
            key, part, out = seed_of(seed, numbers[0]), [items[i] for i in numbers], [[] for _ in numbers]
            chosen, open_ = _kinds(part)
            rng = np.random.default_rng(key)
            for i, nodes in zip(chosen, score_trees(model, [_choices(model, part[i], form) for i in chosen])):
                p = np.exp(normalised(sums(nodes) / temperature))
                out[i] = [part[i].choices[j] for j in rng.choice(len(p), count, p=p / p.sum())]
            if open_:
                texts = generate(
                    model, [form.prompt(part[i]) for i in open_ for _ in range(count)], stop=form.stop, key=key,
                    max_new_tokens=self.max_new_tokens, sampling=Sampling(temperature=temperature),
                )  # fmt: skip
                for n, i in enumerate(open_):
                    out[i] = [text.strip() for text in texts[n * count : (n + 1) * count]]
            return out

        drawn = {"drawn": count, "temperature": temperature, "seed": seed}
        return self._each(model, items, form, drawn, work, max(1, self.batch_size // count))

    def _fit(self, model: Model, items: Sequence[Item], form: Form) -> None:
        """Refuses a question that leaves no room for its answer, before any is asked."""
        phrases = max((len(model.tokenizer.encode(phrase)) for phrase in form.asked), default=0)
        asked = len(model.tokenizer.encode(form.scale.question)) + 8 if form.scale else 8  # and what ends a turn
        room = model.config.max_length - self.max_new_tokens - phrases - asked - num_places(model.params)
        for item in items:
            if (length := len(encode_prompt(model, form.prompt(item)))) > room:
                raise ValueError(
                    f"Asker: a question has at most {room} tokens, so that its answer fits the context of "
                    f"{model.config.max_length}; {item.question[:60]!r} has {length}. Leave it out, or show fewer "
                    "examples."
                )

    def _each(self, model: Model, items: Sequence[Item], form: Form, asked: dict, work: Callable, size: int) -> list:
        """What `work` says to each question, in batches; what the store has is not worked on."""
        keys, found = [], [None] * len(items)
        if self.store is not None:
            asked = {"model": fingerprint(model), "limit": self.max_new_tokens, **asked}
            keys = [asked | {"prompt": form.prompt(item), "choices": item.choices} for item in items]
            found = [self.store.get(key) for key in keys]
        self._fit(model, [item for item, one in zip(items, found) if one is None], form)
        missing = [i for i, one in enumerate(found) if one is None]
        if self.tick and len(items) > len(missing):
            self.tick(len(items) - len(missing))
        for first in range(0, len(missing), size):
            part = missing[first : first + size]
            for i, one in zip(part, work(part), strict=True):
                found[i] = one
                if keys:
                    self.store.put(keys[i], one)
            if self.tick:
                self.tick(len(part))
        return found


PLAINLY = Asker()


def answer(model: Model, items: Sequence[Item], form: Form = PLAIN, **options) -> Answered:
    """`Asker.answer`, with options of `Asker`.

    Example:
        >>> from jaxml import testing
        >>> answered = answer(testing.tiny_model(), [Item("who?", ("me",))], max_new_tokens=3)
        >>> answered.right.shape, bool(0 <= answered.sure[0] <= 1)
        ((1,), True)
    """
    return Asker(**options).answer(model, items, form)


def merged(model: Model) -> Model:
    """The model to ask: LoRA and its kin merged into weights that are arrays, which is faster.

    Example:
        >>> import jax
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> tuned = model.replace(params=adapters.attach(model.params, jax.random.key(0), rank=2, targets=["q"]))
        >>> adapters.has_adapters(tuned.params), adapters.has_adapters(merged(tuned).params)
        (True, False)
    """
    bare = paths.named(adapters.detach(model.params)).values()
    if "prefix" in model.params or any(isinstance(w, QArray) for w in bare):
        return model
    return model.replace(params=adapters.merge(model.params))


def texts_of(model: Model, items: Sequence[Item], form: Form, *, max_new_tokens: int = 15) -> list[str]:
    """The greedy answer to each question; the likeliest choice, where there are choices.

    Example:
        >>> from jaxml import testing
        >>> texts_of(testing.tiny_model(), [Item("is it?", ("no",), choices=("no", "yes"))], PLAIN)
        ['no']
    """
    texts = [""] * len(items)
    chosen, open_ = _kinds(items)
    if open_:
        prompts = [form.prompt(items[i]) for i in open_]
        for i, text in zip(open_, generate(model, prompts, max_new_tokens=max_new_tokens, stop=form.stop)):
            texts[i] = text.strip()
    if chosen:
        trees = [_choices(model, items[i], form) for i in chosen]
        for i, nodes in zip(chosen, score_trees(model, trees)):
            texts[i] = items[i].choices[int(np.argmax(sums(nodes)))]
    return texts


def seed_of(seed: int, number: int) -> int:
    """A seed of its own for each part of a job.

    Example:
        >>> [seed_of(0, number) for number in range(2)]
        [1484405855, 1982462498]
    """
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
        texts: an answer to each question; of one with choices, a choice. An empty one and one of the form's refusals
            have no confidence and no certainty.

    Example:
        >>> from jaxml import testing
        >>> found = certainty(testing.tiny_model(), [Item("who?", ("me",))], ["me"], PLAIN)
        >>> found.right.tolist(), found.sure.shape
        ([True], (1,))
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
    refusals = {normalise(refusal) for refusal in form.refusals}
    nothing = np.array([not text or normalise(text) in refusals for text in texts], bool)
    right = [judge.right(text, item) for text, item in zip(texts, items)]
    return Answered(list(texts), np.array(right, bool), np.where(nothing, 0, confidence), np.where(nothing, 0, sure))


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


def _kinds(items: Sequence[Item]) -> tuple[list[int], list[int]]:
    """Numbers of the questions with choices, and of the others."""
    chosen = [i for i, item in enumerate(items) if item.choices]
    return chosen, [i for i, item in enumerate(items) if not item.choices]


def _choices(model: Model, item: Item, form: Form) -> tree.Node:
    follow = [form.parts(model.tokenizer, item, letter)[0] for letter in letters(item)]
    nodes = [tree.Node(model.tokenizer.encode(text), scored=True) for text in follow]
    return tree.Node(encode_prompt(model, form.prompt(item)), nodes)
