"""A linear function that is transposed by a function of its own, under every transformation.

`jax.custom_vjp` stops forward mode, `jax.custom_jvp` has no say in how its rule is transposed, and
`jax.custom_derivatives.linear_call` cannot be batched. One primitive does all three: a kernel's tangent is
computed by one program, its transpose (the backward pass) by another, and both may be differentiated again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def linear(forward: Callable, transpose: Callable, residuals: Any, tangents: Any, name: str = "") -> Any:
    """``forward(residuals, tangents)``, linear in `tangents`, whose transpose is ``transpose(residuals, ct)``.

    Args:
        forward, transpose: pure functions; where the residuals are differentiated, `forward` and `transpose`
            are differentiated as they stand.
        residuals: a pytree of what the linear function depends on.
        tangents: a pytree of floating arrays.
        name: what a policy of `jax.checkpoint` can tell it by (a parameter of the primitive).

    Returns:
        A pytree of floating arrays. `transpose` is given the same pytree and returns one like `tangents`.

    Example:
        >>> import jax
        >>> double = lambda x: linear(lambda a, t: a * t, lambda a, ct: a * ct, 2.0, x)
        >>> float(double(3.0)), float(jax.grad(double)(3.0)), float(jax.jvp(double, (3.0,), (1.0,))[1])
        (6.0, 2.0, 2.0)
    """
    flat_residuals, residuals_tree = jax.tree.flatten(residuals)
    flat_tangents, tangents_tree = jax.tree.flatten(tangents)
    flat_tangents = vary(flat_tangents, varying_axes(flat_tangents, flat_residuals))
    n = len(flat_residuals)
    traced, shapes = jax.make_jaxpr(forward, return_shape=True)(residuals, tangents)
    out_tree = jax.tree.structure(shapes)

    def flat_forward(*args):
        return jax.tree.leaves(forward(residuals_tree.unflatten(args[:n]), tangents_tree.unflatten(args[n:])))

    def flat_transpose(*args):
        out = transpose(residuals_tree.unflatten(args[:n]), out_tree.unflatten(args[n:]))
        return tangents_tree.flatten_up_to(out)

    how = dict(forward=flat_forward, transpose=flat_transpose, n=n, name=name, traced=traced)
    out = _linear.bind(*flat_residuals, *flat_tangents, **how)
    return out_tree.unflatten(out)


def varying_axes(*trees: Any) -> frozenset:
    """Mesh axes of `jax.shard_map` along which any of the arrays differs between devices."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)))


def vary(tree: Any, axes: frozenset) -> Any:
    """The same arrays, allowed to differ along those axes; their gradients are summed over them."""

    def one(x):
        missing = axes - varying_axes(x)
        return jax.lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x

    return jax.tree.map(one, tree)


_linear = Primitive("linear_with_transpose")  # `traced`, the jaxpr of `forward`, is for those who count
_linear.multiple_results = True


@_linear.def_impl
def _impl(*args, forward, transpose, n, name, traced):
    return jax.jit(forward)(*args)


@_linear.def_abstract_eval
def _abstract(*avals, forward, transpose, n, name, traced):
    return jax.make_jaxpr(forward)(*avals).out_avals


mlir.register_lowering(
    _linear, mlir.lower_fun(lambda *args, forward, transpose, n, name, traced: forward(*args), multiple_results=True)
)


def _jvp(primals, dots, *, forward, transpose, n, name, traced):
    residuals, tangents = primals[:n], primals[n:]
    out = _linear.bind(*primals, forward=forward, transpose=transpose, n=n, name=name, traced=traced)
    zero = lambda d: isinstance(d, ad.Zero)
    parts = []
    if not all(map(zero, dots[n:])):
        dense = [ad.instantiate_zeros(d) for d in dots[n:]]
        parts.append(
            _linear.bind(*residuals, *dense, forward=forward, transpose=transpose, n=n, name=name, traced=traced)
        )
    moving = [i for i in range(n) if not zero(dots[i])]
    if moving:

        def of_residuals(*moved):
            full = list(residuals)
            for i, x in zip(moving, moved):
                full[i] = x
            return forward(*full, *tangents)

        _, part = jax.jvp(of_residuals, [residuals[i] for i in moving], [dots[i] for i in moving])
        parts.append(part)
    if not parts:
        return out, [ad.Zero.from_primal_value(o) for o in out]
    return out, [sum(p[1:], start=p[0]) for p in zip(*parts)]


ad.primitive_jvps[_linear] = _jvp


def _transpose_rule(cts, *args, forward, transpose, n, name, traced):
    residuals = args[:n]
    dense = [ad.instantiate_zeros(ct) for ct in cts]
    return [None] * n + list(transpose(*residuals, *dense))


ad.primitive_transposes[_linear] = _transpose_rule


def _batch(args, axes, *, forward, transpose, n, name, traced):
    size = next(x.shape[a] for x, a in zip(args, axes) if a is not None)
    residuals, residual_axes = args[:n], axes[:n]
    # Every tangent carries the axis, so that its transpose does.
    tangents = [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0)
        for x, a in zip(args[n:], axes[n:])
    ]
    count = len(_linear_outputs(forward, args, axes))
    out = _linear.bind(
        *residuals,
        *tangents,
        forward=jax.vmap(forward, in_axes=(*residual_axes, *[0] * len(tangents)), out_axes=0),
        transpose=jax.vmap(transpose, in_axes=(*residual_axes, *[0] * count), out_axes=0),
        n=n,
        name=name,
        traced=None,
    )
    return out, [0] * len(out)


def _linear_outputs(forward, args, axes):
    def one(x, a):
        shape = list(x.shape)
        if a is not None:
            del shape[a]
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.eval_shape(forward, *map(one, args, axes))


batching.primitive_batchers[_linear] = _batch
