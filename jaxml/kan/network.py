"""A network of layers, with nodes that add and nodes that multiply.

Reference:
    Liu et al. 2024, "KAN: Kolmogorov–Arnold Networks"; "KAN 2.0", section 2 (multiplication nodes).
"""

import dataclasses
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Float, floating
from jaxml.kan import layer as layers
from jaxml.kan.layer import Layer, Spec

Width = int | tuple[int, int] | tuple[int, Sequence[int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """Scale and shift of what a layer sums up, before and after its products; pykan's, and not trained.

    Example:
        >>> affine = Affine(jnp.array([2.0]), jnp.array([1.0]), jnp.array([10.0]), jnp.array([5.0]))
        >>> nodes(jnp.array([3.0]), affine, ()).tolist()  # 10 (2 · 3 + 1) + 5
        [75.0]
    """

    inner_scale: Float[Array, "SUMS"]
    inner_shift: Float[Array, "SUMS"]
    outer_scale: Float[Array, "O"]
    outer_shift: Float[Array, "O"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KAN:
    """Everything of a network: a pytree to train, to checkpoint and to hand to `apply`.

    Example:
        >>> params = init(jax.random.key(0), [2, (3, 2), 1])
        >>> params.widths, params.layers[0].coef.shape
        ((2, (3, (2, 2)), 1), (8, 2, 7))
    """

    layers: tuple[Layer, ...]
    affine: tuple[Affine | tuple, ...]  # of each layer; () where there is none
    arities: tuple[tuple[int, ...], ...] = dataclasses.field(metadata=dict(static=True))  # of its multiplying nodes

    @property
    def widths(self) -> tuple[Any, ...]:
        """As `init` takes them."""
        first = self.layers[0].width[0]
        return (first, *((n - sum(a), a) if a else n for n, a in self._sums()))

    def _sums(self):
        return [(layer.width[1], arity) for layer, arity in zip(self.layers, self.arities)]


def check(params: KAN) -> KAN:
    """The network, if its layers fit each other.

    Raises:
        ValueError: no layers; arrays, fixed functions or products that do not belong to a layer's nodes.

    Example:
        >>> params = init(jax.random.key(0), [2, 3, 1])
        >>> check(params).widths
        (2, 3, 1)
        >>> check(dataclasses.replace(params, arities=((), (2,))))
        Traceback (most recent call last):
            ...
        ValueError: kan: layer 1 multiplies at most its 1 sums, got [2].
    """
    counts = [len(part) for part in (params.layers, params.affine, params.arities)]
    if len(set(counts)) > 1 or not counts[0]:
        raise ValueError(f"kan: a network has layers, with as many scales and arities, got {counts}.")
    n_in = params.layers[0].width[0]
    for n, (layer, affine, arities) in enumerate(zip(params.layers, params.affine, params.arities)):
        sums = layer.width[1]
        if layer.width[0] != n_in:
            raise ValueError(f"kan: layer {n} takes the {n_in} nodes before it, got {layer.width[0]}.")
        if not all(isinstance(a, int) and a >= 1 for a in arities) or sum(arities) > sums:
            raise ValueError(f"kan: layer {n} multiplies at most its {sums} sums, got {list(arities)}.")
        n_in = sums - sum(arities) + len(arities)
        shapes = [(layer.spec.size, *layer.width), layer.width, (layer.width[0], layer.spec.grid + 1), layer.width]
        if (got := [a.shape for a in (layer.coef, layer.base, layer.points, layer.kept)]) != shapes:
            raise ValueError(f"kan: layer {n} has arrays of the shapes {shapes}, got {got}.")
        points = np.asarray(layer.points, np.float64)
        if not np.isfinite(points).all() or (np.diff(points, axis=1) <= 0).any():
            raise ValueError(f"kan: the grids of layer {n} are finite and increase, these do not.")
        if affine and (got := [a.shape for a in jax.tree.leaves(affine)]) != [(sums,), (sums,), (n_in,), (n_in,)]:
            raise ValueError(f"kan: layer {n} has scales of {sums} sums and {n_in} nodes, got {got}.")
        for edge in layer.fixed:
            fits = all(isinstance(i, int) and 0 <= i < size for i, size in zip((edge.into, edge.out), layer.width))
            if not fits or edge.numbers.shape != (4,):
                raise ValueError(
                    f"kan: an edge of layer {n} goes from one of {layer.width[0]} inputs to one of {sums} sums with 4 "
                    f"numbers, got {edge.into}, {edge.out} and {edge.numbers.shape}."
                )
    return params


def init(
    key: Array,
    widths: Sequence[Width],
    *,
    grid: int = 5,
    order: int = 3,
    basis: str = "bspline",
    base: str = "silu",
    outside: str = "linear",
    domain: tuple[float, float] = (-1.0, 1.0),
    arity: int = 2,
    start: str = "power",
    noise: float = 0.3,
    dtype=jnp.float32,
) -> KAN:
    """A network with random functions on its edges.

    Args:
        widths: of the inputs and of each layer: n nodes that add; (n, m): n that add and m that multiply `arity` sums
            each; (n, [a, b, …]): n that add and one that multiplies a sums, one that multiplies b, …
        grid, order, basis, base, outside: of all edges, as `layer.Spec` says.
        domain, start, noise: as `layer.init` says.
        arity: of nodes that multiply.

    Raises:
        ValueError: fewer than two widths, an empty one, an option that does not exist.

    Example:
        >>> params = init(jax.random.key(0), [2, 5, 1])
        >>> apply(params, jnp.zeros((7, 2))).shape
        (7, 1)
        >>> init(jax.random.key(0), [2, (3, 2), 1]).widths
        (2, (3, (2, 2)), 1)
    """
    parsed = [_parse(width, arity) for width in widths]
    if len(parsed) < 2 or parsed[0][1]:
        raise ValueError(f"kan: widths are at least two, the first a number of inputs, got {list(widths)}.")
    if any(n + len(many) < 1 for n, many in parsed):
        raise ValueError(f"kan: every width has a node, got {list(widths)}.")
    spec = Spec(grid=grid, order=order, basis=basis, base=base, outside=outside)
    keys = jax.random.split(key, len(parsed) - 1)
    made = []
    for k, (n, many), (m, times) in zip(keys, parsed, parsed[1:]):
        shape = (n + len(many), m + sum(times))
        made.append(layers.init(k, shape, spec, domain=domain, start=start, noise=noise, dtype=dtype))
    return KAN(tuple(made), ((),) * len(made), tuple(many for _, many in parsed[1:]))


def _parse(width: Width, arity: int) -> tuple[int, tuple[int, ...]]:
    """(adding nodes, the arities of multiplying nodes)."""
    if isinstance(width, Integral):
        return int(width), ()
    is_pair = isinstance(width, Sequence) and len(width) == 2
    if not is_pair or not all(isinstance(n, Integral) for n in (width[0], *np.ravel(width[1]))):
        raise ValueError(f"kan: a width is n, (n, m) or (n, [a, b, …]), all whole numbers, got {width!r}.")
    n, many = width
    if min(n, many if isinstance(many, Integral) else 0) < 0:
        raise ValueError(f"kan: a width counts nodes, got {width}.")
    n, many = int(n), (arity,) * many if isinstance(many, Integral) else tuple(map(int, many))
    if any(a < 2 for a in many):
        raise ValueError(f"kan: a node multiplies at least two sums, got {width}.")
    return n, many


def apply(
    params: KAN, x: Float[Array, "... I"], *, edges: bool = False, implementation: str | None = None
) -> Float[Array, "... O"] | tuple[Array, list[dict[str, Array]]]:
    """The network's outputs, in x's dtype.

    Args:
        x: any leading axes.
        edges: return as well, of each layer, a dictionary: "inputs" [..., I], "edges" [..., I, O] (the function of
            every edge), "sums" [..., O], "outputs" (after multiplying nodes).
        implementation: as in `layer.apply`.

    Raises:
        ValueError: another number of inputs than the network has.

    Example:
        >>> params = init(jax.random.key(0), [2, 5, 1])
        >>> apply(params, jnp.zeros((7, 2))).shape
        (7, 1)
    """
    told, x = [], floating(x, params.layers[0].coef.dtype)
    for layer, affine, arities in zip(params.layers, params.affine, params.arities):
        if edges:
            values = layers.edges(layer, x)
            sums = values.sum(axis=-2)
        else:
            sums = layers.apply(layer, x, implementation=implementation)
        out = nodes(sums, affine, arities)
        if edges:
            told.append({"inputs": x, "edges": values, "sums": sums, "outputs": out})
        x = out
    return (x, told) if edges else x


def nodes(sums: Float[Array, "... S"], affine: Affine | tuple, arities: tuple[int, ...]) -> Float[Array, "... O"]:
    """Sums as they are, then the products of the others.

    Example:
        >>> nodes(jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), (), (2, 2)).tolist()
        [1.0, 6.0, 20.0]
    """
    has_affine = isinstance(affine, Affine)
    line = lambda a, scale, shift: a * _row(scale, a) + _row(shift, a)
    if has_affine:
        sums = line(sums, affine.inner_scale, affine.inner_shift)
    if arities:
        adding = sums.shape[-1] - sum(arities)
        parts, at = [sums[..., :adding]], adding
        for arity in arities:
            product = sums[..., at]
            for n in range(1, arity):  # one after the other: `prod` has no derivative where two are 0
                product = product * sums[..., at + n]
            parts.append(product[..., None])
            at += arity
        sums = jnp.concatenate(parts, axis=-1)
    return line(sums, affine.outer_scale, affine.outer_shift) if has_affine else sums


def _row(a: Array, like: Array) -> Array:
    return a.astype(like.dtype).reshape((1,) * (like.ndim - 1) + a.shape)


# ---- trained and not --------------------------------------------------------------------------------


def split(params: KAN) -> tuple[KAN, KAN]:
    """(what is trained, the rest): two trees of the same structure with None where the other has something.

    Trained are coefficients, base weights and the numbers of fixed functions; grids, masks and affine parts are not.

    Example:
        >>> trained, rest = split(init(jax.random.key(0), [2, 1]))
        >>> [leaf.shape for leaf in jax.tree.leaves(trained)], combine(trained, rest).layers[0].points.shape
        ([(8, 2, 1), (2, 1)], (2, 6))
    """
    none = lambda tree: jax.tree.map(lambda _: None, tree)
    trained = [dataclasses.replace(layer, points=None, mask=None) for layer in params.layers]
    rest = [dataclasses.replace(layer, coef=None, base=None, fixed=none(layer.fixed)) for layer in params.layers]
    return (
        dataclasses.replace(params, layers=tuple(trained), affine=none(params.affine)),
        dataclasses.replace(params, layers=tuple(rest)),
    )


def combine(trained: KAN, rest: KAN) -> KAN:
    """The network that `split` took apart.

    Example:
        >>> params = init(jax.random.key(0), [2, 1])
        >>> jax.tree.structure(combine(*split(params))) == jax.tree.structure(params)
        True
    """
    return jax.tree.map(lambda a, b: b if a is None else a, trained, rest, is_leaf=lambda a: a is None)
