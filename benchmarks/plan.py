"""On how small a TPU slice a model can be trained, by method: the step compiled for slices that are not there.

    python benchmarks/plan.py                          # hours; goes on where it was stopped; needs the extra "tpu"
    python benchmarks/plan.py --models llama-3.1-8b    # some of them
    python benchmarks/plan.py --table                  # the table of the results

`jaxml plan MODEL --topology GENERATION --method METHOD --length 2048 --remat` for each: one row of 2,048 tokens on
each chip, in bfloat16 (trained weights and AdamW's moments in float32), spread by fsdp over the whole slice; LoRA and
QLoRA of rank 16 on all linear layers, GaLore of rank 128. Larger slices are tried until the step fits.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "plan-tpu-compiled.jsonl"
MODELS = {"llama-3.1-8b": "Llama-3.1-8B", "llama-3.1-70b": "Llama-3.1-70B", "qwen3-32b": "Qwen3-32B"}
GENERATIONS = ("v5e", "v6e", "v5p", "tpu7x")
METHODS = {"qlora": ["--rank", "16"], "lora": ["--rank", "16"], "galore": ["--rank", "128"], "full": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    done = {(r["model"], r["method"], r["generation"]) for r in read()}
    for model in options.models:
        for method in METHODS:
            for generation in GENERATIONS:
                if (model, method, generation) not in done:
                    row = measure(model, method, generation)
                    with FILE.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    last = row["plans"][-1] if row["plans"] else {}
                    print(model, method, generation, last.get("topology"), last.get("fits"), flush=True)


def measure(model: str, method: str, generation: str) -> dict:
    """What the command says, in a process of its own."""
    import jax

    how = ["--topology", generation, "--method", method, *METHODS[method], "--length", "2048", "--remat", "--json"]
    command = [sys.executable, "-m", "jaxml.cli.main", "plan", model, *how]
    said = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    plans = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
    row = {"model": model, "method": method, "generation": generation, "plans": plans}
    if said.returncode not in (0, 1):
        row["error"] = said.stderr[-2000:]
    return row | {"date": datetime.date.today().isoformat(), "jax": jax.__version__}


def read() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []


def table() -> str:
    """Markdown: the smallest slice, and what a device holds there of what it has."""
    rows = {(r["model"], r["method"], r["generation"]): r for r in read()}
    lines = [f"| | {' | '.join(GENERATIONS)} |", "|---" * (len(GENERATIONS) + 1) + "|"]
    for model, shown in MODELS.items():
        for method in METHODS:
            cells = [_cell(rows.get((model, method, generation))) for generation in GENERATIONS]
            lines.append(f"| {shown}, {method} | {' | '.join(cells)} |")
    dates, versions = {r["date"] for r in rows.values()}, {r["jax"] for r in rows.values()}
    about = f"compiled {min(dates)} to {max(dates)}" if len(dates) > 1 else f"compiled {min(dates)}"
    return f"Smallest slice, GiB of a device's GiB ({about}, jax {', '.join(sorted(versions))}):\n\n" + "\n".join(lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "not compiled"
    if not row["plans"] or not row["plans"][-1]["fits"]:
        return "none"
    last = row["plans"][-1]
    size = last["topology"].partition(":")[2].replace("x", "×")
    return f"{size}: {last['total'] / 2**30:.1f} of {last['limit'] / 2**30:.1f}"


if __name__ == "__main__":
    main()
