"""EVA: A begins along what each weight's inputs vary most along, and ranks go where that explains most."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxml import paths, weights
from jaxml.axes import Array, Params


def eva(
    function: Callable[[Params, Any], Array],
    params: Params,
    batches: Iterable[Any],
    *,
    rank: int = 8,
    rho: float = 2.0,
    targets: Sequence[str] = paths.ALL_LINEAR,
) -> tuple[dict[str, Array], dict[str, int]]:
    """(directions, ranks) for ``attach(..., start=directions, ranks=ranks)``.

    The leading eigenvectors of the covariance of each weight's inputs, found exactly: a D × D sum is kept for each
    weight while the batches pass. Of all weights' directions those that explain most of their weight's variance are
    kept, `rank` for each weight on average and at most rho · rank for one.

    Args:
        function: (params, batch) → a number that depends on every weight, by `dot` and its like.
        params: without adapters.
        batches: what the function takes, a few typical ones.
        rank: on average.
        rho: 1 leaves all ranks alike.
        targets: as in `attach`.

    Raises:
        ValueError: no batches, a pattern that matches nothing.

    Example:
        >>> from jaxml import lm, testing
        >>> from jaxml.tune import adapters
        >>> model = testing.tiny_model()
        >>> run = lambda params, tokens: lm.decoder.hidden(params, model.config, tokens).sum()
        >>> tokens = jax.random.randint(jax.random.key(0), (4, 16), 3, 64)
        >>> directions, ranks = eva(run, model.params, [tokens], rank=4, targets=["q", "up"])
        >>> sum(ranks.values())   # two layers of two matrices
        16
        >>> key = jax.random.key(1)
        >>> params = adapters.attach(model.params, key, start=directions, ranks=ranks, targets=["q", "up"])

    Reference:
        Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation".
    """
    if rho < 1:
        raise ValueError(f"eva: rho is at least 1, got {rho}.")
    found = paths.matrices(params)
    chosen = paths.match(found, targets, "eva")
    side = lambda path: found[path].shape[-1 if path == "head" else -2]
    zeros = {
        path: Moments(*(jnp.zeros((*found[path].shape[:-2], *of)) for of in ((side(path),) * 2, (side(path),), ())))
        for path in chosen
    }

    @jax.jit
    def add(sums, params, batch):
        def run(moments):
            probes = {path: Probe(found_[path], moments[path]) for path in chosen}
            return function(paths.replaced(params, probes), batch)

        found_ = paths.named(params)
        return jax.tree.map(jnp.add, sums, jax.grad(run)(zeros))

    sums, count = zeros, 0
    for batch in batches:
        sums, count = add(sums, params, batch), count + 1
    if not count:
        raise ValueError("eva: at least one batch, got none.")
    directions, shares = {}, []
    for path in chosen:
        most = min(int(rank * rho), side(path))
        vectors, explained = jax.jit(_leading, static_argnums=1)(sums[path], most)
        directions[path] = vectors
        shares += [(float(share), name, path) for name, row in _rows(path, explained) for share in row]
    names = list(dict.fromkeys(name for _, name, _ in shares))
    kept = sorted(shares, reverse=True)[: rank * len(names)]
    return directions, {name: max(1, sum(n == name for _, n, _ in kept)) for name in names}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Σ x xᵀ, Σ x and how many, over the inputs x of a weight.

    Example:
        >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
        >>> m = Moments(x.T @ x, x.sum(0), jnp.float32(2))
        >>> (m.squares / m.count - jnp.outer(m.sums / m.count, m.sums / m.count)).tolist()   # the covariance
        [[1.0, 2.0], [2.0, 4.0]]
    """

    squares: Array  # [..., D, D]
    sums: Array  # [..., D]
    count: Array  # [...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """A weight whose inputs' moments come out as the gradient of `moments`.

    Example:
        >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
        >>> start = Moments(jnp.zeros((2, 2)), jnp.zeros(2), jnp.zeros(()))
        >>> found = jax.grad(lambda moments: weights.dot(x, Probe(jnp.eye(2), moments)).sum())(start)
        >>> found.squares.tolist(), found.sums.tolist(), found.count.item()
        ([[10.0, 20.0], [20.0, 40.0]], [4.0, 8.0], 2.0)
    """

    base: Any
    moments: Moments

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def astype(self, dtype: Any) -> "Probe":
        return dataclasses.replace(self, base=self.base.astype(dtype))

    def matmul(self, x: Array, transpose: bool = False) -> Array:
        base = weights.dense(self.base).astype(x.dtype)
        return jnp.matmul(_seen(x, self.moments), base.swapaxes(-1, -2) if transpose else base)

    def take(self, ids: Array) -> Array:
        raise ValueError("eva: inputs are vectors, those of an embedding are numbers of rows. Leave it out.")

    def dense(self) -> Array:
        return weights.dense(self.base)


@jax.custom_vjp
def _seen(x: Array, moments: Moments) -> Array:
    return x


def _seen_forward(x: Array, moments: Moments):
    return x, x


def _seen_backward(x: Array, ct: Array):
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return ct, Moments(rows.T @ rows, rows.sum(0), jnp.float32(len(rows)))


_seen.defvjp(_seen_forward, _seen_backward)


def _leading(m: Moments, count: int) -> tuple[Array, Array]:
    """Leading eigenvectors [..., D, count] of the covariance, and the share of the variance that each explains."""

    def one(m):
        mean = m.sums / m.count
        values, vectors = jnp.linalg.eigh(m.squares / m.count - jnp.outer(mean, mean))
        values = jnp.maximum(values, 0)
        return vectors[:, ::-1][:, :count], values[::-1][:count] / jnp.maximum(jnp.sum(values), 1e-30)

    lead = m.count.shape
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(lead) :]), m)
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), jax.lax.map(one, flat))


def _rows(path: str, explained: Array) -> list[tuple[str, Array]]:
    """Names of the matrices that lie stacked, with their rows."""
    if explained.ndim == 1:
        return [(path, explained)]
    return [(path.replace("layers/", f"layers/{i}/", 1), row) for i, row in enumerate(explained)]
