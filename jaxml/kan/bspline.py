"""B-splines of orders 0 to 5 on uniform and other grids.

A grid of G cells has G + 1 points a = p_0 < … < p_G = b for each input; its K = G + order basis functions reach `order`
cells beyond both ends, as in pykan. On a uniform grid they are one function, shifted:

    B_j(x) = N(u − j),    u = order + G (x − a) / (b − a),
    N(t) = 1/k! Σ_i (−1)^i C(k+1, i) max(s − i, 0)^k,    s = min(t, k + 1 − t)

for order k: closed, without divisions by differences of knots, and exact to rounding since s ≤ (k + 1) / 2. Other grids
take the recursion of Cox and de Boor.

Reference:
    de Boor 1978, "A Practical Guide to Splines", chapters IX and X.
    Liu et al. 2024, "KAN: Kolmogorov–Arnold Networks", section 2.2.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, wide

OUTSIDE = ("linear", "zero", "clamp", "periodic")
ORDERS = range(6)


def size(grid: int, order: int, outside: str = "linear") -> int:
    """How many basis functions a grid of so many cells has."""
    return grid if outside == "periodic" else grid + order


def values(
    x: Float[Array, "... I"], points: Float[Array, "I G1"], *, order: int, outside: str = "linear", uniform: bool = True
) -> Float[Array, "... K I"]:
    """The K basis functions at x.

    Args:
        points: the ends of the cells, [I, G + 1], increasing; of a uniform grid only the first and the last count.
        outside: beyond the grid, "linear" (value and slope of the end go on), "zero" (as pykan: the functions end
            `order` cells further out), "clamp" (the value of the end) or "periodic" (uniform grids with G > order).

    Example:
        >>> points = jnp.linspace(-1.0, 1.0, 6)[None]
        >>> b = values(jnp.array([[0.3]]), points, order=3)
        >>> b.shape, round(float(b.sum()), 5)
        ((1, 8, 1), 1.0)
    """
    points = points.astype(wide(x.dtype))
    x = x.astype(points.dtype)
    if not uniform:
        if outside == "periodic":
            raise ValueError("bspline: outside is 'periodic' on uniform grids only. Take another here.")
        return _general(x, points, order, outside)
    cells = points.shape[-1] - 1
    place = _place(x, points, order, outside)
    j = np.arange(size(cells, order, outside)).reshape(-1, 1)
    return _one(tuple(a[..., None, :] for a in place), j, cells, order, outside)


def each(
    x: Float[Array, "... I"], points: Float[Array, "I G1"], *, order: int, outside: str = "linear", uniform: bool = True
) -> list[Float[Array, "... I"]]:
    """The same, one array a function: on a uniform grid no array of all of them is made."""
    if not uniform:
        b = values(x, points, order=order, outside=outside, uniform=False)
        return [b[..., j, :] for j in range(b.shape[-2])]
    points = points.astype(wide(x.dtype))
    cells = points.shape[-1] - 1
    place = _place(x.astype(points.dtype), points, order, outside)
    return [_one(place, np.asarray(j), cells, order, outside) for j in range(size(cells, order, outside))]


def cardinal(t: Array, order: int, where=jnp.where) -> Array:
    """N(t): the B-spline on the knots 0, 1, …, order + 1; with `numpy.where` of arrays of numpy."""
    if order == 0:
        return where((t >= 0) & (t < 1), 0 * t + 1, 0)
    # Selections rather than minima and maxima, whose derivatives are halved where both sides are equal. Where pieces
    # meet, the derivative that jumps is that of the right one, for orders whose first or second it is; beyond, a
    # comparison more would keep XLA from fusing the basis into a product on TPUs.
    rising = t < (order + 1) / 2
    s = where(rising, t, order + 1 - t)
    total = 0.0
    for i in range((order + 2) // 2):
        is_past = (s > i) | (rising & (s >= i)) if order < 3 else s > i
        total = total + (-1) ** i * math.comb(order + 1, i) * _power(where(is_past, s - i, 0), order)
    return total / math.factorial(order)


def _power(x: Array, n: int) -> Array:
    out = x
    for _ in range(n - 1):
        out = out * x
    return out


# ---- uniform grids ----------------------------------------------------------------------------------


def _place(x: Array, points: Array, order: int, outside: str) -> tuple[Array, Array, Array]:
    shape = (1,) * (x.ndim - 1) + points.shape[:1]
    low, high = points[:, 0].reshape(shape), points[:, -1].reshape(shape)
    return place(x, low, high, points.shape[-1] - 1, order, outside)


def place(x: Array, low: Array, high: Array, cells: int, order: int, outside: str) -> tuple[Array, Array, Array]:
    """(u within the grid from low to high, how far before and after it x lies in cells)."""
    u = order + (x - low) * (cells / (high - low))
    zero = jnp.zeros_like(u)
    if outside == "periodic":
        if cells <= order:
            raise ValueError(f"bspline: a periodic grid has more cells than its order {order}, got {cells}.")
        turned = jnp.mod(u - order, cells)
        return order + jnp.where(turned < cells, turned, 0), zero, zero  # rounded up to a whole turn
    if outside == "zero":
        return u, zero, zero
    end = order + cells
    before, after = x < low, x > high  # not of u, which is rounded: of x = high it may lie beyond the end
    step = 2 * np.spacing(np.asarray(end, u.dtype)) if order < 3 else 0  # of smoother pieces the next cell's will do
    inside = _from_within(u, before, after, order, end, float(step))
    if outside == "clamp":
        return inside, zero, zero
    return inside, jnp.where(before, u - order, 0), jnp.where(after, u - end, 0)


def _one(place: tuple[Array, Array, Array], j: np.ndarray, cells: int, order: int, outside: str) -> Array:
    """Basis function j, or all of them where j is a column."""
    as_column = lambda a: jnp.asarray(a, place[0].dtype).reshape((1,) * (place[0].ndim - 2) + a.shape)
    number = as_column if j.ndim else lambda a: float(a)
    wraps = outside == "periodic" and bool((j < order).any())
    ends = [number(s) if s.any() else None for s in slopes(j, cells, order, outside)]
    return one(place, number(j), ends, order, cells if wraps else None)


def one(
    place: tuple[Array, Array, Array],
    j: Array | float,
    ends: Sequence[Array | float | None],
    order: int,
    wrap: int | None,
) -> Array:
    """Basis function j at a place.

    Args:
        ends: its slopes at the grid's ends (`slopes`), by which it goes on beyond them; None for 0.
        wrap: cells of a periodic grid, whose first functions come again at its end.
    """
    u, *beyond = place
    out = cardinal(u - j, order)
    if wrap is not None:
        out = out + cardinal(u - (j + wrap), order)
    for distance, slope in zip(beyond, ends):
        if slope is not None:
            out = out + distance * slope
    return out


def slopes(j: np.ndarray, cells: int, order: int, outside: str) -> tuple[np.ndarray, np.ndarray]:
    """The slopes of functions j at the grid's first and last point, a cell being 1; 0 where nothing goes on beyond."""
    if outside != "linear" or order == 0:
        return np.zeros(j.shape), np.zeros(j.shape)
    end = cells + order if order > 1 else cells + order - 1e-9  # a slope that jumps is taken from within
    at = lambda u: _np_cardinal(u - j, order - 1) - _np_cardinal(u - j - 1, order - 1)
    return at(order), at(end)


