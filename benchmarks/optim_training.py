"""A small Llama trained from scratch on real text, by Adam and by every method that keeps less than Adam does.

    python benchmarks/optim_training.py                 # goes on where it stopped, hours on two cores
    python benchmarks/optim_training.py --minutes 8     # begins no run that could end later than that
    python benchmarks/optim_training.py --table         # the table of what has been run

Bytes of Python's standard library; each run's held-out loss is of the same 32 batches. Rates are swept equally for all
(four of them, one more while the best is at the edge), then the best rate of each is run with two more seeds. Finished
runs are lines of `results/optim-training-*.jsonl`: a run is never made twice.
"""

import argparse
import datetime
import functools
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxml import log, optim
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.optim import galore, lora, subspace
from jaxml.tune.loss import cross_entropy

RESULTS = Path(__file__).parent / "results"
TARGETS = r"layers/(q|k|v|o|gate|up|down)$"
SIZES = {  # width, hidden, layers, heads, rows of a batch, tokens of a row, steps, gap
    "1M": (128, 344, 6, 4, 8, 128, 1000, 50),
    "60M": (512, 1376, 18, 8, 64, 256, 600, 50),
}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST = RATES[2:6]
SEEDS = (0, 1, 2)
METHODS = ("adam", "galore", "galore, 8 bits", "subspace", "fira", "apollo-mini", "lora")
HELD_OUT, EVALUATIONS = 32, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="of the model (1M on CPU, 60M elsewhere)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop before so many minutes have passed")
    parser.add_argument("--table", action="store_true", help="print the table, draw the picture and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    end = time.monotonic() + 60 * arguments.minutes
    size = arguments.size or ("1M" if jax.default_backend() == "cpu" else "60M")
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = RESULTS / f"optim-training-{size}-{kind}.jsonl"
    longest = 0.0
    for method in arguments.methods:
        train = functools.cache(lambda method=method: trainer(method, size))
        while (todo := following(rows_of(path, method))) is not None:
            if time.monotonic() + 1.2 * longest > end:
                print(f"stopped before {method}, rate {todo[0]:g}, seed {todo[1]}: call again to go on.")
                return
            start = time.monotonic()
            row = train()(*todo)
            longest = max(longest, time.monotonic() - start)
            device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            date = datetime.date.today().isoformat()
            row = {"method": method, "steps": SIZES[size][6], **row, "date": date, **device}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{method}, rate {todo[0]:g}, seed {todo[1]}: {row['loss'][-1]:.4f}", flush=True)
    plot()


def following(rows: list[dict]) -> tuple[float, int] | None:
    """(rate, seed) of the next run of a method: all first rates, then beyond an edge that is the best, then seeds."""
    swept = {row["rate"]: row["loss"][-1] for row in rows if row["seed"] == SEEDS[0]}
    for rate in FIRST:
        if rate not in swept:
            return rate, SEEDS[0]
    best = best_of(swept)
    at = RATES.index(best)
    for neighbour in RATES[max(0, at - 1) : at + 2]:
        if neighbour not in swept:
            return neighbour, SEEDS[0]
    done = {row["seed"] for row in rows if row["rate"] == best}
    return next(((best, seed) for seed in SEEDS if seed not in done), None)


def best_of(swept: dict[float, float]) -> float:
    return min(swept, key=lambda rate: swept[rate] if np.isfinite(swept[rate]) else np.inf)


def rows_of(path: Path, method: str) -> list[dict]:
    return [row for row in log.read(path) if row["method"] == method]


# ---- data and model ---------------------------------------------------------------------------------


@functools.cache
def text() -> tuple[np.ndarray, np.ndarray]:
    """(training bytes, held-out bytes: every twentieth file) of the standard library's modules."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    join = lambda files: np.frombuffer(b"\n".join(f.read_bytes() for f in files), np.uint8)
    return join([f for n, f in enumerate(files) if n % 20]), join(files[::20])


def batch(data: np.ndarray, rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    starts = rng.integers(0, data.size - length - 1, rows)
    return np.stack([data[s : s + length + 1] for s in starts]).astype(np.int32)


def config_of(size: str) -> DecoderConfig:
    width, hidden, layers, heads = SIZES[size][:4]
    return DecoderConfig(
        family="llama", vocab_size=256, width=width, num_layers=layers, num_heads=heads, num_kv_heads=heads,
        head_dim=width // heads, hidden_dim=hidden, max_length=2048, tied_embeddings=False, bos_id=0, eos_ids=(0,),
        pad_id=0,
    )  # fmt: skip


# ---- one run ----------------------------------------------------------------------------------------


def trainer(method: str, size: str):
    """A function of (rate, seed) that trains and returns what is kept of the run; compiled once for all rates."""
    rows, length, steps, gap = SIZES[size][4:]
    config = config_of(size)
    rank = config.width // 4
    train, held = text()
    rng = np.random.default_rng(1234)
    held_out = [batch(held, rng, rows, length) for _ in range(HELD_OUT)]
    narrow = (lambda params: params) if jax.default_backend() == "cpu" else _bfloat16
    init, step, turn = steppers(method, rank, gap, functools.partial(loss_of, config, narrow))
    step = jax.jit(step, donate_argnums=(0, 1))
    turn = turn and jax.jit(turn, donate_argnums=1)
    evaluate = jax.jit(functools.partial(loss_of, config, narrow))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps, 0.1)

    def run(rate: float, seed: int) -> dict:
        params = decoder.init(jax.random.key(seed), config)
        state = jax.jit(init)(params)
        size_of = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
        row = {"rate": rate, "seed": seed, "at": [], "loss": [], "state_bytes": size_of(state)}
        rng = np.random.default_rng(seed)
        start = time.perf_counter()
        with log.progress(f"{method}, rate {rate:g}, seed {seed}", fields=("loss",)) as bar:
            task = bar.add_task("", total=steps, loss="")
            for n in range(steps):
                tokens = batch(train, rng, rows, length)
                if turn is not None and n % gap in ((0, 1, 2) if n < gap else (0,)):  # thrice at the beginning
                    state = turn(params, state, tokens)
                params, state = step(params, state, tokens, rate * float(schedule(n)))
                if (n + 1) % max(1, steps // EVALUATIONS) == 0 or n + 1 == steps:
                    value = statistics.mean(float(evaluate(params, tokens)) for tokens in held_out)
                    row["at"].append(n + 1)
                    row["loss"].append(value)
                    bar.update(task, loss=f"{value:.4f}")
                bar.update(task, completed=n + 1)
        return row | {"seconds": time.perf_counter() - start}

    return run


def _bfloat16(params):
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16) if hasattr(a, "dtype") else a, params)


def loss_of(config: DecoderConfig, narrow, params, tokens):
    """Mean nats a byte."""
    x = decoder.hidden(narrow(params), config, tokens[:, :-1])
    total, count = cross_entropy(x, decoder.head(params).astype(x.dtype), tokens[:, 1:], jnp.ones(tokens[:, 1:].shape))
    return total / count


def steppers(method: str, rank: int, gap: int, loss):
    """(init, step(params, state, tokens, rate), refresh(params, state, tokens) or None) of a method."""
    options = dict(rank=rank, gap=gap, targets=TARGETS)
    if method == "subspace":
        make = lambda rate: subspace(optax.adam(rate), rank=rank, targets=TARGETS)

        def low(params, state, tokens, rate):
            _, grads = make(rate).value_and_grad(loss)(params, state, tokens)
            return make(rate).update(grads, state, params)

        return make(1.0).init, low, lambda params, state, tokens: make(1.0).refresh(loss)(params, state, tokens)
    make = {
        "adam": lambda rate: optax.adam(rate),
        "galore": lambda rate: optax.chain(galore(**options), optim.adam(rate)),
        "galore, 8 bits": lambda rate: galore(optim.adam8bit(rate), basis_dtype="int8", **options),
        "fira": lambda rate: galore(optax.adam(rate), mode="fira", **options),
        "apollo-mini": lambda rate: galore(optax.adam(rate), mode="apollo-mini", gap=gap, targets=TARGETS),
        "lora": lambda rate: optax.partition(  # what is not a target is trained whole, as in the GaLore paper
            {"low": lora(optax.adam(rate), rank=rank), "whole": optax.adam(rate)}, labels
        ),
    }[method]

    def step(params, state, tokens, rate):
        grads = jax.grad(loss)(params, tokens)
        updates, state = make(rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return make(1.0).init, step, None


def labels(params):
    return jax.tree.map_with_path(lambda path, a: "low" if path[0].key == "layers" and a.ndim == 3 else "whole", params)


# ---- what came out ----------------------------------------------------------------------------------


def summary(path: Path) -> list[dict]:
    """One row a method, at its best rate."""
    out = []
    for method in METHODS:
        rows = rows_of(path, method)
        if not rows:
            continue
        swept = {row["rate"]: row["loss"][-1] for row in rows if row["seed"] == SEEDS[0]}
        best = best_of(swept)
        at_best = [row for row in rows if row["rate"] == best]
        out.append({"method": method, "rate": best, "rows": at_best, "swept": swept, "whole": following(rows) is None})
    return out


def table() -> str:
    parts = []
    for path in sorted(RESULTS.glob("optim-training-*.jsonl")):
        found = summary(path)
        first = found[0]["rows"][0]
        adam = statistics.mean(row["loss"][-1] for row in found[0]["rows"])
        lines = [
            f"`optim_training.py`, {path.stem.split('-')[2]} parameters, {first['device']}, {first['date']}, "
            f"{first['steps']} steps:", "",
            "| method | best rate | held-out loss, nats a byte | seeds | of Adam's | state, of Adam's | all rates |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for f in found:
            losses = [row["loss"][-1] for row in f["rows"]]
            mean, spread = statistics.mean(losses), (max(losses) - min(losses)) / 2
            state = f["rows"][0]["state_bytes"] / first["state_bytes"]
            swept = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(f["swept"].items()))
            seeds = f"{len(losses)}" + ("" if f["whole"] else ", not finished")
            lines.append(
                f"| {f['method']} | {f['rate']:g} | {mean:.4f} ± {spread:.4f} | {seeds} | {mean / adam:.4f} | "
                f"{state:.3f} | {swept} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot() -> None:
    """Held-out loss against the step, the mean and the range over the seeds, one picture a file of results."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for path in sorted(RESULTS.glob("optim-training-*.jsonl")):
        figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for f in summary(path):
            curves = np.array([row["loss"] for row in f["rows"]])
            at = f["rows"][0]["at"]
            (line,) = axes.plot(at, curves.mean(0), label=f"{f['method']}, rate {f['rate']:g}", linewidth=1.8)
            axes.fill_between(at, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
        size = path.stem.split("-")[2]
        axes.set(title=f"Llama of {size} parameters from scratch, {len(SEEDS)} seeds", xlabel="step")
        axes.set(ylabel="held-out loss, nats a byte")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        part = path.with_suffix(".part.png")
        figure.savefig(part)
        part.replace(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
