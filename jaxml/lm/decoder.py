"""The decoder: one page of pure functions for every Llama-like family.

``params`` is a pytree with string keys. All layers' weights lie stacked along a first axis and are
scanned, or are a tuple of layers, which are unrolled (`unstack`: faster to decode with on CPU).
A matrix is [in, out]; each may be a weight node instead of an array (`jaxml.weights`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import weights
from jaxml.attention import Causal, Mask, Segments, spread
from jaxml.attention import Prefix as PrefixMask
from jaxml.axes import Array, Float, Int, Params, wide
from jaxml.lm import cache as caches
from jaxml.lm import feed_forward
from jaxml.lm.cache import EMPTY, Cache
from jaxml.lm.config import DecoderConfig, RopeScaling
from jaxml.parallel import rules
from jaxml.weights import Weight, dot, is_node


def shapes(config: DecoderConfig) -> dict[str, Any]:
    """The shape of every parameter, as a tree of tuples.

    Example:
        >>> from jaxml import testing
        >>> found = shapes(testing.tiny_config())
        >>> found["embed"], found["layers"]["k"], "head" in found   # its head is the embedding
        ((64, 32), (2, 32, 16), False)
    """
    c, L, D = config, config.num_layers, config.width
    NH, KH = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layers = {
        "attn_norm": (L, D),
        "q": (L, D, NH),
        "k": (L, D, KH),
        "v": (L, D, KH),
        "o": (L, NH, D),
        "mlp_norm": (L, D),
        **feed_forward.shapes(c),
    }
    if c.qkv_bias:
        layers |= {"q_bias": (L, NH), "k_bias": (L, KH), "v_bias": (L, KH)}
    if c.o_bias:
        layers |= {"o_bias": (L, D)}
    if c.qk_norm:
        layers |= {"q_norm": (L, c.head_dim), "k_norm": (L, c.head_dim)}
    if c.post_norms:
        layers |= {"post_attn_norm": (L, D), "post_mlp_norm": (L, D)}
    tree = {"embed": (c.vocab_size, D), "layers": layers, "norm": (D,)}
    return tree if c.tied_embeddings else tree | {"head": (c.vocab_size, D)}


def init(key: Array, config: DecoderConfig, dtype=jnp.float32) -> Params:
    """Random parameters: matrices normal with deviation 0.02, norms at 1, biases at 0.

    Example:
        >>> import jax
        >>> from jaxml import testing
        >>> params = init(jax.random.key(0), testing.tiny_config())
        >>> params["layers"]["q"].shape
        (2, 32, 32)
    """
    tree = shapes(config)
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda s: isinstance(s, tuple))
    keys = iter(jax.random.split(key, len(paths)))

    def leaf(path, shape):
        name, k = path[-1].key, next(keys)
        if name.endswith("norm"):
            return jnp.full(shape, 0.0 if config.norm_plus_one else 1.0, dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape, dtype)
        start = feed_forward.init(k, config, name, shape)
        if start is not None:
            return start.astype(dtype)
        return (0.02 * jax.random.normal(k, shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=lambda s: isinstance(s, tuple))


def apply(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    ends: Int[Array, "B T"] | None = None,
    past: Cache | None = None,
    remat: bool = False,
) -> Float[Array, "B T V"]:
    """Logits (float32) of the next token after each token.

    Args:
        tokens: token ids below V.
        positions: for the rotary embedding, counted on from the past; 0, 1, 2, … where not given.
        segment_ids: tokens attend within their own segment (packed documents; padding has one of its own).
        ends: of a tree of texts laid out depth first (`lm.tree`): the place after the last one that continues each
            token; nothing from there on sees it.
        past: what every token sees before its row: keys and values of the rows, or of one row for all. Where None,
            the prompt that these parameters were tuned with (`jaxml.tune.prompt`), if there is one.
        remat: recompute each layer in the backward pass instead of keeping its activations.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxml import testing
        >>> config = testing.tiny_config()
        >>> params = init(jax.random.key(0), config)
        >>> apply(params, config, jnp.array([[1, 2, 3]])).shape
        (1, 3, 64)
    """
    more = dict(positions=positions, segment_ids=segment_ids, ends=ends, past=past, remat=remat)
    return logits(params, config, hidden(params, config, tokens, **more))


def apply_cached(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    cache: Cache,
    *,
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Cache]:
    """Final hidden states of tokens that follow what the cache holds, and the cache with them in it.

    Args:
        positions: of the new tokens; `EMPTY` marks padding, which nobody will attend to.

    Example:
        >>> from jaxml import testing
        >>> model, tokens = testing.tiny_model(), jnp.array([[4, 5, 6]])
        >>> cache = caches.init(model.config, batch=1, slots=3)
        >>> step = jax.jit(apply_cached, static_argnums=1)
        >>> for i in range(3):
        ...     x, cache = step(model.params, model.config, tokens[:, i : i + 1], cache, positions=jnp.array([[i]]))
        >>> bool(jnp.allclose(x[:, 0], hidden(model.params, model.config, tokens)[:, 2], atol=1e-4))
        True
    """
    x = embed(params, config, tokens)
    kv_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.length, axis=1)
    attend = dict(q_positions=positions, kv_positions=kv_positions)
    x, (key, value) = _layers(params, config, x, positions, attend, (cache.key, cache.value), cache.length)
    x, key, value = _norm(x, params["norm"], config), caches.spread(key), caches.spread(value)
    return x, Cache(key=key, value=value, positions=kv_positions, length=cache.length + tokens.shape[1])


def hidden(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    ends: Int[Array, "B T"] | None = None,
    past: Cache | None = None,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """Final hidden states, after the last norm and before the head (arguments as in `apply`).

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> x = hidden(model.params, model.config, jnp.array([[4, 5, 6]]))
        >>> x.shape, jnp.mean(x**2, axis=-1).round(2).tolist()   # the last norm's weights are 1
        ((1, 3, 32), [[1.0, 1.0, 1.0]])
    """
    if tokens.ndim != 2:
        raise ValueError(f"decoder: tokens have the shape [B, T], got {tokens.shape}.")
    x = embed(params, config, tokens)
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    past = prefix(params, config) if past is None else past
    turned = past is None and ends is None and spread.can_zigzag(tokens.shape[1])
    if turned:
        positions, segment_ids, x = spread.into_zigzag((positions, segment_ids, x))
    if past is None and ends is None:
        attend = dict(q_segment_ids=segment_ids, kv_segment_ids=segment_ids, zigzag=turned)
    else:
        positions, attend = _visible(tokens, positions, segment_ids, ends, past)
    params = params if past is None else params | {"layers": _with_past(params["layers"], past)}
    x, _ = _layers(params, config, x, positions, attend, None, None, remat=remat)
    x = _norm(x, params["norm"], config)
    return spread.out_of_zigzag(x) if turned else x


def embed(params: Params, config: DecoderConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What goes into the first layer.

    Example:
        >>> from jaxml import testing
        >>> table = jnp.array([[0.0, 1.0], [2.0, 3.0]])
        >>> embed({"embed": table}, testing.tiny_config(embed_scale=10.0), jnp.array([[1, 0]])).tolist()
        [[[20.0, 30.0], [0.0, 10.0]]]
    """
    x = rules.hint(rules.take(params["embed"], tokens), "batch", "length", None)
    return x if config.embed_scale is None else x * jnp.asarray(config.embed_scale, x.dtype)


