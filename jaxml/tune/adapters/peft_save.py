"""PEFT's folder format, written: adapter_config.json and adapter_model.safetensors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxml import paths, weights
from jaxml.axes import Array, Params
from jaxml.checksum import checksum
from jaxml.lm import hf
from jaxml.lm.config import DecoderConfig
from jaxml.quant import QArray
from jaxml.tune.adapters import starts
from jaxml.tune.adapters.nodes import LoRA, Scaled, Whole
from jaxml.tune.adapters.peft_names import BASE, PREFIX, RANK_SHIFT, VERA, Modules, modules_of, of_layers, short
from jaxml.tune.adapters.tree import of


def save_peft(
    folder: str | Path,
    params: Params,
    config: DecoderConfig | Modules,
    *,
    base_model: str = "",
    dtype: Any = None,
    base: str | None = None,
) -> Path:
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT loads as they are.

    Args:
        params: with adapters of one method, and perhaps weights that are trained whole; or with a prompt in front.
        config: of the decoder; or, of another model, the module for each path ("{}" for the layer of a stack), as in
            {"layers/q": "encoder.layer.{}.attention.query"}.
        base_model: name or path of the model under the adapter, for PEFT's own bookkeeping. Needed where a start moved
            a part of W into the adapter and the rest was quantised: the adapter stands around that rest alone, so
            write it too (``lm.save`` of ``adapters.detach``) and name it.
        dtype: of the tensors; their own where None.
        base: `base_checksum(params)` where one process of several writes; found out where None. It is kept beside an
            adapter of such a start, and `load_peft` refuses other weights.

    Raises:
        ValueError: no adapters in the tree, several methods, a weight that PEFT has no name for, a start that moved a
            part of W which PEFT cannot find again.
        FileExistsError: the folder exists and is not empty.

    Example:
        >>> import jax, tempfile
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> model = testing.tiny_model()
        >>> params = adapters.attach(model.params, jax.random.key(0), rank=2, targets=["q"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(p.name for p in save_peft(f"{folder}/adapter", params, model.config).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    found = of(params)
    if "prefix" in found:
        from jaxml.tune.prompt import peft as prompts  # which is made of this package

        return prompts.save(folder, params, config, base_model=base_model, dtype=dtype)
    methods = {w.method for w in found.values() if not isinstance(w, Whole)}
    if not found or not methods:
        raise ValueError("adapters.save_peft: the parameters hold at least one LoRA or IA3, got none.")
    if "stack" in methods:
        raise ValueError("adapters.save_peft: a folder holds one adapter, got a stack of many. `adapters.take` one.")
    if len(methods) > 1 or not methods <= {"lora", "vera", "adalora", "ia3"}:
        raise ValueError(
            f"adapters.save_peft: a folder holds adapters of one method, got {', '.join(sorted(methods))}."
        )
    modules = modules_of(config)
    for path in found:
        if path not in modules:
            raise ValueError(f"adapters.save_peft: PEFT has no module for {path}; it has {', '.join(modules)}.")
    (method,) = methods
    kept = _kept(found, modules) if method == "adalora" else {}
    arrays = {}
    for path, w in found.items():
        for i, module in enumerate(of_layers(path, modules, w)):
            parts = _tensors(w, path, None if "{}" not in modules[path] else i, kept.get(module))
            arrays |= {f"{PREFIX}{module}.{name}": part for name, part in parts.items()}
    if method == "vera":
        a, b = _vera_projections(found)
        arrays |= {VERA[0]: a.T, VERA[1]: b.T}
    arrays = {k: np.asarray(v if dtype is None else v.astype(dtype)) for k, v in arrays.items()}
    base = base or base_checksum(params)
    with hf.whole_folder(folder) as temporary:
        if base:
            (temporary / BASE).write_text(json.dumps({"checksum": base}))
        hf.save_safetensors(temporary / "adapter_model.safetensors", arrays)
        about = _about(found, modules, method, kept, base_model)
        (temporary / "adapter_config.json").write_text(json.dumps(about, indent=2))
    return Path(folder)


def base_checksum(params: Params) -> str | None:
    """Of the quantised weights under adapters into which a part of them moved; None where there are no such.

    Example:
        >>> from jaxml import testing
        >>> base_checksum(testing.tiny_model().params) is None
        True
    """
    moved = {path: w for path, w in of(params).items() if isinstance(w, LoRA) and starts.moves(w.start)}
    found = {path: w.base for path, w in moved.items() if isinstance(w.base, QArray)}
    return checksum(found) if found else None


def _tensors(w: Any, path: str, layer: int | None, kept: np.ndarray | None) -> dict[str, Array]:
    """Name within the module → tensor, of one layer; of AdaLoRA the ranks that are kept."""
    pick = lambda part: part if layer is None or part is None else part[layer]
    if isinstance(w, Whole):
        value = pick(w.value)
        return {"weight": value.T if value.ndim == 2 and path not in paths.TABLES else value}
    if isinstance(w, Scaled):
        return {"ia3_l": pick(w.inner)[None] if w.inner is not None else pick(w.outer)[:, None]}
    if w.method == "vera":
        return {"vera_lambda_b": pick(w.outer), "vera_lambda_d": pick(w.diagonal)}
    a, b = pick(w.a), pick(w.b)
    if w.method == "adalora":
        return {"lora_A": a.T[kept], "lora_B": b.T[:, kept], "lora_E": pick(w.diagonal)[kept, None]}
    if w.ranks is not None:
        if not w.ranks[layer]:
            return {}
        a, b = a[:, : w.ranks[layer]], b[: w.ranks[layer]]
    if path == "embed":
        parts = {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    else:
        parts = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    return parts | ({} if w.magnitude is None else {"lora_magnitude_vector": pick(w.magnitude)})


def _kept(found: dict[str, Any], modules: Modules) -> dict[str, np.ndarray]:
    """Which of AdaLoRA's ranks have a singular value, for each module; all of them before the first step."""
    nodes = {path: w for path, w in found.items() if not isinstance(w, Whole)}
    begun = any(bool((w.diagonal != 0).any()) for w in nodes.values())
    kept = {}
    for path, w in nodes.items():
        e = np.asarray(w.diagonal, np.float32).reshape(-1, w.rank)
        for i, module in enumerate(of_layers(path, modules, w)):
            kept[module] = e[i] != 0 if begun else np.arange(w.rank) < (w.rank if w.ranks is None else w.ranks[i])
    return kept


