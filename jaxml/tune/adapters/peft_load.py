"""PEFT's folder format, read."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import files, paths, weights
from jaxml.axes import Array, Params
from jaxml.checksum import checksum
from jaxml.lm import hf
from jaxml.lm.config import DecoderConfig
from jaxml.lm.tensors import real
from jaxml.quant import QArray
from jaxml.tune.adapters import peft_config, starts
from jaxml.tune.adapters.nodes import LoRA, Scaled, Whole
from jaxml.tune.adapters.peft_names import BASE, PREFIX, RANK_SHIFT, VERA, Modules, modules_of, short
from jaxml.tune.adapters.tree import is_adapter


def load_peft(folder: str | Path, params: Params, config: DecoderConfig | Modules, dtype: Any = None) -> Params:
    """Puts the adapter of a PEFT folder around the model's matrices, or its prompt in front of them.

    Args:
        params: of the model that the adapter was made for, without adapters; quantised or not.
        config: as in `save_peft`.
        dtype: of what the file holds; its own where None.

    Raises:
        FileNotFoundError, ValueError: files missing or truncated, an option that is not implemented, or an adapter of
            another model (names the first tensor that does not fit).

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> model = testing.tiny_model()
        >>> params = adapters.attach(model.params, jax.random.key(0), rank=2, targets=["q"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = adapters.save_peft(f"{folder}/adapter", params, model.config)
        ...     adapters.has_adapters(load_peft(saved, model.params, model.config))
        True
    """
    folder = Path(folder)
    about = peft_config.read(folder)
    with files.reading(folder, "an adapter", more=(re.error,)):
        return _load(folder, about, params, config, dtype)


def _load(folder: Path, about: dict[str, Any], params: Params, config: DecoderConfig | Modules, dtype: Any) -> Params:
    method = about["peft_type"]
    if method in peft_config.PROMPTS:
        from jaxml.tune.prompt import peft as prompts  # which is made of this package

        return prompts.load(folder, about, params, config, dtype)
    modules, found = modules_of(config), paths.named(params)
    with hf.open_safetensors(folder / "adapter_model.safetensors") as file:
        names = list(file.keys())
        read = lambda name: jnp.asarray(tensor(folder, file, name), dtype)
        projections = _projections(folder, method, about, names, read)
        parts = _by_path(folder, [n for n in names if n not in VERA], modules, found)
        reader = _Reader(folder, about, method, modules, found, read, projections)
        new = {path: reader.node(path, of_layers) for path, of_layers in parts.items()}
    if not any(isinstance(w, LoRA | Scaled) for w in new.values()):
        raise ValueError(
            f"{folder}: this model finds none of its tensors. The adapter is of another model, or adapts other parts."
        )
    for target in about.get("modules_to_save") or ():
        if not any(isinstance(w, Whole) and modules[path].format(0).endswith(target) for path, w in new.items()):
            raise ValueError(f"{folder}: modules_to_save names {target!r}, which the file does not hold.")
    if (folder / BASE).is_file():
        _check_base(folder, about, new)
    return paths.replaced(params, new)


def _check_base(folder: Path, about: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuses other weights than those that a part moved out of, where that is known (`save_peft`)."""
    told = files.read_json(folder / BASE).get("checksum")
    base = {path: w.base for path, w in new.items() if isinstance(w, LoRA) and isinstance(w.base, QArray)}
    if checksum(base) != told:
        raise ValueError(
            f"{folder}: this adapter holds a part of the weights that it was trained on, and these are others. Load "
            f"it on {about.get('base_model_name_or_path') or 'those'} (what was left of them)."
        )


def tensor(folder: Path, file: Any, name: str) -> np.ndarray:
    tensor = real(file.get_tensor(name), f"{folder}: {name}")
    if not np.isfinite(tensor).all():
        raise ValueError(f"{folder}: every number of {name} is finite, {(~np.isfinite(tensor)).sum()} are not.")
    return tensor


def _projections(folder, method, about, names, read) -> tuple[Array, Array] | None:
    if method != "VERA":
        return None
    if not set(VERA) <= set(names):
        raise ValueError(
            f"{folder}: VeRA's projections are not in the file (save_projection={about.get('save_projection')}); they "
            "are random numbers of torch. Save the adapter with save_projection=True."
        )
    a, b = (read(name).T for name in VERA)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not a.shape[1]:
        raise ValueError(
            f"{folder}: VeRA's projections are [rank, in] and [out, rank], got {a.shape[::-1]}, {b.shape[::-1]}."
        )
    return a, b


def _by_path(folder, names, modules: Modules, found) -> dict[str, dict[int, dict[str, str]]]:
    """path → layer → part → tensor; a layer that is none of a stack is 0."""
    patterns = {path: re.compile(re.escape(m).replace(r"\{\}", r"(\d+)") + r"\.(.+)") for path, m in modules.items()}
    out: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        for path, pattern in patterns.items():
            hit = pattern.fullmatch(name.removeprefix(PREFIX)) if path in found else None
            if hit is None:
                continue
            layer, part = (int(hit[1]), hit[2]) if "{}" in modules[path] else (0, hit[1])
            if "{}" in modules[path] and layer >= found[path].shape[0]:
                continue
            out.setdefault(path, {}).setdefault(layer, {})[part.removesuffix(".default")] = name
            break
        else:
            raise ValueError(
                f"{folder}: this model has no place for {name}. The adapter is of another model, or adapts other parts."
            )
    return out


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes nodes of a folder's tensors."""

    folder: Path
    about: dict[str, Any]
    method: str
    modules: Modules
    found: dict[str, Any]
    read: Any
    projections: tuple[Array, Array] | None

    def node(self, path: str, layers: dict[int, dict[str, str]]) -> Any:
        """The node of one path, from its layers' tensors."""
        w, parts = self.found[path], {part for of in layers.values() for part in of}
        if is_adapter(w):
            raise ValueError(f"{self.folder}: {path} has an adapter already. Detach or merge it first.")
        stacked = "{}" in self.modules[path]
        count = w.shape[0] if stacked else 1
        if parts == {"weight"}:
            self._complete(path, layers, "weight", count)
            turn = w.ndim - stacked == 2 and path not in paths.TABLES
            arrays = [self.read(layers[i]["weight"]) for i in range(count)]
            for a in arrays:
                self._fits(path, a.shape, arrays[0].shape)
            value = jnp.stack([a.T if turn else a for a in arrays]) if stacked else arrays[0]
            self._fits(path, value.shape, w.shape)
            return Whole(w, value)
        if "base_layer.weight" in parts:  # PEFT writes the embedding beside its adapter, and reads it back
            base = self.read(layers[0]["base_layer.weight"])
            self._fits(path, base.shape, w.shape)
            w, layers = base.astype(w.dtype), {0: {k: v for k, v in layers[0].items() if k != "base_layer.weight"}}
            parts = set(layers[0])
        shape = {frozenset(of) for of in layers.values()}
        known = {
            "IA3": [{"ia3_l"}],
            "VERA": [{"vera_lambda_b", "vera_lambda_d"}],
            "ADALORA": [{"lora_A", "lora_B", "lora_E"}, {"lora_A", "lora_B", "lora_E", "ranknum"}],
            "LORA": [
                a | m
                for a in ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"})
                for m in (set(), {"lora_magnitude_vector"}, {"lora_magnitude_vector.weight"})
            ],
        }[self.method]
        if len(shape) > 1 or set(next(iter(shape))) not in known:
            have = sorted(next(iter(layers.values())).values())
            raise ValueError(
                f"{self.folder}: {path} is made of {', '.join(sorted(known[0]))} (peft_type {self.method}), "
                f"got {have}. A tensor is missing, or the adapter is of another model."
            )
        get = lambda i, part: self.read(layers[i][part])
        if self.method == "IA3":
            self._complete(path, layers, "ia3_l", count)
            arrays = [get(i, "ia3_l") for i in range(count)]
            inner = arrays[0].shape[0] == 1 and arrays[0].shape[1] == w.shape[-2]
            value = jnp.stack([a.reshape(-1) for a in arrays]) if stacked else arrays[0].reshape(-1)
            self._fits(path, value.shape[-1:], (w.shape[-2 if inner else -1],))
            return Scaled(w, inner=value, train=("inner",)) if inner else Scaled(w, outer=value)
        return self._lora(path, w, layers, count, stacked, get)

    def _lora(self, path, w, layers, count, stacked, get) -> LoRA:
        transposed = path == "head"
        d, f = w.shape[-2:][::-1] if transposed else w.shape[-2:]
        join = lambda arrays: jnp.stack(arrays) if stacked else arrays[0]
        if self.method == "VERA":
            self._complete(path, layers, "vera_lambda_b", count)
            a, b = self.projections
            if a.shape[0] < d or b.shape[1] < f:
                raise ValueError(self._other(path, (d, f), (a.shape[0], b.shape[1])))
            vectors = {x: [get(i, f"vera_lambda_{x}") for i in range(count)] for x in "bd"}
            for x, length in (("b", f), ("d", a.shape[1])):
                for vector in vectors[x]:
                    self._fits(f"{path}'s vera_lambda_{x}", vector.shape, (length,))
            outer, diagonal = join(vectors["b"]), join(vectors["d"])
            dropout = float(self.about.get("vera_dropout", 0.0))
            return LoRA(
                w, weights.Shared(a), weights.Shared(b), jnp.ones(w.shape[:-2]), diagonal=diagonal, outer=outer,
                method="vera", train=("diagonal", "outer"), transposed=transposed, dropout=dropout,
            )  # fmt: skip
        kind = "lora_embedding_{}" if path == "embed" else "lora_{}" if self.method == "ADALORA" else "lora_{}.weight"
        a_of = {i: get(i, kind.format("A")).T for i in layers}
        b_of = {i: get(i, kind.format("B")).T for i in layers}
        for i in layers:
            if a_of[i].ndim != 2 or b_of[i].ndim != 2:
                raise ValueError(
                    f"{self.folder}: A and B of {path} are matrices, got {a_of[i].shape}, {b_of[i].shape}."
                )
            if (a_of[i].shape[0], b_of[i].shape[1]) != (d, f) or a_of[i].shape[1] != b_of[i].shape[0]:
                raise ValueError(self._other(path, (d, f), (a_of[i].shape[0], b_of[i].shape[1])))
            if self.method == "LORA" and not a_of[i].shape[1]:
                raise ValueError(f"{self.folder}: the rank of {path} is at least 1, got 0.")
        self._complete(path, {i for i in range(count) if i in layers or not self._targeted(path, i)}, kind, count)
        ranks = [a_of[i].shape[1] if i in layers else 0 for i in range(count)]
        most, some = max(ranks), next(iter(layers))
        wide = lambda m, axis: jnp.pad(m, [(0, most - m.shape[k] if k == axis else 0) for k in range(m.ndim)])
        nothing = lambda *shape: jnp.zeros(shape, a_of[some].dtype)
        a = join([wide(a_of[i], 1) if i in layers else nothing(d, most) for i in range(count)])
        b = join([wide(b_of[i], 0) if i in layers else nothing(most, f) for i in range(count)])
        scales = [self._scale(path, i, rank) for i, rank in enumerate(ranks)]
        scale = jnp.asarray(scales if stacked else scales[0], jnp.float32)
        node = LoRA(
            w, a, b, scale, transposed=transposed, dropout=float(self.about.get("lora_dropout", 0.0)),
            ranks=tuple(ranks) if len(set(ranks)) > 1 else None,
        )  # fmt: skip
        if self.method == "ADALORA":
            e_of = {i: get(i, "lora_E").reshape(-1) for i in layers}
            for i in layers:
                self._fits(f"{path}'s lora_E", e_of[i].shape, (ranks[i],))
            e = [wide(e_of[i], 0) if i in layers else nothing(most) for i in range(count)]
            return dataclasses.replace(node, diagonal=join(e), method="adalora", train=("a", "diagonal", "b"))
        start = self.about.get("init_lora_weights", True)
        if isinstance(start, str) and starts.moves(start):
            if start not in starts.FOUND_AGAIN or isinstance(w, QArray):
                raise ValueError(
                    f"{self.folder}: init_lora_weights={start!r} moved a part of the weights into the adapter, which "
                    "cannot be found again. Write the adapter with path_initial_model_for_weight_conversion."
                )
            keys = dict(path=path, table=path == "embed", transposed=transposed, quantize=None)
            base, _, _ = starts.make(start, jax.random.key(0), w, ranks=ranks, scale=scale, **keys)
            node = dataclasses.replace(node, base=base, start=start)
        if bool(self.about.get("use_dora")) != any("magnitude" in part for part in layers[some]):
            raise ValueError(f"{self.folder}: use_dora says whether there are magnitudes; those of {path} disagree.")
        magnitudes = [p for p in layers[some] if p.startswith("lora_magnitude_vector")]
        if magnitudes:
            squares = starts.squared_norms(node.base, transposed)
            norms = lambda i: jnp.sqrt(squares[i] if stacked else squares)
            m_of = {i: get(i, magnitudes[0]) for i in layers}
            for i in layers:
                self._fits(f"{path}'s magnitude", m_of[i].shape, (f,))
            m = join([m_of[i] if i in layers else norms(i) for i in range(count)])
            node = dataclasses.replace(node, magnitude=m, squares=squares, train=("a", "b", "magnitude"))
        return node

    def _scale(self, path: str, layer: int, rank: int) -> float:
        if not rank:
            return 0.0
        module, alpha = self.modules[path].format(layer), self.about.get("lora_alpha", 8)
        for pattern, value in (self.about.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        if self.method == "ADALORA":
            rank = self.about.get("init_r", rank)  # also of matrices that have lost ranks
            return (alpha if alpha > 0 else rank) / (rank + RANK_SHIFT)
        return float(alpha) / (math.sqrt(rank) if self.about.get("use_rslora") else rank)

    def _targeted(self, path: str, layer: int) -> bool:
        """Whether the config names the module of that layer."""
        module, targets, only = self.modules[path].format(layer), self.about.get("target_modules"), None
        if self.about.get("layers_to_transform") is not None:
            only = np.atleast_1d(self.about["layers_to_transform"]).tolist()
        if isinstance(targets, str):
            named = targets == "all-linear" or re.fullmatch(targets, module) is not None
        else:
            named = any(module == t or module.endswith("." + t) for t in targets or ())
        return named and (only is None or "{}" not in self.modules[path] or layer in only)

    def _complete(self, path: str, layers: set[int] | dict, part: str, count: int) -> None:
        for i in range(count):
            if i not in layers:
                name = f"{self.modules[path].format(i)}.{part.format('A')}"
                raise ValueError(f"{self.folder}: tensor {PREFIX}{name} is missing. The adapter is of another model.")

    def _fits(self, path: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if tuple(got) != tuple(wanted):
            raise ValueError(
                f"{self.folder}: {path} has the shape {wanted} in this model, {got} in the adapter. "
                "The adapter is of another model."
            )

    def _other(self, path: str, here: tuple[int, int], there: tuple[int, int]) -> str:
        return (
            f"{self.folder}: {short(self.modules[path])} is {here[0]} → {here[1]} in this model, "
            f"{there[0]} → {there[1]} in the adapter. The adapter is of another model."
        )
