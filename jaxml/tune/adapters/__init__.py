"""Adapters: small trained parts on frozen weights, and PEFT's folder format.

`attach` puts them on, `split` separates what is trained from what is not, `merge` makes a plain model of both.
"""

from jaxml.tune.adapters import adalora
from jaxml.tune.adapters.attach import METHODS, attach, plan
from jaxml.tune.adapters.eva import eva
from jaxml.tune.adapters.many import select, stack, take, tasks
from jaxml.tune.adapters.mix import mix
from jaxml.tune.adapters.nodes import LoRA, Scaled, Stack, Whole
from jaxml.tune.adapters.optimizers import lora_fa, lora_plus
from jaxml.tune.adapters.peft_load import load_peft
from jaxml.tune.adapters.peft_save import base_checksum, save_peft
from jaxml.tune.adapters.tree import (
    combine,
    delta,
    detach,
    has_adapters,
    merge,
    plain,
    split,
    unmerge,
    with_key,
)

__all__ = [
    "METHODS",
    "LoRA",
    "Scaled",
    "Stack",
    "Whole",
    "adalora",
    "attach",
    "base_checksum",
    "combine",
    "delta",
    "detach",
    "eva",
    "has_adapters",
    "load_peft",
    "lora_fa",
    "lora_plus",
    "merge",
    "mix",
    "plain",
    "plan",
    "save_peft",
    "select",
    "split",
    "stack",
    "take",
    "tasks",
    "unmerge",
    "with_key",
]
