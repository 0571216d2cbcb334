"""Attention on one NVIDIA GPU: first every case against float64, then times against cuDNN, XLA, tokamax, torch.

    python benchmarks/attention_gpu.py                        # goes on where it was stopped
    python benchmarks/attention_gpu.py --subjects correct
    python benchmarks/attention_gpu.py --subjects grid --minutes 8
    python benchmarks/attention_gpu.py --tiny                 # tries the script, also on a CPU
    python benchmarks/attention_gpu.py --table

bfloat16. Of each shape all sides are called in turn, 25 rounds after the first call, and the median counts; a call is
as many repetitions as take a few milliseconds, waited for together. TFLOP/s: 4·B·N·T·S·H forwards, half of that under a
causal mask, 2.5 times as many backwards; the ceiling is what a product of two 8192 × 8192 matrices reaches in the same
run. Where a side cannot compute a shape, the row says why.
"""

import argparse
import datetime
import functools
import json
import os
import re
import statistics
import time

import about
import jax
import jax.numpy as jnp
import numpy as np

from jaxml.attention import Pages, flash_attention, paged_attention
from jaxml.attention.cases import CASES, Case
from jaxml.extras import version

OURS = ("mosaic_gpu", "mosaic_gpu_fused", "triton", "jax_triton", "blockwise")
SUBJECTS = ("correct", "grid", "models", "packed", "lengths", "decoding")
ROUNDS, TOKENS, WIDTHS = 25, 16384, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no row after that long")
    parser.add_argument("--tiny", action="store_true", help="small shapes and three rounds")
    parser.add_argument("--again", action="store_true", help="measure what today's results have already")
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    device = jax.devices()[0].device_kind
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()) + ("-tiny" if options.tiny else "")
    path = about.RESULTS / f"attention-gpu-{name}-{datetime.date.today().isoformat()}.json"
    report = json.loads(path.read_text()) if path.exists() and not options.again else {"rows": []}
    report |= {"device": device, **about.made("jaxlib", "torch", "tokamax", "triton")}
    report.setdefault("ceiling_tflops", ceiling(512 if options.tiny else 8192))
    print(f"{device}: {report['ceiling_tflops']:.0f} TFLOP/s of a product", flush=True)
    end = time.monotonic() + 60 * options.minutes
    for row, measure in rows(options.subjects, options.tiny):
        if any(row.items() <= old.items() for old in report["rows"]):
            continue
        if time.monotonic() > end:
            print("out of time: run it again to go on")
            break
        report["rows"].append(row | measure())
        print({k: v for k, v in report["rows"][-1].items() if k != "runs"}, flush=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(report, indent=1))
        os.replace(temporary, path)
    print(path.name)


def rows(subjects, tiny: bool):
    """(what a row is of, the function that measures it)."""
    rounds = 3 if tiny else ROUNDS
    of = lambda subject, what, case, f: (dict(subject=subject, what=what, case=case), f)
    for subject in subjects:
        if subject == "correct":
            for case in CASES:
                yield of(subject, "errors", case.name, functools.partial(errors, case))
        elif subject == "decoding":
            for B, S in ((2, 256),) if tiny else ((1, 16384), (16, 4096), (64, 8192)):
                yield of(subject, "forward", f"B{B} S{S}", functools.partial(decoding, B, S, rounds))
        else:
            for case in shapes(subject, tiny):
                for what in ("forward", "gradient"):
                    yield of(subject, what, case.name, functools.partial(times, case, what, rounds))


