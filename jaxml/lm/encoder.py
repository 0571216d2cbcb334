"""A BERT-family encoder on one page: sentences to unit vectors whose products say how alike they are.

All layers' weights lie stacked along a first axis and are scanned. A matrix is [in, out].
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import files
from jaxml.attention import flash_attention
from jaxml.axes import Array, Float, Int, Params, wide
from jaxml.lm import hf, tensors, tokenizer, zoo
from jaxml.lm.config import MOST, MOST_LAYERS, positive, whole
from jaxml.lm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shapes of a BERT encoder and what a sentence's vector is (letters as in `jaxml.axes`).

    Example:
        >>> config = EncoderConfig(
        ...     vocab_size=64, width=16, num_layers=1, num_heads=2, hidden_dim=32, num_positions=32, max_length=32
        ... )
        >>> config.pooling, config.normalize
        ('mean', True)
    """

    vocab_size: int  # V
    width: int  # D
    num_layers: int  # L
    num_heads: int  # N
    hidden_dim: int  # F
    num_positions: int
    max_length: int  # longer texts are cut
    num_segments: int = 2
    norm_eps: float = 1e-12
    pooling: str = "mean"  # over tokens, or "cls": the first token's
    normalize: bool = True

    def __post_init__(self):
        sizes = ("vocab_size", "width", "num_heads", "hidden_dim", "num_positions", "num_segments", "max_length")
        for name, least, most in (
            ("num_layers", 1, MOST_LAYERS),
            *((n, 2 if n == "max_length" else 1, MOST) for n in sizes),
        ):
            if not whole(getattr(self, name), least, most):
                got = getattr(self, name)
                raise ValueError(f"EncoderConfig: {name} is a whole number from {least} to {most:,}, got {got!r}.")
        if not positive(self.norm_eps):
            raise ValueError(f"EncoderConfig: norm_eps is a finite number above 0, got {self.norm_eps!r}.")
        if self.width % self.num_heads or self.max_length > self.num_positions:
            raise ValueError(
                "EncoderConfig: width is a multiple of num_heads and max_length at most num_positions, got "
                f"{self.width}, {self.num_heads}, {self.max_length} and {self.num_positions}."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoder:
    """A pytree whose leaves are the parameters, as `lm.Model` is.

    Example:
        >>> from jaxml import testing
        >>> config = EncoderConfig(64, 16, 1, 2, 32, num_positions=32, max_length=32)
        >>> params = jax.tree.map(jnp.ones, shapes(config), is_leaf=lambda shape: isinstance(shape, tuple))
        >>> vectors = Encoder(params, config, testing.tiny_tokenizer())(["the fox", "a dog"])
        >>> vectors.shape, jnp.linalg.norm(vectors, axis=-1).round(3).tolist()
        ((2, 16), [1.0, 1.0])
    """

    params: Params
    config: EncoderConfig = dataclasses.field(metadata=dict(static=True))
    tokenizer: Tokenizer = dataclasses.field(metadata=dict(static=True))

    def __call__(self, texts: Sequence[str], *, batch_size: int | None = None) -> Float[Array, "n D"]:
        """A vector for each text, as `encode` makes them."""
        return encode(self, texts, batch_size=batch_size)


def load(source: str | Path = "minilm", dtype=jnp.float32) -> Encoder:
    """An encoder by name or from a sentence-transformers folder.

    Raises:
        FileNotFoundError: no such folder or name.
        ValueError: a config key or tensor that cannot be read, by name.

    Example:
        >>> load("minilm")(["the cat", "a dog"]).shape  # doctest: +SKIP
        (2, 384)
        >>> load("smollm2-135m")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: encoder.load: smollm2-135m is a decoder (SmolLM2-135M-Instruct, ...). Read it with lm.load.
    """
    entry = zoo.NAMES.get(str(source))
    if entry and entry.kind != "encoder":
        raise ValueError(f"encoder.load: {source} is a {entry.kind} ({entry.about}). Read it with lm.load.")
    folder = zoo.find(str(source)).parent if entry else Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"encoder.load: no folder or known encoder is called {str(source)!r}.")
    with files.reading(folder, "an encoder"):
        return _read(folder, dtype)


