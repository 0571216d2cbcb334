"""How a formula becomes an activation: `activation(slope)`, the one decorator that every function here goes through.

- The formula is computed in float32 (float64 stays float64), and its result is rounded once to the input's dtype.
- Its derivative is `slope`, written by hand so that nothing cancels, and rounded once as well.
- Under reverse mode one array is kept, the input: the tangent slope(x) · dx is computed inside `jax.checkpoint`, so
  that partial evaluation keeps x and computes the slope when the cotangent arrives.
- `slope` is plain JAX, so that forward and reverse mode compose to any order.

Kinks: at a point where one-sided derivatives differ, the docstring of the function says which one it takes.
"""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxml.axes import Array, Float, wide


def activation(slope: Callable[..., Array]) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Decorates a formula of x, and of parameters that may be numbers or arrays, with its derivative by x.

    Args:
        slope: ∂formula/∂x, of the same arguments. Derivatives by parameters are those of the formula itself. Both are
            called with arrays of float32 or float64 whose shapes broadcast without changing their number of axes.

    Returns:
        A decorator. The function it makes takes any real array x [...]; a parameter broadcasts against x from x's last
        axis, so that [D] is one number a channel. `function.formula` and `function.slope` are what it was made of.

    Raises:
        TypeError: x is complex.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> @activation(lambda x, a: 2 * a * x)
        ... def parabola(x, a=1.0):
        ...     return a * x * x
        >>> x = jnp.array([1.0, 3.0], jnp.bfloat16)
        >>> parabola(x, 0.5).dtype.name, jax.vmap(jax.grad(parabola))(x).tolist()
        ('bfloat16', [2.0, 6.0])
    """

    def decorate(formula):
        rounded = _rounded(formula, slope)
        signature = inspect.signature(formula)
        name = formula.__name__

        @functools.wraps(formula)
        def function(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            x, *params = given.arguments.values()
            x = real(x, name)
            number = lambda p: isinstance(p, int | float)
            return rounded(
                *_aligned(x, [jnp.asarray(p, wide(x.dtype)) if number(p) else real(p, name) for p in params])
            )

        function.formula, function.slope = formula, slope
        return function

    return decorate


def real(x, name: str) -> Float[Array, "..."]:
    """x as an array of floating point numbers; integers become float32."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: x has real numbers, got {x.dtype}. Apply it to real and imaginary part.")
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def widened(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of x computed in float32 (float64 stays), its result in x's dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> widened(jax.nn.softmax)(jnp.zeros(4, jnp.bfloat16)).dtype.name
        'bfloat16'
    """

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        x = real(x, function.__name__)
        return function(x.astype(wide(x.dtype)), *args, **kwargs).astype(x.dtype)

    return wrapped


def lean(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of x and further arrays, computed in float32 (float64 stays), rounded once to x's dtype.

    Under reverse mode it keeps its arguments only. For formulas whose plain derivative is as good as they are.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> scaled = lean(lambda x, a: a * jnp.tanh(x))
        >>> y, vjp = jax.vjp(scaled, jnp.zeros(3, jnp.bfloat16), jnp.float32(2))
        >>> y.dtype.name, vjp(y + 1)[0].tolist()
        ('bfloat16', [2.0, 2.0, 2.0])
    """

    def wrapped(x, *arrays):
        x = real(x, getattr(function, "__name__", "activation"))
        out = lambda x, *arrays: function(*_wide([x, *arrays])).astype(x.dtype)
        return jax.checkpoint(out, prevent_cse=False)(x, *(jnp.asarray(a) for a in arrays))

    return functools.wraps(function)(wrapped)


def _aligned(x: Array, params: list[Array]) -> list[Array]:
    """All with the same number of axes (scalars excepted), x in the shape of the result."""
    axes = max(a.ndim for a in (x, *params))
    params = [p if p.ndim in (0, axes) else p.reshape((1,) * (axes - p.ndim) + p.shape) for p in params]
    x = x if x.ndim == axes else x.reshape((1,) * (axes - x.ndim) + x.shape)
    return [jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, *(p.shape for p in params if p.ndim))), *params]


def _rounded(formula: Callable[..., Array], slope: Callable[..., Array]) -> Callable[..., Array]:
    @jax.custom_jvp
    def rounded(*arguments):
        return formula(*_wide(arguments)).astype(arguments[0].dtype)

    @functools.lru_cache
    def tangent(moving: tuple[int, ...]):
        """The linear map from the tangents of the arguments `moving` to the result's; it keeps its arguments only."""

        def out(arguments, moved):
            dtype = arguments[0].dtype
            arguments = _wide(arguments)
            terms = []
            for i, move in zip(moving, moved):
                move = move.astype(arguments[0].dtype)
                if i == 0:
                    terms.append(slope(*arguments) * move)
                else:
                    of_param = lambda p: formula(*arguments[:i], p, *arguments[i + 1 :])
                    terms.append(jax.jvp(of_param, (arguments[i],), (move,))[1])
            return sum(terms[1:], terms[0]).astype(dtype)

        return jax.checkpoint(out, prevent_cse=False)

    def jvp(primals, tangents):
        moving = tuple(i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero))
        out = rounded(*primals)
        if not moving:
            return out, jnp.zeros_like(out)
        return out, tangent(moving)(primals, [tangents[i] for i in moving])

    rounded.defjvp(jvp, symbolic_zeros=True)
    return rounded


def _wide(arguments) -> list[Array]:
    """All in the first one's dtype of computation."""
    return [a.astype(wide(arguments[0].dtype)) for a in arguments]
