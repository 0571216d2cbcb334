"""Training a network on samples: defaults that work, any Optax optimizer where they do not.

The default is Levenberg–Marquardt on the whole of the samples, with a small penalty on the roughness of the splines and
grids that follow the activations: on the problems of the paper it ends orders of magnitude below L-BFGS. Its matrices
have P² elements for P trained numbers; from some thousand on, take "lbfgs" or an optimizer with mini-batches.
"""

import functools
import hashlib
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from jaxml import log
from jaxml.axes import Array, Float
from jaxml.kan import attribution, bases, file, levenberg
from jaxml.kan import grid as grids_
from jaxml.kan.network import KAN, apply, combine, split

METHODS = ("lm", "lbfgs")
MOST_PARAMETERS = 6000  # of "lm": JᵀJ in float64 then takes 288 MB
STEPS = {"lm": 40, "lbfgs": 200, "optimizer": 1000}
ROUNDS = 3  # of the first grid, whose range still moves


def fit(
    params: KAN,
    x: Float[Array, "N I"],
    y: Float[Array, "N O"] | Float[Array, "N"],
    *,
    method: str | optax.GradientTransformation | None = None,
    grids: Sequence[int] | None = None,
    steps: int | None = None,
    smooth: float = 1e-2,
    sparse: float = 0.0,
    entropy: float = 2.0,
    update_grids: bool = True,
    padded: bool = False,
    batch_size: int | None = None,
    held_out: tuple[Array, Array] | None = None,
    patience: int | None = None,
    restarts: int = 1,
    key: Array | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> tuple[KAN, dict[str, Any]]:
    """Least squares: the network that predicts y from x.

    Args:
        method: "lm" (Levenberg–Marquardt), "lbfgs", or any Optax optimizer; where None "lm", with `sparse` "lbfgs".
        grids: numbers of cells, one after the other, each from where the last one ended; the network's own where None.
        steps: on each grid; 40 of "lm", 200 of "lbfgs", 1000 of an optimizer where None.
        smooth: weight of Σ (differences of order + 1 of each edge's coefficients)² beside the sum of squared errors in
            units of y's variance; keeps a fine grid's cells without samples in line with their neighbours.
        sparse: weight of `regularizer` (pykan's `lamb`) beside the mean squared error in units of y's variance; not of
            "lm", whose penalties are squares.
        entropy: of the regularizer.
        update_grids: let every grid follow its input's range, between grids and thrice on the first one. Grids whose
            cells are not equally wide (`kan.update` with eps or bend) stay as they are.
        padded: give all grids the shape of the finest one, so that one program serves all (`kan.update`'s `cells`):
            where compiling takes longer than fitting.
        batch_size: samples a step of an Optax optimizer; all where None.
        held_out: (x, y) whose error is told as well and decides: between restarts, and with `patience`.
        patience: stop after so many grids without a lower error on `held_out`, and return the grid of the lowest.
        restarts: how many networks to fit, from different random numbers; the best is kept.
        key: of restarts and batches.
        checkpoint: a folder with a file (`kan.load`) of each grid that is done; a fit that was stopped goes on there,
            with the same version of JAX where the method is an Optax optimizer.
        progress: show a bar.

    Returns:
        The network, and a dictionary: "grids", and of each of them "train" and "held_out" (root mean square errors, of
        the best restart), "losses" (of every step).

    Raises:
        ValueError: shapes that do not fit, values that are not finite (samples, or the network on them), arguments that
            contradict each other, too many parameters for "lm", a checkpoint of another fit.

    Example:
        >>> from jaxml import kan
        >>> x = jax.random.uniform(jax.random.key(0), (200, 2), minval=-1.0)
        >>> y = x[:, 0] * x[:, 1]
        >>> params, info = fit(kan.init(jax.random.key(1), [2, 2, 1]), x, y, grids=[3, 6])
        >>> info["train"][-1] < 2e-3
        True
    """
    x, y = _checked(params, x, y, "x and y")
    test = None if held_out is None else _checked(params, *held_out, "held_out")
    if patience is not None and test is None:
        raise ValueError("kan.fit: patience looks at held_out, got none. Give held_out=(x, y).")
    follow = update_grids and grids_.is_even(params)
    if padded and not follow:
        got = "cells that are not equally wide" if update_grids else "update_grids=False"
        raise ValueError(f"kan.fit: padded grids follow their input, got {got}.")
    if restarts < 1:
        raise ValueError(f"kan.fit: restarts is how many networks are fitted, at least 1, got {restarts}.")
    options = _options(method, steps, float(smooth), float(sparse), float(entropy), batch_size)
    plan = stages(params, grids, "kan.fit")
    key = jax.random.key(0) if key is None else key
    folder = checkpoint and Path(checkpoint)
    told = plan, restarts, update_grids, padded, patience
    identity = folder and _identity(params, options, told, (x, y, test, jax.random.key_data(key)))
    best = None
    with log.progress("fitting", enabled=progress, fields=("grid", "error")) as bar:
        task = bar.add_task("fit", total=restarts * len(plan), grid="–", error="–")
        for number in range(restarts):
            network = params if number == 0 else _anew(params, jax.random.fold_in(key, number))
            found: list[tuple[KAN, dict[str, Any]]] = []
            for n, cells in enumerate(plan):
                path = folder and folder / f"{number}-{n}-{cells}.npz"
                if path and path.exists():
                    network, row = _again(path, identity, params)
                else:
                    seed = jax.random.fold_in(key, 1000 * number + n)
                    rounds = ROUNDS if follow and n == 0 else 1
                    shape = max(plan) if padded else cells
                    network, losses = _on_grid(network, shape, cells, rounds, follow, padded, x, y, seed, options)
                    errors = float(_error(network, x, y)), None if test is None else float(_error(network, *test))
                    row = {"grids": cells, "train": errors[0], "held_out": errors[1], "losses": losses}
                    if path:
                        folder.mkdir(parents=True, exist_ok=True)
                        file.save(path, network, {"fit": identity, "row": row})
                found.append((network, row))
                bar.update(task, completed=number * len(plan) + n + 1, grid=cells, error=f"{row['train']:.2e}")
                if patience is not None and n - _lowest(found) >= patience:
                    break
            end = len(found) - 1 if patience is None else _lowest(found)
            score = _score(found[end][1])
            if best is None or score < best[0] or np.isnan(best[0]):
                best = score, found[end][0], [row for _, row in found]
    score, network, rows = best
    if not np.isfinite(score):
        raise ValueError(
            f"kan.fit: the network has finite values on the samples, got an error of {score}. A function fixed on an "
            "edge (log, sqrt, 1/x) leaves its domain there: fix another, or shift its input."
        )
    return network, {name: [row[name] for row in rows] for name in rows[0]}


def _score(row: dict[str, Any]) -> float:
    return row["train"] if row["held_out"] is None else row["held_out"]


def _lowest(found: list[tuple[KAN, dict[str, Any]]]) -> int:
    return int(np.argmin(np.nan_to_num([_score(row) for _, row in found], nan=np.inf)))


def _again(path: Path, identity: list[Any], params: KAN) -> tuple[KAN, dict[str, Any]]:
    """What was found on a grid before."""
    about = file.about_of(path)
    if about.get("fit") != identity:
        raise ValueError(
            f"kan.fit: {path} is of another fit (another network, samples or arguments). Name another folder."
        )
    own = {edge.function.name: edge.function for layer in params.layers for edge in layer.fixed}
    return file.load(path, own), about["row"]


def _identity(params: KAN, options: dict[str, Any], told: tuple[Any, ...], arrays: tuple[Any, ...]) -> str:
    """One number of everything that a fit depends on."""
    if not isinstance(options["method"], str):
        options = options | {"method": _program(options["method"], params)}
    fixed = [(edge.into, edge.out, edge.function.name) for layer in params.layers for edge in layer.fixed]
    specs = [layer.spec for layer in params.layers]
    digest = hashlib.sha256(repr([told, options, fixed, specs, params.arities]).encode())
    for a in map(np.asarray, jax.tree.leaves((params, arrays))):
        digest.update(f"{a.shape} {a.dtype}".encode() + a.tobytes())
    return digest.hexdigest()


def _program(tx: optax.GradientTransformation, params: KAN) -> str:
    """What an optimizer does: its functions have no names by which they differ."""
    value_fn = lambda trained: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(trained))
    more = dict(value=jnp.zeros(()), value_fn=value_fn)
    update = lambda g: optax.with_extra_args_support(tx).update(g, tx.init(g), g, grad=g, **more)
    return jax.jit(update).lower(split(params)[0]).as_text()


