"""What a function's results depend on, read from its jaxpr: how an Optax optimizer uses the parameters it is given."""

from collections.abc import Callable

import jax
from jax.extend.core import Literal


def dependence(function: Callable, *args, choices: bool = True) -> list[set[int]]:
    """For each leaf of the results the numbers of the leaves of `args` that it depends on.

    Args:
        choices: what only chooses a branch of a `cond` counts.

    Example:
        >>> dependence(lambda a, b: (a + 1, a * 0 + b), 1.0, 2.0)
        [{0}, {0, 1}]
    """
    closed = jax.make_jaxpr(function)(*args)
    return _outputs(closed.jaxpr, [{n} for n in range(len(closed.jaxpr.invars))], choices)


def _outputs(jaxpr, inputs: list[set[int]], choices: bool) -> list[set[int]]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    of = lambda v: set() if isinstance(v, Literal) else known.get(v, set())
    for equation in jaxpr.eqns:
        given = [of(v) for v in equation.invars]
        if equation.primitive.name == "cond":
            branches = [_outputs(b.jaxpr, given[1:], choices) for b in equation.params["branches"]]
            choice = given[0] if choices else set()
            known.update((v, choice.union(*ways)) for v, *ways in zip(equation.outvars, *branches))
            continue
        inside = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        inside = getattr(inside, "jaxpr", inside)
        whole = equation.primitive.name in ("scan", "while")  # their inputs are not their jaxpr's, one to one
        if inside is not None and not whole and len(inside.invars) == len(given):
            results = _outputs(inside, given, choices)
        else:
            results = [set().union(*given)] * len(equation.outvars)
        known.update(zip(equation.outvars, results))
    return [of(v) for v in jaxpr.outvars]
