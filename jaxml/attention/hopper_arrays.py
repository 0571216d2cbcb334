"""How the arrays of a call reach the Hopper kernels: head dims and what lies along a tile lengthened to whole blocks.

Tensor memory accelerators read 0 beyond the end of query, key and value; other loads know no ends.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxml.attention import gpu_arrays, masks
from jaxml.attention.blocks import HopperCut
from jaxml.attention.gpu_arrays import Operand, Place, Ranges
from jaxml.attention.masks import Grid, Mask, Tile
from jaxml.attention.tiles import HIDDEN, Inputs, Rules
from jaxml.axes import Array
from jaxml.kernels import divide, padded, remainder
from jaxml.linear import vary

ROWS = 64  # of what a warp group multiplies
WIDE = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # rows of 64 numbers of 16 bits
WIDE_FLOAT32 = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


class Call(gpu_arrays.Call):
    """A call's arrays as the kernels take them; `cut`: how large the tiles are, `turned`: whether they are turned."""

    def __init__(self, rules: Rules, x: Inputs, cut: HopperCut, others: Any = (), turned: bool = False):
        self.cut, self.turned = cut, turned
        super().__init__(rules, x, others)
        # Tiles of shared memory are 8 rows of 64 numbers each, and so have to be the arrays that fill them.
        self.query, self.key, self.value = (padded(a, 1, 8, 1, 64) for a in (self.x.query, self.x.key, self.x.value))
        self.width, self.width2 = self.query.shape[3], self.value.shape[3]

    def of_rows(self, a: Array, beyond: float = 0.0) -> Array:
        """A number for each row, [B, N, T], lengthened to whole blocks."""
        return jnp.pad(a, ((0, 0), (0, 0), (0, -self.T % self.cut.rows)), constant_values=beyond)

    def program(self, heads: int) -> tuple[Array, Array, Array]:
        """(head, batch row, block) of the program that runs: a block of all heads of all rows, then the next block."""
        tile = jax.lax.axis_index("tile")
        return remainder(tile, heads), remainder(divide(tile, heads), self.B), divide(tile, heads * self.B)

    def launch(
        self,
        kernel,
        ranges: Ranges,
        rows: list[Array],
        heads: int,
        out: list,
        groups: int,
        scratch: list,
        sums: tuple[Any, ...] = (),
    ):
        """The kernel's results: a program for each block of `ranges` and each head of each batch row.

        Args:
            kernel: takes query, key, value, `rows`, the arrays of `ranges`, the operands, `sums`, results, scratch.
            groups: warp groups that compute; one more copies.
            sums: references to arrays (of `pl.run_state`) that all programs add to.
        """
        operands = [self.query, self.key, self.value, *rows, *ranges.arrays, *(o.array for o in self.operands)]
        call = plgpu.kernel(
            kernel,
            out_type=out,
            grid=(ranges.blocks * self.B * heads,),
            grid_names=("tile",),
            num_threads=groups + 1,
            thread_name="group",
            scratch_types=scratch,
            compiler_params=COMPILER,
        )
        # Until 0.10 what `plgpu.kernel` returns can be mapped, but takes no references; what it is made of does.
        call = getattr(call, "fun", call) if sums else call
        return call(*vary(operands, self.axes), *sums)

    def rows_of(self, place: Place) -> Array:
        shape = gpu_arrays.shape_of(place)
        return place.row + jax.lax.broadcasted_iota(jnp.int32, shape, 1 if place.turned else 0)

    def columns_of(self, place: Place) -> Array:
        shape = gpu_arrays.shape_of(place)
        return place.column + jax.lax.broadcasted_iota(jnp.int32, shape, 0 if place.turned else 1)

    def hide(self, s: Array, mask: Mask | None, tile: Tile, place: Place, hidden: float = HIDDEN) -> Array:
        return with_booleans_as_numbers(lambda: super(Call, self).hide(s, mask, tile, place, hidden))

    def _operand(self, role: str, a: Array) -> Operand:
        if role in ("data", "batch"):
            return super()._operand(role, a)
        a = masks.pad(role, a, Grid(self.T, self.S, self.cut.rows, self.cut.columns))
        if role in ("row", "column"):
            a = a[:, None, :, None] if role == "row" else a[:, None, None, :]
        small = a.dtype == jnp.bool_
        b, n, t, s = a.shape
        turned = self.turned and t > 1 and s > 1
        if turned:  # whole, beforehand: threads cannot turn what they load
            a = a.swapaxes(2, 3)

        def load_part(ref, place):
            first = jnp.int32(0)
            at = [place.batch if b > 1 else first, place.head if n > 1 else first]
            at.append(pl.ds(place.row, place.rows) if t > 1 else first)
            at.append(pl.ds(place.column, place.columns) if s > 1 else first)
            part = ref.at[tuple([*at[:2], at[3], at[2]] if turned else at)]
            if t > 1 and s > 1:
                out = load(part)
            elif t > 1 or s > 1:
                out = load_along(part, place, of_rows=t > 1)
            else:
                out = load(part)
            return out.astype(jnp.int32) != 0 if small else out

        return Operand(a.astype(jnp.int8) if small else a, load_part)


