"""Meshes, what is spread over them, and programs on many hosts."""

from jaxml.parallel import hosts, program, topology
from jaxml.parallel.mesh import AXES, mesh, parse, spell
from jaxml.parallel.rules import RULES, hint, put, shard, shardings
from jaxml.parallel.step import data_parallel

__all__ = [
    "AXES", "RULES", "data_parallel", "hint", "hosts", "mesh", "parse", "program", "put", "shard", "shardings", "spell",
    "topology",
]  # fmt: skip