def _about(
    found: dict[str, Any], modules: Modules, method: str, kept: dict[str, np.ndarray], base_model: str
) -> dict[str, Any]:
    """adapter_config.json."""
    adapted = {path: w for path, w in found.items() if not isinstance(w, Whole)}
    whole = [short(modules[path], end=2 if path == "norm" else 1) for path, w in found.items() if isinstance(w, Whole)]
    about = {
        "peft_type": method.upper(),
        "task_type": "CAUSAL_LM",
        "target_modules": sorted({short(modules[path]) for path in adapted}),
        "modules_to_save": sorted(set(whole)) or None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "base_model_name_or_path": base_model,
    }
    if method == "ia3":
        inputs = [short(modules[path]) for path, w in adapted.items() if w.inner is not None]
        return about | {"feedforward_modules": sorted(inputs), "init_ia3_weights": True}
    first = next(iter(adapted.values()))
    if method == "vera":
        return about | {
            "r": first.rank, "projection_prng_key": 0, "save_projection": True, "vera_dropout": first.dropout,
            "d_initial": starts.VERA_D, "bias": "none", "init_weights": True,
        }  # fmt: skip
    if method == "adalora":
        return about | _about_adalora(adapted, kept)
    ranks, alphas = {}, {}
    for path, w in adapted.items():
        for i, module in enumerate(of_layers(path, modules, w)):
            rank = w.rank if w.ranks is None else w.ranks[i]
            scale = float(w.scale[i] if w.scale.ndim else w.scale)
            ranks[module] = rank
            alphas[module] = float(f"{scale * rank:.6g}")
    if 0 in ranks.values():
        about["target_modules"] = sorted(module for module, rank in ranks.items() if rank)
    used = {module: rank for module, rank in ranks.items() if rank}
    r, alpha = next(iter(used.values())), next(iter(alphas[module] for module in used))
    about |= {"r": r, "lora_alpha": alpha, "lora_dropout": first.dropout, "bias": "none"}
    about |= {"rank_pattern": _pattern(used, r, modules), "use_rslora": False, "init_lora_weights": True}
    about |= {"alpha_pattern": _pattern({m: alphas[m] for m in used}, alpha, modules)}
    kinds = {(w.magnitude is not None) for w in adapted.values()}
    if len(kinds) > 1:
        raise ValueError("adapters.save_peft: all weights have magnitudes (DoRA) or none has, got both.")
    if not base_model and any(starts.moves(w.start) and isinstance(w.base, QArray) for w in adapted.values()):
        raise ValueError(
            "adapters.save_peft: a part of W is in A and B, and the rest was quantised: without it the adapter is "
            "of no use. Write that rest (lm.save of adapters.detach) and name it with base_model."
        )
    begun = {w.start for w in adapted.values() if not isinstance(w.base, QArray)}
    if moved := {start for start in begun if starts.moves(start)}:
        if len(begun) > 1 or not moved <= set(starts.FOUND_AGAIN):
            raise ValueError(
                f"adapters.save_peft: a part of W is in A and B (start {', '.join(sorted(begun))}), and PEFT cannot "
                "find it again. Write `adapters.plain(...)`: LoRAs of twice the rank around the model as it was."
            )
        about["init_lora_weights"] = moved.pop()
    return about | {"use_dora": kinds.pop()}


