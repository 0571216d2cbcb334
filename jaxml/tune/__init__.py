"""Fine-tuning: data, loss, adapters and one loop."""

import importlib

from jaxml.tune.fit import fit, loss_of
from jaxml.tune.options import Options
from jaxml.tune.run import Diverged, Stopped
from jaxml.tune.step import optimizer

__all__ = [
    "Diverged", "Options", "Stopped", "adapters", "data", "facts", "fit", "loss_of", "optimizer", "plan", "prompt",
    "r_tuning", "step",
]  # fmt: skip


def __getattr__(name: str):
    if name in __all__:  # what is imported when it is first named
        return importlib.import_module(f"jaxml.tune.{name}")
    raise AttributeError(f"module 'jaxml.tune' has no attribute {name!r}; it has {', '.join(__all__)}")
