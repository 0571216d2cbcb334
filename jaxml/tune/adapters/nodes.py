"""The weight nodes that adapters are made of.

| node | |
|---|---|
| `LoRA` | W + s·A B in its many forms: DoRA, VeRA, AdaLoRA are fields of it |
| `Scaled` | diag(inner)·W·diag(outer) (IA³) |
| `Whole` | a copy of the weight that is trained itself |
| `Stack` | many LoRAs around one W, chosen row by row of the batch |
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxml import weights
from jaxml.axes import Array, Float, Int, wide
from jaxml.target import platform


class Adapter:
    """What every node that is trained says of the weight that it stands around."""

    base: Any
    method: str
    train: tuple[str, ...]  # the fields that are trained

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def untied(self) -> Any:
        """What an embedding is as a head: adapters of the one are none of the other's."""
        return self.base


static = lambda default=dataclasses.MISSING: dataclasses.field(default=default, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA(Adapter):
    """W + s·A diag(e) B diag(g) in the place of W, with DoRA's magnitudes m: m ⊙ (that) / its norms.

    A leads from inputs to the rank and B to outputs, whichever way W is stored. All arrays may have layers or experts
    stacked in front; A and B may be `weights.Shared` by all layers (VeRA).

    Example:
        >>> w, key = jnp.eye(4), jax.random.key(0)
        >>> lora = LoRA(w, jax.random.normal(key, (4, 2)), jnp.zeros((2, 4)), jnp.float32(1.0))
        >>> lora.matmul(jnp.ones((1, 4))).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """

    base: Any  # [..., D, F], an array or another node
    a: Float[Array, "... D R"]
    b: Float[Array, "... R F"]
    scale: Float[Array, "..."]
    diagonal: Float[Array, "... R"] | None = None  # AdaLoRA's singular values, VeRA's d
    outer: Float[Array, "... F"] | None = None  # VeRA's b
    magnitude: Float[Array, "... F"] | None = None  # DoRA
    squares: Float[Array, "... F"] | None = None  # DoRA: squared norms of W's outputs, which stay as they are
    key: Array | None = None  # of dropout, while training
    method: str = static("lora")  # "lora", "vera", "adalora"
    train: tuple[str, ...] = static(("a", "b"))
    transposed: bool = static(False)  # W is a table [V, D] that leads from D to V: a head
    dropout: float = static(0.0)
    start: str = static("default")  # how A and B began: with some starts a part of W is in them
    ranks: tuple[int, ...] | None = static(None)  # of stacked layers, where they differ: the rest of A and B is 0

    @property
    def rank(self) -> int:
        return weights.value(self.a).shape[-1]

    def astype(self, dtype: Any) -> "LoRA":
        fields = {name: getattr(self, name) for name in ("a", "b", "diagonal", "outer", "magnitude")}
        cast = lambda a: a.astype(dtype)
        return dataclasses.replace(self, base=cast(self.base), **jax.tree.map(cast, fields))

    def matmul(self, x: Float[Array, "... D"], transpose: bool = False) -> Float[Array, "... F"]:
        if transpose != self.transposed:
            return self._backwards(x)
        main = weights.dot(x, self.base, self.transposed)
        if self.key is None or not self.dropout:
            y = main + self._low(x)
            return y if self.magnitude is None else y * _across(self.gain(), y)
        dropped = self._drop(x)
        if self.magnitude is None:
            return main + self._low(dropped)
        gain = _across(self.gain(), main)
        return main + (gain - 1) * weights.dot(dropped, self.base, self.transposed) + gain * self._low(dropped)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... F"]:
        main = weights.take(self.base, ids)
        low = self._up(jnp.take(self._a(), ids, axis=-2).astype(main.dtype))
        return main + low if self.magnitude is None else (main + low) * _across(self.gain(), main)

    def dense(self) -> Float[Array, "... D F"]:
        base = weights.dense(self.base)
        delta = self.delta(wide(base.dtype))
        total = base.astype(delta.dtype) + (delta.swapaxes(-1, -2) if self.transposed else delta)
        if self.magnitude is not None:
            gain = self.gain()
            total = total * (gain[..., None] if self.transposed else gain[..., None, :])
        return total.astype(base.dtype)

    def delta(self, dtype: Any = jnp.float32) -> Float[Array, "... D F"]:
        """s·A diag(e) B diag(g), inputs first; without DoRA's magnitudes."""
        deep = lambda m: m.reshape((1,) * (self.scale.ndim + 2 - m.ndim) + m.shape).astype(dtype)  # if it is shared
        a, b = deep(self._a()), deep(self._b())
        a = a if self.diagonal is None else a * self.diagonal.astype(dtype)[..., None, :]
        b = b if self.outer is None else b * self.outer.astype(dtype)[..., None, :]
        return jnp.matmul(a, b) * self.scale.astype(dtype)[..., None, None]

    def gain(self) -> Float[Array, "... F"]:
        """DoRA's m / ‖W + s·A B‖, a number an output; the norm is a constant to derivatives, as in the paper.

        ‖w + s·A b‖² = ‖w‖² + 2s (Aᵀw)·b + s² b·(AᵀA)b for each output: nothing of W's size is made.
        """
        fixed = lambda v: jax.lax.stop_gradient(v.astype(jnp.float32))
        a, b, s = fixed(self._a()), fixed(self._b()), fixed(self.scale)[..., None]
        cross = weights.dot(a.swapaxes(-1, -2), self.base, self.transposed)
        gram = jnp.matmul(a.swapaxes(-1, -2), a)
        squared = self.squares + 2 * s * jnp.sum(fixed(cross) * b, -2) + s**2 * jnp.sum(b * jnp.matmul(gram, b), -2)
        return self.magnitude.astype(jnp.float32) * jax.lax.rsqrt(squared)

    def _low(self, x: Array) -> Array:
        return self._up(jnp.matmul(x, self._a().astype(x.dtype)))

    def _up(self, h: Array) -> Array:
        h = h if self.diagonal is None else h * _across(self.diagonal, h)
        y = jnp.matmul(h, self._b().astype(h.dtype))
        y = y if self.outer is None else y * _across(self.outer, y)
        return y * _across(self.scale[..., None], y)

    def _backwards(self, x: Array) -> Array:
        """The product with the transposed matrix."""
        x = x if self.magnitude is None else x * _across(self.gain(), x)
        h = x if self.outer is None else x * _across(self.outer, x)
        h = jnp.matmul(h, self._b().astype(x.dtype).swapaxes(-1, -2))
        h = h if self.diagonal is None else h * _across(self.diagonal, h)
        y = jnp.matmul(h, self._a().astype(x.dtype).swapaxes(-1, -2))
        return weights.dot(x, self.base, not self.transposed) + y * _across(self.scale[..., None], y)

    def _drop(self, x: Array) -> Array:
        kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
        return jnp.where(kept, x / (1 - self.dropout), 0)

    def _a(self) -> Array:
        if not weights.is_shared(self.a):
            return self.a
        return self.a.value[: self.shape[-1 if self.transposed else -2]]

    def _b(self) -> Array:
        if not weights.is_shared(self.b):
            return self.b
        return self.b.value[:, : self.shape[-2 if self.transposed else -1]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Adapter):
    """diag(inner)·W·diag(outer) in the place of W: one number for each input, or for each output.

    Example:
        >>> Scaled(jnp.eye(2), outer=jnp.array([1.0, 3.0])).matmul(jnp.ones((1, 2))).tolist()
        [[1.0, 3.0]]
    """

    base: Any  # [..., D, F]
    inner: Float[Array, "... D"] | None = None
    outer: Float[Array, "... F"] | None = None
    method: str = static("ia3")
    train: tuple[str, ...] = static(("outer",))

    def astype(self, dtype: Any) -> "Scaled":
        cast = lambda a: None if a is None else a.astype(dtype)
        return dataclasses.replace(self, base=cast(self.base), inner=cast(self.inner), outer=cast(self.outer))

    def matmul(self, x: Float[Array, "... D"], transpose: bool = False) -> Float[Array, "... F"]:
        first, last = (self.outer, self.inner) if transpose else (self.inner, self.outer)
        x = x if first is None else x * _across(first, x)
        y = weights.dot(x, self.base, transpose)
        return y if last is None else y * _across(last, y)

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... F"]:
        y = weights.take(self.base, ids)
        y = y if self.inner is None else y * self.inner[ids][..., None].astype(y.dtype)
        return y if self.outer is None else y * _across(self.outer, y)

    def dense(self) -> Float[Array, "... D F"]:
        w = weights.dense(self.base)
        w = w if self.inner is None else w * self.inner[..., None].astype(w.dtype)
        return w if self.outer is None else w * self.outer[..., None, :].astype(w.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole(Adapter):
    """A weight that is trained whole, beside the one that it began as.

    Example:
        >>> Whole(jnp.eye(2), 2 * jnp.eye(2)).matmul(jnp.ones((1, 2))).tolist()
        [[2.0, 2.0]]
    """

    base: Any
    value: Array | None
    method: str = static("whole")
    train: tuple[str, ...] = static(("value",))

    def astype(self, dtype: Any) -> "Whole":
        cast = lambda a: None if a is None else a.astype(dtype)
        return dataclasses.replace(self, base=cast(self.base), value=cast(self.value))

    def matmul(self, x: Array, transpose: bool = False) -> Array:
        return weights.dot(x, self.value, transpose)

    def take(self, ids: Int[Array, "..."]) -> Array:
        return weights.take(self.value, ids)

    def dense(self) -> Array:
        return self.value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack(Adapter):
    """Many LoRAs around one W; row i of the batch takes number ids[i], or none where that is negative.

    Example:
        >>> Stack(jnp.eye(4), jnp.zeros((3, 4, 2)), jnp.zeros((3, 2, 4))).count
        3
    """

    base: Any  # [..., D, F]
    a: Float[Array, "... M D R"]
    b: Float[Array, "... M R F"]  # times the scales
    ids: Any = None  # weights.Rows
    method: str = static("stack")
    train: tuple[str, ...] = static(())
    transposed: bool = static(False)

    @property
    def count(self) -> int:
        """M, how many adapters there are."""
        return self.a.shape[len(self.shape) - 2]

    def astype(self, dtype: Any) -> "Stack":
        return dataclasses.replace(self, base=self.base.astype(dtype), a=self.a.astype(dtype), b=self.b.astype(dtype))

    def matmul(self, x: Float[Array, "B ... D"], transpose: bool = False) -> Float[Array, "B ... F"]:
        if transpose != self.transposed:
            raise ValueError("adapters.Stack: multiplies from inputs to outputs only. Merge an adapter for the rest.")
        at, some = self._chosen(x)
        rows, pair = x.reshape(x.shape[0], -1, x.shape[-1]), (self.a.astype(x.dtype), self.b.astype(x.dtype))
        low = lambda row, a, b: jnp.matmul(jnp.matmul(row, a), b)
        if platform() == "cpu" and rows.shape[1] == 1:  # row by row: nothing is gathered into a copy
            low = jax.lax.map(lambda one: low(one[0], *(part[one[1]] for part in pair)), (rows, at))
        else:
            low = low(rows, *(part[at] for part in pair))
        return weights.dot(x, self.base, transpose) + (low * some).reshape(*x.shape[:-1], -1)

    def take(self, ids: Int[Array, "B ..."]) -> Float[Array, "B ... F"]:
        main = weights.take(self.base, ids)
        at, some = self._chosen(main)
        rows = self.a[at[:, None], ids.reshape(ids.shape[0], -1)].astype(main.dtype)
        return main + (jnp.matmul(rows, self.b[at].astype(main.dtype)) * some).reshape(main.shape)

    def dense(self) -> Array:
        raise ValueError("adapters.Stack: many adapters have no one matrix. Take one with `adapters.take`.")

    def _chosen(self, x: Array) -> tuple[Int[Array, "B"], Float[Array, "B 1 1"]]:
        """(which adapter each row takes, 0 where it takes none and 1 elsewhere)."""
        if self.ids is None:
            raise ValueError("adapters.Stack: which adapter each row takes is not said. Call `adapters.select` first.")
        ids = self.ids.value
        if ids.shape != x.shape[:1]:
            raise ValueError(f"adapters.select: one id for each of the batch's {x.shape[0]} rows, got {ids.shape}.")
        return jnp.maximum(ids, 0), (ids >= 0).astype(x.dtype)[:, None, None]


def _across(v: Float[Array, "... F"], x: Float[Array, "... T F"]) -> Array:
    """A vector for each matrix of a stack over the last axis of x, in its rank and dtype."""
    lead = v.ndim - 1
    if x.ndim - 1 < lead:
        raise ValueError(f"adapters: x has the {lead} leading axes of the matrices, got the shape {x.shape}.")
    return v.astype(x.dtype).reshape(*v.shape[:-1], *(1,) * (x.ndim - 1 - lead), v.shape[-1])
