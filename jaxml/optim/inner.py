"""How an optimizer that was written for whole parameters is run on projected gradients.

An Optax optimizer may look at the parameters it updates. What it does with them is read from its jaxpr:

- "unused": it does not look (Adam, SGD, Lion without decay);
- "decay": its update is N + c · W with a number c (decoupled weight decay): c · W is added in full space, exactly;
- "weights": it measures them (Adafactor, LAMB): it is given the weights in the basis, whose mean square is the same;
- "coordinates": its state holds parameters (schedule-free): it is given Σ N, the coordinates that it has moved itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxml.axes import Array
from jaxml.optim.dependence import dependence
from jaxml.optim.targets import Target


def keeps_parameters(inner: optax.GradientTransformation, low: Any, targets: list[Target | None]) -> bool:
    """Whether the state that the optimizer begins with depends on the values of the targets' parameters."""
    ours = {i for i, t in enumerate(targets) if t is not None}
    return any(depends & ours for depends in dependence(inner.init, low))


def update(
    inner: optax.GradientTransformationExtraArgs,
    targets: list[Target | None],
    tree,
    low: list[Array],
    state: Any,
    weights: list[Array] | None,
    coordinates: list[Array | tuple],
    bases: list[tuple[Array, ...] | None],
    extra: dict[str, Any],
) -> tuple[list[Array], list[Array | None], Any]:
    """(N of each leaf, c of each leaf that is to be decayed in full space or None, the new state).

    Args:
        low: R of each target, the whole gradient of other leaves.
        weights: the parameters, whole; None where the caller has none.
        coordinates: of each target, Σ N where it is kept, else ().
        bases: of each target.
    """
    nothing = [None] * len(low)
    grads = tree.unflatten(low)
    if weights is None:
        new, state = inner.update(grads, state, None, **extra)
        return tree.flatten_up_to(new), nothing, state
    ours = [i for i, t in enumerate(targets) if t is not None]

    def run(values: list[Array], grads=grads, state=state):
        """The update where the targets' parameters are `values`."""
        given = list(weights)
        for i, value in zip(ours, values):
            given[i] = value
        new, state = inner.update(grads, state, tree.unflatten(given), **extra)
        return tree.flatten_up_to(new), state

    zeros = [jnp.zeros_like(low[i]) for i in ours]
    if any(not isinstance(coordinates[i], tuple) for i in ours):
        new, state = run([coordinates[i] for i in ours])
        return new, nothing, state
    use = use_of_parameters(run, grads, state, zeros)
    if use == "unused":
        new, state = run(zeros)
        return new, nothing, state
    if use == "weights":
        seen = lambda i: targets[i].project(bases[i], targets[i].matrices(weights[i])).astype(low[i].dtype)
        new, state = run([seen(i) for i in ours])
        return new, nothing, state
    new, slopes, state = jax.jvp(run, (zeros,), ([jnp.ones_like(z) for z in zeros],), has_aux=True)
    decay = list(nothing)
    for i in ours:
        decay[i] = slopes[i][..., :1, :1]
    return new, decay, state


def use_of_parameters(run, grads: Any, state: Any, values: list[Array]) -> str:
    """ "unused", "decay" or "weights", from what the update and its derivative by the targets' parameters depend on."""
    inputs = (values, grads, state)
    if not any(d & set(range(len(values))) for d in dependence(lambda *a: run(*a)[0], *inputs)):
        return "unused"
    shapes = {v.shape for v in values}
    arrays = {n for n, leaf in enumerate(jax.tree.leaves(inputs)) if jnp.shape(leaf) in shapes}

    def slope(values, *others):
        ones = [jnp.ones_like(v) for v in values]
        return jax.jvp(lambda v: run(v, *others)[0], (values,), (ones,))[1]

    # A choice (`apply_if_finite`) makes c another number, of all elements alike.
    return "weights" if any(d & arrays for d in dependence(slope, *inputs, choices=False)) else "decay"
