"""PEFT's folder format for prompts: PROMPT_TUNING, MULTITASK_PROMPT_TUNING and PREFIX_TUNING."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Params
from jaxml.lm import hf
from jaxml.lm.config import DecoderConfig
from jaxml.tune.adapters.peft_config import PROMPTS as TYPES
from jaxml.tune.adapters.peft_load import tensor
from jaxml.tune.adapters.tree import of
from jaxml.tune.prompt.nodes import Prefix, Prompt, SoftPrompt, only
from jaxml.tune.prompt.prefix import settle

FILE = "adapter_model.safetensors"


def save(folder: str | Path, params: Params, config: DecoderConfig, *, base_model: str = "", dtype: Any = None) -> Path:
    """Writes the prompt of these parameters as PEFT loads it; an MLP that makes a prefix is dropped.

    Raises:
        ValueError: no prompt, several (unless they share one, times factors of their own), or adapters beside it, for
            which PEFT wants a folder each.
        FileExistsError: the folder exists and is not empty.

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> params = {"prefix": SoftPrompt(jnp.ones((1, 4, 32)))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = save(f"{folder}/prompt", params, testing.tiny_config())
        ...     about = json.loads((made / "adapter_config.json").read_text())
        >>> about["peft_type"], about["num_virtual_tokens"]
        ('PROMPT_TUNING', 4)
    """
    node = only(settle(params), "adapters.save_peft")
    if others := [path for path in of(params) if path != "prefix"]:
        raise ValueError(
            f"adapters.save_peft: a folder holds a prompt or other adapters, got a prompt and {', '.join(others)}. "
            "Save them apart, each from a tree of its own."
        )
    arrays, about = _prefix(node, config) if isinstance(node, Prefix) else _soft(node, config)
    about = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
    } | about
    arrays = {k: np.asarray(a if dtype is None else a.astype(dtype)) for k, a in arrays.items()}
    with hf.whole_folder(folder) as temporary:
        hf.save_safetensors(temporary / FILE, arrays)
        (temporary / "adapter_config.json").write_text(json.dumps(about, indent=2))
    return Path(folder)


def _soft(node: SoftPrompt, config: DecoderConfig) -> tuple[dict[str, Array], dict[str, Any]]:
    _, P, D = node.shape
    about = {
        "num_virtual_tokens": P,
        "token_dim": D,
        "num_attention_heads": config.num_heads,
        "prompt_tuning_init": "RANDOM",
    }
    if node.columns is not None:
        N, _, R = node.columns.shape
        about |= {"peft_type": TYPES[1], "num_tasks": N, "num_ranks": R}
        return {
            "prompt_embeddings": node.rows[0], "prefix_task_cols": node.columns, "prefix_task_rows": node.tasks,
        }, about  # fmt: skip
    _one(node)
    return {"prompt_embeddings": node.rows[0]}, about | {"peft_type": TYPES[0]}


def _prefix(node: Prefix, config: DecoderConfig) -> tuple[dict[str, Array], dict[str, Any]]:
    _one(node)
    L, _, K, P, H = node.key.shape
    both = jnp.stack([node.key[:, 0], node.value[:, 0]], 1)  # L 2 K P H
    about = {
        "peft_type": TYPES[2],
        "num_virtual_tokens": P,
        "token_dim": K * H,
        "num_attention_heads": K,
        "prefix_projection": False,
        "encoder_hidden_size": K * H,
    }
    return {"prompt_embeddings": both.transpose(3, 0, 1, 2, 4).reshape(P, L * 2 * K * H)}, about


def _one(node: Prompt) -> None:
    if node.count > 1:
        raise ValueError(f"adapters.save_peft: a folder holds one prompt, got {node.count}. `prompt.take` one.")


def load(folder: Path, about: dict[str, Any], params: Params, config: DecoderConfig, dtype: Any = None) -> Params:
    """Puts the prompt of a PEFT folder in front of a model.

    Raises:
        FileNotFoundError, ValueError: files missing or truncated, numbers that are not finite, or a prompt of another
            model.

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> config, params = testing.tiny_config(), {"prefix": SoftPrompt(jnp.ones((1, 4, 32)))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = save(f"{folder}/prompt", params, config)
        ...     again = load(made, json.loads((made / "adapter_config.json").read_text()), {}, config)
        >>> again["prefix"].rows.shape, float(again["prefix"].rows.min())
        ((1, 4, 32), 1.0)
    """
    kind = about["peft_type"]
    wanted = ["prompt_embeddings"] + (["prefix_task_cols", "prefix_task_rows"] if kind == TYPES[1] else [])
    with hf.open_safetensors(folder / FILE) as file:
        names = set(file.keys())
        if names != set(wanted):
            raise ValueError(
                f"{folder}: {kind} holds {', '.join(wanted)}, got {', '.join(sorted(names)) or 'nothing'}."
            )
        rows, *factors = (jnp.asarray(tensor(folder, file, name), dtype) for name in wanted)
    L, K, H, D = config.num_layers, config.num_kv_heads, config.head_dim, config.width
    width = L * 2 * K * H if kind == TYPES[2] else D
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(
            f"{folder}: prompt_embeddings of this model have the shape [places, {width}], got {list(rows.shape)}. "
            "The prompt is of another model."
        )
    if not 0 < len(rows) < config.max_length:
        raise ValueError(
            f"{folder}: a prompt has places, and fewer than the context of {config.max_length}, got {len(rows)}."
        )
    if kind == TYPES[2]:
        key, value = rows.reshape(-1, L, 2, K, H).transpose(2, 1, 3, 0, 4)[:, :, None]
        return params | {"prefix": Prefix(key, value)}
    if not factors:
        return params | {"prefix": SoftPrompt(rows[None])}
    columns, tasks = factors
    N, R = columns.shape[0], columns.shape[-1]
    if columns.shape != (N, len(rows), R) or tasks.shape != (N, R, D) or not N * R:
        raise ValueError(
            f"{folder}: of {len(rows)} places, prefix_task_cols are [tasks, {len(rows)}, ranks] and prefix_task_rows "
            f"[tasks, ranks, {D}], got {list(columns.shape)} and {list(tasks.shape)}."
        )
    return params | {"prefix": SoftPrompt(rows[None], columns, tasks, train=("rows", "columns", "tasks"))}
