"""The functions that an edge is a sum of, behind one small protocol.

Every basis says how many functions it has (K) and gives them at x, as one array or one array each; `layer.py` does the
rest. A basis with a grid of its own shape (splines) takes the grid's points; the others take x mapped from the grid's
first and last point to [−1, 1].

Reference:
    Liu et al. 2024, "KAN" (bspline); Sidharth et al. 2024, "Chebyshev Polynomial-Based KANs"; Xu et al. 2024,
    "FourierKAN-GCF"; Li 2024, "Kolmogorov–Arnold Networks are Radial Basis Function Networks" (rbf); Bozorgasl and Chen
    2024, "Wav-KAN" (wavelet: here the same scales and shifts for all edges); Qiu et al. 2024, "ReLU-KAN".
"""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, wide
from jaxml.kan import bspline


class Basis(NamedTuple):
    """K functions of each input."""

    size: Callable[[Any], int]  # K of a spec
    each: Callable[[Array, Array, Any], list[Array]]  # (x [..., I], points [I, G + 1], spec) → K arrays [..., I]
    all: Callable[[Array, Array, Any], Array] | None = None  # the same → [..., K, I]; stacked of those where None
    has_grid: bool = False  # whether cells can be split

    def values(self, x: Float[Array, "... I"], points: Float[Array, "I G1"], spec) -> Float[Array, "... K I"]:
        """The functions at x."""
        return jnp.stack(self.each(x, points, spec), axis=-2) if self.all is None else self.all(x, points, spec)


def check(spec) -> None:
    """Raises where no basis is as the spec says."""
    if spec.basis not in BASES:
        raise ValueError(f"kan: basis is one of {', '.join(BASES)}, got {spec.basis!r}.")
    if not isinstance(spec.grid, Integral) or spec.grid < 1:
        raise ValueError(f"kan: grid is a number of cells, at least 1, got {spec.grid!r}.")
    if not isinstance(spec.order, Integral) or spec.order not in bspline.ORDERS:
        raise ValueError(f"kan: order is in 0 … {max(bspline.ORDERS)}, got {spec.order!r}.")
    if spec.outside not in bspline.OUTSIDE:
        raise ValueError(f"kan: outside is one of {', '.join(bspline.OUTSIDE)}, got {spec.outside!r}.")
    if spec.outside == "periodic" and spec.basis == "bspline" and spec.grid <= spec.order:
        raise ValueError(f"kan: a periodic grid has more cells than the order {spec.order}, got {spec.grid}.")


def _splines(function):
    return lambda x, points, spec: function(x, points, order=spec.order, outside=spec.outside, uniform=spec.uniform)


def _unit(x: Float[Array, "... I"], points: Float[Array, "I G1"]) -> Array:
    """x with the grid's ends at ±1."""
    points = points.astype(wide(x.dtype))
    shape = (1,) * (x.ndim - 1) + (points.shape[0],)
    low, high = points[:, 0].reshape(shape), points[:, -1].reshape(shape)
    return (2 * x.astype(points.dtype) - (low + high)) / (high - low)


def _chebyshev(x, points, spec):
    """T_0 … T_G of tanh of the input."""
    z = jnp.tanh(_unit(x, points))
    out = [jnp.ones_like(z), z]
    for _ in range(spec.grid - 1):
        out.append(2 * z * out[-1] - out[-2])
    return out


def _legendre(x, points, spec):
    z = jnp.tanh(_unit(x, points))
    out = [jnp.ones_like(z), z]
    for n in range(1, spec.grid):
        out.append(((2 * n + 1) * z * out[-1] - n * out[-2]) / (n + 1))
    return out


def _fourier(x, points, spec):
    """cos and sin of kπz, k = 1 … G: one period over the grid."""
    z = math.pi * _unit(x, points)
    return [f(k * z) for k in range(1, spec.grid + 1) for f in (jnp.cos, jnp.sin)]


def _sine(x, points, spec):
    """sin(kπ(z + 1) / 2 + φ_k), k = 1 … G, phases evenly spread over a turn."""
    z = 0.5 * math.pi * (_unit(x, points) + 1)
    return [jnp.sin(k * z + 2 * math.pi * (k - 1) / spec.grid) for k in range(1, spec.grid + 1)]


def _centres(spec) -> np.ndarray:
    return np.linspace(-1.0, 1.0, spec.grid + 1)


def _rbf(x, points, spec):
    """exp(−((z − c) / h)²) with G + 1 centres a width h apart."""
    z, h = _unit(x, points), 2.0 / spec.grid
    return [jnp.exp(-(((z - c) / h) ** 2)) for c in _centres(spec)]


def _wavelet(x, points, spec):
    """The Mexican hat (1 − s²) exp(−s²/2), s = (z − c) / h, at G + 1 places, and a coarse one."""
    z, h = _unit(x, points), 2.0 / spec.grid
    hat = lambda s: (1 - s * s) * jnp.exp(-0.5 * s * s)
    return [hat(z), *(hat((z - c) / h) for c in _centres(spec))]


def _relu(x, points, spec):
    """(relu(e − z) relu(z − s))² 16 / (e − s)⁴ over `order` + 1 cells each."""
    z, h = _unit(x, points), 2.0 / spec.grid
    out, reach = [], (spec.order + 1) * h
    for j in range(spec.grid + spec.order):
        s = -1.0 + (j - spec.order) * h
        inside = jnp.where((z > s) & (z < s + reach), (s + reach - z) * (z - s), 0)
        out.append(inside * inside * (16 / reach**4))
    return out


BASES: dict[str, Basis] = {
    "bspline": Basis(
        lambda s: bspline.size(s.grid, s.order, s.outside), _splines(bspline.each), _splines(bspline.values), True
    ),
    "chebyshev": Basis(lambda s: s.grid + 1, _chebyshev),
    "legendre": Basis(lambda s: s.grid + 1, _legendre),
    "fourier": Basis(lambda s: 2 * s.grid, _fourier),
    "sine": Basis(lambda s: s.grid, _sine),
    "rbf": Basis(lambda s: s.grid + 1, _rbf),
    "wavelet": Basis(lambda s: s.grid + 2, _wavelet),
    "relu": Basis(lambda s: s.grid + s.order, _relu),
}


def through(spec) -> Float[Array, "K G1"]:
    """The matrix that takes values at the ends of the cells to coefficients of least norm that go through them."""
    with jax.ensure_compile_time_eval():
        points = jnp.linspace(-1.0, 1.0, spec.grid + 1)[None]
        values = BASES[spec.basis].values(points.T, points, spec)
        return jnp.asarray(np.linalg.pinv(np.asarray(values)[..., 0], rcond=1e-6))
