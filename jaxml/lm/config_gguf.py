"""A decoder's numbers from the metadata of a GGUF file; unknown keys are refused."""

from typing import Any

from jaxml.lm.config import GEMMA, REQUIRED, DecoderConfig, RopeScaling, check_layers

_GGUF_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "smollm3": "smollm3",
}


def read(metadata: dict[str, Any]) -> DecoderConfig:
    arch = metadata.get("general.architecture")
    if arch not in _GGUF_FAMILIES:
        raise ValueError(
            f"DecoderConfig.from_gguf: general.architecture is one of {', '.join(_GGUF_FAMILIES)}, got {arch!r}."
        )
    family = _GGUF_FAMILIES[arch]
    left = {k[len(arch) + 1 :]: v for k, v in metadata.items() if k.startswith(arch + ".")}

    def take(key, default=None):
        value = left.pop(key, default)
        if value is REQUIRED:
            raise ValueError(f"DecoderConfig.from_gguf: the file has the key {arch}.{key}; it is missing.")
        return value

    width, num_layers = take("embedding_length", REQUIRED), take("block_count", REQUIRED)
    num_heads, max_length = take("attention.head_count", REQUIRED), take("context_length", REQUIRED)
    head_dim = take("attention.key_length", width // num_heads)
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab_size = take("vocab_size", len(tokens) if tokens is not None else REQUIRED)
    eos = {metadata.get("tokenizer.ggml.eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")} - {None}
    fields = dict(
        family=family,
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=take("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        hidden_dim=take("feed_forward_length", REQUIRED),
        max_length=max_length,
        norm_eps=float(f"{take('attention.layer_norm_rms_epsilon', REQUIRED):.6g}"),
        rope_theta=float(take("rope.freq_base", 1e6 if family == "gemma3_text" else 10000.0)),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3_text"),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(sorted(eos)),
        pad_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    for key, expected in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if (value := take(key, expected)) != expected:
            raise ValueError(f"DecoderConfig.from_gguf: {arch}.{key} equals the head dim {expected}, got {value}.")
    kind, factor = take("rope.scaling.type", "none"), take("rope.scaling.factor", 1.0)
    original, attn_factor = take("rope.scaling.original_context_length", max_length), take("rope.scaling.attn_factor")
    for key in ("rope.scaling.finetuned", "rope.scaling.yarn_log_multiplier"):
        take(key)
    if kind in ("linear", "yarn"):
        scaling = dict(kind=kind, factor=factor)
        if kind == "yarn":
            scaling |= dict(original_max_length=original, attention_factor=attn_factor)
        fields["rope_scaling"] = RopeScaling(**scaling)
    elif kind != "none":
        raise ValueError(f"DecoderConfig.from_gguf: rope scaling is none, linear or yarn, got {kind!r}.")
    fields |= _gguf_layers(take, family, num_layers)
    if family in GEMMA:
        fields |= dict(
            activation="gelu_tanh",
            norm_plus_one=True,
            post_norms=True,
            embed_scale=float(width) ** 0.5,
            query_scale=(width / num_heads if family == "gemma2" and num_layers == 46 else head_dim) ** -0.5,
            attention_soft_cap=take("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
            logits_soft_cap=take("final_logit_softcapping", 30.0 if family == "gemma2" else None),
        )
        if family == "gemma3_text" and num_layers == 62:  # Gemma 3 27B scales by width / heads
            fields["query_scale"] = (width / num_heads) ** -0.5
    if left:
        raise ValueError(
            "DecoderConfig.from_gguf: unknown keys: "
            + ", ".join(f"{arch}.{k}={v!r}" for k, v in sorted(left.items()))
            + "."
        )
    return DecoderConfig(**fields)


def _gguf_layers(take, family: str, num_layers: int) -> dict[str, Any]:
    check_layers(num_layers)
    window = take("attention.sliding_window")
    local: tuple[int, ...] = ()
    if family == "gemma2":
        local = tuple(range(0, num_layers, 2))
    elif family == "gemma3_text":
        local = tuple(i for i in range(num_layers) if (i + 1) % 6)
    elif window:
        local = tuple(range(num_layers))
    fields: dict[str, Any] = dict(window=window if local else None, local_layers=local)
    if family == "gemma3_text":
        fields["local_rope_theta"] = float(take("rope.freq_base_swa", 10000.0))
    if family == "smollm3":
        fields["no_rope_layers"] = tuple(range(3, num_layers, 4))
    return fields
