"""What a compiled program does, read from its text: what devices send each other, and what passes through memory.

XLA's own cost analysis counts the body of a loop once; here every instruction counts as often as its loops say.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "while", "conditional", "call", "opt-barrier",
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")
_PLACED = re.compile(_SHAPE.pattern + r"(?!\{[^}]*S\(\d)")  # in the main memory, not in one of a processor's own
_CALLED = re.compile(r"(?:body|to_apply|calls|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:?\s*\{"?n"?:"?(\d+)')
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Example:
        >>> Instruction("add.1", "add", "f32[8,128]", ("a", "b"), "%add.1 = f32[8,128] add(%a, %b)").bytes
        4096
    """

    name: str
    opcode: str
    shape: str  # of what it gives
    operands: tuple[str, ...]
    line: str

    @property
    def bytes(self) -> int:
        """In the main memory."""
        return sum(size_of(kind, dims) for kind, dims in _PLACED.findall(self.shape))


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices send each other at one place of the program.

    Example:
        >>> sent = Collective("all-gather", "bf16[8,128]", size_of("bf16", "8,128"), times=12, depth=1, name="dot")
        >>> sent.times * sent.bytes
        24576
    """

    kind: str
    shape: str  # on one device, after it
    bytes: int  # of that, each time
    times: int  # the loops around it turn
    depth: int  # how many loops
    name: str  # of the operation in the source, as JAX has it


def size_of(kind: str, dims: str) -> int:
    """Bytes of an array as HLO writes it.

    Example:
        >>> size_of("bf16", "8,128"), size_of("pred", ""), size_of("s4", "6")
        (2048, 1, 3)
    """
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind, int(digits[0]) if digits else 0)
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


class Program:
    """The text of a compiled program (`compiled.as_text()`), by computation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> step = lambda x, _: (jnp.sin(x @ x), None)
        >>> run = jax.jit(lambda x: jax.lax.scan(step, x, length=7)[0])
        >>> Program(run.lower(jnp.ones((64, 64))).compile().as_text()).collectives()
        []
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            head = re.match(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\{\s*$", line)
            if head:
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (found := _instruction(line)):
                current[found.name] = found

    def walk(self, fusions: bool = False) -> Iterator[tuple[Instruction, dict[str, Instruction], int, int]]:
        """(instruction, its computation, times, depth of loops) of all, with `fusions` what is inside them too; of the
        branches of a condition, all."""

        def visit(name: str, times: int, depth: int):
            for i in self.computations.get(name, {}).values():
                yield i, self.computations[name], times, depth
                if i.opcode == "while":
                    for called in _CALLED.findall(i.line):
                        yield from visit(called, times * self._turns(i), depth + 1)
                elif i.opcode == "call" or (fusions and i.opcode == "fusion"):
                    yield from visit(_CALLED.findall(i.line)[0], times, depth)
                elif i.opcode == "conditional":
                    for several, one in _BRANCHES.findall(i.line):
                        for called in re.findall(r"[\w.\-]+", several or one):
                            yield from visit(called, times, depth)
                elif i.opcode == "async-start" and "calls=" in i.line:
                    yield from visit(_CALLED.findall(i.line)[0], times, depth)

        yield from visit(self.entry, 1, 0)

    def _turns(self, loop: Instruction) -> int:
        """How often a loop turns: as XLA noted, or up to what its condition compares a counter from 0 with."""
        if noted := _TRIPS.search(loop.line):
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.line)
        inside = self.computations.get(condition[1], {}) if condition else {}
        for i in inside.values():
            if i.opcode == "compare" and "direction=LT" in i.line:
                for name in i.operands:
                    if name in inside and (number := re.search(r"constant\((\d+)\)", inside[name].line)):
                        return int(number[1])
        return 1

    def collectives(self) -> list[Collective]:
        """Every one, in order; one that is split into several fusions is one."""
        found: dict[tuple, Collective] = {}
        for i, _, times, depth in self.walk(fusions=True):
            kind = i.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            shapes = _SHAPE.findall(i.shape)
            if i.opcode.endswith("-start") and len(shapes) > 1:  # (what goes in, what comes out, flags)
                shapes = shapes[len(shapes) // 2 :] if kind == "all-reduce" else shapes[1:2]
            name, channel = re.search(r'op_name="([^"]*)"', i.line), _CHANNEL.search(i.line)
            size = sum(size_of(*shape) for shape in shapes)
            shown = ", ".join(f"{k}[{d}]" for k, d in shapes)
            key = (kind, channel[1], size) if channel else (len(found),)
            found.setdefault(key, Collective(kind, shown, size, times, depth, name[1] if name else ""))
        return list(found.values())

    def bytes_moved(self) -> int:
        """Bytes that one device reads from and writes to memory: what goes into and comes out of every fusion, of
        slices and updates in place only the part that is touched."""
        total = 0
        for i, around, times, _ in self.walk():
            if i.opcode in _FREE or i.opcode.endswith("-done"):
                continue
            total += times * self._touched(i, around)
        return total

    def _touched(self, i: Instruction, around: dict[str, Instruction]) -> int:
        sizes = [around[name].bytes if name in around else 0 for name in i.operands]
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * i.bytes
        if i.opcode == "dynamic-update-slice":
            return 2 * (sizes[1] if len(sizes) > 1 else i.bytes)
        inside = self.computations.get((_CALLED.findall(i.line) or [""])[0], {}) if i.opcode == "fusion" else {}
        if not inside:
            return i.bytes + sum(sizes)
        users: dict[str, list[Instruction]] = {}
        for one in inside.values():
            for name in one.operands:
                users.setdefault(name, []).append(one)
        read = 0
        for one in inside.values():
            if one.opcode == "parameter":
                by = users.get(one.name, [])
                sliced = by and all(u.opcode == "dynamic-slice" and u.operands[0] == one.name for u in by)
                updated = by and all(u.opcode == "dynamic-update-slice" and u.operands[0] == one.name for u in by)
                read += sum(u.bytes for u in by) if sliced else 0 if updated else one.bytes
        updates = [u for u in inside.values() if u.opcode == "dynamic-update-slice" and u.bytes == i.bytes]
        written = sum(inside[u.operands[1]].bytes for u in updates if u.operands[1] in inside) if updates else i.bytes
        return read + written


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$", line)
    if not found:
        return None
    name, rest = found[1], found[2]
    if rest.startswith("("):  # a tuple of shapes
        end = _closing(rest, 0)
        shape, rest = rest[: end + 1], rest[end + 1 :]
    else:
        shape, _, rest = rest.partition(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", rest)
    if not opcode:
        return None
    operands = re.findall(r"%([\w.\-]+)", rest[opcode.end() : _closing(rest, opcode.end() - 1)])
    return Instruction(name, opcode[1], shape, tuple(operands), line)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)
