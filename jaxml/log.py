"""What a run tells: a progress line on the console, one JSON object a line on disk, a loss plot."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes(f"{folder}/a.bin", b"123")
        ...     print([(path.name, path.read_bytes()) for path in Path(folder).iterdir()])
        [('a.bin', b'123')]
    """
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(f"{folder}/a.txt", "first")
        ...     write_text(f"{folder}/a.txt", "second")
        ...     print([(path.name, path.read_text()) for path in Path(folder).iterdir()])
        [('a.txt', 'second')]
    """
    write_bytes(path, text.encode())


class JSONL:
    """A log file with one JSON object a line; each line is on disk when `write` returns.

    Example:
        >>> import contextlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for first, resume_from in [(1, None), (2, 1)]:  # the second run goes on from the checkpoint of step 1
        ...         with contextlib.closing(JSONL(f"{folder}/log.jsonl", resume_from=resume_from)) as rows:
        ...             for step in range(first, first + 2):
        ...                 rows.write(step=step, run=first)
        ...     print([(row["step"], row["run"]) for row in read(f"{folder}/log.jsonl")])
        [(1, 1), (2, 2), (3, 2)]
    """

    def __init__(self, path: str | Path, *, resume_from: int | None = None):
        """Opens the file: empty, or with the rows of the steps up to `resume_from` (the others will come again)."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_from is None else [r for r in read(path) if _before(r.get("step", 0), resume_from)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a")

    def write(self, **row: Any) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _before(step: Any, last: int) -> bool:
    return isinstance(step, int | float) and step <= last


def read(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line cut off by a crash is left out.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "log.jsonl").write_text('{"step": 1, "loss": 2.5}\\n{"step": 2, "lo')
        ...     read(f"{folder}/log.jsonl"), read(f"{folder}/none.jsonl")
        ([{'step': 1, 'loss': 2.5}], [])
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def progress(description: str, *, enabled: bool = True, fields: Sequence[str] = ()):
    """A rich progress bar with speed and time left; `fields` are shown by name (task fields).

    Example:
        >>> with progress("training", enabled=False, fields=("loss",)) as bar:
        ...     task = bar.add_task("train", total=3, loss="–")
        ...     for loss in (2.5, 1.5, 1.25):
        ...         bar.update(task, advance=1, loss=loss)
        >>> bar.tasks[0].completed, bar.tasks[0].fields["loss"], bar.finished
        (3, 1.25, True)
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown = [TextColumn(f"{name} {{task.fields[{name}]}}") for name in fields]
    return Progress(
        TextColumn(description),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *shown,
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        disable=not enabled,
    )


def plot_loss(rows: Sequence[dict[str, Any]], path: str | Path, *, title: str = "Training loss") -> Path:
    """Training and evaluation loss against the step, as a PNG.

    Args:
        rows: of a log, with step and loss or eval_loss.

    Example:
        >>> import tempfile
        >>> rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 2.0}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_loss(rows, f"{folder}/loss.png").read_bytes()[1:4]
        b'PNG'
    """
    from jaxml import figure

    made = figure.figure(7, 4)
    axes = made.subplots()
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    if train:
        axes.plot(*zip(*train), color="#9db8d9", linewidth=1, label="training batch")
        axes.plot(*zip(*_smooth(train)), color="#1f5fa8", linewidth=2, label="training, moving average")
    if held:
        axes.plot(*zip(*held), color="#c8553d", marker="o", markersize=4, label="held out")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per learnt token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if train or held:
        axes.legend(frameon=False)
    return figure.write(made, path)


def _smooth(points, share: float = 0.1):
    """Moving average, started without bias."""
    out, mean, weight = [], 0.0, 0.0
    for step, value in points:
        mean, weight = (1 - share) * mean + share * value, (1 - share) * weight + share
        out.append((step, mean / weight))
    return out
