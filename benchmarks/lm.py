"""Language model against transformers and peft: the same weights, the same device, one run.

    python benchmarks/lm.py                      LoRA training step, greedy decoding, peak memory
    python benchmarks/lm.py --only decode --repeats 5
    python benchmarks/lm.py --table              the table of all results

Each subject runs in a process of its own (peak memory is a process's), ours and theirs alternating, `repeats`
times; the medians and all single times go to benchmarks/results/. Needs the extra "oracle".
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import about
import numpy as np

BATCH, LENGTH, NEW, PROMPT, RANK = 4, 128, 64, 16, 8
TARGETS = ("q", "v")  # peft's default for Llama
SUBJECTS = {
    "train": ("jaxml", "peft"),
    "train_responses": ("jaxml", "peft"),
    "decode_1": ("jaxml", "transformers"),
    "decode_8": ("jaxml", "transformers"),
}
RATIO_AIMS = {"train": 1.1, "decode_1": 2.5, "decode_8": 2.5}


def main() -> None:
    options = arguments()
    if options.child:
        print("RESULT " + json.dumps(run(options.child, options.model, options.warm)))
        return
    if options.table:
        print(table())
        return
    with tempfile.TemporaryDirectory() as folder:
        from jaxml import lm

        model = str(lm.save(lm.load(options.model), Path(folder) / "model"))
        measured: dict[str, dict[str, list]] = {}
        for subject, sides in SUBJECTS.items():
            if options.only and not subject.startswith(options.only):
                continue
            measured[subject] = {side: [] for side in sides}
            for _ in range(options.repeats):
                for side in sides:
                    result = child(f"{subject}:{side}", model, options.warm)
                    measured[subject][side].append(result)
                    print(
                        f"{subject:16} {side:13} {result['seconds']:.3f} s, peak {result['peak_mib']:.0f} MiB",
                        flush=True,
                    )
    report = summary(measured)
    device_name = re.sub(r"[^a-z0-9]+", "-", report["device"].lower())
    name = f"lm-{device_name}-{report['date']}.json"
    about.RESULTS.mkdir(exist_ok=True)
    (about.RESULTS / name).write_text(json.dumps(report, indent=1))
    for subject, row in report["subjects"].items():
        print(f"{subject:16} {row['ratio']:.2f} times as fast, {row['memory_ratio']:.2f} of the memory")
    print(about.RESULTS / name)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each side")
    parser.add_argument("--warm", type=int, default=3, help="timed calls in each process, after one that is not")
    parser.add_argument("--only", help="subjects that begin with this")
    parser.add_argument("--table", action="store_true", help="print the table of all results and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(what: str, model: str, warm: int) -> dict:
    command = [sys.executable, __file__, "--child", what, "--model", model, "--warm", str(warm)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def run(what: str, model: str, warm: int) -> dict:
    """One subject in this process: seconds of the fastest of `warm` calls, and the process's peak memory."""
    subject, side = what.split(":")
    call, value = {
        ("train", "jaxml"): our_train,
        ("train", "peft"): their_train,
        ("decode", "jaxml"): our_decode,
        ("decode", "transformers"): their_decode,
    }[subject.split("_")[0], side](model, subject)
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    times = []
    for _ in range(warm):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": min(times),
        "times": times,
        "first": first,
        "peak_mib": peak,
        "value": value(),
        "device": device(side),
    }


def tokens(shape) -> np.ndarray:
    return np.random.default_rng(0).integers(10, 4000, shape).astype(np.int32)


def learnt(subject: str) -> np.ndarray:
    """Which targets count: all, or the last quarter of each row (a response)."""
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[:, -1] = 0  # has no next token
    if subject == "train_responses":
        weights[:, : 3 * LENGTH // 4] = 0
    return weights


def our_train(model: str, subject: str):
    import jax

    from jaxml import lm, tune
    from jaxml.lm import decoder
    from jaxml.tune import adapters
    from jaxml.tune.run import begin
    from jaxml.tune.step import make_step, optimizer

    loaded = lm.load(model)
    config = loaded.config
    trainable, frozen = adapters.split(adapters.attach(loaded.params, jax.random.key(0), rank=RANK, targets=TARGETS))
    unroll = jax.default_backend() == "cpu"
    options = tune.Options(batch_size=BATCH, length=LENGTH, schedule="constant", warmup=0.0, clip=None, unroll=unroll)
    if unroll:  # what fit(...) does with unroll=True; the stacked copy is let go
        frozen = decoder.unstack(frozen)
        loaded = None
    tx, x = optimizer(options, 100), tokens((1, BATCH, LENGTH))
    step = make_step(config, tx, options)
    batch = {
        "tokens": x,
        "targets": np.roll(x, -1, axis=2),
        "weights": learnt(subject)[None],
        "segment_ids": np.ones_like(x),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), x.shape),
    }
    holder = {"state": begin(trainable, tx), "losses": []}

    def call():
        holder["state"], metrics = step(holder["state"], frozen, batch)
        holder["losses"].append(float(metrics["loss"]))

    return call, lambda: holder["losses"][0]


