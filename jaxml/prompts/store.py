"""Answers that were paid for once, kept in a file: an interrupted search goes on, a finished one costs nothing."""

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

from jaxml import files

TORN = re.compile(rb'\["[0-9a-f]{0,32}|\["[0-9a-f]{32}"(,.*)?|\[')  # how a line begins, up to where it was cut off


class Store:
    """A dictionary on disk: one JSON object a line, each written whole; a torn last line is left out.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Store(Path(folder) / "answers.jsonl") as store:
        ...         store.put({"prompt": "1+1"}, 2)
        ...     with Store(Path(folder) / "answers.jsonl") as store:
        ...         store.get({"prompt": "1+1"})
        2
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self._kept: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._file = None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._read()
        self._file = self.path.open("a", encoding="utf-8")

    def get(self, question: Any) -> Any:
        """What was answered, or None."""
        return self._kept.get(key(question))

    def put(self, question: Any, answer: Any) -> None:
        """Keeps an answer (JSON); it is on disk when this returns."""
        answer = json.loads(json.dumps(answer))  # as it will be read
        with self._lock:
            self._kept[key(question)] = answer
            if self._file is not None:
                self._file.write(json.dumps([key(question), answer]) + "\n")
                self._file.flush()

    def answers(self) -> list[Any]:
        """All that were put, the newest of each question, in the order of their first."""
        return list(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().split(b"\n")
        torn = lines.pop()  # what follows the last line break: nothing, unless a write was cut off
        for number, line in enumerate(lines, 1):
            try:
                name, answer = json.loads(line)
                hash(name)
            except (ValueError, *files.IMPOSSIBLE) as error:
                raise ValueError(
                    f"{self.path}, line {number}: a kept answer is [key, answer] in JSON ({error}). Remove the line."
                ) from error
            self._kept[name] = answer
        if torn:
            if not TORN.fullmatch(torn):
                raise ValueError(f"{self.path}: its last line is no kept answer that was cut off; is it another file?")
            with self.path.open("rb+") as file:
                file.truncate(sum(len(line) + 1 for line in lines))


def key(question: Any) -> str:
    """A short name of whatever JSON can say.

    Example:
        >>> key({"prompt": "1+1", "seed": 0}) == key({"seed": 0, "prompt": "1+1"}), len(key("1+1"))
        (True, 32)
    """
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:32]
