"""Attention on TPUs that are not there: how many instruction bundles a kernel's compiled schedule has.

    python benchmarks/tpu_schedule.py                                  # all that the table shows; about an hour
    python benchmarks/tpu_schedule.py --chips v6e --widths 128 --passes forward --masks causal
    python benchmarks/tpu_schedule.py --table                          # the table of the newest results
    python benchmarks/tpu_schedule.py --picture                        # the picture of the newest results

The compiler of libtpu schedules for a named TPU on any machine. A TPU core is in-order, so that the number of bundles
of a kernel's loops, each taken as often as it runs, says how long the core is busy. It says nothing of waiting for
memory, nor of what a grid step costs besides: the figures are static. Ideal is what the matrix units alone need, the
products of each tile that the mask leaves at full width. One head, bfloat16; "full" is 2048 queries and 2048 keys
without a mask, "causal" 4096 and 4096 with one. Every kernel at the best of the block sizes listed here. Needs libtpu
(`pip install "jaxml[tpu]"`), and tokamax for that rival.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import about

from jaxml.target import target

LENGTHS = {"full": 2048, "causal": 4096}
CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
FLOPS_PER_CYCLE = {"v5e": 131072, "v5p": 131072, "v6e": 524288, "tpu7x": 524288}
PRODUCTS = {"forward": 2, "backward": 5}  # of each tile
KEYS = ("pass", "mask", "width", "chip")
SUBJECTS = {
    "jaxml": [{}],
    "tokamax splash": [dict(q=2048, kv=2048, compute=512), dict(q=2048, kv=2048, compute=256)],
    "jax splash": [dict(q=1024, kv=1024, compute=512), dict(q=2048, kv=2048, compute=512)],
    "jax flash": [dict(q=1024, kv=1024, compute=512)],
}
SMALLER = {"tokamax splash": [dict(q=1024, kv=1024, compute=512)]}  # under a causal mask as well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=CHIPS, choices=CHIPS)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"], choices=PRODUCTS)
    parser.add_argument("--masks", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--timeout", type=int, default=400, help="seconds for one compilation")
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    parser.add_argument("--picture", action="store_true", help="draw the newest results and stop")
    parser.add_argument("--results", type=Path, help="the file to add to; results/tpu-schedule-DATE.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    if options.table:
        print(table())
        return
    if options.picture:
        print(picture().name)
        return
    path = options.results or about.RESULTS / f"tpu-schedule-{datetime.date.today().isoformat()}.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    report |= {"device": "none: compiled ahead of time by libtpu", **about.made("libtpu", "tokamax")}
    for kind, mask, width, chip in itertools.product(options.passes, options.masks, options.widths, options.chips):
        for subject in options.subjects:
            if mask == "causal" and subject == "jax flash":  # its kernel cannot be told apart into bodies
                continue
            row = best(subject, dict(chip=chip, width=width, kind=kind, mask=mask), options.timeout)
            same = lambda r, row=row: all(r[k] == row[k] for k in ("subject", *KEYS))
            report["rows"] = [r for r in report["rows"] if not same(r)] + [row]
            print(json.dumps(row), flush=True)
            whole = path.with_suffix(".part")
            whole.write_text(json.dumps(report, indent=1))
            os.replace(whole, path)


def best(subject: str, call: dict, timeout: int) -> dict:
    """The subject at the best of its block sizes; each is compiled in a process of its own."""
    chip, width, kind, mask = (call[k] for k in ("chip", "width", "kind", "mask"))
    row = {"subject": subject, "chip": chip, "width": width, "pass": kind, "mask": mask, "bundles": None}
    tried = []
    for blocks in SUBJECTS[subject] + (SMALLER.get(subject, []) if mask == "causal" else []):
        command = [sys.executable, __file__, "--one", json.dumps(call | dict(subject=subject, blocks=blocks))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            tried.append({"blocks": blocks, "failed": f"not compiled in {timeout} s"})
            continue
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("See ")]
            tried.append({"blocks": blocks, "failed": said[-1][:300]})
        else:
            tried.append({"blocks": blocks} | json.loads(done.stdout.splitlines()[-1]))
    found = [t for t in tried if "bundles" in t]
    if found:
        row |= min(found, key=lambda t: t["bundles"])
        seen = LENGTHS[mask] ** 2 / (1 if mask == "full" else 2)
        row["of_peak"] = PRODUCTS[kind] * 2 * seen * width / FLOPS_PER_CYCLE[chip] / row["bundles"]
    return row | {"tried": tried}


# ---- in a process of its own ------------------------------------------------------------------------


def measure(subject: str, chip: str, width: int, kind: str, mask: str, blocks: dict) -> dict:
    """Bundles of the kernels of one call, spilled registers, seconds of compilation."""
    import time

    folder = tempfile.mkdtemp()
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    flags += " --xla_jf_emit_annotations=true --xla_tpu_scoped_vmem_limit_kib=65536"  # for the rivals' large blocks
    os.environ["LIBTPU_INIT_ARGS"] = flags
    import jax
    import jax.numpy as jnp

    from jaxml.testing import compile_for_tpu

    length = LENGTHS[mask]
    x = jax.ShapeDtypeStruct((1, length, width), jnp.bfloat16)  # [heads, length, width], the rivals' layout
    call = CALLS[subject](length, width, mask == "causal", **blocks)
    function = call if kind == "forward" else lambda q, k, v, ct: jax.vjp(call, q, k, v)[1](ct)
    started = time.perf_counter()
    compiled = compile_for_tpu(function, [x] * (3 if kind == "forward" else 4), chip)
    seconds = time.perf_counter() - started
    total, spills, kernels = 0, 0, []
    for path in sorted(Path(folder).glob("*final_bundles.txt")):
        if "schedule-analysis" in path.name or not re.search(KERNELS[subject], path.name):
            continue
        if kind == "backward" and re.search(r"forward|fwd|flash_attention\.", path.name):
            continue
        text = path.read_text()
        parts = stretches(text)
        if subject == "jaxml":
            count = of_ours(parts, length, width, chip, kind, mask)
        else:
            half = 1 if kind == "forward" or subject == "jax flash" else 2
            count = of_rival(parts, length * half // blocks["q"], length * half // blocks["kv"], mask)
        kernels.append({"kernel": re.sub(r"^\d+-|-\d+-final.*", "", path.name), "bundles": count})
        total += count
        spills += len(re.findall(r"vst \[vmem:\[#allocation\d+_spill", text))
    shutil.rmtree(folder)
    if not kernels:
        raise SystemExit(f"no kernel matching {KERNELS[subject]!r} was compiled")
    memory = compiled.memory_analysis().temp_size_in_bytes
    return {"bundles": total, "spills": spills, "kernels": kernels, "compile_s": seconds, "extra_bytes": memory}


def stretches(text: str) -> list[tuple[int, int]]:
    """(how many loops it is in, bundles) of each stretch of a schedule that branches and loops leave in one piece."""
    out, start = [], True
    for line in re.findall(r"^ *0x[0-9a-f]+.*", text, re.M):
        head = line.split("{", 1)[0]
        depth = head.count(">")
        if start or depth != out[-1][0] or " LB:" in head:
            out.append((depth, 0))
        out[-1] = depth, out[-1][1] + 1
        start = "sbr.rel" in line
    return out


ROWS_OF_A_VECTOR = 16  # of bfloat16: a product of one occupies its matrix unit for as many cycles


def busy(text: str) -> list[tuple[int, int]]:
    """(how many loops it is in, cycles) of each stretch: its bundles, or what its busiest matrix unit takes."""
    lines, out, at = re.findall(r"^ *0x[0-9a-f]+.*", text, re.M), [], 0
    for depth, bundles in stretches(text):
        body = "\n".join(lines[at : at + bundles])
        units = [len(re.findall(rf"vmatmul\.\S*mxu{n}\b", body)) for n in range(4)]
        out.append((depth, max(bundles, ROWS_OF_A_VECTOR * max(units))))
        at += bundles
    return out


def of_ours(parts, length: int, width: int, chip: str, kind: str, mask: str) -> int:
    """How many bundles our kernel runs through, from its blocks and the order of its code."""
    from jaxml.attention import blocks, tpu_arrays

    with target(f"TPU {chip}"):
        c = tpu_arrays.cut(1, 1, 1, length, length, width, width, 2, 0, backward=kind == "backward")
        together = blocks.limits().together if kind == "forward" else 1
    steps = c.rows * c.parts
    around = 1 if steps > 1 else 0  # the loop over the grid
    if mask == "full":
        trips = ([steps] if around else []) + [c.resident // together]
        return sum(bundles * math.prod(trips[:depth]) for depth, bundles in parts)
    if c.parts > 1:
        raise SystemExit(f"causal is counted where the keys lie in VMEM at once, here in {c.parts} parts")
    around = min(around, max(depth for depth, bundles in parts if bundles > 200) - 1)  # two cores, a step each: no loop
    inner = [n for n, (depth, bundles) in enumerate(parts) if depth == around + 1 and bundles > 60]
    whole, unmasked, masked, single = (parts[n][1] for n in inner[:4])
    after = next(n for n in range(inner[0] + 1, len(parts)) if parts[n][0] > around and parts[n][1] > 8)
    odd = max(bundles for _, bundles in parts[inner[0] + 1 : after]) if kind == "forward" else 0  # what a turn leaves
    total = steps * (sum(bundles for depth, bundles in parts if depth <= around) - odd)
    for i in range(c.rows):
        before = i * c.block // c.keys  # chunks of keys that the whole block sees
        total += before // together * whole + before % together * odd
        tiles = [(j, n) for j in range(c.block // c.keys) for n in range(c.chunks) if (n + 1) * c.columns > j * c.keys]
        crossed = [n * c.columns < (j + 1) * c.keys - 1 for j, n in tiles]
        for n in range(0, len(tiles), 2):
            if n + 1 == len(tiles):
                total += single
            else:
                total += masked if crossed[n + 1] or crossed[min(n + 2, len(tiles) - 1)] else unmasked
    return total


def of_rival(parts, rows: int, columns: int, mask: str) -> int:
    """The same for kernels whose grid is blocks of queries times blocks of keys, with all within a step unrolled.

    Under a causal mask blocks above the diagonal are not run. A second large body is the one with the mask.
    """
    if mask == "full":
        return sum(bundles for _, bundles in parts) * rows * columns
    bodies = [n for n, (_, bundles) in enumerate(parts) if bundles > 0.6 * max(b for _, b in parts)]
    if len(bodies) > 2 or rows != columns:
        raise SystemExit(f"expected a body or two and square blocks, found {len(bodies)} and {rows} × {columns}")
    largest = lambda some: max(some, key=lambda n: parts[n][1])
    once = {largest(range(bodies[0])), largest(range(bodies[-1] + 1, len(parts)))}  # begins and ends a row of blocks
    total = sum(bundles * (rows if n in once else rows * (rows + 1) // 2) for n, (_, bundles) in enumerate(parts)
                if n not in bodies)  # fmt: skip
    sizes = sorted(parts[n][1] for n in bodies)
    return total + sizes[0] * rows * (rows - 1) // 2 + sizes[-1] * rows


def _jaxml(length: int, width: int, causal: bool):
    from jaxml.attention import flash_attention

    turned = lambda a: a.swapaxes(0, 1)[None]
    attend = lambda *a: flash_attention(*map(turned, a), is_causal=causal, implementation="mosaic_tpu")
    return lambda *a: attend(*a)[0].swapaxes(0, 1)


def _tokamax(length: int, width: int, causal: bool, q: int, kv: int, compute: int):
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    config = kernel.SplashConfig(
        block_q=q, block_kv=kv, block_kv_compute=compute,
        block_q_dkv=q // 2, block_kv_dkv=kv // 2, block_kv_dkv_compute=compute,
    )  # fmt: skip
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    return kernel.make_splash_mha_single_device(mask, config=config)


def _splash(length: int, width: int, causal: bool, q: int, kv: int, compute: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute, block_q_dkv=q // 2, block_kv_dkv=kv // 2,
        block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([(masks.CausalMask if causal else masks.FullMask)((length, length))])
    return kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def _flash(length: int, width: int, causal: bool, q: int, kv: int, compute: int):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    sizes = flash.BlockSizes(
        block_q=q, block_k_major=kv, block_k=compute, block_b=1, block_q_major_dkv=q, block_k_major_dkv=kv,
        block_k_dkv=compute, block_q_dkv=q, block_k_major_dq=kv, block_k_dq=compute, block_q_dq=q,
    )  # fmt: skip
    return lambda *a: flash.flash_attention(*(x[None] for x in a), block_sizes=sizes, sm_scale=width**-0.5)[0]


CALLS = {"jaxml": _jaxml, "tokamax splash": _tokamax, "jax splash": _splash, "jax flash": _flash}
KERNELS = {"jaxml": "flash_attention", "tokamax splash": "splash|flash", "jax splash": "splash", "jax flash": "flash"}


def _newest() -> list[dict]:
    return about.newest("tpu-schedule")["rows"]


def _busy(row: dict) -> float:
    """Bundles, or what the matrix units need at least: bundles do not count the cycles that one waits for a unit."""
    return row["bundles"] * max(1.0, row["of_peak"])


def table() -> str:
    """Markdown of the newest results."""
    rows = [r for r in _newest() if r["bundles"]]
    cells = {(*(r[k] for k in KEYS), r["subject"]): r["bundles"] for r in rows}
    busy = {(*(r[k] for k in KEYS), r["subject"]): _busy(r) for r in rows}
    lines = ["| pass | mask | width | chip | " + " | ".join(SUBJECTS) + " | best rival / jaxml | of peak |"]
    lines.append("|---" * (6 + len(SUBJECTS)) + "|")
    for call in sorted({c[:-1] for c in cells}):
        found = [cells.get((*call, s)) for s in SUBJECTS]
        ours, rivals = busy.get((*call, "jaxml")), [busy[(*call, s)] for s in list(SUBJECTS)[1:] if (*call, s) in busy]
        ratio = f"{min(rivals) / ours:.2f}" if rivals and ours else ""
        share = next(
            (f"{r['of_peak']:.0%}" for r in rows if [r[k] for k in (*KEYS, "subject")] == [*call, "jaxml"]), ""
        )
        lines.append("| " + " | ".join([*map(str, call), *(str(b or "–") for b in found), ratio, share]) + " |")
    return "\n".join(lines)


def picture() -> Path:
    """A bar for every row of the table: the best rival's bundles over ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _newest()
    panels = [(kind, mask) for kind in PRODUCTS for mask in LENGTHS]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharey=True, layout="constrained")
    for axis, (kind, mask) in zip(axes.flat, panels):
        names, ratios = [], []
        for width, chip in itertools.product((64, 128, 256), CHIPS):
            same = [r for r in rows if [r[k] for k in KEYS] == [kind, mask, width, chip] and r["bundles"]]
            here = {r["subject"]: _busy(r) for r in same}
            rivals = [b for name, b in here.items() if name != "jaxml"]
            if rivals and here.get("jaxml"):
                names.append(f"{chip}\n{width}")
                ratios.append(min(rivals) / here["jaxml"])
        axis.bar(names, ratios, color=["tab:blue" if r >= 1 else "tab:gray" for r in ratios])
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{kind}, {mask}", fontsize=10)
        for n, ratio in enumerate(ratios):
            axis.text(n, ratio, f"{ratio:.2f}", ha="center", va="bottom", fontsize=7)
    figure.supylabel("bundles of the best rival / jaxml", fontsize=10)
    figure.suptitle("Attention on TPUs, static schedules: above 1 jaxml is shorter (chip, head width)", fontsize=11)
    path = about.RESULTS / "tpu-schedule.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
