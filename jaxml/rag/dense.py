"""Exact search among vectors by inner product, block by block; and search among int8 codes, ranked again exactly.

```python
matrix = dense.place(vectors)                    # [n, D], in blocks on the device or spread over several
scores, rows = dense.search(matrix, queries, 10)
```
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxml.axes import Array, Float, Int

BLOCK = 65536  # rows whose scores exist at the same time
NARROW = 4096  # of narrower numbers on a CPU, where they become float32 first: what its cache holds
AXIS = "rows"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Rows to search among, in blocks of equal size; what fills the last one up, and dead rows, score −∞.

    Example:
        >>> matrix = place(np.eye(5, dtype=np.float32), block=2)
        >>> matrix.count, [block.shape for block in matrix.blocks], matrix.nbytes
        (5, [(2, 5), (2, 5), (2, 5)], 144)
    """

    blocks: Sequence[Float[Array, "block D"]]  # or int8 codes
    bias: Sequence[Float[Array, "block"]]  # 0, or −∞ where a row is not to be found
    scales: Sequence[Float[Array, "block"]] | None  # of codes: a row is scale · code
    count: int
    mesh: Mesh | None = None  # whose devices each block's rows are spread over

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for of in (self.blocks, self.bias, self.scales or ()) for a in of)


def place(
    vectors: np.ndarray,
    *,
    dead: np.ndarray | None = None,
    scales: np.ndarray | None = None,
    block: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Matrix:
    """Puts rows where they are searched.

    Args:
        vectors: [n, D], float32 or narrower, or int8 codes with their `scales`; a memory map is read once.
        dead: [n] bool, rows that are not to be found.
        scales: [n], of codes (`quantize`).
        block: rows whose scores exist at the same time (where None about `BLOCK`, of narrow ones on a CPU `NARROW`).
        devices: over which each block's rows are spread; the default one where None.

    Raises:
        ValueError: no rows, wrong shapes, or a block that does not divide over the devices.

    Example:
        >>> codes, scales = quantize(np.eye(3, 4, dtype=np.float32))
        >>> matrix = place(codes, scales=scales, dead=np.array([True, False, False]))
        >>> scores, rows = search(matrix, np.array([[9.0, 1.0, 2.0, 0.0]]), 3)
        >>> rows.tolist()
        [[2, 1, -1]]
    """
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"dense.place: vectors are [n, D] with n at least 1, got {vectors.shape}.")
    for name, a in (("dead", dead), ("scales", scales)):
        if a is not None and a.shape != vectors.shape[:1]:
            raise ValueError(f"dense.place: {name} is [{len(vectors)}], one for each row, got {a.shape}.")
    if (vectors.dtype == np.int8) != (scales is not None):
        raise ValueError(f"dense.place: scales are given with int8 codes and only then, got {vectors.dtype}.")
    count = len(vectors)
    over = len(devices) if devices else 1
    if block is None:
        usual = NARROW if vectors.dtype != np.float32 and jax.default_backend() == "cpu" else BLOCK
        block = usual // over * over
    block = min(block, -(-count // over) * over)
    if block % over:
        raise ValueError(f"dense.place: a block divides over {over} devices, got {block} rows.")
    mesh = Mesh(np.array(devices), (AXIS,)) if devices else None
    put = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec(AXIS)) if mesh else None)
    bias = np.where(dead, -np.inf, 0).astype(np.float32) if dead is not None else np.zeros(count, np.float32)

    def blocks(a: np.ndarray, fill: float) -> list[Array]:
        parts = []
        for first in range(0, count, block):
            part = a[first : first + block]
            if len(part) < block:
                more = [(0, block - len(part)), *[(0, 0)] * (a.ndim - 1)]
                part = np.pad(part, more, constant_values=fill)
            parts.append(put(np.ascontiguousarray(part)))
        return parts

    return Matrix(
        blocks(vectors, 0), blocks(bias, -np.inf), None if scales is None else blocks(scales, 0), count, mesh
    )  # fmt: skip


