"""Which program multiplies by a quantised matrix.

`xla` dequantises the whole matrix and multiplies: any format, any device, sharded by XLA. The others are kernels that
dequantise tile by tile and store nothing: `mosaic_tpu`; for GPUs with many rows `mosaic_gpu` (Hopper), with few rows
`jax_triton` (Triton itself, called by the package jax-triton) and `triton` (Pallas). All compute the forward product
and the one by the transpose, which is all that the derivatives need. Weights and results are the same to the rounding
of sums.

On a TPU the kernel comes first where it can run; on a GPU one is taken by name (`with_implementation`), until a
measurement says how many rows it is for.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxml import triton_call
from jaxml.axes import Array, Float, Params
from jaxml.linear import vary, varying_axes
from jaxml.parallel.mesh import automatic, live
from jaxml.target import INTERPRET, INTERPRET_GPU, compute_capability, named, platform

if TYPE_CHECKING:
    from jaxml.quant.qarray import QArray

IMPLEMENTATIONS = ("mosaic_tpu", "mosaic_gpu", "jax_triton", "triton", "xla")
ORDER = {"tpu": ("mosaic_tpu", "xla"), INTERPRET: ("mosaic_tpu", "xla")}  # elsewhere xla alone
GPU = ("mosaic_gpu", "jax_triton", "triton")
SHORTEST = {"mosaic_gpu": 64, "jax_triton": 32, "triton": 32}  # weights that share a scale, at least
HOPPER = 90


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The program of a product, and why it is none of the others."""

    chosen: str
    refused: dict[str, str]


def explain(x: Array, q: "QArray") -> Explanation:
    """The implementation that ``weights.dot(x, q)`` takes (shapes are enough), and why not the others.

    Example:
        >>> import jax
        >>> from jaxml import quant
        >>> q = quant.nf4.quantize(jax.random.normal(jax.random.key(0), (64, 8)))
        >>> explain(jax.ShapeDtypeStruct((2, 64), "float32"), q).chosen in IMPLEMENTATIONS
        True
    """
    chosen = choose(x, q)
    given = f"{chosen} is asked for" if q.implementation else "a faster one comes first"
    reasons = {
        name: unsupported(name, x, q) or (None if q.implementation else _not_by_itself(name)) or given
        for name in IMPLEMENTATIONS
    }
    return Explanation(chosen, {name: why for name, why in reasons.items() if name != chosen})


def with_implementation(params: Params, implementation: str | None) -> Params:
    """The same parameters, whose quantised matrices are multiplied by the implementation of that name.

    Args:
        params: a pytree; adapters may stand around the quantised matrices.
        implementation: of `IMPLEMENTATIONS`; None for the first that can (`explain`).

    Raises:
        ValueError: no such implementation. A product that it cannot compute raises NotImplementedError.

    Example:
        >>> from jaxml import quant, weights
        >>> params = {"w": quant.nf4.quantize(jnp.ones((64, 8)))}
        >>> weights.dot(jnp.ones((2, 64)), with_implementation(params, "xla")["w"]).shape
        (2, 8)
    """
    from jaxml.quant.qarray import QArray

    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"with_implementation: implementation is one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}."
        )
    is_q = lambda w: isinstance(w, QArray)
    new = lambda w: dataclasses.replace(w, implementation=implementation) if is_q(w) else w
    return jax.tree.map(new, params, is_leaf=is_q)


def choose(x: Array, q: "QArray") -> str:
    """The named implementation, or the first that can; raises where the named one cannot."""
    if q.implementation is None:
        order = ORDER.get(platform(), ("xla",))
        return next(name for name in order if not (unsupported(name, x, q) or _not_by_itself(name)))
    if reason := unsupported(q.implementation, x, q):
        raise NotImplementedError(
            f"quant: {q.implementation} cannot multiply {x.shape} by {q.kind} {q.shape}: {reason}. Take 'xla'."
        )
    return q.implementation


