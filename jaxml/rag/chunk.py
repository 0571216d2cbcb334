"""Blocks of text to passages: cut where the structure allows, each with the end of the one before."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jaxml.rag.passages import Passage
from jaxml.rag.read import Block


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How long passages are.

    Args:
        size: words at most. Where words are long or not parted by spaces, eight characters count as one.
        overlap: words at most of the passage before that the next one begins with, in whole sentences.

    Raises:
        ValueError: a size below 1, or an overlap that leaves no room.

    Example:
        >>> Chunking(size=60, overlap=10).size
        60
    """

    size: int = 120
    overlap: int = 24

    def __post_init__(self):
        if not isinstance(self.size, int) or not isinstance(self.overlap, int):
            raise ValueError(f"Chunking: size and overlap are whole numbers, got {self.size!r} and {self.overlap!r}.")
        if self.size < 1 or not 0 <= self.overlap < self.size:
            raise ValueError(
                f"Chunking: size is at least 1 and overlap in 0 … size − 1, got {self.size} and {self.overlap}."
            )


USUAL = Chunking()


def chunk(blocks: Iterable[Block], source: str, rule: Chunking = USUAL) -> Iterator[Passage]:
    """Passages of one document; none crosses a heading or a page.

    Blocks that stand under the same headings are joined while they fit; one that is too long is cut between sentences,
    a sentence that is too long between words.

    Example:
        >>> blocks = [Block("One two. Three four.", "A"), Block("Five.", "A"), Block("Six.", "B")]
        >>> [(p.text, p.title) for p in chunk(blocks, "x.txt", Chunking(4, 2))]
        [('One two. Three four.', 'A'), ('Three four.\\nFive.', 'A'), ('Six.', 'B')]
    """
    start = 0
    held: list[_Piece] = []
    about: tuple | None = None
    for block in blocks:
        if held and (block.title, block.page, block.source) != about:
            yield from _pack(held, about, source, rule)
            held = []
        about = (block.title, block.page, block.source)
        held += _pieces(block.text, start, rule.size)
        start += len(block.text) + 2  # as if joined by an empty line
    if held:
        yield from _pack(held, about, source, rule)


class _Piece(NamedTuple):
    """A sentence, or a part of one, where it stands in the document."""

    text: str
    start: int
    words: int
    first: bool  # of its block


def _pieces(text: str, start: int, size: int) -> list[_Piece]:
    pieces = []
    for sentence in re.finditer(r"\S.*?(?:[.!?。！？](?=\s)|[。！？]|$)", text, re.DOTALL):
        for a, b in _halves(sentence.group(), size):
            said = sentence.group()[a:b]
            pieces.append(_Piece(said, start + sentence.start() + a, words(said), not pieces))
    return pieces


def _halves(text: str, size: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `size` words."""
    begin = 0
    end = 0
    for word in re.finditer(r"\S+", text):
        stops = range(word.start(), word.end(), 8 * size)
        for a in stops:  # a word that is too long alone is cut
            b = min(a + 8 * size, word.end())
            if end > begin and words(text[begin:b]) > size:
                yield begin, end
                begin = a
            end = b
    if end > begin:
        yield begin, end


def words(text: str) -> int:
    """How long a text counts: its words, or an eighth of its characters where that is more.

    Example:
        >>> words("boats leave at six"), words("x" * 80)
        (4, 10)
    """
    return max(len(text.split()), -(-len(text) // 8))


def _pack(pieces: list[_Piece], about: tuple, source: str, rule: Chunking) -> Iterator[Passage]:
    """Passages of at most `size` words from pieces that stand under the same headings."""
    title, page, own = about
    held: list[_Piece] = []

    def passage() -> Passage:
        said = held[0].text + "".join(("\n" if p.first else " ") + p.text for p in held[1:])
        return Passage(said, own or source, title, held[0].start, held[-1].start + len(held[-1].text), page)

    for piece in pieces:
        if held and sum(p.words for p in held) + piece.words > rule.size:
            yield passage()
            room = min(rule.overlap, rule.size - piece.words)
            kept: list[_Piece] = []
            for before in reversed(held):
                room -= before.words
                if room < 0:
                    break
                kept.insert(0, before)
            held = kept
        held.append(piece)
    if held:
        yield passage()
