"""Where A and B begin.

| start | |
|---|---|
| default | A uniform within ±1/√in, B zero |
| gaussian | A normal of deviation 1/rank, B zero |
| orthogonal | both random with A B = 0 |
| pissa | the largest singular parts of W; what is left of W stays frozen; "pissa_niter_4": by subspace iteration |
| olora | the first columns and rows of W's QR factors; what is left of W stays frozen |
| loftq | alternately what quantising leaves over and its largest singular parts; "loftq_5": 5 rounds |
| directions | A is given (`eva`: what the inputs vary along), B zero |
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxml import weights
from jaxml.axes import Array
from jaxml.optim import basis
from jaxml.quant import QArray
from jaxml.quant.params import of_format

STARTS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq", "loftq_N")
MOVING = ("pissa", "olora", "loftq")  # with these a part of W moves into A and B
FOUND_AGAIN = ("pissa", "olora")  # of these, which PEFT makes again from the model as it was
VERA_D = 0.1  # where VeRA's d begins


def make(
    start: str | Mapping[str, Array],
    key: Array,
    w: Any,
    *,
    ranks: Sequence[int],
    scale: Array,
    table: bool,
    transposed: bool,
    path: str,
    quantize: str | None,
) -> tuple[Any, Array, Array]:
    """(what stays frozen, A [..., in, rank], B [..., rank, out]) of one weight, perhaps with leading axes.

    Args:
        ranks: of each stacked layer, or one: the columns of A and rows of B beyond a layer's own are 0.
        scale: [...], of the product A B.
        table: an embedding, whose default is A zero and B normal, as PEFT's.
        transposed: w is stored as [out, in].
        quantize: the format that the frozen part is going to have ("loftq" needs it).

    Raises:
        ValueError: a start that does not exist or does not suit.
    """
    *lead, d, f = w.shape
    d, f = (f, d) if transposed else (d, f)
    rank, kept = max(ranks), _kept(ranks, lead)
    own = lambda a, b: _own(a, b, kept)
    zeros = lambda *shape: jnp.zeros((*lead, *shape), jnp.float32)
    if not isinstance(start, str):
        if path not in start or start[path].shape[-1] < rank or start[path].shape[:-1] != (*lead, d):
            got = start[path].shape if path in start else "none"
            raise ValueError(f"adapters.attach: {path} begins with directions {(*lead, d, rank)}, got {got}.")
        return w, *own(start[path][..., :rank], zeros(rank, f))
    kind, rounds = parse(start)
    if kind == "default" and table:
        return w, *own(zeros(d, rank), jax.random.normal(key, (*lead, rank, f)))
    if kind in ("default", "gaussian"):
        bound = d**-0.5
        shape = (*lead, d, rank)
        a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        return w, *own(a if kind == "default" else jax.random.normal(key, shape) / rank, zeros(rank, f))
    if kind == "orthogonal":
        if rank % 2 or len(set(ranks)) > 1:
            raise ValueError(f"adapters.attach: start 'orthogonal' takes one even rank, got {ranks} for {path}.")
        k1, k2, k3 = jax.random.split(key, 3)
        q = jax.random.orthogonal(k1, rank, tuple(lead))
        a = jnp.matmul(jax.random.normal(k2, (*lead, d, rank // 2)), q[..., 0::2, :]) / 10
        b = jnp.matmul(q[..., 1::2, :].swapaxes(-1, -2), jax.random.normal(k3, (*lead, rank // 2, f))) / 10
        return w, a, b
    if kind == "loftq":
        if quantize is None or isinstance(w, QArray):
            raise ValueError(
                "adapters.attach: start 'loftq' takes dense weights and a format to quantise them in (quantize='nf4'), "
                + (f"got {path} quantised already." if isinstance(w, QArray) else "got no format.")
            )
        each = lambda key, w, scale, kept: _loftq(w, kept, scale, of_format(quantize), rounds or 1, transposed)
    else:

        def each(key, w, scale, kept):
            m = weights.dense(w)
            io = (m.swapaxes(-1, -2) if transposed else m).astype(jnp.float32)
            a, b = _olora(io, kept) if kind == "olora" else _pissa(key, io, kept, scale, rounds)
            rest = io - scale * (a @ b)
            rest = (rest.swapaxes(-1, -2) if transposed else rest).astype(m.dtype)
            return (w.like(rest) if isinstance(w, QArray) else rest), a, b

    return _each(each, lead, key, w, scale, kept)


def _kept(ranks: Sequence[int], lead: Sequence[int]) -> Array:
    """1 for each layer's own ranks, 0 for those beyond, [..., rank]."""
    rank = max(ranks)
    kept = (jnp.arange(rank)[None] < jnp.asarray(ranks)[:, None]).astype(jnp.float32)
    return jnp.broadcast_to(kept.reshape(-1, *(1,) * max(len(lead) - 1, 0), rank) if lead else kept[0], (*lead, rank))


def _own(a: Array, b: Array, kept: Array) -> tuple[Array, Array]:
    return a * kept[..., None, :].astype(a.dtype), b * kept[..., :, None].astype(b.dtype)


