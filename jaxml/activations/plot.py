"""Pictures of activations: each with its derivative, in one figure.

Example:
    >>> from jaxml.activations.catalogue import CATALOGUE
    >>> len(drawable()) >= 70 and all(a.kind in ("fixed", "learnable") for a in drawable())
    True
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import figure
from jaxml.activations.catalogue import CATALOGUE
from jaxml.activations.entry import Activation

FUNCTION, SLOPE, GUIDE = "#1f5fa8", "#d9822b", "#c8ccd2"
SEPARATE = ("learnable.meta_acon", "learnable.frelu", "learnable.polynorm")  # of several features


def drawable() -> list[Activation]:
    """Those that are a curve: fixed ones, and learnable ones as they start."""
    return [a for a in CATALOGUE.values() if a.kind in ("fixed", "learnable") and a.name not in SEPARATE]


def gallery(
    path: str | os.PathLike,
    activations: Sequence[Activation] | None = None,
    columns: int | None = None,
    limit: float = 4,
) -> Path:
    """Writes one picture (PNG, SVG or PDF by the name) of activations, blue, and their derivatives, orange.

    Args:
        path: of the picture.
        activations: entries of the catalogue; all that are a curve by default.
        columns: of panels; about a square's by default.
        limit: x goes from −limit to limit.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is missing.
    """
    chosen = list(activations) if activations is not None else drawable()
    columns = columns or (len(chosen) if len(chosen) <= 4 else round(math.sqrt(1.3 * len(chosen))))
    rows = -(-len(chosen) // columns)
    size = 3.2 if len(chosen) <= 4 else 1.75
    made = figure.figure(size * columns + 0.3, (size + 0.1) * rows + 0.75)
    panels = made.subplots(rows, columns, squeeze=False, sharex=True)
    curves = _curves(chosen, limit)
    for axes, entry in zip(panels.flat, chosen):
        _panel(axes, entry, *curves[entry.name], limit, large=size > 2)
    for axes in panels.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes in panels.flat[max(0, len(chosen) - columns) : len(chosen)]:
        axes.tick_params(labelbottom=True)
    slope, function = panels.flat[0].get_lines()[-2:]
    made.legend([function, slope], ["f(x)", "f′(x)"], loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    return figure.write(made, path, dpi=130)


def curve(entry: Activation):
    """The entry as a function of x alone; a learnable one as it starts."""
    if entry.kind == "fixed":
        return entry.function
    learnable = entry.function
    params = learnable.init(jax.random.key(0)) if entry.name == "learnable.apl" else learnable.init()
    return lambda x: learnable.apply(params, x)


def _curves(chosen: Sequence[Activation], limit: float) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{name: (x, f, f')}, in one program. The number of points is odd and misses the kinks."""
    x = jnp.linspace(-limit, limit, 1001) + 1.3e-4
    inside = jnp.linspace(0.002, 0.998, 1001)

    @jax.jit
    def run():
        out = {}
        for entry in chosen:
            at, f = inside if entry.name == "logit" else x, curve(entry)
            out[entry.name] = at, f(at), jax.vmap(jax.grad(f))(at)
        return out

    return {name: tuple(np.asarray(a) for a in arrays) for name, arrays in run().items()}


def _panel(axes, entry, x, y, slope, limit, large):
    low, high = -1.6, 2.6
    if y.min() > -0.05 and y.max() > 3:
        low, high = -0.8, 3.4
    if entry.name == "logit":
        low, high = -4.0, 6.0
    axes.axhline(0, color=GUIDE, linewidth=0.8, zorder=0)
    axes.axvline(0, color=GUIDE, linewidth=0.8, zorder=0)
    hidden = lambda a: np.where((a < low - 1) | (a > high + 1), np.nan, a)
    broken = lambda a: np.where(np.abs(np.diff(a, append=a[-1:])) > 0.3, np.nan, hidden(a))
    axes.plot(x, broken(slope), color=SLOPE, linewidth=1.3)
    axes.plot(x, broken(y), color=FUNCTION, linewidth=1.9)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(low, high)
    axes.set_xticks([t for t in (-4, -2, 0, 2, 4) if abs(t) <= limit])
    axes.set_yticks([t for t in range(-4, 7, 1 if high - low < 6 else 2) if low <= t <= high])
    axes.tick_params(labelsize=9 if large else 7, length=2, color=GUIDE)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(GUIDE)
    axes.set_title(entry.name, fontsize=12 if large else 8.5, pad=3)
    if large:
        axes.set_xlabel(entry.formula, fontsize=9)
