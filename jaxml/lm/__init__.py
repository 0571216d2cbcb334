"""Language models: load one, ask it, score with it.

```python
model = lm.load("smollm2-135m")
lm.generate(model, ["The capital of France is"], max_new_tokens=2)  # [' Paris.']
```
"""

from jaxml.lm import cache, decoder, encoder, zoo
from jaxml.lm.config import DecoderConfig, RopeScaling
from jaxml.lm.generate import generate, samples
from jaxml.lm.model import Model, load, save, save_orbax
from jaxml.lm.sampling import Sampling
from jaxml.lm.score import perplexity, score
from jaxml.lm.tokenizer import Tokenizer

__all__ = [
    "DecoderConfig",
    "Model",
    "RopeScaling",
    "Sampling",
    "Tokenizer",
    "cache",
    "decoder",
    "encoder",
    "generate",
    "load",
    "perplexity",
    "samples",
    "save",
    "save_orbax",
    "score",
    "zoo",
]
