"""Learnable activations, each a pair `init` → params, `apply(params, x)`.

`init(shape)` takes () for one function and (D,) for one a channel, the last axis of x; params is a dictionary of
float32 arrays. `apply` computes in float32 and rounds once; reverse mode keeps x and the parameters.

    >>> import jax.numpy as jnp
    >>> params = snake.init((3,))
    >>> snake.apply(params, jnp.ones((2, 3))).shape
    (2, 3)
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxml.activations import piecewise, rectifiers, waves
from jaxml.activations import rational as of_rational
from jaxml.activations import spline as of_spline
from jaxml.activations.arithmetic import bounded, finite, logistic, negative, positive, side, tanh_slope
from jaxml.activations.contextual import Learnable, acon, frelu, meta_acon, polynorm
from jaxml.activations.rule import activation, lean
from jaxml.axes import Array, Params


def _pair(name: str, doc: str, function: Callable[..., Array], **starts: float) -> Learnable:
    """An element-wise `function(x, *params)` whose parameters start at numbers."""

    def init(shape: tuple[int, ...] = ()) -> Params:
        return {key: jnp.full(shape, value, jnp.float32) for key, value in starts.items()}

    def apply(params: Params, x: Array) -> Array:
        if set(params) != set(starts):
            raise ValueError(f"{name}: params has {', '.join(starts)}, got {', '.join(params)}. Make them with init.")
        return function(x, *(params[key] for key in starts))

    return Learnable(init, apply, doc)


# ---- rectifiers --------------------------------------------------------------------------------------


@activation(lambda x, alpha: jnp.where(x > 0, 1, alpha))
def _prelu(x, alpha):
    return jnp.where(x > 0, x, alpha * x)


prelu = _pair(
    "prelu",
    """x where x > 0, α x elsewhere. He, Zhang, Ren, Sun 2015, https://arxiv.org/abs/1502.01852, equation 1.""",
    _prelu,
    alpha=0.25,
)


def _swish_slope(x, beta):
    z = bounded(beta * x, -500.0, 500.0)
    return logistic(z) * (1 + z * logistic(-z))


@activation(_swish_slope)
def _swish(x, beta):
    return jnp.where(beta * x < -500, 0, x * logistic(bounded(beta * x, -500.0)))


swish = _pair(
    "swish",
    """x σ(β x). Ramachandran, Zoph, Le 2017, https://arxiv.org/abs/1710.05941.""",
    _swish,
    beta=1.0,
)


acon_c = _pair(
    "acon_c",
    """(p₁ − p₂) x σ(β (p₁ − p₂) x) + p₂ x. Ma, Zhang, Liu, Sun 2020, https://arxiv.org/abs/2009.04759, equation 7.""",
    acon,
    p1=1.0,
    p2=0.0,
    beta=1.0,
)


def _xielu_terms(alpha_p, alpha_n, beta):
    return jax.nn.softplus(alpha_p), beta + jax.nn.softplus(alpha_n)


def _xielu_slope(x, alpha_p, alpha_n, beta):
    p, n = _xielu_terms(alpha_p, alpha_n, beta)
    return side(x, 2 * p * positive(x), n * jnp.expm1(negative(x))) + beta


@activation(_xielu_slope)
def _xielu(x, alpha_p, alpha_n, beta):
    p, n = _xielu_terms(alpha_p, alpha_n, beta)
    near = jnp.where(x > -0.5, negative(x), -0.25)
    series = jnp.zeros_like(x)
    for k in range(14, 1, -1):
        series = series * near + 1 / math.factorial(k)
    left = jnp.where(x > -0.5, series * near * near, jnp.expm1(negative(x)) - negative(x))
    return side(x, p * positive(x) * x, n * left) + beta * x


xielu = _pair(
    "xielu",
    """αₚ x² + β x where x ≥ 0, αₙ (exp(x) − 1 − x) + β x elsewhere; αₚ = softplus(p), αₙ = β + softplus(n), which start
    at 0.8. β is ½ and is trained too; leave it out of the optimizer to fix it, as the authors do.
    Huang, Schlag 2024, https://arxiv.org/abs/2411.13010.""",
    _xielu,
    alpha_p=math.log(math.expm1(0.8)),
    alpha_n=math.log(math.expm1(0.8 - 0.5)),
    beta=0.5,
)


def _pelu_slope(x, a, b):
    return side(x, a / b, a / b * jnp.exp(negative(x) / b))


@activation(_pelu_slope)
def _pelu(x, a, b):
    return side(x, a / b * x, a * jnp.expm1(negative(x) / b))


