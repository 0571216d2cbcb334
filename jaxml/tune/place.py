"""Where the arrays of a run lie: its state, what is frozen, and each batch."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml import parallel
from jaxml.axes import Array, Params
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.optim.sharding import state_sharding
from jaxml.parallel import hosts, rules
from jaxml.tune.options import Options
from jaxml.tune.run import State, begin


def begun(trainable: Params, frozen: Params, tx: optax.GradientTransformation, mesh: Mesh | None):
    """(state, frozen, shardings of the state, what places a batch): on the mesh, if there is one."""
    if mesh is None:
        return begin(trainable, tx), frozen, None, lambda batch: batch
    trainable, frozen = parallel.shard(trainable, mesh), parallel.shard(frozen, mesh)
    shardings = state_shardings(trainable, tx, mesh)
    with jax.set_mesh(mesh):
        without = lambda state: state._replace(trainable=None)
        rest = jax.jit(lambda t: without(begin(t, tx)), out_shardings=without(shardings))(trainable)
    state = rest._replace(trainable=trainable)
    return state, frozen, shardings, functools.partial(hosts.place, on=mesh)


def state_shardings(trainable: Params, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """Where the arrays of a run's state lie, by what is trained (arrays, or shapes, that have shardings)."""
    whole = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda a: whole, jax.eval_shape(lambda t: begin(t, tx), trainable))
    placed = jax.tree.map(lambda a: a.sharding, trainable)
    return shardings._replace(trainable=placed, opt_state=state_sharding(tx, trainable))


def over(mesh: Mesh | None):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check_length(who: str, config: DecoderConfig, length: int, places: int = 0, context: int = 1) -> None:
    """Refuses rows that a model has no positions for, or that the mesh's context does not divide.

    Args:
        places: of a prompt before them.
    """
    if length + places > config.max_length:
        also = f" and {places} of a prompt" if places else ""
        raise ValueError(f"{who}: length is at most the context of {config.max_length} tokens, got {length}{also}.")
    if length % context:
        raise ValueError(f"{who}: length is a multiple of context = {context}, got {length}.")


def check_mesh(mesh: Mesh | None, o: Options, anchored: bool) -> None:
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise TypeError(f"fit: mesh is one of `jaxml.parallel.mesh` or `parse`, got {mesh!r}.")
    if missing := [axis for axis in parallel.AXES if axis not in mesh.shape]:
        raise ValueError(f"fit: the mesh has the axes {', '.join(parallel.AXES)}, got none called {missing[0]}.")
    rows, parts = o.batch_size + anchored * o.anchor_rows, rules.parts(mesh.shape)
    if rows % parts:
        raise ValueError(
            f"fit: rows of a batch are a multiple of data · fsdp · expert = {parts} of the mesh, got {rows}"
            f"{' with anchor_rows' if anchored else ''}. Change batch_size, or spread over tensor or context."
        )


def for_training(given: Params, untouched: Params, o: Options) -> tuple[Params, Params]:
    """(trainable, frozen) in the dtypes that they are kept in."""
    # The step consumes its state; the caller's arrays stay alive.
    trainable = jax.tree.map(lambda a: jnp.array(a, _kept_dtype(a, o), copy=True), given)
    frozen = decoder.cast(untouched, o.dtype) if o.dtype else untouched
    return trainable, decoder.unstack(frozen) if o.unroll and frozen else frozen


def _kept_dtype(a: Array, o: Options):
    return jnp.float32 if o.master and jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
