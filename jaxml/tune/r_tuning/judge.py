"""Whether what a model says is right: by whole words, by value, by label; never by a piece of a word."""

import re
from collections.abc import Sequence
from fractions import Fraction

from jaxml.tune.facts import normalise
from jaxml.tune.r_tuning.items import Item

NUMBER = re.compile(r"(?<!\w)[-+]?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?%?")


def right(said: str, item: Item) -> bool:
    """Whether an answer in the model's own words is one of the item's.

    Of a choice (`Item.choices`), what is said names that one and no other, a label inside another one ("supported" in
    "not supported") not counted. Of a number, the first number said has its value. Otherwise the answer stands in what
    is said, as whole words, whatever the case, accents, punctuation and articles. A question without answer has no
    right one.

    Example:
        >>> right("It is Paris.", Item("?", ("Paris",))), right("Parisian", Item("?", ("Paris",)))
        (True, False)
        >>> right("not supported", Item("?", ("supported",), choices=("supported", "not supported")))
        False
        >>> right("That makes 1,200.0", Item("?", ("1200",)))
        True
    """
    if item.choices:
        return label(said, item.choices) in item.answers and item.answerable
    values = [number(answer) for answer in item.answers]
    if values and None not in values:
        found = numbers(said)
        return bool(found) and found[0] in values
    said = normalise(said)
    return any(_words_in(normalise(answer), said) for answer in item.answers)


def label(said: str, labels: Sequence[str]) -> str | None:
    """The only label that is said; None where there is none, or several.

    Example:
        >>> label("The claim is NOT supported.", ["supported", "not supported"]), label("x or y", ["x", "y"])
        ('not supported', None)
    """
    words = normalise(said)
    for one in labels:
        if normalise(one) == words:
            return one
    found = []
    for one in sorted(labels, key=lambda text: -len(normalise(text))):  # the longest first, and then cut out
        if _words_in(normalise(one), words):
            found.append(one)
            words = re.sub(rf"(?<!\S){re.escape(normalise(one))}(?!\S)", "|", words)
    return found[0] if len(found) == 1 else None


def numbers(text: str) -> list[Fraction]:
    """The values of the numbers in a text, in order: 1,200; -3.5; 3/4; 25%.

    Example:
        >>> [str(v) for v in numbers("From -3.5 to 1,200, or 3/4, or 75%.")]
        ['-7/2', '1200', '3/4', '3/4']
    """
    return [value for value in map(_value, NUMBER.findall(text)) if value is not None]


def number(text: str) -> Fraction | None:
    """The value of a text that is nothing but a number (with a currency sign or a full stop, perhaps).

    Example:
        >>> number("$1,200."), number("+33"), number("12 apples")
        (Fraction(1200, 1), Fraction(33, 1), None)
    """
    bare = text.strip().strip("$€£").rstrip(".").strip()
    return _value(bare) if NUMBER.fullmatch(bare) else None


def _value(text: str) -> Fraction | None:
    percent, text = text.endswith("%"), re.sub(r"[,\s%+]", "", text)
    try:
        return Fraction(text) / (100 if percent else 1)
    except (ValueError, ZeroDivisionError):
        return None


def _words_in(wanted: str, text: str) -> bool:
    return bool(wanted) and f" {wanted} " in f" {text} "