pelu = _pair(
    "pelu",
    """x a/b where x ≥ 0, a (exp(x/b) − 1) elsewhere; keep a, b > 0. Trottier, Giguère, Chaib-draa 2016,
    https://arxiv.org/abs/1605.09332, equation 1.""",
    _pelu,
    a=1.0,
    b=1.0,
)

srelu = _pair(
    "srelu",
    """Three lines that meet at `left` and `right`. Jin et al. 2015, https://arxiv.org/abs/1512.07030, equation 1.""",
    piecewise.srelu,
    left=-1.0,
    left_slope=0.1,
    right=1.0,
    right_slope=0.1,
)

squareplus = _pair(
    "squareplus",
    """(x + √(x² + b)) / 2; keep b > 0. Barron 2021, https://arxiv.org/abs/2112.11687.""",
    rectifiers.squareplus,
    b=4.0,
)

# ---- waves and steps ---------------------------------------------------------------------------------


def _snakebeta_slope(x, alpha, beta):
    return 1 + jnp.exp(alpha - beta) * jnp.sin(2 * jnp.exp(alpha) * finite(x))


@activation(_snakebeta_slope)
def _snakebeta(x, alpha, beta):
    s = jnp.sin(jnp.exp(alpha) * finite(x))
    return x + jnp.exp(-beta) * s * s


snake = _pair(
    "snake",
    """x + sin²(α x) / α, α ≠ 0. Ziyin, Hartwig, Ueda 2020, https://arxiv.org/abs/2006.08195, equation 3.""",
    waves.snake,
    alpha=1.0,
)

snakebeta = _pair(
    "snakebeta",
    """x + exp(−β) sin²(exp(α) x): frequency and size apart, both as logarithms. Lee, Ping, Ginsburg, Catanzaro, Yoon
    2022, "BigVGAN", https://arxiv.org/abs/2206.04658, and its code.""",
    _snakebeta,
    alpha=0.0,
    beta=0.0,
)


@activation(lambda x, omega: omega * jnp.cos(omega * x))
def _sinusoid(x, omega):
    return jnp.sin(omega * x)


sinusoid = _pair(
    "sinusoid",
    """sin(ω x); the first layer of a SIREN has ω = 30. Sitzmann et al. 2020, https://arxiv.org/abs/2006.09661.""",
    _sinusoid,
    omega=1.0,
)


@activation(lambda x, alpha, gamma, beta: gamma * alpha * tanh_slope(alpha * x))
def _dyt(x, alpha, gamma, beta):
    return gamma * jnp.tanh(alpha * x) + beta


def _dyt_init(shape: tuple[int, ...] = (), alpha: float = 0.5) -> Params:
    full = lambda shape, value: jnp.full(shape, value, jnp.float32)
    return {"alpha": full((), alpha), "gamma": full(shape, 1.0), "beta": full(shape, 0.0)}


dyt = Learnable(
    _dyt_init,
    lambda params, x: _dyt(x, params["alpha"], params["gamma"], params["beta"]),
    """Dynamic tanh, in place of a normalisation: γ tanh(α x) + β, α one number, γ and β one a channel. Zhu, Chen, He,
    LeCun, Liu 2025, https://arxiv.org/abs/2503.10622, equation 1.""",
)

# ---- sums of pieces ----------------------------------------------------------------------------------


def _apl_init(key: Array, shape: tuple[int, ...] = (), pieces: int = 2) -> Params:
    a, b = jax.random.split(key)
    draw = lambda key: jax.random.normal(key, (pieces, *shape), jnp.float32)
    return {"a": 0.1 * draw(a), "b": draw(b)}


def _apl_apply(params: Params, x: Array) -> Array:
    def formula(x, a, b):
        wide = lambda p: p.reshape((1,) * (x.ndim - p.ndim) + p.shape)
        return sum((wide(a[s]) * jax.nn.relu(wide(b[s]) - x) for s in range(len(a))), jax.nn.relu(x))

    return lean(formula)(x, params["a"], params["b"])


apl = Learnable(
    _apl_init,
    _apl_apply,
    """Adaptive piecewise linear: max(x, 0) + Σₛ aₛ max(bₛ − x, 0); `init(key, shape, pieces)`. Agostinelli, Hoffman,
    Sadowski, Baldi 2014, https://arxiv.org/abs/1412.6830, equation 1.""",
)


rational = Learnable(of_rational.init, of_rational.apply, of_rational.__doc__)
spline = Learnable(of_spline.init, of_spline.apply, of_spline.__doc__)

__all__ = [
    "Learnable", "acon_c", "apl", "dyt", "frelu", "meta_acon", "pelu", "polynorm", "prelu", "rational", "sinusoid",
    "snake", "snakebeta", "spline", "squareplus", "srelu", "swish", "xielu",
]  # fmt: skip
