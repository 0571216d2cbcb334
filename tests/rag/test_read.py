"""Files to blocks, blocks to passages."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxml.rag import Chunking, Limits, Passage, chunk, read
from jaxml.rag.read import Block


def blocks(tmp_path, name: str, content: str | bytes) -> list[tuple[str, str]]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(block.text, block.title) for block in read.read(path)]


def test_text_is_cut_at_empty_lines(tmp_path):
    assert blocks(tmp_path, "a.txt", "One\nmore.\n\n \nTwo.\n") == [("One\nmore.", ""), ("Two.", "")]
    assert blocks(tmp_path, "a.txt", "é".encode("utf-16")) == [("é", "")]
    assert blocks(tmp_path, "a.txt", b"") == []


def test_markdown_keeps_its_headings_and_loses_its_marks(tmp_path):
    page = (
        "# One\n\nA **bold** [link](http://x) and `code`\nhere.\n\n## Two\n\n- first\n- second\n\n```py\nx = 1\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n<div onclick='x'>raw<script>bad()</script></div>\n\n# Three\n\nend\n"
    )
    assert blocks(tmp_path, "a.md", page) == [
        ("A bold link and code here.", "One"), ("first", "One › Two"), ("second", "One › Two"), ("x = 1", "One › Two"),
        ("a | b", "One › Two"), ("1 | 2", "One › Two"), ("raw", "One › Two"), ("end", "Three"),
    ]  # fmt: skip


def test_html_is_what_a_page_shows(tmp_path):
    page = (
        "<!doctype html><html><head><title>t</title><style>p{}</style></head><body><nav>menu</nav><h1>One <i>x</i></h1>"
        "<p>Hello<br>you &amp; me<script>alert(1)</script></p><h2>Two</h2><ul><li>a<li>b</ul>"
        "<table><tr><th>k</th><th>v</th></tr><tr><td>1<td>2</tr></table><!-- no -->tail</body></html>"
    )
    assert blocks(tmp_path, "a.html", page) == [
        ("Hello", "One x"), ("you & me", "One x"), ("a", "One x › Two"), ("b", "One x › Two"), ("k | v", "One x › Two"),
        ("1 | 2", "One x › Two"), ("tail", "One x › Two"),
    ]  # fmt: skip
    assert blocks(tmp_path, "a.htm", '<meta charset="latin-1"><p>é'.encode("latin-1")) == [("é", "")]
    assert blocks(tmp_path, "a.html", "<div>" * 20000 + "deep") == [("deep", "")]
    for page, said in (
        ("<nav><noscript>x</nav><p>one</p><p>two</p>", ["one", "two"]), ("<p>a < b<p>c", ["a < b", "c"]),
        ("<p hidden>no</p><p style='color:red; display: none'>no<b>no</b></p><p>yes</p>", ["yes"]),
        ("<title>never closed <p>x", []), ("<!-- never closed <p>x", []), ("<p>one<br>two", ["one", "two"]),
        ("<script>if (a < b) {'</p>'}</script>end", ["end"]), ("<a <a <a x", ["<a <a <a x"]),
    ):  # fmt: skip
        assert [text for text, _ in blocks(tmp_path, "a.html", page)] == said
    assert blocks(tmp_path, "a.html", "<h1>Part<br>Two</h1><h2><div>In</div></h2>x") == [("x", "Part Two › In")]


@pytest.mark.parametrize(
    "piece", ["<a ", "<!--", "<td>x", "<", "</", "<h1>", "<nav>", "<p hidden ", "&amp;", "<script>"]
)
def test_html_takes_time_in_proportion_to_its_length(tmp_path, piece, monkeypatch):
    steps = 0
    for name in ("start", "end", "text"):
        original = getattr(read._Page, name)

        def counted(self, *args, original=original):
            nonlocal steps
            steps += 1
            return original(self, *args)

        monkeypatch.setattr(read._Page, name, counted)
    blocks(tmp_path, "a.html", piece * 50_000)
    assert steps <= 300_000


def test_front_matter_and_html_headings_of_markdown(tmp_path):
    page = "---\ntitle: My page\n---\n\n<h1 align=center>Project</h1>\n\none<br>two\n"
    assert blocks(tmp_path, "a.md", page) == [("one two", "Project")]


def pdf(pages: list[str]) -> bytes:
    """A PDF that is just enough of one."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    for text in pages:
        stream = b"BT /F1 12 Tf 72 720 Td (" + text.encode() + b") Tj ET"
        font = b"<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources "
            + font + f" /Contents {len(objects) + 2} 0 R >>".encode()
        )  # fmt: skip
        objects.append(b"<< /Length " + str(len(stream)).encode() + b" >>\nstream\n" + stream + b"\nendstream")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(pages)} >>".encode()
    return whole(objects)