def moves(start: str | Mapping[str, Array] | None) -> bool:
    """Whether a part of W moves into A and B."""
    return isinstance(start, str) and start.startswith(MOVING)


def check_shared_base(nodes: Iterable[Any], path: str, name: str) -> None:
    """Refuses adapters that hold a part of W: a base for several lacks it. `name` is the caller's, for errors."""
    if moved := [w.start for w in nodes if moves(w.start)]:
        raise ValueError(
            f"{name}: the base is the same for all, but {moved[0]} has moved a part of {path} into its adapter. Make a "
            "plain LoRA of it first (adapters.plain)."
        )


def parse(start: str) -> tuple[str, int | None]:
    """(kind, rounds): "pissa_niter_4" → ("pissa", 4)."""
    found = re.fullmatch(r"(pissa)_niter_(\d+)|(loftq)_(\d+)", start)
    if found:
        kind = found[1] or found[3]
        return kind, int(found[2] or found[4])
    if start not in STARTS or "N" in start:
        raise ValueError(f"adapters.attach: start is one of {', '.join(STARTS)}, or directions, got {start!r}.")
    return start, None


def _each(function: Callable, lead: list[int], key: Array, w: Any, *others: Array) -> Any:
    """The function of each matrix, one after the other: in the memory of one."""
    if not lead:
        return jax.jit(function)(key, w, *others)
    n = math.prod(lead)
    flat = lambda a: a.reshape(n, *a.shape[len(lead) :])
    back = lambda a: a.reshape(*lead, *a.shape[1:])
    parts = (jax.random.split(key, n), jax.tree.map(flat, w), *map(flat, others))
    out = jax.jit(lambda parts: jax.lax.map(lambda part: function(*part), parts))(parts)
    return jax.tree.map(back, out)


def _pissa(key: Array, w: Array, kept: Array, scale: Array, rounds: int | None) -> tuple[Array, Array]:
    """(A, B) with s·A B the closest matrix of that rank; W [in, out]."""
    rank = kept.size
    if rounds is None:
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    else:
        over = min(rank + 8, *w.shape)
        q = basis.orthonormal(w @ jax.random.normal(key, (w.shape[1], over)))
        for _ in range(rounds):
            q = basis.orthonormal(w @ basis.orthonormal(w.T @ q))
        u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
        u = q @ u
    root = kept * jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root[None], root[:, None] * vt[:rank]


def _olora(w: Array, kept: Array) -> tuple[Array, Array]:
    """The first parts of the QR factors of torch's [out, in]; A leads from inputs."""
    q, r = jnp.linalg.qr(w.T)
    return r[: kept.size].T * kept[None], kept[:, None] * q[:, : kept.size].T


def _loftq(
    w: Array, kept: Array, scale: Array, quantize: Callable, rounds: int, transposed: bool
) -> tuple[Any, Array, Array]:
    stored = lambda m: (m.swapaxes(-1, -2) if transposed else m).astype(w.dtype)
    io = stored(w.astype(jnp.float32)).astype(jnp.float32)
    left = io
    for _ in range(rounds):
        q = quantize(stored(left), axis=-1 if transposed else -2)
        a, b = _pissa(jax.random.key(0), io - stored(q.dense()).astype(jnp.float32), kept, scale, None)
        left = io - scale * (a @ b)
    return q, a, b


def squared_norms(w: Any, transposed: bool) -> Array:
    """Σ over inputs of W², [..., out], in float32, one matrix at a time."""
    axis = -1 if transposed else -2
    lead = list(w.shape[:-2])
    each = lambda key, w: jnp.sum(weights.dense(w).astype(jnp.float32) ** 2, axis=axis)
    return _each(each, lead, jax.random.key(0), w)


def shared(key: Array, sides: list[tuple[int, int]], rank: int, dtype: Any) -> tuple[Array, Array]:
    """VeRA's A and B for all weights: Kaiming-uniform, of the largest sides; smaller weights take a part."""
    d, f = (max(side[i] for side in sides) for i in (0, 1))
    k1, k2 = jax.random.split(key)
    uniform = lambda key, shape, fan: jax.random.uniform(key, shape, dtype, -((3 / fan) ** 0.5), (3 / fan) ** 0.5)
    return uniform(k1, (d, rank), d), uniform(k2, (rank, f), rank)


def adalora(
    key: Array, lead: tuple[int, ...], d: int, f: int, ranks: Sequence[int], dtype: Any
) -> tuple[Array, Array, Array]:
    """A and B normal of deviation 0.02, singular values 0; all 0 beyond a layer's own rank, where nothing can grow."""
    (k1, k2), rank = jax.random.split(key), max(ranks)
    normal = lambda key, *shape: 0.02 * jax.random.normal(key, (*lead, *shape), dtype)
    a, b = _own(normal(k1, d, rank), normal(k2, rank, f), _kept(ranks, lead))
    return a, b, jnp.zeros((*lead, rank), dtype)