def _read(folder: Path, dtype) -> Encoder:
    config = read_config(folder)
    names = _names()
    with hf.open_safetensors(folder / "model.safetensors") as file:
        there = set(file.keys())
        prefix = "bert." if any(name.startswith("bert.") for name in there) else ""

        def read(name: str) -> np.ndarray:
            if prefix + name not in there:
                raise ValueError(f"{folder}: an encoder has the tensor {prefix + name}; it is missing.")
            return tensors.real(file.get_tensor(prefix + name), f"{folder}: {prefix + name}")

        params: dict[str, Any] = {"layers": {}}
        for path, name in names.items():
            if "{}" in name:
                stack = np.stack([read(name.format(i)) for i in range(config.num_layers)])
                stack = stack.swapaxes(1, 2) if stack.ndim == 3 else stack
                params["layers"][path] = jnp.asarray(stack, dtype)
            else:
                params[path] = jnp.asarray(read(name), dtype)
    for (path, shape), a in zip(_flat(shapes(config)), jax.tree.leaves(params)):
        if a.shape != shape:
            raise ValueError(f"{folder}: {path} has the shape {shape}, got {a.shape}.")
    return Encoder(params, config, tokenizer.from_folder(folder, rows=config.vocab_size))


def read_config(folder: str | Path) -> EncoderConfig:
    """From config.json and, where they are, sentence-transformers' files beside it.

    Raises:
        FileNotFoundError, ValueError: no config.json, a model that is no BERT, or a pooling that is not implemented.

    Example:
        >>> import json, tempfile
        >>> about = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> about |= {"intermediate_size": 32, "max_position_embeddings": 48}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "config.json").write_text(json.dumps(about))
        ...     read_config(folder).max_length
        48
    """
    folder = Path(folder)
    with files.reading(folder / "config.json", "an encoder"):
        return _config(folder)


