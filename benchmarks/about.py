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


def newest(name: str, holds: Callable[[dict], object] = bool) -> dict | None:
    """The last of results/ that are named so (a pattern, without the day) and hold what is asked for."""
    for path in sorted(RESULTS.glob(f"{name}-????-??-??.json"), key=lambda p: p.stem[-10:], reverse=True):
        report = json.loads(path.read_text())
        if holds(report):
            return report
    return None


def of_devices(script: str) -> list[str]:
    """What a script's results are named, a device each, without the day; not those of scripts whose name is longer."""
    others = tuple(p.stem.replace("_", "-") for p in RESULTS.parent.glob(f"{script.replace('-', '_')}_*.py"))
    names = {path.name[:-16] for path in RESULTS.glob(f"{script}-*-????-??-??.json")}
    return sorted(name for name in names if not name.startswith(others))
