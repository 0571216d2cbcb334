"""Group-rational KAN layers: one learnt rational function a group of channels, then a linear map.

    y = W F(x) + b,  F(x)_c = P_g(x_c) / Q_g(x_c) for channel c of group g

In the gradient of the functions' few coefficients a sum runs over all tokens and channels; it is taken over tiles of
rows first and over tiles then, so that float32 loses less and a GPU needs no atomic additions into one place.

Reference:
    Yang and Wang 2024, "Kolmogorov–Arnold Transformer", https://arxiv.org/abs/2409.10594 (groups, variance-preserving
    start, feed-forward). Its kernel, its torch code and its fitted coefficients use different denominators
    (`activations.rational`'s A and B); here coefficients are fitted for the denominator that is used.
    Raffel and Chen 2025, "FlashKAT", https://arxiv.org/abs/2505.13813 (sums by tiles).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.activations import rational
from jaxml.axes import Array, Float, Params, floating, wide

GROUPS = 8
IDENTITY = {"numerator": [0.0, 1.0, 0.0, 0.01, 0.0, 0.001], "denominator": [0.0, 0.01, 0.0, 0.001]}  # x exactly, in A


def init(
    key: Array,
    width: tuple[int, int],
    *,
    groups: int = GROUPS,
    function: Callable | None = None,
    version: str = "A",
    bias: bool = True,
    dtype=jnp.float32,
) -> Params:
    """A layer that keeps the variance of standard normal inputs.

    Args:
        width: (in, out).
        groups: of input channels, which share a function; divides their number.
        function: what every F starts as; the identity where None.
        version: of the denominator, as in `activations.rational`; to be given to `apply` too.

    Returns:
        {"numerator": [6, groups], "denominator": [4, groups], "weight": [in, out], "bias": [out]}.

    Raises:
        ValueError: groups that do not divide the inputs.

    Example:
        >>> params = init(jax.random.key(0), (16, 4))
        >>> apply(params, jnp.ones((2, 3, 16))).shape
        (2, 3, 4)
    """
    _check(width[0], groups)
    functions = start(function, version)
    weight = gain(function) * width[0] ** -0.5 * jax.random.normal(key, width)
    params = {name: jnp.broadcast_to(c[:, None], (len(c), groups)).astype(dtype) for name, c in functions.items()}
    return params | {"weight": weight.astype(dtype)} | ({"bias": jnp.zeros(width[1], dtype)} if bias else {})


def start(function: Callable | None = None, version: str = "A") -> Params:
    """Coefficients of one function: {"numerator": [6], "denominator": [4]}.

    Example:
        >>> params = start()
        >>> params["numerator"].shape, params["denominator"].shape
        ((6,), (4,))
        >>> [round(float(y), 3) for y in rational.apply(params, jnp.array([-2.0, 0.5]), version="A")]
        [-2.0, 0.5]
    """
    if function is not None:
        return rational.fit_rational(function, version=version)
    if version != "A":
        return {"numerator": jnp.zeros(6).at[1].set(1.0), "denominator": jnp.zeros(4)}
    return {name: jnp.asarray(c) for name, c in IDENTITY.items()}


def gain(function: Callable | None) -> float:
    """1 / √E f(z)² of a standard normal z, by Gauss–Hermite quadrature.

    Example:
        >>> round(gain(jnp.tanh), 2), round(gain(jax.nn.relu), 2), gain(None)
        (1.59, 1.41, 1.0)
    """
    if function is None:
        return 1.0
    z, w = np.polynomial.hermite_e.hermegauss(200)
    with jax.ensure_compile_time_eval():
        y = np.asarray(function(jnp.asarray(z, jnp.float32)), np.float64)
    return float(np.sum(w * y * y) / np.sum(w)) ** -0.5


def apply(params: Params, x: Float[Array, "... I"], *, version: str = "A") -> Float[Array, "... O"]:
    """The layer's outputs, in x's dtype; functions in float32, products with wide sums.

    Example:
        >>> params = init(jax.random.key(0), (8, 2)) | {"weight": jnp.ones((8, 2)), "bias": jnp.array([0.0, 0.5])}
        >>> [round(float(y), 3) for y in apply(params, jnp.arange(8.0))]  # every function starts as the identity
        [28.0, 28.5]
    """
    x = floating(x, params["weight"].dtype)
    y = jnp.matmul(
        functions(params, x, version=version), params["weight"].astype(x.dtype), preferred_element_type=wide(x.dtype)
    )
    bias = params.get("bias")
    y = y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + bias.shape)
    return y.astype(x.dtype)


def functions(params: Params, x: Float[Array, "... I"], *, version: str = "A") -> Float[Array, "... I"]:
    """F(x): every channel through its group's function.

    Example:
        >>> lines = {"numerator": jnp.array([[0.0, 0.0], [1.0, 10.0]]), "denominator": jnp.zeros((1, 2))}  # x and 10 x
        >>> functions(lines, jnp.arange(4.0)).tolist()
        [0.0, 1.0, 20.0, 30.0]
    """
    numerator, denominator = params["numerator"], params["denominator"]
    groups = numerator.shape[-1]
    _check(x.shape[-1], groups)
    rows = int(np.prod(x.shape[:-1]))
    tiles = _tiles(rows)
    tiled = x.reshape(tiles, rows // tiles, groups, x.shape[-1] // groups)

    def spread(c):  # [n, tiles, 1, groups, 1]: the cotangent is summed within tiles, then over them
        c = jnp.broadcast_to(c[:, None, None, :, None], (c.shape[0], tiles, 1, groups, 1))
        return jax.lax.optimization_barrier(c) if tiles > 1 else c

    coefficients = {"numerator": spread(numerator), "denominator": spread(denominator)}
    return rational.apply(coefficients, tiled, version=version).reshape(x.shape)


def _tiles(rows: int) -> int:
    """The greatest power of two that divides the rows and is at most their square root."""
    tiles = 1
    while rows % (2 * tiles) == 0 and (2 * tiles) ** 2 <= rows:
        tiles *= 2
    return tiles


def _check(channels: int, groups: int) -> None:
    if groups < 1 or channels % groups:
        raise ValueError(f"kan.rational: groups divide the channels, got {groups} groups of {channels} channels.")


# ---- the feed-forward of a transformer --------------------------------------------------------------


def feed_forward_init(key: Array, width: int, hidden: int, *, groups: int = GROUPS, dtype=jnp.float32) -> Params:
    """Two layers, the first through the identity, the second through SiLU as they start.

    Returns:
        {"up": a layer width → hidden, "down": a layer hidden → width}.

    Example:
        >>> params = feed_forward_init(jax.random.key(0), 16, 32)
        >>> feed_forward(params, jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """
    one, two = jax.random.split(key)
    layer = functools.partial(init, groups=groups, dtype=dtype)
    return {"up": layer(one, (width, hidden)), "down": layer(two, (hidden, width), function=jax.nn.silu)}


def feed_forward(params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The layers one after the other.

    Example:
        >>> params = feed_forward_init(jax.random.key(0), 8, 8)
        >>> one = {name: layer | {"weight": jnp.eye(8)} for name, layer in params.items()}
        >>> round(float(feed_forward(one, jnp.ones(8))[0]), 2), round(float(jax.nn.silu(1.0)), 2)
        (0.73, 0.73)
    """
    return apply(params["down"], apply(params["up"], x))
