"""Attention over a sequence that is spread over devices: keys and values travel round a ring, queries stay.

Each device attends to the keys that are with it, passes them on, and joins what it found so far with the new part by
their log-sum-exps, which is exact. All of it is plain JAX inside `jax.shard_map`, so that every derivative works.
"""

import jax
import jax.numpy as jnp

from jaxml.attention.dispatch import flash_attention
from jaxml.attention.tiles import add_sinks
from jaxml.axes import Array, Float, Int, wide


def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H2"],
    *,
    axis_name: str,
    zigzag: bool = False,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    return_residual: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H2"] | tuple[Float[Array, "B T N H2"], Float[Array, "B T N"]]:
    """`flash_attention` of sequences whose places lie along a mesh axis; call it inside `jax.shard_map`.

    Args:
        query, key, value: this device's part, the same length on each; the whole sequence is device 0's part, then
            device 1's, … unless `zigzag`.
        axis_name: the mesh axis.
        zigzag: the sequence was put in the order of `zigzag_order`: each device has a piece from the front and the
            one that mirrors it from the back, so that under a causal mask all have the same work.
        q_segment_ids, kv_segment_ids: this device's part of them; kv's are q's where not given.
        scale, is_causal, local_window_size, logits_soft_cap, sinks, implementation: as in `flash_attention`;
            positions are those in the whole sequence.
        return_residual: return the log-sum-exp as well.

    Returns:
        This device's part of the output [B, T, N, H2], and of the log-sum-exp [B, T, N].

    Raises:
        ValueError: as `flash_attention`; with `zigzag`, an odd number of places on a device.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = jax.make_mesh((jax.device_count(),), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> part = functools.partial(ring_attention, axis_name="context", is_causal=True)
        >>> spec = P(None, "context")
        >>> attend = jax.shard_map(part, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
        >>> attend(*[jnp.ones((1, 16, 2, 8))] * 3).shape
        (1, 16, 2, 8)

    Reference:
        Liu, Zaharia and Abbeel 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context";
        the zigzag order is that of Brandon et al. 2023, "Striped Attention", by pieces instead of single places.
    """
    n, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    T, S = query.shape[1], key.shape[1]
    if zigzag and (T % 2 or S % 2):
        raise ValueError(f"ring_attention: zigzag needs an even number of places on a device, got T = {T}, S = {S}.")
    if q_segment_ids is not None and kv_segment_ids is None:
        kv_segment_ids = q_segment_ids
    compares = is_causal or local_window_size is not None
    q_at = _positions(me, n, T, zigzag)
    following = [(i, (i + 1) % n) for i in range(n)]

    def part(state):
        """Output and log-sum-exp over the keys that are here now."""
        key, value, ids, at = state
        positions = dict(q_positions=q_at, kv_positions=at) if compares else {}
        return flash_attention(
            query, key, value, scale=scale, is_causal=is_causal, local_window_size=local_window_size,
            q_segment_ids=q_segment_ids, kv_segment_ids=ids, logits_soft_cap=logits_soft_cap,
            return_residual=True, implementation=implementation, **positions,
        )  # fmt: skip

    def step(carry, _):
        out, lse, state = carry
        state = jax.lax.ppermute(state, axis_name, following)
        more, more_lse = part(state)
        return (*_join(out, lse, more.astype(out.dtype), more_lse), state), None

    state = (key, value, kv_segment_ids, _positions(me, n, S, zigzag))
    out, lse = part(state)
    out = out.astype(wide(out.dtype))
    if n > 1:
        (out, lse, _), _ = jax.lax.scan(step, (out, lse, state), length=n - 1)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks[None, None])
    out = out.astype(query.dtype)
    return (out, lse) if return_residual else out


def zigzag_order(length: int, devices: int) -> Int[Array, "length"]:
    """Where each place of the zigzag order comes from: ``x[:, zigzag_order(T, n)]`` lays a sequence out for n devices.

    `jnp.argsort` of it is the way back.

    Raises:
        ValueError: the length is no multiple of 2 · devices.

    Example:
        >>> zigzag_order(8, 2).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    if length % (2 * devices):
        raise ValueError(
            f"zigzag_order: the length is a multiple of 2 · devices = {2 * devices}, got {length}. Lengthen it."
        )
    pieces = jnp.arange(length, dtype=jnp.int32).reshape(2 * devices, -1)
    front, back = jnp.arange(devices), 2 * devices - 1 - jnp.arange(devices)
    return pieces[jnp.stack([front, back], axis=1).reshape(-1)].reshape(-1)


def _positions(device: Array, n: int, length: int, zigzag: bool) -> Int[Array, "1 length"]:
    """Where a device's places are in the whole sequence."""
    place = jnp.arange(length, dtype=jnp.int32)[None]
    if not zigzag:
        return device.astype(jnp.int32) * length + place
    half = length // 2
    piece = jnp.where(place < half, device, 2 * n - 1 - device).astype(jnp.int32)
    return piece * half + place % half


def _join(out: Array, lse: Array, more: Array, more_lse: Array) -> tuple[Array, Array]:
    """Two attentions over different keys as one over all of them."""
    top = jnp.maximum(lse, more_lse)
    top = jax.lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0.0))
    a, b = jnp.exp(lse - top), jnp.exp(more_lse - top)
    total = a + b
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    weight = lambda x: jnp.where(seen, x / safe, 0.0)[..., None].astype(out.dtype)
    return out * weight(a) + more * weight(b), jnp.where(seen, top + jnp.log(safe), -jnp.inf)
