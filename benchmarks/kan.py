"""Kolmogorov–Arnold layers against pykan, efficient-kan, jaxKAN and an MLP layer: time, memory, TPU schedule.

    python benchmarks/kan.py                     # ten minutes; rivals that are not installed are left out, by name
    python benchmarks/kan.py --subjects layer    # some of layer, parameters, symbolic, regularizer, tpu, kernel
    python benchmarks/kan.py --table             # the tables of the newest results

Times are of the process (all threads), on a GPU of the wall; the median of rounds in which every subject runs once, so
that a busy machine hits all alike. Gradients are of the trained parameters and of the input. Float32 products may take
TF32 on a GPU, on every side.

layer: one layer, batch 1024, forward and backward, as a multiple of a dense layer silu(x W + b) of the same width.
parameters: a layer 1000 → 1000 of 9 million parameters against an MLP 1000 → 4500 → 1000, batch 100.
symbolic: functions for the three edges of a [2, 1, 1] network of exp(sin(πx) + y²).
regularizer: value and gradient of pykan's penalty, one layer, batch 1024.
tpu: forward and backward at batch 8192, 1024 × 1024, bfloat16, compiled for v5e, by XLA and by the kernel: cycles (the
compiler's estimate; of the kernels the static schedule) against what the products take at the chip's peak, and memory.
kernel: on a GPU, the layer by the kernel, by XLA, and by the rivals in torch, batch 8192: errors against float64 (our
two), time, memory.

efficient-kan and fast-kan are not on PyPI: put their folders `efficient_kan` and `fastkan` on PYTHONPATH.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import io
import itertools
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import about
import jax
import jax.numpy as jnp
import numpy as np

from jaxml import kan
from jaxml.kan import attribution, rational
from jaxml.kan import kernel as kernel_of_layer
from jaxml.kan import layer as layers

SUBJECTS = ("layer", "parameters", "symbolic", "regularizer", "tpu", "kernel")
SHAPES = ((64, 5), (64, 20), (256, 5), (256, 20))  # (width, grid)
AIMS = {5: 9.0, 20: 25.0}
BATCH, ROUNDS = 1024, 11
V5E = {"flops": 197e12, "hertz": 1.5e9}  # bfloat16, one chip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if "tpu" in options.subjects:  # before libtpu is loaded: where it writes the schedules of what it compiles
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={tempfile.mkdtemp()} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = about.RESULTS / f"kan-{kind}-{datetime.date.today().isoformat()}.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= about.made("torch", "pykan", "jaxkan")
    report["device"] = jax.devices()[0].device_kind
    for subject in options.subjects:
        if subject == "kernel" and (reason := kernel_of_layer.unsupported(layers.Spec(), jnp.float32)):
            print(f"kernel is left out: {reason}", flush=True)
            continue
        report[subject] = globals()[subject]()
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


def installed(module: str):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(module)
    except ImportError:
        print(f"{module} is not installed: left out", flush=True)
        return None


def timed(subjects: dict, seconds: float = 0.08, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each subject in each of the rounds."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    repeats = {}
    for name, run in subjects.items():
        run()
        start = clock()
        run()
        repeats[name] = max(1, round(seconds / max(clock() - start, 1e-6)))
    out = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, run in subjects.items():
            start = clock()
            for _ in range(repeats[name]):
                run()
            out[name].append((clock() - start) / repeats[name])
    return out


def compiled(function, *arguments):
    """(a call that waits for its result, MiB of temporary memory)."""
    ready = jax.jit(function).lower(*arguments).compile()
    memory = ready.memory_analysis()
    return lambda: jax.block_until_ready(ready(*arguments)), memory.temp_size_in_bytes / 2**20 if memory else None


# ---- layers ------------------------------------------------------------------------------------------


def ours(width: tuple[int, int], grid: int, x, basis: str = "bspline"):
    layer = layers.init(jax.random.key(0), width, layers.Spec(grid, basis=basis))

    def loss(trained, x):
        return jnp.sum(layers.apply(dataclasses.replace(layer, coef=trained[0], base=trained[1]), x) ** 2)

    return compiled(jax.grad(loss, (0, 1)), (layer.coef, layer.base), x)


def of_rational(width: int, x):
    params = rational.init(jax.random.key(0), (width, width), function=jax.nn.silu)
    return compiled(jax.grad(lambda params, x: jnp.sum(rational.apply(params, x) ** 2), (0, 1)), params, x)


def dense(widths: tuple[int, ...], x):
    keys = jax.random.split(jax.random.key(0), len(widths) - 1)
    draw = lambda key, i, o: (jax.random.normal(key, (i, o)) / i**0.5, jnp.zeros((1, o)))
    params = [draw(key, i, o) for key, i, o in zip(keys, widths, widths[1:])]

    def loss(params, x):
        for weight, bias in params:
            x = jax.nn.silu(x @ weight + bias)
        return jnp.sum(x**2)

    return compiled(jax.grad(loss, (0, 1)), params, x)


def of_jaxkan(width: int, grid: int, x):
    from flax import nnx

    module = installed("jaxkan.layers")
    if module is None:
        return None
    layer = module.SplineLayer(n_in=width, n_out=width, k=3, G=grid)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        return jnp.sum(nnx.merge(graph, params, rest)(x) ** 2)

    return compiled(jax.grad(loss, (0, 1)), params, x)


def of_torch(make, x):
    """(a call, None); `make` takes torch and gives the layer."""
    import torch

    device, dtype = "cpu" if jax.default_backend() == "cpu" else "cuda", getattr(torch, x.dtype.name)
    torch.backends.cuda.matmul.allow_tf32 = True
    layer = make(torch).to(device)  # pykan's takes nothing else
    layer = layer if dtype == torch.float32 else layer.to(dtype)
    x = torch.tensor(np.asarray(x, np.float32), device=device, dtype=dtype, requires_grad=True)

    def run():
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        (y**2).sum().backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    return run, None


def torch_rivals(width: int, grid: int, x) -> dict:
    """Name → what `of_torch` gives, of those that are installed; as many functions an edge as ours."""
    makers = {}
    if (efficient := installed("efficient_kan")) is not None:
        makers["efficient-kan"] = lambda _: efficient.KANLinear(width, width, grid_size=grid)
    if (fast := installed("fastkan")) is not None:
        makers["fast-kan"] = lambda _: fast.FastKANLayer(width, width, num_grids=grid + 3)
    if installed("torch") is not None:
        makers["torch, dense"] = lambda torch: torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.SiLU())
    return {name: of_torch(make, x) for name, make in makers.items()}


def layer() -> list[dict]:
    rows = []
    pykan = installed("kan")
    for width, grid in SHAPES:
        x = jax.random.uniform(jax.random.key(1), (BATCH, width), minval=-1.0)
        subjects = {"dense": dense((width, width), x), "jaxml": ours((width, width), grid, x)}
        if grid == SHAPES[0][1]:
            subjects["jaxml, group-rational"] = of_rational(width, x)
        subjects["jaxkan"] = of_jaxkan(width, grid, x)
        subjects |= torch_rivals(width, grid, x)
        if pykan is not None and (width, grid) != (256, 20):  # which takes minutes a step
            from kan.KANLayer import KANLayer

            subjects["pykan"] = of_torch(lambda _: KANLayer(in_dim=width, out_dim=width, num=grid, k=3), x)
        subjects = {name: s for name, s in subjects.items() if s is not None}
        slow = {name: s[0] for name, s in subjects.items() if name == "pykan"}
        quick = {name: s[0] for name, s in subjects.items() if name not in slow}
        times = timed(quick) | (timed(slow, rounds=3) if slow else {})
        base = statistics.median(times["dense"])
        for name, found in times.items():
            both = [a / b for a, b in zip(found, times["dense"])] if len(found) == ROUNDS else [f / base for f in found]
            row = {"width": width, "grid": grid, "subject": name, "ms": 1e3 * statistics.median(found),
                   "times_dense": statistics.median(both), "temp_mib": subjects[name][1]}  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    return rows


def parameters() -> list[dict]:
    x = jax.random.uniform(jax.random.key(1), (100, 1000), minval=-1.0)
    subjects = {"mlp 1000-4500-1000": dense((1000, 4500, 1000), x), "jaxml 1000-1000": ours((1000, 1000), 5, x)}
    times = timed({name: s[0] for name, s in subjects.items()})
    return [{"subject": name, "ms": 1e3 * statistics.median(t)} for name, t in times.items()]


# ---- formulas ----------------------------------------------------------------------------------------


def symbolic() -> list[dict]:
    x = jax.random.uniform(jax.random.key(0), (1000, 2), minval=-1.0)
    y = jnp.exp(jnp.sin(jnp.pi * x[:, 0]) + x[:, 1] ** 2)
    params, _ = kan.fit(kan.init(jax.random.key(1), [2, 1, 1]), x, y, grids=[5, 10])
    rows = []
    for what in ("first call", "later calls"):
        start = time.process_time()
        _, told = kan.auto_symbolic(params, x)
        names = [suggestion.name for *_, suggestion in told]
        rows.append({"subject": f"jaxml, {what}", "seconds": time.process_time() - start, "functions": names})
        print(rows[-1], flush=True)
    if installed("kan") is not None:
        import tempfile

        import torch
        from kan import KAN

        from jaxml.kan import pykan

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            pykan.save(f"{folder}/m", params, x)
            model = KAN.loadckpt(f"{folder}/m")
            model.auto_save = False
            model(torch.tensor(np.asarray(x)))
            start = time.process_time()
            model.auto_symbolic(verbose=0)
            seconds = time.process_time() - start
        names = [model.symbolic_fun[n].funs_name[o][i] for n, i, o in ((0, 0, 0), (0, 1, 0), (1, 0, 0))]
        rows.append({"subject": "pykan", "seconds": seconds, "functions": names})
        print(rows[-1], flush=True)
    return rows


def regularizer() -> list[dict]:
    rows = []
    for width in (64, 256):
        x = jax.random.uniform(jax.random.key(1), (BATCH, width), minval=-1.0)
        params = kan.init(jax.random.key(0), [width, width])
        trained, rest = kan.split(params)

        def penalty(trained, x=x, rest=rest):
            return attribution.regularizer(kan.combine(trained, rest), x)

        subjects = {"jaxml": compiled(jax.grad(penalty), trained)}
        if installed("kan") is not None:
            from kan import KAN

            def make(torch, width=width):
                with contextlib.redirect_stdout(io.StringIO()):
                    model = KAN(width=[width, width], grid=5, k=3, auto_save=False)
                model.forward_ = model.forward
                return model

            import torch

            model, data = make(torch), torch.tensor(np.asarray(x))

            def run(model=model, data=data):
                model(data)
                model.reg("edge_forward_spline_n", 1.0, 2.0, 0.0, 0.0).backward()
                model.zero_grad()

            subjects["pykan, with its forward pass"] = run, None
        times = timed({name: s[0] for name, s in subjects.items()}, rounds=3)
        for name, found in times.items():
            rows.append({"width": width, "subject": name, "ms": 1e3 * statistics.median(found),
                         "temp_mib": subjects[name][1]})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


# ---- TPU ---------------------------------------------------------------------------------------------


def tpu() -> list[dict]:
    from jaxml.testing import compile_for_tpu

    folder = Path(os.environ["LIBTPU_INIT_ARGS"].split()[0].partition("=")[2])
    rows, batch, width = [], 8192, 1024
    for grid, implementation in itertools.product((5, 20), (None, "kernel")):
        spec = layers.Spec(grid)
        make = lambda key, spec=spec: layers.init(key, (width, width), spec, dtype=jnp.bfloat16)
        like = jax.eval_shape(make, jax.random.key(0))
        x = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16)

        def step(coef, base, points, x, cotangent, spec=spec, implementation=implementation):
            of = lambda coef, base: layers.Layer(coef, base, points, None, (), spec)
            run = lambda coef, base, x: layers.apply(of(coef, base), x, implementation=implementation)
            y, vjp = jax.vjp(run, coef, base, x)
            return y, vjp(cotangent)

        ready = compile_for_tpu(step, (like.coef, like.base, like.points, x, x), "v5e")
        cycles = sum(int(n) for n in re.findall(r'"estimated_cycles":"?(\d+)', ready.as_text()))
        cycles += sum(of_kernel(path, batch, width, spec.size) for path in folder.glob("*kan_*final_bundles.txt"))
        for path in folder.glob("*"):
            path.unlink()
        flops = 3 * 2 * batch * width * width * (spec.size + 1)
        seconds = cycles / V5E["hertz"]
        rows.append({"grid": grid, "implementation": implementation or "XLA",
                     "ms": 1e3 * seconds, "share_of_peak": flops / V5E["flops"] / seconds,
                     "temp_mib": ready.memory_analysis().temp_size_in_bytes / 2**20})  # fmt: skip
        print(rows[-1], flush=True)
    shutil.rmtree(folder)
    return rows


def of_kernel(path: Path, batch: int, width: int, size: int) -> int:
    """Cycles of a kernel: the largest stretch on every step of the grid, the others once a tile of the result."""
    sys.path.append(str(Path(__file__).parent))
    from tpu_schedule import busy

    from jaxml.kan import kernel_tpu
    from jaxml.target import target

    if "schedule-analysis" in path.name:
        return 0
    name = re.search(r"kan_(\w+)", path.name)[1]
    with target("TPU v5e"):
        cut = kernel_tpu.cut_of(name, jax.ShapeDtypeStruct((batch, width), jnp.bfloat16), size, width, width)
    along = {"rows": batch // cut.rows, "inputs": width // cut.inputs, "outputs": width // cut.outputs}
    steps = along["rows"] * along["inputs"] * along["outputs"] * cut.chunks
    summed = {"spread": along["inputs"] * cut.chunks, "collect": along["outputs"] * cut.chunks, "outer": along["rows"]}
    cycles = [n for depth, n in busy(path.read_text()) if depth > 0]
    return steps * max(cycles) + steps // summed[name] * (sum(cycles) - max(cycles))


# ---- GPU ---------------------------------------------------------------------------------------------


def kernel() -> list[dict]:
    rows, batch = [], 8192
    for width, grid, dtype in [(w, g, d) for d in ("float32", "bfloat16") for w in (256, 1024) for g in (5, 20, 100)]:
        spec = layers.Spec(grid)
        drawn = layers.init(jax.random.key(0), (width, width), spec, dtype=dtype)
        x, cotangent = (jax.random.normal(jax.random.key(k), (batch, width), dtype) / 2 for k in (1, 2))

        def step(coef, base, x, cotangent, implementation, layer=drawn):
            run = lambda coef, base, x: layers.apply(
                dataclasses.replace(layer, coef=coef, base=base), x, implementation=implementation
            )
            y, vjp = jax.vjp(run, coef, base, x)
            return y, *vjp(cotangent)

        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            few = slice(0, 256)  # rows whose outputs are looked at
            exact = jax.jit(functools.partial(step, implementation="fused"))(
                *[np.asarray(a, np.float64) for a in (drawn.coef, drawn.base, x[few], cotangent[few])]
            )
        row, calls = {"width": width, "grid": grid, "dtype": dtype}, {}
        for name in ("kernel", "fused"):
            run = functools.partial(step, implementation=name)
            found = jax.jit(run)(drawn.coef, drawn.base, x[few], cotangent[few])
            errors = [
                float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()) for a, b in zip(found, exact)
            ]
            row[f"{name}_error"] = max(errors)
            calls[name], row[f"{name}_temp_mib"] = compiled(run, drawn.coef, drawn.base, x, cotangent)
        fits = width * grid < 1024 * 100  # the rivals' bases into the memory
        rivals = torch_rivals(width, grid, x) if fits else {}
        calls |= {name: run for name, (run, _) in rivals.items()}
        row |= {f"{name} ms": 1e3 * statistics.median(t) for name, t in timed(calls, seconds=0.02).items()}
        rows.append(row)
        print(row, flush=True)
    return rows


# ---- tables ------------------------------------------------------------------------------------------


TITLES = {
    "parameters": "Equal parameters (9.0 million), batch 100",
    "symbolic": "Functions of three edges, seconds of process time",
    "regularizer": "Penalty and gradient of one layer, batch 1024",
    "kernel": "The kernel against XLA, forward and backward, batch 8192",
    "tpu": "TPU v5e, compiled: batch 8192, 1024 × 1024, bfloat16",
}


def table() -> str:
    """Markdown, of the newest results of each device."""
    parts = []
    for device in about.of_devices("kan"):
        report = about.newest(device)
        where = f"{report['device']}, {about.said(report)}"
        parts += [_layers(report["layer"], where)] if "layer" in report else []
        for key, title in TITLES.items():
            if key in report:
                columns = list(report[key][0])
                rows = [[_shown(row.get(c)) for c in columns] for row in report[key]]
                parts.append(f"{title}, {where}:\n\n" + _markdown([c.replace("_", " ") for c in columns], rows))
    return "\n\n".join(parts)


def _layers(rows: list[dict], where: str) -> str:
    names = list(dict.fromkeys(row["subject"] for row in rows))
    lines = []
    for width, grid in SHAPES:
        here = {row["subject"]: row for row in rows if (row["width"], row["grid"]) == (width, grid)}
        memory = lambda row: f" ({row['temp_mib']:.1f})" if row["temp_mib"] else ""
        cells = [f"{here[n]['times_dense']:.1f}{memory(here[n])}" if n in here else "" for n in names]
        lines.append([f"{width}, {grid}", f"{AIMS[grid]:.0f}", *cells])
    title = f"One layer forward and backward, batch {BATCH}, {where}; multiples of a dense layer (temporary MiB):"
    return f"{title}\n\n" + _markdown(["width, grid", "aim", *names], lines)


def _shown(value) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]  # pykan's module is `kan` too
    main()
