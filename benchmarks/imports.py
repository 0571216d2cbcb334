"""How long importing takes, beside importing JAX, in new processes.

    python benchmarks/imports.py            # a minute
    python benchmarks/imports.py --table    # the table of the newest results

Each import in a process of its own, in turns: the median of the times that the process itself measures around
the import; the first turn, which reads from disk, is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import about

IMPORTS = {
    "jax": "import jax", "jaxml": "import jaxml", "jax, then jaxml": "import jax, jaxml", "lm": "from jaxml import lm",
    "kan": "from jaxml import kan", "attention": "from jaxml.attention import flash_attention",
    "tune and adapters": "from jaxml import tune; from jaxml.tune import adapters", "optim": "from jaxml import optim",
    "optax": "import optax", "flax.nnx": "from flax import nnx",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return

    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(options.turns + 1):
        for name, statement in IMPORTS.items():
            code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            )
            if turn:
                times[name].append(float(done.stdout))
    report = {**about.made(), "python": sys.version.split()[0], "cores": os.cpu_count()}
    report |= {"seconds": {name: statistics.median(of) for name, of in times.items()}}
    path = about.RESULTS / f"imports-cpu-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1))
    print(path)


def table() -> str:
    """Markdown of the newest results."""
    r = about.newest("imports-cpu")
    lines = [f"{r['cores']}-core CPU, {about.said(r)}, Python {r['python']}:", ""]
    lines += ["| import | seconds | times jax's |", "|---|---|---|"]
    base = r["seconds"]["jax"]
    lines += [f"| {name} | {s:.2f} | {s / base:.2f} |" for name, s in r["seconds"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
