"""Attention's GPU kernels compiled with no GPU: the registers that they take, and the bytes that spill to memory.

    python benchmarks/gpu_registers.py            # all, each in a process of its own; three minutes on 2 cores
    python benchmarks/gpu_registers.py --backends mosaic_gpu --widths 128
    python benchmarks/gpu_registers.py --table    # the table of the newest results

Output and gradients of causal attention, two texts of 4,096 tokens, eight heads that share four of keys. Aim: nothing
spilled up to width 128, below 200 bytes at 256. jax-triton's kernels are assembled by the assembler that comes with
Triton, all others by ptxas. Needs that, `pip install triton absl-py`, and `pip install --no-deps jax-triton
jax-cuda13-plugin jax-cuda13-pjrt` of JAX's own version.
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys

import about

from jaxml import log

HOPPER = [("NVIDIA H100", "bfloat16", width) for width in ([64, 64], [128, 128], [192, 128], [256, 256])]
BOTH = [(device, "bfloat16", [width, width]) for device in ("NVIDIA H100", "NVIDIA A100") for width in (64, 128, 256)]
EXACT = [("NVIDIA A100", "float32", [width, width]) for width in (64, 128, 256)]
CALLS = {  # backend → (device, dtype, widths of keys and values)
    "mosaic_gpu": HOPPER,
    "mosaic_gpu_fused": HOPPER[:2],
    "triton": [*BOTH, *EXACT],
    "jax_triton": [*BOTH, ("NVIDIA A100", "float32", [128, 128]), ("NVIDIA B200", "float32", [128, 128])],
}
KEYS = ("backend", "device", "dtype", "widths")
PARTS = {  # kernel → how it is called; what adds to references has the name that JAX gives it
    "forward": "flash_attention_forward", "queries' gradients": "flash_attention_backward_queries",
    "keys' gradients": "flash_attention_backward_keys", "all gradients": "new_body",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=list(CALLS), default=list(CALLS))
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 192, 256], help="of the keys")
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.one:
        print(json.dumps(compiled(*json.loads(options.one))))
        return
    if shutil.which("ptxas") is None:
        parser.error("CUDA's assembler ptxas is not on PATH.")
    path = about.RESULTS / f"gpu-registers-{datetime.date.today()}.json"
    report = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    report |= {"device": "none: compiled for CUDA", **about.made("triton", "jax-triton", "jax-cuda13-plugin")}
    report["assembler"] = re.findall(r"V[\d.]+", subprocess.check_output(["ptxas", "--version"], text=True))[0]
    for backend in options.backends:
        for call in CALLS[backend]:
            if call[2][0] not in options.widths:
                continue
            done = subprocess.run(
                [sys.executable, __file__, "--one", json.dumps([backend, *call])], stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                raise SystemExit(f"gpu_registers.py: {backend} {call} was not compiled, see above.")
            row = dict(zip(KEYS, [backend, *call]), kernels=json.loads(done.stdout.splitlines()[-1]))
            others = [r for r in report["rows"] if [*map(r.get, KEYS)] != [backend, *call]]
            report["rows"] = [*others, row]
            print(json.dumps(row), flush=True)
            log.write_text(path, json.dumps(report, indent=1) + "\n")
    print(path)


def compiled(backend: str, device: str, dtype: str, widths: list[int]) -> dict:
    """Of each kernel its registers, the bytes that it spills, and whether products wait for each other."""
    import jax
    import jax.numpy as jnp

    from jaxml.attention import flash_attention
    from jaxml.testing import compile_for_gpu

    H, H2 = widths
    shapes = [(2, 4096, 8, H), (2, 4096, 4, H), (2, 4096, 4, H2)]

    def total(*arrays):
        out, lse = flash_attention(*arrays, is_causal=True, implementation=backend, return_residual=True)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]
    _, kernels = compile_for_gpu(jax.grad(total, (0, 1, 2)), arrays, device)
    return {
        part: {"registers": kernel.registers, "spilled": kernel.spilled, "serialized": kernel.serialized}
        for part, name in PARTS.items() for kernel in kernels if kernel.name.startswith(name)
    }  # fmt: skip


def table() -> str:
    """Markdown, of the newest results: bytes that spill, of each kernel in the order of `PARTS`."""
    report = about.newest("gpu-registers")
    widths = sorted({tuple(row["widths"]) for row in report["rows"]})
    said = lambda pair: f"{pair[0]}" if pair[0] == pair[1] else f"{pair[0]} and {pair[1]}"
    lines = [
        f"{about.said(report)}, ptxas {report['assembler']}.", "",
        "| backend | kernels | device | dtype | " + " | ".join(f"width {said(pair)}" for pair in widths) + " |",
        "|---|---|---|---|" + "---|" * len(widths),
    ]  # fmt: skip
    calls = [tuple(map(row.get, KEYS[:3])) for row in report["rows"]]
    for backend, device, dtype in dict.fromkeys(calls):
        here = [row for row, call in zip(report["rows"], calls) if call == (backend, device, dtype)]
        of = {tuple(row["widths"]): row["kernels"] for row in here}
        parts = [part for part in PARTS if any(part in kernels for kernels in of.values())]
        cells = [", ".join(str(of[pair][part]["spilled"]) for part in parts) if pair in of else "–" for pair in widths]
        cells = ["0" if not cell.strip("0, ") else cell for cell in cells]
        cells = [f"`{backend}`", ", ".join(parts), device.split()[-1], dtype, *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
