"""Adapters and quantised weights against peft, bitsandbytes and qwix; compiled for TPUs with none at hand.

    python benchmarks/adapters.py                      # a quarter of an hour; needs the extras "oracle" and "tpu"
    python benchmarks/adapters.py --subjects training  # some of training, matmul, many, memory, tpu, schedule
    python benchmarks/adapters.py --table              # the tables of the newest results

training: SmolLM2-135M, 20 steps of 4 × 128 tokens with AdamW from the same adapter (a PEFT folder that both sides
read), rank 8 on all linear layers, float32: losses step by step, tokens per second (the fastest of the steps), peak
memory. Each side and method in a process of its own. qlora is on NF4 weights of the same bytes (peft: bitsandbytes).
matmul: x W of an NF4 matrix and its gradient in x, against the dense product of the same side; ours and bitsandbytes'.
many: a forward pass with 64 adapters in one batch, against one adapter.
memory: temporary memory of a gradient step over eight stacked 1024 × 1024 matrices, ours and qwix's.
tpu: QLoRA steps of Llama-3.1-8B on one v5e chip and of Llama-3.1-70B on a v5e 4×4 slice, compiled: memory by chip.
schedule: x W and its gradient in x, W 4096 × 14336, compiled: cycles of the kernel's static schedule, and what reading
its operands takes at the chip's bandwidth if that is more; beside XLA's estimate of a bfloat16 product likewise.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import os
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

SUBJECTS = ("training", "matmul", "many", "memory", "tpu", "schedule")
METHODS = {"lora": {}, "dora": {"method": "dora"}, "pissa": {"start": "pissa"}, "qlora": {}}
BATCH, LENGTH, STEPS, RANK = 4, 128, 20, 8
RATE = 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.child:
        side, method, folder = options.child
        if side == "schedule":
            print("RESULT " + json.dumps(_schedule(method, Path(folder))))
            return
        print("RESULT " + json.dumps((ours if side == "jaxml" else theirs)(method, Path(folder))))
        return
    import jax

    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = about.RESULTS / f"adapters-{kind}-{datetime.date.today().isoformat()}.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= about.made("torch", "peft", "bitsandbytes", "qwix")
    report["device"] = jax.devices()[0].device_kind
    for subject in options.subjects:
        report[subject] = globals()[subject]()
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(report, indent=1))
        os.replace(temporary, path)
    print(path)


# ---- training ----------------------------------------------------------------------------------------


def training() -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        for method in METHODS:
            found = {side: _child(side, method, folder) for side in ("jaxml", "peft")}
            apart = [abs(a - b) for a, b in zip(found["jaxml"]["losses"], found["peft"]["losses"])]
            row = {"method": method, "largest_loss_difference": max(apart)}
            row |= {"last_loss": found["jaxml"]["losses"][-1]}
            for side, result in found.items():
                row[f"{side}_tokens_per_s"] = BATCH * LENGTH / min(result["times"])
                row[f"{side}_peak_mib"] = result["peak_mib"]
            row["times_as_fast"] = row["jaxml_tokens_per_s"] / row["peft_tokens_per_s"]
            rows.append(row)
            print(row, flush=True)
    return rows


def _prepare(folder: Path) -> None:
    """The model, dense and in NF4, and an adapter for each method."""
    import jax

    from jaxml import lm, quant
    from jaxml.tune import adapters

    model = lm.load("smollm2-135m")
    lm.save(model, folder / "dense")
    small = model.replace(params=quant.quantize_params(model.params, "nf4"))
    lm.save(small, folder / "nf4")
    for method, options in METHODS.items():
        params = adapters.attach(model.params, jax.random.key(0), rank=RANK, **options)
        adapters.save_peft(folder / method, params, model.config, base_model=str(folder / "dense"))


def _child(side: str, method: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--child", side, method, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{side} {method} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def _tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(10, 4000, (STEPS, BATCH, LENGTH)).astype(np.int32)


def _batch(x: np.ndarray) -> dict[str, np.ndarray]:
    """What a step takes, of tokens [1, B, T] that are one text a row."""
    weights = np.ones(x.shape, np.float32)
    weights[..., -1] = 0
    return {
        "tokens": x,
        "targets": np.roll(x, -1, axis=2),
        "weights": weights,
        "segment_ids": np.ones_like(x),
        "positions": np.broadcast_to(np.arange(x.shape[2], dtype=np.int32), x.shape),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(method: str, folder: Path) -> dict:
    import jax

    from jaxml import lm, tune
    from jaxml.lm import decoder
    from jaxml.tune import adapters
    from jaxml.tune.run import begin
    from jaxml.tune.step import make_step, optimizer

    model = lm.load(folder / ("nf4" if method == "qlora" else "dense"))
    config = model.config
    trainable, frozen = adapters.split(adapters.load_peft(folder / method, model.params, config))
    unroll = jax.default_backend() == "cpu"
    if unroll:
        frozen = decoder.unstack(frozen)
    del model
    options = tune.Options(
        batch_size=BATCH, length=LENGTH, schedule="constant", warmup=0.0, clip=None, unroll=unroll, learning_rate=RATE
    )
    tx = optimizer(options, STEPS)
    step = make_step(config, tx, options)
    state, losses, times = begin(trainable, tx), [], []
    for x in _tokens()[:, None]:
        batch = _batch(x)
        started = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - started)
    return {"losses": losses, "times": times, "peak_mib": _peak()}


def theirs(method: str, folder: Path) -> dict:
    import peft
    import torch
    import transformers

    where = "cuda" if torch.cuda.is_available() else "cpu"
    base = folder / ("nf4" if method == "qlora" else "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(where)
    model = peft.PeftModel.from_pretrained(model, folder / method, is_trainable=True).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses, times = [], []
    for x in _tokens():
        ids = torch.from_numpy(x).long().to(where)
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - started)
    return {"losses": losses, "times": times, "peak_mib": _peak()}


# ---- products ----------------------------------------------------------------------------------------


def matmul() -> list[dict]:
    """On a GPU of eight matrices one after the other, so that none stays in the cache."""
    import jax
    import jax.numpy as jnp

    from jaxml import quant
    from jaxml.weights import dot

    gpu = jax.default_backend() == "gpu"
    d, f, copies = (4096, 14336, 8) if gpu else (2048, 2048, 1)
    dtype = jnp.bfloat16 if gpu else jnp.float32
    dense = [0.02 * jax.random.normal(jax.random.key(i), (d, f), dtype) for i in range(copies)]
    small = [quant.nf4.quantize(w) for w in dense]
    forward = jax.jit(lambda xs, ws: [dot(x, w) for x, w in zip(xs, ws)])

    @jax.jit
    def gradient(xs, cts, ws):
        both = [jax.vjp(lambda x, w=w: dot(x, w), x) for x, w in zip(xs, ws)]
        return [(y, *pull(ct)) for (y, pull), ct in zip(both, cts)]

    rows = []
    timed = lambda run, *arguments: _time(lambda: jax.block_until_ready(run(*arguments))) / copies
    for count in (1, 8, 64, 512, 2048):
        draw = lambda seed, size: [
            jax.random.normal(jax.random.key(seed + i), (count, size), dtype) for i in range(copies)
        ]
        xs, cts = draw(100, d), draw(200, f)
        found = {"dense": timed(forward, xs, dense), "nf4": timed(forward, xs, small)}
        row = {"rows": count, "speed": found["dense"] / found["nf4"]}
        row["speed_with_gradient"] = timed(gradient, xs, cts, dense) / timed(gradient, xs, cts, small)
        row |= {"dense_ms": 1e3 * found["dense"], "nf4_ms": 1e3 * found["nf4"]}
        exact = jnp.matmul(xs[0].astype(jnp.float32), small[0].dense().astype(jnp.float32), precision="highest")
        for name in quant.IMPLEMENTATIONS:
            if not quant.explain(xs[0], small[0]).refused.get(name, "").startswith("on GPUs it is taken by name"):
                continue
            named = [quant.with_implementation(q, name) for q in small]
            wrong = jnp.max(jnp.abs(forward(xs, named)[0].astype(jnp.float32) - exact)) / jnp.max(jnp.abs(exact))
            row |= {f"{name}_error": float(wrong), f"{name}_speed": found["dense"] / timed(forward, xs, named)}
        if importlib.util.find_spec("bitsandbytes") is not None:
            row |= _bitsandbytes(count, d, f, copies)
        rows.append(row)
        print(row, flush=True)
    return rows


def _bitsandbytes(count: int, d: int, f: int, copies: int) -> dict:
    import bitsandbytes as bnb
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    dense = [torch.nn.Linear(d, f, bias=False).to(where, dtype) for _ in range(copies)]
    options = dict(bias=False, quant_type="nf4", compute_dtype=dtype, compress_statistics=True)
    small = [bnb.nn.Linear4bit(d, f, **options) for _ in range(copies)]
    for layer, of in zip(small, dense):
        layer.load_state_dict({"weight": of.weight.data.cpu()})
    small = [layer.to(where) for layer in small]
    # With a gradient to come: no rounding to bfloat16 on CPUs.
    x = torch.randn((count, d), dtype=dtype, device=where, requires_grad=True)
    wait = torch.cuda.synchronize if where == "cuda" else lambda: None
    times = {}
    for name, layers in (("dense", dense), ("nf4", small)):
        times[name] = _time(lambda layers=layers: ([layer(x) for layer in layers], wait())) / copies
    return {"bitsandbytes_speed": times["dense"] / times["nf4"], "bitsandbytes_nf4_ms": 1e3 * times["nf4"]}


def _time(call, rounds: int = 15) -> float:
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def many() -> list[dict]:
    import jax
    import jax.numpy as jnp

    from jaxml import lm
    from jaxml.lm import decoder
    from jaxml.tune import adapters

    model = lm.load("smollm2-135m")
    trees = [
        adapters.attach(model.params, jax.random.key(i), rank=RANK, targets=["q", "v"], start="gaussian")
        for i in range(64)
    ]
    rows = []
    run = jax.jit(lambda params, tokens: decoder.hidden(params, model.config, tokens))
    one, stacked = decoder.unstack(trees[0]), decoder.unstack(adapters.stack(trees))
    for length in (1, 16, 64):
        tokens = jnp.ones((64, length), jnp.int32)
        all_ids = [adapters.select(stacked, jnp.arange(64)), adapters.select(stacked, jnp.arange(64)[::-1])]
        alone = _time(lambda: run(one, tokens).block_until_ready(), 9)
        before = run._cache_size()
        together = _time(lambda: run(all_ids[0], tokens).block_until_ready(), 9)
        run(all_ids[1], tokens)
        row = {"rows": 64, "tokens_each": length, "one_s": alone, "sixty_four_s": together, "ratio": together / alone}
        rows.append(row | {"compiled_again": run._cache_size() - before - 1})
        print(rows[-1], flush=True)
    return rows


# ---- memory ------------------------------------------------------------------------------------------


def memory() -> list[dict]:
    import jax
    import jax.numpy as jnp

    from jaxml import quant
    from jaxml.weights import dot

    layers, d, rank = 8, 1024, 4
    w = 0.03 * jax.random.normal(jax.random.key(0), (layers, d, d))
    factors, x = (jnp.zeros((layers, d, rank)), jnp.zeros((layers, rank, d))), jnp.ones((4, d))

    def loss(factors, base, x, product, scan):
        layer = lambda x, part: (jnp.tanh(product(x, part[0]) + (x @ part[1]) @ part[2]), None)
        if scan:
            return jnp.sum(jax.lax.scan(layer, x, (base, *factors))[0] ** 2)
        for i in range(layers):
            x = layer(x, jax.tree.map(lambda a: a[i], (base, *factors)))[0]
        return jnp.sum(x**2)

    subjects = {"jaxml": (quant.nf4.quantize(w), dot)}
    naive = lambda x, q: x @ q.dense()
    subjects["dequantised in the forward pass"] = (subjects["jaxml"][0], naive)
    if importlib.util.find_spec("qwix") is not None:
        from qwix import dot_general, quantize

        subjects["qwix"] = (
            quantize(w, "nf4", channelwise_axes=(0, 2), tiled_axes={1: 64}),
            lambda x, q: dot_general(x, q, (((1,), (0,)), ((), ()))),
        )
    else:
        print("memory: qwix is not installed", flush=True)
    rows = []
    for name, (base, product) in subjects.items():
        row = {"subject": name}
        for scan in (True, False):
            step = jax.jit(jax.grad(functools.partial(loss, product=product, scan=scan)))
            found = step.lower(factors, base, x).compile().memory_analysis()
            row["stacked_layers" if scan else "unrolled_layers"] = found.temp_size_in_bytes / (d * d * 4)
        rows.append(row)
        print(row, flush=True)
    return rows


# ---- compiled for TPUs ---------------------------------------------------------------------------------


# width, layers, heads, hidden, vocabulary
LLAMA = {"8B": (4096, 32, 32, 14336, 128256), "70B": (8192, 80, 64, 28672, 128256), "tiny": (512, 2, 4, 1024, 512)}


def tpu() -> list[dict]:
    rows = [_on_one_chip("8B", length) for length in (2048, 8192)]
    return [*rows, _on_a_slice("70B", 2048)]


def _abstract(size: str, rank: int = 16, quantised: bool = True):
    """(config, shapes of the parameters in NF4 or bfloat16 with LoRAs around all linear layers)."""
    import jax
    import jax.numpy as jnp

    from jaxml.lm import decoder
    from jaxml.lm.config import DecoderConfig
    from jaxml.paths import MATRICES
    from jaxml.quant.qarray import abstract
    from jaxml.tune import adapters

    width, layers, heads, hidden, vocabulary = LLAMA[size]
    config = DecoderConfig(
        family="llama", vocab_size=vocabulary, width=width, num_layers=layers, num_heads=heads,
        num_kv_heads=min(8, heads), head_dim=128, hidden_dim=hidden, max_length=8192, rope_theta=5e5, norm_eps=1e-5,
        bos_id=0, eos_ids=(1,), pad_id=2, tied_embeddings=False,
    )  # fmt: skip
    is_shape = lambda s: isinstance(s, tuple)
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), decoder.shapes(config), is_leaf=is_shape)
    for name in MATRICES if quantised else ():
        tree["layers"][name] = abstract(tree["layers"][name].shape, "nf4", 64, True, -2, "bfloat16")
    return config, jax.eval_shape(lambda p: adapters.attach(p, jax.random.key(0), rank=rank), tree)


def _step(config, params, batch: int, length: int, rows: int):
    """(step, state, frozen, batch) of shapes; `rows` of the batch on a device."""
    import jax
    import jax.numpy as jnp

    from jaxml import tune
    from jaxml.tune import adapters
    from jaxml.tune.run import begin
    from jaxml.tune.step import make_step, optimizer

    options = tune.Options(steps=100, batch_size=rows, length=length, remat=True, dtype="bfloat16")
    tx = optimizer(options, 100)
    trainable, frozen = adapters.split(params)
    state = jax.eval_shape(lambda t: begin(t, tx), trainable)
    of = lambda dtype: jax.ShapeDtypeStruct((1, batch, length), dtype)
    names = ("tokens", "targets", "segment_ids", "positions")
    return options, tx, make_step(config, tx, options), state, frozen, (
        {name: of(jnp.int32) for name in names} | {"weights": of(jnp.float32)}
    )  # fmt: skip


def _report(what: str, compiled, seconds: float) -> dict:
    m, gib = compiled.memory_analysis(), 2**30
    whole = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    row = {"what": what, "arguments_gib": m.argument_size_in_bytes / gib, "temporary_gib": m.temp_size_in_bytes / gib}
    row |= {"in_all_gib": whole / gib, "of_gib": 15.75, "compile_s": seconds}
    print(row, flush=True)
    return row


def _on_one_chip(size: str, length: int) -> dict:
    from jaxml import testing

    config, params = _abstract(size)
    _, _, step, state, frozen, batch = _step(config, params, 1, length, 1)
    started = time.perf_counter()
    compiled = testing.compile_for_tpu(step.__wrapped__, (state, frozen, batch), "v5e", donate=(0,))
    return _report(f"Llama-3.1-{size}, one v5e chip, {length:,} tokens", compiled, time.perf_counter() - started)


def _on_a_slice(size: str, length: int) -> dict:
    """Frozen codes, adapters and moments spread over 16 chips, each with a row of the batch."""
    import jax
    import optax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxml import quant
    from jaxml.target import target
    from jaxml.tune.step import batch_loss

    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = jax.sharding.Mesh(devices, ("data",))
    config, params = _abstract(size)
    options, tx, _, state, frozen, batch = _step(config, params, 16, length, 1)
    frozen, specs = quant.shard(frozen, "data", 16)
    rows, same = PartitionSpec(None, "data"), PartitionSpec()

    def step(state, frozen, batch):
        def loss(trainable, frozen, batch):
            total, count = batch_loss(
                trainable, frozen, jax.tree.map(lambda a: a[0], batch), config=config, options=options
            )
            return jax.lax.psum(total, "data") / jax.lax.psum(count, "data")

        spread = jax.shard_map(loss, mesh=mesh, in_specs=(same, specs, rows), out_specs=same)
        value, grads = jax.value_and_grad(spread)(state.trainable, frozen, batch)
        grads = jax.lax.with_sharding_constraint(grads, jax.tree.map(layers, grads))
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return state._replace(trainable=trainable, opt_state=opt_state, step=state.step + 1), value

    # Adapters of stacked layers: some layers' on each chip, gathered for the step.
    layers = lambda a: NamedSharding(mesh, rows_of if a.ndim and a.shape[0] % 16 == 0 else same)
    rows_of = PartitionSpec("data")
    put = lambda spec: lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
    is_spec = lambda s: isinstance(s, PartitionSpec)
    arguments = (
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layers(a)), state),
        jax.tree.map(lambda s, a: put(s)(a), specs, frozen, is_leaf=is_spec),
        jax.tree.map(put(rows), batch),
    )
    started = time.perf_counter()
    with target("TPU v5e"):
        compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    what = f"Llama-3.1-{size}, v5e 4×4, {length:,} tokens on each chip"
    return _report(what, compiled, time.perf_counter() - started)


# ---- static schedules ----------------------------------------------------------------------------------


CHIPS = {"v5e": (1.5e9, 819e9), "v6e": (1.75e9, 1640e9)}  # cycles and bytes a second


def schedule() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        return [row for chip in CHIPS for row in _child("schedule", chip, Path(folder))]


def _schedule(chip: str, folder: Path) -> list[dict]:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    os.environ["LIBTPU_INIT_ARGS"] = flags + " --xla_jf_emit_annotations=true"  # before libtpu is loaded
    import jax
    import jax.numpy as jnp

    from jaxml import quant, weights
    from jaxml.testing import compile_for_tpu

    D, F = 4096, 14336
    hertz, bandwidth = CHIPS[chip]
    rows = []
    for format in ("nf4", "int8"):
        w = jax.eval_shape(quant.FORMATS[format], jax.ShapeDtypeStruct((D, F), jnp.bfloat16))
        for tokens in (8, 2048):
            for product, inner in (("y", D), ("dx", F)):
                x = jax.ShapeDtypeStruct((tokens, inner), jnp.bfloat16)

                def cycles(w, x=x, transpose=product == "dx"):
                    for path in folder.glob("*"):
                        path.unlink()
                    run = lambda x, w: weights.dot(x, w, transpose)
                    text = compile_for_tpu(run, (x, w), chip).as_text()
                    rest = sum(int(n) for n in re.findall(r'"estimated_cycles":"?(\d+)', text))
                    kernel = max((_of_kernel(path, x, w, chip) for path in _schedules(folder)), default=0)
                    reading = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((x, w))) / bandwidth * hertz
                    return rest + max(kernel, reading) if kernel else max(rest, reading)

                ours, by_xla = cycles(w), cycles(quant.with_implementation(w, "xla"))
                dense = cycles(jax.ShapeDtypeStruct((D, F), jnp.bfloat16))
                row = {"chip": chip, "format": format, "rows": tokens, "product": product, "kernel_kcycles": ours / 1e3}
                row |= {"xla_kcycles": by_xla / 1e3, "bf16_kcycles": dense / 1e3, "of_bf16_speed": dense / ours}
                print(row, flush=True)
                rows.append(row)
    return rows


def _schedules(folder: Path) -> list[Path]:
    found = folder.glob("*quantised_product*final_bundles.txt")
    return [path for path in found if "schedule-analysis" not in path.name]


def _of_kernel(path: Path, x, w, chip: str) -> float:
    """Cycles: the largest stretch on every step of the grid, the others once a tile of the result."""
    from tpu_schedule import stretches

    from jaxml.quant import kernel_tpu
    from jaxml.target import target

    stored, run = w.rows
    with target(f"TPU {chip}"):
        cut = kernel_tpu.cut_of(x, stored, run)
    up = lambda size, piece: -(-size // piece)
    tiles = up(x.shape[0], cut.rows), up(stored, cut.stored), up(run, cut.run)
    results = tiles[0] * (tiles[1] if x.shape[1] == run else tiles[2])
    bundles = [n for depth, n in stretches(path.read_text()) if depth > 0]
    return tiles[0] * tiles[1] * tiles[2] * max(bundles) + results * (sum(bundles) - max(bundles))


# ---- tables ------------------------------------------------------------------------------------------


TITLES = {
    "training": "SmolLM2-135M, 20 steps of 4 × 128 tokens, rank 8 on all linear layers",
    "matmul": "NF4 products, speed of the dense product of the same library",
    "many": "64 adapters in one batch against one",
    "memory": "Temporary memory of a QLoRA gradient step over eight layers, in dequantised layers",
    "tpu": "QLoRA steps compiled for TPUs, rank 16 on all linear layers, memory of a chip",
    "schedule": "Products by a 4096 × 14336 matrix on TPUs, thousands of cycles, static",
}


def table() -> str:
    """Markdown, of the newest results of each subject and device."""
    parts = []
    for device in about.of_devices("adapters"):
        for key, title in TITLES.items():
            if report := about.newest(device, lambda one, key=key: key in one):
                where = f"{report['device']}, {about.said(report)}"
                columns = list(dict.fromkeys(c for row in report[key] for c in row))
                rows = [[_shown(row.get(c)) for c in columns] for row in report[key]]
                head = [c.replace("_", " ") for c in columns]
                lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
                parts.append(f"{title}, {where}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _shown(value) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
