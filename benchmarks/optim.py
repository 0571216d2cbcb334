"""Optimizers of low rank and of few bits: bytes of state, memory of a step, cost of a refresh, compiling, running.

    python benchmarks/optim.py                       # everything that this machine can do
    python benchmarks/optim.py --subjects bytes step
    python benchmarks/optim.py --table               # the tables of the newest results

bytes    optimizer state of LLaMA-7B's shapes: exact on any machine, nothing is made
step     a whole jitted train step of LLaMA-1B's shapes (stacked, remat, float32, 1 × 256 tokens): arguments and
         temporary memory as the compiler plans them
refresh  one refresh of a basis against a singular value decomposition: time, and energy captured, on gradients of
         SmolLM2
compile  seconds to trace and compile a train step of LLaMA-60M's shapes, layers stacked and apart, against Adam's
time     seconds of an optimizer step, and tokens per second of a train step, against Adam, optax.contrib.galore and
         (where torch sees the device) the reference's algorithm in torch
tpu      a full-parameter step of LLaMA-7B compiled for one chip: v6e with 8-bit GaLore and subspace gradients, v5e with
         int8 weights as well; needs libtpu, and no TPU
"""

import argparse
import datetime
import functools
import json
import statistics
import time
from pathlib import Path

import about
import jax
import jax.numpy as jnp
import optax

from jaxml import optim
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.optim import basis, galore, packed, subspace
from jaxml.testing import compile_for_tpu
from jaxml.tune.loss import cross_entropy

TARGETS = r"layers/(q|k|v|o|gate|up|down)$"
SIZES = {  # width, hidden_dim, layers, heads: the configurations of the GaLore paper
    "60M": (512, 1376, 8, 8),
    "130M": (768, 2048, 12, 12),
    "350M": (1024, 2736, 24, 16),
    "1B": (2048, 5461, 24, 32),
    "7B": (4096, 11008, 32, 32),
}
AIMS = {
    ("bytes", "galore, rank 1024"): 0.30,
    ("bytes", "galore, rank 256"): 0.11,
    ("bytes", "galore of int8, rank 1024"): 0.08,
    ("step", "subspace"): 0.47,
    ("step", "subspace, basis of int8"): 0.47,
    ("compile", "chain(galore, adam)"): 1.3,
    ("refresh", "times"): 20.0,
    ("time", "chain(galore, adam)", "optimizer step"): 1.10,  # on a GPU
    ("time", "subspace", "train step"): 1.15,  # on a GPU
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--size", choices=SIZES, help="of the models that `time` runs (60M on CPU, 1B elsewhere)")
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table())
        return
    device = jax.devices()[0]
    kind = device.device_kind.lower().replace(" ", "-")
    path = about.RESULTS / f"optim-{kind}-{datetime.date.today().isoformat()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for subject in arguments.subjects:
        rows = [row for row in rows if row["subject"] != subject]
        for row in SUBJECTS[subject](arguments):
            rows.append({"subject": subject, **row})
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        report = {"device": device.device_kind} | about.made("optax", "torch")
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report | {"rows": rows}, indent=1))
        part.replace(path)


# ---- the models -------------------------------------------------------------------------------------


def config_of(size: str) -> DecoderConfig:
    width, hidden, layers, heads = SIZES[size]
    return DecoderConfig(
        family="llama", vocab_size=32000, width=width, num_layers=layers, num_heads=heads, num_kv_heads=heads,
        head_dim=width // heads, hidden_dim=hidden, max_length=2048, tied_embeddings=False, bos_id=1, eos_ids=(2,),
        pad_id=0,
    )  # fmt: skip


def shapes_of(size: str, dtype=jnp.float32):
    is_shape = lambda s: isinstance(s, tuple)
    shapes = decoder.shapes(config_of(size))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=is_shape)


def loss_of(size: str):
    config = config_of(size)

    def loss(params, tokens):
        x = decoder.hidden(params, config, tokens, remat=True)
        targets, weights = jnp.roll(tokens, -1, axis=1), jnp.ones(tokens.shape).at[:, -1].set(0.0)
        total, count = cross_entropy(x, decoder.head(params), targets, weights)
        return total / count

    return loss


def nbytes(tree) -> float:
    """As the device holds them: two int4 in a byte."""
    half = lambda a: a.size * (0.5 if "int4" in str(a.dtype) else a.dtype.itemsize)
    return float(sum(map(half, jax.tree.leaves(tree))))


def contrib(rank: int, rate: float = 1e-3):
    return optax.contrib.galore(rate, rank=rank, update_proj_gap=200)


def chained(rank: int, rate: float = 1e-3, **options):
    return optax.chain(galore(rank=rank, targets=TARGETS, **options), optim.adam(rate))


# ---- subjects ---------------------------------------------------------------------------------------


