"""What is computed on one tile of logits: the same few lines under every backend, and in the definition."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxml.attention.masks import Mask, Tile
from jaxml.axes import Array, Bool, Float, wide

LOG2E = 1.4426950408889634
NOTHING = 2.4e38  # a log-sum-exp that leaves no weight: finite, so that no difference of two is NaN
HIDDEN = -NOTHING  # a logit that nobody sees, for kernels


@dataclasses.dataclass(frozen=True)
class Rules:
    """What does not change from call to call."""

    scale: float
    soft_cap: float | None = None
    score_mod: Any = None  # (jaxpr of scalars), made by `hoist`
    dropout_rate: float = 0.0


class Inputs(NamedTuple):
    """The arrays of a call."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H2"]
    bias: Float[Array, "b n t s"] | None = None  # axes of length 1 are broadcast
    sinks: Float[Array, "N"] | None = None
    data: tuple[Array, ...] = ()  # what score_mod closes over
    mask: Mask | None = None
    dropout_key: Array | None = None  # two uint32


def products(q: Float[Array, "B N rows H"], k: Float[Array, "B K columns H"]) -> Float[Array, "B N rows columns"]:
    """q kᵀ with grouped heads, in float32 or wider."""
    out = jnp.einsum("BKrH,BKsH->BKrs", _grouped(q, k), k, preferred_element_type=wide(q.dtype))
    return out.reshape(*q.shape[:3], k.shape[2])


def _grouped(a: Float[Array, "B N rows _"], of: Float[Array, "B K columns _"]) -> Float[Array, "B K (group·rows) _"]:
    """The query heads of a key head as more of its rows: a product with more batch axes takes twice as long on CPU."""
    B, K = of.shape[:2]
    return a.reshape(B, K, -1, a.shape[3])


def shape(
    rules: Rules,
    s: Float[Array, "B N rows columns"],
    bias: Float[Array, "b n r c"] | None,
    data: tuple[Array, ...],
    tile: Tile,
) -> Array:
    """score_mod(soft_cap(s)) + bias, place by place."""
    if rules.soft_cap is not None:
        s = rules.soft_cap * jnp.tanh(s / rules.soft_cap)
    if rules.score_mod is not None:
        s = modify(rules.score_mod, s, tile, data)
    return s if bias is None else s + bias.astype(s.dtype)


def shape2(rules: Rules, s: Array, bias: Array | None, tables: tuple[Array, ...], tile: Tile) -> Array:
    """Products → logits times log₂e, for kernels: `shape` of a tile of any layout, with the inner part of score_mod."""
    if rules.soft_cap is None and rules.score_mod is None and bias is None:
        return s * (rules.scale * LOG2E)
    s = s * rules.scale
    if rules.soft_cap is not None:
        s = rules.soft_cap * jnp.tanh(s / rules.soft_cap)
    if rules.score_mod is not None:
        s = modify_tile(rules.score_mod, s, tile, tables)
    if bias is not None:
        s = s + bias.astype(s.dtype)
    return s * LOG2E


def mix(p: Float[Array, "B N rows columns"], v: Float[Array, "B K columns H2"]) -> Float[Array, "B N rows H2"]:
    """p · v with grouped heads, accumulated in float32 or wider; p is cast to v's dtype."""
    out = jnp.einsum("BKrs,BKsH->BKrH", _grouped(p.astype(v.dtype), v), v, preferred_element_type=wide(v.dtype))
    return out.reshape(*p.shape[:3], v.shape[3])


def collect(x: Float[Array, "B N rows columns"], y: Float[Array, "B N rows H"], of: Float[Array, "B K columns H"]):
    """xᵀ · y summed over the query heads of each key head of `of`, and of its shape."""
    x, y = _grouped(x.astype(y.dtype), of), _grouped(y, of)
    return jnp.einsum("BKrs,BKrH->BKsH", x, y, preferred_element_type=wide(y.dtype))


def keep(rules: Rules, key: Array, tile: Tile) -> Float[Array, "B N rows columns"]:
    """Dropout's factor on each weight: 0, or 1 / (1 − rate); a hash of the key and the place's four indices."""
    u = lambda x: x.astype(jnp.uint32)
    x = u(tile.row) * jnp.uint32(0x9E3779B1) ^ (u(tile.column) * jnp.uint32(0x85EBCA77) + key[0])
    x = _scramble(x) ^ (u(tile.batch) * jnp.uint32(0xC2B2AE3D) + u(tile.head) * jnp.uint32(0x27D4EB2F) + key[1])
    kept = _scramble(x) >= jnp.uint32(min(round(rules.dropout_rate * 2**32), 2**32 - 1))
    return kept.astype(jnp.float32) / (1.0 - rules.dropout_rate)


