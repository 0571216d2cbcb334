"""One differentiable function around every backend: all orders, both modes, with the log-sum-exp.

The forward pass is a backend's. Its tangent is `blockwise.tangent`; the transpose of that is the backend's own
backward pass. Both depend on arrays, output and log-sum-exp, and are differentiated again as plain JAX.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxml.attention import blockwise
from jaxml.attention.tiles import Inputs, Rules
from jaxml.axes import Array
from jaxml.linear import linear

DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks", "data")


class Backend(NamedTuple):
    """What computes: (rules, inputs) → (out, lse), and the gradients; `blockwise` says what they mean."""

    name: str
    supports: Callable[[Rules, Inputs], str | None]  # the reason why not
    forward: Callable
    backward: Callable


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def attend(rules: Rules, backend: Backend, x: Inputs) -> tuple[Array, Array]:
    """(out [B, T, N, H2], log-sum-exp [B, N, T]) by the backend."""
    return backend.forward(rules, x)


@functools.partial(attend.defjvp, symbolic_zeros=True)
def _jvp(rules: Rules, backend: Backend, primals, dots):
    (x,), (dx,) = primals, dots
    out, lse = attend(rules, backend, x)
    moving = tangents(x, dx)

    def tangent(residuals, dots):
        return blockwise.tangent(rules, *residuals, dots)

    def transpose(residuals, cts):
        return backward(rules, backend, tuple(moving), residuals, cts)

    return (out, lse), linear(tangent, transpose, (x, out, lse), moving)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def backward(rules: Rules, backend: Backend, wanted: tuple[str, ...], residuals: tuple, cts: tuple) -> dict[str, Array]:
    """The backend's gradients, which may be differentiated again."""
    return backend.backward(rules, *residuals, *cts, wanted)


@backward.defjvp
def _(rules, backend, wanted, primals, dots):
    plain = lambda residuals, cts: blockwise.backward(rules, *residuals, *cts, wanted)
    grads = backward(rules, backend, wanted, *primals)
    return grads, jax.jvp(plain, primals, dots)[1]


def tangents(x: Inputs, dx: Inputs) -> dict[str, Array]:
    """The tangents of the inputs that move, by name."""
    all_of_them = {name: _moving(getattr(x, name), getattr(dx, name)) for name in DIFFERENTIABLE}
    return {name: dot for name, dot in all_of_them.items() if dot is not None}


def _moving(x, dot):
    """The tangent of an input, or None where it does not move; of `data`, those of its floating arrays."""
    if isinstance(x, tuple):
        pairs = [(a, d) for a, d in zip(x, dot) if jnp.issubdtype(a.dtype, jnp.floating)]
        if all(isinstance(d, SymbolicZero) for _, d in pairs):
            return None
        return tuple(jnp.zeros_like(a) if isinstance(d, SymbolicZero) else d for a, d in pairs)
    return None if dot is None or isinstance(dot, SymbolicZero) else dot
