"""Meshes, what is spread over them, and programs on many hosts."""

from jaxml.parallel.mesh import AXES, mesh, parse, spell
from jaxml.parallel.rules import RULES, hint, put, shard, shardings

__all__ = ["AXES", "RULES", "hint", "mesh", "parse", "put", "shard", "shardings", "spell"]
