"""int8: 255 evenly spaced values, a scale a channel or a block."""

from jaxml.axes import Array, Float
from jaxml.quant import qarray
from jaxml.quant.qarray import QArray


def quantize(w: Float[Array, "... D F"], *, block: int | None = None, axis: int = -2) -> QArray:
    """The matrix in 8 bits a weight and its scales.

    Args:
        w: a matrix [in, out] or a table [V, D]; leading axes are matrices of their own.
        block: weights a scale, a power of two; None is one scale for each output of a matrix, or row of a table.
        axis: -2 for a matrix [in, out], -1 for a table whose rows are taken.

    Raises:
        ValueError: not a floating matrix, a block that is no power of two, a weight that is not finite.

    Example:
        >>> import jax
        >>> w = jax.random.normal(jax.random.key(0), (256, 128))
        >>> q = quantize(w)
        >>> q.scales.shape, round(float(abs(dequantize(q) - w).max()), 2)
        ((128, 1), 0.02)

    Reference:
        Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section 2.1 (weights;
        products are taken in the input's dtype, so that no outliers need to be kept apart).
    """
    return qarray.quantize(w, "int8", block=block, double=False, axis=axis, name="int8.quantize")


def dequantize(q: QArray) -> Float[Array, "... D F"]:
    """The matrix that the codes stand for, in the dtype of the one they were made of.

    Example:
        >>> import jax.numpy as jnp
        >>> again = dequantize(quantize(jnp.array([[-1.0], [0.0], [0.1], [0.6]])))
        >>> [round(float(w), 3) for w in again[:, 0]]
        [-1.0, 0.0, 0.102, 0.598]
    """
    return q.dense()
