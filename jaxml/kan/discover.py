"""From data to a formula: fit a network that is larger than needed, make it sparse, prune it, name what is left.

Reference:
    Liu et al. 2024, "KAN: Kolmogorov–Arnold Networks", section 2.5 (the steps, there taken by hand).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import log
from jaxml.axes import Array, Float
from jaxml.extras import need
from jaxml.kan import expressions, symbolic
from jaxml.kan.fit import fit
from jaxml.kan.library import LIBRARY, Library, library
from jaxml.kan.network import KAN, Affine, Width, apply, init
from jaxml.kan.prune import prune


class Discovery(NamedTuple):
    """A formula and how it came about.

    Example:
        >>> Discovery._fields[:2]
        ('formulas', 'error')
    """

    formulas: list[Any]  # SymPy expressions, one an output
    error: float  # of the formula: root mean square over y's standard deviation
    params: KAN  # every edge a function
    splines: KAN  # the pruned network before its edges got names
    splines_error: float
    edges: list[tuple[int, int, int, symbolic.Suggestion]]  # as `auto_symbolic` tells


SPARSE_FITS = 2  # a network that was pruned but is not yet as narrow as can be is made sparse once more


def discover(
    key: Array,
    x: Float[Array, "N I"],
    y: Float[Array, "N O"] | Float[Array, "N"],
    *,
    widths: Sequence[Width] | None = None,
    names: Sequence[str] | None = None,
    digits: int | None = 5,
    sparse: float = 1e-2,
    grid: int = 5,
    grids: Sequence[int] = (10, 20),
    node: float = 1e-2,
    edge: float = 3e-2,
    functions: Library = None,
    weights_simple: Sequence[float | None] = (0.8, None),
    tolerance: float = 1e-3,
    restarts: int = 4,
    progress: bool = False,
) -> Discovery:
    """The formula that predicts y from x.

    Columns of x are fitted with their ranges mapped to [−1, 1], y with mean 0 and deviation 1; the networks and the
    formula that are returned take them as they came.

    Args:
        key: of the networks' random numbers.
        widths: of the network to begin with; where None [inputs, 5, outputs] and, at every second restart,
            [inputs, (3, 2), outputs] with two nodes that multiply.
        names: of the inputs in the formula; x_1, x_2, … where None.
        digits: of the formula's numbers.
        sparse, grid: of the first fit, by L-BFGS.
        grids: of the second, by Levenberg–Marquardt, after pruning by `node` and `edge`.
        functions: as in `auto_symbolic`.
        weights_simple: as in `auto_symbolic`, one after the other while the formula's error is above the tolerance.
        tolerance: of the error; a formula as good ends the search, as does one that is as good as its splines.
        restarts: networks to try, from different random numbers; of these the formula with the least error is taken.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, unknown functions.
        ImportError: SymPy is not installed.

    Example:
        >>> x = jax.random.uniform(jax.random.key(0), (300, 1), minval=-1.0)
        >>> discover(jax.random.key(1), x, jnp.sin(3 * x) + 1, widths=[1, 1], names=["x"], digits=2).formulas
        [sin(3*x) + 1]
    """
    need("sympy", "symbolic")  # rather than after the fits
    x, y = jnp.asarray(x), jnp.asarray(y)
    y = y[:, None] if y.ndim == 1 else y
    if x.ndim != 2 or len(x) != len(y) or not len(x):
        raise ValueError(f"kan.discover: x and y are [N, inputs] and [N, outputs], got {x.shape} and {y.shape}.")
    if bad := int(jnp.sum(~jnp.isfinite(x))) + int(jnp.sum(~jnp.isfinite(y))):
        raise ValueError(f"kan.discover: all values are finite, got {bad} that are not. Drop those rows.")
    if names is not None and len(names) != x.shape[1]:
        raise ValueError(f"kan.discover: names are of the {x.shape[1]} inputs, got {len(names)}.")
    if restarts < 1 or not weights_simple:
        raise ValueError(f"kan.discover: there is a restart and a weight, got {restarts} and {weights_simple}.")
    functions = library(functions)
    usual = [x.shape[1], 5, y.shape[1]], [x.shape[1], (3, 2), y.shape[1]]
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    units = _Units.of(x.astype(dtype), y.astype(dtype))
    x, y = units.inside(x.astype(dtype), y.astype(dtype))
    error = lambda params: float(jnp.sqrt(jnp.mean((apply(params, x) - y) ** 2)))
    best: Discovery | None = None
    with log.progress("discovering", enabled=progress, fields=("step", "error")) as bar:
        task = bar.add_task("discover", total=restarts, step="–", error="–")
        for number in range(restarts):
            bar.update(task, step="splines")
            one = jax.random.fold_in(key, number)
            splines = _sparse(one, usual[number % 2] if widths is None else widths, x, y, sparse, grid, (node, edge))
            splines, _ = fit(splines, x, y, grids=grids, steps=20)
            for weight in weights_simple:
                bar.update(task, step="functions")
                params, told = symbolic.auto_symbolic(splines, x, functions=functions, weight_simple=weight)
                params, _ = fit(params, x, y, update_grids=False)
                found = Discovery([], error(params), params, splines, error(splines), told)
                best = found if best is None or _is_better(found, best) else best
                bar.update(task, error=f"{best.error:.1e}")
                if found.error <= tolerance:
                    break
            bar.update(task, advance=1)
            if best.error <= max(tolerance, 1.1 * best.splines_error if best.splines_error < 0.1 else 0):
                break
        bar.update(task, completed=restarts, step="done")
    params, splines = symbolic.simplify(units.outside(best.params)), units.outside(best.splines)
    return best._replace(params=params, splines=splines, formulas=expressions.formula(params, names, digits=digits))


def _sparse(key: Array, widths, x: Array, y: Array, sparse: float, grid: int, least: tuple[float, float]) -> KAN:
    """A network of few edges; without base functions, which could not be written in other units."""
    params = init(key, widths, grid=grid, base="zero", dtype=x.dtype)
    for _ in range(SPARSE_FITS):
        before = params.widths
        params, _ = fit(params, x, y, sparse=sparse)
        params = prune(params, x, node=least[0], edge=least[1])
        if params.widths == before or all(layer.width[0] == 1 for layer in params.layers[1:]):
            break
    return params


def _is_better(new: Discovery, old: Discovery) -> bool:
    cost = lambda found: sum(s.complexity for *_, s in found.edges)
    return new.error < (0.9 if cost(new) >= cost(old) else 1.1) * old.error


class _Units(NamedTuple):
    """Inside, columns of x lie within [−1, 1] and y has mean 0 and deviation 1."""

    middle: Float[Array, "I"]
    half: Float[Array, "I"]
    mean: Float[Array, "O"]
    deviation: Float[Array, "O"]

    @classmethod
    def of(cls, x: Float[Array, "N I"], y: Float[Array, "N O"]) -> "_Units":
        low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)
        one = lambda a: jnp.where(a > 0, a, 1)
        return cls((low + high) / 2, one((high - low) / 2), jnp.mean(y, axis=0), one(jnp.std(y, axis=0)))

    def inside(self, x: Array, y: Array) -> tuple[Array, Array]:
        return (x - self.middle[None]) / self.half[None], (y - self.mean[None]) / self.deviation[None]

    def outside(self, params: KAN) -> KAN:
        """The network of what comes from and goes to the outside."""
        first = params.layers[0]
        points = first.points * self.half[:, None] + self.middle[:, None]

        def taking(edge):
            a, b, c, d = edge.numbers
            a = a / self.half[edge.into]
            return dataclasses.replace(edge, numbers=jnp.stack([a, b - a * self.middle[edge.into], c, d]))

        first = dataclasses.replace(first, points=points, fixed=tuple(map(taking, first.fixed)))
        params = dataclasses.replace(params, layers=(first, *params.layers[1:]))
        last, arities = params.layers[-1], params.arities[-1]
        if arities:
            n = last.width[1]
            affine = Affine(jnp.ones(n), jnp.zeros(n), self.deviation, self.mean)
            return dataclasses.replace(params, affine=(*params.affine[:-1], affine))
        # The mean goes to one edge of each sum; a sum of splines holds it since they add up to 1.
        live = jnp.argmax(last.kept > 0, axis=0)
        takes = jnp.any(last.kept > 0, axis=0)
        coef = last.coef * self.deviation[None, None]
        coef = coef.at[:, live, jnp.arange(last.width[1])].add(jnp.where(takes, self.mean, 0)[None])
        given, fixed = set(np.flatnonzero(np.asarray(takes)).tolist()), []
        for edge in last.fixed:
            a, b, c, d = edge.numbers
            scale, shift = self.deviation[edge.out], 0 if edge.out in given else self.mean[edge.out]
            given.add(edge.out)
            fixed.append(dataclasses.replace(edge, numbers=jnp.stack([a, b, c * scale, d * scale + shift])))
        for out in sorted(set(range(last.width[1])) - given):  # nothing is left but the mean
            numbers = jnp.asarray([1.0, 0.0, 0.0, self.mean[out]], self.mean.dtype)
            fixed.append(symbolic.Edge(numbers, 0, out, LIBRARY["0"]))
        last = dataclasses.replace(last, coef=coef, fixed=tuple(fixed))
        return dataclasses.replace(params, layers=(*params.layers[:-1], last))
