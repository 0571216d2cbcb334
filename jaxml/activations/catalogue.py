"""Every activation with what is known of it, as data: `CATALOGUE[name]`, and tables made from it.

>>> CATALOGUE["mish"].range, CATALOGUE["mish"].torch, CATALOGUE["tanh"].parity
((-0.30884, inf), 'Mish', 'odd')
>>> import math
>>> [a.name for a in select(monotonic=True, smooth=math.inf, saturating="left")]
['softplus', 'shifted_softplus', 'squareplus', 'exp']
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxml.activations import facts
from jaxml.activations.entry import Activation

KINDS = ("fixed", "gated", "learnable", "simplex", "features", "noisy")


def _of(kind: str, **formulas: tuple) -> list[Activation]:
    prefix = {"learnable": "learnable.", "noisy": "noisy."}.get(kind, "")
    return [
        Activation(prefix + name, row[0], kind, **(row[1] if len(row) > 1 else {})) for name, row in formulas.items()
    ]


_GATED = _of(
    "gated",
    glu=(
        "a σ(b), a and b the halves of one array",
        dict(paper="https://arxiv.org/abs/1612.08083", torch="GLU", keras="glu"),
    ),
    siglu=("σ(gate) value", dict(paper="https://arxiv.org/abs/1612.08083")),
    bilinear=("gate value", dict(paper="https://arxiv.org/abs/1612.08083")),
    reglu=("max(gate, 0) value", dict(paper="https://arxiv.org/abs/2002.05202")),
    geglu=("gelu(gate) value", dict(paper="https://arxiv.org/abs/2002.05202", note="approximate=True, as gelu")),
    swiglu=("silu(gate) value", dict(paper="https://arxiv.org/abs/2002.05202")),
    seglu=("selu(gate) value",),
    mishglu=("mish(gate) value",),
    gtu=("σ(gate) tanh(value)", dict(paper="https://arxiv.org/abs/1606.05328")),
    clamped_swiglu=("g σ(1.702 g) (v + 1), g ≤ 7, |v| ≤ 7", dict(paper="OpenAI 2025, gpt-oss")),
)

_LEARNABLE = _of(
    "learnable",
    prelu=(
        "x if x > 0 else α x; α = ¼",
        dict(paper="https://arxiv.org/abs/1502.01852", torch="PReLU", note="Keras' layer starts at 0"),
    ),
    swish=("x σ(β x); β = 1", dict(paper="https://arxiv.org/abs/1710.05941")),
    acon_c=("(p − q) x σ(β (p − q) x) + q x; 1, 0, 1", dict(paper="https://arxiv.org/abs/2009.04759")),
    meta_acon=("acon_c, β from the mean over positions", dict(paper="https://arxiv.org/abs/2009.04759")),
    xielu=("αₚ x² + β x | αₙ (exp(x) − 1 − x) + β x; 0.8, 0.8, ½", dict(paper="https://arxiv.org/abs/2411.13010")),
    pelu=("x a/b | a (exp(x/b) − 1); 1, 1", dict(paper="https://arxiv.org/abs/1605.09332")),
    srelu=("three lines; −1, 0.1, 1, 0.1", dict(paper="https://arxiv.org/abs/1512.07030")),
    squareplus=("(x + √(x² + b)) / 2; b = 4", dict(paper="https://arxiv.org/abs/2112.11687")),
    snake=("x + sin²(α x) / α; α = 1", dict(paper="https://arxiv.org/abs/2006.08195")),
    snakebeta=("x + exp(−β) sin²(exp(α) x); 0, 0", dict(paper="https://arxiv.org/abs/2206.04658")),
    sinusoid=("sin(ω x); ω = 1", dict(paper="https://arxiv.org/abs/2006.09661")),
    dyt=("γ tanh(α x) + β; 1, ½, 0", dict(paper="https://arxiv.org/abs/2503.10622")),
    apl=("max(x, 0) + Σ aₛ max(bₛ − x, 0)", dict(paper="https://arxiv.org/abs/1412.6830")),
    polynorm=("Σ wᵢ xⁱ / rms(xⁱ) + b; ⅓, 0", dict(paper="https://arxiv.org/abs/2411.03884")),
    frelu=("max(x, depthwise convolution of x)", dict(paper="https://arxiv.org/abs/2007.11824")),
    rational=("P(x) / (1 + |Q(x)|), degrees 5 and 4; as silu", dict(paper="https://arxiv.org/abs/1907.06732")),
    spline=("cubic B-spline on [−4, 4], straight outside; as silu", dict(paper="Bohra et al. 2020, IEEE OJSP 1")),
)

_SIMPLEX = _of(
    "simplex",
    softmax=("exp(xᵢ) / Σ exp(xⱼ)", dict(torch="Softmax", keras="softmax", note="torch needs dim")),
    log_softmax=("xᵢ − log Σ exp(xⱼ)", dict(torch="LogSoftmax", keras="log_softmax", note="torch needs dim")),
    softmin=("exp(−xᵢ) / Σ exp(−xⱼ)", dict(torch="Softmin")),
    softmax1=("exp(xᵢ) / (1 + Σ exp(xⱼ))", dict(paper="Miller 2023")),
    sparsemax=("max(xᵢ − τ, 0), sum 1", dict(paper="https://arxiv.org/abs/1602.02068", keras="sparsemax")),
    entmax15=("max(xᵢ/2 − τ, 0)², sum 1", dict(paper="https://arxiv.org/abs/1905.05702")),
)

_FEATURES = _of(
    "features",
    crelu=("[max(x, 0), max(−x, 0)]", dict(paper="https://arxiv.org/abs/1603.05201")),
    maxout=("the largest of each 2 neighbours", dict(paper="https://arxiv.org/abs/1302.4389")),
    group_sort=("each 2 neighbours in order", dict(paper="https://arxiv.org/abs/1811.05381")),
)

_NOISY = _of(
    "noisy",
    rrelu=("x if x ≥ 0 else a x, a ~ U(⅛, ⅓)", dict(paper="https://arxiv.org/abs/1505.00853", torch="RReLU")),
    bernoulli=("1 with probability σ(x); gradient of σ", dict(paper="https://arxiv.org/abs/1308.3432")),
    concrete=("σ((x + logistic noise) / ⅔)", dict(paper="https://arxiv.org/abs/1611.00712")),
    hard_concrete=("concrete, stretched by 1.2 and clipped", dict(paper="https://arxiv.org/abs/1712.01312")),
    gumbel_softmax=("softmax((x + Gumbel noise) / 1)", dict(paper="https://arxiv.org/abs/1611.01144")),
)

CATALOGUE: dict[str, Activation] = {
    a.name: a for a in (*facts.ROWS, *_GATED, *_LEARNABLE, *_SIMPLEX, *_FEATURES, *_NOISY)
}
"""Name → what is known."""


def select(**wanted) -> list[Activation]:
    """Entries whose attributes have these values.

    Raises:
        ValueError: no such attribute.

    Example:
        >>> [a.name for a in select(parity="even")]
        ['absolute', 'triangle', 'lisht', 'square', 'cos', 'sinc', 'gaussian', 'mexican_hat']
    """
    known = {name for name in dir(Activation) if not name.startswith("_")} | set(Activation.__dataclass_fields__)
    if unknown := set(wanted) - known:
        raise ValueError(
            f"select: attributes are {', '.join(sorted(known))}, got {', '.join(unknown)}. Use one of them."
        )
    return [a for a in CATALOGUE.values() if all(getattr(a, key) == value for key, value in wanted.items())]


def find(name: str) -> Activation:
    """The entry of a name; its module may be left out where no fixed one has it: "prelu", "learnable.snake".

    Raises:
        ValueError: no such activation; says which are near.

    Example:
        >>> find("prelu").name, find("noisy.rrelu").name, find("hard_swish").name
        ('learnable.prelu', 'noisy.rrelu', 'hard_silu')
    """
    for candidate in (name, f"learnable.{name}", f"noisy.{name}"):
        if candidate in CATALOGUE:
            return CATALOGUE[candidate]
    aliases = {"gelu": "gelu_tanh", "hard_swish": "hard_silu"}
    if name in aliases:
        return CATALOGUE[aliases[name]]
    import difflib

    near = difflib.get_close_matches(name, CATALOGUE, cutoff=0.4) or list(CATALOGUE)
    raise ValueError(f"find: no activation is called {name!r}. Near: {', '.join(near)}.")


def gain(function: Callable, points: int = 20001) -> float:
    """1 / √E f(z)² of standard normal z, by quadrature on [−10, 10]: the scale of weights that keeps mean squares at 1.

    Example:
        >>> import jax
        >>> round(gain(jax.nn.relu), 4)
        1.4142
    """
    z = np.linspace(-10, 10, points)
    weight = np.exp(-z * z / 2)
    y = np.asarray(function(jnp.asarray(z, jnp.float32)), np.float64)
    return float(np.sqrt(weight.sum() / (weight * y * y).sum()))
