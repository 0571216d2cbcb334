"""Attention against jax.nn and torch: forward and gradient, time and memory, over the length.

    python benchmarks/attention.py
    python benchmarks/attention.py --lengths 512 1024 --repeats 3
    python benchmarks/attention.py --table                             # the table of the newest results

One process; ours and the rivals' calls alternate. Each time is the fastest of `repeats` calls, four times as many up to
length 1024, after one that compiles. Extra memory is what XLA plans beside arguments and results; torch plans none, so
that it has no figure.
"""

import argparse
import json
import os
import platform
import re
import time

import about
import jax
import jax.numpy as jnp
import numpy as np

from jaxml.attention import flash_attention
from jaxml.extras import version

HEADS, WIDTH = 4, 64
AIMS = {(4096, "forward"): 3.0, (4096, "gradient"): 2.5, (512, "forward"): 1.0, (512, "gradient"): 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    rows = [row for T in options.lengths for row in measure(T, options.repeats * (4 if T <= 1024 else 1))]
    device = jax.devices()[0].device_kind
    device = f"{device}, {os.cpu_count()} cores" if device == "cpu" else device
    report = {
        **about.made("torch"),
        "device": device,
        "machine": platform.machine(),
        "heads": HEADS,
        "width": WIDTH,
        "dtype": "float32",
        "rows": rows,
    }
    about.RESULTS.mkdir(exist_ok=True)
    path = about.RESULTS / f"attention-{re.sub(r'[^a-z0-9]+', '-', device.lower())}-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1))
    print(path.name)


def measure(T: int, repeats: int) -> list[dict]:
    """One row for the forward pass and one for the gradient."""
    q, k, v = (jax.random.normal(key, (1, T, HEADS, WIDTH)) for key in jax.random.split(jax.random.key(0), 3))
    ours = lambda q, k, v: flash_attention(q, k, v, is_causal=True)
    theirs = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    rows = []
    for what in ("forward", "gradient"):
        calls, extra = {}, {}
        for name, f in (("jaxml", ours), ("jax.nn", theirs)):
            if what == "gradient":
                f = jax.grad(lambda q, k, v, f=f: jnp.sum(f(q, k, v) ** 2), (0, 1, 2))
            compiled = jax.jit(f).lower(q, k, v).compile()
            calls[name] = lambda c=compiled: jax.block_until_ready(c(q, k, v))
            extra[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        if version("torch") and jax.default_backend() == "cpu":
            calls["torch"] = torch_call(what, q, k, v)
        a, b = (jax.tree.leaves(calls[name]()) for name in ("jaxml", "jax.nn"))
        error = max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(a, b))
        seconds = {name: [] for name in calls}
        for name in calls:
            calls[name]()
        for _ in range(repeats):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - started)
        best = {name: min(times) for name, times in seconds.items()}
        rows.append(
            {
                "T": T,
                "what": what,
                "seconds": best,
                "times_as_fast_as": {n: best[n] / best["jaxml"] for n in best if n != "jaxml"},
                "extra_mib": extra,
                "memory_ratio": extra["jax.nn"] / max(extra["jaxml"], 1e-9),
                "largest_difference": error,
                "runs": seconds,
            }
        )
        shown = ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in best.items())
        print(f"{T:6} {what:9} {shown}; extra {extra['jaxml']:.1f} / {extra['jax.nn']:.1f} MiB", flush=True)
    return rows


def torch_call(what: str, *arrays):
    import torch

    q, k, v = (torch.from_numpy(np.array(a)).transpose(1, 2).contiguous() for a in arrays)

    def call():
        leaves = [x.detach().requires_grad_(what == "gradient") for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        if what == "gradient":
            (out**2).sum().backward()

    return call


def table() -> str:
    """Markdown of the newest results of each device."""
    parts = []
    for device in about.of_devices("attention"):
        report = about.newest(device)
        head = "| T | what | jaxml | jax.nn | torch | times jax.nn | aim | times torch | extra MiB | jax.nn | ratio |"
        lines = [head, "|---" * 11 + "|"]
        on_cpu = report["device"].startswith("cpu")
        for r in report["rows"]:
            seconds, times, extra = r["seconds"], r["times_as_fast_as"], r["extra_mib"]
            digits = 0 if on_cpu and r["T"] > 1024 else 1
            cells = [f"{1e3 * seconds[n]:.{digits}f} ms" if n in seconds else "" for n in ("jaxml", "jax.nn", "torch")]
            aim = AIMS.get((r["T"], r["what"]), "") if on_cpu else ""
            cells += [f"{times['jax.nn']:.2f}", f"{aim}", f"{times['torch']:.2f}" if "torch" in times else ""]
            cells += [f"{extra['jaxml']:.1f}", f"{extra['jax.nn']:.1f}", f"1/{r['memory_ratio']:.0f}"]
            lines.append(f"| {r['T']} | {r['what']} | " + " | ".join(cells) + " |")
        parts.append(f"{report['device']}, {about.said(report)}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
