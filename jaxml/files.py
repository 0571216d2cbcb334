"""Files from elsewhere: whatever their bytes are, a reader gives a value or one clear sentence."""

import contextlib
import fcntl
import json
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 2**20
JSON_BYTES = 128 * MIB  # the largest tokenizer.json and index files have tens of MiB; in memory 24 times as much

# What a reader runs into when a file says something that cannot be: always the file's fault, never a usual outcome.
IMPOSSIBLE = (
    LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, EOFError, RecursionError, MemoryError,
    StopIteration, SyntaxError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@contextlib.contextmanager
def reading(path: str | Path, what: str, more: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Within it a file is read: what its content makes impossible becomes a ValueError that names the file.

    Args:
        what: it should be, as "a GGUF file".
        more: errors of the library that reads it.

    Raises:
        ValueError: in the place of those errors; others pass.

    Example:
        >>> with reading("a.json", "an adapter"):
        ...     {}["rank"]
        Traceback (most recent call last):
        ...
        ValueError: a.json: not a whole file, or not that of an adapter (KeyError: 'rank').
    """
    try:
        yield
    except (*IMPOSSIBLE, *more) as error:
        said = (str(error).splitlines() or [""])[0][:300]
        kind = type(error).__name__
        raise ValueError(f"{path}: not a whole file, or not that of {what} ({kind}: {said}).") from error


def check_stored(archive: zipfile.ZipFile, size: int, where: str | Path) -> None:
    """Refuses an archive of `size` bytes that is more when it is read: compressed, or of parts that overlap.

    Raises:
        ValueError: it is.

    Example:
        >>> import io
        >>> with zipfile.ZipFile(io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        ...     archive.writestr("data.pkl", "0" * 1000)
        ...     check_stored(archive, 200, "model.pt")
        Traceback (most recent call last):
            ...
        ValueError: model.pt: data.pkl is compressed, as nothing in such a file is.
    """
    members = archive.infolist()
    if packed := [member.filename for member in members if member.compress_type]:
        raise ValueError(f"{where}: {packed[0]} is compressed, as nothing in such a file is.")
    if sum(member.file_size for member in members) > size:
        raise ValueError(f"{where}: its parts are larger than itself.")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it nobody else has this lock, a plain file that is made if it is not there.

    Raises:
        BlockingIOError: another process, or another part of this one, has it.
        OSError: it cannot be made, or is a link.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +IGNORE_EXCEPTION_DETAIL
        ...     with locked(Path(folder, "lock")), locked(Path(folder, "lock")):
        ...         print("twice")
        Traceback (most recent call last):
            ...
        BlockingIOError: [Errno 11] Resource temporarily unavailable
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # a file system without locks
            said = f"{path.parent}: cannot be locked ({error.strerror}). See that no other process is at work there."
            warnings.warn(said, stacklevel=3)
        yield


def read_bytes(path: str | Path, most: int = JSON_BYTES) -> bytes:
    """A file's content.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is larger than `most` bytes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_bytes(b"GGUF")
        ...     read_bytes(f"{folder}/a", most=4)
        b'GGUF'
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path}: such a file has at most {most:,} bytes, got {size:,}.")
        return file.read(most)


def read_text(path: str | Path, most: int = JSON_BYTES) -> str:
    """The same, decoded from UTF-8.

    Raises:
        ValueError: it is no UTF-8.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_bytes(b"caf\\xc3\\xa9")
        ...     read_text(f"{folder}/a")
        'café'
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: text is UTF-8 ({error}).") from error


def json_of(content: str | bytes, where: str | Path) -> Any:
    """The value that JSON stands for.

    Args:
        where: it was found, for errors.

    Raises:
        ValueError: it is no JSON, or nested too deeply.

    Example:
        >>> json_of('{"a": [1, null]}', "a.json")
        {'a': [1, None]}
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON (it is nested too deeply).") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error


def read_json(path: str | Path, most: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError, ValueError: no such file, one that is too large, or no object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text('{"width": 32, "bias": false}')
        ...     read_json(f"{folder}/config.json")
        {'width': 32, 'bias': False}
    """
    value = json_of(read_bytes(path, most), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON object, got {type(value).__name__}.")
    return value
