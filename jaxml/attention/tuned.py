"""Tiles that were measured on a device of this kind: `jaxml bench attention --tune` writes them, kernels take them.

They lie in a JSON file, {device kind: {"backend/kernel/dtype/width/length": tiles}}, in the user's cache; the variable
JAXML_BLOCKS names another one. What is not in it, the tables of blocks.py know.
"""

import contextlib
import contextvars
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxml import files, log, target

_trying: contextvars.ContextVar[dict | None] = contextvars.ContextVar("trying", default=None)


def path() -> Path:
    """Where the file is, or would be.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, {"JAXML_BLOCKS": "blocks.json"}):
        ...     print(path())
        blocks.json
    """
    if named := os.environ.get("JAXML_BLOCKS"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxml" / "attention-blocks.json"


def find(backend: str, which: str, T: int, width: int, dtype) -> dict | None:
    """The tiles that were measured for such a kernel, or that `trying` names; None where there are none.

    Example:
        >>> with trying({"forward": {"rows": 64}}):
        ...     find("triton", "forward", 1500, 64, "bfloat16"), find("triton", "keys", 1500, 64, "bfloat16")
        ({'rows': 64}, None)
    """
    if (tried := _trying.get()) is not None:
        return tried.get(which)
    if target.named():  # for another device than this one
        return None
    file = path()
    if not file.is_file():
        return None
    kind = jax.devices()[0].device_kind
    return _read(str(file), file.stat().st_mtime_ns).get(kind, {}).get(name(backend, which, T, width, dtype))


def name(backend: str, which: str, T: int, width: int, dtype) -> str:
    """Of an entry: head dims in steps of 64, lengths in powers of two.

    Example:
        >>> name("triton", "forward", 1500, 100, "bfloat16")
        'triton/forward/bfloat16/128/2048'
    """
    length = max(64, 1 << (T - 1).bit_length())
    return f"{backend}/{which}/{jnp.dtype(dtype).name}/{-(-width // 64) * 64}/{length}"


@contextlib.contextmanager
def trying(tiles: dict[str, dict]):
    """Kernels take these tiles, of "forward", "queries" and "keys", whatever has been measured.

    Example:
        >>> with trying({"forward": {"rows": 64}}):
        ...     with trying({"forward": {"rows": 128}}):
        ...         inner = find("triton", "forward", 1500, 64, "bfloat16")
        ...     print(inner, find("triton", "forward", 1500, 64, "bfloat16"))
        {'rows': 128} {'rows': 64}
    """
    token = _trying.set(tiles)
    try:
        yield
    finally:
        _trying.reset(token)


def save(kind: str, entries: dict[str, dict]) -> Path:
    """Adds entries of a device kind to the file, which is written whole or not at all.

    Example:
        >>> import tempfile
        >>> from unittest import mock
        >>> kind, entry = jax.devices()[0].device_kind, name("triton", "forward", 2048, 64, "bfloat16")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with mock.patch.dict(os.environ, {"JAXML_BLOCKS": f"{folder}/blocks.json"}):
        ...         _ = save(kind, {entry: {"columns": 32, "rows": 64}})
        ...         find("triton", "forward", 1500, 64, "bfloat16")  # of up to 2048
        {'columns': 32, 'rows': 64}
    """
    file = path()
    known = _read(str(file), file.stat().st_mtime_ns) if file.is_file() else {}
    known = known | {kind: known.get(kind, {}) | entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(file, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return file


@functools.lru_cache(maxsize=4)
def _read(file: str, _changed: int) -> dict:
    try:
        known = files.json_of(files.read_bytes(file), file)
        if not all(isinstance(tiles, dict) for kind in known.values() for tiles in kind.values()):
            raise ValueError
    except (ValueError, AttributeError):
        raise ValueError(
            f"attention: {file} holds measured tiles as `jaxml bench attention --tune` writes them, "
            "got something else. Delete it, or name another file in JAXML_BLOCKS."
        ) from None
    return known
