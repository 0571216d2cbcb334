"""The quickstart by every method: what is learnt, what is forgotten, memory.

python benchmarks/quickstart.py                # each in a process of its own, six minutes each on a CPU
python benchmarks/quickstart.py --out FOLDER   # the same with runs kept there; what is done is not done again
python benchmarks/quickstart.py --table        # the README's table, of the newest results
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import about

METHODS = ("lora", "qlora", "dora", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where runs are kept (a new folder)")
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    out = options.out or Path(tempfile.mkdtemp())
    runs = {}
    for method in METHODS:
        command = [sys.executable, "-m", "jaxml.cli.main", "quickstart", "--method", method, "--out", str(out / method)]
        subprocess.run(command, check=True)
        runs[method] = json.loads((out / method / "report.json").read_text())
    report = {"device": runs["lora"]["device"], **about.made(), "runs": runs}
    path = about.RESULTS / f"quickstart-{report['device']}-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


ROWS = [  # what, its name in a report, how it is written; of figures from before and after a name with {}
    ("facts taught, asked in new words: exact match", "accuracy_{}", "{:.1%}"),
    ("countries never taught: exact match", "new_countries_{}", "{:.1%}"),
    ("perplexity of ordinary text", "perplexity_{}", "{:.2f}"),
    ("trained parameters, millions", "trained_parameters", "{:.2f}"),
    ("weights, MiB", "weights_mib", "{:.0f}"),
    ("what is trained and its moments, MiB", "state_mib", "{:.0f}"),
    ("peak of the whole process, MiB", "peak_mib", "{:.0f}"),
]


def table() -> str:
    """Markdown, of the newest results."""
    report = about.newest("quickstart-*")
    runs = {m: run | {"trained_parameters": run["trained_parameters"] / 1e6} for m, run in report["runs"].items()}
    head = ["`make run METHOD=…`", "before", "before, NF4", *METHODS]
    lines = [head, ["---"] * len(head)]
    for what, name, form in ROWS:
        before = [form.format(runs[m][name.format("before")]) if "{}" in name else "" for m in ("lora", "qlora")]
        lines.append([what, *before, *(form.format(runs[m][name.format("after")]) for m in METHODS)])
    where = f"2-core CPU, {about.said(report)}, `benchmarks/quickstart.py`:"
    return f"{where}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
