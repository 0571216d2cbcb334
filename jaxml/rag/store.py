"""Passages with their vectors on disk: segments that are memory-mapped, added to, deleted from, searched exactly.

folder/
  store.json               what it is made of: read first, written last
  segment-000001/          vectors.npy, codes.npy and scales.npy, keys.npy, offsets.npy, passages.jsonl
  dead-000002.npy          rows of a segment that were deleted
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxml import files, log
from jaxml.rag import dense
from jaxml.rag.passages import Passage

DTYPES = ("float32", "float16")
FORMAT = 1
REFINE = 8  # candidates of codes that are ranked again, for each that is wanted


class Hit(NamedTuple):
    """A passage that was found.

    Example:
        >>> Hit(Passage("Oslo is the capital.", "norway.md"), 0.9).passage.source
        'norway.md'
    """

    passage: Passage
    score: float


class Store(Protocol):
    """What retrieval asks of a place that keeps passages with their vectors.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store: Store = Folder.create(f"{folder}/store", width=2)
        ...     store.add([Passage("a", "x")], np.ones((1, 2), np.float32)), len(store)
        (1, 1)
    """

    revision: Any  # another one after each change, where the store can tell

    def __len__(self) -> int: ...

    def add(self, passages: Sequence[Passage], vectors: np.ndarray) -> int:
        """Keeps them, [n, D] float32 of length 1; those whose keys are there stay as they are. How many were new."""
        ...

    def delete(self, keys: Sequence[str]) -> int:
        """Forgets the passages with these keys. How many there were."""
        ...

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """For each of [Q, D] vectors, the k passages with the largest products, the best first."""
        ...

    def passages(self, keys: Sequence[str] | None = None) -> Iterator[Passage]:
        """Those with these keys, in their order; or all, in an order that stays."""
        ...


class Folder:
    """A store in a folder of this machine.

    Args:
        path: an existing store.
        devices: over which the vectors are spread for searching.

    Raises:
        FileNotFoundError: no store there.
        ValueError: a store of another format, or one with damaged files, by name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Folder.create(folder + "/store", width=2)
        ...     count = store.add([Passage("a", "x"), Passage("b", "y")], np.eye(2, dtype=np.float32))
        ...     [hit.passage.text for hit in store.search(np.array([[0.1, 0.9]], np.float32), 2)[0]]
        ['b', 'a']
    """

    def __init__(self, path: str | Path, devices: Sequence[Any] | None = None):
        self.path, self.devices = Path(path), devices
        self._about = _read(self.path / "store.json")
        self.width, self.dtype, self.codes = (self._about[k] for k in ("width", "dtype", "codes"))
        self.segments = [_Segment.open(self.path, e, self._about) for e in self._about["segments"]]
        self._matrix: dense.Matrix | None = None
        self._order: tuple[np.ndarray, np.ndarray] | None = None  # rows by key, and the keys
        self._keys: set[bytes] | None = None  # that are there

    @classmethod
    def create(
        cls, path: str | Path, width: int, *, dtype: str = "float32", codes: bool = False, devices=None
    ) -> "Folder":
        """An empty store.

        Args:
            width: D, of the vectors.
            dtype: of the vectors on disk, float32 or float16.
            codes: search among int8 codes (a quarter of the memory), then rank `REFINE` times as many as are wanted
                exactly.

        Raises:
            FileExistsError: a store is there.
            ValueError: an unknown dtype or a width below 1.
        """
        path = Path(path)
        if (path / "store.json").exists():
            raise FileExistsError(f"{path}: a store is there. Open it, or choose another folder.")
        if dtype not in DTYPES or width < 1:
            raise ValueError(f"Folder.create: dtype is one of {', '.join(DTYPES)} and width at least 1, got {dtype!r} "
                             f"and {width}.")  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "width": width, "dtype": dtype, "codes": codes, "next": 1, "segments": []}
        log.write_text(path / "store.json", json.dumps(about, indent=1))
        return cls(path, devices)

    def __len__(self) -> int:
        self._follow()
        return sum(s.alive for s in self.segments)

    @property
    def revision(self) -> int:
        """Grows with each change."""
        self._follow()
        return self._about["next"]

    def _follow(self) -> None:
        """Takes over what another process has changed."""
        if (about := _read(self.path / "store.json")) != self._about:
            self._take(about)

    def add(self, passages: Sequence[Passage], vectors: np.ndarray) -> int:
        vectors = np.asarray(vectors)
        if vectors.shape != (len(passages), self.width):
            raise ValueError(f"Folder.add: vectors are [{len(passages)}, {self.width}], got {vectors.shape}.")
        if not np.isfinite(vectors).all():
            bad = passages[int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])]
            raise ValueError(f"Folder.add: vectors are finite, that of a passage of {bad.source} is not.")
        self._follow()
        if self._keys is None:
            self._keys = {key for s in self.segments for key in s.keys[~s.dead].tolist()}
        new: dict[bytes, int] = {}
        for i, passage in enumerate(passages):
            key = passage.key.encode()
            if key not in self._keys:
                new.setdefault(key, i)
        if new:
            rows = list(new.values())
            name, number = self._name("segment")
            _write_segment(self.path / name, [passages[i] for i in rows], vectors[rows], self.dtype, self.codes)
            entry = {"name": name, "count": len(rows), "dead": None}
            there = self._keys
            self._commit([*self._about["segments"], entry], number + 1)
            self._keys = there | set(new)
        return len(new)

    def delete(self, keys: Sequence[str]) -> int:
        self._follow()
        wanted = np.array([key.encode() for key in keys if len(key) == 32], "S32")
        entries, number, count = [], self._about["next"], 0
        for segment, entry in zip(self.segments, self._about["segments"]):
            hit = np.isin(segment.keys, wanted) & ~segment.dead
            if hit.any():
                count += int(hit.sum())
                name = f"dead-{number:06d}.npy"
                number += 1
                _save(self.path / name, segment.dead | hit)
                entry = entry | {"dead": name}
            entries.append(entry)
        if count:
            self._commit(entries, number)
        return count

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        if not len(self):
            return [[] for _ in vectors]
        vectors = np.asarray(vectors, np.float32)
        wide = min(k * REFINE, len(self)) if self.codes else k
        scores, rows = (np.asarray(a) for a in dense.search(self.matrix, vectors, wide))
        if self.codes:
            scores, rows = dense.refine(_Rows(self.segments), vectors, rows, k)
        found = [[(float(s), int(r)) for s, r in zip(of, at) if r >= 0] for of, at in zip(scores, rows)]
        return [[Hit(self._passage(r), s) for s, r in one] for one in found]

    def passages(self, keys: Sequence[str] | None = None) -> Iterator[Passage]:
        self._follow()
        if keys is None:
            for segment in self.segments:
                yield from segment.passages()
            return
        if keys and not self.segments:
            raise KeyError(f"{self.path}: no passage has the key {keys[0]!r}.")
        if self._order is None and self.segments:
            all_ = np.concatenate([np.where(s.dead, b"", s.keys) for s in self.segments])
            self._order = (order := np.argsort(all_), all_[order])
        if not keys:
            return
        order, ordered = self._order
        wanted = np.array([key.encode() for key in keys], "S32")
        places = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        for key, place in zip(wanted, places):
            if not key or ordered[place] != key:
                raise KeyError(f"{self.path}: no passage has the key {key.decode()!r}.")
            yield self._passage(int(order[place]))

    def compact(self) -> None:
        """Makes one segment of all, without what was deleted."""
        if len(self.segments) < 2 and not any(s.dead.any() for s in self.segments):
            return
        name, number = self._name("segment")
        passages = list(self.passages())
        vectors = np.concatenate([s.vectors[~s.dead] for s in self.segments]) if passages else None
        entries = []
        if passages:
            _write_segment(self.path / name, passages, vectors, self.dtype, self.codes)
            entries = [{"name": name, "count": len(passages), "dead": None}]
        self._commit(entries, number + 1)

    @property
    def matrix(self) -> dense.Matrix:
        """All vectors where they are searched; made at the first search after a change."""
        if self._matrix is None:
            join = lambda name: np.concatenate([getattr(s, name) for s in self.segments])
            one = len(self.segments) == 1
            take = lambda name: getattr(self.segments[0], name) if one else join(name)
            codes = dict(scales=take("scales")) if self.codes else {}
            self._matrix = dense.place(
                take("codes" if self.codes else "vectors"), dead=take("dead"), devices=self.devices, **codes
            )
        return self._matrix

    def _passage(self, row: int) -> Passage:
        for segment in self.segments:
            if row < len(segment.keys):
                return segment.passage(row)
            row -= len(segment.keys)
        raise IndexError(row)

    def _name(self, kind: str) -> tuple[str, int]:
        return f"{kind}-{self._about['next']:06d}", self._about["next"]

    def _commit(self, segments: list[dict], number: int) -> None:
        """The new state, at once; then what no longer belongs to it is removed."""
        about = self._about | {"segments": segments, "next": number}
        if _read(self.path / "store.json") != self._about:
            raise ValueError(f"{self.path}: another process has changed this store in the meantime. Try again.")
        log.write_text(self.path / "store.json", json.dumps(about, indent=1))
        self._take(about)
        kept = {name for entry in segments for name in (entry["name"], entry["dead"]) if name}
        for path in self.path.iterdir():
            if path.name.startswith(("segment-", "dead-", ".segment-")) and path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _take(self, about: dict[str, Any]) -> None:
        opened = {json.dumps(e): s for e, s in zip(self._about["segments"], self.segments)}
        entries = about["segments"]
        self.segments = [opened.get(json.dumps(e)) or _Segment.open(self.path, e, about) for e in entries]
        self._about = about
        self._matrix = self._order = self._keys = None


@dataclasses.dataclass
class _Segment:
    """Rows that were added together; arrays are memory maps."""

    path: Path
    keys: np.ndarray  # [n] S32
    offsets: np.ndarray  # [n + 1] int64, of lines in passages.jsonl
    vectors: np.ndarray  # [n, D]
    codes: np.ndarray | None  # [n, D] int8
    scales: np.ndarray | None  # [n]
    dead: np.ndarray  # [n] bool

    @classmethod
    def open(cls, folder: Path, entry: dict, about: dict) -> "_Segment":
        path, n, width, coded = folder / entry["name"], entry["count"], about["width"], about["codes"]
        array = lambda name, shape, dtypes: _load(path / f"{name}.npy", shape, dtypes)
        made = cls(
            path, array("keys", (n,), ("S32",)), array("offsets", (n + 1,), ("int64",)),
            array("vectors", (n, width), DTYPES), array("codes", (n, width), ("int8",)) if coded else None,
            array("scales", (n,), ("float32",)) if coded else None,
            _load(folder / entry["dead"], (n,), ("bool",)) if entry["dead"] else np.zeros(n, bool),
        )  # fmt: skip
        if not (path / "passages.jsonl").is_file() or (path / "passages.jsonl").stat().st_size != made.offsets[-1]:
            raise ValueError(f"{path / 'passages.jsonl'}: cut off or missing. Make the index again.")
        if made.offsets[0] != 0 or (np.diff(made.offsets) < 0).any():
            raise ValueError(f"{path / 'offsets.npy'}: damaged. Make the index again.")
        return made

    @property
    def alive(self) -> int:
        return int((~self.dead).sum())

    def passage(self, row: int) -> Passage:
        with (self.path / "passages.jsonl").open("rb") as file:
            file.seek(self.offsets[row])
            return self._parse(file.read(int(self.offsets[row + 1] - self.offsets[row])))

    def passages(self) -> Iterator[Passage]:
        with (self.path / "passages.jsonl").open("rb") as file:
            for line, dead in zip(file, self.dead):
                if not dead:
                    yield self._parse(line)

    def _parse(self, line: bytes) -> Passage:
        try:
            passage = Passage(**json.loads(line))
            for field in dataclasses.fields(passage):
                if not isinstance(getattr(passage, field.name), field.type):
                    raise ValueError(f"a passage's {field.name} is of type {field.type.__name__}")
            return passage
        except (ValueError, *files.IMPOSSIBLE) as error:
            raise ValueError(f"{self.path / 'passages.jsonl'}: damaged ({error}). Make the index again.") from error


class _Rows:
    """Rows of all segments by their numbers, as `dense.refine` reads them."""

    def __init__(self, segments: Sequence[_Segment]):
        self.segments = segments
        self.starts = np.cumsum([0, *(len(s.keys) for s in segments)])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        flat = np.maximum(rows.reshape(-1), 0)
        of = np.searchsorted(self.starts, flat, side="right") - 1
        out = np.empty((len(flat), self.segments[0].vectors.shape[1]), np.float32)
        for i in np.unique(of):
            here = np.flatnonzero(of == i)
            out[here] = self.segments[i].vectors[flat[here] - self.starts[i]]
        return out.reshape(*rows.shape, -1)


def _write_segment(path: Path, passages: Sequence[Passage], vectors: np.ndarray, dtype: str, codes: bool) -> None:
    """A segment's folder, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    _save(part / "vectors.npy", np.asarray(vectors, dtype))
    if codes:
        made, scales = dense.quantize(vectors)
        _save(part / "codes.npy", made)
        _save(part / "scales.npy", scales)
    offsets = [0]
    with (part / "passages.jsonl").open("wb") as file:
        for passage in passages:
            offsets.append(offsets[-1] + file.write(json.dumps(dataclasses.asdict(passage)).encode() + b"\n"))
    _save(part / "offsets.npy", np.array(offsets, np.int64))
    _save(part / "keys.npy", np.array([p.key.encode() for p in passages], "S32"))
    shutil.rmtree(path, ignore_errors=True)  # left by a process that was killed before it committed
    os.replace(part, path)