def _scramble(x):
    """The finaliser of MurmurHash3 (public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def finish(m: Array, total: Array, sinks: Float[Array, "N"] | None) -> tuple[Array, Array]:
    """(log-sum-exp, factor of the unnormalised output), [B, N, rows] each; −inf and 0 where nothing is seen.

    Args:
        m, total: largest logit of each row (−inf where it saw none) and the sum of exp(logit − m).
        sinks: a logit of each head that takes part in the sum and has no value.
    """
    seen = total > 0
    lse = jnp.where(seen, jnp.where(seen, m, 0.0) + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    if sinks is not None:
        lse = jnp.logaddexp(lse, sinks.astype(m.dtype)[None, :, None])
    return lse, jnp.where(seen, jnp.exp(jnp.where(seen, m - lse, 0.0)), 0.0)


def add_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """An attention without sinks as one with them; `sinks` broadcasts to `lse`, and `out` has one axis more.

    A sink only makes the sum of a row larger, so that all it does can be done afterwards.
    """
    total = jnp.logaddexp(lse, sinks.astype(lse.dtype))
    return out * jnp.exp(lse - total)[..., None].astype(out.dtype), total


def weights(s: Array, lse: Float[Array, "B N rows"], visible: Bool[Array, "..."] | None) -> Array:
    """exp(s − lse), 0 where nothing is visible; `lse` has gone through `finite`."""
    s = s if visible is None else jnp.where(visible, s, -jnp.inf)
    return jnp.exp(s - lse[..., None])


def finite(lse: Array) -> Array:
    """The log-sum-exp, so large for rows that see nothing that their weights are 0."""
    return jnp.where(lse > -jnp.inf, lse, NOTHING)


# ---- score_mod --------------------------------------------------------------------------------------


class Hoisted:
    """A score_mod whose captured arrays have become arguments; equal to itself alone."""

    def __init__(self, jaxpr):
        self.jaxpr = jaxpr


def hoist(score_mod, dtype) -> tuple[Hoisted, tuple[Array, ...]]:
    """(the function without captured arrays, the arrays): gradients can then flow to them."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(score_mod)(jax.ShapeDtypeStruct((), dtype), index, index, index, index)
    out = closed.out_avals
    if len(out) != 1 or out[0].shape != ():
        raise ValueError(
            "flash_attention: score_mod(score, batch, head, query, key) takes scalars and returns a scalar, "
            f"got {', '.join(str(a) for a in out) or 'nothing'}."
        )
    return Hoisted(closed.jaxpr), tuple(closed.consts)


def modify(mod: Hoisted, s: Float[Array, "B N rows columns"], tile: Tile, data: tuple[Array, ...]) -> Array:
    """score_mod of every logit of a tile."""

    def one(score, b, h, q, k):
        return jax.core.eval_jaxpr(mod.jaxpr, data, score, b, h, q, k)[0]

    for axes in (
        (0, None, None, None, 0),
        (0, None, None, 0, None),
        (0, None, 0, None, None),
        (0, 0, None, None, None),
    ):
        one = jax.vmap(one, axes)
    return one(s, *(x.reshape(-1) for x in tile)).astype(s.dtype)


# ---- score_mod inside a kernel: what depends on the head alone is computed outside -------------------


def split(mod: Hoisted) -> tuple[list, list, list]:
    """(equations of batch, head and data alone; the others; the variables that pass from the first to the others).

    A kernel can compute with a score and its indices, but not look them up in an array.
    """
    jaxpr = mod.jaxpr
    score, _, _, q, k = jaxpr.invars
    moving, outside, inside = {score, q, k}, [], []
    is_variable = lambda v: not hasattr(v, "val")
    for eqn in jaxpr.eqns:
        depends = any(is_variable(v) and v in moving for v in eqn.invars)
        (inside if depends else outside).append(eqn)
        if depends:
            moving.update(eqn.outvars)
    used = [v for eqn in inside for v in eqn.invars] + list(jaxpr.outvars)
    passed = list(dict.fromkeys(v for v in used if is_variable(v) and v not in moving))
    return outside, inside, passed


def outside_kernels(rules: Rules, x: Inputs) -> str | None:
    """Why a kernel cannot compute the call's tiles, or None: it has no way to look things up in arrays."""
    if rules.score_mod is not None and needs_arrays(rules.score_mod):
        return "score_mod looks something up in an array by query, key or score; kernels can only compute with them"
    shapes = []
    if x.mask is not None:
        x.mask.map(lambda role, a: shapes.append(jnp.shape(a)) if role == "data" else None)
    if any(shape != () for shape in shapes):
        return f"the function of a mask holds arrays {shapes}; kernels take only scalars"
    return None


def num_tables(mod: Hoisted) -> int:
    """How many numbers of each batch row and head the inner part needs."""
    return len(split(mod)[2])


def needs_arrays(mod: Hoisted) -> bool:
    """Whether the score or its position picks from an array."""
    return any(v.aval.shape != () for v in split(mod)[2])


def tables(mod: Hoisted, data: tuple[Array, ...], N: int, B: int) -> list[Float[Array, "B N"]]:
    """The numbers of each batch row and head that the inner part needs."""
    outside, _, passed = split(mod)
    _, b, h, _, _ = mod.jaxpr.invars

    of = lambda batch, head: _run(mod, outside, (*mod.jaxpr.constvars, b, h), passed, (*data, batch, head))
    batch, head = jnp.arange(B, dtype=jnp.int32), jnp.arange(N, dtype=jnp.int32)
    return jax.vmap(jax.vmap(of, (None, 0)), (0, None))(batch, head)


def modify_tile(mod: Hoisted, s: Array, tile: Tile, tables: tuple[Array, ...]) -> Array:
    """score_mod of a tile of any layout; its indices and tables broadcast to it."""
    _, inside, passed = split(mod)
    score, _, _, q, k = mod.jaxpr.invars

    one = lambda *values: _run(mod, inside, (score, q, k, *passed), mod.jaxpr.outvars, values)[0]
    spread = [jnp.broadcast_to(a, s.shape) for a in (tile.row, tile.column, *tables)]
    for _ in s.shape:
        one = jax.vmap(one)
    return one(s, *spread).astype(s.dtype)


def _run(mod: Hoisted, equations, inputs, outputs, values) -> list[Array]:
    """The values of `outputs`, by some of the equations, from those of `inputs`."""
    part = mod.jaxpr.replace(
        constvars=[], invars=list(inputs), outvars=list(outputs), eqns=list(equations), debug_info=_no_names(mod.jaxpr)
    )
    return jax.core.eval_jaxpr(part, (), *values)


def _no_names(jaxpr):
    """The jaxpr's debug information without the names of arguments and results, which have changed."""
    return jaxpr.debug_info._replace(arg_names=None, result_paths=None)
