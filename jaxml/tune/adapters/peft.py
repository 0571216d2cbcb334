"""PEFT's folder format: adapter_config.json and adapter_model.safetensors."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxml.axes import Params
from jaxml.lm import hf
from jaxml.lm.config import DecoderConfig
from jaxml.lm.tensors import module_name
from jaxml.paths import MATRICES
from jaxml.tune.adapters.nodes import LoRA
from jaxml.tune.adapters.tree import has_adapters

_PREFIX = "base_model.model.model.layers.{}.{}.lora_{}.weight"


def save_peft(folder: str | Path, params: Params, config: DecoderConfig, *, base_model: str = "") -> Path:
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT loads as they are.

    Args:
        base_model: name or path of the model under the adapter, for PEFT's own bookkeeping.

    Raises:
        ValueError: no adapters in the tree.
        FileExistsError: the folder exists and is not empty.
    """
    adapters = {n: w for n, w in params["layers"].items() if isinstance(w, LoRA)}
    if not adapters:
        raise ValueError("adapters.save_peft: the parameters hold at least one LoRA, got none.")
    ranks = {n: w.a.shape[-1] for n, w in adapters.items()}
    alphas = {n: float(jnp.ravel(w.scale)[0]) * ranks[n] for n, w in adapters.items()}
    first = next(iter(adapters))
    own = lambda values: {module_name(config, n): v for n, v in values.items() if v != values[first]}
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "target_modules": sorted(module_name(config, n).rsplit(".", 1)[-1] for n in adapters),
        "rank_pattern": own(ranks),
        "alpha_pattern": own(alphas),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    arrays = {}
    for name, w in adapters.items():
        a, b = np.asarray(w.a), np.asarray(w.b)
        for i in range(config.num_layers):
            module = module_name(config, name)
            arrays[_PREFIX.format(i, module, "A")] = a[i].T
            arrays[_PREFIX.format(i, module, "B")] = b[i].T
    with hf.whole_folder(folder) as temporary:
        hf.save_safetensors(temporary / "adapter_model.safetensors", arrays)
        (temporary / "adapter_config.json").write_text(json.dumps(about, indent=2))
    return Path(folder)


# Keys of adapter_config.json that change what is computed, and the only value that is implemented.
_REFUSED = {
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "use_bdlora": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "target_parameters": None,
}


def load_peft(folder: str | Path, params: Params, config: DecoderConfig, dtype=None) -> Params:
    """Puts the adapter of a PEFT folder around the model's matrices.

    Args:
        params: of the model that the adapter was made for, without adapters.
        dtype: of the factors; the file's own where None.

    Raises:
        FileNotFoundError, ValueError: files missing or truncated, an option that is not implemented, or an
            adapter of another model (names the first tensor that does not fit).
    """
    folder = Path(folder)
    about = hf.read_json(folder / "adapter_config.json")
    if about.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is LORA, got {about.get('peft_type')!r}.")
    for key, only in _REFUSED.items():
        if about.get(key) not in (only, None, False, [], {}):
            raise ValueError(f"{folder}: {key}={about[key]!r} is not implemented; only {only!r} is.")
    out = dict(params, layers=dict(params["layers"]))
    with hf.open_safetensors(folder / "adapter_model.safetensors") as file:
        left = set(file.keys())
        for name in MATRICES:
            module = module_name(config, name)
            keys = {x: [_PREFIX.format(i, module, x) for i in range(config.num_layers)] for x in "AB"}
            if keys["A"][0] not in left:
                continue
            missing = [k for k in keys["A"] + keys["B"] if k not in left]
            if missing:
                raise ValueError(f"{folder}: tensor {missing[0]} is missing. The adapter is of another model.")
            a, b = (np.stack([file.get_tensor(k).T for k in keys[x]]) for x in "AB")
            left -= set(keys["A"]) | set(keys["B"])
            w = params["layers"][name]
            if (a.shape[1], b.shape[2]) != w.shape[1:] or a.shape[2] != b.shape[1]:
                raise ValueError(
                    f"{folder}: {module} is {w.shape[1]} → {w.shape[2]} in this model, "
                    f"{a.shape[1]} → {b.shape[2]} in the adapter. The adapter is of another model."
                )
            out["layers"][name] = LoRA(
                w, jnp.asarray(a, dtype), jnp.asarray(b, dtype), jnp.full(len(a), _scale(about, module, a))
            )
    if left or not has_adapters(out):
        what = f"has no place for {sorted(left)[0]}" if left else "finds none of its tensors"
        raise ValueError(f"{folder}: this model {what}. The adapter is of another model, or adapts other parts.")
    return out


def _scale(about: dict[str, Any], module: str, a: np.ndarray) -> float:
    rank = a.shape[-1]
    alpha = about.get("lora_alpha", 8)
    for pattern, value in (about.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith("." + pattern) or pattern.endswith("." + module):
            alpha = value
    return float(alpha) / (math.sqrt(rank) if about.get("use_rslora") else rank)
