"""jaxml: adapt neural networks efficiently in JAX.

Everything is a pure function over pytrees, and the pieces compose under ``jit``, ``shard_map``
and ``pmap``. Sub-packages are imported when they are first named, so that ``import jaxml`` costs
nothing and touches no device::

    from jaxml import lm
    model = lm.load("smollm2-135m")
    lm.generate(model, ["The capital of France is"], max_new_tokens=5)
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "activations",
    "attention",
    "axes",
    "checkpoint",
    "kan",
    "lm",
    "log",
    "nn",
    "optim",
    "parallel",
    "paths",
    "prompts",
    "quant",
    "rag",
    "testing",
    "tune",
    "weights",
]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"jaxml.{name}")
    raise AttributeError(f"module 'jaxml' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return [*__all__, "__version__"]
