"""A passage: a piece of a document that can be found, shown to a model and cited."""

import dataclasses
import functools
import hashlib


@dataclasses.dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Args:
        source: where it is from, a path as a rule.
        title: the headings that it stands under, joined by " › ".
        start, end: characters of the document's text.
        page: of a PDF, from 1; the line of a JSONL file; otherwise 0.

    Example:
        >>> one = Passage("Oslo is the capital.", "norway.md", "Norway › Cities", page=0)
        >>> one.place, len(one.key)
        ('norway.md, Norway › Cities', 32)
    """

    text: str
    source: str
    title: str = ""
    start: int = 0
    end: int = 0
    page: int = 0

    @functools.cached_property
    def key(self) -> str:
        """A hash of text and place: another text or place, another key."""
        return hashlib.sha256(f"{self.source}\0{self.start}\0{self.page}\0{self.text}".encode()).hexdigest()[:32]

    @property
    def place(self) -> str:
        """The source as a person would cite it."""
        kind = "line" if self.source.endswith((".jsonl", ".ndjson")) else "page"
        parts = [self.source, self.title, f"{kind} {self.page}" if self.page else ""]
        return ", ".join(part for part in parts if part)

    @property
    def whole(self) -> str:
        """Title and text, as indexes read them."""
        return f"{self.title}\n{self.text}" if self.title else self.text