def their_train(model: str, subject: str):
    import peft
    import torch
    import transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(where)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[f"{t}_proj" for t in TARGETS])
    loaded = peft.get_peft_model(loaded, config)
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    x = torch.from_numpy(tokens((BATCH, LENGTH))).long().to(where)
    counts = torch.from_numpy(np.roll(learnt(subject), 1, axis=1)).to(where)  # labels are shifted inside
    labels = torch.where(counts > 0, x, -100)
    losses = []

    def call():
        loss = loaded(input_ids=x, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return call, lambda: losses[0]


def our_decode(model: str, subject: str):
    import jax
    import jax.numpy as jnp

    from jaxml import lm
    from jaxml.lm import cache as caches
    from jaxml.lm import decoder
    from jaxml.lm.generate import decode, prefill, start

    loaded, batch = lm.load(model), int(subject.split("_")[1])
    config, params = loaded.config, loaded.params
    if jax.default_backend() == "cpu":  # what generate(..., unroll=True) does; the stacked copy is let go
        params = decoder.unstack(params)
        loaded = None
    x = tokens((batch, PROMPT))
    positions = np.broadcast_to(np.arange(PROMPT, dtype=np.int32), x.shape)
    keys = jax.random.split(jax.random.key(0), batch)
    out = {}

    def call():
        cache = caches.init(config, batch, PROMPT + NEW, params["embed"].dtype)
        logits, cache = prefill(params, config, x, positions, cache)
        state = start(logits, cache, jnp.asarray(x), jnp.asarray(positions), keys, lm.Sampling())
        out["tokens"], _ = decode(params, config, state, steps=NEW)
        out["tokens"].block_until_ready()

    return call, lambda: np.asarray(out["tokens"]).tolist()


def their_decode(model: str, subject: str):
    import torch
    import transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(where)
    x = torch.from_numpy(tokens((int(subject.split("_")[1]), PROMPT))).long().to(where)
    out = {}

    def call():
        with torch.no_grad():
            out["tokens"] = loaded.generate(
                x,
                attention_mask=torch.ones_like(x),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[:, PROMPT:]

    return call, lambda: out["tokens"].cpu().tolist()


def device(side: str) -> str:
    if side == "jaxml":
        import jax

        kind = jax.devices()[0].device_kind
        return f"{kind}, {os.cpu_count()} cores" if kind == "cpu" else kind
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"


def summary(measured) -> dict:

    rows = {}
    for subject, sides in measured.items():
        (ours, theirs) = sides.values()
        median = lambda runs, key: statistics.median(r[key] for r in runs)
        rows[subject] = {
            "rival": list(sides)[1],
            "seconds": median(ours, "seconds"),
            "rival_seconds": median(theirs, "seconds"),
            "ratio": median(theirs, "seconds") / median(ours, "seconds"),
            "aim": RATIO_AIMS.get(subject),
            "peak_mib": median(ours, "peak_mib"),
            "rival_peak_mib": median(theirs, "peak_mib"),
            "memory_ratio": median(ours, "peak_mib") / median(theirs, "peak_mib"),
            "first_call_seconds": median(ours, "first"),
            "same_result": agree(ours[0]["value"], theirs[0]["value"]),
            "runs": {side: [r["times"] for r in runs] for side, runs in sides.items()},
        }
    return {
        **about.made("torch", "transformers", "peft"),
        "device": next(iter(measured.values()))["jaxml"][0]["device"],
        "machine": platform.machine(),
        "subjects": rows,
    }


def agree(ours, theirs) -> float:
    """Share of equal tokens, or the difference of the two losses."""
    if isinstance(ours, float):
        return abs(ours - theirs)
    return float(np.mean(np.array(ours) == np.array(theirs)))


HEADER = """| device, date | subject | jaxml | rival | times as fast | aim | peak MiB | rival |
|---|---|---|---|---|---|---|---|"""


def table() -> str:
    """Markdown of every results file, newest last."""
    files = sorted(about.RESULTS.glob("lm-*.json"))
    said = [f"{about.said(json.loads(path.read_text()))}." for path in files]
    return "\n".join([HEADER, *(line for path in files for line in rows(path)), "", *said])


def rows(path: Path) -> list[str]:
    """One line a subject of a results file."""
    report = json.loads(path.read_text())
    lines = []
    for name, r in report["subjects"].items():
        aim = "" if r["aim"] is None else f"{r['aim']:.1f}"
        lines.append(
            f"| {report['device']}, {report['date']} | {name} | {r['seconds']:.2f} s | {r['rival']} "
            f"{r['rival_seconds']:.2f} s | {r['ratio']:.2f} | {aim} | {r['peak_mib']:.0f} | {r['rival_peak_mib']:.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
