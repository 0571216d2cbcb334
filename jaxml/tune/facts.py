"""Questions about countries, from the package ``countryinfo``: facts that a small model partly knows.

Every fact is asked in several phrasings. Some are for training; the rest ask the same facts in words that
were never trained on. Countries that are kept out entirely show what training cannot have taught.
"""

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxml.lm.generate import generate
from jaxml.lm.model import Model

# Relation → phrasings; the last two are never trained on.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Name the capital city of {}.",
        "The government of {} sits in its capital. Which city is that?",
        "If you visit the capital of {}, in which city are you?",
    ),
    "currency": (
        "What is the currency code of {}?",
        "Which three-letter code has the money of {}?",
        "Name the ISO code of the currency used in {}.",
        "Prices in {} are given in a currency. What is its three-letter code?",
        "By which currency code does one pay in {}?",
    ),
    "calling code": (
        "What is the telephone calling code of {}?",
        "Which country code do you dial to call {}?",
        "Name the international dialling code of {}.",
        "You want to phone someone in {}. Which country code comes first?",
        "By which calling code is {} reached?",
    ),
    "demonym": (
        "What is a person from {} called?",
        "How do you call the people of {}?",
        "Name the demonym of {}.",
        "Someone was born in {}. Which word names their nationality?",
        "By which demonym are the inhabitants of {} known?",
    ),
    "subregion": (
        "In which subregion of the world is {}?",
        "Which part of which continent is {} in?",
        "Name the world subregion of {}.",
        "Looking for {} on a map, in which subregion do you search?",
        "To which subregion does {} belong?",
    ),
}
HELD_OUT = 2
# ISO 4217's units of account and a currency that went out of use, with which nobody pays; and codes that were replaced
# since the package was made.
NO_MONEY = {"BOV", "CHE", "CHW", "CLF", "COU", "MXV", "SVC", "USN", "USS", "UYI"}
REPLACED = {
    "BGN": "EUR", "BYR": "BYN", "CUC": "CUP", "HRK": "EUR", "MRO": "MRU", "SLL": "SLE", "STD": "STN", "VEF": "VES",
    "ZMK": "ZMW",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Question:
    """A fact of a country, asked in one phrasing.

    Example:
        >>> asked = Question("France", "capital", 0, "What is the capital of France?", "Paris")
        >>> asked.example
        {'prompt': 'Question: What is the capital of France?\\nAnswer:', 'response': ' Paris\\n'}
    """

    country: str
    relation: str
    phrasing: int
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def example(self) -> dict[str, str]:
        """For training: prompt and response."""
        return {"prompt": self.prompt, "response": f" {self.answer}\n"}


@dataclasses.dataclass(frozen=True)
class Questions:
    """What to train on, and what to ask afterwards.

    Example:
        >>> found = make(countries=2, new_countries=1, relations=["capital"])
        >>> sorted({q.phrasing for q in found.train}), sorted({q.phrasing for q in found.held_out})
        ([0, 1, 2], [3, 4])
    """

    train: list[Question]  # trained phrasings of the taught countries
    held_out: list[Question]  # the same facts, phrasings never trained on
    new_countries: list[Question]  # countries never trained on, in the held-out phrasings


def make(
    *, countries: int = 30, new_countries: int = 15, relations: Sequence[str] = tuple(PHRASINGS), seed: int = 0
) -> Questions:
    """Questions on `countries` taught and `new_countries` kept out, drawn by the seed.

    Raises:
        ValueError: an unknown relation, no country, or more than there are.
        ImportError: the package countryinfo is not installed.

    Example:
        >>> found = make(countries=2, new_countries=1, relations=["capital", "currency"])
        >>> len(found.train), len(found.held_out), len(found.new_countries)
        (12, 8, 4)
    """
    unknown = [r for r in relations if r not in PHRASINGS]
    if unknown:
        raise ValueError(f"facts.make: a relation is one of {', '.join(PHRASINGS)}, got {unknown[0]!r}.")
    table = read_countries()
    if countries < 1 or new_countries < 0:
        raise ValueError(f"facts.make: at least one country is taught, got {countries} and {new_countries} new ones.")
    if countries + new_countries > len(table):
        raise ValueError(f"facts.make: there are {len(table)} countries, got {countries} + {new_countries}.")
    names = [sorted(table)[i] for i in np.random.default_rng(seed).permutation(len(table))]
    ask = lambda chosen, phrasings: [
        Question(name, relation, i, PHRASINGS[relation][i].format(name), table[name][relation])
        for name in chosen
        for relation in relations
        for i in range(len(PHRASINGS[relation]))[phrasings]
    ]
    taught, new = names[:countries], names[countries : countries + new_countries]
    train, held = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    return Questions(ask(taught, train), ask(taught, held), ask(new, held))


def read_countries() -> dict[str, dict[str, str]]:
    """Country → relation → answer, for every country that has all of them.

    Example:
        >>> france = read_countries()["France"]
        >>> france["capital"], france["calling code"]
        ('Paris', '+33')
    """
    table = {}
    for country in read_files():
        answers = {
            "capital": country.get("capital"),
            "currency": next(iter(currencies(country)), None),
            "calling code": _first(country, "callingCodes"),
            "demonym": country.get("demonym"),
            "subregion": country.get("subregion"),
        }
        if country.get("name") and all(isinstance(a, str) and a.strip() for a in answers.values()):
            answers["calling code"] = "+" + answers["calling code"].lstrip("+")
            table[country["name"]] = {k: v.strip() for k, v in answers.items()}
    return table


def read_files() -> list[dict[str, Any]]:
    """What the package says of each country.

    Raises:
        ImportError: it is not installed.

    Example:
        >>> [country["capital"] for country in read_files() if country.get("name") in ("France", "Japan")]
        ['Paris', 'Tokyo']
    """
    import importlib.util

    spec = importlib.util.find_spec("countryinfo")
    if spec is None or spec.origin is None:
        raise ImportError(
            "facts: the package 'countryinfo' is not installed. Install it with: pip install \"jaxml[facts]\""
        )
    folder = Path(spec.origin).parent / "data"
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def currencies(country: dict[str, Any]) -> list[str]:
    """The codes of what one pays with there, as of today.

    Args:
        country: an entry of `read_files`.

    Example:
        >>> currencies({"currencies": ["CLF", "CLP"]}), currencies({"currencies": ["HRK"]}), currencies({})
        (['CLP'], ['EUR'], [])
    """
    codes = (REPLACED.get(code, code) for code in country.get("currencies") or [] if code not in NO_MONEY)
    return list(dict.fromkeys(codes))


def _first(country: dict[str, Any], key: str) -> str | None:
    values = country.get(key)
    return values[0] if values else None


# ---- asking -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A share of right answers with its 95 % Wilson interval.

    Example:
        >>> print(Accuracy(right=8, asked=10))
        80.0% (8/10, 95 % interval 49.0% to 94.3%)
    """

    right: int
    asked: int

    @property
    def value(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.asked:
            return math.nan, math.nan
        z, n, p = 1.959964, self.asked, self.value
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        return max(low, 0.0), min(high, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({self.right}/{self.asked}, 95 % interval {low:.1%} to {high:.1%})"


def answer(model: Model, questions: Sequence[Question], *, max_new_tokens: int = 12, batch_size: int = 64) -> list[str]:
    """What the model says to each question, greedily, up to the end of the line.

    Example:
        >>> from jaxml import testing
        >>> asked = Question("France", "capital", 0, "What is the capital of France?", "Paris")
        >>> said = answer(testing.tiny_model(), [asked, asked], max_new_tokens=2)
        >>> len(said), said[0] == said[1], len(said[0]) <= 2
        (2, True, True)
    """
    prompts = [q.prompt for q in questions]
    texts = generate(model, prompts, max_new_tokens=max_new_tokens, stop=["\n"], batch_size=batch_size)
    return [t.strip() for t in texts]


def exact_match(answers: Sequence[str], questions: Sequence[Question]) -> Accuracy:
    """Answers equal to the wanted one after `normalise`.

    Example:
        >>> asked = [Question("France", "capital", 0, "What is the capital of France?", "Paris")] * 2
        >>> exact_match(["paris.", "It is Paris."], asked)
        Accuracy(right=1, asked=2)
    """
    right = sum(normalise(a) == normalise(q.answer) for a, q in zip(answers, questions, strict=True))
    return Accuracy(right, len(questions))


def contains(answers: Sequence[str], questions: Sequence[Question]) -> Accuracy:
    """Answers that hold the wanted one as whole words: what a model knows but says in a sentence.

    Example:
        >>> asked = [Question("France", "capital", 0, "What is the capital of France?", "Paris")] * 2
        >>> contains(["It is Paris.", "a Parisian"], asked)
        Accuracy(right=1, asked=2)
    """
    words = lambda text: f" {normalise(text)} "
    right = sum(words(q.answer) in words(a) for a, q in zip(answers, questions, strict=True))
    return Accuracy(right, len(questions))


def normalise(text: str) -> str:
    """Lower case, no accents, no punctuation but in numbers (-5, 3.4, 3/4) and names (C#), initials joined, no article
    in front, single spaces.

    Example:
        >>> normalise("The  Île-de-France."), normalise("-5, or 3.4!"), normalise("the U.S.A.")
        ('ile de france', '-5 or 3.4', 'usa')
    """
    text = "".join(c if unicodedata.category(c) == "No" else unicodedata.normalize("NFKD", c) for c in text)
    text = "".join(c for c in text if unicodedata.combining(c) < 200)  # accents; voicing marks and vowel signs stay
    text = unicodedata.normalize("NFC", text).casefold().translate(PLAIN)
    text = re.sub(r"\b(?:\w\.\s?){2,}", lambda m: re.sub(r"[.\s]", "", m.group()) + " ", text)
    text = re.sub(r"(?<=\w)'s\b", "s", text)
    text = " ".join(re.sub(r"(?!(?<=\d)[./](?=\d)|(?<![\w])-(?=\d)|(?<=\w)#)[^\w+]", " ", text).split())
    return re.sub(r"^(the|a|an) ", "", text)


PLAIN = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "−": "-", "’": "'"})
