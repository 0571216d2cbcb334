"""Activations: memory of a scan over layers against jax.nn; gradients through 50 layers, centre, dying units.

    python benchmarks/activations.py
    python benchmarks/activations.py --table       # the tables of the newest results
    python benchmarks/activations.py --picture     # the picture of the newest results

memory: temporary bytes by the compiler's plan of the gradient of 24 residual feed-forward layers under `lax.scan`.
depth: 50 layers h ← f(h W) of width 256 without normalisation, batch 256, standard normal input, W normal with standard
deviation s/√256, s = 1 or the gain of f; the median over 5 seeds of the root mean square of the gradient at the input
over that at the output; and of one layer, the mean of its outputs over their root mean square.
dying: 3 hidden layers of 64, 300 steps of Adam at a learning rate of 0.03; the share of hidden units whose slope is
below 0.001 at each of 1024 inputs, at the end, mean of 3 seeds.
"""

import argparse
import functools
import json
import math

import about
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxml import activations
from jaxml.activations import gain, plot

LAYERS, TOKENS, WIDTH, HIDDEN = 24, 1024, 256, 1024
MEMORY = ("mish", "gelu", "silu", "gelu_exact", "swiglu", "elu", "selu", "hard_silu", "softplus", "soft_sign", "relu")
AIMS = {"mish": 0.6, "gelu": 0.6, "silu": 0.6}
KNOWN = (
    "relu", "leaky_relu", "elu", "selu", "gelu_exact", "silu", "mish", "softplus", "relu_squared", "star_relu", "tanh",
    "sigmoid", "soft_sign", "sin", "learnable.prelu", "learnable.snake", "learnable.xielu", "learnable.dyt",
)  # fmt: skip
DEPTH, UNITS, SEEDS = 50, 256, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    parser.add_argument("--picture", action="store_true", help="draw the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if not options.picture:
        report = {"device": "cpu"} | about.made()
        report["memory"] = [memory(name, dtype) for dtype in ("float32", "bfloat16") for name in MEMORY]
        report["depth"] = [row for entry in plot.drawable() if entry.name != "logit" for row in [depth(entry)]]
        (about.RESULTS / f"activations-cpu-{report['date']}.json").write_text(json.dumps(report, indent=1))
    print(picture())


# ---- memory ------------------------------------------------------------------------------------------


def memory(name: str, dtype: str) -> dict:
    """MiB of temporary memory, ours and jax.nn's."""
    theirs = {
        "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
        "swiglu": lambda gate, value: jax.nn.silu(gate) * value,
    }
    ours = planned(getattr(activations, name), name == "swiglu", dtype)
    other = planned(theirs.get(name) or getattr(jax.nn, name), name == "swiglu", dtype)
    row = {"name": name, "dtype": dtype, "jaxml_mib": ours, "jax_nn_mib": other, "ratio": round(ours / other, 3)}
    print(row, flush=True)
    return row


def planned(act, gated: bool, dtype: str) -> float:
    """MiB that the compiler plans for the gradient by the weights, beside arguments and results."""

    def loss(weights, x):
        def layer(x, w):
            hidden = act(x @ w["gate"], x @ w["up"]) if gated else act(x @ w["up"])
            return x + hidden @ w["down"], None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32))

    shape = lambda *s: jax.ShapeDtypeStruct(s, dtype)
    weights = {"up": shape(LAYERS, WIDTH, HIDDEN), "down": shape(LAYERS, HIDDEN, WIDTH)}
    weights |= {"gate": shape(LAYERS, WIDTH, HIDDEN)} if gated else {}
    compiled = jax.jit(jax.grad(loss)).lower(weights, shape(TOKENS, WIDTH)).compile()
    return round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 2)


# ---- depth -------------------------------------------------------------------------------------------


def depth(entry) -> dict:
    """What an activation does to gradients, means and units."""
    f = plot.curve(entry)
    scale = gain(f)
    row = {"name": entry.name, "gain": round(scale, 4)}
    for kind, s in (("lecun", 1.0), ("gain", scale)):
        run = jax.jit(jax.vmap(functools.partial(_through, f, s)))
        ratio, centre = (np.asarray(a) for a in run(jax.random.split(jax.random.key(0), SEEDS)))
        row |= {f"gradient_{kind}": _number(np.median(ratio)), "centre": _number(np.median(centre))}
    died, loss = jax.jit(jax.vmap(functools.partial(_train, f, scale)))(jax.random.split(jax.random.key(1), 3))
    row |= {"dead": _number(np.mean(died)), "loss": _number(np.median(loss))}
    print(row, flush=True)
    return row


def _number(value) -> float | None:
    return float(f"{float(value):.4g}") if math.isfinite(value) else None


def _through(f, scale, key):
    """(root mean square of the gradient at the input over that at the output, |mean| / rms after one layer)."""
    keys = jax.random.split(key, 3)
    weights = jax.random.normal(keys[0], (DEPTH, UNITS, UNITS)) * scale / math.sqrt(UNITS)
    x = jax.random.normal(keys[1], (UNITS, UNITS))
    direction = jax.random.normal(keys[2], x.shape)

    def out(x):
        return jnp.sum(direction * jax.lax.scan(lambda h, w: (f(h @ w), None), x, weights)[0])

    rms = lambda a: jnp.sqrt(jnp.mean(a * a))
    first = f(jax.random.normal(keys[1], (1 << 16,)))
    return rms(jax.grad(out)(x)) / rms(direction), jnp.abs(jnp.mean(first)) / rms(first)


