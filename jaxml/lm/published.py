"""The numbers of published decoders, for plans and benchmarks that need no weights."""

import dataclasses

from jaxml.lm.config import DecoderConfig, RopeScaling

_LLAMA = DecoderConfig(
    family="llama", vocab_size=128256, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    hidden_dim=14336, max_length=131072, rope_theta=5e5, tied_embeddings=False, bos_id=128000,
    eos_ids=(128001, 128008, 128009), rope_scaling=RopeScaling("llama3", factor=8.0),
)  # fmt: skip
_QWEN = DecoderConfig(
    family="qwen3", vocab_size=151936, width=4096, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128,
    hidden_dim=12288, max_length=40960, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tied_embeddings=False,
    eos_ids=(151645, 151643), pad_id=151643,
)  # fmt: skip
_like = dataclasses.replace

CONFIGS = {
    "llama-3.1-8b": _LLAMA,
    "llama-3.1-70b": _like(_LLAMA, width=8192, num_layers=80, num_heads=64, hidden_dim=28672),
    "llama-3.1-405b": _like(_LLAMA, width=16384, num_layers=126, num_heads=128, hidden_dim=53248),
    "llama-3.2-1b": _like(
        _LLAMA, width=2048, num_layers=16, head_dim=64, hidden_dim=8192, tied_embeddings=True,
        rope_scaling=RopeScaling("llama3", factor=32.0),
    ),
    "llama-3.2-3b": _like(
        _LLAMA, width=3072, num_layers=28, num_heads=24, hidden_dim=8192, tied_embeddings=True,
        rope_scaling=RopeScaling("llama3", factor=32.0),
    ),
    "qwen3-0.6b": _like(_QWEN, width=1024, num_layers=28, num_heads=16, hidden_dim=3072, tied_embeddings=True),
    "qwen3-8b": _QWEN,
    "qwen3-32b": _like(_QWEN, width=5120, num_layers=64, num_heads=64, hidden_dim=25600),
}  # fmt: skip
