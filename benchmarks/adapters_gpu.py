"""A step of QLoRA and of LoRA at Llama-3.1-8B's shapes on one GPU: jaxml, peft with bitsandbytes, qwix's products.

    python benchmarks/adapters_gpu.py                    # some 20 minutes on an H100; goes on where it was stopped
    python benchmarks/adapters_gpu.py --methods qlora --ranks 16
    python benchmarks/adapters_gpu.py --size tiny --length 64 --steps 3   # tries the script, also on a CPU
    python benchmarks/adapters_gpu.py --table

Random weights in the real shapes, bfloat16, 2,048 random tokens in a row, rank 16 and 64 on all linear layers, AdamW,
every layer recomputed in the backward pass on all sides. Each row of the table has a process of its own: tokens per
second (median of the steps after warm-up), peak memory of the device, and what was spent before the first step.

jaxml: NF4 as in `quant`, double quantised. peft: transformers' Llama, with bitsandbytes' Linear4bit (double quantised)
for qlora; where bitsandbytes is missing the row says so and has bfloat16 weights. qwix: jaxml's decoder with qwix's NF4
(one float32 scale for 64 weights) and its product, so that what differs is what autodiff keeps.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

import about
import numpy as np

SIDES, METHODS = ("jaxml", "peft", "qwix"), ("qlora", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="8B", choices=["8B", "tiny"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="rows of a step")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure what the newest results have already")
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.child:
        case = json.loads(options.child)
        print("RESULT " + json.dumps({"jaxml": ours, "peft": theirs, "qwix": ours}[case["side"]](case)), flush=True)
        return
    about = _device()
    name = about["device"].lower().replace(" ", "-")
    path = about.RESULTS / f"adapters-gpu-{name}-{datetime.date.today().isoformat()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not options.again else []
    for case in cases(options):
        if any(case.items() <= row.items() for row in rows):
            continue
        rows.append(case | _child(case))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(about | {"rows": rows}, indent=1))
        os.replace(temporary, path)
    print(path)


def cases(options) -> list[dict]:
    """qwix has no kernel for what is not quantised: of LoRA there is jaxml and peft."""
    return [
        dict(
            size=options.size, method=method, rank=rank, batch=batch, side=side, length=options.length,
            steps=options.steps, warm=options.warm,
        )
        for method in options.methods for rank in options.ranks for batch in options.batches
        for side in (SIDES if method == "qlora" and importlib.util.find_spec("qwix") else SIDES[:2])
    ]  # fmt: skip


def _device() -> dict:
    code = "import jax; print('RESULT', jax.devices()[0].device_kind)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    kind = next(x for x in out.splitlines() if x.startswith("RESULT")).removeprefix("RESULT ")
    return {"device": kind} | about.made("torch", "peft", "bitsandbytes", "qwix")


def _child(case: dict) -> dict:
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else str(done.returncode)}
    return json.loads(lines[-1].removeprefix("RESULT "))


def _times(step, case: dict) -> dict:
    """step(tokens [batch, length]) → loss, when it is done."""
    from adapters import LLAMA

    draw = np.random.default_rng(0)
    times, losses = [], []
    for _ in range(case["warm"] + case["steps"]):
        tokens = draw.integers(0, LLAMA[case["size"]][-1], (case["batch"], case["length"])).astype(np.int32)
        started = time.perf_counter()
        losses.append(step(tokens))
        times.append(time.perf_counter() - started)
    measured = times[case["warm"] :]
    found = {"tokens_per_s": case["batch"] * case["length"] / statistics.median(measured), "first_step_s": times[0]}
    return found | {"fastest_s": min(measured), "slowest_s": max(measured), "last_loss": losses[-1]}


# ---- jaxml, and qwix in its decoder --------------------------------------------------------------------


def ours(case: dict) -> dict:
    import jax
    from adapters import _abstract, _batch, _step

    from jaxml.tune.run import begin

    started = time.perf_counter()
    config, shapes = _abstract(case["size"], case["rank"], quantised=case["method"] == "qlora")
    params = _random(shapes)
    if case["side"] == "qwix":
        params = _by_qwix(params)
    _, tx, step, _, _, _ = _step(config, shapes, case["batch"], case["length"], case["batch"])
    from jaxml.tune import adapters

    trainable, frozen = adapters.split(params)
    state = begin(trainable, tx)
    del params, trainable

    def one(tokens):
        nonlocal state
        state, metrics = step(state, frozen, _batch(tokens[None]))
        return float(metrics["loss"])

    built = time.perf_counter() - started
    found = _times(one, case)
    stats = jax.devices()[0].memory_stats() or {}
    return found | {"peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30, "built_s": built}


def _random(shapes):
    """Arrays of those shapes: any codes, small numbers."""
    import jax
    import jax.numpy as jnp

    leaves, treedef = jax.tree.flatten(shapes)

    @jax.jit
    def draw(key):
        out = []
        for i, s in enumerate(leaves):
            of = jax.random.fold_in(key, i)
            if jnp.issubdtype(s.dtype, jnp.integer):
                out.append(jax.random.bits(of, s.shape, s.dtype))
            else:
                out.append((0.02 * jax.random.normal(of, s.shape, s.dtype)).astype(s.dtype))
        return out

    return jax.tree.unflatten(treedef, draw(jax.random.key(0)))


def _by_qwix(params):
    """The quantised matrices in qwix's format, and multiplied by it."""
    import jax
    import qwix

    from jaxml import quant

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Node:
        """A matrix of qwix's where jaxml expects a weight."""

        q: qwix.QArray

        shape = property(lambda self: self.q.qvalue.shape)
        ndim = property(lambda self: self.q.qvalue.ndim)
        astype = lambda self, dtype: self

        def matmul(self, x, transpose=False):
            contract = ((x.ndim - 1,), (1 if transpose else 0,))
            return qwix.dot_general(x, self.q, (contract, ((), ()))).astype(x.dtype)

        def dense(self):
            return qwix.dequantize(self.q)

        def take(self, ids):
            return self.dense()[ids]

    @jax.jit
    def one(w):
        return qwix.quantize(w, "nf4", channelwise_axes=(0, 2), tiled_axes={1: 64})

    def node(w):
        if not isinstance(w, quant.QArray):
            return w
        layers = [jax.tree.map(lambda a, i=i: a[i : i + 1], w).dense() for i in range(w.shape[0])]
        return Node(jax.tree.map(lambda *parts: jax.numpy.concatenate(parts), *[one(layer) for layer in layers]))

    return jax.tree.map(node, params, is_leaf=lambda w: isinstance(w, quant.QArray))