def stages(params: KAN, grids: Sequence[int] | None, name: str) -> list[int]:
    """Numbers of cells, one after the other, for the function of that name."""
    own = params.layers[0].spec
    plan = [own.grid] if grids is None else list(grids)
    if not plan or not all(isinstance(n, Integral) and n >= 1 for n in plan):
        raise ValueError(f"{name}: grids are whole numbers of cells, one at least, got {plan}.")
    if not bases.BASES[own.basis].has_grid and plan != [own.grid]:
        raise ValueError(
            f"{name}: the basis {own.basis!r} has no grid to refine, got grids={plan}. Leave them out; the grid of "
            "`kan.init` is its number of functions."
        )
    return list(map(int, plan))


def _options(method, steps, smooth: float, sparse: float, entropy: float, batch_size) -> dict[str, Any]:
    """What a stage takes."""
    if not (method is None or method in METHODS or hasattr(method, "init")):
        raise ValueError(f"kan.fit: method is one of {', '.join(METHODS)} or an Optax optimizer, got {method!r}.")
    if method == "lm" and sparse:
        raise ValueError("kan.fit: sparse is no sum of squares, got it with method='lm'. Take 'lbfgs' or an optimizer.")
    method = method or ("lbfgs" if sparse else "lm")
    kind = method if isinstance(method, str) else "optimizer"
    if kind != "optimizer" and batch_size is not None:
        raise ValueError(f"kan.fit: batch_size is of an Optax optimizer, got it with method={method!r}.")
    is_count = lambda n: n is None or (isinstance(n, Integral) and n >= 1)
    if not all(w >= 0 for w in (smooth, sparse, entropy)) or not is_count(steps) or not is_count(batch_size):
        raise ValueError(
            "kan.fit: smooth, sparse and entropy are at least 0, steps and batch_size at least 1 and whole, got "
            f"{smooth}, {sparse}, {entropy}, {steps} and {batch_size}."
        )
    steps = STEPS[kind] if steps is None else steps
    return dict(method=method, steps=steps, smooth=smooth, sparse=sparse, entropy=entropy, batch_size=batch_size)


