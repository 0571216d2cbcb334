"""What every file of results says of how it was made: the day, the versions."""

import datetime

from jaxml.extras import version


def made(*rivals: str) -> dict:
    """Today, JAX's version and those of the rivals that are installed."""
    versions = {name: found for name in ("jax", *rivals) if (found := version(name))}
    return {"date": datetime.date.today().isoformat(), "versions": versions}


def said(report: dict) -> str:
    """The same as a table's heading says it."""
    versions = report.get("versions") or {"jax": report["jax"]}  # of older files
    return ", ".join([report["date"], *(f"{name} {found}" for name, found in versions.items())])
