"""What PEFT calls our weights, in its folders."""

from collections.abc import Mapping
from typing import Any

from jaxml.lm.config import DecoderConfig
from jaxml.lm.tensors import tensor_names

Modules = Mapping[str, str]  # path → module, "{}" for the layer
BASE = "base.json"  # beside an adapter that is of no use on any weights but those it was trained on
PREFIX = "base_model.model."
VERA = ("base_model.vera_A", "base_model.vera_B")
RANK_SHIFT = 1e-5  # PEFT divides AdaLoRA's product by the rank and this


def modules_of(config: DecoderConfig | Modules) -> dict[str, str]:
    """Path → module name, "{}" for the layer."""
    if not isinstance(config, DecoderConfig):
        return dict(config)
    names = {"/".join(path): name for path, name in tensor_names(config, "hf").items()}
    return {path: name.removesuffix(".weight") for path, name in names.items() if name.endswith(".weight")}


def of_layers(path: str, modules: Modules, w: Any) -> list[str]:
    """The module of each layer."""
    name = modules[path]
    return [name.format(i) for i in range(w.shape[0])] if "{}" in name else [name]


def short(module: str, end: int = 1) -> str:
    return ".".join(module.split(".")[-end:])