# ---- peft ------------------------------------------------------------------------------------------------


def theirs(case: dict) -> dict:
    import peft
    import torch
    import transformers
    from adapters import LLAMA

    started = time.perf_counter()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    width, layers, heads, hidden, vocabulary = LLAMA[case["size"]]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=min(8, heads), head_dim=128, intermediate_size=hidden, max_position_embeddings=8192,
        rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(where):
        model = transformers.LlamaForCausalLM(config)
    weights = "bfloat16"
    if case["method"] == "qlora":
        weights = "NF4" if importlib.util.find_spec("bitsandbytes") else "bfloat16: bitsandbytes is missing"
        if weights == "NF4":
            _in_four_bits(model, where)
    torch.set_default_dtype(torch.float32)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    about = peft.LoraConfig(r=case["rank"], lora_alpha=case["rank"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, about).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=where == "cuda")
    if where == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def one(tokens):
        ids = torch.from_numpy(tokens).long().to(where)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    built = time.perf_counter() - started
    found = _times(one, case)
    peak = torch.cuda.max_memory_allocated() if where == "cuda" else 0
    return found | {"peak_gib": peak / 2**30, "built_s": built, "weights": weights}


def _in_four_bits(model, where: str) -> None:
    """bitsandbytes' layers in the place of all linear ones but the head."""
    import bitsandbytes as bnb
    import torch

    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                options = dict(quant_type="nf4", compress_statistics=True)
                layer = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta",
                    **options,
                )  # fmt: skip
                weight = child.weight.data.cpu()
                setattr(parent, name, layer)
                del child
                layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(where)
    model.is_loaded_in_4bit = True


# ---- table -----------------------------------------------------------------------------------------------


def table() -> str:
    """Markdown, of the newest results of each device."""
    parts = []
    for device in about.of_devices("adapters-gpu"):
        report = about.newest(device)
        columns = ("method", "rank", "batch", "side", "weights", "tokens_per_s", "peak_gib", "first_step_s", "failed")
        shown = lambda v: "" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
        lines = [[c.replace("_", " ") for c in columns], ["---"] * len(columns)]
        lines += [[shown(row.get(c)) for c in columns] for row in report["rows"]]
        head = f"Llama-3.1-8B's shapes, {report['device']}, {about.said(report)}:"
        parts.append(head + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) or "no results yet"


if __name__ == "__main__":
    main()
