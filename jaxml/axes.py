"""The letters that name array axes, said once.

====== =====================================================
letter axis
====== =====================================================
B      batch
T      query length (tokens of a sequence)
S      key length (slots of a cache)
N      query heads
K      key/value heads; N is a multiple of K
H      head dim
D      width of the residual stream
F      feed-forward width
V      vocabulary
R      rank of a low-rank factor
L      layers, stacked in front of every layer's weight
====== =====================================================

They appear in annotations (``Float[Array, "B T N H"]``) and in shape comments.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

Params = dict[str, Any]
"""A pytree with string keys whose leaves are arrays or weight nodes (`jaxml.weights`)."""


def wide(dtype) -> jnp.dtype:
    """The dtype to accumulate in: float32, or float64 where the input is.

    Example:
        >>> [wide(dtype).name for dtype in ("bfloat16", "float32", "float64")]
        ['float32', 'float32', 'float64']
    """
    return jnp.promote_types(dtype, jnp.float32)


def floating(x, dtype) -> Array:
    """x as an array of floating point numbers; integers and booleans in that dtype.

    Example:
        >>> floating([True, False], "bfloat16").dtype.name, floating(jnp.ones(2), "bfloat16").dtype.name
        ('bfloat16', 'float32')
    """
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype)


__all__ = ["Array", "Bool", "Float", "Int", "Params", "floating", "wide"]
