"""Kolmogorov–Arnold networks: functions on edges, as pure functions over one pytree."""

from jaxml.kan.fit import fit, with_dtype
from jaxml.kan.grid import refine, update
from jaxml.kan.network import KAN, apply, combine, init, split

__all__ = ["KAN", "apply", "combine", "fit", "init", "refine", "split", "update", "with_dtype"]
