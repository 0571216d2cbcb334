"""Attention on TPUs that are not there: how many instruction bundles a kernel's compiled schedule has.

    python benchmarks/tpu_schedule.py                                  # all that the table shows; about an hour
    python benchmarks/tpu_schedule.py --chips v6e --widths 128 --passes forward
    python benchmarks/tpu_schedule.py --table                          # the table of the newest results

The compiler of libtpu schedules for a named TPU on any machine. A TPU core is in-order, so that the number of bundles
of a kernel's loops, each taken as often as it runs, says how long the core is busy. It says nothing of waiting for
memory, nor of what a grid step costs besides: the figures are static. Ideal is what the matrix units alone need, both
products of each tile at full width. One head, 2048 queries and 2048 keys, bfloat16, no mask; every kernel at the best
of the block sizes listed here. Needs libtpu (`pip install "jaxml[tpu]"`), and tokamax for that rival.
"""

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
LENGTH = 2048
CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
FLOPS_PER_CYCLE = {"v5e": 131072, "v5p": 131072, "v6e": 524288, "tpu7x": 524288}
PRODUCTS = {"forward": 2, "backward": 5}  # of each tile
SUBJECTS = {
    "jaxml": [{}],
    "tokamax splash": [dict(q=2048, kv=2048, compute=512), dict(q=2048, kv=2048, compute=256)],
    "jax splash": [dict(q=1024, kv=1024, compute=512), dict(q=2048, kv=2048, compute=512)],
    "jax flash": [dict(q=1024, kv=1024, compute=512)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=CHIPS, choices=CHIPS)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"], choices=PRODUCTS)
    parser.add_argument("--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--timeout", type=int, default=400, help="seconds for one compilation")
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    if options.table:
        print(table())
        return
    path = RESULTS / f"tpu-schedule-{datetime.date.today().isoformat()}.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    report |= {
        "date": datetime.date.today().isoformat(),
        "device": "none: compiled ahead of time by libtpu",
        "versions": {p: version(p) for p in ("jax", "libtpu", "tokamax")},
    }
    for kind in options.passes:
        for width in options.widths:
            for chip in options.chips:
                for subject in options.subjects:
                    row = best(subject, chip, width, kind, options.timeout)
                    same = lambda r, row=row: all(r[k] == row[k] for k in ("subject", "chip", "width", "pass"))
                    report["rows"] = [r for r in report["rows"] if not same(r)] + [row]
                    print(json.dumps(row), flush=True)
                    whole = path.with_suffix(".part")
                    whole.write_text(json.dumps(report, indent=1))
                    os.replace(whole, path)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def best(subject: str, chip: str, width: int, kind: str, timeout: int) -> dict:
    """The subject at the best of its block sizes; each is compiled in a process of its own."""
    row = {"subject": subject, "chip": chip, "width": width, "pass": kind, "bundles": None}
    tried = []
    for blocks in SUBJECTS[subject]:
        job = json.dumps(dict(subject=subject, chip=chip, width=width, kind=kind, blocks=blocks))
        command = [sys.executable, __file__, "--one", job]
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
        ideal = PRODUCTS[kind] * 2 * LENGTH**2 * width / FLOPS_PER_CYCLE[chip]
        row["of_peak"] = ideal / row["bundles"]
    return row | {"tried": tried}


# ---- in a process of its own ------------------------------------------------------------------------


def measure(subject: str, chip: str, width: int, kind: str, blocks: dict) -> dict:
    """Bundles of the kernels of one call, spilled registers, seconds of compilation."""
    import time

    folder = tempfile.mkdtemp()
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    flags += " --xla_jf_debug_level=2 --xla_tpu_scoped_vmem_limit_kib=65536"  # the rivals' large blocks need the last
    os.environ["LIBTPU_INIT_ARGS"] = flags
    import jax
    import jax.numpy as jnp

    from jaxml.testing import compile_for_tpu

    x = jax.ShapeDtypeStruct((1, LENGTH, width), jnp.bfloat16)  # [heads, length, width], the rivals' layout
    call = CALLS[subject](width, **blocks)
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
        count, spilled = bundles(path.read_text(), _trips(subject, kind, chip, blocks))
        kernels.append({"kernel": re.sub(r"^\d+-|-\d+-final.*", "", path.name), "bundles": count})
        total, spills = total + count, spills + spilled
    if not kernels:
        raise SystemExit(f"no kernel matching {KERNELS[subject]!r} was compiled")
    memory = compiled.memory_analysis().temp_size_in_bytes
    return {"bundles": total, "spills": spills, "kernels": kernels, "compile_s": seconds, "extra_bytes": memory}


