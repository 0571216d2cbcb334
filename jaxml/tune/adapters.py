"""LoRA: low-rank factors on chosen matrices, and PEFT's folder format."""

import dataclasses
import fnmatch
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, Params
from jaxml.lm import hf
from jaxml.lm.config import DecoderConfig
from jaxml.lm.tensors import MATRICES, module_name
from jaxml.weights import dot, is_node

ALL_LINEAR = tuple(f"layers/{name}" for name in MATRICES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """W + scale · A B in the place of W; all arrays may have layers stacked in front."""

    base: Any  # [..., D, F], an array or another weight node
    a: Float[Array, "... D R"]
    b: Float[Array, "... R F"]
    scale: float = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def matmul(self, x: Array) -> Array:
        low = jnp.matmul(jnp.matmul(x, self.a.astype(x.dtype)), self.b.astype(x.dtype))
        return dot(x, self.base) + self.scale * low

    def dense(self) -> Array:
        base = self.base.dense() if is_node(self.base) else self.base
        delta = self.scale * jnp.matmul(self.a.astype(jnp.float32), self.b.astype(jnp.float32))
        return (base.astype(jnp.float32) + delta).astype(base.dtype)


def attach(
    params: Params,
    key: Array,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ALL_LINEAR,
    dtype=jnp.float32,
) -> Params:
    """Puts a LoRA around every matrix that a pattern names; the function computed does not change yet.

    A is uniform within ±1/√D and B is zero, as in PEFT; scale = alpha / rank.

    Args:
        params: of a decoder.
        rank: of the factors.
        alpha: twice the rank where None.
        targets: shell patterns over paths such as "layers/q"; one without "/" is matched with the last
            part alone ("q", "*").
        dtype: of the factors.

    Raises:
        ValueError: a pattern that matches nothing (lists the paths), a rank that is not in 1 … min(D, F).

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """
    chosen = _match(params, targets)
    alpha = 2.0 * rank if alpha is None else alpha
    out = dict(params, layers=dict(params["layers"]))
    for k, name in zip(jax.random.split(key, len(chosen)), chosen):
        w = params["layers"][name]
        *lead, d, f = w.shape
        if not 1 <= rank <= min(d, f):
            raise ValueError(
                f"adapters.attach: the rank is in 1 … {min(d, f)} for layers/{name} of shape {d} × {f}, got {rank}."
            )
        bound = 1.0 / math.sqrt(d)
        a = jax.random.uniform(k, (*lead, d, rank), dtype, -bound, bound)
        out["layers"][name] = LoRA(w, a, jnp.zeros((*lead, rank, f), dtype), alpha / rank)
    return out


def _match(params: Params, targets: Sequence[str]) -> list[str]:
    paths = {f"layers/{name}": name for name in MATRICES if name in params["layers"]}
    chosen = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        hits = [n for p, n in paths.items() if fnmatch.fnmatchcase(p if "/" in pattern else n, pattern)]
        if not hits:
            raise ValueError(
                f"adapters.attach: a pattern matches at least one matrix, got {pattern!r}. "
                f"There are {', '.join(paths)}."
            )
        chosen |= set(hits)
    return [name for name in MATRICES if name in chosen]


def has_adapters(params: Params) -> bool:
    """Whether a LoRA stands anywhere in the tree."""
    return any(isinstance(w, LoRA) for w in jax.tree.leaves(params, is_leaf=is_node))


def split(params: Params) -> tuple[Params, Params]:
    """(trainable, frozen): the factors by path, and everything else. Without adapters all is trainable."""
    if not has_adapters(params):
        return params, {}
    layers = params["layers"]
    trainable = {n: {"a": w.a, "b": w.b} for n, w in layers.items() if isinstance(w, LoRA)}
    bare = lambda w: dataclasses.replace(w, a=None, b=None) if isinstance(w, LoRA) else w
    frozen = dict(params, layers={n: bare(w) for n, w in layers.items()})
    return {"layers": trainable}, frozen


def combine(trainable: Params, frozen: Params) -> Params:
    """The tree that `split` took apart; the frozen part may be unrolled (`decoder.unstack`) in between."""
    if not frozen:
        return trainable

    def put(layer, factors):
        return dict(layer, **{name: dataclasses.replace(layer[name], **pair) for name, pair in factors.items()})

    layers, factors = frozen["layers"], trainable["layers"]
    if isinstance(layers, tuple):
        of = lambda i: jax.tree.map(lambda a: a[i], factors)
        return dict(frozen, layers=tuple(put(layer, of(i)) for i, layer in enumerate(layers)))
    return dict(frozen, layers=put(layers, factors))


def merge(params: Params) -> Params:
    """Adapters added into their matrices: a plain model that computes the same."""
    return jax.tree.map(lambda w: w.dense() if is_node(w) else w, params, is_leaf=is_node)


def detach(params: Params) -> Params:
    """The model as it was before `attach`."""
    bare = lambda w: w.base if isinstance(w, LoRA) else w
    return jax.tree.map(bare, params, is_leaf=is_node)


# ---- PEFT's folder ----------------------------------------------------------------------------------

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
    alphas = {n: w.scale * ranks[n] for n, w in adapters.items()}
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
            out["layers"][name] = LoRA(w, jnp.asarray(a, dtype), jnp.asarray(b, dtype), _scale(about, module, a))
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
