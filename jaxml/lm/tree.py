"""Texts that share their beginnings, laid out in one row: a tree, depth first.

    The capital of France is ─┬─ Paris
                              ├─ London
                              └─ the city of ─┬─ Paris
                                              └─ Rome

Each token sees what leads to it and nothing beside it, and stands at the position that it has in its own text, so that
one forward pass over the row equals one over each text (`decoder.hidden`'s `positions` and `ends`).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Node:
    """Tokens, and what may follow them.

    Example:
        >>> two = Node([5, 6], [Node([7], scored=True), Node([8], scored=True)])
        >>> lay(two).tokens, lay(two).targets
        ([5, 6, 7, 8], [7, 8])
    """

    tokens: Sequence[int]
    children: Sequence["Node"] = ()
    scored: bool = False  # whether the tokens' likelihood is asked for


class Row(NamedTuple):
    """A tree of T tokens, M of them scored.

    Example:
        >>> row = lay(Node([5, 6], [Node([7]), Node([8])]))
        >>> row.positions, row.ends, row.is_chain
        ([0, 1, 2, 2], [4, 4, 3, 4], False)
    """

    tokens: list[int]  # [T]
    positions: list[int]  # [T] in the text of each
    ends: list[int]  # [T] the place after the last token that continues each
    sources: list[int]  # [M] the place whose logits are of the scored token
    targets: list[int]  # [M]
    owners: list[int]  # [M] the number of the scored node, depth first

    @property
    def is_chain(self) -> bool:
        """Whether nothing branches: then causality alone says what is seen."""
        return all(end == len(self.tokens) for end in self.ends)


def lay(root: Node) -> Row:
    """One row for a tree.

    Raises:
        ValueError: a scored token that nothing leads to, or a scored node without tokens.

    Example:
        >>> row = lay(Node([5, 6], [Node([7, 8], scored=True), Node([9], scored=True)]))
        >>> row.tokens, row.positions, row.ends
        ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2], [5, 5, 4, 4, 5])
        >>> row.sources, row.targets, row.owners
        ([1, 2, 1], [7, 8, 9], [0, 0, 1])
    """
    row = Row([], [], [], [], [], [])
    scored = 0

    def place(node: Node, position: int, last: int) -> None:
        nonlocal scored
        if node.scored:
            if not node.tokens or last < 0:
                raise ValueError(
                    f"tree.lay: a scored node has at least one token and something before it, got {list(node.tokens)}."
                )
            first = len(row.tokens)
            row.sources.extend([last, *range(first, first + len(node.tokens) - 1)])
            row.targets.extend(node.tokens)
            row.owners.extend([scored] * len(node.tokens))
            scored += 1
        begin = len(row.tokens)
        row.tokens.extend(node.tokens)
        row.positions.extend(range(position, position + len(node.tokens)))
        row.ends.extend([0] * len(node.tokens))
        stop = len(row.tokens)
        for child in node.children:
            place(child, position + len(node.tokens), stop - 1 if node.tokens else last)
        row.ends[begin:stop] = [len(row.tokens)] * (stop - begin)

    place(root, 0, -1)
    return row


class Batch(NamedTuple):
    """Rows of equal length: padding sees nothing that is asked for, and nothing sees it.

    Example:
        >>> made = batch([lay(Node([5, 6], [Node([7], scored=True)]))], size=1, multiple=4)
        >>> made.tokens.tolist(), made.positions.tolist(), made.ends
        ([[5, 6, 7, 0]], [[0, 1, 2, 3]], None)
    """

    tokens: np.ndarray  # [B, T] int32
    positions: np.ndarray  # [B, T] int32
    ends: np.ndarray | None  # [B, T] int32, or None where no row branches
    sources: np.ndarray  # [B, M] int32
    targets: np.ndarray  # [B, M] int32


def batch(rows: Sequence[Row], size: int, multiple: int = 32) -> Batch:
    """At most `size` rows as arrays of `size` rows; lengths are rounded up, so that few shapes are compiled.

    Example:
        >>> rows = [lay(Node([5], [Node([6], scored=True)])), lay(Node([7, 8], [Node([9], scored=True)]))]
        >>> made = batch(rows, size=2, multiple=4)
        >>> made.tokens.tolist(), made.sources[:, 0].tolist(), made.targets[:, 0].tolist()
        ([[5, 6, 0, 0], [7, 8, 9, 0]], [0, 1], [6, 9])
    """
    up = lambda n, multiple: -(-max(n, 1) // multiple) * multiple
    T, M = up(max(len(r.tokens) for r in rows), multiple), up(max(len(r.targets) for r in rows), 8)

    def array(name: str, length: int) -> np.ndarray:
        out = np.zeros((size, length), np.int32)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            out[i, : len(values)] = values
        return out

    branching = not all(row.is_chain for row in rows)
    positions = array("positions", T)
    for i, row in enumerate(rows):  # padding goes on where the row stops: causality hides it
        positions[i, len(row.tokens) :] = np.arange(len(row.tokens), T)
    return Batch(
        tokens=array("tokens", T),
        positions=positions,
        ends=array("ends", T) if branching else None,
        sources=array("sources", M),
        targets=array("targets", M),
    )
