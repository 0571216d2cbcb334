"""From a file's named tensors to the decoder's stacked tree, one parameter at a time, and back."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxml.axes import Params
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.parallel import rules
from jaxml.parallel.hosts import to_host
from jaxml.paths import MATRICES
from jaxml.quant import bnb
from jaxml.weights import is_node

# Our name of a layer's parameter → (Hugging Face's, GGUF's); matrices are [out, in] in both formats.
_MODULES = {
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "attn_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
}
_MODULES_POST_NORMS = _MODULES | {
    "mlp_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "post_attn_norm": ("post_attention_layernorm", "post_attention_norm"),
    "post_mlp_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
_TOP = {
    "embed": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm": ("model.norm.weight", "output_norm.weight"),
    "head": ("lm_head.weight", "output.weight"),
}


def real(a: np.ndarray, what: str) -> np.ndarray:
    """The array; ValueError where it does not hold floating numbers."""
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ValueError(f"{what} holds floating numbers, got {a.dtype}.")
    return a


def module_name(config: DecoderConfig, name: str) -> str:
    """Hugging Face's module for one of our layer parameters: "q" → "self_attn.q_proj"."""
    return (_MODULES_POST_NORMS if config.post_norms else _MODULES)[name][0]


def tensor_names(config: DecoderConfig, layout: str) -> dict[tuple[str, ...], str]:
    """Path in our tree → name in the file ("{}" for the layer); layout is "hf" or "gguf"."""
    which, prefix = (0, "model.layers.{}.") if layout == "hf" else (1, "blk.{}.")
    modules = _MODULES_POST_NORMS if config.post_norms else _MODULES
    tree, names = decoder.shapes(config), {}
    for name in tree:
        if name != "layers":
            names[(name,)] = _TOP[name][which]
    for name in tree["layers"]:
        bias = name.endswith("_bias")
        module = modules[name.removesuffix("_bias")][which]
        names[("layers", name)] = f"{prefix}{module}.{'bias' if bias else 'weight'}"
    return names


def assemble(
    config: DecoderConfig,
    layout: str,
    available: Iterable[str],
    read: Callable[[str], np.ndarray],
    *,
    source: str,
    dtype=None,
    ignore: Callable[[str], bool] = lambda name: False,
    quantize: Callable[[str, np.ndarray], Any] | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Reads every tensor into the stacked tree; beside the result, one stacked parameter is held at a time.

    Args:
        available: names in the file.
        read: a tensor by name, as numpy, in the file's own layout; or a weight node [in, out].
        source: the file, for errors.
        dtype: of the result; each tensor's own where None.
        ignore: names that may be left over.
        quantize: (path, matrix [in, out]) → a weight node, or the matrix: so that the model is never held dense.
        mesh: where the parameters are spread, each tensor as it is read; a process holds one whole tensor at a time.

    Raises:
        ValueError: a tensor missing, left over or of another shape, by name.
    """
    names, tree = tensor_names(config, layout), decoder.shapes(config)
    layers = range(config.num_layers)
    wanted = {n.format(i) for path, n in names.items() for i in (layers if path[0] == "layers" else [0])}
    available = set(available)
    _complain(source, "tensors are missing", wanted - available)
    _complain(source, "tensors are left over", {n for n in available - wanted if not ignore(n)})

    def fetch(path, name, shape, matrix):
        tensor = read(name)
        if is_node(tensor):
            got, tensor = tensor.shape[::-1], tensor if dtype is None else tensor.astype(dtype)
        else:
            got, tensor = tensor.shape, tensor if dtype is None else tensor.astype(dtype)
        expected = shape[::-1] if matrix else shape
        if got != expected:
            raise ValueError(f"{source}: tensor {name} has the shape {list(expected)} by the config, got {list(got)}.")
        tensor = tensor.T if matrix and not is_node(tensor) else tensor
        return tensor if quantize is None else _named(name, lambda: quantize("/".join(path), tensor))

    def placed(name, array):
        return jax.tree.map(jnp.asarray, array) if mesh is None else rules.shard({name: array}, mesh)[name]

    params: Params = {"layers": {}}
    for path, name in names.items():
        if path[0] != "layers":
            params[path[0]] = placed(path[0], fetch(path, name, tree[path[0]], False))
            continue
        shape, matrix = tree["layers"][path[1]], path[1] in MATRICES
        parts = (fetch(path, name.format(i), shape[1:], matrix) for i in layers)
        if mesh is None:
            params["layers"][path[1]] = placed(path[1], _stack(parts, len(layers), source, name))
        else:
            params["layers"][path[1]] = _stack_on(
                mesh, path[1], [placed(path[1], part) for part in parts], source, name
            )
    return params


def _stack_on(mesh: Mesh, weight: str, parts: list[Any], source: str, name: str) -> Any:
    """Equal trees that lie on a mesh stacked there."""
    for i, part in enumerate(parts):
        _check_alike(parts[0], part, i, source, name)
    stack = lambda *parts: jax.tree.map(lambda *a: jnp.stack(a), *parts)
    shardings = rules.shardings({weight: jax.eval_shape(stack, *parts)}, mesh)[weight]
    return jax.jit(stack, out_shardings=shardings)(*parts)


def _check_alike(first: Any, part: Any, i: int, source: str, name: str) -> None:
    describe = lambda part: (jax.tree.structure(part), [leaf.shape for leaf in jax.tree.leaves(part)])
    if describe(part) != describe(first):
        raise ValueError(f"{source}: {name} is quantised alike in all layers, layer {i} is not as layer 0.")


def _stack(parts: Iterator[Any], count: int, source: str, name: str) -> Any:
    """Equal trees stacked one after the other, on the host."""
    for i, part in enumerate(parts):
        leaves, structure = jax.tree.flatten(part)
        if i == 0:
            first, out = part, [np.empty((count, *leaf.shape), leaf.dtype) for leaf in leaves]
        _check_alike(first, part, i, source, name)
        for o, leaf in zip(out, leaves):
            o[i] = leaf
    return structure.unflatten(out)


def _named(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def disassemble(params: Params, config: DecoderConfig, layout: str = "hf") -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under the file's name and in its layout, layer by layer; quantised ones as bitsandbytes has them.

    Where the parameters are spread over several processes, all of them iterate together.
    """
    names = tensor_names(config, layout)
    for path, name in names.items():
        if path[0] != "layers":
            yield name, to_host(params[path[0]])
    for i in range(config.num_layers):
        for path, name in names.items():
            if path[0] == "layers":
                tensor = jax.tree.map(lambda a: to_host(a[i]), params["layers"][path[1]])
                if is_node(tensor):
                    yield from bnb.write(name.format(i), tensor).items()
                    continue
                yield name.format(i), np.ascontiguousarray(tensor.T) if path[1] in MATRICES else tensor


def _complain(source: str, what: str, names: set[str]) -> None:
    if names:
        shown = sorted(names)
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        raise ValueError(f"{source}: {what} by the config: {', '.join(shown[:8])}{more}.")
