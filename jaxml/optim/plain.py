"""Trees of Flax NNX as plain dictionaries.

`nnx.Optimizer` gives a transformation its parameters as an `nnx.State`, and its own copy of the state that comes back
keeps no nodes within such a `State` but arrays. So states are built over dictionaries of the same keys.
"""

import sys
from typing import Any

import jax
import optax


def plainly(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The transformation, seeing dictionaries where `nnx.State`s stand; updates come back as they went in."""

    def init(params):
        return tx.init(plain(params))

    def update(updates, state, params=None, **extra):
        new, state = tx.update(plain(updates), state, None if params is None else plain(params), **extra)
        return (new if plain(updates) is updates else _as(updates, new)), state

    return optax.GradientTransformationExtraArgs(init, update)


def plain(tree: Any) -> Any:
    """Nested dictionaries in place of an `nnx.State`, arrays in place of its variables; any other tree as it is."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(tree, nnx.State):
        return tree
    value = lambda x: x.get_raw_value() if isinstance(x, nnx.Variable) else x
    nested = lambda x: {k: nested(v) for k, v in x.items()} if isinstance(x, nnx.State | dict) else value(x)
    return nested(tree)


def _as(like: Any, new: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(new))
