"""`flash_attention`: one function for every place that attends, and which backend computes it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxml.attention import blockwise, cudnn, masks, pallas_hopper, pallas_tpu, pallas_triton, reference, tiles
from jaxml.attention.derivatives import Backend, attend
from jaxml.attention.masks import Mask
from jaxml.attention.tiles import Inputs, Rules
from jaxml.axes import Array, Bool, Float, Int, wide
from jaxml.target import platform

BLOCKWISE = Backend("blockwise", blockwise.supports, blockwise.forward, blockwise.backward)
MOSAIC_TPU = Backend("mosaic_tpu", pallas_tpu.supports, pallas_tpu.forward, pallas_tpu.backward)
MOSAIC_GPU = Backend("mosaic_gpu", pallas_hopper.supports, pallas_hopper.forward, pallas_hopper.backward)
FUSED = Backend("mosaic_gpu_fused", pallas_hopper.fused_supports, pallas_hopper.forward, pallas_hopper.fused_backward)
TRITON = Backend("triton", pallas_triton.supports, pallas_triton.forward, pallas_triton.backward)
JAX_TRITON = Backend(
    "jax_triton",
    pallas_triton.jax_triton_supports,
    pallas_triton.forward_by_jax_triton,
    pallas_triton.backward_by_jax_triton,
)
CUDNN = Backend("cudnn", cudnn.supports, cudnn.forward, cudnn.backward)
REFERENCE = Backend("reference", blockwise.supports, reference.attend, blockwise.backward)
BACKENDS = {b.name: b for b in (MOSAIC_TPU, MOSAIC_GPU, FUSED, TRITON, JAX_TRITON, CUDNN, BLOCKWISE)}
ORDER = {"tpu": ("mosaic_tpu", "blockwise")}  # elsewhere blockwise alone
UNTRIED = "it has not run on a GPU yet; name it to take it"
BY_NAME = dict.fromkeys(("mosaic_gpu", "mosaic_gpu_fused", "triton", "jax_triton", "cudnn"), UNTRIED)


def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H2"],
    bias: Float[Array, "B N T S"] | None = None,
    mask: Bool[Array, "B N T S"] | Mask | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    q_segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    score_mod: Callable[..., Array] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    return_residual: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H2"] | tuple[Float[Array, "B T N H2"], Float[Array, "B T N"]]:
    """softmax(score_mod(soft_cap(scale · q kᵀ)) + bias) v over the keys that a query may see, exactly.

    Memory grows with T + S, not with T · S, forwards and backwards. Arguments, order and layout are those of
    `jax.nn.dot_product_attention`, extended. Differentiable to any order in either mode, with respect to query,
    key, value, bias, sinks and the arrays that `score_mod` closes over, through the residual too.

    Args:
        query, key, value: any lengths; N is a multiple of K (grouped-query attention); H and H2 may differ. One
            dtype: float32, bfloat16, float16 (or float64). The batch axis may be left out of all arrays.
        bias: added to the logits; broadcast to [B, N, T, S] and never materialised.
        mask: True where a query may see a key; a boolean array, broadcast likewise, or a `jaxml.attention.Mask`.
        scale: of the logits; H ** -0.5 where not given.
        is_causal: a query sees keys at its own position and before (position 0 of both at the left).
        query_seq_lengths, key_value_seq_lengths: how many of a row's queries and keys exist.
        local_window_size: how far to the (left, right) a query sees; one number means both.
        q_segment_ids, kv_segment_ids: a query sees keys of its own segment (packing); kv's are q's where not given.
        q_positions, kv_positions: what `is_causal` and `local_window_size` compare, instead of the index along
            the sequence. A key whose position is larger than every query's is never seen.
        logits_soft_cap: c·tanh(logits / c), before score_mod, bias and masks.
        sinks: of each head, the logit of one more key that has no value.
        score_mod: (score, batch, head, query index, key index) → score, of scalars (ALiBi and its like).
        dropout_rate, dropout_key: of the weights after the softmax; a key of `jax.random` decides.
        return_residual: return the log-sum-exp of each query's logits as well.
        implementation: "reference", "blockwise", …: that backend or an error; the first that can where None
            (`explain` tells which). The result does not depend on it beyond rounding.

    Returns:
        The output in query's dtype; rows that see no key are 0. With `return_residual` also the log-sum-exp,
        [B, T, N], in float32 (−inf for rows that see no key). Logits and softmax are float32.

    Raises:
        ValueError: shapes or dtypes that do not agree, arguments that contradict each other.
        NotImplementedError: the named implementation cannot do it; says why.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> q = jax.random.normal(jax.random.key(0), (1, 5, 4, 8))
        >>> kv = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
        >>> flash_attention(q, kv, kv, is_causal=True).shape
        (1, 5, 4, 8)

    Reference:
        Dao et al. 2022, "FlashAttention"; Rabe and Staats 2021, "Self-attention does not need O(n²) memory".
    """
    given = {k: v for k, v in locals().items() if k not in ("return_residual", "implementation")}
    rules, x, batched = normalise(**given)
    if implementation == "reference":
        out, lse = reference.attend(rules, x)
    else:
        out, lse = attend(rules, choose(rules, x, implementation), x)
    lse = lse.swapaxes(1, 2)
    out, lse = (out, lse) if batched else (out[0], lse[0])
    return (out, lse) if return_residual else out


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend a call gets, and why not the others.

    Example:
        >>> Explanation("blockwise", {"mosaic_tpu": "it needs a TPU, this is cpu"}).chosen
        'blockwise'
    """

    chosen: str
    refused: dict[str, str]

    def __str__(self) -> str:
        return "\n".join([f"chosen: {self.chosen}", *(f"not {name}: {why}" for name, why in self.refused.items())])


