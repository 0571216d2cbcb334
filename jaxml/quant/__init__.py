"""Quantised weights: pytrees that stand where a matrix stood, and are dequantised inside each product.

| format | bits | scale of | use |
|---|---|---|---|
| `nf4` | 4.127 | 64 weights | frozen weights under adapters (QLoRA); bitsandbytes' bytes |
| `fp4` | 4.127 | 64 weights | the same with a floating code |
| `int4` | 4.127 | 64 weights | the same, linear |
| `int8` | 8 + … | a channel | near-exact; or of blocks |

A product keeps nothing but codes for the backward pass, where the weight is dequantised again. `explain` says by which
program, `with_implementation` chooses one.
"""

from jaxml.quant import bnb, fp4, int4, int8, nf4
from jaxml.quant.kernel import explain, with_implementation
from jaxml.quant.params import FORMATS, dequantize_params, quantize_params
from jaxml.quant.qarray import QArray, bits_per_weight
from jaxml.quant.sharded import Sharded, shard

__all__ = [
    "FORMATS",
    "QArray",
    "Sharded",
    "bits_per_weight",
    "bnb",
    "dequantize_params",
    "explain",
    "fp4",
    "int4",
    "int8",
    "nf4",
    "quantize_params",
    "shard",
    "with_implementation",
]
