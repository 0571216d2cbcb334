"""Thin Flax modules around the pure functions: NNX, and Linen where its name says so.

`KAN` and `LinenKAN` are networks of their own; `adapt` puts adapters onto an NNX model, `linen_weights` lets a Linen
model multiply with any weight node.

What is trained is `nnx.Param` (Linen's "params"), grids and masks are `Fixed` (Linen's "fixed").
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen, nnx

from jaxml import kan, weights
from jaxml.axes import Array, Float
from jaxml.kan.network import Width
from jaxml.tune import adapters


class Fixed(nnx.Variable):
    """An array that is saved with a model and not trained.

    Example:
        >>> model = KAN([2, 5, 1], rngs=nnx.Rngs(0))
        >>> count = lambda kind: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))
        >>> count(nnx.Param), count(Fixed)  # 15 edges of 8 coefficients and a base weight; 7 grids of 6 points
        (135, 42)
    """


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


class Linear(nnx.Module):
    """`nnx.Linear` with any weight: its trained parts are `nnx.Param`, the others `Fixed`.

    Args:
        kernel: an array [in, out] or a weight node (`jaxml.quant`, `jaxml.tune.adapters`).
        bias: [out], or None.

    Example:
        >>> from jaxml import quant
        >>> w = quant.nf4.quantize(jax.numpy.ones((64, 2)), double=False)
        >>> layer = Linear(w, jax.numpy.array([0.0, 0.5]))
        >>> layer(jax.numpy.ones((1, 64))).tolist(), jax.tree.leaves(nnx.state(layer, nnx.Param))
        ([[64.0, 64.5]], [])
    """

    def __init__(self, kernel: Array | weights.Weight, bias: Array | None = None):
        adapted = adapters.has_adapters({"kernel": kernel})
        fixed = adapted or weights.is_node(kernel)
        trained, rest = adapters.split({"kernel": kernel}) if adapted else ({}, {"kernel": kernel})
        self.trained = nnx.Dict({name: nnx.Param(a) for name, a in _named(trained).items()})
        kind = Fixed if fixed else nnx.Param
        self.rest = nnx.Dict({name: kind(a) for name, a in _named(rest).items()})
        self._trees = tuple((tuple(_named(tree)), jax.tree.structure(tree)) for tree in (trained, rest))
        self.bias = None if bias is None else kind(bias)

    @property
    def kernel(self) -> Array | weights.Weight:
        """The weight that it multiplies with."""
        trained, rest = (
            tree.unflatten([variables[name][...] for name in names])
            for variables, (names, tree) in zip((self.trained, self.rest), self._trees)
        )
        return (adapters.combine(trained, rest) if self._trees[0][0] else rest)["kernel"]

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = weights.dot(x, self.kernel)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def adapt(model: nnx.Module, key: Array, *, targets: str | Sequence[str] = "*", **options: Any) -> nnx.Module:
    """A copy of an NNX model whose `nnx.Linear`s have adapters, so that `nnx.Param` is what they train.

    Args:
        targets: shell patterns over the paths of its linear layers ("encoder/0/query"); one without "/" is matched with
            the last part alone. Every other `nnx.Param` becomes `Fixed`.
        options: of `adapters.attach` (method, rank, quantize, …).

    Raises:
        ValueError: as `adapters.attach`.

    Example:
        >>> import optax
        >>> linear = lambda i, o: nnx.Linear(i, o, rngs=nnx.Rngs(0))
        >>> model = nnx.Sequential(linear(64, 32), jax.nn.relu, linear(32, 4))
        >>> small = adapt(model, jax.random.key(0), rank=4, quantize="nf4")
        >>> small(jax.numpy.ones((2, 64))).shape, nnx.state(small, nnx.Param)["layers"][0]["trained"]["kernel_a"].shape
        ((2, 4), (64, 4))
        >>> optimizer = nnx.Optimizer(small, optax.adam(1e-3), wrt=nnx.Param)
    """
    model = nnx.clone(model)
    found = {path: layer for path, layer in nnx.iter_graph(model) if isinstance(layer, nnx.Linear)}
    kernels = {"/".join(map(str, path)): layer.kernel[...] for path, layer in found.items()}
    params = adapters.attach(kernels, key, targets=targets, **options)
    for path, variable in [*nnx.iter_graph(model)]:
        if type(variable) is nnx.Param:
            _put(model, path, Fixed(variable[...]))
    for name, layer in found.items():
        if weights.is_node(params["/".join(map(str, name))]):
            bias = None if layer.bias is None else layer.bias[...]
            _put(model, name, Linear(params["/".join(map(str, name))], bias))
    return model


def _put(model: nnx.Module, path: tuple[str | int, ...], value: Any) -> None:
    for part in path[:-1]:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    if isinstance(path[-1], int):
        model[path[-1]] = value
    else:
        setattr(model, path[-1], value)


def linen_weights(next_function, args, kwargs, context):
    """An interceptor of Linen: `linen.Dense` layers whose kernel is a weight node multiply with it.

    Example:
        >>> from jaxml import quant
        >>> model, x = linen.Dense(4), jax.numpy.ones((2, 64))
        >>> variables = model.init(jax.random.key(0), x)
        >>> params = quant.quantize_params(variables["params"], "nf4", targets=["kernel"])
        >>> with linen.intercept_methods(linen_weights):
        ...     model.apply({"params": params}, x).shape
        (2, 4)
    """
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, linen.Dense):
        return next_function(*args, **kwargs)
    kernel = module.get_variable("params", "kernel")
    if not weights.is_node(kernel):
        return next_function(*args, **kwargs)
    (x,) = args
    y = weights.dot(x, kernel)
    bias = module.get_variable("params", "bias") if module.use_bias else None
    return y if bias is None else y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def _named(tree: Any) -> dict[str, Array]:
    """Leaves by their path, in the tree's order."""
    part = lambda key: str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key))))
    return {"_".join(map(part, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
