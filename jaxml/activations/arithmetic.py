"""Pieces of formulas that keep float32's accuracy everywhere, and whose derivatives of every order are right at 0.

Three habits: |x| is a selection, never `abs` (whose derivative at 0 is 0); exponents are never positive; where an
exponent is a product, what its rounding takes away goes into the exponential as well (Dekker 1971), because
exp(80 (1 + ε)) = exp(80) (1 + 80 ε).

Reference:
    Dekker 1971, "A floating-point technique for extending the available precision"; Higham 2002, "Accuracy and
    Stability of Numerical Algorithms", chapter 1.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array

FAR = 40.0
"""exp(−x²/2) is 0 beyond, in float32 and float64."""
HUGE = 2.0**30
"""1 + x² is x² beyond."""


def reach(x: Array) -> float:
    """exp(−x), and x exp(−x), are 0 beyond."""
    return 800.0 if x.dtype == jnp.float64 else 120.0


def bounded(x: Array, low: float = -math.inf, high: float = math.inf) -> Array:
    """x between bounds, with derivative 0 outside; for formulas that have reached their limit there."""
    x = x if low == -math.inf else jnp.where(x < low, low, x)
    return x if high == math.inf else jnp.where(x > high, high, x)


def finite(x: Array) -> Array:
    """x, and 0 for infinities."""
    return jnp.where(mirror(x) < math.inf, x, 0)


def mirror(x: Array) -> Array:
    """|x|, with derivative 1 at 0."""
    return jnp.where(x >= 0, x, -x)


def side(x: Array, right, left) -> Array:
    """`right` where x ≥ 0, `left` elsewhere."""
    return jnp.where(x >= 0, right, left)


def positive(x: Array) -> Array:
    """max(x, 0), with derivative 1 at 0."""
    return jnp.where(x >= 0, x, 0)


def negative(x: Array) -> Array:
    """min(x, 0), with derivative 0 at 0."""
    return jnp.where(x >= 0, 0, x)


# ---- the logistic function and its relatives ---------------------------------------------------------


def logistic(x: Array) -> Array:
    """1 / (1 + exp(−x))."""
    u = jnp.exp(-mirror(x))
    return side(x, 1, u) / (1 + u)


def logistic_slope(x: Array) -> Array:
    """σ(x) σ(−x)."""
    u = jnp.exp(-mirror(x))
    return u / ((1 + u) * (1 + u))


def log1p_exp(x: Array) -> Array:
    """log(1 + exp(x))."""
    return positive(x) + log1p_unit(jnp.exp(-mirror(x)))


def log1p_unit(u: Array) -> Array:
    """log(1 + u) for 0 ≤ u ≤ 1: 2 artanh(u / (2 + u)), whose series has no negative term."""
    w = u / (2 + u)
    return w * artanh_series(w * w)


def log1p_excess(u: Array) -> Array:
    """u − log(1 + u) for 0 ≤ u ≤ 1."""
    w = u / (2 + u)
    y = w * w
    return y * ((2 + u) - w * artanh_series(y, 1))


def artanh_series(y: Array, first: int = 0) -> Array:
    """Σ 2 yᵏ⁻ᶠ / (2 k + 1) from k = f = `first`, for y ≤ 1/9; with f = 0 and y = w² it is 2 artanh(w) / w."""
    return horner([2 / (2 * k + 1) for k in range(first, 17 if y.dtype == jnp.float64 else 8)], y)


def tanh_slope(x: Array) -> Array:
    """1 / cosh²(x)."""
    return 4 * logistic_slope(2 * x)


@jax.custom_jvp
def tanh_wide(x: Array) -> Array:
    """tanh(x), whose derivatives of every order are right where it rounds to ±1."""
    return jnp.tanh(x)


tanh_wide.defjvp(lambda primals, tangents: (tanh_wide(*primals), tanh_slope(*primals) * tangents[0]))


def tanh_parts(x: Array) -> Array:
    """c with tanh(x) = x / (1 + c) and x − tanh(x) = x c / (1 + c), for |x| ≤ 3: the continued fraction of tanh."""
    top, bottom = _TANH_DOUBLE if x.dtype == jnp.float64 else _TANH_SINGLE
    y = x * x
    return y * horner(top, y) / horner(bottom, y)


def tanh_small(x: Array) -> Array:
    """tanh(x) for |x| ≤ 3, more accurate than `jnp.tanh`, and slower."""
    return x / (1 + tanh_parts(x))


def _tanh_fraction(depth: int) -> tuple[list[float], list[float]]:
    """c = y / (3 + y / (5 + y / (7 + …))) as y · top(y) / bottom(y); lowest power first, every number positive."""
    top, bottom = [1], [2 * depth + 1]
    for odd in range(2 * depth - 1, 1, -2):
        shifted = [0, *top]
        width = max(len(shifted), len(bottom))
        pad = lambda p: p + [0] * (width - len(p))
        top, bottom = bottom, [odd * b + s for b, s in zip(pad(bottom), pad(shifted))]
    return [c / bottom[0] for c in top], [c / bottom[0] for c in bottom]


_TANH_SINGLE, _TANH_DOUBLE = _tanh_fraction(8), _tanh_fraction(13)


def horner(coefficients, x: Array) -> Array:
    """Σ cₖ xᵏ, of numbers or of arrays that broadcast against x."""
    out = coefficients[-1] + jnp.zeros_like(x)
    for k in range(len(coefficients) - 2, -1, -1):
        out = out * x + coefficients[k]
    return out


# ---- products, sums and exponentials with their rounding errors --------------------------------------


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """(p, e) with p + e = a b to twice the precision, p of 16 digits (41 in float64).

    p is rounded by an instruction of its own: a compiler that fuses a product with a sum would round it no more.
    """
    exponent, mantissa = (11, 40) if a.dtype == jnp.float64 else (8, 15)
    p = jax.lax.reduce_precision(a * b, exponent, mantissa)
    (a1, a2), (b1, b2) = _split(a), _split(b)
    return p, ((a1 * b1 - p) + (a1 * b2 + a2 * b1)) + a2 * b2


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(a + b rounded, what rounding took away). Constants go second: XLA simplifies (a + b) − a for such an a."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def times(x: Array, c: float) -> tuple[Array, Array]:
    """c x for a number c that need not be representable, as a pair."""
    high, low = constant(x, c)
    p, e = two_product(x, high)
    return p, e + x * low


def constant(x: Array, c: float) -> tuple[Array, Array]:
    """The number c as a pair of x's dtype."""
    high = np.asarray(c, x.dtype)
    return jnp.asarray(high), jnp.asarray(np.asarray(c - float(high), x.dtype))


