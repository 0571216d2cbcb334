"""How the extra memory of attention grows with the length: what the compilers plan, nothing is run.

    python benchmarks/attention_memory.py
    python benchmarks/attention_memory.py --picture        # the picture of the newest results

Memory beside arguments and results, of forward pass and gradient, causal: on CPU (4 heads of 64, float32) for jaxml's
blockwise backend and jax.nn, on a TPU v6e (4 heads of 128, bfloat16, arrays with heads first) for jaxml's kernels.
Needs libtpu (`pip install "jaxml[tpu]"`), and no TPU.
"""

import argparse
import json
import math
from pathlib import Path

import about
import jax
import jax.numpy as jnp

from jaxml.attention import flash_attention
from jaxml.testing import compile_for_tpu

HEADS = 4
LENGTHS = {
    "jaxml, CPU": [2**n for n in range(10, 18)],
    "jax.nn, CPU": [2**n for n in range(10, 16)],
    "jaxml, TPU v6e": [2**n for n in range(10, 21, 2)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", action="store_true", help="draw the newest results and stop")
    if parser.parse_args().picture:
        print(picture().name)
        return
    rows = []
    for subject, lengths in LENGTHS.items():
        for what in ("forward", "gradient"):
            for T in lengths:
                rows.append({"subject": subject, "what": what, "T": T, "extra_bytes": extra(subject, what, T)})
                print(f"{subject:15} {what:9} {T:8} {rows[-1]['extra_bytes'] / 2**20:10.1f} MiB", flush=True)
    report = {**about.made("libtpu"), "rows": rows}
    (about.RESULTS / f"attention-memory-{report['date']}.json").write_text(json.dumps(report, indent=1))
    print(picture().name)


def extra(subject: str, what: str, T: int) -> int:
    """Bytes beside arguments and results."""
    tpu = "TPU" in subject
    turn = (lambda a: a.swapaxes(1, 2)) if tpu else lambda a: a
    ours = lambda q, k, v: flash_attention(q, k, v, is_causal=True)
    theirs = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    attend = ours if subject.startswith("jaxml") else theirs
    turned = lambda *a: turn(attend(*map(turn, a)))
    call = turned if what == "forward" else lambda q, k, v, ct: jax.vjp(turned, q, k, v)[1](ct)
    shape = (1, HEADS, T, 128) if tpu else (1, T, HEADS, 64)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16 if tpu else jnp.float32)] * (3 if what == "forward" else 4)
    compiled = compile_for_tpu(call, arguments, "v6e") if tpu else jax.jit(call).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def picture() -> Path:
    """Extra memory over the length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = about.newest("attention-memory")["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, what in zip(axes, ("forward", "gradient")):
        for subject, marker in zip(LENGTHS, "os^"):
            here = [(r["T"], r["extra_bytes"] / 2**20) for r in rows if (r["subject"], r["what"]) == (subject, what)]
            here = [(T, max(mib, 0.01)) for T, mib in here]  # a logarithmic axis has no zero
            axis.loglog(*zip(*here), base=2, marker=marker, label=subject)
        axis.set_title(f"{what}, causal, {HEADS} heads")
        axis.set_xlabel("T (tokens)")
        ticks = range(int(math.log2(min(LENGTHS["jaxml, CPU"]))), 21, 2)
        axis.set_xticks([2**n for n in ticks], [f"{2**n // 1024}k" for n in ticks])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("extra memory (MiB)")
    axes[0].legend()
    path = about.RESULTS / "attention-memory.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
