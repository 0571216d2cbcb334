"""Optimizer states in the host's memory, brought to the device for their step."""

import dataclasses
from typing import Any

import jax
import optax

from jaxml.optim.chain import Aware, aware, optimizer

HOST = "pinned_host"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Offloaded:
    """State of `offload`.

    Example:
        >>> import jax.numpy as jnp
        >>> state = offload(optax.adam(1e-3), min_size=64).init({"b": jnp.zeros(8), "w": jnp.zeros((8, 8))})
        >>> {name: a.sharding.memory_kind == HOST for name, a in state.inner[0].mu.items()}
        {'b': False, 'w': True}
    """

    inner: Any  # arrays of `min_size` elements and more in the host's memory
    min_size: int = dataclasses.field(metadata=dict(static=True))


def offload(tx: optax.GradientTransformation, *, min_size: int = 4096) -> Aware:
    """The same transformation, whose state lies in the host's memory between steps.

    On a TPU or a GPU the copies run beside other work of the step where the compiler finds some. Parameters should have
    been placed (`jax.device_put`, or shardings): of others JAX compiles the second step again, since a state in the
    host's memory has a place. With shardings, `jit(tx.init, out_shardings=state_sharding(tx, params))` as ever.

    Args:
        tx: any transformation; `offload(galore(adam8bit(1e-3)))`, or a whole `optax.chain`.
        min_size: arrays of fewer elements (counters, biases' moments) stay on the device.

    Raises:
        ValueError: at `init`, the platform's devices have no memory "pinned_host".

    Example:
        >>> import jax.numpy as jnp
        >>> tx = offload(optax.adam(1e-3))
        >>> state = tx.init({"w": jnp.zeros((64, 64))})
        >>> state.inner[0].mu["w"].sharding.memory_kind
        'pinned_host'
    """
    tx = optimizer("offload", tx)

    def init(params) -> Offloaded:
        memories = sorted({memory.kind for memory in jax.devices()[0].addressable_memories()})
        if HOST not in memories:
            raise ValueError(
                f"offload: devices have a memory {HOST!r}, got {', '.join(memories)}. Leave offload out here."
            )
        placed = jax.device_put(tx.init(params), jax.memory.Space.Device)  # small arrays too, as after a step
        return Offloaded(_moved(placed, jax.memory.Space.Host, min_size), min_size)

    def update(updates, state: Offloaded, params=None, **extra):
        inner = _moved(state.inner, jax.memory.Space.Device, min_size)
        new, inner = tx.update(updates, inner, params, **extra)
        return new, Offloaded(_moved(inner, jax.memory.Space.Host, min_size), min_size)

    return aware(optax.GradientTransformationExtraArgs(init, update))


def _moved(state: Any, space: jax.memory.Space, min_size: int) -> Any:
    return jax.tree.map(lambda a: jax.device_put(a, space) if is_large(a, min_size) else a, state)


def is_large(leaf: Any, min_size: int) -> bool:
    """Whether a leaf of a state is an array of at least `min_size` elements.

    Example:
        >>> import numpy as np
        >>> is_large(np.zeros(8), 4), is_large(np.zeros(2), 4), is_large(None, 4)
        (True, False, False)
    """
    return getattr(leaf, "size", 0) >= min_size
