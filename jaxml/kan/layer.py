"""One layer of a Kolmogorov–Arnold network: a learnt function on every edge, summed at every node.

    y_o = Σ_i mask_io (w_io b(x_i) + Σ_j c_jio B_j(x_i)) + fixed functions of the x_i

Coefficients lie as [K, in, out], so that each basis function is one product of matrices: on CPU these are added up one
after the other (no array [..., K, in] is made), elsewhere they are one contraction, into which XLA fuses the basis.

Reference:
    Liu et al. 2024, "KAN: Kolmogorov–Arnold Networks", equations 2.10 to 2.12. Differences from pykan: the factor w_s
    of the spline is part of the coefficients; outside the grid the spline goes on in a straight line by default.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxml.axes import Array, Float, floating, wide
from jaxml.kan import bases, kernel

BASE_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "identity": lambda x: x,
    "zero": jnp.zeros_like,
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}
STARTS = ("power", "pykan", "glorot")
IMPLEMENTATIONS = ("split", "fused", "kernel")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a layer is no array.

    Args:
        grid: cells G of the grid, or the degree or number of functions of a basis without one.
        order: of the spline, 0 to 5.
        basis: a name in `bases.BASES`.
        base: of the function b beside the spline, a name in `BASE_FUNCTIONS`.
        outside: what the spline does beyond its grid (`bspline.OUTSIDE`).
        uniform: whether all cells of an input's grid are equally wide.

    Example:
        >>> Spec(grid=8, order=3).size, Spec(grid=8, basis="chebyshev").size
        (11, 9)
    """

    grid: int = 5
    order: int = 3
    basis: str = "bspline"
    base: str = "silu"
    outside: str = "linear"
    uniform: bool = True

    def __post_init__(self):
        bases.check(self)
        if self.base not in BASE_FUNCTIONS:
            raise ValueError(f"kan: base is one of {', '.join(BASE_FUNCTIONS)}, got {self.base!r}.")
        for name in ("grid", "order"):  # of NumPy too, whose integers no file would take
            object.__setattr__(self, name, int(getattr(self, name)))

    @property
    def size(self) -> int:
        """K, the number of basis functions."""
        return bases.BASES[self.basis].size(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters of a layer: trained are `coef`, `base` and the numbers of `fixed`.

    Example:
        >>> layer = init(jax.random.key(0), (2, 3), Spec(grid=4))
        >>> layer.coef.shape, layer.points[0].tolist()
        ((7, 2, 3), [-1.0, -0.5, 0.0, 0.5, 1.0])
        >>> dataclasses.replace(layer, mask=jnp.array([[1, 0, 1], [0, 0, 1]])).masked(jnp.ones((2, 3))).tolist()
        [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """

    coef: Float[Array, "K I O"]
    base: Float[Array, "I O"]
    points: Float[Array, "I G1"]  # the ends of the grid's cells
    mask: Float[Array, "I O"] | None  # 1, or 0 where an edge is pruned or stands fixed; None: all are there
    fixed: tuple[Any, ...]  # `symbolic.Edge`s: functions that stand where an edge was
    spec: Spec = dataclasses.field(metadata=dict(static=True))

    @property
    def width(self) -> tuple[int, int]:
        """(in, out)."""
        return self.base.shape

    @property
    def kept(self) -> Float[Array, "I O"]:
        """The mask as an array."""
        return jnp.ones_like(self.base) if self.mask is None else self.mask

    def masked(self, a: Float[Array, "... I O"]) -> Float[Array, "... I O"]:
        """An array of all edges with 0 where an edge is not there."""
        return a if self.mask is None else a * self.mask.astype(a.dtype).reshape((1,) * (a.ndim - 2) + self.mask.shape)


def init(
    key: Array,
    width: tuple[int, int],
    spec: Spec,
    *,
    domain: tuple[float, float] = (-1.0, 1.0),
    start: str = "power",
    noise: float = 0.3,
    dtype=jnp.float32,
) -> Layer:
    """A layer with random functions.

    Args:
        width: (in, out).
        domain: the grid of every input at first.
        start: "power": deviations 1 / √(K in) of coefficients and 1 / √in of base weights; "pykan": splines through
            uniform noise of size noise / 2G at the ends of the cells, base weights uniform in ±1 / √in; "glorot":
            deviations √(1 / (K in + out)) and √(2 / (in + out)).
        noise: of the start "pykan".

    Raises:
        ValueError: an unknown start, or a domain that is not (low, high), finite.

    Example:
        >>> layer = init(jax.random.key(0), (100, 50), Spec(grid=5, order=3))
        >>> layer.coef.shape, round(float(layer.coef.std() * 800**0.5), 1), round(float(layer.base.std() * 100**0.5), 1)
        ((8, 100, 50), 1.0, 1.0)
    """
    if start not in STARTS:
        raise ValueError(f"kan: start is one of {', '.join(STARTS)}, got {start!r}.")
    if not -math.inf < domain[0] < domain[1] < math.inf:
        raise ValueError(f"kan: domain is (low, high) with low < high, both finite, got {domain}.")
    n_in, n_out = width
    one, two = jax.random.split(key)
    shape = (spec.size, n_in, n_out)
    points = jnp.tile(jnp.linspace(*domain, spec.grid + 1, dtype=wide(dtype))[None], (n_in, 1))
    if start == "pykan":
        drawn = (jax.random.uniform(one, (spec.grid + 1, n_in, n_out), wide(dtype)) - 0.5) * noise / spec.grid
        coef = jnp.tensordot(bases.through(spec), drawn, 1).astype(dtype) / n_in**0.5
        base = jax.random.uniform(two, width, dtype, -1.0, 1.0) / n_in**0.5
    else:
        of_coef, of_base = (spec.size * n_in) ** -0.5, n_in**-0.5
        if start == "glorot":
            of_coef, of_base = (spec.size * n_in + n_out) ** -0.5, (2 / (n_in + n_out)) ** 0.5
        coef = of_coef * jax.random.normal(one, shape, dtype)
        base = of_base * jax.random.normal(two, width, dtype)
    return Layer(coef, base, points, None, (), spec)


def apply(layer: Layer, x: Float[Array, "... I"], *, implementation: str | None = None) -> Float[Array, "... O"]:
    """The layer's outputs, in x's dtype; basis functions are float32 or wider, products x's dtype with wide sums.

    Args:
        implementation: "split" (one product a basis function), "fused" (one contraction) or "kernel" (the basis is
            never stored: GPU and TPU, `jaxml.kan.kernel`); split on CPU and fused elsewhere where None.

    Raises:
        ValueError: an unknown implementation, or another number of inputs.
        NotImplementedError: the kernel cannot run here; says why.

    Example:
        >>> layer = init(jax.random.key(0), (2, 3), Spec())
        >>> x = jnp.array([[0.5, -0.2], [3.0, 0.0]])
        >>> apply(layer, x).shape, bool(jnp.allclose(apply(layer, x), edges(layer, x).sum(-2), atol=1e-5))
        ((2, 3), True)
    """
    x = _inputs(layer, x)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"kan: implementation is one of {', '.join(IMPLEMENTATIONS)} or None, got {implementation!r}.")
    flat = x.reshape(-1, x.shape[-1])
    if implementation is None and layer.spec.size > MOST_SPLIT:
        implementation = "fused"
    arguments = flat, layer.masked(layer.coef), layer.masked(layer.base), layer.points
    if implementation == "kernel":
        y = _by_kernel(layer.spec, *arguments)
    else:
        y = _sums(layer.spec, implementation, *arguments)
    for edge in layer.fixed:
        y = y.at[:, edge.out].add(edge(flat[:, edge.into].astype(y.dtype)))
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _inputs(layer: Layer, x) -> Array:
    x = floating(x, layer.coef.dtype)
    if not x.ndim or x.shape[-1] != layer.width[0]:
        raise ValueError(f"kan: the last axis of x is the layer's {layer.width[0]} inputs, got shape {x.shape}.")
    return x


MOST_SPLIT = 40  # basis functions; a product each takes its time to compile


@functools.partial(jax.jit, static_argnums=(0, 1))  # or every call out of `jit` would compile a choice of platform
def _sums(spec: Spec, implementation: str | None, *arguments: Array) -> Array:
    split, fused = functools.partial(_split, spec), functools.partial(_fused, spec)
    if implementation is None:
        return jax.lax.platform_dependent(*arguments, cpu=split, default=fused)
    return (split if implementation == "split" else fused)(*arguments)


def _by_kernel(spec: Spec, x: Array, coef: Array, base: Array, points: Array) -> Array:
    if reason := kernel.unsupported(spec, x.dtype):
        raise NotImplementedError(f"kan: the kernel cannot run here: {reason}. Take another implementation, or None.")
    return _base(spec, x, base) + kernel.sums(spec, x, coef, points)


def _split(spec: Spec, x: Array, coef: Array, base: Array, points: Array) -> Array:
    sums = lambda x: _basis_sum(spec, False, x, coef, points)
    blocks = _blocks(x, spec.size)
    if blocks > 1:
        y = jax.lax.map(jax.checkpoint(sums), x.reshape(blocks, -1, x.shape[1])).reshape(len(x), -1)
    else:
        y = sums(x)
    return _base(spec, x, base) + y


def _blocks(x: Array, size: int) -> int:
    """How many blocks of rows, one after the other, keep what a gradient needs below 32 MiB.

    From there on malloc asks the system for new pages in each step, and touching them costs a third of its time
    (`benchmarks/kan.py`, width 256, grid 20).
    """
    blocks, needed = 1, 2 * size * x.size * wide(x.dtype).itemsize
    if needed > 24 * 2**20:
        while needed > blocks * 14 * 2**20 and len(x) % (2 * blocks) == 0:
            blocks *= 2
    return blocks


def _fused(spec: Spec, x: Array, coef: Array, base: Array, points: Array) -> Array:
    sums = _basis_sum if spec.size <= MOST_SPLIT else _sum_of_basis
    return _base(spec, x, base) + sums(spec, True, x, coef, points)


def _base(spec: Spec, x: Array, base: Array) -> Array | int:
    return _times(BASE_FUNCTIONS[spec.base](x), base) if spec.base != "zero" else 0


def _sum_of_basis(spec: Spec, fused: bool, x: Array, coef: Array, points: Array) -> Array:
    """Σ_k B_k(x) C_k."""
    basis = bases.BASES[spec.basis]
    if not fused:
        return sum(_times(value.astype(x.dtype), c) for value, c in zip(basis.each(x, points, spec), _each(coef)))
    values = basis.values(x, points, spec).astype(x.dtype)
    return jnp.einsum("bki,kio->bo", values, coef.astype(x.dtype), preferred_element_type=wide(x.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _basis_sum(spec: Spec, fused: bool, x: Array, coef: Array, points: Array) -> Array:
    """The same, whose tangent by x is Σ_k (B'_k(x) dx) C_k: transposed, no array [..., K, in] of cotangents is made."""
    return _sum_of_basis(spec, fused, x, coef, points)


def _basis_sum_jvp(spec, fused, primals, tangents):
    x, coef, points = primals
    dx, dcoef, dpoints = tangents
    is_zero = lambda t: isinstance(t, SymbolicZero)
    y = _sum_of_basis(spec, fused, x, coef, points)
    out = jnp.zeros_like(y)
    if not is_zero(dx):
        out = out + _moved(spec, x, dx, coef, points)
    if not is_zero(dcoef):
        out = out + _sum_of_basis(spec, fused, x, dcoef, points)
    if not is_zero(dpoints):
        out = out + jax.jvp(lambda points: _sum_of_basis(spec, fused, x, coef, points), (points,), (dpoints,))[1]
    return y, out


def _moved(spec: Spec, x: Array, dx: Array, coef: Array, points: Array) -> Array:
    """Σ_k (B'_k(x) dx) C_k."""
    each = lambda x: tuple(bases.BASES[spec.basis].each(x, points, spec))
    slopes = jax.jvp(each, (x,), (jnp.ones_like(x),))[1]
    return sum(_times(slope.astype(x.dtype) * dx, c) for slope, c in zip(slopes, _each(coef)))


def _each(coef: Float[Array, "K I O"]) -> list[Float[Array, "I O"]]:
    """Its K parts by one `split`, whose transpose is one concatenation; that of K slices adds up K padded arrays."""
    return [c[0] for c in jax.lax.split(coef, [1] * len(coef))]


_basis_sum.defjvp(_basis_sum_jvp, symbolic_zeros=True)


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=wide(a.dtype))


def edges(layer: Layer, x: Float[Array, "... I"]) -> Float[Array, "... I O"]:
    """The function of every edge at x, masked ones at 0: what `apply` sums over the inputs.

    Example:
        >>> layer = init(jax.random.key(0), (2, 2), Spec(base="identity"))
        >>> lines = dataclasses.replace(layer, coef=0 * layer.coef, base=jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> edges(lines, jnp.array([1.0, 10.0])).tolist()
        [[1.0, 2.0], [30.0, 40.0]]
    """
    x = _inputs(layer, x)
    flat = x.reshape(-1, x.shape[-1])
    values = bases.BASES[layer.spec.basis].values(flat, layer.points, layer.spec)
    out = jnp.einsum("bki,kio->bio", values.astype(x.dtype), layer.coef.astype(x.dtype))
    out = layer.masked(out + BASE_FUNCTIONS[layer.spec.base](flat)[..., None] * layer.base.astype(x.dtype)[None])
    for edge in layer.fixed:
        out = out.at[:, edge.into, edge.out].add(edge(flat[:, edge.into]))
    return out.reshape(*x.shape[:-1], *layer.width)
