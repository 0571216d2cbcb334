"""Floating-point operations of a traced function, counted as often as its loops turn."""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """Those of all products, over all devices; of a condition the dearer branch, of a `while` one turn.

    Args:
        jaxpr: of `jax.make_jaxpr(function)(...)`.

    Example:
        >>> import jax.numpy as jnp
        >>> step = lambda x, _: (x @ x, None)
        >>> flops(jax.make_jaxpr(lambda x: jax.lax.scan(step, x, length=7)[0])(jnp.ones((64, 64))))
        3670016.0
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in summed)
        elif name == "conv_general_dilated":
            kernel = params["dimension_numbers"].rhs_spec
            shape = eqn.invars[1].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape) / shape[kernel[0]]
        elif name == "cond":
            total += max(flops(branch) for branch in params["branches"])
        elif name == "pallas_call":
            cost = params.get("cost_estimate")
            grid = [n for n in params["grid_mapping"].grid if isinstance(n, int)]
            total += float(cost.flops) if cost is not None else math.prod(grid) * flops(params["jaxpr"])
        elif name == "linear_with_transpose":  # `jaxml.linear`
            traced = params["traced"]
            total += flops(traced) if traced else of(params["forward"], *(v.aval for v in eqn.invars))
        else:
            times = 1
            if name == "scan":
                times = params["length"]
            elif name == "shard_map":
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += times * sum(flops(inner) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The functions that an operation calls."""
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                found.append(one)
    return found


def of(function: Any, *args: Any) -> float:
    """`flops` of a function of arrays, or of their shapes."""
    return flops(jax.make_jaxpr(function)(*args))
