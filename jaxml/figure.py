"""Figures of Matplotlib without its global state, written whole or not at all."""

import io
from pathlib import Path
from typing import Any

from jaxml import log
from jaxml.extras import need


def figure(width: float, height: float, **options: Any):
    """A figure of so many inches.

    Raises:
        ImportError: Matplotlib is missing.

    Example:
        >>> made = figure(4, 3)
        >>> _ = made.subplots(1, 2)
        >>> made.get_size_inches().tolist(), len(made.axes)
        ([4.0, 3.0], 2)
    """
    need("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", **options)
    FigureCanvasAgg(made)
    return made


def write(made, path: str | Path, *, dpi: int = 120) -> Path:
    """Writes a figure as PNG, SVG or PDF, by the name.

    Raises:
        ValueError: another kind of file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write(figure(4, 3), f"{folder}/plots/empty.png")
        ...     print(path.name, path.read_bytes()[1:4], len(list(path.parent.iterdir())))
        empty.png b'PNG' 1
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"figure: a picture is a .png, .svg or .pdf, got {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    made.savefig(content, format=path.suffix[1:], dpi=dpi)
    log.write_bytes(path, content.getvalue())
    return path
