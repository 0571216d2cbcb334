"""A decoder's numbers from and to the ``config.json`` of a Hugging Face folder; unknown keys are refused."""

from typing import Any

from jaxml.lm.config import FAMILIES, GEMMA, REQUIRED, DecoderConfig, RopeScaling, check_layers

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}

# Written by transformers, without effect on what the model computes.
_WITHOUT_EFFECT = frozenset(
    """_name_or_path architectures torch_dtype dtype transformers_version use_cache initializer_range
    attention_dropout pretraining_tp model_type output_attentions output_hidden_states return_dict
    chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type cache_implementation
    max_window_layers hidden_act hidden_activation _attn_implementation unsloth_version
    _sliding_window_pattern sliding_window_pattern no_rope_layer_interval unsloth_fixed
    transformers.js_config auto_map""".split()
)
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read(config: dict[str, Any]) -> DecoderConfig:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"DecoderConfig.from_hf: model_type is one of {', '.join(FAMILIES)}, got {family!r}. "
            "Other architectures are not implemented."
        )
    left = {k: v for k, v in config.items() if k not in _WITHOUT_EFFECT}

    def take(key, default=None):
        value = left.pop(key, None)
        if value is None and default is REQUIRED:
            raise ValueError(f"DecoderConfig.from_hf: a {family} config has the key {key!r}; it is missing.")
        return default if value is None else value

    num_layers, num_heads = take("num_hidden_layers", REQUIRED), take("num_attention_heads", REQUIRED)
    width, max_length = take("hidden_size", REQUIRED), take("max_position_embeddings", 2048)
    # A file saved from a Gemma class default leaves its activation out; the other families name SiLU.
    activation = config.get("hidden_activation") or config.get("hidden_act")
    activation = activation or ("gelu_pytorch_tanh" if family in GEMMA else "silu")
    if activation == "gelu" and family in GEMMA:
        activation = "gelu_pytorch_tanh"  # early Gemma files say "gelu" and mean the tanh form
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"DecoderConfig.from_hf: the activation is one of {', '.join(_ACTIVATIONS)}, got {activation!r}."
        )
    fields = dict(
        family=family,
        vocab_size=take("vocab_size", REQUIRED),
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=take("num_key_value_heads", num_heads),
        head_dim=take("head_dim", width // num_heads),
        hidden_dim=take("intermediate_size", REQUIRED),
        max_length=max_length,
        activation=_ACTIVATIONS[activation],
        norm_eps=take("rms_norm_eps", 1e-6),
        tied_embeddings=take("tie_word_embeddings", family in (*GEMMA, "smollm3")),
        bos_id=take("bos_token_id"),
        eos_ids=_ids(take("eos_token_id")),
        pad_id=take("pad_token_id"),
        **_rope_from_hf(take, family, max_length),
    )
    fields |= _layers_from_hf(take, config, family, num_layers)
    bias = take("attention_bias", family == "qwen2")
    fields |= dict(qkv_bias=bias, o_bias=bias and family != "qwen2", mlp_bias=take("mlp_bias", False))
    if family == "qwen3" or family == "gemma3_text":
        fields |= dict(qk_norm=True)
    if family in GEMMA:
        if take("use_bidirectional_attention"):
            raise ValueError("DecoderConfig.from_hf: use_bidirectional_attention=True is not implemented.")
        fields |= dict(
            norm_plus_one=True,
            post_norms=True,
            embed_scale=float(width) ** 0.5,
            query_scale=float(take("query_pre_attn_scalar", 256)) ** -0.5,
            attention_soft_cap=take("attn_logit_softcapping"),
            logits_soft_cap=take("final_logit_softcapping"),
        )
    left = {k: v for k, v in left.items() if v is not None}
    if left:
        raise ValueError(
            f"DecoderConfig.from_hf: unknown keys in a {family} config: "
            f"{', '.join(f'{k}={v!r}' for k, v in sorted(left.items()))}. Remove a key only if it has no effect "
            "on what the model computes."
        )
    return DecoderConfig(**fields)


def _ids(value) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _rope_from_hf(take, family: str, max_length: int) -> dict[str, Any]:
    """Both spellings: rope_theta + rope_scaling (transformers 4), rope_parameters (transformers 5)."""
    new, theta, scaling, local = (
        take(k) for k in ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
    )
    fields: dict[str, Any] = {}
    if new and "full_attention" in new:
        local = new["sliding_attention"].get("rope_theta", 10000.0)
        if new["sliding_attention"].get("rope_type", "default") != "default":
            raise ValueError("DecoderConfig.from_hf: scaled rotary embeddings on local layers are not implemented.")
        new = new["full_attention"]
    if new:
        theta, scaling = new.get("rope_theta", theta), {k: v for k, v in new.items() if k != "rope_theta"}
    fields["rope_theta"] = float(theta or (1e6 if family == "gemma3_text" else 10000.0))
    if family == "gemma3_text":
        fields["local_rope_theta"] = float(local or 10000.0)
    elif local is not None:
        raise ValueError("DecoderConfig.from_hf: rope_local_base_freq belongs to gemma3_text alone.")
    fields["rope_scaling"] = _scaling_from_hf(scaling, max_length) if scaling else None
    return fields


_SCALING_KEYS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_max_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}