def _save(path: Path, a: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, a, allow_pickle=False)


def _load(path: Path, shape: tuple[int, ...], dtypes: Sequence[str]) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: missing. Make the index again.")
    try:
        a = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, *files.IMPOSSIBLE) as error:
        raise ValueError(f"{path}: damaged ({error}). Make the index again.") from error
    if not isinstance(a, np.ndarray):
        raise ValueError(f"{path}: one array, got several. Make the index again.")
    if a.shape != shape or a.dtype not in [np.dtype(d) for d in dtypes]:
        raise ValueError(f"{path}: {shape} of {' or '.join(dtypes)}, got {a.shape} of {a.dtype}. Make the index again.")
    return a


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no store there.")
    try:
        about = files.read_json(path)
        entries = [(e["name"], e["count"], e["dead"]) for e in about["segments"]]
        good = about["format"] == FORMAT and about["dtype"] in DTYPES
        good = good and all(isinstance(about[k], int) for k in ("width", "codes", "next"))
        simple = lambda name: Path(name).name == name and name not in ("", "..")
        plain = all(simple(n) and (d is None or simple(d)) and isinstance(c, int) for n, c, d in entries)
    except (ValueError, *files.IMPOSSIBLE) as error:
        raise ValueError(f"{path}: damaged ({error!r}). Make the index again.") from error
    if not good or not plain:
        raise ValueError(f"{path}: a store of format {FORMAT}, got {about.get('format')!r} or a damaged one.")
    return about
