"""Attention over a sequence that is spread over devices: keys and values travel round a ring, queries stay.

Each device attends to the keys that are with it, passes them on, and joins what it found so far with the new part by
their log-sum-exps, which is exact. Backwards the keys go round once more, and their gradients with them, so that a
device never holds more keys than its own part and the one that is passing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxml.attention import blockwise, derivatives, dispatch
from jaxml.attention.derivatives import Backend
from jaxml.attention.tiles import Inputs, Rules, add_sinks
from jaxml.axes import Array, Float, Int, wide
from jaxml.linear import linear


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
    positions = {}
    if is_causal or local_window_size is not None:
        positions = dict(q_positions=_positions(me, n, T, zigzag), kv_positions=_positions(me, n, S, zigzag))
    rules, x, _ = dispatch.normalise(
        query, key, value, scale=scale, is_causal=is_causal, local_window_size=local_window_size,
        q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids, logits_soft_cap=logits_soft_cap, **positions,
    )  # fmt: skip
    out, lse = _attend(rules, dispatch.choose(rules, x, implementation), Ring(axis_name, n), x)
    lse = lse.swapaxes(1, 2)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks[None, None])
    out = out.astype(query.dtype)
    return (out, lse) if return_residual else out


class Ring(NamedTuple):
    """A mesh axis, its devices in a circle.

    Example:
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> n, spec = jax.device_count(), P("context")
        >>> mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,))
        >>> turn = jax.shard_map(Ring("context", n).pass_on, mesh=mesh, in_specs=spec, out_specs=spec)
        >>> turn(jnp.arange(n)).tolist() == [n - 1, *range(n - 1)]
        True
    """

    axis_name: str
    n: int

    def pass_on(self, tree: Any) -> Any:
        """What each device has, at the next one."""
        return jax.lax.ppermute(tree, self.axis_name, [(i, (i + 1) % self.n) for i in range(self.n)])

    def keys(self, x: Inputs) -> tuple:
        """What travels: keys, values, and what the mask knows of them."""
        of_mask = []
        if x.mask is not None:
            x.mask.map(lambda role, a: of_mask.append(a) if role == "column" else None)
        return x.key, x.value, of_mask

    def with_keys(self, x: Inputs, keys: tuple) -> Inputs:
        """The same queries with other keys."""
        key, value, of_mask = keys
        following = iter(of_mask)
        mask = None if x.mask is None else x.mask.map(lambda role, a: next(following) if role == "column" else a)
        return x._replace(key=key, value=value, mask=mask)

    def round(self, visit: Callable, join: Callable, x: Inputs, travelling: Any = None) -> tuple[Any, Any]:
        """``visit(inputs, travelling) → (result, travelling)`` with every device's keys, the results joined.

        `travelling` goes with the keys, and is home again at the end. The next keys are on their way while a device
        computes with these: nothing of a visit waits for them (the last step passes them on for nothing).
        """
        total, travelling = visit(x, travelling)
        if self.n == 1:
            return total, travelling

        def step(carry, _):
            total, keys, travelling = carry
            following, travelling = self.pass_on(keys), self.pass_on(travelling)
            more, travelling = visit(self.with_keys(x, keys), travelling)
            return (join(total, more), following, travelling), None

        carry = total, self.pass_on(self.keys(x)), travelling
        (total, _, travelling), _ = jax.lax.scan(step, carry, length=self.n - 1)
        return total, self.pass_on(travelling)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _attend(rules: Rules, backend: Backend, ring: Ring, x: Inputs) -> tuple[Array, Array]:
    """(output in float32 or wider, log-sum-exp [B, N, T]) over the keys of all devices."""

    def visit(x, _):
        out, lse = backend.forward(rules, x)
        return (out.astype(wide(out.dtype)), lse), None

    return ring.round(visit, _join, x)[0]


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _jvp(rules, backend, ring, primals, dots):
    (x,), (dx,) = primals, dots
    out, lse = _attend(rules, backend, ring, x)
    moving = derivatives.tangents(x, dx)
    wanted = tuple(moving)
    add = lambda a, b: jax.tree.map(jnp.add, a, b)

    def tangent(residuals, dots):
        x, out, lse = residuals
        of_queries, of_keys = _apart(dots)

        def visit(x, of_keys):
            return blockwise.tangent(rules, x, out, lse, of_queries | of_keys), of_keys

        return ring.round(visit, add, x, of_keys)[0]

    def transpose(residuals, cts):
        x, out, lse = residuals

        def visit(x, sums):
            grads = derivatives.backward(rules, backend, wanted, (x, out, lse), cts)
            of_queries, of_keys = _apart({name: g.astype(wide(g.dtype)) for name, g in grads.items()})
            return of_queries, of_keys if sums is None else add(sums, of_keys)

        of_queries, of_keys = ring.round(visit, add, x)
        grads = of_queries | of_keys
        return {name: grads[name].astype(moving[name].dtype) for name in wanted}

    return (out, lse), linear(tangent, transpose, (x, out, lse), moving)


def _apart(arrays: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """(what stays with the queries, what travels with the keys)."""
    of_queries = {name: a for name, a in arrays.items() if name == "query"}
    return of_queries, {name: a for name, a in arrays.items() if name != "query"}


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


def into_zigzag(x: Array, axis_name: str) -> Array:
    """A device's part [B, T, ...] of a sequence in the order of `zigzag_order`; call it inside `jax.shard_map`.

    Of the 2n pieces a device has two neighbours, and is given a piece from the front and its mirror from the back.

    Example:
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> n, spec = jax.device_count(), P(None, "context")
        >>> mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,))
        >>> part = functools.partial(into_zigzag, axis_name="context")
        >>> turned = jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.arange(4 * n)[None])
        >>> turned[0].tolist() == zigzag_order(4 * n, n).tolist()
        True
    """
    n, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    sent = [jax.lax.ppermute(half, axis_name, way) for half, way in zip(jnp.split(x, 2, axis=1), _ways(n))]
    even = me % 2 == 0  # then the piece from the front has an even number
    front, back = (jnp.where(even, sent[i], sent[1 - i]) for i in (0, 1))
    return jnp.concatenate([front, back], axis=1)


def out_of_zigzag(x: Array, axis_name: str) -> Array:
    """The inverse of `into_zigzag`.

    Example:
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> n, spec = jax.device_count(), P(None, "context")
        >>> mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,))
        >>> part = functools.partial(out_of_zigzag, axis_name="context")
        >>> home = jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec)(zigzag_order(4 * n, n)[None])
        >>> home[0].tolist() == list(range(4 * n))
        True
    """
    n, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    front, back = jnp.split(x, 2, axis=1)
    even = me % 2 == 0
    halves = jnp.where(even, front, back), jnp.where(even, back, front)
    home = [[(to, at) for at, to in way] for way in _ways(n)]
    return jnp.concatenate([jax.lax.ppermute(half, axis_name, way) for half, way in zip(halves, home)], axis=1)


def _ways(n: int) -> list[list[tuple[int, int]]]:
    """Whither the first half of each device's part goes, and the second."""
    to = lambda piece: piece if piece < n else 2 * n - 1 - piece
    return [[(device, to(2 * device + half)) for device in range(n)] for half in (0, 1)]


def _positions(device: Array, n: int, length: int, zigzag: bool) -> Int[Array, "1 length"]:
    """Where a device's places are in the whole sequence."""
    place = jnp.arange(length, dtype=jnp.int32)[None]
    if not zigzag:
        return device.astype(jnp.int32) * length + place
    half = length // 2
    piece = jnp.where(place < half, device, 2 * n - 1 - device).astype(jnp.int32)
    return piece * half + place % half


def _join(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two attentions (output [B, T, N, H], log-sum-exp [B, N, T]) over different keys as one over all of them."""
    (out, lse), (more, more_lse) = one, other
    top = jnp.maximum(lse, more_lse)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    a, b = jnp.exp(lse - top), jnp.exp(more_lse - top)
    total = a + b
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    weight = lambda x: jnp.where(seen, x / safe, 0.0).swapaxes(1, 2)[..., None].astype(out.dtype)
    return out * weight(a) + more * weight(b), jnp.where(seen, top + jnp.log(safe), -jnp.inf)
