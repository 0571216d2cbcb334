"""A picture of a network: every edge's function where it stands, strong edges dark, weak ones pale.

Narrow layers are drawn as a graph from the inputs at the bottom to the outputs at the top; a layer of many edges as a
matrix, inputs by columns and sums by rows, which stays readable at hundreds of edges.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxml import figure
from jaxml.axes import Array, Float
from jaxml.kan import layer as layers
from jaxml.kan.attribution import attribute
from jaxml.kan.network import KAN
from jaxml.kan.symbolic import samples

SPLINE, FIXED, LINE, NODE = "#1f5fa8", "#b5443c", "#9aa4b0", "#2b3440"
MOST_EDGES = 40  # of a layer in a graph
POINTS = 80  # of a curve
BOX = 0.72  # inches of a thumbnail
Picture = Any  # a Matplotlib figure


def plot(
    params: KAN,
    x: Float[Array, "... I"],
    path: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    title: str | None = None,
    beta: float = 3.0,
    style: str = "auto",
) -> Picture:
    """Draws a network, splines blue, fixed functions red with their names, pruned edges not at all.

    Args:
        x: samples of the network's inputs: the range of each curve, and the scores by which edges are dark.
        path: of the picture to write, .png, .svg or .pdf.
        names, outputs: of inputs and outputs; x_1, … and y_1, … where None.
        beta: an edge of score s is drawn with opacity tanh(beta s).
        style: "graph", "matrix", or by the number of edges.

    Returns:
        The figure.

    Raises:
        ImportError: Matplotlib is missing.
        ValueError: another number of names, another style.

    Example:
        >>> import jax, tempfile
        >>> from jaxml import kan
        >>> params = kan.init(jax.random.key(0), [2, 5, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = kan.plot(params, jax.random.normal(jax.random.key(1), (50, 2)), f"{folder}/kan.svg")
    """
    if style not in ("auto", "graph", "matrix"):
        raise ValueError(f"kan.plot: style is one of auto, graph, matrix, got {style!r}.")
    net = _Net(params, x, beta)
    names, outputs = (_named(given, letter, count) for given, letter, count in (
        (names, "x", net.widths[0]), (outputs, "y", net.widths[-1])
    ))  # fmt: skip
    many = max(net.edges_of(n) for n in range(net.depth)) > MOST_EDGES
    draw = _matrix if style == "matrix" or (style == "auto" and many) else _graph
    made = draw(net, names, outputs)
    if title:
        made.suptitle(title)
    if path is not None:
        figure.write(made, path, dpi=160)
    return made


def _named(given: Sequence[str] | None, letter: str, count: int) -> list[str]:
    if given is None:
        return [f"${letter}_{{{n + 1}}}$" for n in range(count)]
    if len(given) != count:
        raise ValueError(f"kan.plot: names are of {count} inputs or outputs, got {len(given)}.")
    return [name.replace("$", r"\$") for name in given]  # of a name, not of mathematics


class _Net:
    """What is drawn, as arrays of NumPy."""

    def __init__(self, params: KAN, x: Array, beta: float):
        self.params, self.depth = params, len(params.layers)
        scores = attribute(params, x)
        self.opacity = [np.tanh(beta * np.asarray(s)) for s in scores.edges]
        self.node_opacity = [np.tanh(beta * np.asarray(s)) for s in scores.nodes]
        self.widths = [s.size for s in scores.nodes]
        self.curves = []
        for layer, (at, _) in zip(params.layers, samples(params, x)):
            curves = layers.edges(layer, jnp.linspace(at[0], at[-1], POINTS))
            self.curves.append(np.moveaxis(np.asarray(curves), 0, 2))  # [I, O, POINTS]

    def alive(self, n: int) -> np.ndarray:
        layer = self.params.layers[n]
        alive = np.asarray(layer.kept) > 0
        for edge in layer.fixed:
            alive[edge.into, edge.out] = True
        return alive

    def edges_of(self, n: int) -> int:
        return int(self.alive(n).sum())

    def fixed(self, n: int) -> dict[tuple[int, int], str]:
        return {(e.into, e.out): e.function.name for e in self.params.layers[n].fixed}

    def node_of(self, n: int) -> list[int]:
        """The node that each sum of a layer goes to."""
        arities = self.params.arities[n]
        adding = self.params.layers[n].width[1] - sum(arities)
        return [*range(adding), *(adding + m for m, a in enumerate(arities) for _ in range(a))]

    def curve(self, n: int, into: int, out: int) -> np.ndarray:
        """[POINTS, 2] within ±1, flat where the function is."""
        y = self.curves[n][into, out]
        middle, half = (y.max() + y.min()) / 2, (y.max() - y.min()) / 2
        flat = half <= 1e-6 * max(1.0, abs(middle))
        return np.stack([np.linspace(-1, 1, POINTS), np.zeros(POINTS) if flat else (y - middle) / half], axis=1)


def _thumbnails(axes, boxes: list[tuple[np.ndarray, float, float, float, bool, float]]) -> None:
    """Curves in frames: (curve, x, y, size, is fixed, opacity) each."""
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    if not boxes:
        return
    frames = [
        FancyBboxPatch((x - s, y - s), 2 * s, 2 * s, boxstyle=f"round,pad=0,rounding_size={0.25 * s}")
        for _, x, y, s, _, _ in boxes
    ]
    colours = [to_rgba(FIXED if is_fixed else SPLINE, 0.12 + 0.88 * o) for *_, is_fixed, o in boxes]
    edge = [to_rgba(NODE, 0.15 + 0.45 * o) for *_, o in boxes]
    axes.add_collection(PatchCollection(frames, facecolor="white", edgecolor=edge, linewidth=0.8, zorder=3))
    # The curve of a fixed edge leaves room for its function's name above.
    shape = lambda is_fixed: (np.array([0.78, 0.6]), np.array([0.0, -0.18])) if is_fixed else (0.78, 0.0)
    lines = [(c * shape(f)[0] + shape(f)[1]) * s + np.array([x, y]) for c, x, y, s, f, _ in boxes]
    axes.add_collection(LineCollection(lines, colors=colours, linewidth=1.6, zorder=4))


def _graph(net: _Net, names: list[str], outputs: list[str]) -> Picture:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    widest = max([net.edges_of(n) for n in range(net.depth)] + [1.6 * w for w in net.widths])
    span, level = max(widest, 3) * 1.25 * BOX, 2.6 * BOX
    made = figure.figure(span + 0.6, 2 * level * net.depth * 0.62 + 1.0)
    axes = made.subplots()
    axes.set_axis_off()
    rise = level * 1.24
    place = [[(span * (n + 0.5) / w, rise * depth) for n in range(w)] for depth, w in enumerate(net.widths)]
    for n in range(net.depth):
        alive, fixed, node_of = net.alive(n), net.fixed(n), net.node_of(n)
        mean = lambda io: (place[n][io[0]][0] + place[n + 1][node_of[io[1]]][0], io)
        edges = sorted(((int(i), int(o)) for i, o in np.argwhere(alive)), key=mean)
        wires, colours, boxes = [], [], []
        y = rise * (n + 0.5)
        for m, (i, o) in enumerate(edges):
            x, opacity = span * (m + 0.5) / len(edges), float(net.opacity[n][i, o])
            size = BOX / 2
            into, out = place[n][i], place[n + 1][node_of[o]]
            for start, end in ((into, (x, y - size)), ((x, y + size), out)):
                wires.append(_bend(np.asarray(start), np.asarray(end)))
                colours.append(to_rgba(LINE, 0.1 + 0.9 * opacity))
            boxes.append((net.curve(n, i, o), x, y, size, (i, o) in fixed, opacity))
            if (i, o) in fixed:
                axes.text(x - 0.86 * size, y + 0.88 * size, fixed[i, o], color=FIXED, va="top", fontsize=7, zorder=6)
        axes.add_collection(LineCollection(wires, colors=colours, linewidth=1.5, zorder=1))
        _thumbnails(axes, boxes)
    for depth, points in enumerate(place):
        for n, (x, y) in enumerate(points):
            adding = net.widths[depth] - len(net.params.arities[depth - 1]) if depth else net.widths[0]
            opacity = 0.25 + 0.75 * float(net.node_opacity[depth][n])
            axes.plot(x, y, "o", color="white", markeredgecolor=NODE, markersize=11, zorder=5, alpha=opacity)
            if depth:
                axes.text(x, y, "+" if n < adding else "×", ha="center", va="center_baseline", fontsize=9, color=NODE,
                          zorder=6, alpha=opacity)  # fmt: skip
        for (x, y), name in zip(points, names if depth == 0 else outputs if depth == net.depth else []):
            below = depth == 0
            axes.text(x, y + (-0.32 if below else 0.32) * BOX, name, ha="center", va="top" if below else "bottom",
                      fontsize=12)  # fmt: skip
    axes.set_xlim(0, span)
    axes.set_ylim(-0.8 * BOX, rise * net.depth + 0.8 * BOX)
    axes.set_aspect("equal")
    return made


def _bend(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """A smooth line that leaves and arrives upright."""
    t = np.linspace(0, 1, 24)[:, None]
    lift = np.array([0.0, 0.5 * (end[1] - start[1])])
    corners = start, start + lift, end - lift, end
    weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
    return sum(w * c for w, c in zip(weights, corners))


CELL = 0.62  # inches of a matrix's cell


def _matrix(net: _Net, names: list[str], outputs: list[str]) -> Picture:
    shapes = [layer.width for layer in net.params.layers]
    wide, high = max(i for i, _ in shapes), sum(o for _, o in shapes) + 2 * net.depth
    made = figure.figure(CELL * (wide + 2), CELL * high)
    axes = made.subplots()
    axes.set_axis_off()
    hidden = lambda depth: [f"$z^{{{depth}}}_{{{k + 1}}}$" for k in range(net.widths[depth])]
    start = 0.0
    for n, (_, sums) in enumerate(shapes):
        fixed, node_of, boxes = net.fixed(n), net.node_of(n), []
        for i, o in np.argwhere(net.alive(n)).tolist():
            boxes.append((net.curve(n, i, o), i, start + o, 0.46, (i, o) in fixed, float(net.opacity[n][i, o])))
            if (i, o) in fixed:
                axes.text(i - 0.41, start + o + 0.4, fixed[i, o], color=FIXED, va="top", fontsize=6, zorder=6)
        _thumbnails(axes, boxes)
        below = names if n == 0 else hidden(n)
        above = outputs if n == net.depth - 1 else hidden(n + 1)
        for i, name in enumerate(below):
            axes.text(i, start - 0.62, name, ha="center", va="top", fontsize=9)
        for o, k in enumerate(node_of):
            sign = " ×" if node_of.count(k) > 1 else ""
            axes.text(-0.62, start + o, above[k] + sign, ha="right", va="center", fontsize=9)
        axes.text(-0.5, start + sums - 0.35, f"layer {n + 1}", fontsize=9, color=LINE, va="bottom")
        start += sums + 2
    axes.set(xlim=(-1.5, wide - 0.4), ylim=(-1.2, start - 1.8), aspect="equal")
    return made
