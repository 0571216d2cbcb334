"""NF4: sixteen quantiles of a normal distribution, a scale every 64 weights, bit for bit as bitsandbytes has them."""

from jaxml.axes import Array, Float
from jaxml.quant import qarray
from jaxml.quant.qarray import QArray


def quantize(w: Float[Array, "... D F"], *, double: bool = True, block: int = 64, axis: int = -2) -> QArray:
    """The matrix in 4 bits a weight and its scales.

    Args:
        w: a matrix [in, out] or a table [V, D]; leading axes are matrices of their own.
        double: scales in 8 bits, with one of their own every 256 (4.127 bits a weight; 4.5 without, at block 64).
        block: weights a scale, a power of two. They run along `in`; over the rows' ends where `in` is no multiple.
        axis: -2 for a matrix [in, out], -1 for a table whose rows are taken.

    Raises:
        ValueError: not a floating matrix, a block that is no power of two, a weight that is not finite.

    Example:
        >>> import jax
        >>> w = jax.random.normal(jax.random.key(0), (256, 128))
        >>> q = quantize(w)
        >>> q.shape, q.codes.shape, round(float(abs(dequantize(q) - w).mean()), 2)
        ((256, 128), (128, 128), 0.07)

    Reference:
        Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
    """
    return qarray.quantize(w, "nf4", block=block, double=double, axis=axis, name="nf4.quantize")


def dequantize(q: QArray) -> Float[Array, "... D F"]:
    """The matrix that the codes stand for, in the dtype of the one they were made of.

    Example:
        >>> import jax.numpy as jnp
        >>> again = dequantize(quantize(jnp.array([[-1.0], [0.0], [0.1], [0.6]]), double=False))
        >>> [round(float(w), 3) for w in again[:, 0]]
        [-1.0, 0.0, 0.08, 0.563]
    """
    return q.dense()
