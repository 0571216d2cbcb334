"""adapter_config.json, read and checked: what changes the function and is not implemented is refused by name."""

import math
import re
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from jaxml import files
from jaxml.tune.adapters import starts

METHODS = ("LORA", "VERA", "IA3", "ADALORA")
PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING")

# Keys that change what is computed, and the only value that is implemented.
_REFUSED = {
    "bias": "none",
    "fan_in_fan_out": False,
    "trainable_token_indices": None,
    "lora_bias": False,
    "use_bdlora": None,
    "use_qalora": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "target_parameters": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
_LEAVING = ("gaussian", "eva", "orthogonal", "mica")  # starts that leave W as it was


def read(folder: Path) -> dict[str, Any]:
    """The object in adapter_config.json.

    Raises:
        FileNotFoundError, ValueError: no file, a key with a value that it cannot have, an option that is not
            implemented.
    """
    with files.reading(folder / "adapter_config.json", "an adapter"):
        return _checked(folder)


def _checked(folder: Path) -> dict[str, Any]:
    about = files.read_json(folder / "adapter_config.json")
    if about.get("peft_type") not in (*METHODS, *PROMPTS):
        known = ", ".join((*METHODS, *PROMPTS))
        raise ValueError(f"{folder}: peft_type is one of {known}, got {about.get('peft_type')!r}.")
    if about.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(f"{folder}: num_transformer_submodules is 1, got {about['num_transformer_submodules']!r}.")
    for key, only in _REFUSED.items():
        if about.get(key) not in (only, None, False, [], {}):
            raise ValueError(f"{folder}: {key}={about[key]!r} is not implemented; only {only!r} is.")
    for key, (holds, rule) in _RULES.items():
        if about.get(key) is not None and not holds(about[key]):
            raise ValueError(f"{folder}: {key} is {rule}, got {about[key]!r}.")
    start = about.get("init_lora_weights")
    if isinstance(start, str) and start not in _LEAVING and not starts.moves(start):
        raise ValueError(
            f"{folder}: init_lora_weights={start!r} is none of {', '.join((*_LEAVING, *starts.MOVING))}. If it moved a "
            "part of the weights into the adapter, write it with path_initial_model_for_weight_conversion."
        )
    return about


def _number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and x >= 0


def _pattern(x: Any) -> bool:
    """A regular expression whose groups do not repeat: those that do may take for ever."""
    try:
        return isinstance(x, str) and re.search(r"\)[*+{]", x) is None and re.compile(x) is not None
    except re.error:
        return False


def _many(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and all(map(holds, x))


_name = lambda x: isinstance(x, str)
_dropout = (lambda x: _number(x) and 0 <= x < 1, "in [0, 1)")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lora_alpha": (_number, "a number"),
    "lora_dropout": _dropout,
    "vera_dropout": _dropout,
    "alpha_pattern": (
        lambda x: isinstance(x, dict) and all(map(_pattern, x)) and all(map(_number, x.values())),
        "an object of regular expressions and numbers",
    ),
    "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
    "use_dora": (lambda x: isinstance(x, bool), "true or false"),
    "init_lora_weights": (lambda x: isinstance(x, bool | str), "true, false or a name"),
    "init_r": (lambda x: _whole(x) and x > 0, "a whole number above 0"),
    "target_modules": (
        lambda x: _pattern(x) or _many(_name)(x),
        "a regular expression or a list of names",
    ),
    "modules_to_save": (_many(_name), "a list of names"),
    "layers_to_transform": (lambda x: _whole(x) or _many(_whole)(x), "a layer's number or a list of them"),
}
