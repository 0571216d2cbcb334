"""Whether what a model says is right: by whole words, by value, by label; never by a piece of a word."""

import re
from collections.abc import Sequence
from fractions import Fraction

from jaxml.tune.facts import normalise
from jaxml.tune.r_tuning.items import Item

# A sign, a currency; thousands parted by commas, or digits; decimals, an exponent or a fraction; percent. No piece of a
# word ("1990s"), no part of a longer number.
NUMBER = re.compile(
    r"(?<![\w.,])[-+]?[$€£]?(?:\d{1,3}(?:,\d{3})+(?![\d,]\d)|\d+)?(?:(?<=\d)|(?=\.\d))(?:\.\d+)?"
    r"(?:e[-+]?\d+|\s*/\s*\d+)?%?(?![\d]|'?s\b)",
    re.IGNORECASE,
)
# Words that stand in any text: an answer of nothing else is all that is said, or not said.
COMMON = frozenset("the a an it its is who what which that this they we you he she i of in on at to and or".split())


def right(said: str, item: Item) -> bool:
    """Whether an answer in the model's own words is one of the item's.

    Of a choice (`Item.choices`), what is said names that one and no other, a label inside another one ("supported" in
    "not supported") not counted. Of a number, the first number said has its value. Otherwise the answer stands in what
    is said, as whole words (where words are not parted by spaces, as characters), whatever the case, accents, most
    punctuation and an article in front; an answer of common words alone ("It", "The Who") is all that is said. A
    question without answer has no right one.

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
    values = {answer: number(answer) for answer in item.answers}
    first = (numbers(said) or [None])[0]
    if first is not None and first in values.values():
        return True
    return any(_stands_in(answer, said) for answer, value in values.items() if value is None)


def label(said: str, labels: Sequence[str]) -> str | None:
    """The only label that is said; None where there is none, or several.

    Example:
        >>> label("The claim is NOT supported.", ["supported", "not supported"]), label("x or y", ["x", "y"])
        ('not supported', None)
    """
    if said.strip() in labels:
        return said.strip()
    words, each = normalise(said), [normalise(one) for one in labels]
    if each.count(words) == 1:
        return labels[each.index(words)]
    found = []
    for one in sorted(labels, key=lambda text: -len(normalise(text))):  # the longest first, and then cut out
        if each.count(normalise(one)) == 1 and _words_in(normalise(one), words):
            found.append(one)
            words = re.sub(rf"(?<!\S){re.escape(normalise(one))}(?!\S)", "|", words)
    return found[0] if len(found) == 1 else None


def numbers(text: str) -> list[Fraction]:
    """The values of the numbers in a text, in order: 1,200; -3.5; 3/4; 25%.

    Example:
        >>> [str(v) for v in numbers("From -3.5 to 1,200, or 3/4, or 75%, in the 1990s.")]
        ['-7/2', '1200', '3/4', '3/4']
    """
    return [value for value in map(_value, NUMBER.findall(_plain(text))) if value is not None]


def number(text: str) -> Fraction | None:
    """The value of a text that is nothing but a number (with a currency sign or a full stop, perhaps; a fraction below
    1, since 24/12 may be a date).

    Example:
        >>> number("$1,200."), number("+33"), number("12 apples")
        (Fraction(1200, 1), Fraction(33, 1), None)
    """
    bare = _plain(text).strip().strip("$€£").rstrip(".").strip()
    return _value(bare) if NUMBER.fullmatch(bare) else None


def _plain(text: str) -> str:
    return text.replace("\u2212", "-")


def _value(text: str) -> Fraction | None:
    percent, text = text.endswith("%"), re.sub(r"[,\s%+$€£]", "", text)
    try:
        value = Fraction(text) / (100 if percent else 1)
    except (ValueError, ZeroDivisionError):
        return None
    return None if "/" in text and abs(value) >= 1 else value


def _stands_in(answer: str, said: str) -> bool:
    wanted, text = normalise(answer), normalise(said)
    if not wanted:  # of signs alone
        return answer.strip() == said.strip()
    if set(wanted.split()) <= COMMON:
        return wanted == text
    return (wanted in text) if UNPARTED.search(wanted) else _words_in(wanted, text)


# Thai, Lao, Burmese, Khmer, kana, Han, Hangul
UNPARTED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def _words_in(wanted: str, text: str) -> bool:
    return bool(wanted) and f" {wanted} " in f" {text} "
