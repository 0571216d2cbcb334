"""The README's table of figures: one line each of the newest results/, rivals beside jaxml.

python benchmarks/headlines.py            # prints it
python benchmarks/headlines.py --write    # puts it and the quickstart's into README.md, between their marks
"""

import argparse
from pathlib import Path

import about

README = Path(__file__).parents[1] / "README.md"
HEADER = """| what | jaxml | beside | times better | script, device, date |
|---|---|---|---|---|"""


def table() -> str:
    """Markdown of all lines."""
    parts = (language_model, adapters, attention, schedules, activations, kan, optimizers, prompts, r_tuning, rag)
    lines = [line for part in parts for line in part()]
    return "\n".join([HEADER, *("| " + " | ".join(line) + " |" for line in lines)])


def language_model():
    report, where = newest("lm-cpu", "lm.py")
    named = {
        "train": "LoRA step of SmolLM2-135M, 4 × 128 tokens",
        "decode_1": "64 greedy tokens, batch 1",
        "decode_8": "64 greedy tokens, batch 8",
    }
    for subject, what in named.items():
        r = report["subjects"][subject]
        ours, theirs = r["seconds"], r["rival_seconds"]
        yield what, f"{ours:.2f} s", f"{r['rival']} {theirs:.2f} s", times(theirs / ours), where


def adapters():
    report, where = newest("adapters-cpu", "adapters.py", holds=lambda report: "training" in report)
    for row in report["training"]:
        (ours, memory), (theirs, rival) = ([row[f"{side}_{k}"] for k in ("tokens_per_s", "peak_mib")] for side in SIDES)
        what = f"{NAMES[row['method']]} on all linear layers, rank 8, losses as peft's; peak of the process"
        better = f"{times(ours / theirs)}, {times(rival / memory)}"
        yield what, f"{ours:.0f} tokens/s, {memory:.0f} MiB", f"peft {theirs:.0f}, {rival:.0f}", better, where
    ours, theirs = (by(report["memory"], subject=name)["stacked_layers"] for name in ("jaxml", "qwix"))
    what = "QLoRA gradients of eight layers: dequantised layers in memory"
    yield what, f"{ours:.2f}", f"qwix {theirs:.1f}", times(theirs / ours), where


SIDES = "jaxml", "peft"
NAMES = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "qlora": "QLoRA"}


def attention():
    for device in ("cpu", "nvidia-h200"):
        report, where = newest(f"attention-{device}", "attention.py")
        for what in ("forward", "gradient"):
            row = by(report["rows"], T=8192, what=what)
            ours = row["seconds"]["jaxml"]
            rivals = {name: s for name, s in row["seconds"].items() if name != "jaxml"}
            beside = ", ".join(f"{name} {ms(s)}" for name, s in rivals.items())
            better = ", ".join(times(s / ours) for s in rivals.values())
            yield f"attention, `blockwise`, causal, 8192 tokens, {what}", ms(ours), beside, better, where
        ours, theirs = row["extra_mib"]["jaxml"], row["extra_mib"]["jax.nn"]
        yield "memory of that gradient", f"{ours:.0f} MiB", f"jax.nn {theirs:.0f} MiB", times(theirs / ours), where


def schedules():
    report, where = newest("tpu-schedule", "tpu_schedule.py", device="compiled")
    for chip, kind in (("v6e", "forward"), ("v6e", "backward"), ("v5e", "backward")):
        here = dict(chip=chip, mask="causal", width=128) | {"pass": kind}
        ours, theirs = (by(report["rows"], subject=s, **here)["bundles"] for s in ("jaxml", "tokamax splash"))
        what = f"attention on TPU {chip}, 4096² causal, width 128, {kind}: bundles of instructions"
        yield what, f"{ours:,}", f"tokamax {theirs:,}", times(theirs / ours), where


def activations():
    report, where = newest("activations-cpu", "activations.py")
    for name in ("mish", "gelu"):
        row = by(report["memory"], name=name, dtype="float32")
        ours, theirs = row["jaxml_mib"], row["jax_nn_mib"]
        what = f"memory of 24 layers of {name} and their gradients"
        yield what, f"{ours:.0f} MiB", f"jax.nn {theirs:.0f}", times(theirs / ours), where


def kan():
    for device, width in (("cpu", 64), ("cpu", 256), ("nvidia-h200", 256)):
        report, where = newest(f"kan-{device}", "kan.py")
        cost = {
            row["subject"]: row["times_dense"] for row in report["layer"] if (row["width"], row["grid"]) == (width, 5)
        }
        rivals = {name: cost[name] for name in ("fast-kan", "efficient-kan", "jaxkan", "pykan") if name in cost}
        what = f"spline layer {width} × {width}, grid 5, with gradients, in dense layers"
        beside = ", ".join(f"{name} {t:.3g}" for name, t in rivals.items())
        better = ", ".join(times(t / cost["jaxml"]) for t in rivals.values())
        yield what, f"{cost['jaxml']:.3g}", beside, better, where
    report, where = newest("kan-cpu", "kan.py")
    ours, theirs = (by(report["symbolic"], subject=s)["seconds"] for s in ("jaxml, first call", "pykan"))
    what = "three edges of a network become named functions, compiling included"
    yield what, f"{ours:.1f} s", f"pykan {theirs:.0f} s", times(theirs / ours), where


