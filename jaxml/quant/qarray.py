"""One node for every format: codes, scales, and how they make a matrix again."""

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxml.axes import Array, Float, Int, wide
from jaxml.linear import linear
from jaxml.parallel.mesh import automatic, live
from jaxml.parallel.rules import spec
from jaxml.quant import codebook, kernel
from jaxml.target import platform

NESTED_BLOCK = 256  # scales that share one scale of their own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nested:
    """Scales of scales (double quantisation)."""

    scales: Float[Array, "... blocks"]
    offset: Float[Array, "..."]  # mean of the scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantised matrix [..., D, F], stored in rows along which the blocks run.

    Rows are columns of a matrix [in, out] (`axis` −2: torch's [out, in]), or rows of a table [V, D] (`axis` −1). Where
    a row is no whole number of blocks, the matrix is one run of blocks, as in bitsandbytes.

    Example:
        >>> from jaxml import quant
        >>> q = quant.nf4.quantize(jnp.ones((64, 128)))
        >>> q.shape, q.codes.shape, q.dense().dtype.name
        ((64, 128), (128, 32), 'float32')
    """

    codes: Int[Array, "... rows bytes"]  # two 4-bit codes a byte, the first one high; or int8. Or [..., bytes]
    scales: Array  # [..., rows, blocks] or [..., blocks]: the largest magnitudes, float32 or (nested) uint8 codes
    nested: Nested | None
    kind: str = dataclasses.field(metadata=dict(static=True))  # of codebook.TABLES, or "int8"
    block: int = dataclasses.field(metadata=dict(static=True))  # weights a scale
    matrix: tuple[int, int] = dataclasses.field(metadata=dict(static=True))  # (D, F)
    axis: int = dataclasses.field(metadata=dict(static=True))
    dtype: str = dataclasses.field(metadata=dict(static=True))  # of the matrix that it stands for
    implementation: str | None = dataclasses.field(default=None, metadata=dict(static=True))  # of products, by name

    @property
    def rows(self) -> tuple[int, int]:
        """(how many rows are stored, weights in each)."""
        return self.matrix if self.axis == -1 else self.matrix[::-1]

    @property
    def in_rows(self) -> bool:
        """Whether blocks end where rows end."""
        return self.rows[1] % self.block == 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[: -2 if self.in_rows else -1], *self.matrix)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the arrays that are stored."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    def about(self) -> dict[str, Any]:
        """What `abstract` needs, beside the shape: JSON."""
        how = {"kind": self.kind, "block": self.block, "double": self.nested is not None}
        return how | {"axis": self.axis, "dtype": self.dtype}

    def astype(self, dtype) -> "QArray":
        """The same codes, standing for a matrix of another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype).name)

    def like(self, w: Float[Array, "... D F"]) -> "QArray":
        """Another matrix in the same format."""
        how = self.about() | {"block": None if self.kind == "int8" and self.block == self.rows[1] else self.block}
        return _quantize(w.astype(how.pop("dtype")), **how)

    def dense(self) -> Float[Array, "... D F"]:
        """The matrix, each weight its code's value times its block's scale in float32, rounded once."""
        return _dense(self)

    def matmul(self, x: Float[Array, "... D"], transpose: bool = False) -> Float[Array, "... F"]:
        """x·W, or x·Wᵀ, in x's dtype; differentiable in x, in any mode. Kept for the backward pass: codes."""
        if x.ndim < 2:
            return self.matmul(x[None], transpose)[..., 0, :]
        if x.ndim == 3 and self.ndim == 2 and kernel.wants_rows(x.dtype):
            rows = spec(("batch", "length", None), x.shape, live())
            over = dict(in_specs=(P(), rows), out_specs=rows, axis_names=automatic())
            return jax.shard_map(lambda q, x: q.matmul(x, transpose), **over)(self, x)
        return _matmul(x, self, transpose, kernel.choose(x, self))

    def take(self, ids: Int[Array, "..."]) -> Float[Array, "... F"]:
        """Rows of the matrix; of a table (`axis` −1) only those are dequantised."""
        return _take(self, ids)


def bits_per_weight(q: QArray) -> float:
    """Bits that are stored for each weight, scales included.

    Example:
        >>> import jax
        >>> from jaxml import quant
        >>> round(bits_per_weight(quant.nf4.quantize(jax.random.normal(jax.random.key(0), (1024, 1024)))), 3)
        4.127
    """
    return 8 * q.nbytes / q.size