def prefix(params: Params, config: DecoderConfig) -> Cache | None:
    """What these parameters put before every text: the keys and values of a trained prompt (`jaxml.tune.prompt`).

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import prompt
        >>> node = prompt.Prefix(*jnp.zeros((2, 2, 1, 2, 4, 8)))   # keys and values of 2 layers, 4 places
        >>> prefix({"prefix": node}, testing.tiny_config()).positions.tolist()
        [[0, 1, 2, 3]]
    """
    return params["prefix"].cache(params, config) if "prefix" in params else None


def num_places(params: Params) -> int:
    """How many places of the context a trained prompt takes.

    Example:
        >>> from jaxml.tune import prompt
        >>> num_places({"prefix": prompt.SoftPrompt(jnp.zeros((1, 4, 32)))}), num_places({})
        (4, 0)
    """
    return params["prefix"].places if "prefix" in params else 0


def read(params: Params, config: DecoderConfig, x: Float[Array, "B T D"]) -> Cache:
    """The keys and values of a text that is given as embeddings; differentiable, and as long as the text.

    Example:
        >>> from jaxml import testing
        >>> params, config = testing.tiny_model().params, testing.tiny_config()
        >>> past = read(params, config, embed(params, config, jnp.array([[4, 5, 6]])))
        >>> past.key.shape, past.positions.tolist()   # layers, rows, heads, slots, head dim
        ((2, 1, 2, 3, 8), [[0, 1, 2]])
    """
    _, (key, value) = _layers(params, config, x, jnp.arange(x.shape[1])[None], {}, None, None, keep=True)
    return caches.full(key.swapaxes(2, 3), value.swapaxes(2, 3))


