"""Files to blocks of text with the headings above them: text, Markdown, HTML, PDF, JSONL.

Nothing in a file is executed, and nothing outside it is opened. A file that is too large, broken or in another encoding
is refused in a sentence that names it.
"""

import dataclasses
import json
import re
import struct
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from jaxml.extras import need

BETWEEN = " › "


class Block(NamedTuple):
    """A paragraph, a list item, a table's row, a page."""

    text: str
    title: str = ""  # the headings above it
    page: int = 0  # of a PDF, from 1; the line of a JSONL file
    source: str = ""  # where a JSONL row says it is from


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is read at most.

    Args:
        file: bytes of a file (JSONL files are streamed and may have any size).
        line: bytes of a line of JSONL.
        pages: of a PDF.
    """

    file: int = 64 * 2**20
    line: int = 4 * 2**20
    pages: int = 5000


USUAL = Limits()


def find(folder: str | Path) -> list[Path]:
    """The files of a folder that can be read, in order; a file alone is itself.

    Hidden files, hidden folders and symbolic links are left out.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no file that can be read, or a file of another kind.
    """
    folder = Path(folder)
    if folder.is_file():
        if folder.suffix.lower() not in READERS:
            raise ValueError(f"{folder}: files end in {', '.join(READERS)}, got {folder.suffix or 'no ending'}.")
        return [folder]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such file or folder.")
    found, folders = [], [folder]
    while folders:
        for path in folders.pop().iterdir():
            if path.name.startswith(".") or path.is_symlink():
                continue
            if path.is_dir():
                folders.append(path)
            elif path.is_file() and path.suffix.lower() in READERS:
                found.append(path)
    if not found:
        raise ValueError(f"{folder}: no file to read; files end in {', '.join(READERS)}.")
    return sorted(found)


def read(path: str | Path, limits: Limits = USUAL) -> Iterator[Block]:
    """The blocks of a file, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, larger than the limits, another encoding, or broken; the file is named.
    """
    path = Path(path)
    [path] = find(path)
    reader = READERS[path.suffix.lower()]
    if reader is not jsonl and (size := path.stat().st_size) > limits.file:
        raise ValueError(f"{path}: a file has at most {limits.file:,} bytes, got {size:,}. Cut it, or raise the limit.")
    yield from reader(path, limits)


# ---- kinds ------------------------------------------------------------------------------------------


def text(path: Path, limits: Limits) -> Iterator[Block]:
    """Paragraphs, which empty lines part."""
    for part in re.split(r"\n\s*\n", _decoded(path)):
        if part.strip():
            yield Block(part.strip())


def markdown(path: Path, limits: Limits) -> Iterator[Block]:
    """Paragraphs, list items, rows of tables and code under their headings, without the marks."""
    parser = need("markdown_it", "rag").MarkdownIt("commonmark").enable("table")
    titles: list[str] = []
    cells: list[str] = []
    kind, level = "", 0
    for token in parser.parse(_decoded(path)):
        if token.type == "heading_open":
            level = int(token.tag[1])
        elif token.type in ("tr_open", "tr_close"):
            if cells:
                yield Block(" | ".join(cells), _title(titles))
            cells, kind = [], "row" if token.type == "tr_open" else ""
        elif token.type == "inline":
            said = " ".join(_plain(token.children or []).split())
            if level:
                titles = [*titles[: level - 1], *[""] * (level - 1 - len(titles)), said]
                level = 0
            elif kind == "row":
                cells.append(said)
            elif said:
                yield Block(said, _title(titles))
        elif token.type in ("fence", "code_block") and token.content.strip():
            yield Block(token.content.strip("\n"), _title(titles))
        elif token.type == "html_block":
            yield from (Block(block.text, _title(titles)) for block in _blocks(token.content))


def html(path: Path, limits: Limits) -> Iterator[Block]:
    """What a page shows, under its headings."""
    data = path.read_bytes()
    declared = re.search(rb"""<meta[^>]{0,200}charset=["']?([\w-]{1,40})""", data[:4096], re.IGNORECASE)
    yield from _blocks(_decoded(path, declared.group(1).decode() if declared else "utf-8"))