# ---- products ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("transpose", "by"))
def _matmul(x: Array, q: QArray, transpose: bool, by: str) -> Array:
    def product(q, x, transpose):
        q = _after(x, q)
        if by == "xla":
            return jnp.matmul(x, _turned(q, x.dtype, transpose))
        return kernel.product(by, q, x, along=transpose == (q.axis == -1))

    forward = functools.partial(product, transpose=transpose)
    backward = functools.partial(product, transpose=not transpose)
    return linear(forward, backward, q, x)


def _after(x: Array, q: QArray) -> QArray:
    """The same matrix, dequantised no earlier than x is there and not once for both passes, so that it is not kept."""
    if platform() != "cpu":
        return jax.lax.optimization_barrier((x, q))[1]
    # XLA for CPUs drops barriers and begins early whatever can be begun early: a dependence that it cannot see through.
    never = (x[(0,) * x.ndim] > jnp.inf).astype(q.codes.dtype)
    return dataclasses.replace(q, codes=q.codes ^ never)


def _turned(q: QArray, dtype, transpose: bool) -> Array:
    """W or Wᵀ, in the dtype of the product."""
    stored = stored_rows(q).astype(dtype)
    return stored if transpose == (q.axis == -2) else stored.swapaxes(-1, -2)


@jax.jit
def _dense(q: QArray) -> Array:
    stored = stored_rows(q).astype(q.dtype)
    return stored if q.axis == -1 else stored.swapaxes(-1, -2)


@jax.jit
def _take(q: QArray, ids: Array) -> Array:
    if q.axis != -1 or not q.in_rows or len(q.shape) > 2:
        return jnp.take(_dense(q), ids, axis=-2)
    picked = scales(q)[ids] if q.nested is None else _nested_at(q, ids)
    return _scaled(_values(q.codes[ids], q.kind), picked, q.kind).astype(q.dtype)


# ---- from codes to weights --------------------------------------------------------------------------


def stored_rows(q: QArray) -> Float[Array, "... rows run"]:
    """The weights as they are stored, float32 (or wider)."""
    of = _values(q.codes, q.kind)
    if q.in_rows:
        return _scaled(of, scales(q), q.kind)
    rows, run = q.rows
    per_weight = jnp.repeat(scales(q), q.block, axis=-1)[..., : rows * run]
    return (of[..., : rows * run] * unit_of(per_weight, q.kind)).reshape(*of.shape[:-1], rows, run)


def scales(q: QArray) -> Float[Array, "... rows blocks"]:
    """The largest magnitude of each block, float32."""
    if q.nested is None:
        return q.scales
    lead = q.codes.shape[: -2 if q.in_rows else -1]
    flat = q.scales.reshape(*lead, -1)
    of = jnp.repeat(q.nested.scales, NESTED_BLOCK, axis=-1)[..., : flat.shape[-1]]
    values = codebook.lookup(codebook.dynamic(), flat) * of + q.nested.offset[..., None]
    return values.reshape(q.scales.shape)


def units(q: QArray) -> Float[Array, "... rows blocks"]:
    """What multiplies the values of a block's codes, float32."""
    return unit_of(scales(q), q.kind)