def _train(f, scale, key):
    """(share of dead units, last loss) of a small network that learns a wave."""
    keys = jax.random.split(key, 6)
    sizes = (2, 64, 64, 64, 1)
    draw = lambda key, m, n: jax.random.normal(key, (m, n)) * (scale if m > 2 else 1) / math.sqrt(m)
    params = [(draw(k, m, n), jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:])]
    x = jax.random.uniform(keys[5], (1024, 2), minval=-1.0, maxval=1.0)
    y = jnp.sin(3 * x[:, :1]) * jnp.cos(2 * x[:, 1:])
    tx = optax.adam(0.03)

    def layers(params):
        h, inner = x, []
        for w, b in params[:-1]:
            inner.append(h @ w + b[None])
            h = f(inner[-1])
        return h @ params[-1][0] + params[-1][1][None], inner

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((layers(p)[0] - y) ** 2))(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=300)
    slopes = [jax.grad(lambda z: jnp.sum(f(z)))(z) for z in layers(params)[1]]
    dead = jnp.stack([jnp.max(jnp.abs(s), axis=0) < 1e-3 for s in slopes])
    return jnp.mean(dead), losses[-1]


# ---- tables and picture ------------------------------------------------------------------------------


def newest() -> dict:
    return about.newest("activations-cpu")


def table() -> str:
    """Two tables in Markdown, of the newest results."""
    report = newest()
    lines = [
        f"`memory` (MiB planned, CPU, {about.said(report)}):",
        "",
        "| activation | dtype | jaxml | jax.nn | ratio | aim |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["memory"]:
        cells = (
            row["name"],
            row["dtype"],
            row["jaxml_mib"],
            row["jax_nn_mib"],
            row["ratio"],
            AIMS.get(row["name"], ""),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"`depth` ({about.said(report)}; all of them in the picture):",
        "",
        "| activation | gain | gradient, s = 1 | gradient, s = gain | mean / rms | dead units |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["depth"]:
        if row["name"] in KNOWN:
            cells = [row["gain"], *(_cell(row[key]) for key in ("gradient_lecun", "gradient_gain"))]
            cells += [f"{row['centre']:.2f}", "" if row["dead"] is None else f"{100 * row['dead']:.0f} %"]
            lines.append(f"| {row['name']} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None or value == 0:
        return "overflows" if value is None else "underflows"
    return f"{value:.2g}" if 1e-3 < value < 1e3 else f"{value:.0e}"


def picture() -> str:
    """Draws the newest results: one row an activation, sorted by the gradient that is left at s = 1."""
    from matplotlib.figure import Figure

    rows = newest()["depth"]
    low, high = 1e-12, 1e6
    inside = lambda v: high if v is None else min(max(v, low), high)
    rows.sort(key=lambda r: (inside(r["gradient_lecun"]), inside(r["gradient_gain"])))
    at = np.arange(len(rows))
    figure = Figure(figsize=(12, 0.19 * len(rows) + 1.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(2.4, 1, 1))
    left.axvspan(0.1, 10, color="#e8f1e4", zorder=0)
    for kind, colour, label in (("lecun", "#d9822b", "weights 1/√n"), ("gain", "#1f5fa8", "weights gain/√n")):
        left.scatter([inside(r[f"gradient_{kind}"]) for r in rows], at, 22, colour, label=label, zorder=3)
    left.set_xscale("log")
    left.set_xlim(low / 5, high * 5)
    left.set_xticks([1e-12, 1e-9, 1e-6, 1e-3, 1, 1e3, 1e6])
    left.set_xticklabels(["≤1e−12", "1e−9", "1e−6", "0.001", "1", "1000", "≥1e6"])
    left.set_xlabel("gradient at the input / at the output, 50 layers\n(green: within a factor of ten)")
    left.legend(loc="lower right", fontsize=9, framealpha=1)
    middle.barh(at, [r["centre"] for r in rows], color="#7a8694", height=0.6)
    middle.set_xlim(0, 1)
    middle.set_xlabel("|mean| / rms\nof a layer's outputs")
    right.barh(at, [100 * (r["dead"] or 0) for r in rows], color="#b5443c", height=0.6)
    right.set_xlim(0, 100)
    right.set_xlabel("dead units after training, %")
    for axes in (left, middle, right):
        axes.set_ylim(-0.8, len(rows) - 0.2)
        axes.grid(axis="y", color="#eceef1", zorder=-1)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5)
        axes.xaxis.set_label_position("bottom")
        axes.tick_params(axis="x", top=True, labeltop=True, labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_color("#c8ccd2")
    left.set_yticks(at, [r["name"] for r in rows])
    path = about.RESULTS / "activations-depth.png"
    figure.savefig(path, dpi=110)
    return path.name


if __name__ == "__main__":
    main()