def logits(params: Params, config: DecoderConfig, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """The head: hidden states to float32 logits over the vocabulary.

    Example:
        >>> from jaxml import testing
        >>> table = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> logits({"embed": table}, testing.tiny_config(), jnp.array([[3.0, 4.0]])).tolist()
        [[3.0, 4.0, 7.0]]
    """
    out = weights.einsum("...D,VD->...V", x, head(params)).astype(wide(x.dtype))
    cap = config.logits_soft_cap
    return out if cap is None else cap * jnp.tanh(out / cap)


def head(params: Params) -> Float[Array, "V D"] | Weight:
    """The matrix that makes logits: the embedding where it is tied, without what adapts it as an embedding.

    Example:
        >>> table, own = jnp.ones((4, 2)), jnp.zeros((4, 2))
        >>> head({"embed": table}) is table, head({"embed": table, "head": own}) is own
        (True, True)
    """
    return params["head"] if "head" in params else getattr(params["embed"], "untied", params["embed"])


def unstack(params: Params) -> Params:
    """The same parameters with a tuple of layers in place of stacked arrays (a copy of the layers).

    Example:
        >>> params = {"layers": {"attn_norm": jnp.array([[0.0, 1.0], [2.0, 3.0]])}}
        >>> [layer["attn_norm"].tolist() for layer in unstack(params)["layers"]]
        [[0.0, 1.0], [2.0, 3.0]]
    """
    if isinstance(params["layers"], tuple):
        return params
    num_layers = params["layers"]["attn_norm"].shape[0]
    take = lambda i: weights.layer_of(params["layers"], lambda a: a[i])
    return params | {"layers": tuple(take(i) for i in range(num_layers))}


# ---- the layers -------------------------------------------------------------------------------------


def _visible(tokens, positions, segment_ids, ends, past) -> tuple[Array, dict[str, Any]]:
    """(positions after the past, the arguments of attention that say what each token sees of past and row)."""
    B, T = tokens.shape
    P = 0 if past is None else past.slots
    rows = lambda a: jnp.broadcast_to(a, (B, a.shape[1]))
    positions = rows(positions)
    kv_positions = positions
    if past is not None:
        positions = jnp.where(positions == EMPTY, EMPTY, positions + past.after[:, None])
        kv_positions = jnp.concatenate([rows(past.positions), positions], axis=1)
    seen: Mask | None = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (P, 0)))
        seen = Segments(segment_ids, ids) | PrefixMask(jnp.full(B, P))
    if ends is not None:
        index = jnp.arange(P + T)[None]
        last = jnp.pad(ends + P, ((0, 0), (P, 0)), constant_values=EMPTY)
        tree = Causal(index[:, P:], index) & ~Causal(index[:, P:], last)
        seen = tree if seen is None else seen & tree
    return positions, dict(q_positions=positions, kv_positions=kv_positions, mask=seen)


def _with_past(layers, past: Cache):
    """The layers, each with the keys and values of its own that stand before the row's."""
    kv = {"past_key": past.key, "past_value": past.value}
    if isinstance(layers, tuple):
        return tuple(layer | {name: a[i] for name, a in kv.items()} for i, layer in enumerate(layers))
    return layers | kv


