"""The gated feed-forward of a transformer, h = act(x Wg, x Wu) and y = h Wd, by one kernel or by XLA.

The kernel computes both products of a tile side by side and writes h alone: the two halves are never stored. Under
reverse mode it keeps x and the weights, nothing as wide as F; a second kernel makes the halves anew, tile by tile, and
turns dy into their cotangents at once. That costs two of eleven products more, and saves three arrays [M, F] a layer.
What XLA does instead, it does with the definition and its plain derivative, which keeps those arrays.

Reference:
    Shazeer 2020, "GLU variants improve transformer", https://arxiv.org/abs/2002.05202.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxml import kernels
from jaxml.activations import gated
from jaxml.activations.arithmetic import horner
from jaxml.axes import Array, Float, wide
from jaxml.linear import linear

FUNCTIONS = {
    "glu": gated.siglu,
    "bilinear": gated.bilinear,
    "reglu": gated.reglu,
    "geglu": gated._geglu_tanh,
    "geglu_exact": gated._geglu_exact,
    "swiglu": gated.swiglu,
    "clamped_swiglu": gated.clamped_swiglu,
}
IMPLEMENTATIONS = ("xla", "kernel")


def gated_feed_forward(
    x: Float[Array, "... D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D2"] | None = None,
    *,
    function: str = "swiglu",
    implementation: str = "xla",
) -> Float[Array, "... D2"]:
    """function(x gate, x up) down; without `down` the gated linear unit alone.

    Products have operands of x's dtype and float32 sums; the function is of those sums, and rounded once.

    Args:
        function: a name in `FUNCTIONS`.
        implementation: "xla" (the definition), or "kernel" on GPUs and TPUs. Under `jit` on several devices XLA shards
            its own products; the kernel is for one device, or within `jax.shard_map`.

    Raises:
        ValueError: shapes that do not agree, an unknown function.
        NotImplementedError: the kernel cannot run here; says why.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> gate, up, down = jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.ones((8, 4))
        >>> gated_feed_forward(jnp.ones((2, 3, 4)), gate, up, down, function="bilinear")[0, 0].tolist()
        [128.0, 128.0, 128.0, 128.0]
    """
    if function not in FUNCTIONS:
        raise ValueError(f"gated_feed_forward: function is one of {', '.join(FUNCTIONS)}, got {function!r}.")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"gated_feed_forward: implementation is one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}."
        )
    width, hidden = gate.shape
    if up.shape != gate.shape or x.shape[-1] != width or (down is not None and down.shape[0] != hidden):
        shapes = f"{x.shape}, {gate.shape}, {up.shape}" + ("" if down is None else f", {down.shape}")
        raise ValueError(f"gated_feed_forward: shapes are [..., D], [D, F], [D, F], [F, D2], got {shapes}.")
    flat = x.reshape(-1, width)
    if implementation == "xla":
        y = define(function, flat, gate, up, down)
    else:
        if reason := kernels.unsupported(x.dtype):
            raise NotImplementedError(f"gated_feed_forward: the kernel cannot run here: {reason}. Take 'xla'.")
        y = _by_kernel(function, flat, gate, up, down)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def define(function: str, x: Array, gate: Array, up: Array, down: Array | None) -> Array:
    """The definition, x [M, D]."""
    h = FUNCTIONS[function].formula(_dot(x, gate), _dot(x, up)).astype(x.dtype)
    return h if down is None else _dot(h, down).astype(x.dtype)


def define_backward(function: str, x: Array, gate: Array, up: Array, down: Array | None, dy: Array):
    """(h, and the cotangents of x gate and x up): [M, F] each, in x's dtype."""
    dh = dy.astype(wide(x.dtype)) if down is None else _dot(dy.astype(x.dtype), down.T)
    h, vjp = jax.vjp(FUNCTIONS[function].formula, _dot(x, gate), _dot(x, up))
    return tuple(a.astype(x.dtype) for a in (h, *vjp(dh)))


def _dot(a: Array, b: Array) -> Array:
    return _product(a, b.astype(a.dtype))


