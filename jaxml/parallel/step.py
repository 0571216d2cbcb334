"""A step of one's own on many devices that each have a part of the batch, by any of JAX's three ways."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml.parallel.mesh import spell
from jaxml.parallel.rules import put

HOWS = ("jit", "shard_map", "pmap")


def data_parallel(step: Callable, how: str = "jit", *, mesh: Mesh, donate: bool = True) -> Callable:
    """``step(state, batch, total) → (state, metrics)`` as a compiled ``(state, batch) → (state, metrics)``.

    The state is the same on all devices of the mesh, and each has rows of the batch. `total` sums a tree over devices:
    the step calls it on its gradients, losses and counts of rows, before it divides by anything. All three ways give
    the same numbers, to the rounding of sums.

    Args:
        step: a pure function.
        how: "jit": the step is traced once with the whole batch, and XLA splits it (`total` has nothing to do);
            "shard_map", "pmap": it is traced with one device's rows, and `total` is `jax.lax.psum`.
        mesh: with more than one device along data, fsdp and expert only (`parallel.mesh`).
        donate: the result may take the state's memory; the state that was given is then gone ("pmap" keeps it).

    Raises:
        ValueError: another `how`, a mesh with other axes, or rows that the devices do not divide.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxml import parallel
        >>> def step(w, x, total):
        ...     loss, grad = jax.value_and_grad(lambda w: jnp.sum((x @ w - 1.0) ** 2))(w)
        ...     loss, grad, rows = total((loss, grad, jnp.sum(jnp.ones(len(x)))))
        ...     return w - 0.1 * grad / rows, loss / rows
        >>> for how in HOWS:
        ...     run = data_parallel(step, how, mesh=parallel.mesh(data=-1))
        ...     w, loss = run(jnp.zeros(3), jnp.ones((jax.device_count(), 3)))
        ...     print(w[0], loss)
        0.2 1.0
        0.2 1.0
        0.2 1.0
    """
    if how not in HOWS:
        raise ValueError(f"data_parallel: how is one of {', '.join(HOWS)}, got {how!r}.")
    if not isinstance(mesh, Mesh):
        raise TypeError(f"data_parallel: mesh is one of `jaxml.parallel.mesh` or `parse`, got {mesh!r}.")
    rows = tuple(axis for axis, n in mesh.shape.items() if n > 1)
    if other := [axis for axis in rows if axis not in ("data", "fsdp", "expert")]:
        raise ValueError(
            f"data_parallel: the mesh spreads rows alone (data, fsdp, expert), got {spell(mesh.shape)}. "
            f"Give {other[0]} the size 1, or use jit and `parallel.hint`."
        )
    everywhere, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(rows or None))
    whole = lambda tree: tree
    across = lambda axes: lambda tree: jax.lax.psum(tree, axes) if axes else tree
    donated = (0,) if donate else ()

    if how == "jit":
        run = jax.jit(functools.partial(step, total=whole), donate_argnums=donated, out_shardings=everywhere)
    elif how == "shard_map":
        # Without the check gradients are a device's own, as under pmap, and `total` is what sums them.
        part = jax.shard_map(
            functools.partial(step, total=across(rows)), mesh=mesh, in_specs=(P(), P(rows or None)), out_specs=P(),
            check_vma=False,
        )  # fmt: skip
        run = jax.jit(part, donate_argnums=donated)
    else:
        run = jax.pmap(
            functools.partial(step, total=across("devices")), "devices", in_axes=(None, 0), out_axes=None,
            devices=mesh.devices.flatten().tolist(),
        )  # fmt: skip

    count = mesh.devices.size

    def call(state: Any, batch: Any) -> tuple[Any, Any]:
        if wrong := [jnp.shape(a) for a in jax.tree.leaves(batch) if not _dividing(jnp.shape(a), count)]:
            raise ValueError(
                f"data_parallel: rows are at least one, and a multiple of {count} devices, got {wrong[0]}."
            )
        if how == "pmap":
            return run(state, jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch))
        place = lambda sharding: lambda a: put(a, sharding)
        return run(jax.tree.map(place(everywhere), state), jax.tree.map(place(by_rows), batch))

    return call


def _dividing(shape: tuple[int, ...], count: int) -> bool:
    return len(shape) > 0 and shape[0] > 0 and shape[0] % count == 0