def _config(folder: Path) -> EncoderConfig:
    about = files.read_json(folder / "config.json")
    for key, only in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if about.get(key, only) != only:
            raise ValueError(f"{folder}: an encoder has {key} {only!r}, got {about[key]!r}.")
    beside = lambda name: files.read_json(folder / name) if (folder / name).is_file() else {}
    path = folder / "modules.json"
    modules = files.json_of(files.read_bytes(path), path) if path.is_file() else []
    parts = [str(m.get("type", "")).rsplit(".", 1)[-1] for m in modules]
    if unknown := [kind for kind in parts if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise ValueError(f"{folder}: an encoder is Transformer, Pooling and Normalize, got a {unknown[0]} as well.")
    pooling = beside("1_Pooling/config.json")
    kinds = [k for k, on in pooling.items() if k.startswith("pooling_mode") and on is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if kinds and (len(kinds) > 1 or kinds[0] not in known):
        raise ValueError(f"{folder}: pooling is one of {', '.join(known)}, got {', '.join(kinds)}.")
    return EncoderConfig(
        vocab_size=about["vocab_size"],
        width=about["hidden_size"],
        num_layers=about["num_hidden_layers"],
        num_heads=about["num_attention_heads"],
        hidden_dim=about["intermediate_size"],
        num_positions=about["max_position_embeddings"],
        max_length=min(
            about["max_position_embeddings"], beside("sentence_bert_config.json").get("max_seq_length") or 2**30
        ),
        num_segments=about.get("type_vocab_size", 2),
        norm_eps=about.get("layer_norm_eps", 1e-12),
        pooling=known[kinds[0]] if kinds else "mean",
        normalize=not modules or "Normalize" in parts,
    )


def shapes(config: EncoderConfig) -> dict[str, Any]:
    """The shape of every parameter, as a tree of tuples.

    Example:
        >>> found = shapes(EncoderConfig(64, 16, 1, 2, 32, num_positions=48, max_length=48))
        >>> found["positions"], found["layers"]["up"]
        ((48, 16), (1, 16, 32))
    """
    c, L, D, F = config, config.num_layers, config.width, config.hidden_dim
    layers = {}
    for name in ("q", "k", "v", "o"):
        layers |= {name: (L, D, D), f"{name}_bias": (L, D)}
    layers |= {"up": (L, D, F), "up_bias": (L, F), "down": (L, F, D), "down_bias": (L, D)}
    for name in ("attn_norm", "mlp_norm"):
        layers |= {name: (L, D), f"{name}_bias": (L, D)}
    top = {"embed": (c.vocab_size, D), "positions": (c.num_positions, D), "segments": (c.num_segments, D)}
    return top | {"norm": (D,), "norm_bias": (D,), "layers": layers}


def apply(
    params: Params, config: EncoderConfig, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "B T D"]:
    """Final hidden states of rows that are padded at the right.

    Example:
        >>> config = EncoderConfig(64, 16, 1, 2, 32, num_positions=32, max_length=32)
        >>> drawn = lambda shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        >>> params = jax.tree.map(drawn, shapes(config), is_leaf=lambda shape: isinstance(shape, tuple))
        >>> x = apply(params, config, jnp.array([[4, 5, 0], [4, 5, 9]]), jnp.array([2, 2]))
        >>> x.shape, bool(jnp.allclose(x[0, :2], x[1, :2], atol=1e-4))   # nothing sees the padding
        ((2, 3, 16), True)

    Reference:
        Devlin et al. 2019, "BERT" (norms after each block, GELU by the error function, one segment).
    """
    T = tokens.shape[1]
    x = params["embed"][tokens] + params["positions"][None, :T] + params["segments"][:1][None]
    x = _norm(x, params["norm"], params["norm_bias"], config)

    def layer(x, w):
        B, T, D = x.shape
        dense = lambda name, x: jnp.matmul(x, w[name]) + w[f"{name}_bias"].reshape(1, 1, -1)
        heads = lambda a: a.reshape(B, T, config.num_heads, D // config.num_heads)
        q, k, v = (heads(dense(name, x)) for name in "qkv")
        y = flash_attention(q, k, v, key_value_seq_lengths=lengths).reshape(B, T, D)
        x = _norm(x + dense("o", y), w["attn_norm"], w["attn_norm_bias"], config)
        y = dense("down", jax.nn.gelu(dense("up", x), approximate=False))
        return _norm(x + y, w["mlp_norm"], w["mlp_norm_bias"], config), None

    return jax.lax.scan(layer, x, params["layers"])[0]


@functools.partial(jax.jit, static_argnames="config")
def pooled(
    params: Params, config: EncoderConfig, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "B D"]:
    """A vector for each row, float32; of length 1 where the config says so."""
    x = apply(params, config, tokens, lengths).astype(jnp.float32)
    if config.pooling == "cls":
        x = x[:, 0]
    else:
        there = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.float32)[..., None]
        x = jnp.sum(x * there, 1) / jnp.maximum(jnp.sum(there, 1), 1)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) if config.normalize else x


def encode(encoder: Encoder, texts: Sequence[str], *, batch_size: int | None = None) -> Float[Array, "n D"]:
    """A vector for each text; the product of two says how alike they are.

    Texts longer than the encoder's `max_length` are cut there, as sentence-transformers does.

    Args:
        batch_size: texts in a batch; where None, as many of that length as suit the device.

    Raises:
        ValueError: no texts, or a single string instead of a list.

    Example:
        >>> from jaxml import testing
        >>> config = EncoderConfig(64, 16, 1, 2, 32, num_positions=32, max_length=32)
        >>> drawn = lambda shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        >>> params = jax.tree.map(drawn, shapes(config), is_leaf=lambda shape: isinstance(shape, tuple))
        >>> vectors = encode(Encoder(params, config, testing.tiny_tokenizer()), ["a fox", "the big brown fox", "a fox"])
        >>> round(float(vectors[0] @ vectors[2]), 2), round(float(vectors[0] @ vectors[1]), 2)
        (1.0, 0.94)
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"encoder.encode: texts are a list of at least one text, got {texts!r}.")
    rows = _ids(encoder, texts)
    out = np.zeros((len(rows), encoder.config.width), np.float32)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    first, step = 0, 32 if len(rows) < 256 else 16  # few texts: few widths to compile for
    most = 1024 if jax.default_backend() == "cpu" else 2**14  # tokens: a CPU's cache holds the activations of few
    while first < len(rows):
        width = max(1, min(-(-len(rows[order[first]]) // step) * step, encoder.config.max_length))
        size = batch_size or max(1, most // width)
        part = order[first : first + size]
        tokens = np.full((min(size, len(rows)), width), encoder.tokenizer.pad_id, np.int32)
        lengths = np.ones(len(tokens), np.int32)
        for place, i in enumerate(part):
            tokens[place, : len(rows[i])], lengths[place] = rows[i], len(rows[i])
        vectors = pooled(encoder.params, encoder.config, tokens, lengths)
        out[part] = np.asarray(vectors)[: len(part)]
        first += size
    return jnp.asarray(out)


def _ids(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    """[CLS] text [SEP] of each, cut to the longest text."""
    longest = encoder.config.max_length
    rows = encoder.tokenizer.encode_batch(texts)
    return [ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]] for ids in rows]


def _norm(x, weight, bias, config: EncoderConfig):
    """LayerNorm, in float32 (or wider) inside."""
    y = x.astype(wide(x.dtype))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    across = lambda v: v.astype(y.dtype).reshape(1, 1, -1)
    return (y * across(weight) + across(bias)).astype(x.dtype)


def _names() -> dict[str, str]:
    """Parameter → tensor of a BERT file."""
    names = {
        "embed": "embeddings.word_embeddings.weight",
        "positions": "embeddings.position_embeddings.weight",
        "segments": "embeddings.token_type_embeddings.weight",
        "norm": "embeddings.LayerNorm.weight",
        "norm_bias": "embeddings.LayerNorm.bias",
    }
    layer = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attn_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    for path, name in layer.items():
        names |= {path: f"encoder.layer.{{}}.{name}.weight", f"{path}_bias": f"encoder.layer.{{}}.{name}.bias"}
    return names


def _flat(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda s: isinstance(s, tuple))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), shape) for path, shape in leaves]