def exp_pair(p: Array, e: Array) -> Array:
    """exp(p + e) for an e as small as two_product gives it, at most 2⁻⁸."""
    return jnp.exp(p) * (1 + e * (1 + e / 2))


def _split(a: Array) -> tuple[Array, Array]:
    """a as two numbers of half its digits, so that products of them are exact."""
    exponent, mantissa = (11, 25) if a.dtype == jnp.float64 else (8, 11)
    high = jax.lax.stop_gradient(jax.lax.reduce_precision(a, exponent, mantissa))
    return high, a - high


# ---- bells and the normal distribution ---------------------------------------------------------------


def exp_square(x: Array, factor: float) -> Array:
    """exp(factor x²), factor −1 or −1/2."""
    x = bounded(x, -FAR, FAR)
    p, e = two_product(x, x)
    return exp_pair(factor * p, factor * e)


def erf_excess(y: Array) -> Array:
    """√π erf(x) / (2 x) − exp(−x²) of y = x² ≤ 1."""
    terms = range(1, 20 if y.dtype == jnp.float64 else 11)
    return y * horner([-((-1) ** k) * 2 * k / (2 * k + 1) / math.factorial(k) for k in terms], y)


def normal_pdf(x: Array) -> Array:
    """φ(x), the density of the standard normal distribution."""
    return exp_square(x, -0.5) * (1 / math.sqrt(2 * math.pi))


def mills(t: Array) -> Array:
    """Φ(−t) / φ(t) for t ≥ 0.

    In float32 1 / (t + g(t)) with a rational g fitted to a relative error of 7e-10: every term is positive, and the
    error of g fades where t is large.
    """
    t = bounded(t, high=FAR)
    if t.dtype == jnp.float64:
        t = bounded(t, high=37.0)
        return math.sqrt(math.pi / 2) * jnp.exp(t * t / 2) * jax.lax.erfc(t * math.sqrt(0.5))
    top = (0.797884561, 0.504260643, 0.166835841, 0.0300295969, 0.00251766851)
    bottom = (1.0, 1.08742663, 0.56772343, 0.171608196, 0.0300414721, 0.00251743535)
    return 1 / (t + horner(top, t) / horner(bottom, t))


def normal_cdf(x: Array) -> Array:
    """Φ(x)."""
    tail = normal_pdf(x) * mills(mirror(x))
    return side(x, 1 - tail, tail)


# ---- roots -------------------------------------------------------------------------------------------


def root(x: Array, b: Array | float = 1.0) -> Array:
    """√(x² + b) without overflow."""
    near = bounded(x, -HUGE, HUGE)
    return jnp.where(mirror(x) > HUGE, mirror(x), jnp.sqrt(near * near + b))


def unit(x: Array) -> Array:
    """x / √(1 + x²)."""
    near = bounded(x, -HUGE, HUGE)
    return near / jnp.sqrt(1 + near * near)


def unit_slope(x: Array) -> Array:
    """(1 + x²)^(−3/2)."""
    near, far = bounded(x, -HUGE, HUGE), 1 / jnp.where(mirror(x) > HUGE, mirror(x), 1)
    square = 1 + near * near
    return jnp.where(mirror(x) > HUGE, far * far * far, 1 / (square * jnp.sqrt(square)))
