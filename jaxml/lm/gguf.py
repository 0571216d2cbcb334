"""Reading GGUF files (llama.cpp's format) through the ``gguf`` package, dequantised tensor by tensor."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxml import files
from jaxml.axes import Params
from jaxml.extras import need
from jaxml.lm import tensors
from jaxml.lm.config import DecoderConfig, RopeScaling

TEXTS = 2**20  # in an array: four times the largest vocabulary
QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def read(
    path: str | Path, dtype=None, quantize: Callable[[str, np.ndarray], Any] | None = None, mesh: Mesh | None = None
) -> tuple[Params, DecoderConfig, dict[str, Any]]:
    """Parameters, config and metadata of a GGUF file.

    Args:
        path: the file.
        dtype: of the parameters; float32 where None, since a quantised tensor has no dtype of its own
            (F16 and BF16 tensors are widened as well).
        quantize, mesh: as in `tensors.assemble`.

    Raises:
        ValueError: not a GGUF file, truncated, an unknown architecture, key or quantisation, or tensors
            missing or left over; by name.

    Example:
        >>> params, config, metadata = read("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
        >>> config.num_layers, metadata["general.architecture"]                 # doctest: +SKIP
        (30, 'llama')
        >>> read("no-such.gguf")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no-such.gguf: no such file.
    """
    reader = _open(path)
    metadata = read_metadata(path, reader)
    with files.reading(path, "a GGUF model"):
        return _read(path, reader, metadata, dtype, quantize, mesh)


def _read(path, reader, metadata, dtype, quantize, mesh) -> tuple[Params, DecoderConfig, dict[str, Any]]:
    config = DecoderConfig.from_gguf(metadata)
    found = {t.name: t for t in reader.tensors}
    _check_complete(path, reader)
    if "rope_freqs.weight" in found:  # Llama 3: the stretch of each frequency, as a tensor
        factors = tuple(float(f) for f in _dequantize(found["rope_freqs.weight"]))
        config = dataclasses.replace(config, rope_scaling=RopeScaling(kind="factors", factors=factors))
    config = dataclasses.replace(config, tied_embeddings="output.weight" not in found)
    interleaved = config.family in ("llama", "smollm3")

    def fetch(name: str) -> np.ndarray:
        tensor = _dequantize(found[name])
        if interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = _deinterleave(tensor, config.head_dim)
        if config.norm_plus_one and name.endswith("norm.weight"):
            tensor = tensor - 1.0  # llama.cpp stores 1 + weight
        return tensor

    params = tensors.assemble(
        config,
        "gguf",
        found,
        fetch,
        source=str(path),
        dtype=jnp.float32 if dtype is None else dtype,
        ignore=lambda name: name == "rope_freqs.weight",
        quantize=quantize,
        mesh=mesh,
    )
    return params, config, metadata


def read_metadata(path: str | Path, reader=None) -> dict[str, Any]:
    """The key-value pairs of the file's header.

    Example:
        >>> import gguf, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     writer = gguf.GGUFWriter(f"{folder}/a.gguf", "llama")
        ...     writer.add_context_length(128)
        ...     writer.write_header_to_file()
        ...     writer.write_kv_data_to_file()
        ...     writer.close()
        ...     read_metadata(f"{folder}/a.gguf")
        {'general.architecture': 'llama', 'llama.context_length': 128}
    """
    reader = reader or _open(path)
    with files.reading(path, "a GGUF file"):
        return {key: _contents(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def _open(path: str | Path):
    gguf = need("gguf", "lm")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return _reader(gguf)(path)
    except (ValueError, *files.IMPOSSIBLE) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error}). Download it again.") from error


def _reader(gguf):
    class Reader(gguf.GGUFReader):
        """The package's reader on a plain view of the mapped file: a memmap object per string takes seconds."""

        def _build_fields(self, offs, count):
            self.data = np.asarray(self.data).view(np.ndarray)
            return super()._build_fields(offs, count)

        def _get_field_parts(self, orig_offs, raw_type):
            """The package's, but arrays longer than the file are refused, and those of numbers are one part."""
            types = gguf.GGUFValueType
            if types(raw_type) != types.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            scalar = self.gguf_scalar_to_np.get(types(kind[0]))
            least = 8 if scalar is None else np.dtype(scalar).itemsize  # a text says how long it is
            left = len(self.data) - orig_offs - 12
            if int(count[0]) * least > left:
                raise ValueError(f"an array of {count[0]:,} values in the {left:,} bytes that are left")
            if scalar is None and count[0] > TEXTS:
                raise ValueError(f"an array of {count[0]:,} texts, of which there are at most {TEXTS:,}")
            if scalar is None:
                return super()._get_field_parts(orig_offs, raw_type)
            values = self._get(orig_offs + 12, scalar, int(count[0]))
            return 12 + values.nbytes, [kind, count, values], [2], [types.ARRAY, types(kind[0])]

    return Reader


def _contents(field) -> Any:
    """A field's value; arrays of strings by a shorter way than the reader's own, which takes seconds."""
    from gguf import GGUFValueType

    if field.types[0] == GGUFValueType.ARRAY and field.types[-1] == GGUFValueType.STRING:
        return [bytes(field.parts[i]).decode("utf-8") for i in field.data]
    return field.contents()


def _check_complete(path, reader) -> None:
    size = Path(path).stat().st_size
    places = sorted((t.data_offset, t.n_bytes, t.name) for t in reader.tensors)
    for (start, length, name), (following, _, other) in itertools.pairwise(places):
        if start + length > following:
            raise ValueError(f"{path}: tensors {name} and {other} share bytes. The file is damaged.")
    for t in reader.tensors:
        if t.data_offset + t.n_bytes > size:
            raise ValueError(
                f"{path}: tensor {t.name} ends at byte {t.data_offset + t.n_bytes} of a file of {size}; "
                "the file is truncated. Download it again."
            )


def _dequantize(tensor) -> np.ndarray:
    import gguf

    kind = tensor.tensor_type.name
    if kind not in QUANTISATIONS:
        raise ValueError(
            f"gguf.read: tensor {tensor.name} is stored as {kind}; readable are {', '.join(QUANTISATIONS)}."
        )
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)


def _deinterleave(w: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of query and key from llama.cpp's order (pairs side by side) to halves, [heads · H, D]."""
    heads = w.shape[0] // head_dim
    return w.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
