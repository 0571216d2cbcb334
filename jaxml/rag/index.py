"""An index in a folder: what was read from which file, the passages with their vectors, their words.

```python
index = rag.Index.create("runs/index", encoder.load())
index.update("docs/")
index.search(["who keeps the lighthouse?"], 5)
```
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxml import files, log
from jaxml.lm.encoder import Encoder
from jaxml.prompts.llm import LLM, fingerprint
from jaxml.prompts.store import Store as Kept
from jaxml.rag import read, retrieve
from jaxml.rag.chunk import USUAL, Chunking, chunk
from jaxml.rag.lexical import Lexical
from jaxml.rag.passages import Passage
from jaxml.rag.store import Folder, Hit, Store

FORMAT = 1
PART = 1024  # passages that are encoded and kept at once
SEGMENTS = 16  # of a folder; more than these are made one
WAYS = ("hybrid", "dense", "lexical")


@dataclasses.dataclass
class Changes:
    """What an update did, in files; `refused` names those that cannot be read, and why.

    Example:
        >>> Changes(added=2, passages=5).unchanged
        0
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    passages: int = 0
    refused: list[str] = dataclasses.field(default_factory=list)


class Index:
    """Passages that are found by meaning and by words.

    Args:
        path: of an existing index.
        encoder: the one it was made with.
        store: where the passages are, if not in the folder (`rag.qdrant.Qdrant`).

    Raises:
        FileNotFoundError: no index there.
        ValueError: made by another encoder or format, or damaged.

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     index = Index.create(f"{folder}/index", testing.TinyEncoder())
        ...     count = index.add([Passage("Ada keeps the lighthouse.", "a"), Passage("Carl bakes bread.", "b")])
        ...     index.search(["who bakes?"], 1)[0][0].passage.source
        'b'
    """

    def __init__(self, path: str | Path, encoder: Encoder, store: Store | None = None):
        self.path, self.encoder = Path(path), encoder
        about = check(self.path)
        if (name := fingerprint(encoder)) != about["encoder"]:
            raise ValueError(
                f"{self.path}: this index was made by the encoder {about['encoder']}, got {name}. Open it with that "
                "one, or make another index."
            )
        self.chunking = about["chunking"]
        self.store = store if store is not None else Folder(self.path / "store")
        self._lexical: tuple[Any, Lexical] | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        encoder: Encoder,
        chunking: Chunking = USUAL,
        *,
        store: Store | None = None,
        **options,
    ) -> "Index":
        """An empty index.

        Args:
            options: of `Folder.create`.

        Raises:
            FileExistsError: an index is there.
        """
        path = Path(path)
        if (path / "index.json").exists():
            raise FileExistsError(f"{path}: an index is there. Open it, or choose another folder.")
        path.mkdir(parents=True, exist_ok=True)
        if store is None and not (path / "store" / "store.json").exists():  # left by a creation that was cut off
            Folder.create(path / "store", encoder.config.width, **options)
        about = {"format": FORMAT, "encoder": fingerprint(encoder), "chunking": dataclasses.asdict(chunking)}
        log.write_text(path / "index.json", json.dumps(about, indent=1))
        return cls(path, encoder, store)

    def __len__(self) -> int:
        return len(self.store)

    def update(
        self,
        folder: str | Path,
        limits: read.Limits = read.USUAL,
        *,
        tick: Callable[[int, int], None] | None = None,
    ) -> Changes:
        """Reads what is new or changed in a folder, or a file, and forgets what is gone.

        Files that an earlier update read from elsewhere stay, unless they are gone. What was done is kept after every
        `PART` passages; an update that was interrupted goes on from there. A file that cannot be read is named in the
        changes, and what was known of it stays. (The text of what was deleted stays on disk until segments are made
        one.)

        Args:
            tick: told (files dealt with, of how many).

        Raises:
            FileNotFoundError, ValueError: no such folder, no file in it that can be read, or another process that is
                at it.
        """
        root, changes = Path(folder), Changes()
        if (self.path / "files.jsonl").is_symlink():
            raise ValueError(f"{self.path / 'files.jsonl'}: a plain file of the index's own. Remove the link.")
        with _alone(self.path), Kept(self.path / "files.jsonl") as kept:
            files = _Files(self, kept, changes)
            files.forget_gone(root.resolve())
            try:
                found = read.find(root)
            except (FileNotFoundError, ValueError):
                if not changes.removed:
                    raise
                found = []  # all that there was is gone
            for number, path in enumerate(found, 1):
                files.read(path, limits)
                if tick:
                    tick(number, len(found))
            files.flush()
            if isinstance(self.store, Folder) and len(self.store.segments) > SEGMENTS:
                self.store.compact()
        return changes

    def add(self, passages: Sequence[Passage]) -> int:
        """Passages from elsewhere than a file; how many were new."""
        count = 0
        for first in range(0, len(passages), PART):
            part = passages[first : first + PART]
            count += self.store.add(part, np.asarray(self.encoder([p.whole for p in part])))
        return count

    def search(
        self,
        questions: Sequence[str],
        k: int = 5,
        *,
        how: str = "hybrid",
        pool: int = 4,
        trade: float | None = None,
        llm: LLM | None = None,
    ) -> list[list[Hit]]:
        """For each question the k best passages, the best first.

        Args:
            how: "dense" by meaning, "lexical" by words, "hybrid" by both, fused by their ranks.
            pool: times k are looked at, where rankings are fused or hits chosen anew.
            trade: choose different passages (`retrieve.diverse`).
            llm: order by how likely it finds the question after each passage (`retrieve.likely`).

        Raises:
            ValueError: another way, or no question.
        """
        if how not in WAYS or isinstance(questions, str) or k < 1:
            raise ValueError(
                f"Index.search: how is one of {', '.join(WAYS)}, questions are a list and k is at least 1, got "
                f"{how!r}, {questions!r} and {k}."
            )
        if not questions or not len(self.store):
            return [[] for _ in questions]
        wide = k if how != "hybrid" and trade is None and llm is None else k * pool
        rankings = []
        if how != "lexical":
            rankings.append(self.store.search(np.asarray(self.encoder(list(questions))), wide))
        if how != "dense":
            rankings.append(self._by_words(questions, wide))
        out = []
        for question, *lists in zip(questions, *rankings):
            hits = retrieve.fuse(lists) if len(lists) > 1 else lists[0]
            hits = retrieve.likely(llm, question, hits[:wide]) if llm is not None else hits
            hits = retrieve.diverse(self.encoder, question, hits, k, trade=trade) if trade is not None else hits
            out.append(hits[:k])
        return out

    def _by_words(self, questions: Sequence[str], k: int) -> list[list[Hit]]:
        found = self.lexical.search(questions, k)
        keys = list(dict.fromkeys(key for of in found for key, _ in of))
        try:
            passages = dict(zip(keys, self.store.passages(keys)))
        except KeyError as error:
            raise ValueError(f"{self.path / 'lexical'}: names a passage that is not there. Remove it.") from error
        return [[Hit(passages[key], score) for key, score in of] for of in found]

    @property
    def lexical(self) -> Lexical:
        """The words of all passages; built where the store has changed, and kept in the folder."""
        ledger = self.path / "files.jsonl"  # grows with each change that an update makes, wherever the store is
        stamp = f"{len(self.store)}-{self.store.revision}-{ledger.stat().st_size if ledger.is_file() else 0}"
        if self._lexical is None or self._lexical[0] != stamp:
            try:
                made = Lexical.load(self.path / "lexical", stamp)
            except ValueError:  # damaged; it is made of what the store has
                made = None
            if made is None:
                made = Lexical.build(self.store.passages())
                made.save(self.path / "lexical", stamp)
            self._lexical = (stamp, made)
        return self._lexical[1]


