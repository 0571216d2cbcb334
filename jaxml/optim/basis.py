"""Bases of the subspace that a gradient lies in, one matrix at a time.

Each method takes the gradient G [m, n] and the present basis P [m, r] and returns the next one; a basis on the right is
the same of Gᵀ. "power" is one step of subspace iteration from where the basis stands, which follows a gradient that
changes slowly at a small part of the cost of a singular value decomposition; the QR decomposition is made of Cholesky
factors of r × r matrices, so that it is products all the way and shards as they do.

Reference:
    Halko, Martinsson, Tropp 2011, "Finding structure with randomness", algorithms 4.3 and 5.1.
    Fukaya et al. 2020, "Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices".
    Zhao et al. 2024, "GaLore" (svd); Hao et al. 2024, "Flora" and Zhu et al. 2024, "APOLLO" (random).
"""

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float

METHODS = ("power", "rsvd", "svd", "random")
PASSES, SHIFTS = 5, (1e-5, 1e-6)  # of Cholesky QR: at most; of the first pass and of later ones, relative
FIRST = 4  # power steps from a random start
OVERSAMPLE = 10
_HIGHEST = jax.lax.Precision.HIGHEST


def power(g: Float[Array, "m n"], p: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """One step of subspace iteration, from a gradient.

    Example:
        >>> g = jnp.array([[3.0, 0.0], [0.0, 1.0]])   # varies most along the first axis
        >>> [round(float(v), 2) for v in jax.jit(power)(g, jnp.array([[0.6], [0.8]]))[:, 0]]
        [0.99, 0.15]
    """
    return follow(_through(g, p), p)


def follow(y: Float[Array, "m r"], p: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """orth(Y + δP) of Y = G GᵀP of any size: the columns keep their order and their direction from step to step.

    The shift δ, 1e-5 of the largest column, keeps directions in which the gradient is zero where they are.

    Example:
        >>> y, p = jnp.array([[30.0], [40.0]]), jnp.array([[1.0], [0.0]])
        >>> [round(float(v), 2) for v in jax.jit(follow)(y, p)[:, 0]]
        [0.6, 0.8]
    """
    y = _scaled(y)
    largest = jnp.sqrt(jnp.max(jnp.sum(y * y, axis=0)))
    return orthonormal(y / jnp.where(largest > 0, largest, 1.0) + 1e-5 * p)


def rsvd(g: Float[Array, "m n"], start: Float[Array, "m s"], rank: int) -> Float[Array, "m r"]:
    """The leading left singular vectors found from s ≥ r random columns with two power steps.

    Example:
        >>> g = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> start = jax.random.normal(jax.random.key(0), (2, 2))
        >>> p = jax.jit(rsvd, static_argnames="rank")(g, start, rank=1)
        >>> round(float(captured(g, p)), 2)   # 9 of 10, the most that a column can
        0.9
    """
    q = power(g, power(g, orthonormal(start)))
    low = _product(q.T, _scaled(g).astype(q.dtype))
    _, turn = jnp.linalg.eigh(_product(low, low.T))
    return canonical(_product(q, turn[:, ::-1][:, :rank]))


def svd(g: Float[Array, "m n"], rank: int) -> Float[Array, "m r"]:
    """The leading left singular vectors.

    Example:
        >>> g = jnp.array([[3.0, 6.0], [4.0, 8.0]])
        >>> [round(float(v), 2) for v in svd(g, rank=1)[:, 0]]
        [0.6, 0.8]
    """
    u, _, _ = jnp.linalg.svd(g, full_matrices=False)
    return canonical(u[:, :rank])


def orthonormal(y: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """An orthonormal basis of the columns by Cholesky QR, repeated until they are orthogonal before the last pass.

    Passes before that are shifted so that they cannot break down: as a rule there are two, of columns that are nearly
    dependent three.

    Example:
        >>> q = jax.jit(orthonormal)(jnp.array([[3.0, 1.0], [4.0, 0.0]]))
        >>> [round(float(v), 2) for v in q[:, 0]], [round(float(v), 2) for v in q[:, 1]]
        ([0.6, 0.8], [0.8, -0.6])
    """
    eye = jnp.eye(y.shape[1], dtype=y.dtype)
    norms = jnp.sqrt(jnp.sum(y * y, axis=0, keepdims=True))
    y = y / jnp.where(norms > 0, norms, 1)

    def again(carry):
        n, is_close, _ = carry
        return ~is_close & (n < PASSES)

    def once(carry):
        n, _, y = carry
        gram = _product(y.T, y)
        is_close = jnp.sum((gram - eye) ** 2) < 0.25
        largest = jnp.max(jnp.sum(jnp.abs(gram), axis=0))  # at least the largest eigenvalue
        shift = jnp.where(is_close, 0, jnp.where(n == 0, *SHIFTS) * largest)
        factor = jnp.linalg.cholesky(gram + shift * eye, symmetrize_input=False)
        return n + 1, is_close, jax.lax.linalg.triangular_solve(factor, y, lower=True, transpose_a=True)

    return jax.lax.while_loop(again, once, (0, jnp.any(jnp.isnan(norms)), y))[2]


def canonical(p: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Each column with its largest element positive; a decomposition leaves the sign to chance.

    Example:
        >>> canonical(jnp.array([[1.0, 2.0], [-3.0, 1.0]])).tolist()
        [[-1.0, 2.0], [3.0, 1.0]]
    """
    largest = jnp.take_along_axis(p, jnp.argmax(jnp.abs(p), axis=0)[None], axis=0)
    return p * jnp.where(largest < 0, -1, 1)


def captured(g: Float[Array, "m n"], p: Float[Array, "m r"]) -> Float[Array, ""]:
    """‖PᵀG‖² / ‖G‖².

    Example:
        >>> g = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> round(float(captured(g, jnp.array([[1.0], [0.0]]))), 2)   # 9 of 10
        0.9
    """
    return jnp.sum(_product(p.T, g) ** 2) / jnp.sum(g * g)


def overlap(new: Float[Array, "m r"], old: Float[Array, "m r"]) -> Float[Array, ""]:
    """‖P_newᵀ P_old‖² / r: 1 where both span the same subspace, 0 where they are orthogonal.

    Example:
        >>> p, q = jnp.array([[1.0], [0.0]]), jnp.array([[0.6], [0.8]])
        >>> round(float(overlap(p, p)), 2), round(float(overlap(p, q)), 2)
        (1.0, 0.36)
    """
    return jnp.sum(_product(new.T, old) ** 2) / new.shape[1]


def _scaled(g: Array) -> Array:
    """G with a largest element of 1, so that no square of it is out of range."""
    largest = jnp.max(jnp.abs(g))
    return g / jnp.where(largest > 0, largest, 1).astype(g.dtype)


def _through(g: Array, p: Array) -> Array:
    """G GᵀP but for a factor; the factors are G's dtype, the sums float32 or wider.

    PᵀG rather than GᵀP: XLA multiplies a transposed first factor at half the speed on CPU.
    """
    low = _scaled(jnp.matmul(p.T.astype(g.dtype), g, preferred_element_type=p.dtype))
    return jnp.matmul(g, low.T.astype(g.dtype), preferred_element_type=p.dtype)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_HIGHEST)
