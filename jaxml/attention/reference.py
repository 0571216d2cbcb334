"""The definition of attention, in plain JAX. It is the specification and is never optimised."""

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Bool, Float, Int, wide


def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H2"],
    bias: Float[Array, "B N T S"] | None = None,
    mask: Bool[Array, "B N T S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    logits_soft_cap: float | None = None,
) -> Float[Array, "B T N H2"]:
    """softmax(scale · q kᵀ + bias) v over the keys that a query may see.

    Arguments, order and layout are those of `jax.nn.dot_product_attention`.

    Args:
        query, key, value: N is a multiple of K (grouped-query attention).
        bias: added to the scaled logits; broadcast to [B, N, T, S].
        mask: True where a query may see a key; broadcast to [B, N, T, S].
        scale: of the logits; H ** -0.5 where not given.
        is_causal: a query sees keys at its own position and before.
        local_window_size: how far to the (left, right) a query sees; one number means both.
        q_segment_ids, kv_segment_ids: a query sees keys of its own segment only.
        q_positions, kv_positions: what `is_causal` and `local_window_size` compare, instead of the
            index along the sequence. A slot whose position is larger than every query's is never seen.
        logits_soft_cap: c·tanh(logits / c) before bias and mask.

    Returns:
        In query's dtype; rows that see no key are 0. Logits and softmax are float32.

    Raises:
        ValueError: shapes that do not agree.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> q = jax.random.normal(jax.random.key(0), (1, 5, 4, 8))
        >>> kv = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
        >>> flash_attention(q, kv, kv, is_causal=True).shape
        (1, 5, 4, 8)
    """
    _check(query, key, value, q_segment_ids, kv_segment_ids, q_positions, kv_positions)
    B, T, N, H = query.shape
    S, K = key.shape[1], key.shape[2]
    scale = H**-0.5 if scale is None else scale
    G = N // K  # query heads that share a key head
    q = query.reshape(B, T, K, G, H)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, key, preferred_element_type=wide(query.dtype)) * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + _grouped(bias, K, G).astype(logits.dtype)
    visible = _visible(
        T, S, mask, is_causal, local_window_size, q_segment_ids, kv_segment_ids, q_positions, kv_positions
    )
    weights = _softmax(logits, None if visible is None else _grouped(visible, K, G)).astype(value.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value)
    return out.reshape(B, T, N, value.shape[-1]).astype(query.dtype)


def _grouped(x: Array, K: int, G: int) -> Array:
    """[B, N or 1, T, S] as [B, K or 1, G or 1, T, S]."""
    B, N, T, S = x.shape
    return x.reshape(B, 1, 1, T, S) if N == 1 else x.reshape(B, K, G, T, S)


def _softmax(logits: Array, visible: Array | None) -> Array:
    """Softmax over the last axis; a row that sees nothing is 0, and so is its gradient."""
    if visible is None:
        return jax.nn.softmax(logits, axis=-1)
    top = jnp.max(logits, axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits - top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)


def _check(query, key, value, q_segment_ids, kv_segment_ids, q_positions, kv_positions):
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"flash_attention: query, key and value have 4 axes [B, T, N, H], got {shapes}.")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"flash_attention: key and value agree in [B, S, K], query and key in batch and head dim, got {shapes}."
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            "flash_attention: the number of query heads is a multiple of the number of key heads, "
            f"got {query.shape[2]} and {key.shape[2]}."
        )
    for name, q, kv in (
        ("segment_ids", q_segment_ids, kv_segment_ids),
        ("positions", q_positions, kv_positions),
    ):
        if (q is None) != (kv is None):
            raise ValueError(f"flash_attention: q_{name} and kv_{name} are given together, got only one.")


def _visible(T, S, mask, is_causal, window, q_segment_ids, kv_segment_ids, q_positions, kv_positions):
    """[B or 1, N or 1, T, S] boolean, or None where every key is seen."""
    parts = []
    if is_causal or window is not None:
        if q_positions is None:
            q_positions, kv_positions = jnp.arange(T)[None], jnp.arange(S)[None]
        distance = (q_positions[:, :, None] - kv_positions[:, None, :])[:, None]
        if is_causal:
            parts.append(distance >= 0)
        if window is not None:
            left, right = (window, window) if isinstance(window, int) else window
            parts += [distance <= left, distance >= -right]
    if q_segment_ids is not None:
        parts.append((q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])[:, None])
    if mask is not None:
        parts.append(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))
    if not parts:
        return None
    visible = parts[0]
    for part in parts[1:]:
        visible = visible & part
    return visible
