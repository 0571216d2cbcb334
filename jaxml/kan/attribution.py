"""How much each edge and node counts, and the penalty that makes few of them count.

The spread of an edge over the samples is √(aᵀ C a): `a` its coefficients, C the covariance of the basis functions of
its input. One matrix an input and no array [samples, inputs, outputs], whatever the number of outputs.

Reference:
    Liu et al. 2024, "KAN: Kolmogorov–Arnold Networks", section 2.5.1 (sparsification); "KAN 2.0", section 4.1
    (attribution). Metrics, constants and what no gradient passes through are pykan's (`MultKAN.reg`, `attribute`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float, wide
from jaxml.kan import bases
from jaxml.kan import layer as layers
from jaxml.kan.layer import Layer
from jaxml.kan.network import KAN, nodes

METRICS = ("edge_forward_spline_n", "edge_forward_spline_u", "edge_forward_sum", "edge_backward", "node_backward")


class Spread(NamedTuple):
    """Standard deviations over the samples, of one layer."""

    inputs: Float[Array, "I"]
    splines: Float[Array, "I O"]  # of edges without their fixed functions
    edges: Float[Array, "I O"]
    sums: Float[Array, "O"]


class Attribution(NamedTuple):
    """Scores: shares of the outputs' spread, passed back from the nodes of one layer to the inputs.

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 5, 1])
        >>> scores = kan.attribute(params, jax.random.normal(jax.random.key(1), (50, 2)))
        >>> [s.shape for s in scores.nodes], [s.shape for s in scores.edges]
        ([(2,), (5,), (1,)], [(2, 5), (5, 1)])
    """

    nodes: tuple[Float[Array, "... W"], ...]  # of the inputs, then of each layer's nodes
    sums: tuple[Float[Array, "... S"], ...]  # of what each layer sums up, before products
    edges: tuple[Float[Array, "... I O"], ...]


def spreads(params: KAN, x: Float[Array, "... I"]) -> list[Spread]:
    """The spread of everything in the network over the samples x.

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 5, 1])
        >>> [s.edges.shape for s in spreads(params, jax.random.normal(jax.random.key(1), (50, 2)))]
        [(2, 5), (5, 1)]
    """
    out, x = [], x.reshape(-1, x.shape[-1])
    for layer, affine, arities in zip(params.layers, params.affine, params.arities):
        sums = layers.apply(layer, x)
        splines = edge_spread(layer, x)
        edges = splines
        for edge in layer.fixed:
            # Beside a fixed function an edge has no spline left, unless both were asked for.
            whole = layers.edges(layer, x)[:, edge.into, edge.out, None]
            edges = edges.at[edge.into, edge.out].set(_deviation(whole)[0].astype(edges.dtype))
        out.append(Spread(_deviation(x), splines, edges, _deviation(sums)))
        x = nodes(sums, affine, arities)
    return out


def edge_spread(layer: Layer, x: Float[Array, "N I"]) -> Float[Array, "I O"]:
    """Standard deviation of each edge's spline and base function over the samples, divided by N − 1 as in torch."""
    a, factors = features(layer, x)
    variance = jnp.einsum("kio,ikl,lio->io", a, factors, a)
    return _root(variance)


def features(layer: Layer, x: Float[Array, "N I"]) -> tuple[Float[Array, "K1 I O"], Float[Array, "I K1 K1"]]:
    """(coefficients and base weights of the edges, covariance of what they weigh)."""
    values = bases.BASES[layer.spec.basis].values(x, layer.points, layer.spec)
    base = layers.BASE_FUNCTIONS[layer.spec.base](x.astype(values.dtype))
    f = jnp.concatenate([values, base[:, None]], axis=1)
    f = f - jnp.mean(f, axis=0, keepdims=True)
    covariance = jnp.einsum("nki,nli->ikl", f, f, precision="highest") / max(1, len(x) - 1)
    a = layer.masked(jnp.concatenate([layer.coef, layer.base[None]]))
    return a.astype(covariance.dtype), covariance


def _deviation(x: Float[Array, "N W"]) -> Float[Array, "W"]:
    x = x.astype(wide(x.dtype))
    return _root(jnp.sum((x - jnp.mean(x, axis=0, keepdims=True)) ** 2, axis=0) / max(1, len(x) - 1))


def _root(x: Array) -> Array:
    """√x, whose slope at 0 is 0."""
    is_positive = x > 0
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1)), 0)


# ---- scores -----------------------------------------------------------------------------------------


def attribute(params: KAN, x: Float[Array, "... I"], *, layer: int | None = None, mean: bool = True) -> Attribution:
    """Scores of nodes and edges: a sum's score is divided among its edges as their spreads, and so on to the inputs.

    Args:
        x: samples of the network's inputs.
        layer: begin at the nodes behind this many layers, each with its own score; at the outputs, each 1, where None.
        mean: over the nodes begun at; where False every score has an axis of them in front.

    Raises:
        ValueError: a layer that the network does not have.

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 5, 1])
        >>> scores = attribute(params, jax.random.normal(jax.random.key(1), (50, 2)))
        >>> [s.shape for s in scores.nodes]
        [(2,), (5,), (1,)]
    """
    depth = len(params.layers)
    if layer is not None and not 0 < layer <= depth:
        raise ValueError(f"kan.attribute: layer is in 1 … {depth}, got {layer}.")
    found = spreads(params, x)
    start = jnp.eye(_width(params, depth), dtype=found[0].edges.dtype)
    scores = _passed_back(params, found, depth, start)
    if layer is not None:
        scores = _passed_back(params, found, layer, jnp.diag(jnp.mean(scores.nodes[layer], axis=0)))
    return jax.tree.map(lambda a: jnp.mean(a, axis=0), scores) if mean else scores