def optimizers():
    rows, where = optimizer_rows("bytes")
    theirs = by(rows, what="optax.contrib.galore, rank 1024")["gb"]
    for name, what in (("galore, rank 1024", "rank 1024"), ("galore of int8, rank 1024", "the same, of eight bits")):
        ours, what = by(rows, what=name)["gb"], f"state of GaLore for LLaMA-7B, {what}"
        yield what, f"{ours:.1f} GB", f"optax.contrib.galore {theirs:.1f}", times(theirs / ours), where
    rows, where = optimizer_rows("step")
    ours, theirs = (by(rows, what=name)["total_gb"] for name in ("subspace", "optax.contrib.galore"))
    what = "memory of a training step of LLaMA-1B, `subspace`"
    yield what, f"{ours:.1f} GB", f"optax.contrib.galore {theirs:.1f}", times(theirs / ours), where
    rows, where = optimizer_rows("time")
    speed = lambda name: by(rows, what=name, kind="train step")["tokens_per_s"]
    for name in ("chain(galore, adam)", "subspace"):
        ours, theirs = speed(name), speed("optax.adam")
        what = f"training LLaMA-60M by `{name}`"
        yield what, f"{ours:.0f} tokens/s", f"optax.adam {theirs:.0f}", times(ours / theirs), where


def optimizer_rows(subject: str):
    of = lambda report: [row for row in report["rows"] if row["subject"] == subject]
    report, where = newest("optim-cpu", "optim.py", holds=of)
    return of(report), where


def prompts():
    report, where = newest("prompts-cpu", "prompts.py")
    for choices in (4, 16):
        row = by(report["choices"], prompts=1, choices=choices)
        ours, theirs = row["tree_s"], row["transformers_s"]
        what = f"{choices} answers scored after 200 tokens"
        yield what, f"{ours:.2f} s", f"transformers {theirs:.2f} s", times(theirs / ours), where


def r_tuning():
    report, where = newest("r-tuning-cpu", "r_tuning.py", holds=lambda report: "proof 0" in report)
    runs = [run for name, run in report.items() if name.startswith("proof ")]
    ours, theirs = ([run[key] for run in runs] for key in ("auroc_sure", "auroc_untuned_confidence"))
    mean = lambda values: f"{sum(values) / len(values):.3f}"
    what = f"certainty after R-Tuning: told facts from untold ones, AUROC, {len(runs)} seeds"
    yield what, mean(ours), f"the untuned model's probability {mean(theirs)}", "", where


def rag():
    has = lambda subject: newest("rag-cpu", "rag.py", holds=lambda report: subject in report)
    report, where = has("encoding")
    row = report["encoding"]
    ours, theirs = row["ours_per_s"], row["theirs_per_s"]
    yield (
        "passages made vectors", f"{ours:.0f}/s", f"sentence-transformers {theirs:.0f}/s", times(ours / theirs), where
    )  # fmt: skip
    report, where = has("search")
    for rows in (100_000, 1_000_000):
        row = report["search"][f"{rows} 16"]
        ours, theirs = row["ours_ms"], row["faiss_ms"]
        what = f"exact search of 16 questions among {rows:,} vectors"
        yield what, f"{ours:.0f} ms", f"faiss flat {theirs:.0f} ms", times(theirs / ours), where
    report, where = has("conflict")
    for share, what in (("0.5", "half of them wrong"), ("1.0", "all of them wrong")):
        ours, plain, none = (
            report["conflict"][f"{share} {m}"]["right"] for m in ("astute, scores", "plain", "none, lines")
        )
        what = f"answers from passages, {what}: right, Astute RAG by likelihoods"
        yield what, f"{ours:.0%}", f"plain retrieval {plain:.0%}, none {none:.0%}", "", where


def newest(start: str, script: str, device: str = "", holds=bool):
    """The last results whose name begins so and that hold what is asked for; and what the table says of them."""
    report = about.newest(f"{start}*", holds)
    if report is None:
        raise FileNotFoundError(f"headlines: no results {start}*.json with what the table shows in {about.RESULTS}.")
    return report, f"`{script}`, {device or DEVICES[report['device'].split(',')[0]]}, {report['date']}"


DEVICES = {"cpu": "2-core CPU", "NVIDIA H200": "H200"}


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds > 0.1 else f"{1e3 * seconds:.3g} ms"


def by(rows: list[dict], **wanted) -> dict:
    """The one row with these values."""
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    if not parser.parse_args().write:
        print(table())
        return
    import quickstart

    text = README.read_text()
    for name, made in (("quickstart", quickstart.table()), ("headlines", table())):
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, rest = text.split(begin)
        text = before + begin + made + "\n" + end + rest.split(end)[1]
    README.write_text(text)


if __name__ == "__main__":
    main()