def whole(objects):
    """The file that these objects make, the first of them its catalogue."""
    out, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n".encode() + content + b"\nendobj\n"
    table = b"".join(f"{o:010d} 00000 n \n".encode() for o in offsets)
    end = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n".encode()
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode() + table + end


def test_a_pdf_is_read_page_by_page(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(["First page.", "", "Third page."]))
    assert [(b.text, b.page) for b in read.read(path)] == [("First page.", 1), ("Third page.", 3)]
    with pytest.raises(ValueError, match="at most 2 pages, got 3"):
        list(read.read(path, Limits(pages=2)))
    for broken in (b"", b"%PDF-1.4 nothing", pdf(["a"])[:200], pdf(["a"]).replace(b"/Pages 2 0 R", b"/Pages 9 0 R")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.pdf: this PDF cannot be read"):
            list(read.read(path))


def test_half_a_character_in_a_pdf_is_replaced(tmp_path, monkeypatch):
    import pypdf

    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(["text"]))
    monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda *_, **__: "a \ud83d b \ud83d\ude00")
    assert [block.text for block in read.read(path)] == ["a \ufffd b 😀"]


def forms(levels):
    """A PDF whose page shows a form that shows the next one ten times, and so on; the last one shows a text."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
               b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
               b"/Resources << /XObject << /F0 5 0 R >> >> >>",
               b"<< /Length 6 >>\nstream\n/F0 Do\nendstream"]  # fmt: skip
    font = b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for n in range(levels):
        last = n == levels - 1
        stream = b"BT /F1 12 Tf 72 720 Td (ten letters) Tj ET" if last else f"/F{n + 1} Do ".encode() * 10
        names = font if last else f"/Resources << /XObject << /F{n + 1} {n + 6} 0 R >> >>".encode()
        head = b"<< /Type /XObject /Subtype /Form /BBox [0 0 612 792] " + names + f" /Length {len(stream)} >>".encode()
        objects.append(head + b"\nstream\n" + stream + b"\nendstream")
    return whole(objects)


def test_markdown_has_a_size_of_its_own_and_blocks_share_their_title(tmp_path):
    (tmp_path / "a.md").write_text("a" * 200)
    with pytest.raises(ValueError, match="a Markdown file has at most 100 bytes, got 200"):
        list(read.read(tmp_path / "a.md", Limits(markdown=100)))
    (tmp_path / "a.html").write_text("<h1>A</h1><p>x<p>y<h2>B</h2><p>z")
    first, second, third = read.read(tmp_path / "a.html")
    assert first.title is second.title and third.title == "A › B"


def test_a_pdf_that_takes_for_ever_is_refused(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(forms(12))
    with pytest.raises(ValueError, match=r"it takes more than 0\.5 s"):
        list(read.read(path, Limits(seconds=0.5)))
    path.write_bytes(forms(4))
    assert next(iter(read.read(path))).text.count("ten letters") == 1000
    with pytest.raises(ValueError, match="at most 5,000 characters"):
        list(read.read(path, Limits(file=5000)))


def test_lines_of_json_are_passages_with_their_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "title": "t", "source": "s"}\n\n{"text": "two"}\n')
    assert list(read.read(path)) == [Block("one", "t", 1, "s"), Block("two", "", 3, "")]
    for line, message in (
        ("{", "not JSON"), ("[]", "an object with text"), ('{"text": 1}', "an object with text"),
        ('{"text": "a", "id": 1}', "got id"), ('{"text": "a \\ud800"}', "lone surrogate"),
        ('{"text": "a", "title": 1}', "are texts"), ("[" * 100000, "line 2"),
    ):  # fmt: skip
        path.write_text('{"text": "one"}\n' + line + "\n")
        with pytest.raises(ValueError, match=f"line 2: .*{message}|{message}"):
            list(read.read(path))
    path.write_text(json.dumps({"text": "x" * 2000}))
    with pytest.raises(ValueError, match="line 1: a line has at most 1,000 bytes"):
        list(read.read(path, Limits(line=1000)))


def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read.find(tmp_path / "none")
    with pytest.raises(ValueError, match="no file to read"):
        read.find(tmp_path)
    (tmp_path / "a.exe").write_text("x")
    with pytest.raises(ValueError, match=r"files end in \.txt.*got \.exe"):
        read.find(tmp_path / "a.exe")
    (tmp_path / "a.txt").write_bytes(b"\xff\x00\xfa")
    with pytest.raises(ValueError, match=r"a\.txt: text is in utf-8 .* Save it in UTF-8"):
        list(read.read(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(ValueError, match="at most 10 bytes, got 100"):
        list(read.read(tmp_path / "a.txt", Limits(file=10)))


def test_hidden_files_and_links_are_left_alone(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    folder = tmp_path / "docs"
    (folder / "deep" / ".git").mkdir(parents=True)
    (folder / "deep" / "b.md").write_text("b")
    (folder / "deep" / ".git" / "c.txt").write_text("c")
    (folder / ".d.txt").write_text("d")
    (folder / "a.txt").write_text("a")
    os.symlink(outside, folder / "link.txt")
    os.symlink(tmp_path, folder / "loop")
    assert [p.name for p in read.find(folder)] == ["a.txt", "b.md"]


# ---- passages ---------------------------------------------------------------------------------------

TEXT = st.text("ab .?!\n日。", max_size=200)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXT, st.sampled_from(["", "A", "B"])), max_size=6), st.integers(1, 12), st.integers(0, 11))
def test_every_character_stands_in_a_passage_that_is_not_too_long(pairs, size, overlap):
    rule = Chunking(size, min(overlap, size - 1))
    given_ = [Block(text, title) for text, title in pairs]
    made = list(chunk.chunk(given_, "x.txt", rule))
    whole = "\n\n".join(block.text for block in given_)
    covered = set()
    for passage in made:
        assert chunk.words(passage.text) <= size + len(passage.text) // 8 and passage.text.strip() == passage.text
        assert "".join(whole[passage.start : passage.end].split()) == "".join(passage.text.split())
        covered |= set(range(passage.start, passage.end))
    assert covered >= {i for i, c in enumerate(whole) if not c.isspace()}


def test_a_passage_begins_with_the_end_of_the_one_before(tmp_path):
    made = list(chunk.chunk([Block("One two. Three four. Five six. Seven.")], "x", Chunking(4, 2)))
    assert [p.text for p in made] == ["One two. Three four.", "Three four. Five six.", "Five six. Seven."]
    assert [p.text for p in chunk.chunk([Block("a b c d e f g")], "x", Chunking(3, 0))] == ["a b c", "d e f", "g"]
    for wrong in (dict(size=0), dict(size=4, overlap=4), dict(overlap=-1)):
        with pytest.raises(ValueError, match="size is at least 1"):
            Chunking(**wrong)


def test_a_passage_says_where_it_is_from():
    assert Passage("t", "a.pdf", "One › Two", page=3).place == "a.pdf, One › Two, page 3"
    assert Passage("t", "a.jsonl", page=3).place == "a.jsonl, line 3"
    keys = {Passage("t", "a").key, Passage("u", "a").key, Passage("t", "b").key, Passage("t", "a", start=1).key}
    assert len(keys) == 4


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="read takes one file, got a folder"):
        list(read.read(tmp_path))