def explain(*args, implementation: str | None = None, **kwargs) -> Explanation:
    """The backend that `flash_attention` takes for a call with these arguments (shapes are enough).

    Example:
        >>> import jax
        >>> q = jax.ShapeDtypeStruct((1, 5, 4, 8), "float32")
        >>> print(explain(q, q, q).chosen in BACKENDS)
        True
    """
    kwargs.pop("return_residual", None)
    names = ("query", "key", "value", "bias", "mask")
    chosen = {}

    def call(**arrays):
        rules, x, _ = normalise(**static, **arrays)
        chosen["name"] = choose(rules, x, implementation).name
        chosen["refused"] = _refused(rules, x)
        return 0

    given = dict(zip(names, args)) | kwargs
    is_data = lambda v: isinstance(v, Mask) or hasattr(v, "shape")
    static = {k: v for k, v in given.items() if not is_data(v)}
    jax.eval_shape(call, **{k: v for k, v in given.items() if is_data(v)})
    return Explanation(chosen["name"], {k: v for k, v in chosen["refused"].items() if k != chosen["name"]})


def _refused(rules: Rules, x: Inputs) -> dict[str, str]:
    """Backend → why this platform or call does not get it."""
    chosen = _first(rules, x).name
    reason = lambda b: b.supports(rules, x) or BY_NAME.get(b.name, "a faster one comes first")
    reasons = {name: reason(backend) for name, backend in BACKENDS.items()}
    return {name: reason for name, reason in reasons.items() if name != chosen}


def _first(rules: Rules, x: Inputs) -> Backend:
    """The first in the platform's order that can."""
    order = ORDER.get(platform(), ("blockwise",))
    return next(BACKENDS[name] for name in order if BACKENDS[name].supports(rules, x) is None)


def choose(rules: Rules, x: Inputs, implementation: str | None) -> Backend:
    """The named backend, or the first that can; raises where the named one cannot."""
    if implementation is None:
        return _first(rules, x)
    if implementation == "reference":
        return REFERENCE
    if implementation not in BACKENDS:
        raise ValueError(
            f"flash_attention: implementation is one of reference, {', '.join(BACKENDS)}, got {implementation!r}."
        )
    reason = BACKENDS[implementation].supports(rules, x)
    if reason is not None:
        others = [n for n, b in BACKENDS.items() if b.supports(rules, x) is None]
        raise NotImplementedError(
            f"flash_attention: {implementation} cannot do this: {reason}. These can: reference, {', '.join(others)}."
        )
    return BACKENDS[implementation]


# ---- from arguments to arrays and rules -------------------------------------------------------------


