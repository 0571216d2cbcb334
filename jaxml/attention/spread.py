"""Attention of a program whose arrays are spread over a mesh: kernels cannot be split by XLA, so each device is given
its own rows and heads, and its own places of the sequence where it goes round a ring."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxml.attention import ring
from jaxml.attention.dispatch import flash_attention
from jaxml.attention.masks import Mask
from jaxml.axes import Array, Float
from jaxml.parallel.mesh import automatic, live
from jaxml.parallel.rules import spec

CONTEXT = "context"


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H2"],
    *,
    zigzag: bool = False,
    mask: Mask | None = None,
    **options: Any,
) -> Float[Array, "B T N H2"]:
    """`flash_attention` over the mesh that `jax.set_mesh` has set, if there is one.

    Args:
        zigzag: the sequence lies in the order of `ring.zigzag_order` (`into_zigzag`).
        mask: without an axis of heads.
        options: of `flash_attention`; arrays among them are [B, T] and [B, S].
    """
    sizes = live()
    if not automatic():
        return flash_attention(query, key, value, mask=mask, **options)
    rows = {name: a for name, a in options.items() if hasattr(a, "shape")}
    static = {name: a for name, a in options.items() if name not in rows}
    K = key.shape[2]
    in_ring = zigzag or (
        CONTEXT in sizes and query.shape[1] == key.shape[1] and query.shape[1] % sizes[CONTEXT] == 0
        and mask is None and "q_positions" not in rows
    )  # fmt: skip
    length = "length" if in_ring else None
    q_spec = spec(("batch", length, "heads", None), query.shape, sizes)
    kv_spec = P(*q_spec[:2], spec(("heads",), (K,), sizes)[0] if q_spec[2] else None, None)
    shared = q_spec[2] is not None and kv_spec[2] is None  # several devices have one head of keys among them
    if shared and sizes["tensor"] % K:
        q_spec = P(*q_spec[:2], None, None)
        shared = False
    of_row = lambda a: spec(("batch", *[length] * (a.ndim - 1)), a.shape, sizes)
    mask_arrays, mask_tree = jax.tree.flatten(mask)

    def part(query, key, value, rows, mask_arrays):
        if shared:
            mine = jax.lax.axis_index("tensor") * K // sizes["tensor"]
            key, value = (jax.lax.dynamic_slice_in_dim(a, mine, 1, axis=2) for a in (key, value))
        if in_ring:
            return ring.ring_attention(query, key, value, axis_name=CONTEXT, zigzag=zigzag, **static, **rows)
        return flash_attention(query, key, value, mask=mask_tree.unflatten(mask_arrays), **static, **rows)

    return jax.shard_map(
        part,
        in_specs=(q_spec, kv_spec, kv_spec, jax.tree.map(of_row, rows), [of_row(a) for a in mask_arrays]),
        out_specs=q_spec,
        axis_names=automatic(),
    )(query, key, value, rows, mask_arrays)


def can_zigzag(length: int) -> bool:
    """Whether the mesh that is set has a ring, and sequences of that length can be laid out for it."""
    n = live().get(CONTEXT, 1)
    return n > 1 and length % (2 * n) == 0


def into_zigzag(tree: Any) -> Any:
    """Arrays [B, T, ...] in the order of `ring.zigzag_order`, moved between neighbours on the ring."""
    return _moved(tree, ring.into_zigzag)


def out_of_zigzag(tree: Any) -> Any:
    """The inverse of `into_zigzag`."""
    return _moved(tree, ring.out_of_zigzag)


def _moved(tree: Any, move: Any) -> Any:
    sizes = live()
    specs = jax.tree.map(lambda a: spec(("batch", "length", *[None] * (a.ndim - 2)), a.shape, sizes), tree)
    run = lambda tree: jax.tree.map(lambda a: move(a, CONTEXT), tree)
    return jax.shard_map(run, in_specs=(specs,), out_specs=specs, axis_names=automatic())(tree)