def _on_grid(network: KAN, shape: int, cells: int, rounds: int, follow: bool, padded: bool, x, y, key, options):
    """(the network with grids of `shape` cells, `cells` of them over the samples; losses)."""
    network, losses = grids_.refine(network, shape), []
    for turn in range(rounds):
        network = grids_.update(network, x, cells=cells if cells < shape else None) if follow else network
        reached = jnp.asarray(cells) if padded else None
        network, some = _stage(network, x, y, key=jax.random.fold_in(key, turn), cells=reached, **options)
        losses += np.asarray(some).tolist()
    return network, losses


def _checked(params: KAN, x: Array, y: Array, name: str) -> tuple[Array, Array]:
    """Both as [N, …], in the network's dtype."""
    dtype = params.layers[0].coef.dtype
    x, y = jnp.asarray(x), jnp.asarray(y)
    y = y[:, None] if y.ndim == 1 else y
    widths = params.widths
    outputs = params.layers[-1].width[1] - sum(params.arities[-1]) + len(params.arities[-1])
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or x.shape[1] != widths[0] or y.shape[1] != outputs or not len(x):
        raise ValueError(
            f"kan.fit: {name} are [N, {widths[0]}] and [N, {outputs}] for these widths, got {x.shape} and {y.shape}."
        )
    for what, a in (("x", x), ("y", y)):
        bad = int(jnp.sum(~jnp.isfinite(a)))
        if bad:
            raise ValueError(
                f"kan.fit: all values are finite, got {bad} in {what} ({name}) that are not. Drop those rows."
            )
    return x.astype(dtype), y.astype(dtype)


def _anew(params: KAN, key: Array) -> KAN:
    """Other random numbers of the same size in every layer."""
    trained, rest = split(params)
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, a: jnp.sqrt(jnp.mean(a**2)) * jax.random.normal(k, a.shape, a.dtype)
    return combine(tree.unflatten(list(map(draw, keys, leaves))), rest)


@jax.jit
def _error(params: KAN, x: Array, y: Array) -> Array:
    return jnp.sqrt(jnp.mean((apply(params, x) - y) ** 2))


def _stage(params: KAN, x, y, *, method, steps, smooth, sparse, entropy, batch_size, key, cells) -> tuple[KAN, Array]:
    """One grid's steps: (the network, the loss after each)."""
    penalty = dict(smooth=smooth, sparse=sparse, entropy=entropy, cells=cells)
    if method == "lm":
        count = sum(leaf.size for leaf in jax.tree.leaves(split(params)[0]))
        if count > MOST_PARAMETERS:
            raise ValueError(
                f"kan.fit: method 'lm' trains at most {MOST_PARAMETERS} numbers, got {count}. "
                "Take method='lbfgs' or an Optax optimizer."
            )
        return _by_lm(params, x, y, steps=steps, smooth=smooth, cells=cells)
    if method == "lbfgs":
        return _by_lbfgs(params, x, y, steps=steps, **penalty)
    size = min(batch_size or len(x), len(x))
    return _by_optax(params, x, y, key, tx=method, steps=steps, size=size, **penalty)