def _nested_at(q: QArray, ids: Array) -> Array:
    """Scales of some rows of one table."""
    blocks = q.scales.shape[-1]
    place = ids[..., None] * blocks + jnp.arange(blocks).reshape((1,) * ids.ndim + (-1,))
    values = codebook.lookup(codebook.dynamic(), q.scales[ids])
    return values * q.nested.scales[place // NESTED_BLOCK] + q.nested.offset


def _values(codes: Array, kind: str) -> Array:
    """What codes stand for within their block, along the last axis."""
    if kind == "int8":
        return codes.astype(jnp.float32)
    return codebook.lookup(codebook.TABLES[kind], unpack(codes))


def unpack(codes: Int[Array, "... bytes"]) -> Int[Array, "... codes"]:
    """Two codes a byte, the first one in the high half."""
    pairs = jnp.stack([codes >> 4, codes & 15], axis=-1)
    return pairs.reshape(*codes.shape[:-1], 2 * codes.shape[-1])


def pack(codes: Int[Array, "... codes"]) -> Int[Array, "... bytes"]:
    """The inverse of `unpack`."""
    pairs = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def _scaled(values: Array, of: Array, kind: str) -> Array:
    blocks = values.reshape(*of.shape, -1)
    return (blocks * unit_of(of, kind)[..., None]).reshape(values.shape)


def unit_of(of: Array, kind: str) -> Array:
    """What multiplies a code's value, from the block's largest magnitude."""
    return of / 127 if kind == "int8" else of


# ---- from weights to codes --------------------------------------------------------------------------


def quantize(w: Float[Array, "... D F"], kind: str, *, block: int | None, double: bool, axis: int, name: str) -> QArray:
    """What the formats' `quantize` call; block None is one scale a row. `name` is the caller's, for errors."""
    _check(w, kind, block, double, axis, name)
    return _quantize(w, kind=kind, block=block, double=double, axis=axis)


def abstract(shape: tuple[int, ...], kind: str, block: int, double: bool, axis: int, dtype: str) -> QArray:
    """Shapes and dtypes of a quantised matrix of that shape."""
    make = functools.partial(_quantize, kind=kind, block=block, double=double, axis=axis)
    return jax.eval_shape(make, jax.ShapeDtypeStruct(shape, dtype))


def _check(w: Any, kind: str, block: int | None, double: bool, axis: int, name: str) -> None:
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: w is a floating matrix [..., D, F], got {w.dtype.name} of the shape {w.shape}.")
    if axis not in (-1, -2):
        raise ValueError(f"{name}: axis is -2 (a matrix [in, out]) or -1 (a table [V, D]), got {axis}.")
    if (block is None and kind != "int8") or (block is not None and not _power_of_two(block)):
        raise ValueError(f"{name}: block is a power of two, got {block!r}.")
    if not isinstance(double, bool):
        raise ValueError(f"{name}: double is True or False, got {double!r}.")
    if not isinstance(w, jax.core.Tracer) and not bool(jnp.isfinite(w).all()):
        raise ValueError(f"{name}: every weight is finite, got {int((~jnp.isfinite(w)).sum())} that are not.")


def _power_of_two(n: Any) -> bool:
    return isinstance(n, numbers.Integral) and n >= 2 and n & (n - 1) == 0


@functools.partial(jax.jit, static_argnames=("kind", "block", "double", "axis"))
def _quantize(w: Array, *, kind: str, block: int | None, double: bool, axis: int) -> QArray:
    dtype, matrix, lead = w.dtype.name, w.shape[-2:], w.shape[:-2]
    stored = (w if axis == -1 else w.swapaxes(-1, -2)).astype(wide(w.dtype))
    rows, run = stored.shape[-2:]
    block = run if block is None else block
    blocks, size = -(-rows * run // block), rows * run
    flat = jnp.pad(stored.reshape(*lead, size), [(0, 0)] * len(lead) + [(0, blocks * block - size)])
    flat = flat.reshape(*lead, blocks, block)
    largest = jnp.max(jnp.abs(flat), axis=-1)
    if kind == "int8":
        unit = flat * (127.0 / jnp.where(largest > 0, largest, 1))[..., None]
        codes = jnp.round(unit).astype(jnp.int8)
    else:
        some = jnp.where(largest > 0, largest, 1)[..., None]
        unit = flat * (1.0 / some)
        if size % block:  # bitsandbytes divides in a block that is not full
            last = (jnp.arange(blocks) == blocks - 1).reshape((1,) * len(lead) + (-1, 1))
            unit = jnp.where(last, flat / some, unit)
        codes = codebook.nearest(codebook.TABLES[kind], unit)
    codes = codes.reshape(*lead, blocks * block)[..., : size + (size % 2 if kind != "int8" else 0)]
    codes = codes if kind == "int8" else pack(codes)
    in_rows = run % block == 0
    if in_rows:
        codes = codes.reshape(*lead, rows, -1)
    of, nested = largest.astype(jnp.float32), None
    if double:
        of, nested = _quantize_scales(of)
    if in_rows:
        of = of.reshape(*lead, rows, -1)
    return QArray(codes, of, nested, kind, block, matrix, axis, dtype)


def _quantize_scales(of: Float[Array, "... blocks"]) -> tuple[Array, Nested]:
    """Scales less their mean, in 8 bits of the dynamic map, 256 to a scale."""
    n = of.shape[-1]
    blocks = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -n % NESTED_BLOCK)]).reshape(
        *a.shape[:-1], -1, NESTED_BLOCK
    )
    count = jax.lax.optimization_barrier(jnp.float32(n))  # a true division: XLA would multiply by 1 / n
    offset = jnp.sum(jnp.sum(blocks(of), axis=-1), axis=-1) / count
    rest = blocks(of - offset[..., None])
    largest = jnp.max(jnp.abs(rest), axis=-1)
    unit = rest * (1.0 / jnp.where(largest > 0, largest, 1))[..., None]
    # bitsandbytes' table of 2^16 places: the nearest value to the nearest place.
    place = jnp.floor((unit + 1.0) * 0.5 * 65535 + 0.5)
    codes = codebook.nearest(codebook.dynamic(), place * (2.0 / 65535) - 1.0)
    codes = jnp.where(largest[..., None] > 0, codes, 0)
    codes = codes.reshape(*of.shape[:-1], -1)[..., :n]
    return codes, Nested(largest, offset)
