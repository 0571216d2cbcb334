"""A language model as one value: parameters, config and tokenizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxml import checkpoint
from jaxml.axes import Params
from jaxml.lm import decoder, gguf, hf, tokenizer, zoo
from jaxml.lm.config import DecoderConfig
from jaxml.lm.tokenizer import Tokenizer

ORBAX = "orbax"  # the folder inside a model folder that holds an Orbax checkpoint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A pytree whose leaves are the parameters; config and tokenizer travel along as static data."""

    params: Params
    config: DecoderConfig = dataclasses.field(metadata=dict(static=True))
    tokenizer: Tokenizer = dataclasses.field(metadata=dict(static=True))

    def replace(self, **fields: Any) -> "Model":
        """The same model with other parameters, config or tokenizer."""
        return dataclasses.replace(self, **fields)


def load(source: str | Path, dtype=None) -> Model:
    """A model by name or by path.

    Args:
        source: a name in `zoo.NAMES`, a GGUF file, a Hugging Face folder, or one from `save_orbax`.
        dtype: of the parameters. Where None: a folder's tensors keep their own (bfloat16 stays bfloat16),
            a GGUF file's become float32.

    Raises:
        FileNotFoundError: no such file, folder or name.
        ValueError: an architecture, config key, tensor or file that cannot be read, by name.
    """
    path = zoo.find(str(source)) if str(source) in zoo.NAMES else Path(source)
    if (path / ORBAX).is_dir():
        return _load_orbax(path, dtype)
    if path.is_dir():
        params, config = hf.read(path, dtype)
        return Model(params, config, tokenizer.from_folder(path, eos_ids=config.eos_ids, pad_id=config.pad_id))
    if path.is_file():
        params, config, metadata = gguf.read(path, dtype)
        return Model(params, config, tokenizer.from_gguf(metadata))
    raise FileNotFoundError(
        f"lm.load: no file, folder or known model is called {str(source)!r}. Known models: {', '.join(zoo.NAMES)}."
    )


def _load_orbax(folder: Path, dtype) -> Model:
    config = hf.read_config(folder)
    saved = jnp.dtype(hf.read_json(folder / "config.json").get("dtype", "float32"))
    template = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, saved, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        decoder.shapes(config),
        is_leaf=lambda s: isinstance(s, tuple),
    )
    params = checkpoint.restore(folder / ORBAX, template)
    params = params if dtype is None else decoder.cast(params, dtype)
    return Model(params, config, tokenizer.from_folder(folder, eos_ids=config.eos_ids, pad_id=config.pad_id))


def save_orbax(model: Model, folder: str | Path) -> Path:
    """Writes the parameters as an Orbax checkpoint, with config.json and the tokenizer beside it.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    about = hf.config_json(model.params, model.config)
    with hf.whole_folder(folder) as temporary:
        checkpoint.save(temporary / ORBAX, 0, model.params)
        (temporary / "config.json").write_text(json.dumps(about, indent=2))
        model.tokenizer.save(temporary)
    return Path(folder)


def save(model: Model, folder: str | Path, *, shard_bytes: int = 5 * 2**30) -> Path:
    """Writes a Hugging Face folder: config.json, safetensors (in shards, with an index), the tokenizer.

    Nothing is half-written: the folder appears under its name only when it is whole.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    return hf.write(folder, model.params, model.config, model.tokenizer, shard_bytes=shard_bytes)