def bundles(text: str, trips: tuple[int, ...]) -> tuple[int, int]:
    """(bundles that a schedule runs through, stores of spilled registers); `trips`: of each depth of loops."""
    lines = re.findall(r"^ *0x[0-9a-f]+.*", text, re.M)
    total = sum(math.prod(trips[: _depth(line)]) for line in lines)
    return total, len(re.findall(r"vst \[vmem:\[#allocation\d+_spill", text))


def _depth(line: str) -> int:
    """How many loops a bundle is in."""
    return line.split("{", 1)[0].count(">")


def _jaxml(width: int):
    from jaxml.attention import flash_attention

    turned = lambda a: a.swapaxes(0, 1)[None]
    return lambda *a: flash_attention(*map(turned, a), implementation="mosaic_tpu")[0].swapaxes(0, 1)


def _tokamax(width: int, q: int, kv: int, compute: int):
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    config = kernel.SplashConfig(
        block_q=q, block_kv=kv, block_kv_compute=compute,
        block_q_dkv=q // 2, block_kv_dkv=kv // 2, block_kv_dkv_compute=compute,
    )  # fmt: skip
    return kernel.make_splash_mha_single_device(masks.FullMask((LENGTH, LENGTH)), config=config)


def _splash(width: int, q: int, kv: int, compute: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute, block_q_dkv=q // 2, block_kv_dkv=kv // 2,
        block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((LENGTH, LENGTH))])
    return kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)


def _flash(width: int, q: int, kv: int, compute: int):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    sizes = flash.BlockSizes(
        block_q=q, block_k_major=kv, block_k=compute, block_b=1, block_q_major_dkv=q, block_k_major_dkv=kv,
        block_k_dkv=compute, block_q_dkv=q, block_k_major_dq=kv, block_k_dq=compute, block_q_dq=q,
    )  # fmt: skip
    return lambda *a: flash.flash_attention(*(x[None] for x in a), block_sizes=sizes, sm_scale=width**-0.5)[0]


CALLS = {"jaxml": _jaxml, "tokamax splash": _tokamax, "jax splash": _splash, "jax flash": _flash}
KERNELS = {"jaxml": "flash_attention", "tokamax splash": "splash|flash", "jax splash": "splash", "jax flash": "flash"}


def _trips(subject: str, kind: str, chip: str, blocks: dict) -> tuple[int, ...]:
    """How often the loops of each depth run: over the grid where it has several steps, and within a step."""
    if subject != "jaxml":  # what is within a step is unrolled
        half = 1 if kind == "forward" or subject == "jax flash" else 2
        return ((LENGTH * half // blocks["q"]) * (LENGTH * half // blocks["kv"]),)
    from jaxml.attention.blocks import TABLE

    limits = TABLE[chip]
    if kind == "forward":
        return (LENGTH // limits.chunk // limits.together,)
    return LENGTH // limits.rows_backward, LENGTH // limits.chunk


def table() -> str:
    """Markdown of the newest results."""
    path = max(RESULTS.glob("tpu-schedule-*.json"))
    rows = json.loads(path.read_text())["rows"]
    lines = ["| pass | width | chip | " + " | ".join(SUBJECTS) + " | best rival / jaxml |", "|---" * 8 + "|"]
    cells = {(r["pass"], r["width"], r["chip"], r["subject"]): r for r in rows}
    for kind, width, chip in sorted({(r["pass"], r["width"], r["chip"]) for r in rows}, reverse=False):
        found = [cells.get((kind, width, chip, s), {}).get("bundles") for s in SUBJECTS]
        rivals = [b for b in found[1:] if b]
        ratio = f"{min(rivals) / found[0]:.2f}" if rivals and found[0] else ""
        lines.append(f"| {kind} | {width} | {chip} | " + " | ".join(str(b or "–") for b in found) + f" | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