def function(spec, j: Array, at_ends: tuple[Array, Array], low: Array, high: Array) -> Callable[[Array], Array]:
    """Basis function j of a `layer.Spec`, for kernels that know j and its `ends` when they run."""
    wrap = spec.grid if spec.outside == "periodic" else None
    return lambda x: one(place(x, low, high, spec.grid, spec.order, spec.outside), j, at_ends, spec.order, wrap)


def ends(spec) -> np.ndarray:
    """[2, K]: the slopes of all functions at the grid's ends."""
    return np.stack(slopes(np.arange(spec.size), spec.grid, spec.order, spec.outside))


def derivative(function: Callable[[Array], Array], n: int) -> Callable[[Array], Array]:
    """The n-th derivative of a function that acts on each number by itself."""
    if n == 0:
        return function
    lower = derivative(function, n - 1)
    return lambda x: jax.jvp(lower, (x,), (jnp.ones_like(x),))[1]


def _from_within(x: Array, before: Array, after: Array, low, high, step) -> Array:
    """x held within a grid, its slope 1 at both ends, and at the upper one a step back: in the last cell."""
    held = jnp.where(before, low, jnp.where(after, high, x))
    return jnp.where(held < high, held, held - step)


def _np_cardinal(t, order: int) -> np.ndarray:
    """In float64, for numbers that are known when a program is built."""
    return cardinal(np.asarray(t, np.float64), order, np.where)


def matrix(t: np.ndarray, grid: int, order: int, outside: str = "linear") -> np.ndarray:
    """Basis functions [len(t), K] of a uniform grid over [0, 1] at points t within it, float64."""
    u = order + np.asarray(t, np.float64) * grid
    if order == 0:
        u = np.minimum(u, np.nextafter(order + grid, 0))
    columns = [_np_cardinal(u - j, order) for j in range(grid + order)]
    if outside == "periodic":
        columns = [columns[j] + (columns[j + grid] if j < order else 0) for j in range(grid)]
    return np.stack(columns, axis=1)


# ---- any grid ---------------------------------------------------------------------------------------


def knots(points: Float[Array, "I G1"], order: int) -> Float[Array, "I KNOTS"]:
    """The points with `order` more on both sides, a mean cell apart."""
    step = (points[:, -1:] - points[:, :1]) / (points.shape[-1] - 1)
    more = jnp.arange(1, order + 1, dtype=points.dtype)[None]
    return jnp.concatenate([points[:, :1] - step * more[:, ::-1], points, points[:, -1:] + step * more], axis=1)


def _general(x: Array, points: Array, order: int, outside: str) -> Array:
    """Cox and de Boor's recursion, over all knots at once."""
    t = knots(points, order).T  # [KNOTS, I]
    t = t.reshape((1,) * (x.ndim - 1) + t.shape)
    at = x
    if outside != "zero":
        low, high = t[..., order, :], t[..., -1 - order, :]
        at = _from_within(x, x < low, x > high, low, high, high - jnp.nextafter(high, low))
    beyond, at = (x - at)[..., None, :], at[..., None, :]
    b = jnp.where((at >= t[..., :-1, :]) & (at < t[..., 1:, :]), 1.0, 0.0).astype(x.dtype)
    narrower = b
    for k in range(1, order + 1):
        narrower = b
        left, right = t[..., : -k - 1, :], t[..., k + 1 :, :]
        rising = _ratio(at - left, t[..., k:-1, :] - left)
        falling = _ratio(right - at, right - t[..., 1:-k, :])
        b = rising * b[..., :-1, :] + falling * b[..., 1:, :]
    if outside != "linear" or order == 0:
        return b
    slope = _ratio(narrower, t[..., order:, :] - t[..., :-order, :]) * order
    return b + (slope[..., :-1, :] - slope[..., 1:, :]) * beyond


def _ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 where knots coincide."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
