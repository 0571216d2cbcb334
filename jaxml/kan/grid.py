"""Grids that follow the data, and finer grids for the same functions.

`update` puts every input's grid where its samples lie; `refine` splits cells. Both keep splines: by least squares
through the samples and points between them (of full rank whatever the samples are), or, where the new knots contain the
old ones, exactly.

Reference:
    Liu et al. 2024, "KAN: Kolmogorov–Arnold Networks", section 2.4 (grid extension).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, floating
from jaxml.kan import bases, bspline
from jaxml.kan import layer as layers
from jaxml.kan.layer import Layer
from jaxml.kan.network import KAN, nodes
from jaxml.optim.moments import SQUARED


def update(
    params: KAN,
    x: Float[Array, "... I"],
    *,
    eps: float = 1.0,
    margin: float = 0.01,
    bend: float = 0.0,
    cells: int | None = None,
) -> KAN:
    """The same splines on grids that reach from the least to the greatest sample, layer by layer.

    Functions of a basis without a grid take another scale of their input and change with it.

    Args:
        x: samples of the network's inputs; those that are not finite do not count.
        eps: 1 makes cells of equal width, 0 cells of equally many samples, numbers between mix (pykan's `grid_eps`;
            cells of equal width are evaluated several times faster).
        margin: beyond both ends, as a share of the range.
        bend: share of the cells that gather where the splines bend (density ∝ √ of the mean |second derivative| over
            the outputs); with more than 0 cells are no longer equal.
        cells: of equal width, that reach over the samples; the other ones of the grid lie beyond the upper end. So a
            grid grows finer without another shape, and a compiled step stays as it is.

    Raises:
        ValueError: eps or bend out of [0, 1], a negative margin; no samples; other than equal cells on a periodic grid;
            more cells than the grid has.

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [1, 1])
        >>> params = update(params, jnp.linspace(0.0, 4.0, 50)[:, None], margin=0.0)
        >>> params.layers[0].points[0].tolist()[::5]
        [0.0, 4.0]
    """
    if not (0 <= eps <= 1 and 0 <= bend <= 1):
        raise ValueError(f"kan.update: eps and bend are in [0, 1], got {eps} and {bend}.")
    x = floating(x, params.layers[0].coef.dtype)
    if not margin >= 0 or not x.size:
        raise ValueError(f"kan.update: margin is at least 0 and there are samples, got {margin} and x {x.shape}.")
    least = min(layer.spec.grid for layer in params.layers)
    if cells is not None and not (1 <= cells <= least and eps == 1 and bend == 0):
        raise ValueError(f"kan.update: cells are 1 … {least}, all equally wide, got {cells}, eps {eps}, bend {bend}.")
    out = []
    for layer, affine, arities in zip(params.layers, params.affine, params.arities):
        y = nodes(layers.apply(layer, x), affine, arities)
        out.append(_updated(layer, x.reshape(-1, x.shape[-1]), eps, margin, bend, cells or layer.spec.grid))
        x = y
    return dataclasses.replace(params, layers=tuple(out))


def is_even(params: KAN) -> bool:
    """Whether all cells of an input are equally wide, in every layer."""
    return all(layer.spec.uniform for layer in params.layers)


def _updated(layer: Layer, x: Float[Array, "N I"], eps: float, margin: float, bend: float, cells: int) -> Layer:
    spec = layer.spec
    if spec.outside == "periodic" and (eps < 1 or bend or cells < spec.grid):
        raise ValueError(
            f"kan.update: a periodic grid has cells of equal width all over, got eps={eps}, bend={bend}, cells={cells}."
        )
    x = x.astype(layer.points.dtype)
    points = _around(x, spec.grid, eps, margin)
    if bend:
        points = _gathered(layer, points, bend)
    if cells < spec.grid:
        end = points[:, :1] + (points[:, -1:] - points[:, :1]) * (spec.grid / cells)
        points = points[:, :1] + (end - points[:, :1]) * jnp.linspace(0.0, 1.0, spec.grid + 1, dtype=x.dtype)[None]
    spec = dataclasses.replace(spec, uniform=eps == 1 and not bend)
    if not bases.BASES[spec.basis].has_grid:
        return dataclasses.replace(layer, points=points)  # another scale of the input; the function changes with it
    finite = jnp.where(jnp.isfinite(x), x, points[:, 0][None])
    return _refit(layer, points, spec, finite)


def _around(x: Float[Array, "N I"], grid: int, eps: float, margin: float) -> Float[Array, "I G1"]:
    """The ends of cells around samples; never two in one place."""
    finite = jnp.isfinite(x)
    low = jnp.min(jnp.where(finite, x, jnp.inf), axis=0)
    high = jnp.max(jnp.where(finite, x, -jnp.inf), axis=0)
    is_empty = ~jnp.any(finite, axis=0)
    low, high = jnp.where(is_empty, -1.0, low), jnp.where(is_empty, 1.0, high)
    least = 1e-3 * jnp.maximum(jnp.maximum(jnp.abs(low), jnp.abs(high)), 1e-3)  # a constant column still has a range
    more = margin * (high - low) + jnp.maximum(0.5 * (least - (high - low)), 0)
    low, high = (low - more)[:, None], (high + more)[:, None]
    share = jnp.linspace(0.0, 1.0, grid + 1, dtype=x.dtype)[None]
    even = low * (1 - share) + high * share  # both ends as they are
    if eps == 1:
        return even
    by_number = jnp.nanquantile(jnp.where(finite, x, jnp.nan), share[0], axis=0).T
    by_number = jnp.where(is_empty[:, None], even, by_number.at[:, 0].set(low[:, 0]).at[:, -1].set(high[:, 0]))
    floor = max(eps, 0.01)  # of every cell, as a share of an even one
    return by_number + floor * (even - by_number)


def _gathered(layer: Layer, points: Float[Array, "I G1"], bend: float) -> Float[Array, "I G1"]:
    """Points moved so that the old cells and the root of the curvature count for 1 − bend and bend of their density."""
    cells = points.shape[1] - 1
    share = jnp.linspace(0.0, 1.0, 16 * cells + 1, dtype=points.dtype)
    old = jax.vmap(lambda p: jnp.interp(share * cells, jnp.arange(cells + 1, dtype=p.dtype), p), out_axes=1)(points)
    along = lambda f: lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]
    curvature = along(along(lambda x: layers.edges(layer, x)))(old)
    root = jnp.sqrt(jnp.mean(jnp.abs(curvature), axis=2))  # [S, I]
    middle = 0.5 * (root[1:] + root[:-1]) * jnp.diff(old, axis=0)
    grown = jnp.concatenate([jnp.zeros_like(middle[:1]), jnp.cumsum(middle, axis=0)])
    total = grown[-1:]
    by_bend = jnp.where(total > 0, grown / jnp.where(total > 0, total, 1), share[:, None])
    reached = (1 - bend) * share[:, None] + bend * by_bend
    even = jnp.linspace(0.0, 1.0, cells + 1, dtype=points.dtype)
    reached = 0.95 * reached + 0.05 * share[:, None]  # no cell is wider than twenty even ones
    return jax.vmap(lambda r, x: jnp.interp(even, r, x), in_axes=1)(reached, old)


@functools.partial(jax.jit, static_argnames="spec")
def _refit(layer: Layer, points: Float[Array, "I G1"], spec, x: Float[Array, "N I"]) -> Layer:
    """The layer on other points, fitted at samples and, with a tenth of their weight, in every cell."""
    count = 4 * spec.size
    share = jnp.linspace(0.0, 1.0, count, dtype=x.dtype)[:, None]
    between = points[:, 0][None] + share * (points[:, -1] - points[:, 0])[None]
    at = jnp.concatenate([x, between])
    weight = jnp.concatenate([jnp.ones(len(x), x.dtype), jnp.full(count, 0.1 * max(1, len(x)) ** 0.5, x.dtype)])
    values = bases.BASES[spec.basis].values
    stack = lambda points, spec: jnp.transpose(values(at, points, spec), (2, 1, 0))  # [I, K, N]
    old, new = stack(layer.points, layer.spec), stack(points, spec)
    target = jnp.einsum("ikn,kio->ino", old, layer.coef.astype(old.dtype))

    def solve(one):
        b, y = one
        return jnp.linalg.lstsq(b.T * weight[:, None], y * weight[:, None])[0]

    coef = jnp.moveaxis(jax.lax.map(solve, (new, target)), 0, 1)  # one by one: see `optim.refresh` on batches
    return dataclasses.replace(layer, coef=coef.astype(layer.coef.dtype), points=points, spec=spec)


# ---- finer grids ------------------------------------------------------------------------------------


def refine(params: KAN, grid: int, opt_state: Any = None) -> KAN | tuple[KAN, Any]:
    """The same functions on grids of another number of cells; exactly so where it is a multiple of the present one.

    Args:
        grid: cells of every spline layer from now on.
        opt_state: of an Optax optimizer of the trained tree (`split`); means of gradients are carried over as gradients
            are (by the transposed pseudo-inverse), means of squares by its squares. Returned as well where given.

    Raises:
        ValueError: fewer than one cell; a periodic grid with too few.

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 3, 1])
        >>> finer = refine(params, 10)
        >>> x = jax.random.uniform(jax.random.key(1), (5, 2))
        >>> bool(jnp.allclose(kan.apply(params, x), kan.apply(finer, x), atol=1e-5)), finer.layers[0].coef.shape
        (True, (13, 2, 3))
    """
    turned = [_refined(layer, grid) for layer in params.layers]
    out = dataclasses.replace(params, layers=tuple(layer for layer, _ in turned))
    if opt_state is None:
        return out
    maps = [None if m is None else jnp.linalg.pinv(m).mT for _, m in turned]

    def carry(path, node):
        if not isinstance(node, KAN):
            return node
        is_squared = any(getattr(key, "name", None) in SQUARED for key in path)
        move = lambda layer, m: layer if m is None else dataclasses.replace(
            layer, coef=_map(m * m if is_squared else m, layer.coef), spec=dataclasses.replace(layer.spec, grid=grid)
        )  # fmt: skip
        return dataclasses.replace(node, layers=tuple(map(move, node.layers, maps)))

    return out, jax.tree.map_with_path(carry, opt_state, is_leaf=lambda node: isinstance(node, KAN))


def _refined(layer: Layer, grid: int) -> tuple[Layer, Array | None]:
    """(the layer, the matrix [K', K] or [I, K', K] that made its coefficients)."""
    spec = dataclasses.replace(layer.spec, grid=grid)
    if not bases.BASES[spec.basis].has_grid:
        return layer, None
    places = jnp.linspace(0.0, layer.spec.grid, grid + 1, dtype=layer.points.dtype)
    points = jax.vmap(lambda p: jnp.interp(places, jnp.arange(len(p), dtype=p.dtype), p))(layer.points)
    if spec.uniform:
        share = np.linspace(0.0, 1.0, 8 * (max(grid, layer.spec.grid) + spec.order) + 1)
        of = lambda g: bspline.matrix(share, g, spec.order, spec.outside)
        move = jnp.asarray(np.linalg.lstsq(of(grid), of(layer.spec.grid), rcond=None)[0])
    else:
        cells = max(grid, layer.spec.grid)
        share = jnp.linspace(0.0, 1.0, 8 * (cells + spec.order) + 1, dtype=points.dtype)
        at = jax.vmap(lambda p: jnp.interp(share * cells, jnp.linspace(0, cells, len(p)), p), out_axes=1)(points)
        stack = lambda points, spec: jnp.transpose(bases.BASES[spec.basis].values(at, points, spec), (2, 1, 0))
        move = _solved(stack(points, spec), stack(layer.points, layer.spec))
    return dataclasses.replace(layer, coef=_map(move, layer.coef), points=points, spec=spec), move


@jax.jit
def _solved(new: Float[Array, "I K1 N"], old: Float[Array, "I K N"]) -> Float[Array, "I K1 K"]:
    return jax.lax.map(lambda pair: jnp.linalg.lstsq(pair[0].T, pair[1].T)[0], (new, old))


@jax.jit
def _map(matrix: Array, coef: Float[Array, "K I O"]) -> Float[Array, "K1 I O"]:
    matrix = matrix.astype(coef.dtype)
    if matrix.ndim == 2:
        return jnp.einsum("lk,kio->lio", matrix, coef, precision="highest")
    return jnp.einsum("ilk,kio->lio", matrix, coef, precision="highest")
