"""The gated feed-forward by its kernel against XLA's products: time, memory, errors.

    python benchmarks/feed_forward.py                    # what this machine can
    python benchmarks/feed_forward.py --subjects tpu     # some of tpu, gpu
    python benchmarks/feed_forward.py --table            # the tables of the newest results

8192 tokens, D 2048, F 8192, SwiGLU, bfloat16; forward, and forward with all gradients.

tpu: compiled ahead of time by libtpu; temporary memory, and how long the core is busy as the static schedule says:
XLA's own estimate of its programs, and of the kernels the larger of their instruction bundles and what the matrix units
take. It says nothing of waiting for memory.
gpu: errors against float64, milliseconds of wall time, memory; tokamax's gated linear unit and torch's where installed.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import about
import numpy as np

TOKENS, WIDTH, HIDDEN = 8192, 2048, 8192
CHIPS = ("v5e", "v6e")
IMPLEMENTATIONS = ("xla", "kernel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=("tpu", "gpu"))
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.one:
        print(json.dumps(of_tpu(*options.one)))
        return
    import jax

    device = jax.devices()[0]
    subjects = options.subjects or [
        s for s, there in (("tpu", installed("libtpu")), ("gpu", device.platform == "gpu")) if there
    ]
    for subject in subjects:
        name = "tpu-compiled" if subject == "tpu" else device.device_kind.lower().replace(" ", "-")
        path = about.RESULTS / f"feed-forward-{name}-{datetime.date.today().isoformat()}.json"
        report = {"device": name, subject: []} | about.made("torch", "tokamax", "libtpu")
        for row in globals()[subject]():
            report[subject].append(row)
            print(row, flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


def installed(module: str):
    with contextlib.suppress(ImportError):
        return importlib.import_module(module)
    print(f"{module} is not installed: left out", flush=True)
    return None


def call(implementation: str, of_gradients: bool):
    """(x, gate, up, down, dy) → y, and all gradients."""
    import jax

    from jaxml.activations import gated_feed_forward

    run = functools.partial(gated_feed_forward, implementation=implementation)

    def with_gradients(*arrays):
        *arrays, dy = arrays
        y, vjp = jax.vjp(run, *arrays)
        return y, *vjp(dy)

    return with_gradients if of_gradients else lambda *arrays: (run(*arrays[:4]),)


# ---- TPU ---------------------------------------------------------------------------------------------


def tpu():
    """Each in a process of its own: the compiler takes where to write schedules from its environment."""
    for chip in CHIPS:
        for what in ("forward", "gradients"):
            for implementation in IMPLEMENTATIONS:
                command = [sys.executable, __file__, "--one", chip, what, implementation]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                yield json.loads(done.stdout.splitlines()[-1])


def of_tpu(chip: str, what: str, implementation: str) -> dict:
    folder = tempfile.mkdtemp()
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles "
        "--xla_jf_emit_annotations=true"
    )
    import jax
    import jax.numpy as jnp

    from jaxml.activations import feed_forward_tpu
    from jaxml.target import target
    from jaxml.testing import compile_for_tpu

    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.bfloat16)
    arrays = (
        shape(TOKENS, WIDTH),
        shape(WIDTH, HIDDEN),
        shape(WIDTH, HIDDEN),
        shape(HIDDEN, WIDTH),
        shape(TOKENS, WIDTH),
    )
    start = time.perf_counter()
    compiled = compile_for_tpu(call(implementation, what == "gradients"), arrays, chip)
    row = {"chip": chip, "what": what, "implementation": implementation, "compile_s": time.perf_counter() - start}
    row["temp_mib"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    cycles = sum(int(n) for n in re.findall(r'"estimated_cycles":"?(\d+)', compiled.as_text()))
    for path in Path(folder).glob("*gated_feed_forward*final_bundles.txt"):
        if "schedule-analysis" not in path.name:
            backward = "backward" in path.name
            with target(f"TPU {chip}"):
                cut = feed_forward_tpu._cut(arrays[0], arrays[1], 2 + backward, 1 + 2 * backward)
            cycles += of_kernel(path.read_text(), TOKENS // cut.rows * (HIDDEN // cut.columns), cut.steps)
    shutil.rmtree(folder)
    products = 9 if what == "gradients" else 3
    return row | {
        "mcycles": cycles / 1e6,
        "ideal_mcycles": products * 2 * TOKENS * WIDTH * HIDDEN / PER_CYCLE[chip] / 1e6,
    }


PER_CYCLE = {"v5e": 131072, "v6e": 524288}  # floating point operations


def of_kernel(text: str, tiles: int, steps: int) -> int:
    """Cycles of a kernel: its three bodies are the first step's zeros, a step, and the last step with the function."""
    sys.path.insert(0, str(Path(__file__).parent))
    from tpu_schedule import busy

    zeros, step, last = [cycles for depth, cycles in busy(text) if depth > 0 and cycles > 500]
    return tiles * (zeros + (steps - 1) * step + last)


