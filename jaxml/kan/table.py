"""Columns of a CSV file, and a sentence for everything about them that a fit would trip over."""

import array
import collections
import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxml import files
from jaxml.axes import Float

FAR = 20.0  # interquartile ranges from the median: an outlier
TABLE_BYTES = 512 * files.MIB
MISSING = ("", "na", "nan", "null", "none", "n/a", "?")


class Table(NamedTuple):
    """Numbers to fit, and what was done to get them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "t.csv").write_text("\\n".join(["x,y", "?,5", *(f"{n},{2 * n}" for n in range(10))]))
        ...     table = read(f"{folder}/t.csv", "y")
        >>> table.names, float(table.x.sum()), float(table.y.sum()), table.notes
        (['x'], 45.0, 90.0, ['1 of 11 rows are left out: values are missing or infinite (x 1).'])
    """

    x: Float[np.ndarray, "N I"]
    y: Float[np.ndarray, "N"]
    names: list[str]  # of x's columns
    notes: list[str]


def read(path: str | Path, target: str, features: Sequence[str] | None = None, *, drop_outliers: bool = False) -> Table:
    """The target and the features of a CSV file with a header line.

    Rows with missing or infinite values are left out, as are constant columns; columns of anything but numbers are
    left out, or an error where they were named. Each of these is told in `notes`.

    Args:
        target: the column to predict.
        features: the columns to predict it from; all others where None.
        drop_outliers: leave out rows with a value further than `FAR` interquartile ranges from its column's median.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, no header, no rows, columns that do not exist or are not numbers, too few rows left.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = [f"{n},{n * n},7" for n in range(12)]
        ...     _ = Path(folder, "square.csv").write_text("\\n".join(["x,y,same", *rows]))
        ...     table = read(f"{folder}/square.csv", "y")
        >>> table.x.shape, table.y[:4].tolist(), table.names, table.notes
        ((12, 1), [0.0, 1.0, 4.0, 9.0], ['x'], ['column same is left out: it is 7 in every row.'])
    """
    found, rows = _columns(Path(path))
    wanted = [target, *(features if features is not None else [n for n in found if n != target])]
    unknown = [n for n in wanted if n not in found]
    if unknown:
        there = ", ".join(list(found)[:50]) + (" and others" if len(found) > 50 else "")
        raise ValueError(f"{path}: no column {', '.join(map(repr, unknown))}; there are {there}.")
    if target in wanted[1:]:
        raise ValueError(f"{path}: {target!r} is the target and cannot be a feature.")
    notes, columns = [], {}
    for name in wanted:
        values, words, first = np.array(found[name].values), found[name].words, found[name].first
        if not words and name != target and features is None and np.isnan(values).all():
            notes.append(f"column {name} is left out: it has no values.")
        elif not words and name == "column_1" and features is None and _counts(values):
            notes.append("column_1, which has no name, is left out: it counts the rows (--features takes it in).")
        elif not words:
            columns[name] = values
        elif name == target or features is not None:
            raise ValueError(f"{path}: column {name!r} has values that are no numbers, the first {first!r} "
                             f"({words} of {rows}). Correct or leave out these rows.")  # fmt: skip
        else:
            notes.append(f"column {name} is left out: {words} of {rows} values are no numbers, the first "
                         f"{first!r}.")  # fmt: skip
    data = np.stack(list(columns.values()), axis=1)
    whole, holes = np.isfinite(data).all(axis=1), []
    if not whole.all():
        holes = [f"{name} {int((~np.isfinite(v)).sum())}" for name, v in columns.items() if not np.isfinite(v).all()]
        notes.append(f"{int((~whole).sum())} of {len(data)} rows are left out: values are missing or infinite "
                     f"({', '.join(holes)}).")  # fmt: skip
    data, names = data[whole], list(columns)
    data = _without_outliers(data, names, notes, drop_outliers)
    if len(data) < 10:
        missing = f" Missing are {', '.join(holes)}; --features chooses other columns." if holes else ""
        raise ValueError(f"{path}: a fit needs at least 10 rows without missing values, got {len(data)}.{missing}")
    constant = [n for n, column in enumerate(data.T) if n and np.ptp(column) == 0]
    for n in constant:
        notes.append(f"column {names[n]} is left out: it is {data[0, n]:g} in every row.")
    if np.ptp(data[:, 0]) == 0:
        raise ValueError(f"{path}: the target {target!r} is {data[0, 0]:g} in every row; there is nothing to predict.")
    kept = [n for n in range(1, len(names)) if n not in constant]
    if not kept:
        raise ValueError(f"{path}: no column of numbers is left to predict {target!r} from.")
    return Table(data[:, kept], data[:, 0], [names[n] for n in kept], notes)


