"""The GPU backend `cudnn`: NVIDIA's own kernels, through `jax.nn`, for the calls that they compute exactly.

They keep no log-sum-exp in float32 and have no gradient through it. Where it is needed, `blockwise` computes it; where
it is not, a compiler leaves that out.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxml.attention import blocks, blockwise, masks
from jaxml.attention.masks import Mask
from jaxml.attention.tiles import Inputs, Rules
from jaxml.axes import Array, Float
from jaxml.target import compute_capability

IMPLEMENTATION = "cudnn"  # of `jax.nn.dot_product_attention`


def supports(rules: Rules, x: Inputs) -> str | None:
    """Why cuDNN cannot compute the call exactly, or None."""
    if reason := blocks.unsupported_gpu(interpreted=False):
        return reason
    widest = 256 if compute_capability() >= 90 else 128
    (_, T, _, H), S, H2 = x.query.shape, x.key.shape[1], x.value.shape[3]
    if x.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, query is {x.query.dtype}"
    if H != H2 or H % 8 or max(H, H2) > widest:
        return f"head dims are alike, at most {widest} and multiples of 8, got {H} and {H2}"
    unknown = dict(logits_soft_cap=rules.soft_cap, score_mod=rules.score_mod, sinks=x.sinks)
    for name, value in unknown.items():
        if value is not None:
            return f"it has no {name}"
    if rules.dropout_rate:
        return "its dropout draws other numbers"
    if x.bias is not None and (x.bias.shape[2:] != (T, S) or T % 2 or S % 2):
        return f"a bias has all of T and S, both even, got {x.bias.shape[2:]} for T = {T}, S = {S}"
    options = _options(x.mask)
    return options if isinstance(options, str) else None


def forward(rules: Rules, x: Inputs) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """(output in query's dtype, log-sum-exp of each row's logits, −inf where it sees nothing)."""
    out = _attend(rules, x, x.query, x.key, x.value)
    return out, blockwise.forward(rules, x)[1]


def backward(
    rules: Rules, x: Inputs, out: Array, lse: Array, ct_out: Array, ct_lse: Array, wanted: tuple[str, ...]
) -> dict[str, Array]:
    """Gradients of the arrays named in `wanted`; that of bias by `blockwise`."""
    by_cudnn = tuple(n for n in ("query", "key", "value") if n in wanted)
    others = tuple(n for n in wanted if n not in by_cudnn)
    grads = blockwise.backward(rules, x, out, lse, ct_out, ct_lse, others) if others else {}
    if by_cudnn:
        _, pull = jax.vjp(functools.partial(_attend, rules, x), x.query, x.key, x.value)
        found = dict(zip(("query", "key", "value"), pull(ct_out.astype(out.dtype))))
        through_lse = lambda: blockwise.backward(rules, x, out, lse, jnp.zeros_like(ct_out), ct_lse, by_cudnn)
        nothing = lambda: {n: jnp.zeros_like(found[n]) for n in by_cudnn}
        more = jax.lax.cond(jnp.any(ct_lse != 0), through_lse, nothing)
        grads |= {n: found[n] + more[n] for n in by_cudnn}
    return {name: grads[name] for name in wanted}


def _attend(rules: Rules, x: Inputs, query: Array, key: Array, value: Array) -> Array:
    """The output, 0 where nothing is seen."""
    options = _options(x.mask)
    out = jax.nn.dot_product_attention(
        query, key, value, bias=x.bias, scale=rules.scale, implementation=IMPLEMENTATION, **options
    )
    if not set(options) - {"is_causal"}:
        return out
    row, last = jnp.arange(query.shape[1])[None], key.shape[1] - 1
    q_lengths, kv_lengths = options.get("query_seq_lengths"), options.get("key_value_seq_lengths")
    left, _ = options.get("local_window_size", (query.shape[1], 0))
    first = jnp.maximum(row - left, 0)
    last = jnp.minimum(row, last) if options.get("is_causal") else last
    last = last if kv_lengths is None else jnp.minimum(last, kv_lengths[:, None] - 1)
    seen = first <= last
    seen = seen if q_lengths is None else seen & (row < q_lengths[:, None])
    return jnp.where(seen[:, :, None, None], out, 0)


def _options(mask: Mask | None) -> dict[str, Any] | str:
    """The mask as arguments of `jax.nn.dot_product_attention`, or what of it has none."""
    options, found = {}, {}
    for part in _parts(mask):
        if any(v is not None for n, v in vars(part).items() if n.endswith("positions")):
            return "it knows no positions"
        kind = type(part)
        if kind not in (masks.Causal, masks.Window, masks.Lengths) or (kind in found and kind != masks.Causal):
            return f"it knows causal masks, windows and lengths, one of each, got {kind.__name__}"
        found[kind] = part
    if masks.Causal in found:
        options["is_causal"] = True
    if (lengths := found.get(masks.Lengths)) is not None:
        for name, value in (("query", lengths.q_lengths), ("key_value", lengths.kv_lengths)):
            if value is not None:
                options[f"{name}_seq_lengths"] = jnp.asarray(value, jnp.int32)
    if (window := found.get(masks.Window)) is not None:
        if masks.Causal not in found or window.left is None or window.right is not None:
            return "a window without is_causal would see keys that it must not (jax#39576)"
        options["local_window_size"] = (window.left, 0)
    return options


def _parts(mask: Mask | None) -> list[Mask]:
    if mask is None:
        return []
    return _parts(mask.left) + _parts(mask.right) if isinstance(mask, masks.And) else [mask]
