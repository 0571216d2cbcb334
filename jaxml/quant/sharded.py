"""Quantised weights spread over devices: each product gathers codes, an eighth of the float32 matrix."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxml.axes import Array, Float, Int, Params
from jaxml.linear import linear
from jaxml.quant.qarray import QArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharded:
    """A quantised matrix whose stored rows lie on the devices of a mesh axis, within `jax.shard_map`.

    Inside, the arrays of `whole` are a device's own rows; a product gathers the others' and lets them go again, in the
    backward pass as well (fully sharded data parallelism of frozen weights).

    Example:
        >>> from jaxml import quant
        >>> import jax.numpy as jnp
        >>> Sharded(quant.nf4.quantize(jnp.ones((64, 128))), "data").shape
        (64, 128)
    """

    whole: QArray
    axis_name: str = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def astype(self, dtype: Any) -> "Sharded":
        return dataclasses.replace(self, whole=self.whole.astype(dtype))

    def dense(self) -> Float[Array, "... D F"]:
        return self._gathered(self.whole).dense()

    def take(self, ids: Int[Array, "..."]) -> Array:
        return self._gathered(self.whole).take(ids)

    def matmul(self, x: Float[Array, "... D"], transpose: bool = False) -> Float[Array, "... F"]:
        product = lambda q, x, transpose: self._gathered(q).matmul(x, transpose)
        forward = functools.partial(product, transpose=transpose)
        return linear(forward, functools.partial(product, transpose=not transpose), self.whole, x)

    def _gathered(self, q: QArray) -> QArray:
        gather = functools.partial(jax.lax.all_gather, axis_name=self.axis_name, axis=-2, tiled=True)
        turn = lambda a: gather(a.reshape((1,) * (2 - a.ndim) + a.shape)).reshape(*a.shape[:-2], -1, *a.shape[-1:])
        return dataclasses.replace(q, codes=turn(q.codes), scales=turn(q.scales))


def shard(params: Params, axis_name: str, size: int) -> tuple[Params, Params]:
    """(the same tree with every quantised matrix as `Sharded`, its PartitionSpecs): for `jax.shard_map`.

    Everything else is the same on all devices.

    Args:
        params: arrays or shapes; adapters may stand around the quantised matrices.
        axis_name: of the mesh axis.
        size: of that axis, which must divide the stored rows (the matrices' outputs).

    Raises:
        ValueError: rows that do not divide, or blocks that run over their ends; by name.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxml import quant, weights
        >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
        >>> params = quant.quantize_params({"w": jnp.ones((64, 8))}, targets=["w"])
        >>> spread, specs = shard(params, "data", 1)
        >>> run = lambda params, x: weights.dot(x, params["w"])
        >>> rows = PartitionSpec("data")
        >>> jax.shard_map(run, mesh=mesh, in_specs=(specs, rows), out_specs=rows)(spread, jnp.ones((2, 64))).shape
        (2, 8)
    """
    is_q = lambda w: isinstance(w, QArray)

    def wrap(path, w):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not is_q(w):
            return w
        if not w.in_rows or w.rows[0] % size:
            raise ValueError(
                f"quant.shard: stored rows are whole blocks and a multiple of {size} devices, got {w.rows[0]} rows of "
                f"{w.rows[1]} weights in blocks of {w.block} for {name}."
            )
        return Sharded(w, axis_name)

    spread = jax.tree_util.tree_map_with_path(wrap, params, is_leaf=is_q)
    nothing = PartitionSpec()

    def spec(w):
        if not isinstance(w, Sharded):
            return nothing
        parts = jax.tree.map(lambda a: nothing, w)
        lead = len(w.shape) - 2
        rows = PartitionSpec(*[None] * lead, axis_name)
        return dataclasses.replace(parts, whole=dataclasses.replace(parts.whole, codes=rows, scales=rows))

    return spread, jax.tree.map(spec, spread, is_leaf=lambda w: isinstance(w, Sharded))
