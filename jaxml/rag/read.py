"""Files to blocks of text with the headings above them: text, Markdown, HTML, PDF, JSONL.

Nothing in a file is executed, and nothing outside it is opened. A file that is too large, broken or in another encoding
is refused in a sentence that names it.
"""

import dataclasses
import json
import re
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from html import unescape as html_entities
from pathlib import Path
from typing import NamedTuple

from jaxml.extras import need

BETWEEN = " › "


class Block(NamedTuple):
    """A paragraph, a list item, a table's row, a page.

    Example:
        >>> block = Block("Boats leave at six.", BETWEEN.join(["Harbour", "Ferries"]), page=3)
        >>> block.title, block.page, block.source
        ('Harbour › Ferries', 3, '')
    """

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
        markdown: bytes of a Markdown file, of which the parser makes some hundred times as much.
        pages: of a PDF.
        seconds: for a PDF, whose pages may share what takes long to read.

    Example:
        >>> Limits(pages=100).pages
        100
    """

    file: int = 64 * 2**20
    line: int = 4 * 2**20
    markdown: int = 4 * 2**20
    pages: int = 5000
    seconds: float = 600.0


USUAL = Limits()


def find(folder: str | Path) -> list[Path]:
    """The files of a folder that can be read, in order; a file alone is itself.

    Hidden files, hidden folders and symbolic links are left out.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no file that can be read, or a file of another kind.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = [Path(folder, name).write_text("x") for name in ("b.md", "a.txt", ".c.txt", "d.bin")]
        ...     [path.name for path in find(folder)]
        ['a.txt', 'b.md']
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
        ValueError: a folder, another ending, larger than the limits, another encoding, or broken; the file is named.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.html").write_text("<h1>Harbour</h1><p>Boats leave at six.</p><p>Bring a coat.</p>")
        ...     [(block.text, block.title) for block in read(f"{folder}/a.html")]
        [('Boats leave at six.', 'Harbour'), ('Bring a coat.', 'Harbour')]
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: read takes one file, got a folder. find({str(path)!r}) lists the files in it.")
    [path] = find(path)
    reader = READERS[path.suffix.lower()]
    if reader is not jsonl and (size := path.stat().st_size) > limits.file:
        raise ValueError(f"{path}: a file has at most {limits.file:,} bytes, got {size:,}. Cut it, or raise the limit.")
    yield from reader(path, limits)


# ---- kinds ------------------------------------------------------------------------------------------


def text(path: Path, limits: Limits) -> Iterator[Block]:
    """Paragraphs, which empty lines part.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("Boats leave\\nat six.\\n\\nBring a coat.")
        ...     [block.text for block in text(Path(folder, "a.txt"), USUAL)]
        ['Boats leave\\nat six.', 'Bring a coat.']
    """
    for part in re.split(r"\n\s*\n", _decoded(path)):
        if part.strip():
            yield Block(part.strip())


def markdown(path: Path, limits: Limits) -> Iterator[Block]:
    """Paragraphs, list items, rows of tables and code under their headings, without the marks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.md").write_text("# Harbour\\n## Ferries\\nBoats leave at *six*.\\n# Inn\\n- Soup")
        ...     [(block.text, block.title) for block in markdown(Path(folder, "a.md"), USUAL)]
        [('Boats leave at six.', 'Harbour › Ferries'), ('Soup', 'Inn')]
    """
    parser = need("markdown_it", "rag").MarkdownIt("commonmark").enable("table")
    titles: list[str] = []
    cells: list[str] = []
    kind, level = "", 0
    if (size := path.stat().st_size) > limits.markdown:
        raise ValueError(f"{path}: a Markdown file has at most {limits.markdown:,} bytes, got {size:,}. Cut it.")
    front = re.compile(r"---[ \t]*\n(?:[^\n]*\n){0,200}?(?:---|\.\.\.)[ \t]*(?:\n|$)")  # of static site generators
    page = _decoded(path)
    for token in parser.parse(page[found.end() :] if (found := front.match(page)) else page):
        if token.type == "heading_open":
            level = int(token.tag[1])
        elif token.type in ("tr_open", "tr_close"):
            if cells:
                yield Block(" | ".join(cells), _title(titles))
            cells, kind = [], "row" if token.type == "tr_open" else ""
        elif token.type == "inline":
            said = " ".join(_plain(token.children or []).split())
            if level:
                titles = [*titles[: level - 1], *[""] * (level - 1 - len(titles)), said[:TITLE]]
                level = 0
            elif kind == "row":
                cells.append(said)
            elif said:
                yield Block(said, _title(titles))
        elif token.type in ("fence", "code_block") and token.content.strip():
            yield Block(token.content.strip("\n"), _title(titles))
        elif token.type == "html_block":
            blocks, titles = _blocks(token.content, titles)
            yield from blocks


