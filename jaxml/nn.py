"""Thin Flax modules around the pure functions: NNX, and Linen where its name says so.

What is trained is `nnx.Param` (Linen's "params"), grids and masks are `Fixed` (Linen's "fixed").
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen, nnx

from jaxml import kan
from jaxml.axes import Array, Float
from jaxml.kan.network import Width


class Fixed(nnx.Variable):
    """An array that is saved with a model and not trained."""


class KAN(nnx.Module):
    """A Kolmogorov–Arnold network.

    Args:
        widths, options: as `kan.init` takes them.
        rngs: its stream `params` is drawn from.

    Example:
        >>> model = KAN([2, 5, 1], rngs=nnx.Rngs(0), grid=8)
        >>> model(jax.numpy.zeros((7, 2))).shape
        (7, 1)
        >>> model.set_network(kan.refine(model.network, 16))
    """

    def __init__(self, widths: Sequence[Width], *, rngs: nnx.Rngs, **options: Any):
        self.set_network(kan.init(rngs.params(), widths, **options))

    @property
    def network(self) -> kan.KAN:
        """The parameters as the functions of `jaxml.kan` take them."""
        whole = [
            tree.unflatten([variables[name][...] for name in names])
            for variables, (names, tree) in zip((self.trained, self.fixed), self._trees)
        ]
        return kan.combine(*whole)

    def set_network(self, params: kan.KAN) -> None:
        """Takes what `refine`, `prune`, … returned; an optimizer is made anew then."""
        trained, rest = kan.split(params)
        self.trained = nnx.Dict({name: nnx.Param(a) for name, a in _named(trained).items()})
        self.fixed = nnx.Dict({name: Fixed(a) for name, a in _named(rest).items()})
        # The names by themselves: a dictionary comes out of `nnx.jit` in alphabetical order.
        self._trees = tuple((tuple(_named(tree)), jax.tree.structure(tree)) for tree in (trained, rest))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return kan.apply(self.network, x)


class LinenKAN(linen.Module):
    """A Kolmogorov–Arnold network for Linen.

    Example:
        >>> model = LinenKAN((2, 5, 1), dict(grid=8))
        >>> variables = model.init(jax.random.key(0), jax.numpy.zeros((7, 2)))
        >>> sorted(variables), model.apply(variables, jax.numpy.zeros((7, 2))).shape
        (['fixed', 'params'], (7, 1))
    """

    widths: Sequence[Width]
    options: Any = None  # of `kan.init`

    @linen.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        # Its arrays are used when variables are made, and its structure always.
        start = kan.init(self.make_rng("params") if self.is_initializing() else jax.random.key(0), self.widths,
                         **(self.options or {}))  # fmt: skip
        trained, rest = kan.split(start)
        trees = jax.tree.structure(trained), jax.tree.structure(rest)
        learnt = [self.param(name, lambda _, a=a: a) for name, a in _named(trained).items()]
        fixed = [self.variable("fixed", name, lambda a=a: a).value for name, a in _named(rest).items()]
        return kan.apply(kan.combine(trees[0].unflatten(learnt), trees[1].unflatten(fixed)), x)


def _named(tree: Any) -> dict[str, Array]:
    """Leaves by their path, in the tree's order."""
    part = lambda key: str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key))))
    return {"_".join(map(part, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
