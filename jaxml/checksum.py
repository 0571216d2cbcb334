"""A checksum of every bit of a tree of arrays, the same wherever they lie."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array
from jaxml.paths import path_of

UNSIGNED = {64: jnp.uint32, 32: jnp.uint32, 16: jnp.uint16, 8: jnp.uint8}  # bits of a number → its words

NONE = jax.sharding.Mesh(np.empty((), object), ())


def checksum(tree: Any) -> str:
    """Of all bits of a tree of arrays: one that changes gives another checksum.

    Paths, shapes and dtypes count as well; whether a key is a name, a field or a place does not. Each device sums up
    what it has, in no memory of its own. Of arrays that are spread over processes, all of them call this.

    Example:
        >>> checksum({"w": jnp.arange(3)}) == checksum({"w": jnp.arange(3)}), len(checksum(jnp.zeros(2)))
        (True, 16)
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [(path_of(path), leaf if hasattr(leaf, "dtype") else np.asarray(leaf)) for path, leaf in leaves]
    with jax.set_mesh(NONE):  # a part is on one device
        begun = [_parts(leaf) for _, leaf in named]  # all devices are at work before the first is waited for
    sums = np.array([np.sum([np.asarray(p) for p in parts], axis=0, dtype=np.uint32) for parts in begun], np.uint32)
    spread = [isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for _, leaf in named]
    if any(spread):
        from jax.experimental import multihost_utils

        everyones = multihost_utils.process_allgather(sums[spread])
        sums[spread] = everyones.sum(axis=0, dtype=np.uint32)
    about = sorted((name, leaf.shape, str(leaf.dtype), s.tolist()) for (name, leaf), s in zip(named, sums))
    return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def _parts(a: Any) -> list[Any]:
    """The sums of each part of an array that this process has, every part once."""
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        a = jax.random.key_data(a)
    if not isinstance(a, jax.Array):
        a = np.ascontiguousarray(a)
        a = a.view(np.uint32) if a.itemsize > 4 else a  # of 64 bits JAX would keep half
        return [_sums(a, np.zeros(a.ndim, np.uint32), _strides(a.shape))] if a.size else [np.zeros(2, np.uint32)]
    strides, nowhere = _strides(a.shape), [np.zeros(2, np.uint32)]
    if len(a.sharding.device_set) == 1:
        whole = np.zeros(a.ndim, np.uint32)
        return [_sums(_on_device(a), whole, strides)] if a.size else nowhere
    parts = nowhere
    for shard in a.addressable_shards:
        if shard.replica_id == 0 and shard.data.size:
            starts = np.array([axis.start or 0 for axis in shard.index], np.uint64).astype(np.uint32)
            parts.append(_sums(_on_device(shard.data), starts, strides))
    return parts


def _on_device(a: Array) -> Array:
    """An array of one device in that device's own memory, where it lies in the host's."""
    (device,) = a.sharding.device_set
    kind = device.default_memory().kind
    if a.sharding.memory_kind in (None, kind):
        return a
    return jax.device_put(a, jax.sharding.SingleDeviceSharding(device, memory_kind=kind))


def _strides(shape: tuple[int, ...]) -> np.ndarray:
    """Of a place along each axis in the array as one row, modulo 2³²."""
    return np.array([math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))], np.uint32)


@jax.jit
def _sums(a: Array, starts: Array, strides: Array) -> Array:
    """Two sums over the bits of a part of an array, modulo 2³², each number weighed by its place in the whole."""
    shape = a.shape
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        a = jnp.stack([a.real, a.imag], axis=-1)
    unsigned = UNSIGNED.get(jax.dtypes.itemsize_bits(a.dtype))
    bits = a if unsigned is None or a.dtype == bool else jax.lax.bitcast_convert_type(a, unsigned)
    bits = bits.astype(jnp.uint32).reshape(*shape, -1)  # the words of each number
    along = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place = sum((along(axis) + starts[axis]) * strides[axis] for axis in range(len(shape)))
    odd = 2 * (place * jnp.uint32(bits.shape[-1]) + along(len(shape))) + 1
    # Odd factors have inverses: no change of one number is lost. In one pass, so that nothing of this is kept.
    zero, add = jnp.uint32(0), lambda x, y: (x[0] + y[0], x[1] + y[1])
    return jnp.stack(jax.lax.reduce((bits * odd, bits * (odd * odd + 2)), (zero, zero), add, tuple(range(bits.ndim))))
