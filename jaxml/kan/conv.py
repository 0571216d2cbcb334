"""Convolutional KAN: a learnt function on every edge of a convolution.

    y[n, p, o] = Σ_q,i φ_qio(x[n, p + q, i])

Basis functions are maps of their own, [N, …, K C], over which one ordinary convolution runs: K times the memory of the
input, and not K times that of its patches. Padding is of those maps, with zeros: what lies outside adds nothing.

Reference:
    Bodner et al. 2024, "Convolutional Kolmogorov–Arnold Networks", https://arxiv.org/abs/2406.13155; padding as in
    torch-conv-kan (Drokin 2024, https://arxiv.org/abs/2407.01092).
"""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float, floating, wide
from jaxml.kan import bases
from jaxml.kan import layer as layers
from jaxml.kan.layer import BASE_FUNCTIONS, Spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conv:
    """Trained are `coef` and `base`.

    Example:
        >>> params = init(jax.random.key(0), (3, 8), (5,), Spec(grid=4, order=3))
        >>> params.coef.shape, params.base.shape
        ((7, 5, 3, 8), (5, 3, 8))
    """

    coef: Float[Array, "K *kernel I O"]
    base: Float[Array, "*kernel I O"]
    points: Float[Array, "I G1"]
    spec: Spec = dataclasses.field(metadata=dict(static=True))


def init(
    key: Array,
    channels: tuple[int, int],
    kernel: Sequence[int] = (3, 3),
    spec: Spec | None = None,
    *,
    domain: tuple[float, float] = (-1.0, 1.0),
    groups: int = 1,
    dtype=jnp.float32,
) -> Conv:
    """Random functions for a convolution of 1, 2 or 3 dimensions.

    Args:
        channels: (in, out).
        kernel: its extent along each spatial axis.
        domain: the grid of every channel.
        groups: of channels, convolved apart; to be given to `apply` too.

    Raises:
        ValueError: no or more than three spatial axes, groups that do not divide the channels.

    Example:
        >>> params = init(jax.random.key(0), (3, 8))
        >>> apply(params, jnp.zeros((2, 16, 16, 3)), strides=2).shape
        (2, 8, 8, 8)
    """
    if isinstance(kernel, Integral):
        square = (int(kernel),) * 2
        raise ValueError(f"kan.conv: kernel has an extent for each spatial axis, got {kernel}. Write {square}.")
    kernel = tuple(kernel)
    if not 1 <= len(kernel) <= 3 or min(kernel) < 1:
        raise ValueError(f"kan.conv: kernel has one to three extents of at least 1, got {kernel}.")
    if groups < 1 or channels[0] % groups or channels[1] % groups:
        raise ValueError(f"kan.conv: groups divide the channels, got {groups} groups and channels {channels}.")
    spec = spec or Spec()
    inputs, size = channels[0] // groups, math.prod(kernel)
    flat = layers.init(key, (size * inputs, channels[1]), spec, domain=domain, dtype=dtype)
    shape = (*kernel, inputs, channels[1])
    points = jnp.broadcast_to(flat.points[:1], (channels[0], flat.points.shape[1]))
    return Conv(flat.coef.reshape(spec.size, *shape), flat.base.reshape(shape), points, spec)


def apply(
    params: Conv,
    x: Float[Array, "N *spatial I"],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Array, "N *spatial O"]:
    """The convolution's outputs, in x's dtype.

    Args:
        x: channels last.
        padding: "SAME", "VALID" or (before, after) of each spatial axis.

    Raises:
        ValueError: another number of axes or channels.

    Example:
        >>> params = init(jax.random.key(0), (1, 1), (3,), Spec(base="identity"))
        >>> params = dataclasses.replace(params, coef=0 * params.coef, base=jnp.ones((3, 1, 1)))  # every function is x
        >>> apply(params, jnp.arange(4.0).reshape(1, 4, 1)).ravel().tolist()
        [1.0, 3.0, 6.0, 5.0]
    """
    spec, (*kernel, inputs, outputs) = params.spec, params.base.shape
    x = floating(x, params.coef.dtype)
    if x.ndim != len(kernel) + 2 or x.shape[-1] != inputs * groups:
        raise ValueError(f"kan.conv: x is [N, {len(kernel)} spatial axes, {inputs * groups}], got {x.shape}.")
    values = bases.BASES[spec.basis].values(x, params.points, spec).astype(x.dtype)  # [N, …, K, C]
    base = BASE_FUNCTIONS[spec.base](x)[..., None, :]
    maps = jnp.concatenate([values, base], axis=-2)
    # Channels of a group lie together: [N, …, groups, K + 1, I].
    maps = maps.reshape(*x.shape[:-1], spec.size + 1, groups, inputs).swapaxes(-3, -2)
    maps = maps.reshape(*x.shape[:-1], -1)
    weight = jnp.concatenate([params.coef, params.base[None]])  # [K + 1, *kernel, I, O]
    weight = jnp.moveaxis(weight, 0, len(kernel)).reshape(*kernel, -1, outputs).astype(x.dtype)
    each = lambda n: (n,) * len(kernel) if isinstance(n, Integral) else tuple(n)
    letters = "DHW"[-len(kernel) :]
    y = jax.lax.conv_general_dilated(
        maps,
        weight,
        each(strides),
        padding if isinstance(padding, str) else list(padding),
        rhs_dilation=each(dilation),
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        preferred_element_type=wide(x.dtype),
    )
    return y.astype(x.dtype)