def html(path: Path, limits: Limits) -> Iterator[Block]:
    """What a page shows, under its headings.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.html").write_text("<h1>Boats</h1><p>At <b>six</b>.<script>x()</script><p hidden>5.")
        ...     [(block.text, block.title) for block in html(Path(folder, "a.html"), USUAL)]
        [('At six.', 'Boats')]
    """
    data = path.read_bytes()
    declared = re.search(rb"""<meta[^>]{0,200}charset=["']?([\w-]{1,40})""", data[:4096], re.IGNORECASE)
    charset = declared.group(1).decode().lower().replace("_", "-") if declared else "utf-8"
    if not charset.replace("utf8", "utf-8").startswith(CHARSETS):
        raise ValueError(f"{path}: the page says that it is in {charset!r}. Save it in UTF-8.")
    blocks, _ = _blocks(_decoded(path, charset))
    yield from blocks


def pdf(path: Path, limits: Limits) -> Iterator[Block]:
    """A block a page.

    Example:
        >>> import tempfile
        >>> from jaxml import figure
        >>> drawn = figure.figure(4, 1)
        >>> _ = drawn.text(0.1, 0.5, "Boats leave at six.")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [(block.text, block.page) for block in pdf(figure.write(drawn, f"{folder}/a.pdf"), USUAL)]
        [('Boats leave at six.', 1)]
    """
    pypdf = need("pypdf", "rag")
    broken = (
        pypdf.errors.PyPdfError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError,
        ArithmeticError, struct.error, zlib.error, OSError, NotImplementedError, MemoryError, AssertionError,
        pypdf.errors.DependencyError,
    )  # fmt: skip
    until, characters = time.monotonic() + limits.seconds, 0

    def late(*_) -> None:
        if time.monotonic() > until:
            raise ValueError(f"it takes more than {limits.seconds} s")

    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it is encrypted. Save it without a password")
        if len(reader.pages) > limits.pages:
            raise ValueError(f"a PDF has at most {limits.pages} pages, got {len(reader.pages)}")
        pages = []
        for page in reader.pages:
            pages.append(page.extract_text(visitor_operand_before=late))
            late()  # what is raised within a form, the package takes for a broken form
            characters += len(pages[-1])
            if characters > limits.file:
                raise ValueError(f"a PDF has at most {limits.file:,} characters, got more")
    except broken as error:
        raise ValueError(f"{path}: this PDF cannot be read ({error}).") from error
    for number, said in enumerate(pages, 1):
        if said.strip():
            halves = said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # fonts give lone surrogates
            yield Block(halves.strip(), page=number)


def jsonl(path: Path, limits: Limits) -> Iterator[Block]:
    """An object a line: text, and where there is one title and source.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.jsonl").write_text('{"text": "At six."}\\n{"text": "Soup", "source": "menu"}')
        ...     [(block.text, block.page, block.source) for block in jsonl(Path(folder, "a.jsonl"), USUAL)]
        [('At six.', 1, ''), ('Soup', 2, 'menu')]
    """
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
    if any("\ud800" <= c <= "\udfff" for c in row["text"] + title + source):
        raise ValueError("a text has half of a character (a lone surrogate).")
    return Block(row["text"].strip(), title.strip(), source=source.strip())


def _title(titles: list[str]) -> str:
    return BETWEEN.join(part for part in titles if part)


def _plain(children) -> str:
    """A line of Markdown without its marks."""
    said = []
    for child in children:
        if child.type in ("softbreak", "hardbreak") or (child.type == "html_inline" and child.content[:3] == "<br"):
            said.append(" ")
        elif child.type == "image":
            said.append(_plain(child.children or []))
        elif child.type in ("text", "code_inline", "text_special"):
            said.append(child.content)
    return "".join(said)


def _blocks(page: str, titles: Sequence[str] = ()) -> tuple[list[Block], list[str]]:
    """(blocks, the headings that hold after them) of HTML that stands under headings."""
    reader = _Page(titles)
    reader.feed(page)
    return reader.blocks, reader.titles