def shapes(subject: str, tiny: bool) -> list[Case]:
    fixed = lambda **options: lambda case, rng: dict(options)
    if tiny:
        return [Case(f"tiny {subject}", B=2, T=96, N=2, K=1, H=32, options=fixed(is_causal=True))]
    if subject == "grid":
        return [
            Case(
                f"T{T} H{H}{' causal' if causal else ''}",
                B=TOKENS // T, T=T, N=WIDTHS // H, K=WIDTHS // H, H=H, options=fixed(is_causal=causal),
            )
            for causal in (True, False) for H in (128, 64, 256) for T in (512, 1024, 2048, 4096, 8192, 16384)
        ]  # fmt: skip
    if subject == "models":
        causal = fixed(is_causal=True)
        return [
            Case("GQA 32/8, T4096", B=4, T=4096, N=32, K=8, H=128, options=causal),
            Case("MLA 192/128, T4096", B=4, T=4096, N=16, K=16, H=192, H2=128, options=causal),
        ]
    if subject == "packed":
        window = fixed(is_causal=True, local_window_size=(511, 0))
        return [
            Case("8 documents in 4096", B=4, T=4096, N=16, K=16, H=128, options=documents),
            Case("window of 512 in 8192", B=2, T=8192, N=16, K=16, H=128, options=window),
        ]
    return [
        Case(f"T{T}", B=16, T=T, N=16, K=16, H=128, options=fixed(is_causal=True)) for T in (1000, 1024, 1500, 1536)
    ]


def documents(case: Case, rng) -> dict:
    cuts = np.sort(rng.integers(1, case.T, (case.B, 7)), axis=1)
    ids = (np.arange(case.T)[None, :, None] >= cuts[:, None, :]).sum(2).astype(np.int32)
    return dict(is_causal=True, q_segment_ids=ids)


# ---- correctness --------------------------------------------------------------------------------------


def errors(case: Case) -> dict:
    """Largest error of output and gradients of each backend, and of XLA's bfloat16, against float64 on the CPU."""
    case = case.scaled(T=case.T * 4 if case.T > 9 else case.T, S=case.S and case.S * 4)
    if case.H == 16:
        case = case.scaled(H=64)
    names = [n for n in ("bias", "sinks") if n in case.kwargs()]

    def run(by, dtype, device):
        with jax.default_device(device):
            kwargs = case.kwargs(jnp.bfloat16)
            arrays = [jnp.asarray(a, dtype) for a in (*case.arrays(jnp.bfloat16), *(kwargs.pop(n) for n in names))]

            def total(*arrays):
                out, lse = flash_attention(
                    *arrays[:3], **kwargs, **dict(zip(names, arrays[3:])), implementation=by, return_residual=True
                )
                weights = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
                lse = jnp.where(lse > -jnp.inf, lse, 0.0)
                return jnp.sum((out * weights).astype(lse.dtype)) + jnp.sum(jnp.cos(lse)), (out, lse)

            grads, outs = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arrays)
            return [np.asarray(a, np.float64) for a in (*outs, *grads)]

    cpu = jax.devices("cpu")[0]
    with jax.enable_x64(True):
        truth = run("reference", jnp.float64, cpu)
    parts = ("out", "lse", "dq", "dk", "dv")
    found = {}
    for by in ("reference", *OURS, "cudnn"):
        dtypes = ("bfloat16",) if by in ("mosaic_gpu", "mosaic_gpu_fused", "cudnn") else ("bfloat16", "float32")
        for dtype in dtypes:
            try:
                got = run(by, jnp.dtype(dtype), jax.devices()[0])
            except NotImplementedError as error:
                found[f"{by} {dtype}"] = str(error)[:200]
                continue
            found[f"{by} {dtype}"] = {n: float(np.max(np.abs(a - b))) for n, a, b in zip(parts, got, truth)}
    within = {}
    for name, got in found.items():
        plain = found[f"reference {name.split()[-1]}"]
        if not name.startswith("reference") and isinstance(got, dict):
            # The rule of FlashAttention's own tests: at most twice what plain attention in that dtype is off by.
            within[name] = all(got[n] <= 2 * plain[n] + (1e-5 if "32" in name else 1e-3) for n in parts)
    return {"errors": found, "within_twice_plain": within}


# ---- time ---------------------------------------------------------------------------------------------


