"""R-Tuning from questions to a model: ask, label, train."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxml.lm.model import Model
from jaxml.tune.r_tuning import ask, examples, labels
from jaxml.tune.r_tuning.ask import PLAINLY, Answered, Asker
from jaxml.tune.r_tuning.form import PLAIN, REFUSALS, Form
from jaxml.tune.r_tuning.items import Item
from jaxml.tune.r_tuning.labels import Labels, Tune

VARIANTS = ("standard", "refusal", "unsupervised", "graded", "craft", "grounded")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is made to say what it does not know.

    Args:
        variant: "standard" (R-Tuning), "refusal" (R-Tuning-R), "unsupervised" (R-Tuning-U), "graded" (Alignment for
            Honesty; with the scales `form.WORDS` or `form.NUMBERS`), "craft", or "grounded" (US-Tuning: two stages, for
            questions over a text).
        fresh: label by models that were tuned on other questions (`labels.cross_fitted`); otherwise by the untuned
            model, as published.
        unknown, known: as in `examples.make`.
        balance: as in `examples.make`.
        weight: of the phrases' tokens in the loss.
        folds: of fresh labels.
        samples, temperature: answers to a question, where labels need several.

    Raises:
        ValueError: an unknown variant or text, numbers out of range, or options that the variant does not take.

    Example:
        >>> Recipe(variant="refusal").refuses
        True
    """

    variant: str = "standard"
    fresh: bool = True
    unknown: str = "gold"
    known: str = "gold"
    balance: bool = True
    weight: float = 1.0
    folds: int = 2
    samples: int = 5
    temperature: float = 0.7

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"Recipe: variant is one of {', '.join(VARIANTS)}, got {self.variant!r}.")
        if self.unknown not in examples.UNKNOWN or self.known not in examples.KNOWN:
            raise ValueError(
                f"Recipe: unknown is one of {', '.join(examples.UNKNOWN)}, and known of {', '.join(examples.KNOWN)}, "
                f"got {self.unknown!r} and {self.known!r}."
            )
        if self.unknown == "refusal" and not self.refuses:
            raise ValueError("Recipe: unknown questions are refused by the variant 'refusal', got unknown 'refusal'.")
        if self.refuses and self.unknown not in ("gold", "refusal"):
            raise ValueError(f"Recipe: the variant {self.variant!r} answers by refusals, got unknown {self.unknown!r}.")
        good = self.folds >= 2 and self.samples >= 1 and self.temperature > 0 and self.weight >= 0
        if not good:
            raise ValueError(
                "Recipe: folds are at least 2, samples at least 1, temperature above 0 and weight at least 0, got "
                f"{self.folds}, {self.samples}, {self.temperature} and {self.weight}."
            )

    def form(self, form: Form = PLAIN) -> Form:
        """The form in which the tuned model is asked."""
        return dataclasses.replace(form, refusals=form.refusals or REFUSALS) if self.refuses else form

    @property
    def refuses(self) -> bool:
        return self.variant in ("refusal", "grounded")

    def check(self, items: Sequence[Item]) -> None:
        """Refuses questions that this recipe cannot be made of, before anything is trained.

        Raises:
            ValueError: as `examples.two_stages` and `labels.cross_fitted` do.
        """
        if self.variant == "grounded":
            examples.check_contexts(items)
        elif self.fresh:
            labels.check_folds(len(items), self.folds)

    @property
    def rounds(self) -> int:
        """How often each training question is asked: once, and once more for each set of samples."""
        return 1 + {"unsupervised": 1, "graded": 1, "craft": 2}.get(self.variant, 0)


PUBLISHED = Recipe(fresh=False, balance=False)


class Made(NamedTuple):
    """A tuned model, and what it was tuned on.

    Example:
        >>> Made._fields
        ('model', 'labels', 'answered', 'stages')
    """

    model: Model
    labels: Labels | None  # None where nothing is labelled ("grounded")
    answered: Answered | None  # what the labels are from
    stages: list[list[dict]]  # training examples


def r_tune(
    model: Model,
    items: Sequence[Item],
    tune: Tune,
    recipe: Recipe = Recipe(),
    *,
    form: Form = PLAIN,
    first: Form | None = None,
    asker: Asker = PLAINLY,
    seed: int = 0,
) -> Made:
    """Asks the training questions, labels them, and trains.

    Args:
        model: untuned.
        items: to train on. Of those that nothing answers, the model learns that it is unsure (or to refuse).
        tune: (model, examples, name) → a trained model; any method of tuning (`tune.fit` on whatever was attached).
        form: in which the tuned model is asked.
        first: in which the untuned model is (with examples shown, that it may know what is wanted); `form` where None.
        asker: how models are asked.

    Raises:
        TypeError: a `tune` that cannot be called.
        ValueError: what the recipe does not allow.

    Example:
        >>> from jaxml import testing
        >>> items = [Item(f"what is {i}?", (str(i),)) for i in range(4)]
        >>> made = r_tune(testing.tiny_model(), items, lambda model, examples, name: model, PUBLISHED)
        >>> len(made.stages[0]), made.labels.sure.shape
        (4, (4,))
    """
    if not callable(tune):
        raise TypeError(f"r_tuning.r_tune: tune is a function (model, examples, name) → model, got {tune!r:.60}.")
    recipe.check(items)
    form, first = recipe.form(form), first or form
    tokenizer = model.tokenizer
    if recipe.variant == "grounded":
        stages = list(examples.two_stages(tokenizer, items, form, seed=seed))
        return Made(_train(model, stages, tune), None, None, stages)
    learn = lambda part: examples.plain(tokenizer, part, form)
    models = [(np.arange(len(items)), model)]
    if recipe.fresh:
        models = labels.cross_fitted(model, items, learn, tune, folds=recipe.folds, seed=seed)
    asked = dataclasses.replace(form if recipe.fresh else first, refusals=(), scale=None)
    several = recipe.rounds > 1
    drawn = lambda of, part: asker.samples(
        of, part, asked, recipe.samples, temperature=recipe.temperature, seed=seed
    )  # fmt: skip
    numbers, answers, sampled = [], [], []
    for part, of in models:
        numbers.append(part)
        answers.append(asker.answer(of, [items[i] for i in part], asked))
        sampled += drawn(of, [items[i] for i in part]) if several else []
    order = np.argsort(np.concatenate(numbers))
    answered = ask.join(answers).take(order)
    sampled = [sampled[i] for i in order] if several else []
    if recipe.variant == "unsupervised":
        made = labels.consistent(sampled, items)
    elif recipe.variant == "graded":
        made = labels.expected(sampled, items)
    elif recipe.variant == "craft":
        known = labels.rehearsal(sampled, items)
        rehearsed = tune(model, learn([items[i] for i in known]), "rehearsal") if known else model
        made = labels.craft(sampled, drawn(rehearsed, items), items)
    else:
        made = labels.correct(answered)
    unknown = "refusal" if recipe.refuses else recipe.unknown
    stages = [
        examples.make(
            tokenizer, items, made, answered, form, known=recipe.known, unknown=unknown, balance=recipe.balance,
            weight=recipe.weight, seed=seed,
        )
    ]  # fmt: skip
    return Made(_train(model, stages, tune), made, answered, stages)


def _train(model: Model, stages: list[list[dict]], tune: Tune) -> Model:
    for number, stage in enumerate(stages):
        model = tune(model, stage, f"stage-{number}" if len(stages) > 1 else "r-tuned")
    return model