def _layers(params, config, x, positions, attend, kv, length, remat=False, keep=False):
    """All layers in order; kv is None or (key, value), [L, B, K, S, H] each, written at `length`.

    With `keep`, and kv None, the keys and values that the layers made are returned, [L, B, T, K, H] each.
    """
    rotary = _rotary_tables(config, positions)
    kinds, layers = config.layer_kinds, params["layers"]

    def run(x, kv, layer, i, kind):
        """Layer number i (may be traced), whose kind is known."""
        with jax.named_scope("layer"):
            x, new = _layer(rules.whole(layer), config, x, rotary, attend, kv, i, length, kind)
        return rules.hint(x, "batch", "length", None), None if kv is None and not keep else new

    scanned = not isinstance(layers, tuple)
    run = jax.checkpoint(run, static_argnums=(4,)) if remat else rules.gathering(run, scanned, static_argnums=(4,))
    stack = lambda made: jax.tree.map(lambda *a: jnp.stack(a), *made)
    if not scanned:
        made = []
        for i, layer in enumerate(layers):
            x, new = run(x, kv, layer, i, kinds[i])
            made, kv = ([*made, new], None) if keep else (made, new)
        return x, stack(made) if keep else kv

    period = config.period
    groups, rest = divmod(config.num_layers, period)

    stacked, join = weights.apart(layers)

    def body(carry, inputs):
        x, kv = carry
        group, g = inputs
        made = []
        for j in range(period):
            layer = join(group if period == 1 else jax.tree.map(lambda a: a[j], group))
            x, new = run(x, kv, layer, g * period + j, kinds[j])
            made, kv = ([*made, new], None) if keep else (made, new)
        return (x, kv), stack(made) if keep else None

    if period > 1:
        stacked = jax.tree.map(lambda a: a[: groups * period].reshape(groups, period, *a.shape[1:]), stacked)
    (x, kv), made = jax.lax.scan(body, (x, kv), (stacked, jnp.arange(groups)))
    made = jax.tree.map(lambda a: a.reshape(groups * period, *a.shape[2:]), made)
    for i in range(config.num_layers - rest, config.num_layers):
        x, new = run(x, kv, weights.layer_of(layers, lambda a: a[i]), i, kinds[i])
        made, kv = (jax.tree.map(lambda a, n: jnp.concatenate([a, n[None]]), made, new), None) if keep else (made, new)
    return x, made if keep else kv


def _layer(layer, config, x, rotary, attend, kv, i, length, kind):
    y, kv = _attention(layer, config, _norm(x, layer["attn_norm"], config), rotary, attend, kv, i, length, kind)
    x = x + (_norm(y, layer["post_attn_norm"], config) if config.post_norms else y)
    y = feed_forward.apply(layer, config, _norm(x, layer["mlp_norm"], config), _dense)
    return x + (_norm(y, layer["post_mlp_norm"], config) if config.post_norms else y), kv


def _attention(layer, config, x, rotary, attend, kv, i, length, kind):
    """(output, the cache with this layer's keys and values in it; or those alone where there is no cache)."""
    local, rotated = kind
    B, T, _ = x.shape
    q = _dense(layer, "q", x).reshape(B, T, config.num_heads, config.head_dim)
    k = _dense(layer, "k", x).reshape(B, T, config.num_kv_heads, config.head_dim)
    v = _dense(layer, "v", x).reshape(B, T, config.num_kv_heads, config.head_dim)
    if config.qk_norm:
        q, k = _norm(q, layer["q_norm"], config), _norm(k, layer["k_norm"], config)
    if rotated:
        table = rotary["local" if local and "local" in rotary else "global"]
        q, k = _rotate(q, table), _rotate(k, table)
    made = (k, v)
    if kv is not None:
        new = (k.swapaxes(1, 2)[None], v.swapaxes(1, 2)[None])
        kv = tuple(jax.lax.dynamic_update_slice(a, n.astype(a.dtype), (i, 0, 0, length, 0)) for a, n in zip(kv, new))
        k, v = (jax.lax.dynamic_index_in_dim(a, i, keepdims=False).swapaxes(1, 2).astype(x.dtype) for a in kv)
    if "past_key" in layer:
        before = (layer[name].swapaxes(1, 2).astype(x.dtype) for name in ("past_key", "past_value"))
        k, v = (jnp.concatenate([jnp.broadcast_to(a, (B, *a.shape[1:])), n], 1) for a, n in zip(before, (k, v)))
    out = spread.attend(
        q,
        k,
        v,
        scale=config.query_scale,
        is_causal=True,
        local_window_size=(config.window - 1, 0) if local else None,
        logits_soft_cap=config.attention_soft_cap,
        **attend,
    )
    return _dense(layer, "o", out.reshape(B, T, -1)), made if kv is None else kv


