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


def check_mesh(mesh: Mesh | None, o: Options, anchored: bool) -> None:
    if mesh is None:
        return
    if missing := [axis for axis in parallel.AXES if axis not in mesh.shape]:
        raise ValueError(f"fit: the mesh has the axes {', '.join(parallel.AXES)}, got none called {missing[0]}.")
    rows, parts = o.batch_size + anchored * o.anchor_rows, rules.parts(mesh.shape)
    if rows % parts:
        raise ValueError(
            f"fit: rows of a batch are a multiple of data · fsdp · expert = {parts} of the mesh, got {rows}"
            f"{' with anchor_rows' if anchored else ''}. Change batch_size, or spread over tensor or context."
        )
    if o.length % mesh.shape["context"]:
        raise ValueError(f"fit: length is a multiple of context = {mesh.shape['context']}, got {o.length}.")


def for_training(given: Params, untouched: Params, o: Options) -> tuple[Params, Params]:
    """(trainable, frozen) in the dtypes that they are kept in."""
    # The step consumes its state; the caller's arrays stay alive.
    trainable = jax.tree.map(lambda a: jnp.array(a, _kept_dtype(a, o), copy=True), given)
    frozen = decoder.cast(untouched, o.dtype) if o.dtype else untouched
    return trainable, decoder.unstack(frozen) if o.unroll and frozen else frozen


def _kept_dtype(a: Array, o: Options):
    return jnp.float32 if o.master and jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
