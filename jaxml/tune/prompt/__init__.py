"""Prompt tuning: a prompt that gradients write, in front of a model that stays as it is.

`soft` and `prefix` put one there, `tune.fit` trains it, `adapters.save_peft` writes it.
"""

from jaxml.tune.prompt.hard import Hard, harden, nearest
from jaxml.tune.prompt.many import stack, take, vote
from jaxml.tune.prompt.nodes import Prefix, Projected, SoftPrompt
from jaxml.tune.prompt.prefix import prefix, settle
from jaxml.tune.prompt.soft import soft

__all__ = [
    "Hard",
    "Prefix",
    "Projected",
    "SoftPrompt",
    "harden",
    "nearest",
    "prefix",
    "settle",
    "soft",
    "stack",
    "take",
    "vote",
]
