"""Kolmogorov–Arnold networks: functions on edges, as pure functions over one pytree."""

from jaxml.kan import conv, pinn, pykan, rational
from jaxml.kan.attribution import Attribution, attribute, interactions, regularizer
from jaxml.kan.compile import from_formula, loosen
from jaxml.kan.discover import Discovery, discover
from jaxml.kan.expressions import formula, function, latex
from jaxml.kan.file import load, save
from jaxml.kan.fit import fit, with_dtype
from jaxml.kan.grid import refine, update
from jaxml.kan.library import Function
from jaxml.kan.network import KAN, apply, combine, init, split
from jaxml.kan.plot import plot
from jaxml.kan.prune import keep, prune, prune_edges, prune_inputs, prune_nodes
from jaxml.kan.symbolic import auto_symbolic, fix, simplify, suggest, unfix

__all__ = [
    "KAN", "Attribution", "Discovery", "Function", "apply", "attribute", "auto_symbolic", "combine", "conv",
    "discover", "fit", "fix", "formula", "from_formula", "function", "init", "interactions", "keep", "latex",
    "load", "loosen", "pinn", "plot", "prune", "prune_edges", "prune_inputs", "prune_nodes", "pykan",
    "rational", "refine", "regularizer", "save", "simplify", "split", "suggest", "unfix", "update",
    "with_dtype",
]  # fmt: skip
