"""Search by words: BM25 of the package bm25s, over the passages of a store."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxml import files, log
from jaxml.extras import need
from jaxml.rag.passages import Passage

WORD = r"(?u)\b\w+\b"
BM25 = dict(  # whatever a folder says of itself
    k1=1.5, b=0.75, delta=0.5, method="lucene", idf_method=None, dtype="float32", int_dtype="int32", backend="numpy",
    csc_backend="numpy",
)  # fmt: skip


class Lexical:
    """Passages by their words, as Lucene's BM25 weighs them (k1 1.5, b 0.75).

    Example:
        >>> made = Lexical.build([Passage("the cat sat", "a"), Passage("a dog ran", "b")])
        >>> [(key == Passage("a dog ran", "b").key) for key, score in made.search(["which dog?"], 2)[0]]
        [True]
    """

    def __init__(self, engine, keys: np.ndarray):
        self.engine, self.keys = engine, keys

    @classmethod
    def build(cls, passages: Iterable[Passage]) -> "Lexical":
        """Of all passages anew: how rare a word is depends on all of them.

        Raises:
            ValueError: no passages.
        """
        bm25s = need("bm25s", "rag")
        keys, texts = [], []
        for passage in passages:
            keys.append(passage.key.encode())
            texts.append(passage.whole)
        if not keys:
            raise ValueError("Lexical.build: at least one passage is given, got none.")
        engine, words = bm25s.BM25(), _words(bm25s, texts)
        if not any(words.ids):  # nothing but signs: one word that nobody asks for
            words = bm25s.tokenize(["_"] * len(texts), token_pattern=WORD, stopwords=None, show_progress=False)
        engine.index(words, show_progress=False)
        return cls(engine, np.array(keys, "S32"))

    def search(self, questions: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """For each question at most k (key, score), the best first; passages that share no word are not among them."""
        bm25s = need("bm25s", "rag")
        words = bm25s.tokenize(
            list(questions), token_pattern=WORD, stopwords=None, show_progress=False, return_ids=False
        )
        known = [[word for word in of if word in self.engine.vocab_dict] for of in words]
        out: list[list[tuple[str, float]]] = [[] for _ in questions]
        asked = [i for i, of in enumerate(known) if of]
        if asked:
            rows, scores = self.engine.retrieve(
                [known[i] for i in asked], k=min(k, len(self.keys)), show_progress=False, n_threads=0
            )
            for i, of, values in zip(asked, rows, scores):
                out[i] = [(self.keys[row].decode(), float(v)) for row, v in zip(of, values) if v > 0]
        return out

    def save(self, folder: str | Path, stamp: str) -> None:
        """Whole or not at all; `stamp` says what it was built from."""
        folder = Path(folder)
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        self.engine.save(str(part), show_progress=False)
        np.save(part / "keys.npy", self.keys, allow_pickle=False)
        log.write_text(part / "stamp.json", json.dumps({"stamp": stamp, "count": len(self.keys)}))
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    @classmethod
    def load(cls, folder: str | Path, stamp: str) -> "Lexical | None":
        """What was saved with this stamp; None where there is nothing, or what was built from something else."""
        folder = Path(folder)
        try:
            about = files.read_json(folder / "stamp.json")
            if about["stamp"] != stamp:
                return None
            if type(about["count"]) is not int:
                raise ValueError(f"a count is a whole number, got {about['count']!r}")
            keys = np.load(folder / "keys.npy", allow_pickle=False)
            engine = need("bm25s", "rag").BM25.load(
                str(folder), mmap=True, show_progress=False, override_params=BM25 | {"num_docs": about["count"]}
            )
            if keys.shape != (about["count"],) or keys.dtype != np.dtype("S32"):
                raise ValueError(f"keys are [{about['count']}] of S32, got {keys.shape} of {keys.dtype}")
            _check(engine, about["count"])
        except FileNotFoundError:
            return None
        except (ValueError, OSError, *files.IMPOSSIBLE) as error:
            raise ValueError(f"{folder}: damaged ({error}). Remove it; it is built again.") from error
        return cls(engine, keys)


def _check(engine: Any, count: int) -> None:
    """Refuses tables that point beyond each other; the package follows them wherever they point."""
    values, rows, starts = (np.asarray(engine.scores[name]) for name in ("data", "indices", "indptr"))
    whole = all(a.ndim == 1 and a.dtype.kind == kind for a, kind in ((values, "f"), (rows, "i"), (starts, "i")))
    if not whole or len(rows) != len(values) or not len(starts):
        raise ValueError("scores, their rows and where words begin are three lists of numbers")
    if starts[0] != 0 or starts[-1] != len(rows) or (np.diff(starts) < 0).any():
        raise ValueError("words begin one after the other")
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise ValueError(f"a score is of one of {count} passages")
    numbers = [i for word, i in engine.vocab_dict.items() if word]  # the empty one stands for no word
    if not all(isinstance(i, int) and 0 <= i < len(starts) - 1 for i in numbers):
        raise ValueError(f"a word is one of {len(starts) - 1}")


def _words(bm25s, texts: list[str]):
    return bm25s.tokenize(texts, token_pattern=WORD, stopwords=None, show_progress=False)