def pdf(path: Path, limits: Limits) -> Iterator[Block]:
    """A block a page."""
    pypdf = need("pypdf", "rag")
    broken = (
        pypdf.errors.PyPdfError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError,
        ArithmeticError, struct.error, zlib.error, OSError, NotImplementedError,
    )  # fmt: skip
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it is encrypted. Save it without a password")
        if len(reader.pages) > limits.pages:
            raise ValueError(f"a PDF has at most {limits.pages} pages, got {len(reader.pages)}")
        pages = [page.extract_text() for page in reader.pages]
    except broken as error:
        raise ValueError(f"{path}: this PDF cannot be read ({error}).") from error
    for number, said in enumerate(pages, 1):
        if said.strip():
            yield Block(said.strip(), page=number)


def jsonl(path: Path, limits: Limits) -> Iterator[Block]:
    """An object a line: text, and where there is one title and source."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limits.line + 1):
            number += 1
            if len(line) > limits.line:
                raise ValueError(f"{path}, line {number}: a line has at most {limits.line:,} bytes, this one has more.")
            if line.strip():
                try:
                    yield _row(line)._replace(page=number)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error


READERS = {
    ".txt": text, ".text": text, ".rst": text, ".md": markdown, ".markdown": markdown, ".html": html, ".htm": html,
    ".xhtml": html, ".pdf": pdf, ".jsonl": jsonl, ".ndjson": jsonl,
}  # fmt: skip


# ---- pieces -----------------------------------------------------------------------------------------


def _decoded(path: Path, encoding: str = "utf-8") -> str:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    try:
        return data.decode("utf-8-sig" if encoding.lower() == "utf-8" else encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"{path}: text is in {encoding} ({error}). Save it in UTF-8.") from error


def _row(line: bytes) -> Block:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError("a passage is an object with text, and where there is one title and source.")
    if unknown := sorted(set(row) - {"text", "title", "source"}):
        raise ValueError(f"a passage has the keys text, title and source, got {', '.join(unknown)}.")
    title, source = row.get("title", ""), row.get("source", "")
    if not isinstance(title, str) or not isinstance(source, str):
        raise ValueError("title and source are texts.")
    return Block(row["text"].strip(), title.strip(), source=source.strip())


def _title(titles: list[str]) -> str:
    return BETWEEN.join(part for part in titles if part)


def _plain(children) -> str:
    """A line of Markdown without its marks."""
    said = []
    for child in children:
        if child.type in ("softbreak", "hardbreak"):
            said.append(" ")
        elif child.type == "image":
            said.append(_plain(child.children or []))
        elif child.type in ("text", "code_inline", "text_special"):
            said.append(child.content)
    return "".join(said)


def _blocks(page: str) -> list[Block]:
    parser = _Page()
    parser.feed(page)
    parser.close()
    parser.flush()
    return parser.blocks


class _Page(HTMLParser):
    """Text between the tags that begin a new line; nothing of what a page does not show."""

    HIDDEN = frozenset(("script", "style", "template", "noscript", "svg", "nav", "title", "iframe", "object"))
    INLINE = frozenset(
        "a abbr b bdi bdo cite code data dfn em font i kbd label mark q s samp small span strong sub sup time tt u var "
        "wbr img".split()
    )
    CELLS = frozenset(("td", "th"))

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.titles: list[str] = []
        self.said: list[str] = []
        self.hidden: list[str] = []  # open tags whose text is not shown
        self.level = 0  # of the heading that is being read

    def handle_starttag(self, tag, attrs):
        if tag in self.HIDDEN:
            self.hidden.append(tag)
        if tag in self.CELLS:
            self.said.append(" | " if "".join(self.said).strip() else "")
        elif tag not in self.INLINE:
            self.flush()
            self.level = int(tag[1]) if re.fullmatch("h[1-6]", tag) else 0

    def handle_endtag(self, tag):
        if self.hidden and tag == self.hidden[-1]:
            self.hidden.pop()
        if tag not in self.INLINE and tag not in self.CELLS:
            self.flush()

    def handle_data(self, data):
        if not self.hidden:
            self.said.append(data)

    def flush(self):
        said = " ".join("".join(self.said).split())
        self.said = []
        if said and self.level:
            self.titles = [*self.titles[: self.level - 1], *[""] * (self.level - 1 - len(self.titles)), said]
        elif said:
            self.blocks.append(Block(said, _title(self.titles)))
        self.level = 0
