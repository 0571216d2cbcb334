"""The definition of attention, in plain JAX. It is the specification and is never optimised."""

import jax
import jax.numpy as jnp

from jaxml.attention import masks, tiles
from jaxml.attention.tiles import Inputs, Rules
from jaxml.axes import Array, Float, wide


def attend(rules: Rules, x: Inputs) -> tuple[Float[Array, "B T N H2"], Float[Array, "B N T"]]:
    """softmax(score_mod(soft_cap(scale · q kᵀ)) + bias) v over the keys that a query may see.

    The log-sum-exp of each row's logits comes with it. A sink is one more logit of the row, without a value.
    A row that sees nothing is 0 and has the log-sum-exp −inf.
    """
    (B, T, N, _), S, K = x.query.shape, x.key.shape[1], x.key.shape[2]
    tile = masks.tile_at(0, 0, B, N, masks.Grid(T, S, T, S))
    key, value = (jnp.repeat(a, N // K, axis=2) for a in (x.key, x.value))
    s = jnp.einsum("BTNH,BSNH->BNTS", x.query, key, preferred_element_type=wide(x.query.dtype)) * rules.scale
    if rules.soft_cap is not None:
        s = rules.soft_cap * jnp.tanh(s / rules.soft_cap)
    if rules.score_mod is not None:
        s = tiles.modify(rules.score_mod, s, tile, x.data)
    if x.bias is not None:
        s = s + x.bias.astype(s.dtype)

    visible = jnp.ones((1, 1, 1, 1), bool) if x.mask is None else masks.whole(x.mask, B, N, T, S)
    visible = jnp.broadcast_to(visible, s.shape)
    top = jnp.max(s, axis=-1, where=visible, initial=-jnp.inf)
    top = top if x.sinks is None else jnp.maximum(top, x.sinks.astype(s.dtype)[None, :, None])
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))[..., None]
    e = jnp.where(visible, jnp.exp(jnp.where(visible, s - top, 0.0)), 0.0)
    total = jnp.sum(e, axis=-1, keepdims=True)
    if x.sinks is not None:
        total = total + jnp.exp(x.sinks.astype(s.dtype)[None, :, None, None] - top)
    seen = total > 0.0
    total = jnp.where(seen, total, 1.0)
    p = e / total
    if rules.dropout_rate:
        p = p * tiles.keep(rules, x.dropout_key, tile)
    out = jnp.einsum("BNTS,BSNH->BTNH", p.astype(x.value.dtype), value, preferred_element_type=wide(x.value.dtype))
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)[..., 0]
    return out.astype(x.query.dtype), lse
