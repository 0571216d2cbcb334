"""Arrays of the optimizer's state in eight or four bits, scaled block by block.

`Packed` has the array's own shape in its codes, so that it shards, stacks and slices as the array would. A block is 256
elements: of the last axis, or of several rows where that is shorter. Kinds:

- "dynamic": 127 values of either sign over seven decades, for moments with a sign;
- "dynamic_unsigned": 255 values over seven decades, for means of squares, which a linear map would take to zero;
- "int8", "int4": linear.

Reference:
    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.1 and appendix (dynamic map).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float, wide

BLOCK = 256
KINDS = ("dynamic", "dynamic_unsigned", "int8", "int4")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """codes [..., m, n] and one scale a block; `unpack` gives the array.

    Example:
        >>> packed = pack(jnp.array([[2.0, -1.0]]), "int8")
        >>> packed.codes.tolist(), packed.scales.tolist()
        ([[127, -63]], [[2.0]])
    """

    codes: Array  # uint8, int8 or int4, of the array's shape
    scales: Float[Array, "..."]  # [..., ⌈m / rows⌉, ⌈n / columns⌉], the largest magnitude of each block
    kind: str = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self):
        return self.scales.dtype

    def unpack(self) -> Float[Array, "... m n"]:
        """The array, in the dtype of the scales."""
        return _decode(self.codes, self.kind, self.dtype) * _spread(self.scales, self.codes.shape)

    def pack_like(self, x: Float[Array, "... m n"], key: Array | None = None) -> "Packed":
        """Another array in the same form."""
        return pack(x.astype(self.dtype), self.kind, key)


def pack(x: Float[Array, "... m n"], kind: str, key: Array | None = None) -> Packed:
    """The array in eight or four bits, rounded to the nearest value, or stochastically where a key is given.

    Scales are float32 or wider, whatever the array is.

    Example:
        >>> import jax.numpy as jnp
        >>> packed = pack(jnp.array([[0.5, -1.0, 0.001]]), "dynamic")
        >>> packed.codes.dtype.name, [round(float(v), 4) for v in packed.unpack()[0]]
        ('uint8', [0.5008, -0.993, 0.0009])
    """
    x = x.astype(wide(x.dtype))
    scales = _largest(jnp.abs(x))
    unit = x / _spread(jnp.where(scales > 0, scales, 1), x.shape)
    if kind in ("int8", "int4"):
        levels = 127 if kind == "int8" else 7
        noise = 0.5 if key is None else jax.random.uniform(key, x.shape, x.dtype)
        codes = jnp.clip(jnp.floor(unit * levels + noise), -levels, levels).astype(kind)
        return Packed(codes, scales, kind)
    codes = _encode(unit, kind)
    if key is not None:
        codes = _stochastic(unit, codes, kind, key)
    return Packed(codes.astype(jnp.uint8), scales, kind)


def is_packed(x) -> bool:
    """For `is_leaf` in tree functions.

    Example:
        >>> state = {"mu": pack(jnp.ones((1, 2)), "int8"), "count": jnp.zeros(())}
        >>> [is_packed(x) for x in jax.tree.leaves(state, is_leaf=is_packed)]
        [False, True]
    """
    return isinstance(x, Packed)


def unpack(x: Array | Packed) -> Array:
    """The array, whichever form it is in.

    Example:
        >>> x = jnp.array([[2.0, -2.0]])
        >>> unpack(pack(x, "int4")).tolist(), unpack(x).tolist()
        ([[2.0, -2.0]], [[2.0, -2.0]])
    """
    return x.unpack() if isinstance(x, Packed) else x


def pack_like(x: Array, other: Array | Packed, key: Array | None = None) -> Array | Packed:
    """`x` in the form of `other`.

    Example:
        >>> x = jnp.array([[2.0, -1.0]])
        >>> pack_like(x, pack(x, "int4")).kind, pack_like(x, x.astype(jnp.bfloat16)).dtype.name
        ('int4', 'bfloat16')
    """
    return other.pack_like(x, key) if isinstance(other, Packed) else x.astype(other.dtype)


# ---- blocks -----------------------------------------------------------------------------------------


def _block(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a block."""
    n = shape[-1] if shape else 1
    m = shape[-2] if len(shape) > 1 else 1
    columns = min(n, BLOCK)
    return min(m, max(1, BLOCK // max(columns, 1))), columns


def _largest(x: Float[Array, "... m n"]) -> Float[Array, "..."]:
    """Of each block."""
    rows, columns = _block(x.shape)
    x = x.reshape(x.shape if x.ndim > 1 else (1, x.size))
    *lead, m, n = x.shape
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -m % rows), (0, -n % columns)])
    x = x.reshape(*lead, -(-m // rows), rows, -(-n // columns), columns)
    return jnp.max(x, axis=(-3, -1))


def _spread(scales: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "... m n"]:
    """Each block's scale at all its elements."""
    rows, columns = _block(shape)
    m, n = shape[-2:] if len(shape) > 1 else (1, shape[0] if shape else 1)
    wide = jnp.repeat(jnp.repeat(scales, rows, axis=-2)[..., :m, :], columns, axis=-1)[..., :n]
    return wide.reshape(shape)


# ---- the dynamic map --------------------------------------------------------------------------------
#
# Magnitudes are numbered: 0, then decade after decade with 1, 2, 4, …, 64 values (twice as many without a sign), evenly
# spaced within the decade, then 1. Number k (k + 1 without a sign) of decade e lies in [2^e, 2^(e+1)).


def _map(kind: str) -> tuple[int, int]:
    """(the number of the magnitude 1, what is added to a number so that decades begin at powers of two)."""
    return (255, 1) if kind == "dynamic_unsigned" else (128, 0)


def _magnitude(number: Array, kind: str, dtype) -> Array:
    top, more = _map(kind)
    k = (number + more).astype(dtype)
    width = lambda e: 10.0 ** (e - 6 - more) * 0.9 / 2**e  # between two values of decade e
    rungs = [(2.0**e, 2.0**e, width(e), 10.0 ** (e - 6 - more) * 0.1) for e in range(7 + more)]
    count, step, first = _ladder(k, rungs)
    value = first + (k - count + 0.5) * step
    return jnp.where(number == 0, 0.0, jnp.where(number == top, 1.0, value)).astype(dtype)


def _ladder(x: Array, rungs: list[tuple[float, ...]]) -> list[Array]:
    """The numbers of the last rung (where it begins, *numbers) that x has reached: selections, no powers."""
    out = [jnp.full_like(x, value) for value in rungs[0][1:]]
    for begins, *values in rungs[1:]:
        out = [jnp.where(x >= begins, value, now) for value, now in zip(values, out)]
    return out


@functools.partial(jax.jit, static_argnames=("kind", "dtype"))
def _decode(codes: Array, kind: str, dtype) -> Array:
    if kind in ("int8", "int4"):
        return codes.astype(dtype) / (127 if kind == "int8" else 7)
    if kind == "dynamic_unsigned":
        return _magnitude(codes.astype(jnp.int32), kind, dtype)
    number = codes.astype(jnp.int32) - 127
    return jnp.sign(number).astype(dtype) * _magnitude(jnp.abs(number), kind, dtype)


@functools.partial(jax.jit, static_argnames="kind")
def _encode(unit: Array, kind: str) -> Array:
    """The nearest value's code."""
    top, more = _map(kind)
    a = jnp.abs(unit)
    # Decade e begins half-way between the last value of the one before and its own first one.
    first = lambda e: 10.0 ** (e - 6 - more) * (0.1 + 0.45 / 2**e)
    last = lambda e: 10.0 ** (e - 6 - more) * (1.0 - 0.45 / 2**e)
    begins = lambda e: (last(e - 1) + first(e)) / 2
    decades = range(more, 7 + more)
    per_unit, count = _ladder(a, [(begins(e), 10.0 ** (6 + more - e) / 0.9 * 2**e, 2.0**e) for e in decades])
    place = jnp.clip(jnp.floor(a * per_unit - count / 9), 0, count - 1)
    number = (count + place).astype(jnp.int32) - more
    number = jnp.where(a < first(more) / 2, 0, number)
    number = jnp.where(a >= (1.0 + last(6 + more)) / 2, top, number)
    if kind == "dynamic_unsigned":
        return number
    return 127 + jnp.where(unit < 0, -jnp.minimum(number, 127), number)


def _stochastic(unit: Array, codes: Array, kind: str, key: Array) -> Array:
    """One of the two neighbours, the nearer the likelier."""
    value = _decode(codes, kind, unit.dtype)
    other = jnp.clip(codes + jnp.where(unit > value, 1, -1), 0, 255)
    gap = jnp.abs(_decode(other, kind, unit.dtype) - value)
    share = jnp.abs(unit - value) / jnp.where(gap > 0, gap, 1)
    return jnp.where(jax.random.uniform(key, unit.shape, unit.dtype) < share, other, codes)