class _Files:
    """What an update knows of files: their hashes and the keys of their passages, which several may share.

    A file is known by its resolved path. While it is being read, what is in the store of it already stands under an
    empty hash: an update that was interrupted leaves nothing that the next one does not know.
    """

    def __init__(self, index: Index, kept: Kept, changes: Changes):
        self.index, self.kept, self.changes = index, kept, changes
        if wrong := [about for about in kept.answers() if not _sound(about)]:
            said = json.dumps(wrong[0])[:80]
            raise ValueError(
                f"{kept.path}: a file has a name, a hash and keys, got {said}. Remove it; all is read again."
            )
        self.known = {about["file"]: about for about in kept.answers() if about["keys"] is not None}
        self.held = Counter(key for about in self.known.values() for key in about["keys"])
        self.passages: list[Passage] = []  # that are not in the store yet
        self.whole: list[tuple[dict[str, Any], dict | None]] = []  # files that are read, and what was known of them

    def forget_gone(self, root: Path) -> None:
        for name in [n for n in self.known if Path(n).is_relative_to(root) and not Path(n).is_file()]:
            self._note({"file": name, "hash": "", "keys": None})
            self.changes.removed += 1

    def read(self, path: Path, limits: read.Limits) -> None:
        name, keys, before, mine = str(path.resolve()), [], None, 0  # how many of its passages are not in the store
        try:
            hash_ = _hash(path)
            before = self.known.get(name)
            if before is not None and before["hash"] == hash_:
                self.changes.unchanged += 1
                return
            for passage in chunk(read.read(path, limits), str(path), self.index.chunking):
                keys.append(passage.key)
                self.passages.append(passage)
                mine += 1
                if len(self.passages) >= PART:
                    self._note({"file": name, "hash": "", "keys": list({*keys, *(before or {"keys": ()})["keys"]})})
                    self.flush()
                    mine = 0
        except (ValueError, OSError) as error:
            del self.passages[len(self.passages) - mine :]
            if self.known.get(name) is not before:
                self._note(before or {"file": name, "hash": "", "keys": None})
            self.changes.refused.append(str(error).encode("utf-8", "replace").decode())
            return
        self.whole.append(({"file": name, "hash": hash_, "keys": keys}, before))

    def flush(self) -> None:
        """Puts what was read into the store, and writes down the files that are whole."""
        self.changes.passages += self.index.add(self.passages)
        self.passages = []
        for about, before in self.whole:
            self._note(about)
            new = before is None or not before["hash"]  # or begun by an update that was interrupted
            self.changes.added += new
            self.changes.changed += not new
        self.whole = []

    def _note(self, about: dict[str, Any]) -> None:
        """Writes down what is known of a file, and deletes the passages that no file holds any more."""
        before = self.known.pop(about["file"], {"keys": []})["keys"]
        if about["keys"] is not None:
            self.known[about["file"]] = about
            self.held.update(about["keys"])
        self.held.subtract(before)
        waiting = {key for of, _ in self.whole for key in of["keys"]}
        free = [key for key in dict.fromkeys(before) if self.held[key] <= 0 and key not in waiting]
        if free:  # a process that is killed before they are gone leaves a file that is read, or forgotten, again
            both = list(dict.fromkeys([*before, *(about["keys"] or [])]))
            self.kept.put(about["file"], {"file": about["file"], "hash": "", "keys": both})
            self.index.store.delete(free)
        self.kept.put(about["file"], about)


