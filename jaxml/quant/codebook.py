"""The values that codes stand for, and the nearest code of a value."""

import functools

import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, Int
from jaxml.target import platform

# 4-bit codes, in the order of the codes. NF4: quantiles of a normal distribution (Dettmers et al. 2023, appendix E).
# FP4: one bit of sign, two of exponent, one of fraction. int4: −7 … 7 over 7 (code 0, −8/7, is never made).
TABLES: dict[str, np.ndarray] = {
    "nf4": np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        np.float32,
    ),
    "fp4": np.array([sign * m / 12 for sign in (1, -1) for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)], np.float32),
    "int4": np.array([(code - 8) / 7 for code in range(16)], np.float32),
}  # fmt: skip


@functools.cache
def dynamic() -> np.ndarray:
    """The 256 values, ascending, of bitsandbytes' signed dynamic map.

    Seven decades up to 1 with 1, 2, 4, …, 64 values of either sign, in the middles of equal parts of [0.1, 1], and 0
    and 1.

    Reference:
        Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.1.
    """
    values = [np.float32(0), np.float32(1)]
    for decade in range(7):
        parts = 2**decade
        middles = (_spaced(parts)[:-1] + _spaced(parts)[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (decade - 6)) * middles
        values += [*magnitudes, *-magnitudes]
    return np.sort(np.array(values, np.float32))


def _spaced(parts: int) -> np.ndarray:
    """0.1 … 1 in equal parts, each end's half reckoned from that end, in float32 with one rounding a value."""
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(parts))
    count = np.arange(parts + 1)
    low = np.float64(np.float32(0.1)) + step * count
    high = np.float64(1) - step * (parts - count)
    return np.where(count < (parts + 1) // 2, low, high).astype(np.float32)


def lookup(table: np.ndarray, codes: Int[Array, "..."]) -> Float[Array, "..."]:
    """``table[codes]``, float32.

    On a TPU, where gathering is slow, by a tree of selections over the bits of the codes.

    Example:
        >>> lookup(TABLES["nf4"], jnp.array([0, 7, 15])).tolist()
        [-1.0, 0.0, 1.0]
    """
    if platform() not in ("tpu", "interpret"):
        return jnp.take(jnp.asarray(table), codes, axis=0, mode="clip")
    values = [jnp.float32(v) for v in table]
    codes, bit = codes.astype(jnp.int32), 1
    while len(values) > 1:
        odd = (codes & bit) != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2])]
        bit *= 2
    return values[0]


def nearest(table: np.ndarray, x: Float[Array, "..."]) -> Int[Array, "..."]:
    """The code, uint8, whose value is nearest; of two as near the lower value's.

    Example:
        >>> nearest(TABLES["int4"], jnp.array([-1.0, 0.1, 0.6])).tolist()   # of −7/7, 1/7 and 4/7
        [1, 9, 12]
    """
    order = np.argsort(table, kind="stable")
    middles = (table[order[:-1]] + table[order[1:]]) / np.float32(2)
    if len(table) > 16:
        place = jnp.searchsorted(jnp.asarray(middles), x, side="left").astype(jnp.uint8)
    else:
        place = sum((x > m).astype(jnp.uint8) for m in middles)
    if np.array_equal(order, np.arange(len(table))):
        return place
    return jnp.take(jnp.asarray(order, jnp.uint8), place, mode="clip")
