"""Formulas: functions with names in the place of splines, and the network written down.

An edge is fitted by c f(a x + b) + d for each f of a library: a and b are searched on a grid and polished by
Gauss–Newton steps, c and d follow from each pair by regression (variable projection).

Reference:
    Liu et al. 2024, "KAN: Kolmogorov–Arnold Networks", section 2.5.1 (symbolification). The library, complexities and
    the score are pykan's; its search is a grid alone.
    Golub and Pereyra 1973, "The Differentiation of Pseudo-Inverses and Nonlinear Least Squares Problems".
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, floating, wide
from jaxml.kan import layer as layers
from jaxml.kan.layer import Layer
from jaxml.kan.library import Function, Library, Numbers, find, library
from jaxml.kan.network import KAN, nodes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edge:
    """c f(a x + b) + d of input `into` as a part of sum `out`; the numbers are trained."""

    numbers: Float[Array, "4"]  # a, b, c, d
    into: int = dataclasses.field(metadata=dict(static=True))
    out: int = dataclasses.field(metadata=dict(static=True))
    function: Function = dataclasses.field(metadata=dict(static=True))

    def __call__(self, x: Array) -> Array:
        a, b, c, d = (self.numbers[n].astype(x.dtype) for n in range(4))
        return c * self.function.call(a * x + b) + d


class Suggestion(NamedTuple):
    """How well a function stands for an edge."""

    name: str
    r2: float
    complexity: int
    score: float  # the less the better
    numbers: Numbers


# ---- what stands for an edge ------------------------------------------------------------------------

POINTS = 512  # of an edge's input that a function is fitted at


def suggest(
    params: KAN,
    x: Float[Array, "... I"],
    layer: int,
    into: int,
    out: int,
    *,
    functions: Library = None,
    top: int = 5,
    weight_simple: float | None = 0.8,
) -> list[Suggestion]:
    """The functions that stand best for an edge, the best first.

    The score is weight_simple · complexity + (1 − weight_simple) · log2(1 + 1e-5 − r²). Without a weight_simple it is
    the complexity of those whose 1 − r² is at most twice the least one, and more than that of all others.

    Args:
        x: samples of the network's inputs; the fit is at the values that the edge's input takes.
        layer, into, out: the edge's layer, its input and its sum, from 0.
        functions: to try, as `library` takes them.

    Raises:
        ValueError: an edge that does not exist.

    Example:
        >>> from jaxml import kan
        >>> x = jnp.linspace(-1.0, 1.0, 200)[:, None]
        >>> params, _ = kan.fit(kan.init(jax.random.key(0), [1, 1]), x, jnp.sin(3 * x), grids=[20])
        >>> suggest(params, x, 0, 0, 0)[0].name
        'sin'
    """
    _edge(params, layer, into, out)
    at, values = samples(params, x)[layer]
    return _ranked(at[:, into], values[:, into, out], library(functions), weight_simple)[:top]


def _edge(params: KAN, layer: int, into: int, out: int) -> None:
    if not 0 <= layer < len(params.layers):
        raise ValueError(f"kan: layer is in 0 … {len(params.layers) - 1}, got {layer}.")
    width = params.layers[layer].width
    if not (0 <= into < width[0] and 0 <= out < width[1]):
        raise ValueError(f"kan: layer {layer} has edges from inputs 0 … {width[0] - 1} to sums 0 … {width[1] - 1}, "
                         f"got ({into}, {out}).")  # fmt: skip


def samples(params: KAN, x: Float[Array, "... I"]) -> list[tuple[Array, Array]]:
    """Of each layer (values of its inputs [POINTS, I], evenly among the sorted samples; its edges there)."""
    x, out = floating(x, params.layers[0].coef.dtype), []
    x = x.reshape(-1, x.shape[-1])
    if not len(x) or not bool(jnp.all(jnp.isfinite(x))):
        bad = int(jnp.sum(~jnp.isfinite(x)))
        raise ValueError(f"kan: samples are rows of finite values, got {len(x)} rows, {bad} values not finite.")
    for layer, affine, arities in zip(params.layers, params.affine, params.arities):
        rows = jnp.sort(x, axis=0)
        at = rows[np.linspace(0, len(rows) - 1, POINTS).round().astype(int)]
        out.append((at, layers.edges(layer, at)))
        x = nodes(layers.apply(layer, x), affine, arities)
    return out


def _ranked(x: Array, y: Array, functions: dict[str, Function], weight_simple: float | None) -> list[Suggestion]:
    numbers, errors = jax.device_get(_fitted(x, y, tuple(functions.values())))
    out = []
    for f, four, error in zip(functions.values(), numbers, errors):
        if not np.isfinite(error):
            continue
        if weight_simple is None:
            is_good = error <= 2 * np.min(errors) + 1e-9
            score = float(f.complexity if is_good else 10 + error)
        else:
            score = weight_simple * f.complexity + (1 - weight_simple) * math.log2(1e-5 + max(float(error), 0.0))
        four = f.simpler(tuple(float(n) for n in four))
        out.append(Suggestion(f.name, max(1 - float(error), 0.0), f.complexity, score, four))
    return sorted(out, key=lambda s: round(s.score, 2))  # equal ones stay in the library's order


SCALES = np.geomspace(0.04, 25.0, 25)  # of the input's half range
SHIFTS = np.linspace(-10.0, 10.0, 41)
COARSE, STARTS, POLISHES = 64, 4, 30  # points of the grid search, its results polished, steps of polishing


@functools.partial(jax.jit, static_argnums=2)
def _fitted(x: Float[Array, "M"], y: Float[Array, "M"], functions: tuple[Function, ...]):
    """(numbers [F, 4], 1 − r² [F], infinite where a function is not defined on the input's range)."""
    dtype = wide(x.dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    middle, half = (x[0] + x[-1]) / 2, jnp.maximum((x[-1] - x[0]) / 2, jnp.finfo(dtype).tiny ** 0.5)
    z = (x - middle) / half
    mean = jnp.mean(y)
    deviation = jnp.std(y)
    t = (y - mean) / jnp.where(deviation > 0, deviation, 1)
    few = np.linspace(0, len(x) - 1, COARSE).round().astype(int)
    scales = jnp.asarray(np.concatenate([-SCALES[::-1], SCALES]), dtype)
    shifts = jnp.asarray(SHIFTS, dtype)

    def on_grid(f: Function):
        u = scales[:, None, None] * z[few][None, None] + shifts[None, :, None]
        _, _, error = _regression(f.call(u), t[few])
        best = jnp.argsort(jnp.where(_is_least_around(error), error, jnp.inf).ravel())[:STARTS]
        return scales[best // len(shifts)], shifts[best % len(shifts)]

    starts = [on_grid(f) for f in functions]
    a, b = (jnp.stack(part) for part in zip(*starts))  # [F, STARTS]

    def evaluate(a, b):
        """(f, f') at a z + b, [F, STARTS, M]."""
        u = a[..., None] * z[None, None] + b[..., None]
        pairs = [jax.jvp(f.call, (u[n],), (jnp.ones_like(u[n]),)) for n, f in enumerate(functions)]
        return tuple(jnp.stack(part) for part in zip(*pairs))

    def step(carry, _):
        a, b, error, damping = carry
        f, slope = evaluate(a, b)
        c, _, _ = _regression(f, t)
        residual = _outside(t[None, None] - c[..., None] * f, f)
        ja, jb = (_outside(c[..., None] * slope * w, f) for w in (z[None, None], jnp.ones_like(z)[None, None]))
        dot = lambda p, q: jnp.sum(p * q, axis=-1)
        aa, ab, bb = dot(ja, ja), dot(ja, jb), dot(jb, jb)
        ridge = 1e-6 * (aa + bb)  # of exp, log and powers one of a and b does what c or d does
        aa, bb = aa * (1 + damping) + ridge, bb * (1 + damping) + ridge
        ga, gb = dot(ja, residual), dot(jb, residual)
        det = aa * bb - ab * ab
        det = jnp.where(det > 0, det, jnp.inf)
        new_a, new_b = a + (bb * ga - ab * gb) / det, b + (aa * gb - ab * ga) / det
        new = _regression(evaluate(new_a, new_b)[0], t)[2]
        is_better = new < error
        choose = lambda new, old: jnp.where(is_better, new, old)
        return (
            choose(new_a, a),
            choose(new_b, b),
            choose(new, error),
            jnp.where(is_better, damping / 5, damping * 6),
        ), None

    error = _regression(evaluate(a, b)[0], t)[2]
    (a, b, error, _), _ = jax.lax.scan(step, (a, b, error, jnp.full_like(error, 1e-2)), length=POLISHES)
    best = jnp.argmin(error, axis=1)[:, None]
    pick = lambda p: jnp.take_along_axis(p, best, axis=1)[:, 0]
    c, d, error = (pick(p) for p in _regression(evaluate(a, b)[0], t))
    a, b = pick(a) / half, pick(b) - pick(a) * middle / half
    numbers = jnp.stack([a, b, c * deviation, d * deviation + mean], axis=1)
    return numbers, jnp.where(deviation > 0, error, 0)


def _regression(f: Float[Array, "... M"], t: Float[Array, "M"]) -> tuple[Array, Array, Array]:
    """(c, d, mean square of t − c f − d over that of t); infinite where f is not finite everywhere."""
    is_good = jnp.all(jnp.isfinite(f), axis=-1)
    f = jnp.where(is_good[..., None], f, 0)
    t = t.reshape((1,) * (f.ndim - 1) + t.shape)
    mean, of_t = jnp.mean(f, axis=-1), jnp.mean(t, axis=-1)
    centred = f - mean[..., None]
    squares = jnp.sum(centred * centred, axis=-1)
    size = jnp.maximum(jnp.max(jnp.abs(f), axis=-1), jnp.finfo(f.dtype).tiny ** 0.25)
    is_flat = squares <= f.shape[-1] * (16 * jnp.finfo(f.dtype).eps * size) ** 2
    c = jnp.where(is_flat, 0, jnp.sum(centred * (t - of_t[..., None]), axis=-1) / jnp.where(is_flat, 1, squares))
    d = of_t - c * mean
    error = jnp.mean((t - c[..., None] * f - d[..., None]) ** 2, axis=-1)
    scale = jnp.mean((t - of_t[..., None]) ** 2, axis=-1)
    return c, d, jnp.where(is_good & jnp.isfinite(error), error / jnp.where(scale > 0, scale, 1), jnp.inf)


def _outside(v: Float[Array, "... M"], f: Float[Array, "... M"]) -> Float[Array, "... M"]:
    """The part of v that is no combination of f and 1."""
    v, f = (a - jnp.mean(a, axis=-1, keepdims=True) for a in (v, f))
    squares = jnp.sum(f * f, axis=-1, keepdims=True)
    return v - f * jnp.sum(v * f, axis=-1, keepdims=True) / jnp.where(squares > 0, squares, 1)


def _is_least_around(error: Float[Array, "A B"]) -> Array:
    padded = jnp.pad(error, 1, constant_values=jnp.inf)
    rows, columns = error.shape
    around = [padded[r : r + rows, c : c + columns] for r in range(3) for c in range(3) if (r, c) != (1, 1)]
    return error <= functools.reduce(jnp.minimum, around)


# ---- functions in the network -----------------------------------------------------------------------


def fix(
    params: KAN,
    layer: int,
    into: int,
    out: int,
    function: str | Function,
    *,
    x: Float[Array, "... I"] | None = None,
    numbers: Sequence[float] | None = None,
) -> KAN:
    """The network with c f(a x + b) + d on an edge; its spline is kept, masked, for `unfix`.

    Args:
        x: samples of the network's inputs by which a, b, c and d are fitted to the edge.
        numbers: a, b, c, d; 1, 0, 1, 0 where neither is given.

    Raises:
        ValueError: an edge or a function that does not exist, both `x` and `numbers`, a function that has no value
            somewhere on the edge's range.

    Example:
        >>> from jaxml import kan
        >>> params = fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, "sin", numbers=[2.0, 0.0, 1.0, 0.5])
        >>> round(float(kan.apply(params, jnp.array([0.25]))[0]), 4)
        0.9794
    """
    _edge(params, layer, into, out)
    function = find(function)
    if x is not None and numbers is not None:
        raise ValueError("kan.fix: the numbers are given or fitted to x, got both.")
    if x is not None:
        free = unfix(params, layer, into, out)
        if not free.layers[layer].kept[into, out]:
            raise ValueError(f"kan.fix: edge ({layer}, {into}, {out}) is pruned, x has nothing to fit. Give numbers.")
        at, values = samples(free, x)[layer]
        found = _ranked(at[:, into], values[:, into, out], {function.name: function}, 0.0)
        if not found:
            raise ValueError(f"kan.fix: {function.name} has no value somewhere on the range of edge "
                             f"({layer}, {into}, {out}). Take another function or give numbers.")  # fmt: skip
        numbers = found[0].numbers
    return _with(params, layer, into, out, function, (1.0, 0.0, 1.0, 0.0) if numbers is None else numbers)


def _with(params: KAN, layer: int, into: int, out: int, function: Function, numbers: Sequence[float]) -> KAN:
    if len(numbers) != 4:
        raise ValueError(f"kan.fix: numbers are a, b, c, d, got {len(numbers)} of them.")
    old = params.layers[layer]
    edge = Edge(jnp.asarray(numbers, old.coef.dtype), into, out, function)
    fixed = *(e for e in old.fixed if (e.into, e.out) != (into, out)), edge
    return _replaced(params, layer, dataclasses.replace(old, mask=old.kept.at[into, out].set(0), fixed=fixed))


def unfix(params: KAN, layer: int, into: int, out: int) -> KAN:
    """The network with the spline back on an edge; as it is where no function is fixed there.

    Example:
        >>> from jaxml import kan
        >>> params = fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, "sin")
        >>> len(params.layers[0].fixed), len(unfix(params, 0, 0, 0).layers[0].fixed)
        (1, 0)
    """
    _edge(params, layer, into, out)
    old = params.layers[layer]
    fixed = tuple(e for e in old.fixed if (e.into, e.out) != (into, out))
    if len(fixed) == len(old.fixed):
        return params
    mask = old.kept.at[into, out].set(1)
    mask = None if bool(jnp.all(mask == 1)) else mask
    return _replaced(params, layer, dataclasses.replace(old, mask=mask, fixed=fixed))


def _replaced(params: KAN, layer: int, new: Layer) -> KAN:
    return dataclasses.replace(params, layers=(*params.layers[:layer], new, *params.layers[layer + 1 :]))


def simplify(params: KAN) -> KAN:
    """The same functions by plainer numbers: c exp(x + b) as c' exp(x), phases within a quarter of a turn, …

    Example:
        >>> from jaxml import kan
        >>> params = fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, "exp", numbers=[1.0, 0.0, 1.0, 2.0])
        >>> kan.formula(simplify(params), ["x"])
        [1.0*exp(1.0*x) + 2.0]
    """
    layers_ = []
    for layer in params.layers:
        plain = lambda e: dataclasses.replace(
            e, numbers=jnp.asarray(e.function.simpler(tuple(map(float, e.numbers))), e.numbers.dtype)
        )
        layers_.append(dataclasses.replace(layer, fixed=tuple(map(plain, layer.fixed))))
    return dataclasses.replace(params, layers=tuple(layers_))


def auto_symbolic(
    params: KAN,
    x: Float[Array, "... I"],
    *,
    functions: Library = None,
    weight_simple: float | None = 0.8,
    least_r2: float = 0.0,
) -> tuple[KAN, list[tuple[int, int, int, Suggestion]]]:
    """The network with the best function on every edge that still has a spline.

    Args:
        x: samples of the network's inputs.
        functions, weight_simple: as in `suggest`.
        least_r2: edges that no function fits as well as this keep their spline.

    Returns:
        The network, and (layer, into, out, the function taken or, where it was not good enough, the best) of each edge.

    Example:
        >>> from jaxml import kan
        >>> x = jnp.linspace(-1.0, 1.0, 200)[:, None]
        >>> params, _ = kan.fit(kan.init(jax.random.key(0), [1, 1]), x, jnp.exp(x), grids=[10])
        >>> [(n, i, o, s.name) for n, i, o, s in auto_symbolic(params, x)[1]]
        [(0, 0, 0, 'exp')]
    """
    known, told, out = library(functions), [], params
    for n, (at, values) in enumerate(samples(params, x)):
        open_edges = np.argwhere(np.asarray(params.layers[n].kept) > 0)
        for into, to in open_edges.tolist():
            best = _ranked(at[:, into], values[:, into, to], known, weight_simple)[0]
            told.append((n, into, to, best))
            if best.r2 >= least_r2:
                out = _with(out, n, into, to, known[best.name], best.numbers)
    return out, told
