"""The functions with names that may stand on an edge, each with the expression and the plainest numbers for it.

Reference:
    The names and complexities are those of pykan's `SYMBOLIC_LIB`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxml.axes import Array

Numbers = tuple[float, float, float, float]


class Function(NamedTuple):
    """f of c f(a x + b) + d.

    Example:
        >>> import jax.numpy as jnp
        >>> cosh = Function("cosh", jnp.cosh, lambda sympy, u: sympy.cosh(u), complexity=3)
        >>> float(cosh.call(0.0))
        1.0
    """

    name: str
    call: Callable[[Array], Array]
    expression: Callable[[Any, Any], Any]  # (sympy, its argument) → the expression
    complexity: int
    simpler: Callable[[Numbers], Numbers] = lambda numbers: numbers  # the same function, by plainer numbers


def _linear(numbers: Numbers) -> Numbers:
    a, b, c, d = numbers
    return 1.0, 0.0, c * a, c * b + d


def _power(degree: float, parity: int | None = None):
    """f(a x) = |a|^degree f(±x); parity 0 even, 1 odd."""

    def simpler(numbers: Numbers) -> Numbers:
        a, b, c, d = numbers
        if a == 0:
            return numbers
        size = abs(a)
        a, b, c = a / size, b / size, c * size**degree
        if a < 0 and parity is not None:
            a, b, c = 1.0, -b, c * (-1) ** parity
        return a, b, c, d

    return simpler


def _exponential(numbers: Numbers) -> Numbers:
    a, b, c, d = numbers
    return (a, 0.0, c * math.exp(b), d) if abs(b) < 50 else numbers


def _logarithm(numbers: Numbers) -> Numbers:
    a, b, c, d = numbers
    return (math.copysign(1.0, a), b / abs(a), c, d + c * math.log(abs(a))) if a else numbers


def _odd(numbers: Numbers) -> Numbers:
    a, b, c, d = numbers
    return (-a, -b, -c, d) if a < 0 else numbers


def _even(numbers: Numbers) -> Numbers:
    a, b, c, d = numbers
    return (-a, -b, c, d) if a < 0 else numbers


def _wave(parity: int):
    """Of sine (1) and cosine (0): a positive, the phase within a quarter of a turn."""

    def simpler(numbers: Numbers) -> Numbers:
        a, b, c, d = (_odd if parity else _even)(numbers)
        turns = round(b / math.pi)
        return a, b - turns * math.pi, c * (-1) ** (turns % 2), d

    return simpler


def _powers():
    whole = (1, 1), (2, 2), (3, 3), (4, 3), (5, 3)  # (power, pykan's complexity)
    for n, cost in whole:
        name = "x" if n == 1 else f"x^{n}"
        simpler = _linear if n == 1 else _power(n, n % 2)
        yield Function(name, functools.partial(_times, n=n), lambda s, u, n=n: u**n, cost, simpler)
    for n, cost in zip(range(1, 6), (2, 2, 3, 4, 5)):
        name = "1/x" if n == 1 else f"1/x^{n}"
        call = lambda x, n=n: 1 / _times(x, n=n)
        yield Function(name, call, lambda s, u, n=n: u**-n, cost, _power(-n, n % 2))


def _times(x: Array, n: int) -> Array:
    out = x
    for _ in range(n - 1):
        out = out * x
    return out


LIBRARY: dict[str, Function] = {
    f.name: f
    for f in (
        Function("0", jnp.zeros_like, lambda s, u: s.Integer(0), 0, lambda n: (1.0, 0.0, 0.0, n[3])),
        *_powers(),
        Function("sqrt", jnp.sqrt, lambda s, u: s.sqrt(u), 2, _power(0.5)),
        Function("x^1.5", lambda x: x * jnp.sqrt(x), lambda s, u: s.sqrt(u) ** 3, 4, _power(1.5)),
        Function("1/sqrt(x)", jax.lax.rsqrt, lambda s, u: 1 / s.sqrt(u), 2, _power(-0.5)),
        Function("exp", jnp.exp, lambda s, u: s.exp(u), 2, _exponential),
        Function("log", jnp.log, lambda s, u: s.log(u), 2, _logarithm),
        Function("abs", jnp.abs, lambda s, u: s.Abs(u), 3, _power(1, 0)),
        Function("sin", jnp.sin, lambda s, u: s.sin(u), 2, _wave(1)),
        Function("cos", jnp.cos, lambda s, u: s.cos(u), 2, _wave(0)),
        Function("tan", jnp.tan, lambda s, u: s.tan(u), 3, _odd),
        Function("tanh", jnp.tanh, lambda s, u: s.tanh(u), 3, _odd),
        Function("sgn", jnp.sign, lambda s, u: s.sign(u), 3, _power(0, 1)),
        Function("arcsin", jnp.arcsin, lambda s, u: s.asin(u), 4, _odd),
        Function("arccos", jnp.arccos, lambda s, u: s.acos(u), 4),
        Function("arctan", jnp.arctan, lambda s, u: s.atan(u), 4, _odd),
        Function("arctanh", jnp.arctanh, lambda s, u: s.atanh(u), 4, _odd),
        Function("gaussian", lambda x: jnp.exp(-x * x), lambda s, u: s.exp(-(u**2)), 3, _even),
    )
}
ALIASES = {"x^0.5": "sqrt", "1/x^0.5": "1/sqrt(x)"}

Library = Mapping[str, Function] | Sequence[str | Function] | None


def library(functions: Library = None) -> dict[str, Function]:
    """The functions to choose from: names of `LIBRARY`, functions of one's own, or all of it.

    Raises:
        ValueError: a name that is not in the library.

    Example:
        >>> list(library(["x", "sin", Function("cosh", jnp.cosh, lambda s, u: s.cosh(u), 3)]))
        ['x', 'sin', 'cosh']
    """
    if functions is None:
        return LIBRARY
    if isinstance(functions, Mapping):
        return dict(functions)
    chosen = {f.name: f for f in map(find, [functions] if isinstance(functions, str) else functions)}
    if not chosen:
        raise ValueError("kan: functions name one at least, got none. Leave them out for the whole library.")
    return chosen


def find(name: str | Function) -> Function:
    if isinstance(name, Function):
        return name
    name = ALIASES.get(name, name)
    if name not in LIBRARY:
        raise ValueError(f"kan: a function is one of {', '.join(LIBRARY)}, got {name!r}. Or hand over a kan.Function.")
    return LIBRARY[name]