# ---- GPU ---------------------------------------------------------------------------------------------


def gpu():
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (TOKENS, WIDTH), (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (TOKENS, WIDTH)
    scales = 1.0, WIDTH**-0.5, WIDTH**-0.5, HIDDEN**-0.5, 1.0
    for dtype in ("bfloat16", "float32"):
        arrays = [(s * jax.random.normal(k, n)).astype(dtype) for k, n, s in zip(keys, shapes, scales)]
        few = [arrays[0][:128], *arrays[1:4], arrays[4][:128]]
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            exact = jax.jit(call("xla", True))(*[np.asarray(a, np.float64) for a in few])
        for implementation in IMPLEMENTATIONS:
            found = jax.jit(call(implementation, True))(*few)
            far = lambda a, b: float(np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() / np.abs(b).max())
            error = max(map(far, found, exact))
            for what in ("forward", "gradients"):
                ready = jax.jit(call(implementation, what == "gradients")).lower(*arrays).compile()
                row = {"dtype": dtype, "what": what, "implementation": implementation, "error": error}
                row["temp_mib"] = ready.memory_analysis().temp_size_in_bytes / 2**20
                yield row | {"ms": milliseconds(lambda: jax.block_until_ready(ready(*arrays)))}
        if tokamax := installed("tokamax"):
            weights = jnp.stack([arrays[1], arrays[2]], axis=1)

            def unit(x, weights, down):
                return (tokamax.gated_linear_unit(x, weights, activation=jax.nn.silu) @ down,)

            ready = jax.jit(unit).lower(arrays[0], weights, arrays[3]).compile()
            ms = milliseconds(lambda: jax.block_until_ready(ready(arrays[0], weights, arrays[3])))
            yield {"dtype": dtype, "what": "forward", "implementation": "tokamax", "ms": ms,
                   "temp_mib": ready.memory_analysis().temp_size_in_bytes / 2**20}  # fmt: skip
        arrays = few = exact = None  # the device's memory is torch's now
        if torch := installed("torch"):
            yield from of_torch(torch, dtype)


def of_torch(torch, dtype: str):
    if not torch.cuda.is_available():
        return
    draw = lambda *n: torch.randn(*n, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
    x, gate, up, down = draw(TOKENS, WIDTH), draw(WIDTH, HIDDEN), draw(WIDTH, HIDDEN), draw(HIDDEN, WIDTH)
    dy = torch.ones(TOKENS, WIDTH, device="cuda", dtype=x.dtype)

    def run(of_gradients):
        y = (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down
        if of_gradients:
            torch.autograd.grad(y, (x, gate, up, down), dy)
        torch.cuda.synchronize()

    for what in ("forward", "gradients"):
        ms = milliseconds(lambda: run(what == "gradients"))
        yield {"dtype": dtype, "what": what, "implementation": "torch", "ms": ms}


def milliseconds(run, repeats: int = 20) -> float:
    run()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return 1e3 * (time.perf_counter() - start) / repeats


# ---- tables ------------------------------------------------------------------------------------------


def table() -> str:
    """Markdown, of the newest results of each device."""
    parts = []
    for device in about.of_devices("feed-forward"):
        report = about.newest(device)
        rows = report.get("tpu") or report["gpu"]
        columns = list(dict.fromkeys(c for row in rows for c in row))
        shown = lambda v: "" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)
        lines = ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows]
        parts.append(f"Gated feed-forward, {report['device']}, {about.said(report)}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
