"""The key/value cache of a decoder: a value that can be kept, broadcast to a batch, and continued.

A slot holds one token of one row. Which token, says its *position*; an empty slot and a padding token
have the position `EMPTY`, larger than any query's, so that the causal rule alone hides them. Rows may
therefore be padded on either side, and slots and positions need not agree. Heads lie outside slots, as
the products over them want it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float, Int
from jaxml.lm.config import DecoderConfig
from jaxml.parallel.rules import hint

EMPTY = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer for the tokens that were read, and where each of these tokens stands.

    Example:
        >>> kv = jnp.zeros((1, 2, 1, 3, 4))   # a layer, two rows, a head, three slots
        >>> cache = Cache(kv, kv, jnp.array([[0, 1, 2], [EMPTY, 0, 1]]), jnp.array(3))
        >>> cache.slots, cache.after.tolist()
        (3, [3, 2])
    """

    key: Float[Array, "L B K S H"]  # rotated
    value: Float[Array, "L B K S H"]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]  # slots in use, the same in every row

    @property
    def slots(self) -> int:
        return self.positions.shape[1]

    @property
    def after(self) -> Int[Array, "B"]:
        """The position that follows each row's last token."""
        return jnp.max(jnp.where(self.positions == EMPTY, -1, self.positions), axis=1) + 1


def init(config: DecoderConfig, batch: int, slots: int, dtype=jnp.float32) -> Cache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included.

    Example:
        >>> from jaxml import testing
        >>> cache = init(testing.tiny_config(), batch=2, slots=8)
        >>> cache.key.shape, cache.length.item(), cache.after.tolist()
        ((2, 2, 2, 8, 8), 0, [0, 0])
    """
    shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
    return Cache(
        key=spread(jnp.zeros(shape, dtype)),
        value=spread(jnp.zeros(shape, dtype)),
        positions=jnp.full((batch, slots), EMPTY, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def spread(a: Float[Array, "L B K S H"]) -> Float[Array, "L B K S H"]:
    """Keys or values with rows and heads where the mesh that is set has them.

    Example:
        >>> from jaxml import parallel
        >>> on = parallel.mesh(data=-1)
        >>> with jax.set_mesh(on):
        ...     keys = jax.jit(spread)(jnp.zeros((2, on.size, 2, 4, 8)))
        >>> keys.sharding.shard_shape(keys.shape)   # a row on each device
        (2, 1, 2, 4, 8)
    """
    return hint(a, None, "batch", "heads", None, None)


def full(key: Float[Array, "L B K S H"], value: Float[Array, "L B K S H"]) -> Cache:
    """A cache of these keys and values, every slot in use, at the positions 0, 1, 2, …

    Example:
        >>> kv = jnp.zeros((2, 1, 2, 3, 8))
        >>> cache = full(kv, kv)
        >>> cache.positions.tolist(), cache.length.item()
        ([[0, 1, 2]], 3)
    """
    _, B, _, S, _ = key.shape
    return Cache(key, value, jnp.broadcast_to(jnp.arange(S)[None], (B, S)), jnp.asarray(S, jnp.int32))


def begin(
    past: Cache | None, config: DecoderConfig, positions: Int[Array, "B T"], slots: int, dtype=jnp.float32
) -> tuple[Cache, Int[Array, "B T"]]:
    """(a cache that holds the past and has room for `slots` tokens more, the positions of rows after that past).

    Example:
        >>> from jaxml import testing
        >>> kv = jnp.zeros((2, 1, 2, 3, 8))
        >>> cache, positions = begin(full(kv, kv), testing.tiny_config(), jnp.array([[0, 1]]), slots=4)
        >>> cache.slots, positions.tolist()
        (7, [[3, 4]])
    """
    if past is None:
        return init(config, positions.shape[0], slots, dtype), positions
    after = broadcast(past, positions.shape[0])
    cache = jax.tree.map(jnp.copy, grow(after, past.slots + slots))  # whoever fills it consumes it
    return cache, jnp.where(positions == EMPTY, EMPTY, positions + after.after[:, None])


def broadcast(cache: Cache, batch: int) -> Cache:
    """One row's cache as the common prefix of `batch` rows; a cache of `batch` rows as it is.

    Raises:
        ValueError: the cache has another number of rows.

    Example:
        >>> kv = jnp.zeros((2, 1, 2, 3, 8))
        >>> broadcast(full(kv, kv), 2).positions.tolist()
        [[0, 1, 2], [0, 1, 2]]
    """
    if cache.positions.shape[0] == batch:
        return cache
    if cache.positions.shape[0] != 1:
        raise ValueError(f"cache.broadcast: the cache has one row or {batch}, got {cache.positions.shape[0]}.")
    repeat = lambda a, axis: jnp.repeat(a, batch, axis)
    return dataclasses.replace(
        cache,
        key=repeat(cache.key, 1),
        value=repeat(cache.value, 1),
        positions=repeat(cache.positions, 0),
    )


def grow(cache: Cache, slots: int) -> Cache:
    """The same cache with room for `slots` tokens.

    Raises:
        ValueError: that is less than it has now.

    Example:
        >>> kv = jnp.zeros((2, 1, 2, 3, 8))
        >>> cache = grow(full(kv, kv), 5)
        >>> (cache.positions == EMPTY).tolist(), cache.length.item()
        ([[False, False, False, True, True]], 3)
    """
    more = slots - cache.slots
    if more < 0:
        raise ValueError(f"cache.grow: slots is at least the present {cache.slots}, got {slots}.")
    wide = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0)))
    return dataclasses.replace(
        cache,
        key=wide(cache.key),
        value=wide(cache.value),
        positions=jnp.pad(cache.positions, ((0, 0), (0, more)), constant_values=EMPTY),
    )