@jax.custom_jvp
def _product(a: Array, b: Array) -> Array:
    """a b, summed in float32; its cotangent is rounded to a's dtype before it enters the products that go back.

    By itself JAX would multiply it unrounded, in float32, which on a GPU takes twice as long and twice the memory.
    """
    return jnp.matmul(a, b, preferred_element_type=wide(a.dtype))


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    y = _product(*primals)
    moving = {name: t for name, t in zip("ab", tangents) if not isinstance(t, SymbolicZero)}
    if not moving:
        return y, jnp.zeros_like(y)

    def forward(primals, dots):
        a, b = primals
        terms = {"a": lambda d: _product(d, b), "b": lambda d: _product(a, d)}
        return functools.reduce(jnp.add, [terms[name](d) for name, d in dots.items()])

    def transpose(primals, ct):
        a, b = primals
        ct = ct.astype(a.dtype)
        grads = {"a": lambda: _product(ct, b.T), "b": lambda: _product(a.T, ct)}
        return {name: grads[name]().astype(a.dtype) for name in moving}

    return y, linear(forward, transpose, primals, moving)


# ---- by a kernel -------------------------------------------------------------------------------------


def _kernels():
    """The module for the device, imported where it is used: Pallas takes its time."""
    from jaxml.activations import feed_forward_gpu, feed_forward_tpu

    return kernels.choose(feed_forward_gpu, feed_forward_tpu)


def _in_kernel(function: str):
    """The function of two float32 tiles, of operations that Mosaic and Triton have; GELUs to 1e-6 of their inputs."""
    if function == "geglu":
        a, b = 2 * (2 / math.pi) ** 0.5, 0.044715
        return lambda gate, value: gate * jax.nn.sigmoid(a * gate * (1 + b * gate * gate)) * value
    if function == "geglu_exact":
        return lambda gate, value: gate * _normal_cdf(gate) * value
    return FUNCTIONS[function].formula


def _normal_cdf(x):
    """Within 1e-7: Abramowitz and Stegun 1964, "Handbook of mathematical functions", 7.1.26."""
    z = jnp.abs(x) * 0.5**0.5
    t = 1 / (1 + 0.3275911 * z)
    tail = horner((0.0, 0.127414796, -0.142248368, 0.7107068705, -0.7265760135, 0.5307027145), t) * jnp.exp(-z * z)
    return jnp.where(x < 0, tail, 1 - tail)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_kernel(function: str, x, gate, up, down):
    h = _kernels().forward(_in_kernel(function), x, gate.astype(x.dtype), up.astype(x.dtype))
    return h if down is None else _dot(h, down).astype(x.dtype)


@functools.partial(_by_kernel.defjvp, symbolic_zeros=True)
def _(function, primals, tangents):
    y = _by_kernel(function, *primals)
    named = dict(zip(("x", "gate", "up", "down"), tangents))
    moving = {name: t for name, t in named.items() if t is not None and not isinstance(t, SymbolicZero)}
    if not moving:
        return y, jnp.zeros_like(y)

    def forward(primals, dots):
        all_dots = tuple(dots.get(name, jax.tree.map(jnp.zeros_like, p)) for name, p in zip(named, primals))
        return jax.jvp(functools.partial(define, function), primals, all_dots)[1]

    def transpose(primals, dy):
        x, gate, up, down = primals
        h, of_gate, of_up = _backward(function, x, gate, up, down, dy)
        grads = {
            "x": lambda: _dot(of_gate, gate.T) + _dot(of_up, up.T),
            "gate": lambda: _dot(x.T, of_gate),
            "up": lambda: _dot(x.T, of_up),
            "down": lambda: _dot(h.T, dy.astype(x.dtype)),
        }
        return {name: grads[name]().astype(moving[name].dtype) for name in moving}

    return y, linear(forward, transpose, primals, moving)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(function: str, x, gate, up, down, dy):
    narrow = lambda a: None if a is None else a.astype(x.dtype)
    weights = [narrow(w) for w in (gate, up, down)]
    return _kernels().backward(_in_kernel(function), x, *weights, narrow(dy))


@_backward.defjvp
def _(function, primals, tangents):
    return _backward(function, *primals), jax.jvp(functools.partial(define_backward, function), primals, tangents)[1]
