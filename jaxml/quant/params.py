"""Whole trees of parameters, quantised and back."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxml import paths
from jaxml.axes import Params
from jaxml.quant import fp4, int4, int8, nf4
from jaxml.quant.qarray import QArray
from jaxml.weights import is_node

FORMATS: dict[str, Callable] = {
    "nf4": nf4.quantize, "fp4": fp4.quantize, "int4": int4.quantize, "int8": int8.quantize,
}  # fmt: skip


def quantize_params(
    params: Params, format: str = "nf4", *, targets: Sequence[str] = paths.ALL_LINEAR, **options: Any
) -> Params:
    """The same parameters with chosen matrices quantised; a decoder takes them as they are.

    Args:
        params: a pytree; matrices [..., in, out].
        format: "nf4", "fp4", "int4" or "int8".
        targets: shell patterns over paths such as "layers/q"; one without "/" is matched with the last part alone. A
            decoder's "embed" and "head" may be among them: their blocks run along rows.
        options: of the format's `quantize` (block, double).

    Raises:
        ValueError: a format that does not exist, an option that it does not take, a pattern that matches nothing, a
            weight that is quantised already, one that is not finite; by name.

    Example:
        >>> from jaxml import lm, quant, testing
        >>> model = testing.tiny_model()
        >>> params = quantize_params(model.params, "nf4")
        >>> params["layers"]["q"].kind, lm.decoder.apply(params, model.config, jnp.array([[1, 2, 3]])).shape
        ('nf4', (1, 3, 64))
    """
    quantize, found = of_format(format), paths.matrices(params)
    taken = [name for name in inspect.signature(quantize).parameters if name not in ("w", "axis")]
    if wrong := [name for name in options if name not in taken]:
        raise ValueError(f"quantize_params: options of {format} are {', '.join(taken)}, got {', '.join(wrong)}.")
    chosen = paths.match(found, targets, "quantize_params")
    return paths.replaced(params, {path: quantized(quantize, path, found[path], options) for path in chosen})


def of_format(format: str) -> Callable:
    """A format's `quantize`.

    Example:
        >>> of_format("int8")(jnp.ones((64, 32))).kind
        'int8'
    """
    if format not in FORMATS:
        raise ValueError(f"quant: format is one of {', '.join(FORMATS)}, got {format!r}.")
    return FORMATS[format]


def quantized(quantize: Callable, path: str, w: Any, options: dict[str, Any]) -> QArray:
    """One weight, whose name an error tells.

    Example:
        >>> quantized(int8.quantize, "layers/q", quantized(int8.quantize, "layers/q", jnp.ones((64, 32)), {}), {})
        Traceback (most recent call last):
            ...
        ValueError: layers/q: weights are quantised once, this one is in int8. Dequantise it first.
    """
    if isinstance(w, QArray):
        raise ValueError(f"{path}: weights are quantised once, this one is in {w.kind}. Dequantise it first.")
    if is_node(w):
        raise ValueError(f"quantize_params: {path} is an array, got a {type(w).__name__}. Quantise before adapting.")
    try:
        return quantize(w, axis=-1 if path in paths.TABLES else -2, **options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def dequantize_params(params: Params, dtype=None) -> Params:
    """The same parameters with an array for every quantised matrix; adapters stay around them.

    Example:
        >>> from jaxml import testing
        >>> params = quantize_params(testing.tiny_model(width=64, hidden_dim=64).params, "int8")
        >>> dequantize_params(params)["layers"]["q"].dtype.name
        'float32'
    """
    is_q = lambda w: isinstance(w, QArray)
    plain = lambda w: w.dense() if is_q(w) else w
    params = jax.tree.map(plain, params, is_leaf=is_q)
    if dtype is None:
        return params
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, params)
