"""AdaLoRA's optimizer: ranks taken away where they count least, until the budget is reached."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxml.axes import Array, Params, wide


class AdaLoRAState(NamedTuple):
    """`average` and `uncertainty` are lists, of each adapter the factors {a, diagonal, b}.

    Example:
        >>> trainable = {"q": {"a": jnp.ones((4, 2)), "diagonal": jnp.zeros(2), "b": jnp.ones((2, 3))}}
        >>> state = optimizer(optax.sgd(0.1), target_rank=1, steps=10).init(trainable)
        >>> state.step.item(), {name: a.shape for name, a in state.average[0].items()}
        (0, {'a': (4, 2), 'b': (2, 3), 'diagonal': (2,)})
    """

    step: Array  # int32, steps done
    average: Any  # of |parameter × gradient|
    uncertainty: Any  # of how far that is from its average
    inner: Any


def optimizer(
    inner: optax.GradientTransformation,
    *,
    target_rank: int,
    steps: int,
    begin: int = 0,
    end: int = 0,
    every: int = 1,
    b1: float = 0.85,
    b2: float = 0.85,
    orthogonal: float = 0.5,
) -> optax.GradientTransformation:
    """The inner optimizer, after whose steps singular values of little importance are set to 0.

    Importance of a triplet (a column of A, its e, a row of B): that of e and the means of the two others', each the
    product of a smoothed |parameter × gradient| and its smoothed deviation. The budget falls from all ranks to
    `target_rank` for each matrix on average, along a cubic.

    Args:
        inner: any Optax optimizer; sees the gradients and those of the regulariser below.
        target_rank: of a matrix, on average, in the end.
        steps: of the whole training.
        begin: steps before the first rank goes.
        end: steps after the last one has gone.
        every: steps between the choices.
        b1, b2: of the two averages.
        orthogonal: factor of the mean of ‖AᵀA − I‖ and ‖B Bᵀ − I‖ (Frobenius), whose gradient is added.

    Raises:
        ValueError: no AdaLoRA in the tree, begin + end not below steps, a target above the rank.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), method="adalora", rank=6)
        >>> trainable, frozen = adapters.split(params)
        >>> tx = optimizer(optax.adam(1e-3), target_rank=4, steps=100, begin=10, end=20)
        >>> updates, state = tx.update(trainable, tx.init(trainable), trainable)

    Reference:
        Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", algorithm 1; constants and
        the regulariser's mean as PEFT has them.
    """
    if begin + end >= steps:
        raise ValueError(f"adalora.optimizer: begin + end is below steps, got {begin} + {end} of {steps}.")

    def init(params: Params) -> AdaLoRAState:
        found = _triplets(params)
        if not found:
            raise ValueError("adalora.optimizer: the trainable tree has AdaLoRA's factors (a, diagonal, b), got none.")
        for t in found:
            if not 1 <= target_rank <= t["diagonal"].shape[-1]:
                raise ValueError(
                    f"adalora.optimizer: target_rank is in 1 … {t['diagonal'].shape[-1]}, got {target_rank}."
                )
        zeros = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, wide(a.dtype)), found)
        return AdaLoRAState(jnp.zeros((), jnp.int32), zeros(), zeros(), inner.init(params))

    def update(grads, state: AdaLoRAState, params: Params):
        if params is None:
            raise ValueError("adalora.optimizer: update is given the parameters, got None.")
        grads = jax.tree.map(lambda g, r: g + (orthogonal * r).astype(g.dtype), grads, jax.grad(regulariser)(params))
        updates, inner_state = inner.update(grads, state.inner, params)
        after, step = _triplets(optax.apply_updates(params, updates)), state.step + 1
        sensitivity = jax.tree.map(lambda p, g: jnp.abs(p * g).astype(wide(p.dtype)), after, _triplets(grads))
        mean = lambda b: lambda old, new: b * old + (1 - b) * new
        average = jax.tree.map(mean(b1), state.average, sensitivity)
        distance = jax.tree.map(lambda s, a: jnp.abs(s - a), sensitivity, average)
        uncertainty = jax.tree.map(mean(b2), state.uncertainty, distance)
        scores = [_score(s) for s in jax.tree.map(jnp.multiply, average, uncertainty)]
        total, matrices = sum(s.size for s in scores), sum(s.size // s.shape[-1] for s in scores)
        budget, choose = _budget(step, total, target_rank * matrices, steps, begin, end, every)
        removed = total - budget
        ordered = jnp.sort(jnp.concatenate([s.reshape(-1) for s in scores]))
        threshold = ordered[jnp.maximum(removed - 1, 0)]
        keeps = [~(choose & (removed > 0) & (s <= threshold)) for s in scores]
        updates = _with_diagonals(updates, params, keeps)
        return updates, AdaLoRAState(step, average, uncertainty, inner_state)

    return optax.GradientTransformation(init, update)


def regulariser(params: Params) -> Array:
    """Mean over all A and B of ‖AᵀA − I‖ and ‖B Bᵀ − I‖ (Frobenius).

    Example:
        >>> triplet = {"a": jnp.eye(4, 2), "diagonal": jnp.ones(2), "b": 2 * jnp.eye(2, 3)}   # AᵀA = I, B Bᵀ = 4 I
        >>> round(float(regulariser({"q": triplet})), 3)   # √(3² + 3²) / 2
        2.121
    """
    norms = []
    for t in _triplets(params):
        for gram in (jnp.matmul(t["a"].swapaxes(-1, -2), t["a"]), jnp.matmul(t["b"], t["b"].swapaxes(-1, -2))):
            apart = gram - jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
            norms.append(jnp.sqrt(jnp.sum(apart**2, axis=(-1, -2)) + 1e-30).reshape(-1))
    return jnp.mean(jnp.concatenate(norms))


def _budget(step: Array, total: int, target: int, steps: int, begin: int, end: int, every: int) -> tuple[Array, Array]:
    """(ranks that stay, whether to choose now) after that step."""
    share = 1 - (step - begin) / (steps - end - begin)
    between = jnp.floor(target + (total - target) * share**3).astype(jnp.int32)
    final = step > steps - end
    budget = jnp.where(step <= begin, total, jnp.where(final, target, between))
    return budget, (step > begin) & (final | (step % every == 0))


def _score(t: dict[str, Array]) -> Array:
    return t["diagonal"] + jnp.mean(t["a"], axis=-2) + jnp.mean(t["b"], axis=-1)


def _is_triplet(x: Any) -> bool:
    return isinstance(x, dict) and set(x) >= {"a", "diagonal", "b"}


def _triplets(tree: Params) -> list[dict[str, Array]]:
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_triplet) if _is_triplet(x)]


def _with_diagonals(updates: Params, params: Params, keeps: list[Array]) -> Params:
    """Updates that leave singular values at 0 where they are not kept."""
    keeps = iter(keeps)

    def one(u, p):
        if not _is_triplet(u):
            return u
        return u | {"diagonal": jnp.where(next(keeps), u["diagonal"], -p["diagonal"])}

    return jax.tree.map(one, updates, params, is_leaf=_is_triplet)
