"""A language model as one value: parameters, config and tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxml.axes import Params
from jaxml.lm import gguf, hf, tokenizer, zoo
from jaxml.lm.config import DecoderConfig
from jaxml.lm.tokenizer import Tokenizer


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
        source: a name in `zoo.NAMES`, a GGUF file, or a Hugging Face folder.
        dtype: of the parameters. Where None: a folder's tensors keep their own (bfloat16 stays bfloat16),
            a GGUF file's become float32.

    Raises:
        FileNotFoundError: no such file, folder or name.
        ValueError: an architecture, config key, tensor or file that cannot be read, by name.
    """
    path = zoo.find(str(source)) if str(source) in zoo.NAMES else Path(source)
    if path.is_dir():
        params, config = hf.read(path, dtype)
        return Model(params, config, tokenizer.from_folder(path, eos_ids=config.eos_ids, pad_id=config.pad_id))
    if path.is_file():
        params, config, metadata = gguf.read(path, dtype)
        return Model(params, config, tokenizer.from_gguf(metadata))
    raise FileNotFoundError(
        f"lm.load: no file, folder or known model is called {str(source)!r}. "
        f"Known models: {', '.join(zoo.NAMES)}."
    )


def save(model: Model, folder: str | Path, *, shard_bytes: int = 5 * 2**30) -> Path:
    """Writes a Hugging Face folder: config.json, safetensors (in shards, with an index), the tokenizer.

    Nothing is half-written: the folder appears under its name only when it is whole.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    return hf.write(folder, model.params, model.config, model.tokenizer, shard_bytes=shard_bytes)
