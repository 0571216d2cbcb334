"""GaLore and LoRA as Optax gradient transformations, optimizer states of eight bits, gradients of low rank."""

from jaxml.optim.aliases import (
    adabelief,
    adafactor,
    adam,
    adam8bit,
    adamw,
    adamw8bit,
    adan,
    lamb,
    lion,
    lion8bit,
    nadam,
    nadamw,
    radam,
    rmsprop,
    sgd,
    yogi,
)
from jaxml.optim.chain import aware, chain
from jaxml.optim.eight_bit import eight_bit
from jaxml.optim.galore import galore
from jaxml.optim.lora import lora
from jaxml.optim.offload import offload
from jaxml.optim.sharding import state_sharding
from jaxml.optim.subspace import subspace
from jaxml.optim.targets import DimensionNumbers

__all__ = [
    "DimensionNumbers",
    "adabelief",
    "adafactor",
    "adam",
    "adam8bit",
    "adamw",
    "adamw8bit",
    "adan",
    "aware",
    "chain",
    "eight_bit",
    "galore",
    "lamb",
    "lion",
    "lion8bit",
    "lora",
    "nadam",
    "nadamw",
    "offload",
    "radam",
    "rmsprop",
    "sgd",
    "state_sharding",
    "subspace",
    "yogi",
]