def normalise(
    query,
    key,
    value,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    q_segment_ids=None,
    kv_segment_ids=None,
    q_positions=None,
    kv_positions=None,
    logits_soft_cap=None,
    sinks=None,
    score_mod=None,
    dropout_rate=0.0,
    dropout_key=None,
) -> tuple[Rules, Inputs, bool]:
    """(rules, inputs with a batch axis, whether they had one); everything is checked here."""
    batched = query.ndim != 3 or key.ndim != 3 or value.ndim != 3
    lead = (lambda a: a) if batched else (lambda a: None if a is None else a[None])
    query, key, value = map(lead, (query, key, value))
    _check_arrays(query, key, value)
    (B, T, N, H), S = query.shape, key.shape[1]
    bias = _four(bias, "bias", (B, N, T, S))
    if not isinstance(mask, Mask):
        mask = _four(mask, "mask", (B, N, T, S))
        if mask is not None and mask.dtype != jnp.bool_:
            raise ValueError(f"flash_attention: mask is boolean, got {mask.dtype}. Add floating masks as bias.")
        mask = None if mask is None else masks.Dense(mask)
    if not batched:
        q_segment_ids, kv_segment_ids, q_positions, kv_positions = map(
            lead, (q_segment_ids, kv_segment_ids, q_positions, kv_positions)
        )
        query_seq_lengths, key_value_seq_lengths = (
            None if n is None else jnp.reshape(n, (1,)) for n in (query_seq_lengths, key_value_seq_lengths)
        )
    parts = [] if mask is None else [mask]
    parts += _masks(
        T, S, is_causal, local_window_size, q_positions, kv_positions, q_segment_ids, kv_segment_ids,
        query_seq_lengths, key_value_seq_lengths,
    )  # fmt: skip
    combined = None
    for part in parts:
        part.check(B, T, S, N)
        combined = part if combined is None else combined & part
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(f"flash_attention: sinks have the shape [N] = {(N,)}, got {sinks.shape}.")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"flash_attention: dropout_rate is in [0, 1), got {dropout_rate}.")
    if dropout_rate > 0.0 and dropout_key is None:
        raise ValueError(f"flash_attention: dropout_rate {dropout_rate} needs dropout_key, got None.")
    if logits_soft_cap is not None and logits_soft_cap <= 0:
        raise ValueError(f"flash_attention: logits_soft_cap is above 0, got {logits_soft_cap}.")
    mod, data = (None, ()) if score_mod is None else tiles.hoist(score_mod, wide(query.dtype))
    rules = Rules(
        scale=H**-0.5 if scale is None else float(scale),
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        score_mod=mod,
        dropout_rate=float(dropout_rate),
    )
    seed = jax.random.bits(dropout_key, (2,), jnp.uint32) if dropout_rate > 0.0 else None
    return rules, Inputs(query, key, value, bias, sinks, data, combined, seed), batched


def _masks(T, S, is_causal, window, q_positions, kv_positions, q_ids, kv_ids, q_lengths, kv_lengths) -> list[Mask]:
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("flash_attention: q_positions and kv_positions are given together, got only one.")
    if q_positions is not None and not is_causal and window is None:
        raise ValueError(
            "flash_attention: positions are compared by is_causal or local_window_size, got neither. "
            "Add one, or leave the positions out."
        )
    parts: list[Mask] = [masks.Causal(q_positions, kv_positions)] if is_causal else []
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        if left < 0 or right < 0:
            raise ValueError(f"flash_attention: local_window_size is at least 0 on both sides, got {window}.")
        parts.append(masks.Window(left, None if is_causal else right, q_positions, kv_positions))
    if kv_ids is not None and q_ids is None:
        raise ValueError("flash_attention: kv_segment_ids are given together with q_segment_ids, got only them.")
    if q_ids is not None:
        if kv_ids is None and T != S:
            raise ValueError(f"flash_attention: with T = {T} and S = {S}, q_segment_ids need kv_segment_ids.")
        parts.append(masks.Segments(q_ids, kv_ids))
    if q_lengths is not None or kv_lengths is not None:
        parts.append(masks.Lengths(q_lengths, kv_lengths))
    return parts


def _check_arrays(query, key, value) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"flash_attention: query, key and value have 4 axes [B, T, N, H], got {shapes}.")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"flash_attention: key and value agree in [B, S, K], query and key in batch and head dim, got {shapes}."
        )
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(f"flash_attention: every axis has at least one place, got {shapes}.")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            "flash_attention: the number of query heads is a multiple of the number of key heads, "
            f"got {query.shape[2]} and {key.shape[2]}."
        )
    dtypes = {a.dtype for a in (query, key, value)}
    if len(dtypes) > 1 or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(
            "flash_attention: query, key and value have one floating dtype, got "
            f"{query.dtype}, {key.dtype}, {value.dtype}. Cast them."
        )


def _four(a, name: str, full: tuple[int, ...]):
    """An array with 4 axes that broadcasts to [B, N, T, S]."""
    if a is None:
        return None
    shape = (1,) * (4 - a.ndim) + a.shape
    if a.ndim > 4 or any(n not in (1, m) for n, m in zip(shape, full)):
        raise ValueError(f"flash_attention: {name} broadcasts to [B, N, T, S] = {full}, got {a.shape}.")
    return a.reshape(shape)