class _Column:
    """The numbers of a column, NaN where missing; and the cells that are none."""

    def __init__(self):
        self.values, self.words, self.first = array.array("d"), 0, ""

    def add(self, cell: str) -> None:
        try:
            self.values.append(math.nan if cell.lower() in MISSING else float(cell.replace("_", "no number")))
        except ValueError:
            self.words, self.first = self.words + 1, self.first or cell


def _columns(path: Path) -> tuple[dict[str, _Column], int]:
    """(columns by name, how many rows); line by line, since a table as text takes many times its size."""
    if path.is_dir():
        raise ValueError(f"{path}: a table is a CSV file, got a folder.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.stat().st_size > TABLE_BYTES:
        raise ValueError(f"{path}: a table has at most {TABLE_BYTES:,} bytes, got {path.stat().st_size:,}.")
    columns: dict[str, _Column] = {}
    rows = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = re.sub('"[^"]*"', "", file.readline())
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), skipinitialspace=True)
            for row in reader:
                cells = [cell.strip() for cell in row]
                if len(cells) < 2 and not any(cells):
                    continue
                if not columns:
                    columns = _named(path, cells)
                    continue
                if len(cells) != len(columns):
                    raise ValueError(
                        f"{path}: line {reader.line_num} has {len(cells)} values, the header {len(columns)}."
                    )
                rows += 1
                for column, cell in zip(columns.values(), cells):
                    column.add(cell)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: a table is text in UTF-8 with commas, semicolons or tabs ({error}).") from error
    if not rows:
        lines = int(bool(columns))
        raise ValueError(f"{path}: a table has a line of column names and lines of values, got {lines} lines.")
    return columns, rows


def _named(path: Path, header: list[str]) -> dict[str, _Column]:
    names = [name or f"column_{n + 1}" for n, name in enumerate(header)]
    twice = sorted(name for name, times in collections.Counter(names).items() if times > 1)
    if twice:
        raise ValueError(f"{path}: every column has its own name, got {', '.join(map(repr, twice))} more than once.")
    return {name: _Column() for name in names}


def _counts(values: Float[np.ndarray, "N"]) -> bool:
    """Whether it is the index that programs write beside a table."""
    return bool(np.all(np.diff(values) == 1) and values[0] in (0, 1))


def _without_outliers(data: np.ndarray, names: list[str], notes: list[str], drop: bool) -> np.ndarray:
    is_far = np.zeros(data.shape, bool)
    for n, column in enumerate(data.T):
        low, middle, high = np.quantile(column, [0.25, 0.5, 0.75]) if len(column) else (0, 0, 0)
        if high > low:
            is_far[:, n] = np.abs(column - middle) > FAR * (high - low)
    for n in np.flatnonzero(is_far.any(axis=0)):
        worst = data[np.argmax(np.abs(data[:, n] - np.median(data[:, n]))), n]
        what = "their rows are left out" if drop else "the grid stretches to them (--drop-outliers leaves them out)"
        notes.append(f"column {names[n]} has {int(is_far[:, n].sum())} values more than {FAR:g} interquartile ranges "
                     f"from its median, the furthest {worst:g}: {what}.")  # fmt: skip
    return data[~is_far.any(axis=1)] if drop else data
