"""From a formula to a network: `from_formula` makes one that is the formula, `loosen` gives it splines to train.

Reference:
    Liu et al. 2024, "KAN 2.0", section 4.3 (kanpiler).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, floating
from jaxml.extras import need
from jaxml.kan import bases
from jaxml.kan import grid as grids
from jaxml.kan import layer as layers
from jaxml.kan.expressions import lowered, read
from jaxml.kan.layer import Layer, Spec
from jaxml.kan.library import LIBRARY, Function, Numbers
from jaxml.kan.network import KAN, nodes
from jaxml.kan.symbolic import Edge

NAMES = {"Abs": "abs", "sign": "sgn", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "atanh": "arctanh"}
POWERS = {"1/2": "sqrt", "3/2": "x^1.5", "-1/2": "1/sqrt(x)"}


class Term(NamedTuple):
    """c f(a v + b) of a sum, v the expression of a node."""

    function: Function
    numbers: Numbers
    node: Any


def from_formula(expressions: Any, names: Sequence[str], *, grid: int = 5, order: int = 3, dtype=jnp.float32) -> KAN:
    """The network of fixed functions and multiplying nodes that computes SymPy expressions of the inputs.

    Args:
        expressions: one or several, or text that SymPy reads.
        names: of the inputs, in order.
        grid, order: of the splines that stand behind the functions, at 0 and masked (`loosen` fits them).

    Raises:
        ValueError: as `expressions.read` says; a function that JAX does not have.

    Example:
        >>> params = from_formula("exp(sin(pi*x) + y**2)", ["x", "y"])
        >>> params.widths
        (2, 1, 1)
        >>> from jaxml import kan
        >>> round(float(kan.apply(params, jnp.array([[0.5, 1.0]]))[0, 0]), 4)
        7.3891
    """
    expressions, symbols = read(expressions, names, "kan.from_formula")
    plan = _Plan(need("sympy", "symbolic"), symbols)
    tops = [plan.terms(e) for e in expressions]
    depth = 1 + max([plan.level(t.node) for terms, _ in tops for t in terms], default=0)
    # What each level holds: its own nodes, and those from below that something above still needs.
    held: list[list[Any]] = [[] for _ in range(depth)]
    needed = {t.node for terms, _ in tops for t in terms}
    for level in reversed(range(1, depth)):
        held[level] = sorted(needed, key=lambda e: (plan.is_product(e) and plan.level(e) == level, str(e)))
        below: set[Any] = set()
        for e in held[level]:
            below |= {e} if plan.level(e) < level else {t.node for part in plan.parts(e) for t in part[0]}
        needed = below
    held[0] = symbols
    spec, made, arities = Spec(grid, order), [], []
    for level in range(1, depth + 1):
        sums: list[tuple[list[Term], float]] = []
        products: list[int] = []
        for e in held[level] if level < depth else []:
            if plan.level(e) < level:
                sums.append(([Term(LIBRARY["x"], (1.0, 0.0, 1.0, 0.0), e)], 0.0))
            else:
                sums += plan.parts(e)
                products += [len(plan.parts(e))] if plan.is_product(e) else []
        made.append(_layer(sums if level < depth else tops, held[level - 1], spec, dtype))
        arities.append(tuple(products))
    return KAN(tuple(made), ((),) * depth, tuple(arities))


def _layer(sums, inputs: list[Any], spec: Spec, dtype) -> Layer:
    place = {e: n for n, e in enumerate(inputs)}
    fixed = []
    for out, (terms, constant) in enumerate(sums):
        terms = terms or [Term(LIBRARY["0"], (1.0, 0.0, 0.0, 0.0), inputs[0])]
        for n, term in enumerate(terms):
            a, b, c, d = term.numbers
            numbers = jnp.asarray([a, b, c, d + (constant if n == 0 else 0.0)], dtype)
            fixed.append(Edge(numbers, place[term.node], out, term.function))
    width = len(inputs), len(sums)
    empty = layers.init(jax.random.key(0), width, spec, dtype=dtype)
    zero = jnp.zeros(width, dtype)
    return dataclasses.replace(empty, coef=0 * empty.coef, base=zero, mask=zero, fixed=tuple(fixed))


class _Plan:
    """Expressions as sums of terms, and at which level each becomes a node."""

    def __init__(self, sympy, symbols: list[Any]):
        self.sympy, self.symbols, self._levels = sympy, set(symbols), {}

    def terms(self, e: Any) -> tuple[list[Term], float]:
        """(terms, constant) whose sum is e."""
        out, constant = [], 0.0
        for part in self.sympy.Add.make_args(e):
            factor, rest = part.as_independent(*self.symbols, as_Add=False)
            if not rest.free_symbols:
                constant += float(part)
            else:
                function, inner = self._function(rest)
                b, linear = inner.as_independent(*self.symbols, as_Add=True)
                a, node = linear.as_independent(*self.symbols, as_Add=False)
                out.append(Term(function, (float(a), float(b), float(factor), 0.0), node))
        return out, constant

    def _function(self, e: Any) -> tuple[Function, Any]:
        """(f, u) with e = f(u); the identity of symbols and products."""
        if e in self.symbols or e.is_Mul:
            return LIBRARY["x"], e
        if e.is_Pow and not e.exp.free_symbols:
            power = e.exp
            if power.is_Integer and 1 <= abs(power) <= 5:
                n = abs(int(power))
                name = ("x" if power > 0 else "1/x") + (f"^{n}" if n > 1 else "")
                return LIBRARY[name], e.base
            if str(power) in POWERS:
                return LIBRARY[POWERS[str(power)]], e.base
            p = float(power)
            return Function(f"x^{power}", lambda x: x**p, lambda s, u: u**power, 4), e.base
        if e.is_Pow:
            return LIBRARY["exp"], e.exp * self.sympy.log(e.base)
        if len(e.args) == 1:
            name = NAMES.get(e.func.__name__, e.func.__name__)
            if name in LIBRARY:
                return LIBRARY[name], e.args[0]
            u = self.sympy.Symbol("u", real=True)
            return Function(name, lowered([u], e.func(u), "kan.from_formula"), lambda s, v: e.func(v), 4), e.args[0]
        raise ValueError(f"kan.from_formula: functions have one argument, got {e}.")

    def is_product(self, e: Any) -> bool:
        return bool(e.is_Mul)

    def parts(self, e: Any) -> list[tuple[list[Term], float]]:
        """The sums that a node is made of: its factors, or itself."""
        return [self.terms(f) for f in e.args] if e.is_Mul else [self.terms(e)]

    def level(self, e: Any) -> int:
        if e in self.symbols:
            return 0
        if e not in self._levels:
            self._levels[e] = 1 + max(self.level(t.node) for terms, _ in self.parts(e) for t in terms)
        return self._levels[e]


def loosen(params: KAN, x: Float[Array, "N I"], *, grid: int | None = None) -> KAN:
    """The network with splines fitted in the place of its fixed functions, ready to be trained.

    Args:
        x: samples of the network's inputs; grids reach over the values that come of them.
        grid: cells of the splines; as they are where None.

    Example:
        >>> from jaxml import kan
        >>> params = from_formula("sin(3*x)", ["x"])
        >>> x = jnp.linspace(-1.0, 1.0, 100)[:, None]
        >>> loose = loosen(params, x, grid=20)
        >>> bool(jnp.allclose(kan.apply(loose, x), kan.apply(params, x), atol=1e-4))
        True
    """
    params = params if grid is None else grids.refine(params, grid)
    x, out = floating(x, params.layers[0].coef.dtype).reshape(-1, params.layers[0].width[0]), []
    for old, affine, arities in zip(params.layers, params.affine, params.arities):
        layer = grids.update(KAN((old,), ((),), ((),)), x).layers[0]
        reach = jnp.linspace(layer.points[:, 0], layer.points[:, -1], 8 * layer.spec.size)
        at = jnp.concatenate([x, reach])
        values = bases.BASES[layer.spec.basis].values(at, layer.points, layer.spec)
        # Beyond the samples a function may have no value: there the splines go on as they come.
        target = layers.edges(layer, at) - layers.edges(dataclasses.replace(layer, fixed=()), at)
        target = jnp.where(jnp.isfinite(target), target, 0)
        inside = (at >= jnp.min(x, axis=0)[None]) & (at <= jnp.max(x, axis=0)[None])

        def fitted(one):
            b, y, w = one
            return jnp.linalg.lstsq(b * w[:, None], y * w[:, None])[0]

        weight = jnp.where(inside, 1.0, 1e-3).astype(values.dtype)
        stacked = jnp.moveaxis(values, 2, 0), jnp.moveaxis(target, 1, 0).astype(values.dtype), weight.T
        more = jnp.moveaxis(jax.lax.map(fitted, stacked), 0, 1)  # [K, I, O]
        is_fixed = np.zeros(layer.width, bool)
        for edge in layer.fixed:
            is_fixed[edge.into, edge.out] = True
        coef = jnp.where(is_fixed[None], more.astype(layer.coef.dtype), layer.coef)
        base = jnp.where(is_fixed, 0, layer.base)
        mask = jnp.where(is_fixed, 1, layer.kept)
        mask = None if bool(jnp.all(mask == 1)) else mask
        out.append(dataclasses.replace(layer, coef=coef, base=base, mask=mask, fixed=()))
        x = nodes(layers.apply(old, x), affine, arities)
    return dataclasses.replace(params, layers=tuple(out))
