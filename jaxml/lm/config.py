"""What a decoder is, in numbers: one frozen dataclass for every family."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

FEED_FORWARDS = ("gated", "kan", "rational")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")
GEMMA = ("gemma2", "gemma3_text")
SIZES = (
    "vocab_size", "width", "num_heads", "num_kv_heads", "head_dim", "hidden_dim", "max_length",
    "kan_grid",
)  # fmt: skip
MOST, MOST_LAYERS = 2**31 - 1, 1_000  # what is above is a damaged file's, and would fill the memory with names alone
REALS = (
    "norm_eps", "rope_theta", "local_rope_theta", "query_scale", "attention_soft_cap", "logits_soft_cap", "embed_scale",
)  # fmt: skip
REQUIRED = object()  # the default of a key that a file must have


def whole(value: Any, low: int, high: int) -> bool:
    """Whether a value is a whole number from `low` to `high`; a bool is none.

    Example:
        >>> whole(3, 1, 8), whole(9, 1, 8), whole(3.0, 1, 8), whole(True, 0, 1)
        (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def positive(value: Any) -> bool:
    """Whether a value is a finite number above 0; a bool is none.

    Example:
        >>> positive(1e-5), positive(0), positive(math.inf), positive("1")
        (True, False, False, False)
    """
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < float(value) < math.inf
    except OverflowError:
        return False


def check_layers(count: Any) -> None:
    """Refuses numbers of layers that no model has, before anything is made for each of them.

    Example:
        >>> check_layers(0)
        Traceback (most recent call last):
            ...
        ValueError: DecoderConfig: num_layers is a whole number from 1 to 1,000, got 0.
    """
    if not whole(count, 1, MOST_LAYERS):
        raise ValueError(f"DecoderConfig: num_layers is a whole number from 1 to {MOST_LAYERS:,}, got {count!r}.")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the trained context.

    kind: "linear" (all divided by factor), "llama3" (low frequencies only, smoothly),
        "yarn" (by number of rotations, with a temperature), "factors" (a divisor per frequency).

    Example:
        >>> RopeScaling("linear", factor=4.0).factor
        4.0
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # multiplies sin and cos; None: from factor (yarn)
    truncate: bool = True
    factors: tuple[float, ...] = ()  # kind "factors": [head_dim / 2]

    def __post_init__(self):
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_length", "beta_fast", "beta_slow")
        for name in (*names, *(("attention_factor",) if self.attention_factor is not None else ())):
            if not positive(getattr(self, name)):
                raise ValueError(f"RopeScaling: {name} is a finite number above 0, got {getattr(self, name)!r}.")
        if not all(map(positive, self.factors)):
            raise ValueError("RopeScaling: factors are finite numbers above 0.")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "RopeScaling: high_freq_factor is above low_freq_factor, got "
                f"{self.high_freq_factor} and {self.low_freq_factor}."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and rules of a Llama-family decoder (letters as in `jaxml.axes`).

    Example:
        >>> from jaxml.testing import tiny_config
        >>> config = tiny_config()
        >>> config.num_layers, config.width, DecoderConfig.from_hf(config.to_hf()) == config
        (2, 32, True)
    """

    family: str
    vocab_size: int  # V
    width: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    hidden_dim: int  # F
    max_length: int
    activation: str = "silu"  # or "gelu_tanh"
    feed_forward: str = "gated"  # or "kan", "rational" (`lm.feed_forward`)
    kan_grid: int = 5  # cells of "kan"
    norm_eps: float = 1e-5
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight
    post_norms: bool = False  # a norm after attention and feed-forward as well
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # on local layers, never scaled; None: as on global ones
    window: int | None = None  # tokens that a local layer sees, itself included
    local_layers: tuple[int, ...] = ()
    no_rope_layers: tuple[int, ...] = ()
    query_scale: float | None = None  # None: head_dim ** -0.5
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    embed_scale: float | None = None
    tied_embeddings: bool = True
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"DecoderConfig: family is one of {', '.join(FAMILIES)}, got {self.family!r}.")
        if self.feed_forward not in FEED_FORWARDS:
            known = ", ".join(FEED_FORWARDS)
            raise ValueError(f"DecoderConfig: feed_forward is one of {known}, got {self.feed_forward!r}.")
        check_layers(self.num_layers)
        for name in SIZES:
            if not whole(getattr(self, name), 1, MOST):
                raise ValueError(
                    f"DecoderConfig: {name} is a whole number from 1 to {MOST:,}, got {getattr(self, name)!r}."
                )
        for name, ids in (("bos_id", [self.bos_id]), ("pad_id", [self.pad_id]), ("eos_ids", self.eos_ids)):
            if wrong := [i for i in ids if i is not None and not whole(i, 0, MOST)]:
                raise ValueError(f"DecoderConfig: {name} are token ids from 0, got {wrong[0]!r}.")
        if self.window is not None and not whole(self.window, 1, MOST):
            raise ValueError(f"DecoderConfig: window is a whole number from 1, got {self.window!r}.")
        for name in ("tied_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"DecoderConfig: {name} is true or false, got {getattr(self, name)!r}.")
        for name in REALS:
            value = getattr(self, name)
            if value is not None and not positive(value):
                raise ValueError(f"DecoderConfig: {name} is a finite number above 0, got {value!r}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig: num_heads is a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig: head_dim is even (rotary pairs), got {self.head_dim}.")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise ValueError(
                f"DecoderConfig: rope_scaling has a factor for each of {self.head_dim // 2} rotary pairs, "
                f"got {len(scaling.factors)}."
            )
        if self.rope_theta <= 1 or (self.local_rope_theta or 2) <= 1:
            raise ValueError(f"DecoderConfig: a rope_theta is above 1, got {self.rope_theta, self.local_rope_theta}.")
        if self.local_layers and not self.window:
            raise ValueError("DecoderConfig: local layers need window, got window=None.")

    @property
    def layer_kinds(self) -> tuple[tuple[bool, bool], ...]:
        """(sees only a window, is rotated) for every layer."""
        return tuple((i in self.local_layers, i not in self.no_rope_layers) for i in range(self.num_layers))

    @property
    def period(self) -> int:
        """The shortest p with which the layers' kinds repeat (1 where all are alike)."""
        kinds = self.layer_kinds
        return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """From the dictionary of a Hugging Face ``config.json``.

        Raises:
            ValueError: an architecture or a key that this decoder does not know, by name.
        """
        from jaxml.lm import config_hf

        return config_hf.read(dict(config))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "DecoderConfig":
        """From the key-value metadata of a GGUF file (`jaxml.lm.gguf.read_metadata`).

        Raises:
            ValueError: an architecture or a key that this decoder does not know, by name.
        """
        from jaxml.lm import config_gguf

        return config_gguf.read(dict(metadata))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` that `from_hf` and transformers read back as this config."""
        from jaxml.lm import config_hf

        return config_hf.write(self)
