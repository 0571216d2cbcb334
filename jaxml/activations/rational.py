"""Rational activations, P(x) / Q(x): learnable, and fitted to any function by `fit_rational`.

Q is kept from zero by absolute values, in one of two ways:

- version "A": Q = 1 + Σᵢ |bᵢ| |x|ⁱ;
- version "B": Q = 1 + |Σᵢ bᵢ xⁱ|.

Reference:
    Molina, Schramowski, Kersting 2019, "Padé activation units", https://arxiv.org/abs/1907.06732.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.activations.arithmetic import horner
from jaxml.activations.rule import lean
from jaxml.axes import Array, Float, Params

VERSIONS = ("A", "B")


def init(
    shape: tuple[int, ...] = (), function: Callable | None = None, degree: tuple[int, int] = (5, 4), version: str = "B"
) -> Params:
    """Parameters that start as a function, `silu` unless another is given.

    Args:
        shape: () for one function, (D,) for one a channel.
        function: what to start as, of numpy or JAX arrays.
        degree: of numerator and denominator.
        version: "A" or "B"; must be given to `apply` as well.

    Returns:
        {"numerator": [m + 1, *shape], "denominator": [n, *shape]}, lowest power first (the denominator from x¹).

    Example:
        >>> params = init((2,), jnp.tanh)
        >>> params["numerator"].shape, [f"{y:.2f}" for y in apply(params, jnp.array([0.5, -2.0]))]
        ((6, 2), ['0.46', '-0.96'])
    """
    from jaxml.activations.self_gated import silu

    fitted = fit_rational(function or silu, degree, version=version)
    wide = lambda c: jnp.broadcast_to(c.reshape(-1, *(1,) * len(shape)), (c.shape[0], *shape))
    return {name: wide(c) for name, c in fitted.items()}


def apply(params: Params, x: Float[Array, "..."], version: str = "B") -> Float[Array, "..."]:
    """P(x) / Q(x), in float32, rounded once; where a power of x overflows, as P and Q do at a large |x|.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"numerator": jnp.array([0.0, 1.0]), "denominator": jnp.array([0.0, 1.0])}
        >>> [f"{y:.2f}" for y in apply(params, jnp.array([-1.0, 0.0, 3.0]))]
        ['-0.50', '0.00', '0.30']
    """
    _check(version)
    return lean(lambda x, a, b: _rational(x, a, b, version))(x, params["numerator"], params["denominator"])


def _rational(x, a, b, version):
    a, b = (c.reshape(c.shape[0], *(1,) * (x.ndim - c.ndim + 1), *c.shape[1:]) for c in (a, b))
    limit = jnp.asarray(_largest(x.dtype, max(len(a) - 1, len(b))), x.dtype)
    x = jnp.clip(x, -limit, limit)
    top = horner(a, x)
    if version == "A":
        # |b| with slope 1 at 0: a coefficient that starts there can leave.
        return top / (1 + jnp.abs(x) * horner(jnp.where(b >= 0, b, -b), jnp.abs(x)))
    return top / (1 + jnp.abs(x * horner(b, x)))


def _largest(dtype, degree: int) -> float:
    """The largest x whose `degree`-th power leaves half of the exponents free."""
    return float(np.finfo(dtype).max) ** (0.5 / degree)


def fit_rational(
    function: Callable,
    degree: tuple[int, int] = (5, 4),
    interval: tuple[float, float] = (-3.0, 3.0),
    version: str = "B",
    steps: int = 200,
) -> Params:
    """The rational function of nearly the least largest error on an interval.

    Gauss–Newton steps with damping on Chebyshev points, weights growing where the error is large (Lawson's idea), in
    float64 on the host.

    Args:
        function: of arrays, element by element.
        degree: of numerator and denominator.
        interval: where to fit.
        version: of the denominator, "A" or "B".
        steps: of Gauss–Newton.

    Returns:
        {"numerator": [m + 1], "denominator": [n]}, float32.

    Raises:
        ValueError: unknown version, an empty interval, or a function that is not finite there.

    Example:
        >>> import jax.numpy as jnp
        >>> params = fit_rational(jnp.tanh)
        >>> x = jnp.linspace(-3, 3, 100)
        >>> bool(jnp.max(jnp.abs(apply(params, x) - jnp.tanh(x))) < 1e-3)
        True
    """
    _check(version)
    low, high = interval
    if not low < high:
        raise ValueError(f"fit_rational: interval has low < high, got {interval}. Exchange them.")
    x = (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    with jax.ensure_compile_time_eval():
        y = np.asarray(function(x.astype(np.float32)), np.float64)
    if not np.isfinite(y).all():
        bad = y[~np.isfinite(y)][0]
        raise ValueError(f"fit_rational: the function is finite on {interval}, got {bad}. Narrow the interval.")
    starts = [_linear_start(x, y, degree), np.zeros(sum(degree) + 1)]
    starts[1][: degree[0] + 1] = np.linalg.lstsq(np.vander(x, degree[0] + 1, increasing=True), y, rcond=None)[0]
    _, theta = min((_polish(x, y, start, degree, version, steps) for start in starts), key=lambda found: found[0])
    numerator, denominator = theta[: degree[0] + 1], theta[degree[0] + 1 :]
    if version == "A":
        denominator = np.abs(denominator)
    return {"numerator": jnp.asarray(numerator, jnp.float32), "denominator": jnp.asarray(denominator, jnp.float32)}


def _linear_start(x, y, degree):
    """P − y (Q − 1) ≈ y in least squares, reweighted by 1/Q a few times."""
    m, n = degree
    powers = np.vander(x, max(m, n) + 1, increasing=True)
    q = np.ones_like(x)
    for _ in range(20):
        matrix = np.concatenate([powers[:, : m + 1], -y[:, None] * powers[:, 1 : n + 1]], axis=1) / q[:, None]
        theta = np.linalg.lstsq(matrix, y / q, rcond=1e-12)[0]
        q = np.maximum(np.abs(1 + powers[:, 1 : n + 1] @ theta[m + 1 :]), 0.1)
    return theta


def _polish(x, y, theta, degree, version, steps):
    """(largest error, parameters) after damped Gauss–Newton steps with weights that grow where the error is large."""
    m, n = degree
    powers = np.vander(x, max(m, n) + 1, increasing=True)
    numerator, denominator = powers[:, : m + 1], powers[:, 1 : n + 1]

    def model(theta):
        a, b = theta[: m + 1], theta[m + 1 :]
        if version == "A":
            q, slopes = 1 + np.abs(denominator) @ np.abs(b), np.abs(denominator) * np.where(b >= 0, 1, -1)
        else:
            inner = denominator @ b
            q, slopes = 1 + np.abs(inner), denominator * np.where(inner >= 0, 1, -1)[:, None]
        p = numerator @ a
        return p / q, np.concatenate([numerator / q[:, None], -slopes * (p / q**2)[:, None]], axis=1)

    weights, damping = np.ones_like(x), 1e-3
    value, jacobian = model(theta)
    best = (np.abs(value - y).max(), theta)
    for _ in range(steps):
        root = np.sqrt(weights)[:, None]
        a, r = root * jacobian, root[:, 0] * (value - y)
        scale = np.linalg.norm(a, axis=0) + 1e-30
        normal = (a / scale).T @ (a / scale)
        move = np.linalg.solve(normal + damping * np.eye(len(theta)), (a / scale).T @ r) / scale
        new_value, new_jacobian = model(theta - move)
        if np.sum(weights * (new_value - y) ** 2) < np.sum(weights * (value - y) ** 2):
            theta, value, jacobian, damping = theta - move, new_value, new_jacobian, max(damping / 4, 1e-13)
            error = np.abs(value - y)
            if error.max() < best[0]:
                best = (error.max(), theta)
            weights = weights * (0.5 + error / max(error.max(), 1e-300))
            weights = np.maximum(weights / weights.max(), 1e-4)
        else:
            damping = min(damping * 4, 1e6)
    return best


def _check(version: str) -> None:
    if version not in VERSIONS:
        raise ValueError(f"rational: version is one of {', '.join(VERSIONS)}, got {version!r}. Choose one of them.")
