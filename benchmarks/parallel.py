"""Training on meshes of 8 simulated devices beside one: the same numbers, what each device holds, what they send.

    python benchmarks/parallel.py            # ten minutes on CPU
    python benchmarks/parallel.py --table    # the tables of the newest results

numbers: a Llama of width 64, 20 steps of 8 × 32 tokens by each method on each mesh, in float32: the largest difference
of a loss and of a trained number from one device's. "rows in halves" is one device too, which sums each batch's rows in
two parts: what the order of a sum does by itself.
memory: bytes that the compiled step takes on one device of a Llama of width 512 (8 layers), and the bytes that devices
send each other in a step, by kind, as often as loops turn.
"""

import argparse
import json
import os
import tempfile

import about

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

METHODS = ("full", "lora", "qlora", "galore", "eight_bit")
MESHES = (
    "rows in halves", "data=8", "fsdp=8", "tensor=8", "context=8", "data=2,fsdp=4", "tensor=4,fsdp=2",
    "context=4,data=2", "data=2,fsdp=2,tensor=2", "context=2,fsdp=2,tensor=2",
)  # fmt: skip
OPTIONS = dict(steps=20, length=32, learning_rate=1e-3, warmup=0.1)
EXAMPLES = [{"prompt": f"say {i} ", "response": "abcdefgh"[i % 8 :] + " x" * (i % 5)} for i in range(64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    if parser.parse_args().table:
        print(table())
        return

    report = {**about.made(), "numbers": numbers(), "memory": memory()}
    (about.RESULTS / f"parallel-cpu-{report['date']}.json").write_text(json.dumps(report, indent=1))


def start(method: str, **fields):
    """(model with what is trained on it, what goes around AdamW)."""
    import jax

    from jaxml import optim, quant
    from jaxml.testing import tiny_model
    from jaxml.tune import adapters

    model = tiny_model(**fields)
    params = quant.quantize_params(model.params, "nf4") if method == "qlora" else model.params
    if method in ("lora", "qlora"):
        params = adapters.attach(params, jax.random.key(1), rank=4)
    around = {"galore": lambda a: optim.galore(a, rank=8, gap=5), "eight_bit": optim.eight_bit}
    return model.replace(params=params), around.get(method, lambda a: a)


def trained(method: str, mesh: str | None):
    import jax
    import numpy as np

    from jaxml import log, parallel, tune
    from jaxml.tune import adapters

    model, around = start(method, width=64, num_heads=8, num_kv_heads=8, hidden_dim=128)
    halves = mesh == "rows in halves"
    options = tune.Options(**OPTIONS, batch_size=4 if halves else 8, accumulate=2 if halves else 1)
    on = None if mesh is None or halves else parallel.parse(mesh)
    with tempfile.TemporaryDirectory() as folder:
        tx = lambda steps: tune.optimizer(options, steps, around=around)
        tuned, _ = tune.fit(model, EXAMPLES, options, tx=tx, mesh=on, folder=folder, progress=False)
        losses = [row["loss"] for row in log.read(f"{folder}/log.jsonl") if "loss" in row]
    leaves = jax.tree.leaves(adapters.split(tuned.params)[0])
    return np.array(losses), np.concatenate([np.asarray(a).ravel() for a in leaves])


def numbers() -> list[dict]:
    rows = []
    for method in METHODS:
        losses, weights = trained(method, None)
        for mesh in MESHES:
            other_losses, others = trained(method, mesh)
            apart = abs(weights - others)
            rows.append({"method": method, "mesh": mesh, "loss": float(abs(losses - other_losses).max()),
                         "trained": float(apart.max()), "beyond_1e-5": float((apart > 1e-5).mean())})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def memory() -> list[dict]:
    import jax
    import numpy as np

    from jaxml import parallel, tune
    from jaxml.parallel.program import Program
    from jaxml.tune import adapters
    from jaxml.tune.place import begun, for_training
    from jaxml.tune.step import make_step

    size = dict(width=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, hidden_dim=2048, vocab_size=2048)
    rows = []
    for method in METHODS:
        for mesh in (None, *[m for m in MESHES if m != "rows in halves"]):
            model, around = start(method, **size)
            options = tune.Options(**OPTIONS | {"length": 128}, batch_size=8)
            tx = tune.optimizer(options, 20, around=around)
            on = None if mesh is None else parallel.parse(mesh)
            state, frozen, shardings, place = begun(*for_training(*adapters.split(model.params), options), tx, on)
            names = ("tokens", "targets", "segment_ids", "positions")
            batch = {name: np.ones((1, 8, 128), np.int32) for name in names}
            batch = place(batch | {"weights": np.ones((1, 8, 128), np.float32)})
            step = make_step(model.config, tx, options, shardings)
            if on is None:
                compiled = step.lower(state, frozen, batch).compile()
            else:
                with jax.set_mesh(on):
                    compiled = step.lower(state, frozen, batch).compile()
            m, sent = compiled.memory_analysis(), {}
            for c in Program(compiled.as_text()).collectives():
                sent[c.kind] = sent.get(c.kind, 0) + c.times * c.bytes
            rows.append({"method": method, "mesh": mesh or "one device", "held": m.argument_size_in_bytes,
                         "temporary": m.temp_size_in_bytes, "sent": sent})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def table() -> str:
    """Markdown of the newest results."""
    report = about.newest("parallel-cpu")
    where = f"8 simulated devices on a CPU, {about.said(report)}"
    grid = lambda rows, of: [f"| {row} | {' | '.join(of[row, column] for column in METHODS)} |" for row in rows]
    head = [f"| | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    cells = {
        (r["mesh"], r["method"]): f"{r['loss']:.0e} / {r['trained']:.0e}"
        + (f" ({r['beyond_1e-5']:.1%} beyond 1e-5)" if r["trained"] > 1e-5 else "")
        for r in report["numbers"]
    }
    first = [f"Largest difference from one device, of a loss / of a trained number, {where}:", "", *head]
    mib = lambda n: f"{n / 2**20:.1f}"
    held = {
        (r["mesh"], r["method"]): f"{mib(r['held'])} + {mib(r['temporary'])}, sends {mib(sum(r['sent'].values()))}"
        for r in report["memory"]
    }
    second = [f"MiB on one device, held + temporary, and what a step sends, {where}:", "", *head]
    meshes = list(dict.fromkeys(r["mesh"] for r in report["memory"]))
    return "\n".join([*first, *grid(MESHES, cells), "", *second, *grid(meshes, held)])


if __name__ == "__main__":
    main()
