"""What may stand where a weight matrix stands.

A weight is either an array of shape [..., in, out] or a *weight node*: a registered pytree with a
method ``matmul(x)`` (a LoRA pair around a frozen matrix, a quantised matrix, ...). The decoder calls
`dot` and never asks which one it has, so that one model file serves every way of adapting.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxml.axes import Array


@runtime_checkable
class Weight(Protocol):
    """A pytree that stands for a matrix [..., in, out]."""

    def matmul(self, x: Array) -> Array:
        """x [..., in] → [..., out]."""
        ...

    def dense(self) -> Array:
        """The matrix that this node stands for, [..., in, out]."""
        ...


def is_node(w: Any) -> bool:
    """Whether `w` is a weight node rather than an array (use as ``is_leaf`` in tree functions)."""
    return isinstance(w, Weight) and not isinstance(w, jax.Array)


def dot(x: Array, w: Array | Weight) -> Array:
    """x·w over the last axis of `x` and the first of `w`; the result has x's dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> dot(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
        (2, 4)
    """
    if is_node(w):
        return w.matmul(x)
    return jnp.matmul(x, w.astype(x.dtype))
