"""Small models of every family, with the full-size rules switched on and weights made from a name.

The same numbers are put into transformers (`make.py`) and into jaxml (`tests/lm/test_families.py`), so that
only the logits need to be stored.
"""

import zlib

import numpy as np

_COMMON = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def _rope(**parameters):
    return dict(rope_parameters=parameters)


FAMILIES = {
    "llama2": dict(model_type="llama", **_COMMON) | dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama3": dict(
        model_type="llama",
        **_COMMON,
        **_rope(
            rope_type="llama3",
            rope_theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama_linear": dict(model_type="llama", **_COMMON, **_rope(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "smollm2": dict(model_type="llama", tie_word_embeddings=True, **_COMMON)
    | _rope(rope_type="default", rope_theta=100000.0),
    "smollm3": dict(
        model_type="smollm3", tie_word_embeddings=True, no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=4, **_COMMON
    )
    | _rope(rope_type="default", rope_theta=5000.0),
    "mistral": dict(model_type="mistral", sliding_window=7, **_COMMON),
    "qwen2": dict(
        model_type="qwen2",
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
        tie_word_embeddings=True,
        **{k: v for k, v in _COMMON.items() if k != "head_dim"},
    )
    | dict(hidden_size=64),
    "qwen2_yarn": dict(
        model_type="qwen2",
        **{k: v for k, v in _COMMON.items() if k != "head_dim"},
        **_rope(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=64),
    )
    | dict(hidden_size=64),
    "qwen3": dict(model_type="qwen3", **_COMMON),
    "gemma2": dict(
        model_type="gemma2",
        sliding_window=6,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=24,
        hidden_activation="gelu_pytorch_tanh",
        **_COMMON,
    ),
    "gemma3": dict(
        model_type="gemma3_text",
        sliding_window=6,
        query_pre_attn_scalar=24,
        hidden_activation="gelu_pytorch_tanh",
        **_COMMON | dict(num_hidden_layers=8),
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
        },
    ),
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name: norms spread around their neutral value, the rest normal."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = 0.3 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
    return (scale * rng.standard_normal(shape) + (0.5 if "norm" in name else 0.0)).astype(np.float32)


def tokens() -> np.ndarray:
    """[2, 40] token ids, longer than every window above."""
    return np.random.default_rng(0).integers(3, 96, (2, 40)).astype(np.int32)
