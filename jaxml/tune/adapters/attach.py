"""Adapters onto a tree of parameters: which weights, which ranks, where they begin."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxml import paths, weights
from jaxml.axes import Array, Params
from jaxml.quant import QArray
from jaxml.quant.params import of_format, quantized
from jaxml.tune.adapters import starts
from jaxml.tune.adapters.nodes import LoRA, Scaled, Whole
from jaxml.tune.adapters.tree import is_adapter, of
from jaxml.weights import is_node

METHODS = ("lora", "dora", "vera", "adalora", "ia3")
_IA3_OUTPUTS, _IA3_INPUTS = ("layers/k", "layers/v"), ("layers/down",)


def attach(
    params: Params,
    key: Array,
    *,
    method: str = "lora",
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    start: str | Mapping[str, Array] = "default",
    rslora: bool = False,
    freeze_a: bool = False,
    dropout: float = 0.0,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    whole: Sequence[str] = (),
    quantize: str | None = None,
    dtype: Any = jnp.float32,
    show: Callable[[str], Any] | None = None,
) -> Params:
    """Puts adapters around every matrix that a pattern names.

    ========= ===================================================================================
    method    what is trained
    ========= ===================================================================================
    lora      A and B of W + s·A B
    dora      also a magnitude for each output: m ⊙ (W + s·A B) / its norms
    vera      two vectors around random A and B that all layers share
    adalora   A, e and B of W + s·A diag(e) B; `adalora.optimizer` moves ranks where they count
    ia3       one number for each output (keys, values) or each input (`down`)
    ========= ===================================================================================

    The function computed does not change yet. With the starts "pissa", "olora" and "loftq" a part of W moves into A and
    B; where what is left of W is quantised (`quantize`, or W was), it is rounded then, and the function with it.

    Args:
        params: a decoder's, or any pytree of matrices [..., in, out], arrays or quantised.
        rank: of the factors (VeRA's paper has 256).
        alpha: twice the rank where None. s = alpha / rank, or alpha / √rank with `rslora`.
        targets: shell patterns over paths such as "layers/q"; one without "/" is matched with the last part alone ("q",
            "*"). All matrices of a decoder's layers where None; its "embed" and "head" only where named. Of ia3:
            keys, values and `down` where None.
        start: of A and B, by name (`starts.STARTS`), or directions by path as `eva` gives them.
        rslora: rank-stabilised scale (Kalajdzievski 2023).
        freeze_a: LoRA-FA: only B is trained (`lora_fa` corrects its gradient).
        dropout: of the inputs of A, where a training loop hands out keys (`with_key`; `tune.fit` does).
        ranks, alphas: of some weights, by pattern; the first that matches counts. "layers/0/q" is one of the layers.
        whole: patterns of weights that are trained whole: "embed", "head", "norm", "*_norm", …
        quantize: a format of `jaxml.quant`: what is left of W is quantised once the adapter stands.
        dtype: of what is trained.
        show: is given the plan, a table as text: `print`.

    Raises:
        ValueError: a pattern that matches nothing (lists the paths), a rank that is not in 1 … min(in, out), or with
            VeRA max(in, out), a method or start that does not exist, a weight that has an adapter or is quantised in
            another format than `quantize`.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> params = attach(model.params, jax.random.key(0), rank=4, targets=["q", "v"], show=print)
        weight    shape    method  rank  scale  trained
        layers/q  2×32×32  lora    4     2      512
        layers/v  2×32×16  lora    4     2      384
        in all    17,568                        896 (5.10%)

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; Liu et al. 2024 (DoRA);
        Kopiczko et al. 2023 (VeRA); Zhang et al. 2023 (AdaLoRA); Liu et al. 2022 (IA³).
    """
    if method not in METHODS:
        raise ValueError(f"adapters.attach: method is one of {', '.join(METHODS)}, got {method!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"adapters.attach: dropout is in [0, 1), got {dropout}.")
    found, everything = paths.matrices(params), paths.named(params)
    if targets is None:
        targets = paths.ALL_LINEAR if method != "ia3" else (*_IA3_OUTPUTS, *_IA3_INPUTS)
    chosen = paths.match(found, targets, "adapters.attach") if targets else []
    saved = [path for path in paths.match(everything, whole, "adapters.attach") if path not in chosen] if whole else []
    for path in (*chosen, *saved):
        if is_adapter(everything[path]):
            kind = type(everything[path]).__name__
            raise ValueError(f"adapters.attach: {path} has an adapter ({kind}). Merge or detach it first.")
    if both := set(chosen) & set(paths.match(everything, whole, "adapters.attach") if whole else ()):
        raise ValueError(f"adapters.attach: a weight is adapted or trained whole, {min(both)} is in targets and whole.")
    if method in ("vera", "adalora", "ia3") and (start != "default" or freeze_a):
        raise ValueError(f"adapters.attach: start and freeze_a are LoRA's and DoRA's, {method} begins in its own way.")
    if method == "vera" and ranks:
        raise ValueError("adapters.attach: VeRA's matrices share A and B, and with them one rank; got ranks.")
    if quantize is not None:
        of_format(quantize)
    stacked = _depth(params)
    rank_of = _by_pattern(ranks, rank, stacked, "ranks", found)
    alpha_of = _by_pattern(alphas, alpha, stacked, "alphas", found)
    new: dict[str, Any] = {path: Whole(everything[path], _copy(everything[path], dtype)) for path in saved}
    shared = None
    for k, path in zip(jax.random.split(key, max(len(chosen), 1)), chosen):
        w = found[path]
        if quantize is not None and isinstance(w, QArray) and w.kind != quantize:
            raise ValueError(
                f"adapters.attach: {path} is quantised in {w.kind} already, got quantize={quantize!r}. Leave it out, "
                "or dequantise first (quant.dequantize_params)."
            )
        if method == "ia3":
            if path in paths.TABLES:
                raise ValueError(
                    f"adapters.attach: ia3 scales what matrices give or take, {path} is a table. Leave it out."
                )
            new[path] = _ia3(w, path, dtype)
        else:
            if method == "vera" and shared is None:
                shared = starts.shared(key, [_sides(path, found[path]) for path in chosen], rank, dtype)
            new[path] = _lora(
                w, path, k, method=method, ranks=rank_of(path), alphas=alpha_of(path), start=start, rslora=rslora,
                freeze_a=freeze_a, dropout=dropout, quantize=quantize, dtype=dtype, shared=shared,
            )  # fmt: skip
        if quantize is not None and not isinstance(new[path].base, QArray):
            base = quantized(of_format(quantize), path, new[path].base, {})
            new[path] = dataclasses.replace(new[path], base=base)
        if method == "dora":
            new[path] = _with_magnitudes(new[path], dtype)
    out = paths.replaced(params, new)
    if show is not None:
        show(plan(out))
    return out


def _lora(w, path, key, *, method, ranks, alphas, start, rslora, freeze_a, dropout, quantize, dtype, shared) -> LoRA:
    d, f = _sides(path, w)
    lead = tuple(w.shape[:-2])
    most = max(d, f) if method == "vera" else min(d, f)
    for rank in ranks:
        if not isinstance(rank, numbers.Integral) or not 1 <= rank <= most:
            raise ValueError(
                f"adapters.attach: the rank is a whole number in 1 … {most} for {path} of shape {d} × {f}, got {rank}."
            )
    alphas = [2.0 * r if alpha is None else alpha for r, alpha in zip(ranks, alphas)]
    for alpha in alphas:
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"adapters.attach: alpha is above 0 and finite, got {alpha} for {path}.")
    if starts.moves(start) and not isinstance(w, jax.core.Tracer) and not _finite(w):
        raise ValueError(f"adapters.attach: every weight of {path} is finite where {start} takes it apart, got NaN.")
    scales = [alpha / (math.sqrt(r) if rslora else r) for r, alpha in zip(ranks, alphas)]
    same = len(set(ranks)) == 1
    per_layer = lambda values: values * lead[0] if lead and len(values) == 1 else values
    scale = jnp.asarray(per_layer(scales) if lead else scales[0], jnp.float32)
    scale = jnp.broadcast_to(scale.reshape(*scale.shape, *(1,) * (len(lead) - scale.ndim)), lead)
    widest, transposed = max(ranks), path == "head"
    node = LoRA(
        w, None, None, scale, method="lora" if method == "dora" else method, transposed=transposed, dropout=dropout,
        ranks=None if same else tuple(ranks), train=("b",) if freeze_a else ("a", "b"),
        start=start if isinstance(start, str) else "directions",
    )  # fmt: skip
    if method == "vera":
        a, b = (weights.Shared(part) for part in shared)
        outer, diagonal = jnp.zeros((*lead, f), dtype), jnp.full((*lead, widest), starts.VERA_D, dtype)
        one = jnp.ones(lead, jnp.float32)
        return dataclasses.replace(
            node, a=a, b=b, scale=one, diagonal=diagonal, outer=outer, train=("diagonal", "outer")
        )
    if method == "adalora":
        a, b, diagonal = starts.adalora(key, lead, d, f, ranks, dtype)
        return dataclasses.replace(node, a=a, b=b, diagonal=diagonal, train=("a", "diagonal", "b"))
    base, a, b = starts.make(
        start, key, w, ranks=ranks, scale=scale, table=path == "embed", transposed=transposed, path=path,
        quantize=quantize,
    )  # fmt: skip
    return dataclasses.replace(node, base=base, a=a.astype(dtype), b=b.astype(dtype))


def _with_magnitudes(w: LoRA, dtype: Any) -> LoRA:
    """DoRA: the norms of what the matrix and its adapter are together, so that nothing changes yet."""
    squares = starts.squared_norms(w.base, w.transposed)
    one = dataclasses.replace(w, magnitude=jnp.ones(squares.shape, jnp.float32), squares=squares)
    return dataclasses.replace(one, magnitude=(1 / one.gain()).astype(dtype), train=(*w.train, "magnitude"))


def _finite(w: Any) -> bool:
    parts = [part for part in jax.tree.leaves(w) if jnp.issubdtype(part.dtype, jnp.floating)]
    return all(bool(jnp.isfinite(part).all()) for part in parts)


def _ia3(w: Any, path: str, dtype: Any) -> Scaled:
    inputs = any(paths.matches(p, path) for p in _IA3_INPUTS)
    size = w.shape[-2] if inputs else w.shape[-1]
    ones = jnp.ones((*w.shape[:-2], size), dtype)
    return Scaled(w, inner=ones, train=("inner",)) if inputs else Scaled(w, outer=ones)


def _sides(path: str, w: Any) -> tuple[int, int]:
    """(inputs, outputs) of a weight."""
    d, f = w.shape[-2:]
    return (f, d) if path == "head" else (d, f)


def _copy(w: Any, dtype: Any) -> Array:
    w = weights.dense(w)
    return jnp.array(w, dtype if jnp.issubdtype(w.dtype, jnp.floating) else w.dtype, copy=True)


def _depth(params: Params) -> int | None:
    """How many layers a decoder's weights have stacked in front, or None."""
    layers = params.get("layers") if isinstance(params, Mapping) else None
    return layers["attn_norm"].shape[0] if isinstance(layers, Mapping) and "attn_norm" in layers else None


def _by_pattern(given: Mapping[str, Any] | None, default: Any, depth: int | None, who: str, found) -> Callable:
    """path → the value of each of its layers: one where they agree."""
    given = dict(given or {})
    of_layer = lambda path, i: path.replace("layers/", f"layers/{i}/", 1)
    names = [*found, *(of_layer(p, i) for p in found if depth and p.startswith("layers/") for i in range(depth))]
    if given:
        paths.match(names, list(given), f"adapters.attach, {who}")

    def values(path: str) -> list[Any]:
        spellings = (
            [[path, of_layer(path, i)] for i in range(depth)] if depth and path.startswith("layers/") else [[path]]
        )
        pick = lambda names: next((v for p, v in given.items() if any(paths.matches(p, n) for n in names)), default)
        return [pick(names) for names in spellings]

    return values


def plan(params: Params) -> str:
    """What is trained, as a table: path, shape, method, rank, scale, how many numbers.

    Example:
        >>> from jaxml import testing
        >>> print(plan(attach(testing.tiny_model().params, jax.random.key(0), rank=4, targets=["q"])))
        weight    shape    method  rank  scale  trained
        layers/q  2×32×32  lora    4     2      512
        in all    17,568                        512 (2.91%)
    """
    rows = [("weight", "shape", "method", "rank", "scale", "trained")]
    total = 0
    for path, w in of(params).items():
        count = sum(math.prod(leaf.shape) for name in w.train for leaf in jax.tree.leaves(getattr(w, name)))
        total += count
        base = f" over {w.base.kind}" if isinstance(w.base, QArray) else ""
        rank, scale = "", ""
        if isinstance(w, LoRA):
            rank = str(w.rank) if w.ranks is None else f"{min(w.ranks)}–{max(w.ranks)}"
            low, high = float(jnp.min(w.scale)), float(jnp.max(w.scale))
            scale = f"{low:.4g}" if low == high else f"{low:.4g}–{high:.4g}"
        method = "dora" if getattr(w, "magnitude", None) is not None else w.method
        rows.append((path, "×".join(map(str, w.shape)), method + base, rank, scale, f"{count:,}"))
    every = sum(math.prod(w.shape) for w in jax.tree.leaves(params, is_leaf=is_node))
    rows.append(("in all", f"{every:,}", "", "", "", f"{total:,} ({total / every:.2%})"))
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip() for row in rows)