def _dense(layer, name, x):
    y = dot(x, layer[name])
    bias = layer.get(name + "_bias")
    return y if bias is None else y + _across(bias, y)


def _norm(x: Float[Array, "... D"], weight: Float[Array, "D"], config: DecoderConfig):
    """RMSNorm, in float32 (or wider) inside."""
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    w = _across(weight, y)
    return (y * (1.0 + w if config.norm_plus_one else w)).astype(x.dtype)


def _across(v: Float[Array, "D"], x: Float[Array, "... D"]) -> Array:
    """A vector over the last axis, in x's rank and dtype."""
    v = weights.dense(v)
    return v.astype(x.dtype).reshape((1,) * (x.ndim - 1) + v.shape)


# ---- rotary embedding -------------------------------------------------------------------------------


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Angles per position, [H / 2] float32, and the factor on sine and cosine.

    Example:
        >>> angles, factor = rope_frequencies(4, 100.0, RopeScaling("linear", factor=2.0))
        >>> [round(float(angle), 3) for angle in angles], factor
        ([0.5, 0.05], 1.0)
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    s = scaling
    if s is None:
        return inv, 1.0
    if s.kind == "linear":
        return inv / np.float32(s.factor), 1.0
    if s.kind == "factors":
        return inv / np.asarray(s.factors, np.float32), 1.0
    if s.kind == "llama3":
        turns = s.original_max_length * inv / (2 * math.pi)  # rotations within the trained context
        smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return ((1 - smooth) * inv / s.factor + smooth * inv).astype(np.float32), 1.0
    if s.kind == "yarn":
        where = lambda turns: head_dim * math.log(s.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        low, high = where(s.beta_fast), where(s.beta_slow)
        if s.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        inv = inv / s.factor * ramp + inv * (1 - ramp)
        default = 0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0
        return inv.astype(np.float32), default if s.attention_factor is None else s.attention_factor
    raise ValueError(f"rope_frequencies: kind is linear, llama3, yarn or factors, got {s.kind!r}.")


def _rotary_tables(config: DecoderConfig, positions: Int[Array, "B T"]) -> dict[str, tuple[Array, Array]]:
    """(cos, sin), [B, T, 1, H / 2] float32, for global layers and, where they differ, for local ones."""

    def table(theta, scaling):
        inv, factor = rope_frequencies(config.head_dim, theta, scaling)
        where = jnp.where(positions == EMPTY, 0, positions)  # padding: any finite angle
        angle = where[..., None].astype(jnp.float32) * inv[None, None]
        angle = angle[:, :, None]
        return jnp.cos(angle) * factor, jnp.sin(angle) * factor

    tables = {"global": table(config.rope_theta, config.rope_scaling)}
    if config.local_rope_theta is not None:
        tables["local"] = table(config.local_rope_theta, None)
    return tables


def _rotate(x: Float[Array, "B T N H"], table: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + H/2]); angles and product in float32."""
    cos, sin = table
    a, b = jnp.split(x.astype(wide(x.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def num_params(params: Params) -> int:
    """How many numbers the tree holds (a weight node counts what it stands for).

    Example:
        >>> from jaxml import quant
        >>> num_params({"q": quant.int8.quantize(jnp.ones((64, 8))), "norm": jnp.ones(64)})
        576
    """
    leaves = jax.tree.leaves(params, is_leaf=is_node)
    return sum(math.prod(w.shape) for w in leaves)


def cast(params: Params, dtype) -> Params:
    """Floating arrays in another dtype; a weight node for products in that dtype.

    Example:
        >>> made = cast({"norm": jnp.ones(2), "ids": jnp.arange(2)}, jnp.bfloat16)
        >>> {name: a.dtype.name for name, a in made.items()}
        {'ids': 'int32', 'norm': 'bfloat16'}
    """
    to = lambda a: a.astype(dtype) if is_node(a) or jnp.issubdtype(a.dtype, jnp.floating) else a
    return jax.tree.map(to, params, is_leaf=is_node)