def load_along(ref, place: Place, of_rows: bool) -> Array:
    """A number for each row, or column, of a tile, read from memory, as a whole tile."""
    axis = int(of_rows == place.turned)
    return spread(load(ref, plgpu.Layout.WGMMA.reduce(1 - axis)), place, of_rows)


def spread(vector: Array, place: Place, of_rows: bool) -> Array:
    """A number for each row, or column, of a tile as a whole tile."""
    return jax.lax.broadcast_in_dim(vector, gpu_arrays.shape_of(place), (int(of_rows == place.turned),))


def shared(*shape: int, dtype):
    """Shared memory for tiles that tensor cores read."""
    return plgpu.SMEM(shape, dtype, transforms=WIDE)


def registers(groups: int, of_memory: bool = False) -> None:
    """A warp group's share of them: the one that only copies leaves its own to those that compute."""
    if groups > 1:  # two have as many as there can be
        plgpu.set_max_registers(24 if of_memory else 240, action="decrease" if of_memory else "increase")


def meet(barrier) -> None:
    """Waits for the other warp groups that compute."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def feed(n: Array, stages: int, at: tuple, *streams: tuple) -> None:
    """The n-th block of each stream (source, store, barrier of what is here, barrier of what is free) set off."""
    slot = remainder(n, stages)
    for source, store, here, free in streams:
        pl.when(n >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(source.at[at], store.at[slot], here.at[slot])


def with_booleans_as_numbers(function):
    """``function()`` where ``==``, ``!=`` and ``~`` of booleans are those of numbers: Mosaic GPU fails on the others.

    ``%`` of JAX has one of them, too.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)()
    return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(closed.jaxpr, closed.consts, []))


def _evaluate(jaxpr, consts, arguments) -> list[Array]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda v: jnp.asarray(v.val, v.aval.dtype) if hasattr(v, "val") else values[v]
    for eqn in jaxpr.eqns:
        given, name = list(map(read, eqn.invars)), eqn.primitive.name
        boolean = bool(given) and given[0].dtype == jnp.bool_
        if boolean and name == "not":
            out = [given[0].astype(jnp.int32) == 0]
        elif boolean and name in ("eq", "ne"):
            out = [eqn.primitive.bind(*(a.astype(jnp.int32) for a in given), **eqn.params)]
        elif name in ("jit", "pjit"):
            out = _evaluate(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts, given)
        else:
            out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
            out = out if eqn.primitive.multiple_results else [out]
        values.update(zip(eqn.outvars, out, strict=True))
    return list(map(read, jaxpr.outvars))


# ---- what differs between versions of JAX -----------------------------------------------------------

_INDEXED = "idx" in inspect.signature(plgpu.load).parameters  # until 0.11


def load(ref, layout=None) -> Array:
    """What a reference to any memory holds, laid out like that, and read as well as can be."""
    if not ref.shape:
        return ref[...]
    index = ((),) if _INDEXED else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)