def _width(params: KAN, depth: int) -> int:
    arities = params.arities[depth - 1]
    return params.layers[depth - 1].width[1] - sum(arities) + len(arities)


def _passed_back(params: KAN, found: list[Spread], depth: int, score: Float[Array, "Q W"]) -> Attribution:
    nodes_, sums, edges = [score], [], []
    for n in reversed(range(depth)):
        arities, spread = params.arities[n], found[n]
        adding = spread.sums.size - sum(arities)
        parts = [score[:, :adding]]
        parts += [jnp.repeat(score[:, adding + m : adding + m + 1], a, axis=1) for m, a in enumerate(arities)]
        of_sums = jnp.concatenate(parts, axis=1)
        share = spread.edges / (jax.lax.stop_gradient(spread.sums) + 1e-4)[None]
        of_edges = of_sums[:, None] * share[None]
        score = jnp.sum(of_edges, axis=2)
        nodes_.append(score)
        sums.append(of_sums)
        edges.append(of_edges)
    return Attribution(tuple(nodes_[::-1]), tuple(sums[::-1]), tuple(edges[::-1]))


def interactions(
    params: KAN, x: Float[Array, "... I"], layer: int, *, node: float = 1e-2, feature: float = 1e-2
) -> dict[tuple[int, ...], int]:
    """Which inputs meet in the nodes behind `layer` layers: {inputs: number of nodes that depend on exactly these}.

    Args:
        node: nodes no input of which scores more are left out.
        feature: an input counts for a node from this share of the node's best input.

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 3, 1])
        >>> interactions(params, jax.random.normal(jax.random.key(1), (50, 2)), 1, node=0.0)
        {(0, 1): 3}
    """
    scores = jax.device_get(attribute(params, x, layer=layer, mean=False).nodes[0])
    out: dict[tuple[int, ...], int] = {}
    for row in scores:
        if row.max() > node:
            of = tuple(int(i) for i in (row > feature * row.max()).nonzero()[0])
            out[of] = out.get(of, 0) + 1
    return out


# ---- penalty ----------------------------------------------------------------------------------------


def regularizer(
    params: KAN,
    x: Float[Array, "... I"],
    *,
    metric: str = "edge_forward_spline_n",
    l1: float = 1.0,
    entropy: float = 2.0,
    coef: float = 0.0,
    coef_diff: float = 0.0,
) -> Float[Array, ""]:
    """What to add to a loss, times a small factor, so that few edges remain.

    Of every layer, with A the metric [I, O] of its edges: l1 · ΣA + entropy · (H(A by output) + H(A by input)).

    Args:
        metric: "edge_forward_spline_n" (spread of the spline over that of its input), "edge_forward_spline_u" (spread
            of the edge), "edge_forward_sum" (spread of the edge over that of its input, no gradient), "edge_backward"
            (scores of edges as `attribute` gives them), "node_backward" (of the inputs for every node).
        coef, coef_diff: weights of Σ mean |c| and of Σ mean |differences of c along the grid|. (The factor w_s of
            pykan's splines is part of our c.)

    Raises:
        ValueError: a metric that does not exist.

    Example:
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 5, 1])
        >>> float(regularizer(params, jax.random.normal(jax.random.key(1), (50, 2)))) > 0
        True
    """
    total = 0.0
    for a in measures(params, x, metric):
        total = total + l1 * jnp.sum(a) + entropy * (entropy_of(a, axis=0) + entropy_of(a, axis=1))
    for layer in params.layers:
        total = total + coef * jnp.sum(jnp.mean(jnp.abs(layer.coef), axis=2))
        total = total + coef_diff * jnp.sum(jnp.mean(jnp.abs(jnp.diff(layer.coef, axis=0)), axis=2))
    return total


def measures(params: KAN, x: Float[Array, "... I"], metric: str) -> list[Float[Array, "I O"]]:
    """What the regularizer looks at, one array a layer."""
    if metric not in METRICS:
        raise ValueError(f"kan.regularizer: metric is one of {', '.join(METRICS)}, got {metric!r}.")
    found = spreads(params, x)
    if metric == "edge_forward_spline_n":
        return [s.splines / (s.inputs + 0.1)[:, None] for s in found]
    if metric == "edge_forward_spline_u":
        return [s.edges for s in found]
    if metric == "edge_forward_sum":
        return [jax.lax.stop_gradient(s.edges / (s.inputs + 0.1)[:, None]) for s in found]
    depth = len(params.layers)
    whole = _passed_back(params, found, depth, jnp.eye(_width(params, depth), dtype=found[0].edges.dtype))
    if metric == "edge_backward":
        return [jnp.mean(a, axis=0) for a in whole.edges]
    begin = [jnp.diag(jnp.mean(a, axis=0)) for a in whole.nodes]
    return [_passed_back(params, found, n, begin[n]).nodes[0].T for n in range(1, depth + 1)]


def entropy_of(a: Float[Array, "I O"], axis: int) -> Float[Array, ""]:
    """In bits, of the shares along an axis, the mean over the other one."""
    p = a / (jnp.sum(a, axis=axis, keepdims=True) + 1)
    return -jnp.mean(jnp.sum(p * jnp.log2(p + 1e-4), axis=axis))
