"""A language model as one value: parameters, config and tokenizer."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxml import checkpoint, files, parallel, paths
from jaxml.axes import Params
from jaxml.lm import decoder, gguf, hf, tokenizer, zoo
from jaxml.lm.config import DecoderConfig
from jaxml.lm.tokenizer import Tokenizer
from jaxml.quant.params import of_format, quantize_params, quantized
from jaxml.quant.qarray import QArray, abstract
from jaxml.weights import is_node

ORBAX = "orbax"  # the folder inside a model folder that holds an Orbax checkpoint
QUANTISED = "quantised.json"  # beside it: how weights are quantised, by path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A pytree whose leaves are the parameters; config and tokenizer travel along as static data.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> model.config.family, sorted(model.params), model.replace(params={}).params
        ('llama', ['embed', 'layers', 'norm'], {})
    """

    params: Params
    config: DecoderConfig = dataclasses.field(metadata=dict(static=True))
    tokenizer: Tokenizer = dataclasses.field(metadata=dict(static=True))

    def replace(self, **fields: Any) -> "Model":
        """The same model with other parameters, config or tokenizer."""
        return dataclasses.replace(self, **fields)


def load(
    source: str | Path,
    dtype=None,
    *,
    quantize: str | None = None,
    targets: Sequence[str] = paths.ALL_LINEAR,
    mesh: Mesh | None = None,
) -> Model:
    """A model by name or by path.

    Args:
        source: a name in `zoo.NAMES`, a GGUF file, a Hugging Face folder, or one from `save_orbax`.
        dtype: of the parameters. Where None: a folder's tensors keep their own (bfloat16 stays bfloat16),
            a GGUF file's become float32.
        quantize: "nf4", "fp4", "int4" or "int8": matrices are quantised one by one as they are read, so that the dense
            model is never held. What a folder holds in that format stays as it is; in another one it is refused.
        targets: which (`quant.quantize_params`).
        mesh: of `jaxml.parallel.mesh`: the parameters are spread over it, one tensor after the other, so that no device
            ever holds the whole model.

    Raises:
        FileNotFoundError: no such file, folder or name.
        ValueError: an architecture, config key, tensor or file that cannot be read, by name.

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = load(save(testing.tiny_model(), f"{folder}/model"))
        ...     model.params["embed"].shape == (model.config.vocab_size, model.config.width)
        True
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"lm.load: mesh is one of `jaxml.parallel.mesh` or `parse`, got {mesh!r}.")
    convert = None if quantize is None else _convert(quantize, targets)
    entry = zoo.NAMES.get(str(source))
    if entry and entry.kind != "decoder":
        raise ValueError(f"lm.load: {source} is an {entry.kind} ({entry.about}). Read it with lm.encoder.load.")
    path = zoo.find(str(source)) if entry else Path(source)
    if (path / ORBAX).is_dir():
        model = _load_orbax(path, dtype, mesh)
        return (
            model
            if quantize is None
            else model.replace(params=quantize_params(model.params, quantize, targets=targets))
        )
    if path.is_dir():
        params, config = hf.read(path, dtype, convert, mesh)
        return Model(params, config, _tokenizer(path, config))
    if path.is_file():
        params, config, metadata = gguf.read(path, dtype, convert, mesh)
        return Model(params, config, tokenizer.from_gguf(metadata, rows=config.vocab_size))
    raise FileNotFoundError(
        f"lm.load: no file, folder or known model is called {str(source)!r}. Known models: {', '.join(zoo.NAMES)}."
    )


def _convert(format: str, targets: Sequence[str]) -> Callable[[str, Any], Any]:
    """What quantises the weights that the patterns name, one at a time."""
    make, chosen = of_format(format), paths.match((*paths.ALL_LINEAR, *paths.TABLES), targets, "lm.load")
    done = lambda w: isinstance(w, QArray) and w.kind == format  # the file has it so already
    return lambda path, w: quantized(make, path, w, {}) if path in chosen and not done(w) else w


def _load_orbax(folder: Path, dtype, mesh: Mesh | None) -> Model:
    config = hf.read_config(folder)
    with files.reading(folder, "a model"):
        return _of_orbax(folder, config, dtype, mesh)


def _of_orbax(folder: Path, config: DecoderConfig, dtype, mesh: Mesh | None) -> Model:
    about = files.read_json(folder / "config.json")
    saved, here = jnp.dtype(about.get("dtype", "float32")), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, saved), decoder.shapes(config), is_leaf=lambda s: isinstance(s, tuple)
    )
    how = files.read_json(folder / QUANTISED) if (folder / QUANTISED).is_file() else {}
    nodes = {path: abstract(paths.named(template)[path].shape, **of) for path, of in how.items()}
    template = paths.replaced(template, nodes)
    where = jax.tree.map(lambda a: here, template) if mesh is None else parallel.shardings(template, mesh)
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    params = checkpoint.restore(folder / ORBAX, jax.tree.map(place, template, where))
    params = params if dtype is None else decoder.cast(params, dtype)
    return Model(params, config, _tokenizer(folder, config))


def _tokenizer(folder: Path, config: DecoderConfig) -> Tokenizer:
    return tokenizer.from_folder(folder, eos_ids=config.eos_ids, pad_id=config.pad_id, rows=config.vocab_size)


def save_orbax(model: Model, folder: str | Path) -> Path:
    """Writes the parameters as an Orbax checkpoint, with config.json and the tokenizer beside it.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: adapters in the tree (they are saved alone, or merged), or several processes.

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in save_orbax(testing.tiny_model(), f"{folder}/model").iterdir())[:2]
        ['chat_template.jinja', 'config.json']
    """
    if jax.process_count() > 1:
        raise ValueError(f"save_orbax: one process writes, got {jax.process_count()}. Take lm.save.")
    nodes = {path: w for path, w in paths.named(model.params).items() if is_node(w)}
    for path, w in nodes.items():
        if not isinstance(w, QArray):
            raise ValueError(
                f"save_orbax: weights are arrays or quantised, {path} is a {type(w).__name__}. Merge first."
            )
    about = hf.config_json(model.params, hf.untied(model.params, model.config))
    with hf.whole_folder(folder) as temporary:
        checkpoint.save(temporary / ORBAX, 0, model.params)
        if nodes:
            how = {path: w.about() for path, w in nodes.items()}
            (temporary / QUANTISED).write_text(json.dumps(how, indent=2))
        (temporary / "config.json").write_text(json.dumps(about, indent=2))
        model.tokenizer.save(temporary)
    return Path(folder)


def save(model: Model, folder: str | Path, *, shard_bytes: int = 5 * 2**30) -> Path:
    """Writes a Hugging Face folder: config.json, safetensors (in shards, with an index), the tokenizer.

    Nothing is half-written: the folder appears under its name only when it is whole.

    Raises:
        FileExistsError: the folder exists and is not empty.

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in save(testing.tiny_model(), f"{folder}/model").iterdir())[:2]
        ['chat_template.jinja', 'config.json']
    """
    return hf.write(folder, model.params, model.config, model.tokenizer, shard_bytes=shard_bytes)
