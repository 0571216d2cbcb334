"""A cubic spline as an activation, one for all or one a channel: Σₖ cₖ N(u − k), u = (x − low) grid / (high − low).

N is the cardinal cubic B-spline. Outside [low, high] the spline goes on as a straight line, so that no unit dies there.

Reference:
    Bohra, Campos, Gupta, Aziznejad, Unser 2020, "Learning activation functions in deep (spline) neural networks", IEEE
    Open Journal of Signal Processing 1, for the idea (theirs are linear splines); de Boor 1978, "A practical guide to
    splines", for B-splines.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.activations.rule import lean
from jaxml.axes import Array, Float, Params


def init(
    shape: tuple[int, ...] = (),
    function: Callable | None = None,
    grid: int = 12,
    low: float = -4.0,
    high: float = 4.0,
) -> Params:
    """Parameters that start as a function, `silu` unless another is given.

    Returns:
        {"coefficients": [grid + 3, *shape]}, the least squares fit on [low, high].

    Raises:
        ValueError: grid < 1 or low ≥ high.

    Example:
        >>> params = init((2,), jnp.tanh, grid=16)
        >>> params["coefficients"].shape, [f"{y:.2f}" for y in apply(params, jnp.array([0.5, -2.0]))]
        ((19, 2), ['0.46', '-0.96'])
    """
    from jaxml.activations.self_gated import silu

    if grid < 1 or not low < high:
        raise ValueError(f"spline: grid ≥ 1 and low < high, got {grid}, {low}, {high}. Give an interval and its cells.")
    x = np.linspace(low, high, 20 * grid + 1)
    with jax.ensure_compile_time_eval():
        basis = np.asarray(_basis(jnp.asarray((x - low) * grid / (high - low), jnp.float32), grid + 3), np.float64)
        y = np.asarray((function or silu)(x.astype(np.float32)), np.float64)
    c = jnp.asarray(np.linalg.lstsq(basis.T, y, rcond=None)[0], jnp.float32)
    return {"coefficients": jnp.broadcast_to(c.reshape(-1, *(1,) * len(shape)), (grid + 3, *shape))}


def apply(params: Params, x: Float[Array, "..."], low: float = -4.0, high: float = 4.0) -> Float[Array, "..."]:
    """The spline at x; low and high are those of `init`.

    Example:
        >>> import jax.numpy as jnp
        >>> params = init(function=lambda x: 2 * x)
        >>> [f"{y:.3f}" for y in apply(params, jnp.array([-9.0, 0.5, 7.0]))]
        ['-18.000', '1.000', '14.000']
    """

    def formula(x, c):
        c = c.reshape(c.shape[0], *(1,) * (x.ndim - c.ndim + 1), *c.shape[1:])
        scale = (c.shape[0] - 3) / (high - low)
        inside = jnp.clip(x, low, high)
        u = (inside - low) * scale
        cubic, slope = _basis(u, c.shape[0]), _basis_slope(u, c.shape[0])
        line = jnp.sum(c * slope, axis=0) * scale
        return jnp.sum(c * cubic, axis=0) + line * (x - inside)

    return lean(formula)(x, params["coefficients"])


def _basis(u, count: int):
    """N(u − k + 3), k = 0 … count − 1, in front of u's axes."""
    from jaxml.kan.bspline import cardinal  # here: activations begin without the networks

    return cardinal(_shifted(u, count), 3)


def _basis_slope(u, count: int):
    """dN/du."""
    from jaxml.kan.bspline import cardinal

    t = _shifted(u, count)
    return cardinal(t, 2) - cardinal(t - 1, 2)


def _shifted(u, count: int):
    """u − k + 3."""
    return u[None] - (jnp.arange(count, dtype=u.dtype) - 3).reshape(-1, *(1,) * u.ndim)
