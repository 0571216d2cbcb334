"""Questions with what is right, what is known to be wrong, and perhaps the passages that were found for them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxml import files
from jaxml.rag.passages import Passage
from jaxml.tune.data import read_lines

KEYS = ("question", "answers", "answer", "wrong", "passages")


class Question(NamedTuple):
    """A question; `passages` are None where they are to be searched for.

    Example:
        >>> one = Question("Who keeps the lighthouse?", ("Ada", "Ada Holm"), wrong=("Bob",))
        >>> one.answers, one.passages
        (('Ada', 'Ada Holm'), None)
    """

    question: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    passages: list[Passage] | None = None


def read(path: str) -> list[Question]:
    """Questions from JSONL, or from RAMDocs' file by ramdocs:FILE.

    Raises:
        FileNotFoundError, ValueError: no such file, an empty one, or a wrong line, by its number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(f"{folder}/q.jsonl").write_text('{"question": "1+1?", "answer": "2", "wrong": ["3"]}')
        ...     read(f"{folder}/q.jsonl")
        [Question(question='1+1?', answers=('2',), wrong=('3',), passages=None)]
    """
    kind, _, file = path.partition(":")
    if kind == "ramdocs" and file:
        return read_lines(file, ramdocs, "question")
    return read_lines(Path(path), question, "question")


def question(row: Any) -> Question:
    """A question from an object of a file.

    Example:
        >>> question({"question": "1+1?", "answer": "2", "passages": ["It is 2."]}).passages[0].source
        'passage 1'

    Raises:
        ValueError: an unknown key, a missing one, or a value of the wrong kind.
    """
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise ValueError(f"a question is an object with the keys {', '.join(KEYS)}, got {json.dumps(row)[:80]}.")
    if unknown := sorted(set(row) - set(KEYS)):
        raise ValueError(f"a question has the keys {', '.join(KEYS)}, got {', '.join(unknown)}.")
    if ("answer" in row) == ("answers" in row):
        raise ValueError("a question has answer or answers, got both or neither.")
    answers = _texts([row["answer"]] if "answer" in row else row["answers"], "answers")
    if not answers:
        raise ValueError("a question has at least one answer, got none.")
    passages = row.get("passages")
    if passages is not None:
        if not isinstance(passages, list):
            raise ValueError("passages are a list of texts, or of objects with text and source.")
        passages = [_passage(one, number) for number, one in enumerate(passages, 1)]
    return Question(row["question"].strip(), answers, _texts(row.get("wrong", []), "wrong"), passages)


def ramdocs(row: Any) -> Question:
    """A question of RAMDocs (Wang et al. 2025), with its documents as passages.

    Raises:
        ValueError: another form.

    Example:
        >>> documents = [{"text": "It is Ada.", "type": "correct"}, {"text": "It is Bob.", "type": "misinfo"}]
        >>> row = {"question": "who?", "documents": documents, "gold_answers": ["Ada"], "wrong_answers": ["Bob"]}
        >>> [passage.source for passage in ramdocs(row).passages]
        ['document 1 (correct)', 'document 2 (misinfo)']
    """
    try:
        documents = [(d["text"], d["type"]) for d in row["documents"]]
        right, wrong = (_texts(row[key], key) for key in ("gold_answers", "wrong_answers"))
        asked = row["question"]
    except files.IMPOSSIBLE as error:
        raise ValueError(
            f"a question of RAMDocs has question, documents, gold_answers, wrong_answers ({error!r})."
        ) from error
    if not isinstance(asked, str) or not all(isinstance(text, str) for pair in documents for text in pair):
        raise ValueError("a question of RAMDocs, its documents' text and their type are texts.")
    passages = [Passage(text, f"document {i} ({kind})", start=i) for i, (text, kind) in enumerate(documents, 1)]
    return Question(asked, right, wrong, passages)


def _passage(one: Any, number: int) -> Passage:
    if isinstance(one, str):
        one = {"text": one}
    if (
        not isinstance(one, dict)
        or set(one) - {"text", "source", "title"}
        or not all(isinstance(value, str) for value in one.values())
        or not one.get("text", "").strip()
    ):
        raise ValueError(f"passage {number} is a text, or an object with text and where there is one source and title.")
    return Passage(one["text"], one.get("source", f"passage {number}"), one.get("title", ""), start=number)


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"{name} are a list of texts, none empty, got {json.dumps(values)[:80]}.")
    return tuple(values)