def state_bytes(_):
    params = shapes_of("7B")
    rivals = {
        "optax.adam": optax.adam(1e-3),
        "optax.contrib.galore, rank 1024": contrib(1024),
        "galore, rank 1024": chained(1024),
        "galore, rank 256": chained(256),
        "adam8bit": optim.adam8bit(1e-3),
        "galore of int8, rank 1024": galore(optim.adam8bit(1e-3), rank=1024, targets=TARGETS, basis_dtype="int8"),
        "apollo-mini": galore(optax.adam(1e-3), targets=TARGETS, mode="apollo-mini"),
    }
    adam = None
    for name, tx in rivals.items():
        size = nbytes(jax.eval_shape(tx.init, params))
        adam = adam or size
        yield {"what": name, "gb": size / 1e9, "of_adam": size / adam}


def step_memory(_):
    size, rank = "1B", 512
    params, loss = shapes_of(size), loss_of(size)
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def plain(tx):
        def step(params, state, tokens):
            value, grads = jax.value_and_grad(loss)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return tx.init, step

    def low(method):
        def step(params, state, tokens):
            value, grads = method.value_and_grad(loss)(params, state, tokens)
            return *method.update(grads, state, params), value

        return method.init, step

    method, small = (
        subspace(optax.adam(1e-3), rank=rank, targets=TARGETS, basis_dtype=dtype) for dtype in ("float32", "int8")
    )
    steps = {
        "optax.adam": plain(optax.adam(1e-3)),
        "optax.contrib.galore": plain(contrib(rank)),
        "chain(galore, adam)": plain(chained(rank)),
        "subspace": low(method),
        "subspace, basis of int8": low(small),
        "subspace, the refresh": (method.init, lambda p, s, t: (p, method.refresh(loss)(p, s, t))),
    }
    adam = None
    for name, (init, step) in steps.items():
        state = jax.eval_shape(init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
        memory = compiled.memory_analysis()
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        adam = adam or total
        gb = {"arguments_gb": memory.argument_size_in_bytes / 1e9, "temporary_gb": memory.temp_size_in_bytes / 1e9}
        yield {"what": name, **gb, "total_gb": total / 1e9, "of_adam": total / adam}


def refreshes(_):
    """Gradients of one layer's matrix on successive small batches; every basis starts from that of the batch before."""
    for name, gradients, rank in real_gradients():
        step = jax.jit(basis.power)
        exact = jax.jit(functools.partial(basis.svd, rank=rank))
        p = exact(gradients[0])
        shares = []
        for g in gradients[1:]:
            p = step(g, p)
            shares.append(float(basis.captured(g, p) / basis.captured(g, exact(g))))
        g = gradients[-1]
        ours, theirs = (fastest(lambda f=f: jax.block_until_ready(f())) for f in (lambda: step(g, p), lambda: exact(g)))
        yield {
            "what": name, "shape": list(g.shape), "rank": rank, "power_s": ours, "svd_s": theirs,
            "times": theirs / ours, "captured_of_svd": statistics.mean(shares),
        }  # fmt: skip


def real_gradients():
    """(name, gradients [m, n] with m ≤ n, rank)."""
    from jaxml import lm

    model = lm.load("smollm2-135m")
    text = (Path(decoder.__file__).read_text() + Path(__file__).read_text()) * 2
    ids = model.tokenizer.encode(text)
    rows = [jnp.asarray(ids[n * 1024 : (n + 1) * 1024]).reshape(4, 256) for n in range(8)]

    def loss(w, name, tokens):
        params = model.params | {"layers": model.params["layers"] | {name: w}}
        logits = decoder.apply(params, model.config, tokens, remat=True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    for name in ("q", "up"):
        stacks = [grad(model.params["layers"][name].astype(jnp.float32), name, tokens) for tokens in rows]
        yield f"SmolLM2 {name}, layer 15", [s[15] for s in stacks], 144
    rng = jax.random.split(jax.random.key(0), 2 + len(rows))
    m, n = SIZES["350M"][0], SIZES["350M"][1]
    u, v = (jnp.linalg.qr(jax.random.normal(k, (d, m)))[0] for k, d in zip(rng, (m, n)))
    drawn = [(u * jnp.arange(1.0, m + 1) ** -1.0) @ v.T + 1e-5 * jax.random.normal(k, (m, n)) for k in rng[2:]]
    yield "spectrum 1/k, nearly still", drawn, m // 4


def compiling(_):
    params, loss = shapes_of("60M"), loss_of("60M")
    layers = params["layers"]
    number = SIZES["60M"][2]
    apart = tuple({k: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for k, a in layers.items()} for _ in range(number))
    trees = {"stacked": params, "layers apart": params | {"layers": apart}}
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    patterns = dict(targets=r"/(q|k|v|o|gate|up|down)$")
    rivals = {
        "optax.adam": lambda: optax.adam(1e-3),
        "optax.contrib.galore": lambda: contrib(128),
        "chain(galore, adam)": lambda: optax.chain(galore(rank=128, **patterns), optim.adam(1e-3)),
    }
    for form, tree in trees.items():
        adam = None
        for name, make in rivals.items():
            tx = make()

            def step(params, state, tokens, tx=tx):
                value, grads = jax.value_and_grad(loss)(params, tokens)
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state, value

            state = jax.eval_shape(tx.init, tree)

            def compile_it(step=step, state=state, tree=tree):
                jax.clear_caches()
                jax.jit(step).lower(tree, state, tokens).compile()

            seconds = fastest(compile_it, 2)
            adam = adam or seconds
            yield {"what": name, "form": form, "seconds": seconds, "of_adam": seconds / adam}


def timing(arguments):
    on_cpu = jax.default_backend() == "cpu"
    size = arguments.size or ("60M" if on_cpu else "1B")
    width = SIZES[size][0]
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    like, loss = shapes_of(size, dtype), loss_of(size)
    batch = (1, 256) if on_cpu else (16, 1024)
    tokens = jax.random.randint(jax.random.key(0), batch, 0, 32000)
    make = lambda: decoder.init(jax.random.key(0), config_of(size), dtype)
    rank = width // 4
    grads = jax.tree.map(lambda a: 1e-3 * jax.random.normal(jax.random.key(1), a.shape, a.dtype), like)
    rivals = {
        "optax.adam": optax.adam(1e-3),
        "chain(galore, adam)": chained(rank),
        "galore of int8": galore(optim.adam8bit(1e-3), rank=rank, targets=TARGETS, basis_dtype="int8"),
        "adam8bit": optim.adam8bit(1e-3),
        "optax.contrib.galore": contrib(rank),
    }
    steps = 20 if on_cpu else 400  # of ours at least two turns of every matrix with gap 200; contrib pays in step 0
    adam = None
    for name, tx in rivals.items():
        params = make()
        state = jax.jit(tx.init)(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def run(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        seconds, params, state = per_step(run, params, state, grads, steps)
        adam = adam or seconds
        yield {"what": name, "size": size, "kind": "optimizer step", "seconds": seconds, "of_adam": seconds / adam}
        del params, state
    method = subspace(optax.adam(1e-3), rank=rank, targets=TARGETS)
    adam = None
    for name in ("optax.adam", "chain(galore, adam)", "subspace"):
        params = make()
        tx = rivals.get(name)
        state = jax.jit((tx or method).init)(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, tokens, tx=tx):
            if tx is None:
                _, grads = method.value_and_grad(loss)(params, state, tokens)
                return method.update(grads, state, params)
            grads = jax.grad(loss)(params, tokens)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        seconds, params, state = per_step(step, params, state, tokens, 5 if on_cpu else 40)
        speed = tokens.size / seconds
        adam = adam or speed
        yield {"what": name, "size": size, "kind": "train step", "tokens_per_s": speed, "of_adam": speed / adam}
        del params, state
    yield from in_torch(size, rank, dtype)


def per_step(run, params, state, last, steps: int):
    params, state = jax.block_until_ready(run(params, state, last))
    start = time.perf_counter()
    for _ in range(steps):
        params, state = run(params, state, last)
    jax.block_until_ready((params, state))
    return (time.perf_counter() - start) / steps, params, state


def in_torch(size: str, rank: int, dtype):
    """The reference's algorithm (projection of every matrix, Adam on it, an SVD every 200 steps) and Adam, in torch."""
    try:
        import torch
    except ImportError:
        return
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    if device == "cpu" and jax.default_backend() != "cpu":
        return
    kind = torch.float32 if dtype == jnp.float32 else torch.bfloat16
    shapes = [(leaf.shape, jax.tree_util.keystr(path)) for path, leaf in jax.tree.leaves_with_path(shapes_of(size))]
    flat = []
    for shape, path in shapes:
        is_target = len(shape) == 3
        flat += [(shape[1:], is_target)] * shape[0] if "layers" in path else [(shape, False)]
    make = lambda: [(torch.randn(s, device=device, dtype=kind) * 0.02, t) for s, t in flat]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    params = [w.requires_grad_() for w, _ in make()]
    for w in params:
        w.grad = torch.randn_like(w) * 1e-3
    adam = torch.optim.Adam(params, 1e-3, fused=True)
    torch_adam = timed_torch(adam.step, wait)
    row = {"size": size, "kind": "optimizer step"}
    yield row | {"what": "torch.optim.Adam, fused", "seconds": torch_adam, "of_adam": 1.0}
    with torch.no_grad():
        low = []
        start = time.perf_counter()
        for w, (_, is_target) in zip(params, flat):
            if is_target:  # std: the shorter side is projected
                u, _, v = torch.linalg.svd(w.grad.float(), full_matrices=False)
                left = w.shape[0] <= w.shape[1]
                p = (u[:, :rank] if left else v[:rank].T).to(kind)
                r = p.T @ w.grad if left else w.grad @ p
                low.append([w, p, left, torch.zeros_like(r), torch.zeros_like(r)])
            else:
                low.append([w, None, False, torch.zeros_like(w), torch.zeros_like(w)])
        wait()
        sweep = time.perf_counter() - start

        def step():
            for w, p, left, m, v in low:
                g = w.grad if p is None else p.T @ w.grad if left else w.grad @ p
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                n = m / (v.sqrt() + 1e-8)
                n = n if p is None else 0.25 * (p @ n if left else n @ p.T)
                w.add_(n, alpha=-1e-3)

        seconds = timed_torch(step, wait) + sweep / 200
    times = {"seconds": seconds, "of_adam": seconds / torch_adam, "svd_sweep_s": sweep}
    yield row | {"what": "the reference's algorithm in torch", **times}


def timed_torch(step, wait, steps: int = 20) -> float:
    step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


def on_a_tpu(_):
    gib = {"v6e": 31.25, "v5e": 15.75}  # what a program may use of 32 and 16 GiB
    loss = loss_of("7B")
    for chip, rank, weights in (("v6e", 1024, "bfloat16"), ("v5e", 256, "int8")):
        params = shapes_of("7B", jnp.bfloat16)
        if weights == "int8":
            narrow = lambda a: jax.eval_shape(lambda: packed.pack(jnp.zeros(a.shape, jnp.float32), "int8"))
            layers = {k: narrow(a) if len(a.shape) == 3 else a for k, a in params["layers"].items()}
            params = params | {"layers": layers}
        method = subspace(optim.adam8bit(1e-3), rank=rank, targets=TARGETS, basis_dtype="int8")
        state = jax.eval_shape(method.init, params)

        def step(params, state, tokens, method=method):
            value, grads = method.value_and_grad(loss)(params, state, tokens)
            return *method.update(grads, state, params), value

        def turn(params, state, tokens, method=method):
            return params, method.refresh(loss)(params, state, tokens)

        for what, function, lengths in (("step", step, [2048]), ("refresh", turn, [2048, 1024])):
            for length in lengths:  # of fewer tokens where it does not fit
                tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
                row = {"what": what, "chip": chip, "weights": weights, "rank": rank, "tokens": length}
                try:
                    memory = compile_for_tpu(function, (params, state, tokens), chip, donate=(0, 1)).memory_analysis()
                except jax.errors.JaxRuntimeError as error:
                    yield row | {"fits": False, "error": str(error)[:300]}
                    continue
                total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
                parts = {"arguments_gib": memory.argument_size_in_bytes, "temporary_gib": memory.temp_size_in_bytes}
                sizes = {k: v / 2**30 for k, v in (parts | {"total_gib": total}).items()}
                fits = sizes["total_gib"] <= gib[chip]
                yield row | sizes | {"fits": fits}
                if fits:
                    break


def fastest(run, times: int = 3) -> float:
    run()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


SUBJECTS = {
    "bytes": state_bytes, "step": step_memory, "refresh": refreshes, "compile": compiling, "time": timing,
    "tpu": on_a_tpu,
}  # fmt: skip


# ---- the tables -------------------------------------------------------------------------------------


def table() -> str:
    """One table a subject, of the newest results that have it, device by device."""
    newest = {}
    for path in sorted(about.RESULTS.glob("optim-*.json"), key=lambda p: p.stem[-10:]):
        report = json.loads(path.read_text())
        for row in report["rows"]:
            newest.setdefault((row["subject"], report["device"]), {})[report["date"]] = report
    parts = []
    for (subject, device), reports in sorted(newest.items(), key=lambda kv: (list(SUBJECTS).index(kv[0][0]), kv[0][1])):
        date = max(reports)
        rows = [r for r in reports[date]["rows"] if r["subject"] == subject]
        columns = list(dict.fromkeys(k for r in rows for k in r if k not in ("subject", "error")))
        columns += ["aim"] if any(map(_aim, rows)) else []
        where = "" if subject in ("bytes", "tpu") else f"{device}, "
        lines = [f"`{subject}` ({where}{about.said(reports[date])}):", ""]
        lines.append("| " + " | ".join(c.replace("_", " ") for c in columns) + " |")
        lines.append("|" + "---|" * len(columns))
        for row in rows:
            cells = [_aim(row) if c == "aim" else row.get(c, "") for c in columns]
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _aim(row: dict) -> float | None:
    keys = [(row["subject"], row["what"]), (row["subject"], row["what"], row.get("kind"))]
    keys += [(row["subject"], "times")] if "times" in row else []
    return next((AIMS[key] for key in keys if key in AIMS), None)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
