"""bitsandbytes' serialized tensors: what its 4-bit and 8-bit layers keep in a model's safetensors."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxml import files
from jaxml.quant import codebook
from jaxml.quant.qarray import NESTED_BLOCK, Nested, QArray

_STATE = "quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE + "nf4", _STATE + "fp4")
_PARTS_INT8 = ("SCB", "weight_format")  # beside ".weight", not below it
FORMATS = ("nf4", "fp4", "int8")


def parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Quantised tensors among the names of a file → the names of what belongs to each.

    Example:
        >>> parts(["q.weight", "q.weight.absmax", "norm.weight"])
        {'q.weight': ['q.weight.absmax']}
    """
    found: dict[str, list[str]] = {}
    for name in names:
        owner, _, part = name.rpartition(".")
        for known in _PARTS:
            if name.endswith("." + known):
                found.setdefault(name.removesuffix("." + known), []).append(name)
        if part in _PARTS_INT8:
            found.setdefault(owner + ".weight", []).append(name)
    return found


def read(name: str, get: Callable[[str], np.ndarray], available: Iterable[str], dtype=None) -> QArray:
    """A quantised matrix [in, out] from the tensors that are stored for it.

    Args:
        name: of the weight, as in "model.layers.0.self_attn.q_proj.weight".
        get: a tensor by its name.
        available: names that `get` knows.
        dtype: of the matrix that it stands for; the one it was made of where None (float16 of int8).

    Raises:
        ValueError: a part missing, of another size or of an unknown code, by name.

    Example:
        >>> from jaxml.quant import nf4
        >>> q = nf4.quantize(jnp.ones((64, 32)), double=False)
        >>> stored = write("q.weight", q)
        >>> again = read("q.weight", stored.__getitem__, stored)
        >>> again.kind, again.shape, bool((again.codes == q.codes).all())
        ('nf4', (64, 32), True)
    """
    available = set(available)
    if name.removesuffix("weight") + "SCB" in available:
        return _read_int8(name, get, dtype)
    kinds = [kind for kind in ("nf4", "fp4") if f"{name}.{_STATE}{kind}" in available]
    if len(kinds) != 1:
        raise ValueError(f"{name}: a 4-bit tensor comes with {name}.{_STATE}nf4 or …fp4, found {len(kinds)} of them.")
    (kind,) = kinds
    state = _state(f"{name}.{_STATE}{kind}", get)
    part = lambda suffix: _part(f"{name}.{suffix}", get, available)
    _same(f"{name}.quant_map", part("quant_map"), codebook.TABLES[kind])
    rows, run = state["shape"]
    size, block = rows * run, state["blocksize"]
    blocks = -(-size // block)
    codes, scales, nested = part("").reshape(-1), part("absmax").reshape(-1), None
    codes = codes.view(np.uint8)  # kept as another dtype by `bnb_4bit_quant_storage`
    if codes.size != -(-size // 2) or scales.size != blocks:
        raise ValueError(
            f"{name}: {rows} × {run} weights have {-(-size // 2)} bytes and {blocks} scales, got {codes.size} and "
            f"{scales.size}. The file is damaged or of another model."
        )
    if "nested_offset" in state:
        _same(f"{name}.nested_quant_map", part("nested_quant_map"), codebook.dynamic())
        if state["nested_blocksize"] != NESTED_BLOCK:
            raise ValueError(f"{name}: scales are quantised in blocks of 256, got {state['nested_blocksize']}.")
        above = part("nested_absmax").astype(np.float32)
        if above.size != -(-blocks // NESTED_BLOCK):
            raise ValueError(
                f"{name}: {blocks} scales have {-(-blocks // NESTED_BLOCK)} of their own, got {above.size}."
            )
        nested = Nested(jnp.asarray(above), jnp.float32(state["nested_offset"]))
    in_rows = run % block == 0
    shape = (rows, -1) if in_rows else (-1,)
    scales = scales if nested else scales.astype(np.float32)
    return QArray(
        jnp.asarray(codes.reshape(shape)), jnp.asarray(scales.reshape(shape)), nested, kind, block, (run, rows), -2,
        jnp.dtype(state["dtype"] if dtype is None else dtype).name,
    )  # fmt: skip


def write(name: str, q: QArray) -> dict[str, np.ndarray]:
    """The tensors that bitsandbytes would store for this weight [in, out].

    Raises:
        ValueError: several matrices, a table, int4, or int8 in blocks: bitsandbytes has none of these.

    Example:
        >>> from jaxml.quant import int8
        >>> {name: a.shape for name, a in write("q.weight", int8.quantize(jnp.ones((64, 32)))).items()}
        {'q.weight': (32, 64), 'q.SCB': (32,), 'q.weight_format': ()}
    """
    if q.kind not in FORMATS or q.axis != -2 or len(q.shape) != 2 or (q.kind == "int8" and q.block != q.rows[1]):
        raise ValueError(
            f"bnb.write: {name} is one matrix in nf4, fp4 or int8 of one scale a channel, got {q.kind} with blocks of "
            f"{q.block} and the shape {q.shape}. bitsandbytes has no such tensor; save with Orbax."
        )
    host = np.asarray
    if q.kind == "int8":
        owner = name.removesuffix("weight")
        return {
            name: host(q.codes),
            owner + "SCB": host(q.scales).reshape(-1),
            owner + "weight_format": np.zeros((), np.uint8),
        }
    rows, run = q.rows
    state: dict[str, Any] = {"quant_type": q.kind, "blocksize": q.block, "dtype": q.dtype, "shape": [rows, run]}
    out = {
        name: host(q.codes).reshape(-1, 1),
        f"{name}.absmax": host(q.scales).reshape(-1),
        f"{name}.quant_map": codebook.TABLES[q.kind],
    }
    if q.nested is not None:
        out[f"{name}.nested_absmax"] = host(q.nested.scales)
        out[f"{name}.nested_quant_map"] = codebook.dynamic()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        state |= {"nested_offset": float(q.nested.offset)}
    text = json.dumps(state).encode()
    return out | {f"{name}.{_STATE}{q.kind}": np.frombuffer(text, np.uint8)}


def config(q: QArray) -> dict[str, Any]:
    """``quantization_config`` of the config.json beside such tensors.

    Example:
        >>> from jaxml.quant import int8
        >>> config(int8.quantize(jnp.ones((64, 32))))
        {'quant_method': 'bitsandbytes', 'load_in_4bit': False, 'load_in_8bit': True, 'llm_int8_threshold': 0.0}
    """
    about: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    if q.kind == "int8":
        return about | {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    return about | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": q.kind,
        "bnb_4bit_use_double_quant": q.nested is not None,
        "bnb_4bit_compute_dtype": q.dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


def _read_int8(name: str, get: Callable[[str], np.ndarray], dtype) -> QArray:
    codes, scales = get(name), get(name.removesuffix("weight") + "SCB").astype(np.float32).reshape(-1, 1)
    if codes.dtype != np.int8 or codes.ndim != 2 or len(scales) != len(codes):
        raise ValueError(
            f"{name}: int8 [out, in] with one scale a row, got {codes.dtype} {codes.shape} and {len(scales)} scales."
        )
    rows, run = codes.shape
    dtype = jnp.dtype(jnp.float16 if dtype is None else dtype).name
    return QArray(jnp.asarray(codes), jnp.asarray(scales), None, "int8", run, (run, rows), -2, dtype)


def _part(name: str, get: Callable[[str], np.ndarray], available: set[str]) -> np.ndarray:
    name = name.removesuffix(".")
    if name not in available:
        raise ValueError(f"{name}: missing beside a 4-bit tensor. The file is damaged.")
    return get(name)


def _state(name: str, get: Callable[[str], np.ndarray]) -> dict[str, Any]:
    try:
        state = files.json_of(bytes(np.asarray(get(name), np.uint8)), name)
    except ValueError as error:
        raise ValueError(f"{name}: holds the state's numbers as JSON ({error}). The file is damaged.") from error
    wanted = {"quant_type", "blocksize", "dtype", "shape"}
    if not isinstance(state, dict) or wanted - set(state) or len(state["shape"]) != 2:
        raise ValueError(f"{name}: names {', '.join(sorted(wanted))} of a matrix, got {state}.")
    return state


def _same(name: str, got: np.ndarray, table: np.ndarray) -> None:
    if got.shape != table.shape or not np.allclose(got, table, rtol=0, atol=1e-4):
        raise ValueError(f"{name}: is the code that jaxml knows, got another one. The tensor cannot be read.")
