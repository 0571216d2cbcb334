"""`jaxml rag`, with an encoder and a model that are instant."""

import json

import pytest

from jaxml.cli.main import main
from jaxml.rag.scripted import Scripted
from jaxml.testing import TinyEncoder as Words
from tests.prompts.server import Script, serve


@pytest.fixture(autouse=True)
def instant(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("jaxml.lm.encoder.load", lambda name: Words())
    monkeypatch.setattr("jaxml.cli.rag.llm", lambda args, **how: Scripted({"who?": "ada"}, sure=frozenset({"who?"})))


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("On who: the answer is bob.")
    (folder / "b.md").write_text("# Who\n\nOf who it is said that the answer is ada.")
    (folder / "c.pdf").write_bytes(b"broken")
    return folder


def refused(capsys, *argv):
    assert main([str(a) for a in argv]) == 2
    return capsys.readouterr().err


def test_documents_are_indexed_and_asked(docs, tmp_path, capsys):
    index = ["rag", "index", docs, "--out", tmp_path / "index", "--no-progress"]
    assert main([str(a) for a in index]) == 0
    said = capsys.readouterr().out
    assert "left out: " in said and "c.pdf" in said and "2 files added" in said and "2 passages" in said
    assert main([str(a) for a in index]) == 0
    assert "2 as they were" in capsys.readouterr().out
    assert "have size 120 and overlap 24, got 50" in refused(capsys, *index, "--size", 50)
    page = tmp_path / "pages" / "out.html"
    ask = ["rag", "ask", "who?", "--index", tmp_path / "index", "--trace", page]
    assert main([str(a) for a in ask]) == 0
    said = capsys.readouterr().out
    assert "→ ada" in said and "b.md, Who" in said and "group 2" in said
    assert "<article>" in page.read_text()
    assert "at least one question" in refused(capsys, "rag", "ask", "--index", tmp_path / "index")
    for options, message in (
        (["--rounds", 2], "--rounds is of --mode prompt"), (["--k", 0], "--k is at least 1, got 0"),
        (["--mode", "score", "--least", 7], "in [0, 1]"), (["--limit", 3], "--limit is not of ask"),
        (["--method", "plain", "--mode", "score"], "--mode is not of --method plain"),
        (["--form", "lines"], "--form is not of --method astute"), (["--trust", 0.7], "--trust is of --mode score"),
        (["--mode", "score", "--reliability", 2], "--reliability is in [0, 1], got 2.0"),
        (["--mode", "score", "--sure", docs], "no finished run"),
    ):  # fmt: skip
        assert message in refused(capsys, *ask, *options)
    assert "searched without codes" in refused(capsys, *index, "--codes")
    assert main(["rag", "ask", "who?", "--method", "none"]) == 0 and "→ ada" in capsys.readouterr().out


def test_methods_are_evaluated_and_an_evaluation_goes_on(docs, tmp_path, capsys):
    rows = [
        {
            "question": "who?",
            "answer": "ada",
            "wrong": ["bob"],
            "passages": ["the answer is bob.", "the answer is ada."],
        },
        {"question": "what?", "answers": ["gold"], "passages": [{"text": "the answer is gold.", "source": "s"}]},
    ]
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["rag", "evaluate", "--data", data, "--out", tmp_path / "run", "--no-progress"]
    assert main([str(a) for a in command]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())["methods"]
    assert set(report) == {"none", "plain", "consistent", "isolated", "generated", "routed", "instructed", "astute"}
    assert report["astute"]["contains"] == 1.0 and report["none"]["contains"] == 0.5
    assert report["plain"]["wrong"] == 0.5
    assert report["plain"]["exact_interval"] == [None, None]  # of two questions; JSON has no NaN
    assert "| astute | 100.0%" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "astute.html").read_text().count("<article>") == 2
    size = (tmp_path / "run" / "replies.jsonl").stat().st_size
    assert main([str(a) for a in command]) == 0 and (tmp_path / "run" / "replies.jsonl").stat().st_size == size
    data.write_text('{"question": "who?", "answer": "ada"}\n')
    assert "an --index is given" in refused(capsys, *command)


def test_an_endpoint_that_fails_in_the_middle_is_not_paid_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # the real `llm`
    answer = {"choices": [{"message": {"content": "ada"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    script = Script(*["ok"] * 7, 401, answer=lambda path, body: answer)
    data = tmp_path / "q.jsonl"
    rows = [{"question": f"who {i}?", "answer": "ada", "passages": [f"{i}: ada", "bob"]} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(script) as url:
        command = ["rag", "evaluate", "--data", data, "--out", tmp_path / "run", "--model", f"{url}#m", "--no-progress"]
        command += ["--methods", "plain", "isolated"]
        assert "401" in refused(capsys, *command)
        failed = len(script.requests) - 7
        script.steps = ["ok"]
        assert main([str(a) for a in command]) == 0
    # 4 without passages, 4 with both, 8 with one
    assert failed > 0 and len(script.requests) - failed == 16
    report = json.loads((tmp_path / "run" / "report.json").read_text())["methods"]
    assert report["isolated"]["exact"] == 1.0


def test_what_cannot_be_done_is_said(tmp_path, capsys):
    assert "no such file or folder" in refused(capsys, "rag", "index", tmp_path / "none", "--out", tmp_path / "i")
    (tmp_path / "empty").mkdir()
    assert "no file to read" in refused(capsys, "rag", "index", tmp_path / "empty", "--out", tmp_path / "i")
    assert "one FOLDER to read" in refused(capsys, "rag", "index")
    assert "no index there" in refused(capsys, "rag", "ask", "who?", "--index", tmp_path / "none")
    assert "--data and --out" in refused(capsys, "rag", "evaluate")
    assert not (tmp_path / "i").exists()
