"""A network written down: as SymPy expressions, as LaTeX, and expressions as JAX functions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, floating
from jaxml.extras import need
from jaxml.kan.network import KAN


def formula(params: KAN, names: Sequence[str] | None = None, *, digits: int | None = None) -> list[Any]:
    """The network as SymPy expressions, one an output.

    Args:
        names: of the inputs; x_1, x_2, … where None.
        digits: of the numbers, see `rounded`; as they are where None.

    Raises:
        ValueError: edges that still have splines (they are listed), another number of names, a name twice.

    Example:
        >>> from jaxml import kan
        >>> params = kan.fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, "x^2", numbers=[1.0, 0.0, 3.0, -1.0])
        >>> formula(params, ["x"])
        [3.0*x**2 - 1.0]
    """
    sympy = need("sympy", "symbolic")
    splines = [
        (n, int(i), int(o)) for n, layer in enumerate(params.layers) for i, o in np.argwhere(np.asarray(layer.kept) > 0)
    ]
    if splines:
        raise ValueError(f"kan.formula: every edge is a function or pruned, got splines on {len(splines)} edges "
                         f"(layer, into, out): {splines[:8]}. Use auto_symbolic or fix.")  # fmt: skip
    count = params.layers[0].width[0]
    names = [f"x_{n + 1}" for n in range(count)] if names is None else list(names)
    if len(names) != count:
        raise ValueError(f"kan.formula: names are of the {count} inputs, got {len(names)}.")
    number = lambda value: sympy.Float(float(value), 17 if params.layers[0].coef.dtype == jnp.float64 else 9)
    values = _symbols(names, "kan.formula")
    for layer, affine, arities in zip(params.layers, params.affine, params.arities):
        sums: list[Any] = [sympy.Integer(0)] * layer.width[1]
        for edge in layer.fixed:
            a, b, c, d = (number(v) for v in jax.device_get(edge.numbers))
            sums[edge.out] += c * edge.function.expression(sympy, a * values[edge.into] + b) + d
        line = lambda v, scale, shift: [number(s) * e + number(t) for e, s, t in zip(v, scale, shift)]
        if affine:
            sums = line(sums, affine.inner_scale, affine.inner_shift)
        adding = len(sums) - sum(arities)
        values, at = sums[:adding], adding
        for arity in arities:
            values.append(sympy.prod(sums[at : at + arity]))
            at += arity
        if affine:
            values = line(values, affine.outer_scale, affine.outer_shift)
    return values if digits is None else [rounded(value, digits) for value in values]


def rounded(expression: Any, digits: int) -> Any:
    """A SymPy expression, numbers rounded to so many digits, without constants too small to show in a sum.

    Example:
        >>> sympy = need("sympy", "symbolic")
        >>> x = sympy.Symbol("x")
        >>> rounded(1.0000003 * sympy.sin(3.14159274 * x + 2e-8) - 1.2e-9, 5)
        sin(3.1416*x)
    """
    sympy = need("sympy", "symbolic")
    if expression.is_Float:
        value = float(f"{float(expression):.{digits}g}")
        return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 1e15 else sympy.Float(value, 15)
    if not expression.args:
        return expression
    parts = expression.args
    if expression.is_Add:
        size = max((abs(float(p.as_coeff_Mul()[0])) for p in parts if not p.is_number), default=0.0)
        parts = [p for p in parts if not p.is_number or abs(float(p)) >= size * 10.0**-digits]
    return expression.func(*(rounded(part, digits) for part in parts))


def latex(params: KAN, names: Sequence[str] | None = None, *, digits: int = 5) -> list[str]:
    """The formulas as LaTeX, with 1, x^2 and the like where numbers round to whole ones.

    Example:
        >>> from jaxml import kan
        >>> params = kan.fix(kan.init(jax.random.key(0), [1, 1]), 0, 0, 0, "sin", numbers=[2.0, 0.0, 3.0, 0.0])
        >>> latex(params, ["x"])[0].startswith("3 ")
        True
    """
    sympy = need("sympy", "symbolic")
    return [sympy.latex(expression) for expression in formula(params, names, digits=digits)]


def function(expressions: Any, names: Sequence[str]) -> Callable[[Array], Array]:
    """A JAX function of SymPy expressions: [..., inputs] → [..., outputs].

    Args:
        expressions: one or several, as `formula` gives them, or text that SymPy reads.
        names: of the inputs, in order.

    Raises:
        ValueError: as `read` says; a function that JAX does not have.

    Example:
        >>> function(["sin(x)*y"], ["x", "y"])(jnp.array([0.0, 2.0])).tolist()
        [0.0]
    """
    expressions, symbols = read(expressions, names, "kan.function")
    call = lowered(symbols, expressions, "kan.function")

    def evaluate(x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        x = floating(x, jnp.float32)
        columns = [x[..., n] for n in range(len(names))]
        return jnp.stack([jnp.broadcast_to(jnp.asarray(v, x.dtype), x.shape[:-1]) for v in call(*columns)], axis=-1)

    return evaluate


def read(expressions: Any, names: Sequence[str], who: str) -> tuple[list[Any], list[Any]]:
    """(SymPy expressions of the inputs, the inputs as symbols).

    Args:
        expressions: one or several: SymPy's, numbers, or text.
        who: begins the sentence of an error.

    Raises:
        ValueError: text that SymPy cannot read, what is no real expression, a symbol that is no input.
    """
    sympy = need("sympy", "symbolic")
    symbols = _symbols(names, who)
    known, out = dict(zip(names, symbols)), []
    for given in expressions if isinstance(expressions, (list, tuple)) else [expressions]:
        try:
            e = sympy.sympify(given, locals=known)
        except (sympy.SympifyError, SyntaxError, TypeError, AttributeError) as error:
            raise ValueError(f"{who}: SymPy reads every expression, got {given!r}.") from error
        if not isinstance(e, sympy.Expr) or e.has(sympy.I, sympy.zoo, sympy.nan):
            raise ValueError(f"{who}: an expression is a real number for real inputs, got {given}.")
        unknown = sorted({s.name for s in e.free_symbols} - set(names))
        if unknown:
            raise ValueError(f"{who}: every symbol is an input, got {', '.join(unknown)} beside {list(names)}.")
        out.append(e.xreplace({s: known[s.name] for s in e.free_symbols}))
    return out, symbols


def lowered(symbols: Sequence[Any], expressions: Any, who: str) -> Callable[..., Any]:
    """SymPy expressions as a JAX function of the symbols.

    Raises:
        ValueError: a function that JAX does not have.
    """
    special = jax.scipy.special
    more = {name: getattr(special, name) for name in ("erf", "erfc", "gamma", "digamma")}
    more["loggamma"] = special.gammaln
    call = need("sympy", "symbolic").lambdify(symbols, expressions, modules=[more, "jax"], cse=True)
    try:
        jax.eval_shape(call, *[jax.ShapeDtypeStruct((), jnp.float32)] * len(symbols))
    except (TypeError, NameError, AttributeError) as error:
        raise ValueError(f"{who}: functions are those that JAX has, got {expressions} ({error}).") from error
    return call


def _symbols(names: Sequence[str], who: str) -> list[Any]:
    """One by one: SymPy would take spaces, commas and colons in a name for several of them."""
    twice = sorted({n for n in names if list(names).count(n) > 1})
    if twice or not names or not all(names):
        raise ValueError(f"{who}: every input has a name of its own, got {list(names)}.")
    return [need("sympy", "symbolic").Symbol(name, real=True) for name in names]