def search(matrix: Matrix, queries: Float[Array, "Q D"], k: int) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The k rows with the largest products, the largest first; of equal ones the earlier.

    Products are float32 sums. Of codes they are approximate (`refine`).

    Returns:
        (scores, rows); where fewer than k rows are there to be found, the rest are −1 and score −∞.

    Raises:
        ValueError: k below 1, or queries of another width.

    Example:
        >>> matrix = place(np.eye(4, dtype=np.float32), dead=np.array([False, False, True, False]))
        >>> scores, rows = search(matrix, jnp.array([[0.1, 0.2, 0.9, 0.3]]), 2)
        >>> rows.tolist()
        [[3, 1]]
    """
    queries = jnp.asarray(queries, jnp.float32)
    width = matrix.blocks[0].shape[1]
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"dense.search: queries are [Q, {width}], got {queries.shape}.")
    if k < 1:
        raise ValueError(f"dense.search: k is at least 1, got {k}.")
    block = matrix.blocks[0].shape[0]
    parts = [
        _best(b, bias, scales, queries, first, k=k, mesh=matrix.mesh)
        for b, bias, scales, first in zip(
            matrix.blocks, matrix.bias, matrix.scales or [None] * len(matrix.blocks),
            range(0, block * len(matrix.blocks), block),
        )
    ]  # fmt: skip
    return _merge([s for s, _ in parts], [r for _, r in parts], k=k)


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def _best(block, bias, scales, queries, first, *, k: int, mesh: Mesh | None):
    """The best k of a block, and their numbers among all rows."""

    def local(block, bias, scales, queries, first):
        products = jnp.einsum("qd,nd->qn", queries, block.astype(queries.dtype), precision=jax.lax.Precision.HIGHEST)
        if scales is not None:
            products = products * scales[None]
        scores, rows = jax.lax.top_k(products + bias[None], min(k, block.shape[0]))
        return scores, rows + first

    if mesh is None:
        return local(block, bias, scales, queries, first)

    def part(block, bias, scales, queries, first):
        scores, rows = local(block, bias, scales, queries, first + jax.lax.axis_index(AXIS) * block.shape[0])
        gather = lambda a: jax.lax.all_gather(a, AXIS, axis=1, tiled=True)  # k of each device, in the order of rows
        return _top(gather(scores), gather(rows), k)

    rows = PartitionSpec(AXIS)
    specs = (rows, rows, None if scales is None else rows, PartitionSpec(), PartitionSpec())
    spread = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(),) * 2, check_vma=False)
    return spread(block, bias, scales, queries, first)


@functools.partial(jax.jit, static_argnames="k")
def _merge(scores: Sequence[Array], rows: Sequence[Array], *, k: int):
    scores, rows = _top(jnp.concatenate(scores, 1), jnp.concatenate(rows, 1), k)
    short = [(0, 0), (0, max(0, k - scores.shape[1]))]
    scores, rows = jnp.pad(scores, short, constant_values=-jnp.inf), jnp.pad(rows, short)
    return scores, jnp.where(jnp.isneginf(scores), -1, rows)


def _top(scores: Array, rows: Array, k: int):
    scores, best = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return scores, jnp.take_along_axis(rows, best, 1)


# ---- codes ------------------------------------------------------------------------------------------


def quantize(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 codes [n, D], scales [n] float32): a row is nearly scale · code, to half a scale.

    Example:
        >>> codes, scales = quantize(np.array([[1.0, -0.5], [0.0, 0.0]], np.float32))
        >>> codes.tolist(), (scales * 127).tolist()
        ([[127, -64], [0, 0]], [1.0, 0.0])
    """
    vectors = np.asarray(vectors, np.float32)
    scales = np.abs(vectors).max(1) / 127
    return np.rint(vectors / np.where(scales, scales, 1)[:, None]).astype(np.int8), scales


def refine(
    vectors: np.ndarray, queries: Float[Array, "Q D"], candidates: Int[Array, "Q C"], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of each query's candidates by exact products; `vectors` may be a memory map, of which they are read.

    Args:
        candidates: rows, or −1 for none.

    Returns:
        (scores [Q, k] float32, rows [Q, k]); −∞ and −1 where there are fewer.

    Example:
        >>> vectors = np.array([[1.0, 0.0], [0.75, 0.5], [0.0, 1.0]], np.float32)
        >>> scores, rows = refine(vectors, np.array([[1.0, 1.0]]), np.array([[0, 1, -1]]), 2)
        >>> scores.tolist(), rows.tolist()
        ([[1.25, 1.0]], [[1, 0]])
    """
    queries, candidates = np.asarray(queries, np.float32), np.asarray(candidates)
    short = (0, 0), (0, max(0, k - candidates.shape[1]))
    candidates = np.pad(candidates, short, constant_values=-1)
    exact = np.einsum("qcd,qd->qc", vectors[candidates].astype(np.float32), queries)
    exact = np.where(candidates < 0, np.float32(-np.inf), exact)
    order = np.argsort(-exact, 1, kind="stable")[:, :k]
    return np.take_along_axis(exact, order, 1), np.take_along_axis(candidates, order, 1)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exactly best rows that were found, over all queries.

    Args:
        found, exact: [Q, k] rows.

    Example:
        >>> recall(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [3, 9]]))
        0.75
    """
    pairs = list(zip(np.asarray(found), np.asarray(exact)))
    return float(np.mean([len(set(a.tolist()) & set(b.tolist())) / len(b) for a, b in pairs]))
