"""What every file of results says of how it was made: the day, the versions; and which of them is the newest."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path

from jaxml.extras import version

RESULTS = Path(__file__).parent / "results"


def made(*rivals: str) -> dict:
    """Today, JAX's version and those of the rivals that are installed."""
    versions = {name: found for name in ("jax", *rivals) if (found := version(name))}
    return {"date": datetime.date.today().isoformat(), "versions": versions}


def said(report: dict) -> str:
    """The same as a table's heading says it."""
    versions = report.get("versions") or {"jax": report["jax"]}  # of older files
    return ", ".join([report["date"], *(f"{name} {found}" for name, found in versions.items())])


def newest(start: str, holds: Callable[[dict], object] = bool) -> dict | None:
    """The last of results/ whose name begins so and that hold what is asked for."""
    for path in sorted(RESULTS.glob(f"{start}*.json"), key=lambda p: p.stem[-10:], reverse=True):
        report = json.loads(path.read_text())
        if holds(report):
            return report
    return None