def _scaling_from_hf(scaling: dict[str, Any], max_length: int) -> RopeScaling | None:
    given = {k: v for k, v in scaling.items() if v is not None}
    kind = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    if kind not in _SCALING_KEYS:
        raise ValueError(f"DecoderConfig.from_hf: rope scaling is one of {', '.join(_SCALING_KEYS)}, got {kind!r}.")
    unknown = sorted(set(given) - set(_SCALING_KEYS[kind]))
    if unknown:
        raise ValueError(f"DecoderConfig.from_hf: unknown keys in rope scaling {kind!r}: {', '.join(unknown)}.")
    if kind == "default":
        return None
    if "factor" not in given:
        raise ValueError(f"DecoderConfig.from_hf: rope scaling {kind!r} has a factor; it is missing.")
    fields = {_SCALING_KEYS[kind][k]: v for k, v in given.items()}
    if kind in ("yarn", "llama3"):
        fields.setdefault("original_max_length", max_length)
    return RopeScaling(kind=kind, **fields)


def _layers_from_hf(take, config, family: str, num_layers: int) -> dict[str, Any]:
    """Which layers see only a window, and which are not rotated."""
    check_layers(num_layers)
    window, types = take("sliding_window"), take("layer_types")
    if family in ("qwen2", "qwen3", "smollm3") and not take("use_sliding_window", False):
        window = None
    no_rope: tuple[int, ...] = ()
    if family == "smollm3":
        every = config.get("no_rope_layer_interval") or 4
        rotated = take("no_rope_layers") or [int((i + 1) % every != 0) for i in range(num_layers)]
        no_rope = tuple(i for i in range(num_layers) if not rotated[i])
    if window is None:
        return dict(no_rope_layers=no_rope)
    if types is None:
        if family == "gemma2":
            local = [i % 2 == 0 for i in range(num_layers)]
        elif family == "gemma3_text":
            every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
            local = [(i + 1) % every != 0 for i in range(num_layers)]
        elif family in ("qwen2", "qwen3"):
            local = [i >= config.get("max_window_layers", 28) for i in range(num_layers)]
        else:
            local = [True] * num_layers
    else:
        unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
        if unknown or len(types) != num_layers:
            among = f", among them {', '.join(unknown)}" if unknown else ""
            raise ValueError(
                "DecoderConfig.from_hf: layer_types has one of full_attention, sliding_attention for each of "
                f"{num_layers} layers, got {len(types)} entries{among}."
            )
        local = [t == "sliding_attention" for t in types]
    local_layers = tuple(i for i in range(num_layers) if local[i])
    return dict(window=window if local_layers else None, local_layers=local_layers, no_rope_layers=no_rope)


def write(c: DecoderConfig) -> dict[str, Any]:
    if c.feed_forward != "gated":
        raise ValueError(f"DecoderConfig.to_hf: config.json has no feed-forward of kind {c.feed_forward!r}.")
    rope: dict[str, Any] = {"rope_type": "default"}
    if c.rope_scaling:
        if c.rope_scaling.kind == "factors":
            raise ValueError(
                "DecoderConfig.to_hf: rotary divisors read from a GGUF file have no key in config.json. "
                "Give the config its rope_scaling of kind 'llama3' first (dataclasses.replace)."
            )
        names = _SCALING_KEYS[c.rope_scaling.kind]
        rope = {hf: getattr(c.rope_scaling, ours) for hf, ours in names.items()}
        rope = {"rope_type": c.rope_scaling.kind, **{k: v for k, v in rope.items() if v is not None}}
    gemma = c.family in GEMMA
    out = {
        "model_type": c.family,
        "architectures": [ARCHITECTURES[c.family]],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.hidden_dim,
        "max_position_embeddings": c.max_length,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_embeddings,
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_ids) if len(c.eos_ids) > 1 else (c.eos_ids[0] if c.eos_ids else None),
        "pad_token_id": c.pad_id,
    }
    activation = {v: k for k, v in _ACTIVATIONS.items()}[c.activation]
    out["hidden_activation" if gemma else "hidden_act"] = activation
    out["rope_scaling"] = rope if c.rope_scaling else None
    if c.family in ("llama", "qwen3", "smollm3", *GEMMA):
        out["attention_bias"] = c.o_bias
    if c.family in ("llama", "smollm3"):
        out["mlp_bias"] = c.mlp_bias
    if c.family != "llama":
        out["sliding_window"] = c.window
    if c.family not in ("llama", "mistral"):
        local = set(c.local_layers)
        out["layer_types"] = ["sliding_attention" if i in local else "full_attention" for i in range(c.num_layers)]
    if c.family in ("qwen2", "qwen3", "smollm3"):
        out["use_sliding_window"] = c.window is not None
    if c.family == "smollm3":
        out["no_rope_layers"] = [int(i not in c.no_rope_layers) for i in range(c.num_layers)]
    if gemma:
        out["query_pre_attn_scalar"] = round(c.query_scale**-2)  # an integer in every model
        out["attn_logit_softcapping"] = c.attention_soft_cap
        out["final_logit_softcapping"] = c.logits_soft_cap
    if c.family == "gemma3_text":
        out["rope_local_base_freq"] = c.local_rope_theta
    return out
