"""Physics-informed training: networks that solve differential equations.

`solve` drives weighted residuals to 0 by Levenberg–Marquardt. The other functions are for training with an optimizer:
weights by residual, resampling, causal weights, balancing of terms; each is pure and takes and returns its state.

Reference:
    Anagnostopoulos et al. 2024, "Residual-based attention" (https://arxiv.org/abs/2307.00379), equation 5.
    Wu et al. 2023, "Non-adaptive and residual-based adaptive sampling" (https://arxiv.org/abs/2207.10289), RAD.
    Wang, Sankaran, Perdikaris 2022, "Respecting causality" (https://arxiv.org/abs/2203.07404), equation 3.7.
    Wang, Teng, Perdikaris 2021, "Understanding and mitigating gradient flow pathologies", section 2.5 (annealing).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxml import log
from jaxml.axes import Array, Float
from jaxml.kan import grid as grids_
from jaxml.kan import levenberg
from jaxml.kan.fit import ROUNDS, roughness, stages
from jaxml.kan.network import KAN, apply, combine, split

Residual = Callable[[Callable[[Array], Array], Array], Array]


def laplacian(u: Callable[[Array], Array], x: Float[Array, "I"]) -> Float[Array, ""]:
    """Σ ∂²u/∂x_i² of a function of one point, by forward mode over forward mode.

    Example:
        >>> float(laplacian(lambda x: x[0] ** 2 + 3 * x[1] ** 2, jnp.array([0.3, 0.7])))
        8.0
    """

    def along(direction):
        first = lambda x: jax.jvp(u, (x,), (direction,))[1]
        return jax.jvp(first, (x,), (direction,))[1]

    return sum(along(direction) for direction in jnp.eye(x.size, dtype=x.dtype))


def solve(
    params: KAN,
    terms: Sequence[tuple[Residual, Float[Array, "N I"], float]],
    *,
    grids: Sequence[int] | None = None,
    steps: int = 40,
    smooth: float = 1e-5,
    progress: bool = False,
) -> tuple[KAN, dict[str, Any]]:
    """The network u for which Σ_terms weight · mean residual(u, x)² is least.

    Args:
        params: of one output.
        terms: (residual(u, x) → [] or [R] of a function u of one point [I] and a point x, points, weight) of each
            equation: the interior, the boundary, measurements, …
        grids: numbers of cells, one after the other; the network's own where None.
        steps: of Levenberg–Marquardt on each grid; on the first one in three parts, between which it follows its input.
            Grids whose cells are not equally wide stay as they are.
        smooth: weight of the splines' roughness, as in `kan.fit`.

    Returns:
        The network, and a dictionary: "grids", "losses" (of every step).

    Raises:
        ValueError: shapes that do not fit, no terms, negative weights, residuals that are not finite.

    Example:
        >>> from jaxml import kan
        >>> slope = lambda u, x: jax.grad(u)(x)[0] - jnp.cos(x[0])  # u' = cos x, u(0) = 0
        >>> x = jnp.linspace(0.0, 3.0, 60)[:, None]
        >>> params, _ = solve(kan.init(jax.random.key(0), [1, 1], domain=(0.0, 3.0)),
        ...                   [(slope, x, 1.0), (lambda u, x: u(x), x[:1], 1.0)])
        >>> bool(jnp.allclose(kan.apply(params, x)[:, 0], jnp.sin(x[:, 0]), atol=2e-3))
        True
    """
    outputs = params.layers[-1].width[1] - sum(params.arities[-1]) + len(params.arities[-1])
    if outputs != 1 or any(x.ndim != 2 or x.shape[1] != params.widths[0] or not len(x) for _, x, _ in terms):
        shapes = [x.shape for _, x, _ in terms]
        raise ValueError(f"kan.pinn.solve: a network [{params.widths[0]}, …, 1] and points [N, {params.widths[0]}], "
                         f"got {outputs} outputs and points {shapes}.")  # fmt: skip
    smooth, weights = float(smooth), tuple(float(w) for _, _, w in terms)
    if not terms or not all(w >= 0 for w in (*weights, smooth)) or steps < 1:
        raise ValueError(
            "kan.pinn.solve: there are terms, their weights and smooth at least 0, steps at least 1, got "
            f"{list(weights)}, {smooth} and {steps}."
        )
    plan = stages(params, grids, "kan.pinn.solve")
    points = tuple(x for _, x, _ in terms)
    functions = tuple(r for r, _, _ in terms)
    losses: list[np.ndarray] = []
    with log.progress("solving", enabled=progress, fields=("grid", "loss")) as bar:
        task = bar.add_task("solve", total=len(plan), grid="–", loss="–")
        for n, cells in enumerate(plan):
            params = grids_.refine(params, cells)
            for count in [-(-steps // ROUNDS)] * ROUNDS if n == 0 else [steps]:
                params = grids_.update(params, jnp.concatenate(points)) if grids_.is_even(params) else params
                params, some = _stage(params, points, functions, weights, count, smooth)
                losses.append(np.asarray(some))
            bar.update(task, advance=1, grid=cells, loss=f"{losses[-1][-1]:.2e}")
    if not np.isfinite(losses[-1][-1]):
        raise ValueError(
            f"kan.pinn.solve: residuals are finite at all points, got a sum of squares of {losses[-1][-1]}. Leave out "
            "points where an equation divides by 0 or leaves a domain."
        )
    return params, {"grids": plan, "losses": losses}


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _stage(params: KAN, points, functions, weights, steps: int, smooth: float) -> tuple[KAN, Array]:
    trained, rest = split(params)
    theta, unravel = ravel_pytree(trained)
    whole = lambda theta: combine(unravel(theta), rest)
    # A row is a point and the number of its term; of each term the weight is spread over its points.
    rows = [jnp.concatenate([x, jnp.full((len(x), 1), n, x.dtype)], axis=1) for n, x in enumerate(points)]
    scale = [(w / len(x)) ** 0.5 for w, x in zip(weights, points)]

    def residuals(theta, row):
        u = lambda x: apply(whole(theta), x[None], implementation="fused")[0, 0]
        of = [lambda x, f=f, s=s: s * jnp.ravel(f(u, x)) for f, s in zip(functions, scale)]
        if len(of) == 1:
            return of[0](row[:-1])
        sizes = [jax.eval_shape(f, row[:-1]).size for f in of]
        padded = [lambda x, f=f, n=n: jnp.pad(f(x), (0, max(sizes) - n)) for f, n in zip(of, sizes)]
        return jax.lax.switch(row[-1].astype(jnp.int32), padded, row[:-1])

    penalty = lambda theta: smooth**0.5 * roughness(whole(theta))
    state, losses = levenberg.minimize(residuals, penalty, theta, jnp.concatenate(rows), steps=steps)
    return whole(state.theta), losses


# ---- for training with an optimizer -----------------------------------------------------------------


def attention_weights(
    weights: Float[Array, "N"], residuals: Float[Array, "N"], *, decay: float = 0.999, rate: float = 0.01
) -> Float[Array, "N"]:
    """Residual-based attention: w ← decay w + rate |r| / max |r|; multiply residuals by w before squaring.

    Example:
        >>> attention_weights(jnp.zeros(2), jnp.array([1.0, -2.0]), rate=0.5).tolist()
        [0.25, 0.5]
    """
    size = jnp.abs(jax.lax.stop_gradient(residuals))
    return decay * weights + rate * size / jnp.maximum(jnp.max(size), jnp.finfo(size.dtype).tiny)


def resample(
    key: Array,
    candidates: Float[Array, "M I"],
    residuals: Float[Array, "M"],
    count: int,
    *,
    power: float = 1.0,
    floor: float = 1.0,
) -> Float[Array, "count I"]:
    """Points drawn without replacement with probability ∝ |r|^power / mean |r|^power + floor.

    Raises:
        ValueError: more points than candidates.

    Example:
        >>> points = jnp.arange(4.0)[:, None]
        >>> sorted(resample(jax.random.key(0), points, jnp.array([0.0, 2.0, 0.0, -3.0]), 2, floor=0.0).ravel().tolist())
        [1.0, 3.0]
    """
    if count > len(candidates):
        raise ValueError(f"kan.pinn.resample: count is at most the {len(candidates)} candidates, got {count}.")
    size = jnp.abs(residuals) ** power
    weight = size / jnp.maximum(jnp.mean(size), jnp.finfo(size.dtype).tiny) + floor
    return candidates[jax.random.choice(key, len(candidates), (count,), replace=False, p=weight / jnp.sum(weight))]


def causal_weights(losses: Float[Array, "T"], tolerance: float = 1.0) -> Float[Array, "T"]:
    """exp(−tolerance Σ_{earlier} loss) of intervals of time in order, without gradient.

    Example:
        >>> causal_weights(jnp.zeros(3)).tolist()
        [1.0, 1.0, 1.0]
    """
    losses = jax.lax.stop_gradient(losses)
    return jnp.exp(-tolerance * (jnp.cumsum(losses) - losses))


def annealed(weights: Float[Array, "R"], gradients: Sequence[Any], *, decay: float = 0.9) -> Float[Array, "R"]:
    """Weights that bring the gradients of several terms to one size: λ ← decay λ + (1 − decay) Σ‖g‖ / ‖g_i‖.

    Args:
        gradients: a pytree of each term's unweighted loss.

    Example:
        >>> annealed(jnp.ones(2), [jnp.array([3.0]), jnp.array([1.0])], decay=0.0).round(1).tolist()[1]
        4.0
    """
    norms = jnp.stack([jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(tree))) for tree in gradients])
    wanted = jnp.sum(norms) / jnp.maximum(norms, jnp.finfo(norms.dtype).tiny)
    return decay * weights + (1 - decay) * wanted