def unsupported(name: str, x: Array, q: "QArray") -> str | None:
    """Why the implementation cannot compute x times the matrix, or None."""
    if name == "xla":
        return None
    if reason := _device(name, x.dtype):
        return reason
    if not q.in_rows:
        return f"it needs rows of whole blocks, they have {q.rows[1]} weights in blocks of {q.block}"
    lead = q.shape[:-2]
    if x.shape[: len(lead)] != lead:
        return f"it multiplies stacked matrices by as many stacks of rows, got x {x.shape} and {q.shape}"
    if q.block < SHORTEST.get(name, 0):
        return f"it needs blocks of {SHORTEST[name]} weights or more, they have {q.block}"
    if name == "mosaic_gpu" and (q.rows[0] % 128 or q.rows[1] % 128):
        return f"it needs a matrix of multiples of 128, got {q.matrix}"
    return None


def _device(name: str, dtype) -> str | None:
    if name in GPU:
        if platform() not in ("gpu", INTERPRET_GPU):
            return f"it needs a GPU, this is {platform()!r}"
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"it computes in float32, bfloat16 and float16, x is {jnp.dtype(dtype).name}"
        if name == "mosaic_gpu":
            return _not_on_hopper(dtype)
        return triton_call.unsupported() if name == "jax_triton" else None
    from jaxml.attention import blocks  # where it is used: it brings Pallas along

    if reason := blocks.unsupported():
        return reason
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 and bfloat16, x is {jnp.dtype(dtype).name}"
    return None


def _not_on_hopper(dtype) -> str | None:
    if platform() == INTERPRET_GPU:
        return "no interpreter knows its instructions"
    if compute_capability() != HOPPER:
        return f"it needs a Hopper GPU (compute capability 9.0), this one has {compute_capability() / 10:.1f}"
    return "it computes in bfloat16 and float16, x is float32" if dtype == jnp.float32 else None


def _not_by_itself(name: str) -> str | None:
    """Why a kernel that could run is not taken unless it is named, or None."""
    if name == "xla":
        return None
    if name in GPU:
        return "on GPUs it is taken by name (quant.with_implementation)"
    mesh = jax.sharding.get_abstract_mesh()
    one = named() or jax.device_count() == 1  # a target is one device, unless a mesh says otherwise
    alone = one if mesh.empty else mesh.size == 1 or mesh.are_all_axes_manual
    return None if alone else "there are several devices, and XLA shards a kernel only within jax.shard_map"


def wants_rows(dtype: Any) -> bool:
    """Whether a kernel could multiply here, were each device of the mesh that is set given rows of its own.

    Where products are split along their sums or outputs (tensor), XLA does that.
    """
    names = ORDER.get(platform(), ("xla",))[:-1]
    return bool(automatic()) and "tensor" not in live() and any(_device(name, dtype) is None for name in names)


def product(name: str, q: "QArray", x: Float[Array, "... C"], along: bool) -> Float[Array, "... N"]:
    """x S, or x Sᵀ where the sum goes `along` the stored rows S, by that kernel.

    Args:
        q: its codes are S: two weights a byte, or one (int8); the blocks of a row are equally long.
    """
    axes = varying_axes(q, x)
    q, x = vary((q, x), axes)
    of, lead = _kernels(name).product, q.codes.shape[:-2]
    one = lambda q, x: of(q, x, along)
    for _ in lead if name != "jax_triton" else ():  # which takes a stack at once
        one = _one_by_one(one) if name == "mosaic_gpu" else jax.vmap(one)
    y = one(q, x.reshape(*lead, -1, x.shape[-1]))
    return vary(y.reshape(*x.shape[:-1], y.shape[-1]), axes)


def _one_by_one(function: Callable) -> Callable:
    """Like `jax.vmap`, for a kernel that has no rule for it."""
    return lambda *arrays: jax.lax.map(lambda each: function(*each), arrays)


def _kernels(name: str) -> types.ModuleType:
    """Imported where it is used: Pallas takes its time."""
    if name == "mosaic_gpu":
        from jaxml.quant import kernel_mosaic_gpu as module
    elif name == "jax_triton":
        from jaxml.quant import kernel_jax_triton as module
    elif name == "triton":
        from jaxml.quant import kernel_gpu as module
    else:
        from jaxml.quant import kernel_tpu as module
    return module
