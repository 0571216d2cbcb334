"""Activations as pure functions: computed in float32 inside, rounded once, with derivatives that keep one array.

    >>> import jax, jax.numpy as jnp
    >>> from jaxml import activations
    >>> [f"{y:.3f}" for y in activations.mish(jnp.array([-1.0, 0.0, 1.0]))]
    ['-0.303', '0.000', '0.865']
    >>> len(activations.CATALOGUE) >= 70
    True

- Fixed: `activations.gelu(x)` and the rest; `activations.CATALOGUE` says what is known of each.
- Gated, of two arrays: `activations.swiglu(gate, value)`; with its products, `gated_feed_forward(x, gate, up, down)`.
- Learnable: `activations.learnable.snake.init((D,))`, `.apply(params, x)`.
- To the simplex: `activations.sparsemax(x)`. With noise: `activations.noisy.rrelu(key, x)`.
- `activations.activation` makes one of a formula and its derivative.

What jax.nn computes without loss is jax.nn's own function: `relu`, `relu6`, `leaky_relu`, `identity`, `log1mexp`,
`standardize`.
"""

from jax.nn import identity, leaky_relu, log1mexp, relu, relu6, standardize

from jaxml.activations import catalogue, gated, learnable, noisy, rational, simplex
from jaxml.activations.catalogue import CATALOGUE, gain
from jaxml.activations.feed_forward import gated_feed_forward
from jaxml.activations.gated import (
    bilinear,
    clamped_swiglu,
    geglu,
    glu,
    gtu,
    halves,
    mishglu,
    reglu,
    seglu,
    siglu,
    swiglu,
)
from jaxml.activations.gelus import gelu, gelu_exact, gelu_tanh, phish, quick_gelu
from jaxml.activations.piecewise import (
    absolute,
    crelu,
    group_sort,
    hard_elish,
    hard_mish,
    hard_shrink,
    hard_sigmoid,
    hard_silu,
    hard_tanh,
    leaky_relu_squared,
    maxout,
    relu_n,
    relu_squared,
    shifted_relu,
    sign,
    soft_shrink,
    sparse_plus,
    sparse_sigmoid,
    sqnl,
    srelu,
    star_relu,
    step,
    threshold,
    triangle,
)
from jaxml.activations.rational import fit_rational
from jaxml.activations.rectifiers import celu, elu, isrlu, nlrelu, selu, shifted_softplus, softplus, squareplus
from jaxml.activations.rule import activation
from jaxml.activations.self_gated import aptx, dsilu, elish, eswish, logish, mish, serf, silu, smish, tanhexp
from jaxml.activations.sigmoids import (
    arctan,
    erf,
    gompertz,
    isru,
    laplace,
    lecun_tanh,
    log_sigmoid,
    sigmoid,
    soft_sign,
    tanh,
)
from jaxml.activations.simplex import entmax15, log_softmax, logsumexp, softmax, softmax1, softmin, sparsemax
from jaxml.activations.unbounded import arcsinh, bent_identity, exp, logit, square, symexp, symlog, tanh_shrink
from jaxml.activations.waves import cos, gaussian, gcu, lisht, mexican_hat, sin, sinc, sinlu, snake

swish = silu
hard_swish = hard_silu

__all__ = [
    "CATALOGUE",
    "absolute",
    "activation",
    "aptx",
    "arcsinh",
    "arctan",
    "bent_identity",
    "bilinear",
    "catalogue",
    "celu",
    "clamped_swiglu",
    "cos",
    "crelu",
    "dsilu",
    "elish",
    "elu",
    "entmax15",
    "erf",
    "eswish",
    "exp",
    "fit_rational",
    "gain",
    "gated",
    "gated_feed_forward",
    "gaussian",
    "gcu",
    "geglu",
    "gelu",
    "gelu_exact",
    "gelu_tanh",
    "glu",
    "gompertz",
    "group_sort",
    "gtu",
    "halves",
    "hard_elish",
    "hard_mish",
    "hard_shrink",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "isrlu",
    "isru",
    "laplace",
    "leaky_relu",
    "leaky_relu_squared",
    "learnable",
    "lecun_tanh",
    "lisht",
    "log1mexp",
    "log_sigmoid",
    "log_softmax",
    "logish",
    "logit",
    "logsumexp",
    "maxout",
    "mexican_hat",
    "mish",
    "mishglu",
    "nlrelu",
    "noisy",
    "phish",
    "quick_gelu",
    "rational",
    "reglu",
    "relu",
    "relu6",
    "relu_n",
    "relu_squared",
    "seglu",
    "selu",
    "serf",
    "shifted_relu",
    "shifted_softplus",
    "siglu",
    "sigmoid",
    "sign",
    "silu",
    "simplex",
    "sin",
    "sinc",
    "sinlu",
    "smish",
    "snake",
    "soft_shrink",
    "soft_sign",
    "softmax",
    "softmax1",
    "softmin",
    "softplus",
    "sparse_plus",
    "sparse_sigmoid",
    "sparsemax",
    "sqnl",
    "square",
    "squareplus",
    "srelu",
    "standardize",
    "star_relu",
    "step",
    "swiglu",
    "swish",
    "symexp",
    "symlog",
    "tanh",
    "tanh_shrink",
    "tanhexp",
    "threshold",
    "triangle",
]
