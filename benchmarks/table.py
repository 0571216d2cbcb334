"""Prints the Markdown table of results/lm-*.json: python benchmarks/table.py"""

import json
from pathlib import Path

HEADER = """| device, date | subject | jaxml | rival | times as fast | aim | peak MiB | rival |
|---|---|---|---|---|---|---|---|"""


def rows(path: Path) -> list[str]:
    """One line a subject of a results file."""
    report = json.loads(path.read_text())
    lines = []
    for name, r in report["subjects"].items():
        aim = "" if r["aim"] is None else f"{r['aim']:.1f}"
        lines.append(
            f"| {report['device']}, {report['date']} | {name} | {r['seconds']:.2f} s | {r['rival']} "
            f"{r['rival_seconds']:.2f} s | {r['ratio']:.2f} | {aim} | {r['peak_mib']:.0f} | {r['rival_peak_mib']:.0f} |"
        )
    return lines


def table() -> str:
    """Every results file, newest last."""
    files = sorted((Path(__file__).parent / "results").glob("lm-*.json"))
    return "\n".join([HEADER, *(line for path in files for line in rows(path))])


if __name__ == "__main__":
    print(table())