def _about_adalora(adapted: dict[str, Any], kept: dict[str, np.ndarray]) -> dict[str, Any]:
    scales = {float(s) for w in adapted.values() for s in np.asarray(w.scale).reshape(-1) if s}
    if len(scales) > 1:
        raise ValueError(f"adapters.save_peft: PEFT has one scale for all of AdaLoRA's matrices, got {sorted(scales)}.")
    r = max(w.rank for w in adapted.values())
    flags = {f"{module}.lora_E": [*of.tolist(), *[False] * (r - len(of))] for module, of in kept.items()}
    return {
        "r": r, "init_r": r, "target_r": r, "total_step": 1, "bias": "none", "init_lora_weights": True,
        "lora_alpha": float(f"{max(scales, default=1.0) * (r + RANK_SHIFT):.6g}"),
        "lora_dropout": next(iter(adapted.values())).dropout,
        "rank_pattern": None if all(all(of) for of in flags.values()) else flags,
    }  # fmt: skip


def _pattern(values: dict[str, Any], most: Any, modules: Modules) -> dict[str, Any]:
    """Module pattern → value, for those that differ; one entry for all layers that agree."""
    out = {}
    for name in modules.values():
        of_layers = {m: v for m, v in values.items() if re.fullmatch(re.escape(name).replace(r"\{\}", r"\d+"), m)}
        differing = {m: v for m, v in of_layers.items() if v != most}
        if differing and len(differing) == len(of_layers) and len(set(differing.values())) == 1 and "{}" in name:
            out[name.split("{}.")[-1]] = next(iter(differing.values()))
        else:
            out |= differing
    return out


def _vera_projections(found: dict[str, Any]) -> tuple[Array, Array]:
    nodes = [w for w in found.values() if isinstance(w, LoRA)]
    largest = lambda parts: max(parts, key=lambda p: p.size)
    a, b = (largest([weights.value(getattr(w, name)) for w in nodes]) for name in "ab")
    return a, b