TAG = re.compile(r"<(/?)([a-zA-Z][^\s/<>]{0,100})(?![^\s/<>])([^<>]*)>")
TITLE = 300  # characters of a heading, which stands in every block under it
ATTRIBUTES = 2000  # characters of a tag in which it may say that it is not shown
CHARSETS = (  # what their names begin with: others of Python's are no encodings of pages
    "utf-8", "utf-16", "ascii", "us-ascii", "latin", "cp", "iso-8859", "windows-125", "shift-jis", "euc", "gb",
    "big5", "koi8", "mac",
)  # fmt: skip
UNSEEN = re.compile(
    r"""(?:^|\s)(?:hidden(?=[\s=/]|$)|aria-hidden\s*=\s*["']?true|style\s*=[^>]*display\s*:\s*none)""", re.I
)


class _Page:
    """Text between the tags that begin a new line; nothing of what a page does not show.

    One pass over the text, whatever is unclosed in it: the time is in proportion to its length.
    """

    HIDDEN = frozenset("script style template noscript svg nav title iframe object head select".split())
    RAW = frozenset(("script", "style", "title"))  # in which there are no tags but their own end
    VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
    INLINE = frozenset(
        "a abbr b bdi bdo cite code data dfn em font i kbd label mark q s samp small span strong sub sup time tt u var "
        "wbr img".split()
    )
    CELLS = frozenset(("td", "th"))

    def __init__(self, titles: Sequence[str] = ()):
        self.blocks: list[Block] = []
        self.titles = list(titles)
        self.title = _title(self.titles)  # one text for all blocks under a heading
        self.said: list[str] = []
        self.hidden: list[str] = []  # open elements within one that is not shown, that one first
        self.level = 0  # of the heading that is being read

    def feed(self, page: str) -> None:
        place, comments = 0, True
        while (at := page.find("<", place)) >= 0:
            self.text(page[place:at])
            place = at + 1
            if comments and page.startswith("<!--", at):
                end = page.find("-->", at + 4)
                comments, place = end >= 0, end + 3 if end >= 0 else len(page)
                continue
            tag = TAG.match(page, at)
            if tag is None:
                if page.startswith(("<!", "<?", "</"), at):  # a declaration, or an end tag without a name
                    end = page.find(">", at, at + 1000)
                    place = end + 1 if end >= 0 else place
                else:
                    self.text("<")
                continue
            place, name = tag.end(), tag.group(2).lower()
            (self.end if tag.group(1) else self.start)(name, tag.group(3))
            if name in self.RAW and not tag.group(1):
                end = re.compile(rf"</{name}", re.IGNORECASE).search(page, place)
                place = end.start() if end else len(page)
        self.text(page[place:])
        self.flush()

    def start(self, tag: str, attributes: str) -> None:
        if tag in self.VOID:
            if tag == "br" and self.level:
                self.said.append(" ")
            elif tag not in self.INLINE:
                self.flush()
            return
        if self.hidden or tag in self.HIDDEN or UNSEEN.search(attributes[:ATTRIBUTES]):
            if len(self.hidden) < 1000:
                self.hidden.append(tag)
        elif tag in self.CELLS:
            self.said.append(" | " if self.said else "")
        elif re.fullmatch("h[1-6]", tag):
            self.flush()
            self.level = int(tag[1])
        elif tag not in self.INLINE and not self.level:
            self.flush()

    def end(self, tag: str, attributes: str) -> None:
        if self.hidden:
            if tag in self.hidden:  # closes what was left open in it
                del self.hidden[len(self.hidden) - 1 - self.hidden[::-1].index(tag) :]
        elif re.fullmatch("h[1-6]", tag):
            self.flush()
            self.level = 0
        elif tag not in self.INLINE and tag not in self.CELLS and not self.level:
            self.flush()

    def text(self, text: str) -> None:
        if text and not self.hidden:
            self.said.append(html_entities(text))

    def flush(self) -> None:
        said = " ".join("".join(self.said).split())
        self.said = []
        if said and self.level:
            above = [*self.titles[: self.level - 1], *[""] * (self.level - 1 - len(self.titles))]
            self.titles = [*above, said[:TITLE]]
            self.title = _title(self.titles)
        elif said:
            self.blocks.append(Block(said, self.title))
