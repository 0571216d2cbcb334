"""What the kernels of `kernel.py` compute of one tile, on GPUs and TPUs alike."""

import jax.numpy as jnp

from jaxml.axes import Array
from jaxml.kan import bspline


def values(spec, n: int, k, at_ends, low: Array, high: Array, x: Array, weight: Array | None = None) -> Array:
    """The n-th derivative of function k at a tile of inputs, times their weights, in float32.

    Args:
        at_ends: its slopes at the grid's ends (`bspline.ends`).
        low, high: the grids' first and last points, against which x broadcasts.
    """
    b = bspline.derivative(bspline.function(spec, k, at_ends, low, high), n)(x.astype(jnp.float32))
    return b if weight is None else b * weight.astype(jnp.float32)


def grid(points: Array, step: int) -> list[Array]:
    """Its first and last points as rows [1, I]; those of inputs that are not there are 0 and 1."""
    row = lambda a, fill: jnp.pad(a.astype(jnp.float32), (0, -len(a) % step), constant_values=fill)[None]
    return [row(points[:, 0], 0.0), row(points[:, -1], 1.0)]
