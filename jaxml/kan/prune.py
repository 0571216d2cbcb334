"""Smaller networks: without the nodes and edges that do not count.

Reference:
    Liu et al. 2024, "KAN: Kolmogorov–Arnold Networks", section 2.5.1; thresholds as in pykan's `prune`. Difference:
    what a removed edge added on average is given to an edge that stays, where its functions can hold a constant.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array, Bool, Float
from jaxml.kan import layer as layers
from jaxml.kan.attribution import Attribution, attribute
from jaxml.kan.layer import Layer
from jaxml.kan.network import KAN, Affine, nodes


def prune(params: KAN, x: Float[Array, "... I"], *, node: float = 1e-2, edge: float = 3e-2) -> KAN:
    """The network without nodes whose score is at most `node`, then without edges whose score is at most `edge`.

    Args:
        x: samples of the network's inputs, by which scores are taken (`attribute`).

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 5, 1])
        >>> kan.prune(params, jax.random.normal(jax.random.key(1), (50, 2)), node=0.3).widths
        (2, 3, 1)
    """
    return prune_edges(prune_nodes(params, x, node), x, edge)


def prune_nodes(params: KAN, x: Float[Array, "... I"], threshold: float = 1e-2) -> KAN:
    """The network without hidden nodes whose score is at most the threshold; of each layer the best node stays.

    Example:
        >>> from jaxml import kan
        >>> x = jax.random.normal(jax.random.key(1), (50, 2))
        >>> prune_nodes(kan.init(jax.random.key(0), [2, 5, 1]), x, 0.3).widths
        (2, 3, 1)
    """
    scores = jax.device_get(_scores(params, x).nodes[1:-1])
    kept = [np.flatnonzero((s > threshold) | (s == s.max())) for s in scores]
    return keep(params, x, kept)


def prune_edges(params: KAN, x: Float[Array, "... I"], threshold: float = 3e-2) -> KAN:
    """The network with the edges masked whose score is at most the threshold.

    Example:
        >>> from jaxml import kan
        >>> x = jax.random.normal(jax.random.key(1), (50, 2))
        >>> params = prune_edges(kan.init(jax.random.key(0), [2, 5, 1]), x, 0.1)
        >>> int(sum(layer.kept.sum() for layer in params.layers))
        14
    """
    scores = _scores(params, x).edges
    return mask(params, x, [s > threshold for s in scores])


def prune_inputs(params: KAN, x: Float[Array, "... I"], threshold: float = 1e-2) -> tuple[KAN, list[int]]:
    """(the network without inputs whose score is at most the threshold, the inputs that it still takes).

    Example:
        >>> from jaxml import kan
        >>> x = jax.random.normal(jax.random.key(1), (50, 3)).at[:, 2].set(0.0)
        >>> params, kept = prune_inputs(kan.init(jax.random.key(0), [3, 2, 1]), x)
        >>> kept, params.widths
        ([0, 1], (2, 2, 1))
    """
    score = np.asarray(_scores(params, x).nodes[0])
    kept = np.flatnonzero((score > threshold) | (score == score.max()))
    masked = mask(params, x, [jnp.zeros(params.layers[0].width, bool).at[kept].set(True), *_all(params)[1:]])
    first = _part(masked.layers[0], kept, np.arange(params.layers[0].width[1]))
    return dataclasses.replace(masked, layers=(first, *masked.layers[1:])), kept.tolist()


def _scores(params: KAN, x: Float[Array, "... I"]) -> Attribution:
    """Of samples that can tell what counts: scores are shares of spreads."""
    rows = jnp.asarray(x).reshape(-1, jnp.shape(x)[-1])
    bad = int(jnp.sum(~jnp.isfinite(rows)))
    if bad or not bool(jnp.any(rows[1:] != rows[:-1])):
        raise ValueError(
            f"kan.prune: x has finite values only, in rows that are not all equal, got {bad} not finite in {len(rows)} "
            "rows. Drop those rows, or hand over more."
        )
    return attribute(params, rows)


def keep(params: KAN, x: Float[Array, "... I"], kept: Sequence[Sequence[int]]) -> KAN:
    """The network with only these nodes in its hidden layers.

    Args:
        kept: of each hidden layer, the numbers of its nodes, ascending.

    Raises:
        ValueError: another number of hidden layers, a layer without nodes, a node that does not exist.

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 5, 1])
        >>> keep(params, jax.random.normal(jax.random.key(1), (50, 2)), [[0, 3]]).widths
        (2, 2, 1)
    """
    if len(kept) != len(params.layers) - 1:
        raise ValueError(f"kan.keep: kept names the nodes of {len(params.layers) - 1} hidden layers, got {len(kept)}.")
    edges, of_sums, arities = _all(params), [], []
    for n, numbers in enumerate(kept):
        adding = params.layers[n].width[1] - sum(params.arities[n])
        count = adding + len(params.arities[n])
        if not len(numbers) or min(numbers) < 0 or max(numbers) >= count or len(set(numbers)) < len(numbers):
            raise ValueError(f"kan.keep: hidden layer {n} keeps some of its {count} nodes, got {list(numbers)}.")
        starts = adding + np.cumsum([0, *params.arities[n]])
        runs = [[m] if m < adding else range(starts[m - adding], starts[m - adding + 1]) for m in sorted(numbers)]
        of_sums.append(np.concatenate([np.asarray(run) for run in runs]))
        arities.append(tuple(params.arities[n][m - adding] for m in sorted(numbers) if m >= adding))
        edges[n + 1] = edges[n + 1] & jnp.zeros(count, bool).at[np.asarray(numbers)].set(True)[:, None]
    # Edges out of a node that goes are masked first, so that their means stay with the sums they belonged to.
    params = mask(params, x, edges)
    into = [np.arange(params.layers[0].width[0]), *(np.sort(np.asarray(k)) for k in kept)]
    out = [*of_sums, np.arange(params.layers[-1].width[1])]
    affine = [
        a and Affine(a.inner_scale[o], a.inner_shift[o], a.outer_scale[k], a.outer_shift[k])
        for a, o, k in zip(params.affine, out, [*into[1:], np.arange(_outputs(params))])
    ]
    new = [_part(layer, i, o) for layer, i, o in zip(params.layers, into, out)]
    return KAN(tuple(new), tuple(affine), (*arities, params.arities[-1]))


def _outputs(params: KAN) -> int:
    return params.layers[-1].width[1] - sum(params.arities[-1]) + len(params.arities[-1])


def _all(params: KAN) -> list[Bool[Array, "I O"]]:
    return [jnp.ones(layer.width, bool) for layer in params.layers]


def _part(layer: Layer, into: np.ndarray, out: np.ndarray) -> Layer:
    """The layer between some of its inputs and some of its outputs."""
    old_into, old_out = {int(a): n for n, a in enumerate(into)}, {int(a): n for n, a in enumerate(out)}
    fixed = [
        dataclasses.replace(e, into=old_into[e.into], out=old_out[e.out])
        for e in layer.fixed
        if e.into in old_into and e.out in old_out
    ]
    mask = None if layer.mask is None else layer.mask[into][:, out]
    mask = None if mask is None or bool(jnp.all(mask == 1)) else mask
    return Layer(
        layer.coef[:, into][:, :, out], layer.base[into][:, out], layer.points[into], mask, tuple(fixed), layer.spec
    )


def mask(params: KAN, x: Float[Array, "... I"], kept: Sequence[Bool[Array, "I O"]]) -> KAN:
    """The network without the edges where `kept` is False; their mean over the samples stays in the sum.

    The mean goes into the coefficients of the sum's edge of the greatest spread, which splines can hold as a constant;
    where no edge with splines is left in a sum it is lost.
    """
    out, x = [], jnp.asarray(x).reshape(-1, jnp.shape(x)[-1])
    for layer, affine, arities, k in zip(params.layers, params.affine, params.arities, kept):
        sums = layers.apply(layer, x)
        out.append(_masked(layer, x, k))
        x = nodes(sums, affine, arities)
    return dataclasses.replace(params, layers=tuple(out))


def _masked(layer: Layer, x: Float[Array, "N I"], kept: Bool[Array, "I O"]) -> Layer:
    kept = np.asarray(kept)
    remains = np.asarray(layer.kept > 0) & kept
    fixed = tuple(e for e in layer.fixed if kept[e.into, e.out])
    if kept.all():
        return layer
    new = dataclasses.replace(layer, mask=layer.masked(jnp.asarray(kept, layer.base.dtype)), fixed=fixed)
    if layer.spec.basis != "bspline":
        return new
    values = layers.edges(layer, x)
    lost = jnp.sum(jnp.mean(values, axis=0) * ~kept, axis=0)
    strongest = jnp.argmax(jnp.where(remains, jnp.std(values, axis=0), -1.0), axis=0)
    share = jnp.where(jnp.asarray(remains.any(axis=0)), lost, 0) / jnp.maximum(
        jnp.take_along_axis(new.mask, strongest[None], axis=0)[0], jnp.finfo(new.mask.dtype).tiny
    )
    columns = jnp.arange(layer.width[1])
    return dataclasses.replace(new, coef=new.coef.at[:, strongest, columns].add(share.astype(new.coef.dtype)))
