"""Adapt neural networks efficiently in JAX.

Everything is a pure function over pytrees, and the pieces compose under `jit`, `shard_map` and `pmap`.

| | |
|---|---|
| `jaxml.lm` | language models: load, generate, score |
| `jaxml.tune` | one training loop; in it adapters (LoRA and others), prompt tuning, R-Tuning, plans |
| `jaxml.quant` | weights of 4 and 8 bits |
| `jaxml.optim` | GaLore and LoRA as Optax transformations, states of eight bits |
| `jaxml.attention` | exact attention at any length |
| `jaxml.kan` | Kolmogorov–Arnold networks: from data to formulas |
| `jaxml.activations` | activations, fixed, gated, learnable |
| `jaxml.prompts` | prompts as functions, choices, search, answers of a grammar |
| `jaxml.rag` | retrieval, and answers that survive bad passages |
| `jaxml.parallel` | meshes, many hosts, TPU slices that are not there |
| `jaxml.nn` | Flax modules around these functions |
| `jaxml.weights`, `jaxml.paths` | what may stand where a weight matrix stands; weights by name |
| `jaxml.axes` | the letters of array axes |
| `jaxml.checkpoint`, `jaxml.checksum` | saving; whether every bit is the same |
| `jaxml.log`, `jaxml.testing` | logs, tiny models |

Sub-packages are imported when they are first named, so that `import jaxml` costs nothing and touches no device:
```python
from jaxml import lm
model = lm.load("smollm2-135m")
lm.generate(model, ["The capital of France is"], max_new_tokens=2)  # [' Paris.']
```
"""

import importlib

__version__ = "0.1.0"
__all__ = [
    "activations",
    "attention",
    "axes",
    "checkpoint",
    "checksum",
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
