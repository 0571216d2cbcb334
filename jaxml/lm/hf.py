"""Hugging Face folders: config.json and safetensors, streamed tensor by tensor in both directions."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxml import files, paths
from jaxml.axes import Params
from jaxml.extras import need
from jaxml.lm import tensors
from jaxml.lm.config import DecoderConfig
from jaxml.parallel import hosts
from jaxml.quant import QArray, bnb
from jaxml.weights import is_node

INDEX = "model.safetensors.index.json"


def read_config(folder: str | Path) -> DecoderConfig:
    """The config of a model folder.

    Raises:
        FileNotFoundError, ValueError: no config.json, not JSON, or a key that is not known.

    Example:
        >>> from jaxml import testing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text(json.dumps(testing.tiny_config().to_hf()))
        ...     read_config(folder) == testing.tiny_config()
        True
    """
    config = files.read_json(Path(folder) / "config.json")
    with files.reading(Path(folder) / "config.json", "a decoder"):
        method = (config.pop("quantization_config", None) or {}).get("quant_method", "bitsandbytes")
        if method == "bitsandbytes":
            return DecoderConfig.from_hf(config)
    raise ValueError(f"{folder}: quantised weights are read in bitsandbytes' format, got quant_method {method!r}.")


def read(
    folder: str | Path, dtype=None, quantize: Callable[[str, np.ndarray], Any] | None = None, mesh: Mesh | None = None
) -> tuple[Params, DecoderConfig]:
    """Parameters and config of a model folder; weights that bitsandbytes quantised stay so (`quant.QArray`).

    Args:
        folder: with config.json and model.safetensors, or shards with their index.
        dtype: of the parameters; each tensor's own where None.
        quantize, mesh: as in `tensors.assemble`.

    Raises:
        FileNotFoundError, ValueError: files missing or truncated, tensors missing or left over, by name.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     params, config = read(write(f"{folder}/model", model.params, model.config, model.tokenizer))
        >>> config == model.config, bool((params["layers"]["q"] == model.params["layers"]["q"]).all())
        (True, True)
    """
    folder = Path(folder)
    config = read_config(folder)
    with files.reading(folder, "a model"):
        return _read(folder, config, dtype, quantize, mesh), config


def _read(folder: Path, config: DecoderConfig, dtype, quantize, mesh) -> Params:
    where = {}
    for path in _weight_files(folder):
        with open_safetensors(path) as file:
            where |= dict.fromkeys(file.keys(), path)
    with contextlib.ExitStack() as stack:
        return _assembled(folder, config, where, _Tensors(where, stack).read, dtype, quantize, mesh)


class _Tensors:
    """Tensors of several files by name.

    Pages of an open map count as the process's memory until it is closed, so that files are opened anew now and then,
    and not for each tensor, since their headers name all.
    """

    CLOSED_AFTER = 2**28  # bytes read

    def __init__(self, where: dict[str, Path], stack: contextlib.ExitStack):
        self.where, self.stack = where, stack
        self.opened, self.bytes = {}, 0

    def read(self, name: str) -> np.ndarray:
        if self.bytes > self.CLOSED_AFTER:
            self.stack.close()
            self.opened, self.bytes = {}, 0
        path = self.where[name]
        if path not in self.opened:
            self.opened[path] = self.stack.enter_context(open_safetensors(path))
        found = self.opened[path].get_tensor(name)
        self.bytes += found.nbytes
        return found


def _assembled(folder: Path, config: DecoderConfig, where: dict[str, Path], tensor, dtype, quantize, mesh) -> Params:
    quantised = bnb.parts(where)
    belonging = {name for names in quantised.values() for name in names}
    return tensors.assemble(
        config,
        "hf",
        [name for name in where if name not in belonging],
        lambda name: (
            bnb.read(name, tensor, where, dtype)
            if name in quantised
            else tensors.real(tensor(name), f"{folder}: {name}")
        ),
        source=str(folder),
        dtype=dtype,
        # A tied head is sometimes written twice; old files hold the rotary frequencies.
        ignore=lambda n: n.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and n == "lm_head.weight"),
        quantize=quantize,
        mesh=mesh,
    )


def write(
    folder: str | Path, params: Params, config: DecoderConfig, tokenizer, *, shard_bytes: int = 5 * 2**30
) -> Path:
    """Writes the folder under a temporary name and renames it when it is whole; of several processes one writes.

    Quantised matrices of layers are written as bitsandbytes' tensors, with `quantization_config` in config.json.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: adapters in the tree (merge them first), or a quantised weight that bitsandbytes has no format for.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = write(f"{folder}/model", model.params, model.config, model.tokenizer)
        ...     sorted(path.name for path in made.iterdir())
        ['chat_template.jinja', 'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    """
    folder = Path(folder)
    for path, w in unwritable(params).items():
        what = f"a {type(w).__name__}" if not isinstance(w, QArray) else f"in {w.kind}"
        raise ValueError(
            f"hf.write: weights are arrays, or of layers in {', '.join(bnb.FORMATS)}; {path} is {what}. "
            "Merge adapters, dequantise, or save with Orbax."
        )
    config = untied(params, config)
    if not hosts.is_main():
        for _ in tensors.disassemble(params, config):  # its share of the arrays
            pass
        hosts.meet("a model is written")
        return folder
    with whole_folder(folder) as temporary:
        _write_shards(temporary, params, config, shard_bytes)
        about = config_json(params, config)
        quantised = [w for w in paths.named(params).values() if isinstance(w, QArray)]
        about |= {"quantization_config": bnb.config(quantised[0])} if quantised else {}
        (temporary / "config.json").write_text(json.dumps(about, indent=2))
        if tokenizer is not None:
            tokenizer.save(temporary)
    hosts.meet("a model is written")
    return folder


def unwritable(params: Params) -> dict[str, Any]:
    """The weights, by path, that this format has no tensors for: adapters, tables that are quantised, int4.

    Example:
        >>> from jaxml.quant import nf4
        >>> q = nf4.quantize(np.ones((64, 64), np.float32))
        >>> list(unwritable({"embed": q, "layers": {"q": q}}))
        ['embed']
    """
    written = lambda path, w: isinstance(w, QArray) and w.kind in bnb.FORMATS and path.startswith("layers/")
    return {path: w for path, w in paths.named(params).items() if is_node(w) and not written(path, w)}


def untied(params: Params, config: DecoderConfig) -> DecoderConfig:
    """The configuration of these parameters: adapting a tied embedding gives a model a head of its own.

    Example:
        >>> from jaxml import testing
        >>> table, config = np.ones((64, 32)), testing.tiny_config()
        >>> [untied(params, config).tied_embeddings for params in ({"embed": table}, {"embed": table, "head": table})]
        [True, False]
    """
    return dataclasses.replace(config, tied_embeddings=False) if "head" in params else config


def config_json(params: Params, config: DecoderConfig) -> dict[str, Any]:
    """What a model folder's config.json holds: the config, and the parameters' dtype.

    Example:
        >>> from jaxml import testing
        >>> about = config_json({"norm": np.ones(32, np.float16)}, testing.tiny_config())
        >>> about["model_type"], about["hidden_size"], about["dtype"]
        ('llama', 32, 'float16')
    """
    return config.to_hf() | {"dtype": str(params["norm"].dtype)}


def _write_shards(folder: Path, params: Params, config: DecoderConfig, shard_bytes: int) -> None:
    shards, size, total = [{}], 0, 0
    pending = folder / "pending"

    def flush():
        path = Path(f"{pending}-{len(shards) - 1}")
        save_safetensors(path, shards[-1])
        shards[-1] = dict.fromkeys(shards[-1])  # names only; the arrays are on disk

    for name, array in tensors.disassemble(params, config):
        if size and size + array.nbytes > shard_bytes:
            flush()
            shards.append({})
            size = 0
        shards[-1][name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(shards) == 1:
        os.rename(f"{pending}-0", folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(f"{pending}-{i}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = files.read_json(folder / INDEX)
        names = sorted(set(index.get("weight_map", {}).values()))
        for file in names:
            if Path(file).name != file:
                raise ValueError(f"{folder / INDEX}: a shard lies in the folder itself, got {file!r}.")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder}: the index names {file}, which is missing. Download it again.")
        return [folder / file for file in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise FileNotFoundError(
        f"{folder}: a model folder has model.safetensors or {INDEX}; neither is there. "
        "Pickled weights (pytorch_model.bin) are not read."
    )


@contextlib.contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped; FileNotFoundError or ValueError where it is missing or not whole.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_safetensors(f"{folder}/a.safetensors", {"w": np.arange(3)})
        ...     with open_safetensors(f"{folder}/a.safetensors") as file:
        ...         {name: file.get_tensor(name).tolist() for name in file.keys()}
        {'w': [0, 1, 2]}
    """
    safetensors = need("safetensors", "lm")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        opened = safetensors.safe_open(str(path), "numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}). Download it again.") from error
    with opened:
        yield opened


def save_safetensors(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays (bfloat16 included).

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_safetensors(f"{folder}/a.safetensors", {"w": np.ones((2, 3), np.float16)})
        ...     with open_safetensors(f"{folder}/a.safetensors") as file:
        ...         file.get_slice("w").get_shape(), file.get_slice("w").get_dtype()
        ([2, 3], 'F16')
    """
    need("safetensors", "lm")
    from safetensors.numpy import save_file

    whole = lambda a: np.ascontiguousarray(a) if a.ndim else a
    save_file({k: whole(v) for k, v in arrays.items()}, str(path), metadata={"format": "pt"})


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name only when the block ends without an error.

    Raises:
        FileExistsError: `folder` exists and is not empty.

    Example:
        >>> with tempfile.TemporaryDirectory() as above:
        ...     with whole_folder(f"{above}/model") as folder:
        ...         _ = (folder / "config.json").write_text("{}")
        ...         before = os.path.exists(f"{above}/model")
        ...     before, os.listdir(f"{above}/model")
        (False, ['config.json'])
    """
    folder = check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_new(folder: str | Path) -> Path:
    """The path; FileExistsError where something is there already.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
        ...     Path(folder, "a").touch()
        ...     check_new(folder)
        Traceback (most recent call last):
            ...
        FileExistsError: ...: exists and is not empty. Choose another name or remove it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty. Choose another name or remove it.")
    return folder
