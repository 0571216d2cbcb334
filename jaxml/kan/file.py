"""A network in one file: the arrays and what of it is no array, so that nothing else is needed to read it back.

The file is an .npz of NumPy; the widths, specs and the names of fixed functions are a JSON string in it. (The network
is a pytree too: `jaxml.checkpoint` saves it beside an optimizer's state.)
"""

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import files, log
from jaxml.kan import network, symbolic
from jaxml.kan.layer import Layer, Spec
from jaxml.kan.library import LIBRARY, Function
from jaxml.kan.network import KAN, Affine

FORMAT = 1
AFFINE = [field.name for field in dataclasses.fields(Affine)]


def save(path: str | Path, params: KAN, about: Mapping[str, Any] | None = None) -> None:
    """Writes a network whole or not at all.

    Args:
        path: of the file, .npz.
        about: anything that JSON can hold, to be read back with `about_of`.

    Raises:
        ValueError: bfloat16 arrays, which NumPy's files do not hold; a function of one's own by a library's name.

    Example:
        >>> import tempfile
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 3, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/network.npz", params)
        ...     again = load(f"{folder}/network.npz")
        >>> jax.tree.structure(again) == jax.tree.structure(params)
        True
    """
    arrays, told = {}, []
    for n, (layer, affine) in enumerate(zip(params.layers, params.affine)):
        for name in ("coef", "base", "points", "mask"):
            if getattr(layer, name) is not None:
                arrays[f"{n}.{name}"] = getattr(layer, name)
        for name in AFFINE if affine else ():
            arrays[f"{n}.{name}"] = getattr(affine, name)
        for m, edge in enumerate(layer.fixed):
            arrays[f"{n}.fixed.{m}"] = edge.numbers
        for e in layer.fixed:
            if LIBRARY.get(e.function.name, e.function) != e.function:
                raise ValueError(
                    f"kan.save: {e.function.name!r} is the name of another function in the library. Rename yours."
                )
        fixed = [[e.into, e.out, e.function.name] for e in layer.fixed]
        told.append({"spec": dataclasses.asdict(layer.spec), "affine": bool(affine), "fixed": fixed})
    arrays = {name: np.asarray(a) for name, a in jax.device_get(arrays).items()}
    for name, a in arrays.items():
        if a.dtype.kind != "f":
            raise ValueError(f"kan.save: arrays are float16, 32 or 64, got {a.dtype} ({name}). Use with_dtype.")
    header = {"format": FORMAT, "arities": params.arities, "layers": told, "about": dict(about or {})}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, **arrays)
    log.write_bytes(path, content.getvalue())


def load(path: str | Path, functions: Mapping[str, Function] | None = None) -> KAN:
    """Reads a network.

    Args:
        functions: of edges fixed to functions that are not in the library, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no network or is damaged; a function that is not known.

    Example:
        >>> import tempfile
        >>> from jaxml import kan
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/network.npz", kan.init(jax.random.key(0), [2, 3, 1]))
        ...     load(f"{folder}/network.npz").widths
        (2, 3, 1)
    """
    arrays, header = _read(path)
    known = {**LIBRARY, **(functions or {})}
    layers, affine = [], []
    try:
        for n, told in enumerate(header["layers"]):
            for _, _, name in told["fixed"]:
                if name not in known:
                    raise ValueError(f"the function {name!r} is not in the library; hand it over as functions={{…}}")
            fixed = [
                symbolic.Edge(arrays[f"{n}.fixed.{m}"], into, out, known[name])
                for m, (into, out, name) in enumerate(told["fixed"])
            ]
            three = (arrays[f"{n}.{name}"] for name in ("coef", "base", "points"))
            layers.append(Layer(*three, arrays.get(f"{n}.mask"), tuple(fixed), Spec(**told["spec"])))
            affine.append(Affine(*(arrays[f"{n}.{name}"] for name in AFFINE)) if told["affine"] else ())
        return network.check(KAN(tuple(layers), tuple(affine), tuple(tuple(a) for a in header["arities"])))
    except (ValueError, *files.IMPOSSIBLE) as error:
        raise ValueError(f"{path}: no network can be made of this file ({error}).") from error


def about_of(path: str | Path) -> dict[str, Any]:
    """What `save` was told about the network."""
    return _read(path)[1]["about"]


def _read(path: str | Path) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    content = files.read_bytes(path)
    try:
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise ValueError("no .npz file")
        files.check_stored(zipfile.ZipFile(io.BytesIO(content)), len(content), "the archive")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = files.json_of(arrays.pop("header").tobytes(), "its header")
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
        if not isinstance(header["about"], dict):
            raise ValueError(f"what is told about it is an object, got {type(header['about']).__name__}")
        if odd := [name for name, a in arrays.items() if a.dtype.kind != "f"]:
            raise ValueError(f"{odd[0]} holds no numbers")
        return {name: jnp.asarray(a) for name, a in arrays.items()}, header
    except (ValueError, RuntimeError, *files.IMPOSSIBLE) as error:  # RuntimeError: an archive with a password
        raise ValueError(f"{path}: not a network of kan.save, or damaged ({error}).") from error