def ceiling(n: int) -> float:
    a = jnp.ones((n, n), jnp.bfloat16)
    call = jax.jit(lambda a: a @ a).lower(a).compile()
    return 2 * n**3 / min(_repeated(lambda: call(a), jax.block_until_ready) for _ in range(5)) / 1e12


def _repeated(call, ready) -> float:
    """Seconds of one of as many calls as take some milliseconds together."""
    ready(call())
    started = time.perf_counter()
    ready(call())
    n = max(1, int(5e-3 / max(time.perf_counter() - started, 1e-6)))
    started = time.perf_counter()
    for _ in range(n):
        out = call()
    ready(out)
    return (time.perf_counter() - started) / n


def in_turn(calls: dict, rounds: int) -> tuple[dict, dict, dict]:
    """(median seconds, all of them, why not) of each side; `calls`: name → function that returns (call, ready)."""
    ready, why = {}, {}
    for name, make in calls.items():
        try:
            ready[name] = make()
            _repeated(*ready[name])
        except Exception as error:  # whatever a rival's library raises: the row says it
            ready.pop(name, None)
            why[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
    runs = {name: [] for name in ready}
    for _ in range(rounds):
        for name, (call, wait) in ready.items():
            runs[name].append(_repeated(call, wait))
    return {n: statistics.median(r) for n, r in runs.items()}, runs, why


def times(case: Case, what: str, rounds: int) -> dict:
    kwargs, arrays = case.kwargs(jnp.bfloat16), case.arrays(jnp.bfloat16)
    extra = {}

    def of_jax(name, function):
        f = function
        if what == "gradient":
            f = jax.grad(lambda *a: jnp.sum(function(*a).astype(jnp.float32)), (0, 1, 2))
        compiled = jax.jit(f).lower(*arrays).compile()
        extra[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        return lambda: compiled(*arrays), jax.block_until_ready

    calls = {
        f"jaxml {by}": functools.partial(
            of_jax, f"jaxml {by}", functools.partial(flash_attention, **kwargs, implementation=by)
        )
        for by in OURS
    }
    plain = dict(kwargs)
    ids = plain.pop("q_segment_ids", None)
    if ids is not None:
        plain["mask"] = ids[:, None, :, None] == ids[:, None, None, :]
    for by in ("cudnn", "xla"):
        calls[f"jax.nn {by}"] = functools.partial(
            of_jax, f"jax.nn {by}", functools.partial(jax.nn.dot_product_attention, **plain, implementation=by)
        )
    if ids is None and "local_window_size" not in plain and jax.default_backend() == "gpu":
        calls["jax pallas triton"] = functools.partial(of_jax, "jax pallas triton", functools.partial(_mha, plain))
    if version("tokamax"):
        import tokamax

        calls["tokamax"] = functools.partial(
            of_jax, "tokamax", functools.partial(tokamax.dot_product_attention, **plain)
        )
    if version("torch") and set(plain) <= {"is_causal", "mask"}:
        for by in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            calls[f"torch {by.split('_')[0].lower()}"] = functools.partial(of_torch, by, what, arrays, plain)
    seconds, runs, why = in_turn(calls, rounds)
    visible = 0.5 if plain.get("is_causal") else 1.0
    flops = visible * 2 * case.B * case.N * case.T * (case.S or case.T) * (case.H + (case.H2 or case.H))
    flops *= 3.5 if what == "gradient" else 1.0
    tflops = {n: flops / s / 1e12 for n, s in seconds.items()}
    return {"seconds": seconds, "tflops": tflops, "extra_mib": extra, "why_not": why, "runs": runs}


def _mha(options: dict, q, k, v):
    """jax's own kernel for Triton, which has no grouped heads and no scale of its own."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(q, k, v, None, sm_scale=q.shape[3] ** -0.5, causal=options.get("is_causal", False))


def of_torch(by: str, what: str, arrays, plain: dict):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    place = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (
        torch.from_numpy(np.array(a.astype(jnp.float32))).to(place, torch.bfloat16).transpose(1, 2).requires_grad_()
        for a in arrays
    )
    mask = plain.get("mask")
    options = dict(is_causal=plain.get("is_causal", False), enable_gqa=q.shape[1] != k.shape[1])
    if mask is not None:
        T = q.shape[2]
        mask = torch.from_numpy(np.array(mask)).to(place) & torch.ones(T, T, dtype=torch.bool, device=place).tril()
        options |= dict(attn_mask=mask, is_causal=False)

    def call():
        with sdpa_kernel([getattr(SDPBackend, by)]):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        if what == "gradient":
            q.grad = k.grad = v.grad = None
            out.backward(torch.ones_like(out))
        return out

    return call, lambda _: torch.cuda.synchronize() if place == "cuda" else None


def decoding(B: int, S: int, rounds: int) -> dict:
    """One query of 32 heads for 8 of keys of width 128: keys side by side, and in pages of 128."""
    N, K, H, page = 32, 8, 128, 128
    draw = lambda n, *shape: jax.random.normal(jax.random.key(n), shape, jnp.bfloat16)
    q, k, v = draw(0, B, 1, N, H), draw(1, B, S, K, H), draw(2, B, S, K, H)
    pages = Pages(k.reshape(-1, page, K * H), v.reshape(-1, page, K * H), K)
    at = jnp.arange(B * S // page, dtype=jnp.int32).reshape(B, -1), jnp.full((B,), S, jnp.int32)

    def of_jax(function, *arrays):
        compiled = jax.jit(function).lower(*arrays).compile()
        return lambda: compiled(*arrays), jax.block_until_ready

    by = lambda f, name: functools.partial(f, implementation=name)
    calls = {f"jaxml {n}": functools.partial(of_jax, by(flash_attention, n), q, k, v) for n in OURS}
    calls |= {
        f"jaxml pages {n}": functools.partial(of_jax, by(paged_attention, n), q, pages, *at)
        for n in ("triton", "jax_triton", "blockwise")
    }
    calls |= {
        f"jax.nn {n}": functools.partial(of_jax, by(jax.nn.dot_product_attention, n), q, k, v) for n in ("cudnn", "xla")
    }
    seconds, runs, why = in_turn(calls, rounds)
    gigabytes = 2 * k.size * 2 / 1e9
    return {
        "seconds": seconds,
        "gb_per_s": {n: gigabytes / s for n, s in seconds.items()},
        "why_not": why,
        "runs": runs,
    }


# ---- table --------------------------------------------------------------------------------------------


def table() -> str:
    """Markdown of the newest results of each device."""
    parts = []
    for name in (name for name in about.of_devices("attention-gpu") if "tiny" not in name):
        report = about.newest(name)
        sides = sorted({n for r in report["rows"] for n in r.get("seconds", {})})
        lines = ["| subject | case | what | " + " | ".join(sides) + " |", "|---" * (3 + len(sides)) + "|"]
        for r in (r for r in report["rows"] if "seconds" in r):
            rate = r.get("tflops") or r["gb_per_s"]
            cells = [f"{rate[n]:.0f}" if n in rate else "–" for n in sides]
            lines.append(f"| {r['subject']} | {r['case']} | {r['what']} | " + " | ".join(cells) + " |")
        correct = [r for r in report["rows"] if "errors" in r]
        wrong = [f"{r['case']} ({n})" for r in correct for n, ok in r["within_twice_plain"].items() if not ok]
        summary = f"{len(correct)} cases against float64: " + (", ".join(wrong) + " off" if wrong else "all within")
        head = f"{report['device']}, {report['date']}, TFLOP/s (decoding: GB/s); a product of matrices "
        parts.append(f"{head}{report['ceiling_tflops']:.0f}. {summary}.\n\n" + "\n".join(lines))
    return "\n\n".join(parts) or "no results yet"


if __name__ == "__main__":
    main()