def roughness(params: KAN, cells: Array | None = None) -> Float[Array, "Q"]:
    """The differences of order + 1 of every edge's coefficients along the grid; of a polynomial they are 0.

    Args:
        cells: how many from the left lie over samples; what reaches further is 0.
    """
    parts = []
    for layer in params.layers:
        if layer.spec.basis == "bspline":
            coef = layer.masked(layer.coef)
            n = min(layer.spec.order + 1, len(coef) - 1)
            d = jnp.diff(coef, n=n, axis=0)
            if cells is not None:
                d = jnp.where((jnp.arange(len(d)) + n < cells + layer.spec.order)[:, None, None], d, 0)
            parts.append(d.ravel())
    return jnp.concatenate(parts) if parts else jnp.zeros(0, params.layers[0].coef.dtype)


def _scale(y: Array) -> Array:
    """1 / the standard deviation of y, and 1 where that is 0."""
    deviation = jnp.std(y)
    return 1 / jnp.where(deviation > 0, deviation, 1)


@functools.partial(jax.jit, static_argnames=("steps", "smooth"))
def _by_lm(params: KAN, x, y, *, steps: int, smooth: float, cells: Array | None) -> tuple[KAN, Array]:
    trained, rest = split(params)
    theta, unravel = ravel_pytree(trained)
    whole = lambda theta: combine(unravel(theta), rest)
    inputs, scale = x.shape[1], _scale(y)

    def residuals(theta, row):
        return scale * (apply(whole(theta), row[None, :inputs], implementation="fused")[0] - row[inputs:])

    penalty = lambda theta: smooth**0.5 * roughness(whole(theta), cells)
    state, losses = levenberg.minimize(residuals, penalty, theta, jnp.concatenate([x, y], axis=1), steps=steps)
    return whole(state.theta), losses


def _loss(trained, rest, x, y, scale, smooth, sparse, entropy, cells, count):
    """The mean over `count` samples, estimated from those here."""
    params = combine(trained, rest)
    total = jnp.sum((scale * (apply(params, x) - y)) ** 2) / len(x)
    total = total + smooth / count * jnp.sum(roughness(params, cells) ** 2)
    return total + sparse * attribution.regularizer(params, x, entropy=entropy) if sparse else total


@functools.partial(jax.jit, static_argnames=("steps", "smooth", "sparse", "entropy"))
def _by_lbfgs(params: KAN, x, y, *, steps: int, **penalty: float) -> tuple[KAN, Array]:
    trained, rest = split(params)
    tx = optax.lbfgs()
    loss = functools.partial(_loss, rest=rest, x=x, y=y, scale=_scale(y), count=len(x), **penalty)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        trained, state = carry
        value, grads = value_and_grad(trained, state=state)
        updates, state = tx.update(grads, state, trained, value=value, grad=grads, value_fn=loss)
        return (optax.apply_updates(trained, updates), state), value

    (trained, _), losses = jax.lax.scan(step, (trained, tx.init(trained)), length=steps)
    return combine(trained, rest), losses


@functools.partial(jax.jit, static_argnames=("tx", "steps", "size", "smooth", "sparse", "entropy"))
def _by_optax(params: KAN, x, y, key, *, tx, steps: int, size: int, **penalty: float) -> tuple[KAN, Array]:
    trained, rest = split(params)
    scale = _scale(y)

    def step(carry, key):
        trained, state = carry
        rows = jax.random.choice(key, len(x), (size,), replace=False) if size < len(x) else jnp.arange(len(x))
        loss = functools.partial(_loss, rest=rest, x=x[rows], y=y[rows], scale=scale, count=len(x), **penalty)
        value, grads = jax.value_and_grad(loss)(trained)
        more = dict(value=value, grad=grads, value_fn=loss)  # which line searches look at
        updates, state = optax.with_extra_args_support(tx).update(grads, state, trained, **more)
        return (optax.apply_updates(trained, updates), state), value

    (trained, _), losses = jax.lax.scan(step, (trained, tx.init(trained)), jax.random.split(key, steps))
    return combine(trained, rest), losses


def with_dtype(params: KAN, dtype) -> KAN:
    """All arrays in another dtype (float64 inside `jax.enable_x64(True)`).

    Example:
        >>> from jaxml import kan
        >>> with_dtype(kan.init(jax.random.key(0), [2, 1]), jnp.bfloat16).layers[0].coef.dtype.name
        'bfloat16'
    """
    cast = lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
    return jax.tree.map(cast, params)