def _sound(about: Any) -> bool:
    """Whether it is what `_note` writes of a file."""
    if not isinstance(about, dict) or set(about) != {"file", "hash", "keys"}:
        return False
    keys = about["keys"] or []
    texts = isinstance(about["file"], str) and isinstance(about["hash"], str)
    return texts and isinstance(keys, list) and all(isinstance(key, str) for key in keys)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes from changing an index.

    Raises:
        ValueError: one is at it.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(files.locked(path / "lock"))
        except BlockingIOError as error:
            raise ValueError(f"{path}: another process is changing this index. Wait until it is done.") from error
        except OSError as error:
            raise ValueError(f"{path / 'lock'}: a plain file of the index's own ({error}). Remove it.") from error
        yield


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: str | Path) -> dict[str, Any]:
    """What an index says of itself: the encoder's fingerprint and the chunking.

    Raises:
        FileNotFoundError, ValueError: no index there, or a damaged one.

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = Index.create(folder, testing.TinyEncoder(), Chunking(size=60))
        ...     check(folder)["chunking"]
        Chunking(size=60, overlap=24)
    """
    path = Path(path) / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent}: no index there (index.json is missing). Make one: jaxml rag index, or rag.Index.create."
        )
    try:
        about = files.read_json(path)
        good = about["format"] == FORMAT and isinstance(about["encoder"], str)
        about["chunking"] = Chunking(**about["chunking"])
    except (ValueError, *files.IMPOSSIBLE) as error:
        raise ValueError(f"{path}: damaged ({error!r}). Make the index again.") from error
    if not good:
        raise ValueError(f"{path}: an index of format {FORMAT}, got {about['format']!r}. Make it again.")
    return about
