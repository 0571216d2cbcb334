"""Time attention on this machine, by each backend that can compute it; or find and keep the fastest tiles.

examples:
  jaxml bench attention
  jaxml bench attention --lengths 1024 4096 --widths 64 128 --heads 16 --dtype bfloat16
  jaxml bench attention --tune
"""

import json
import sys


def add(sub):
    sub.add_argument("what", choices=("attention",), help="what is timed")
    sub.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], metavar="T", help="of queries and keys")
    sub.add_argument("--widths", type=int, nargs="+", default=[64, 128], metavar="H", help="head dims")
    sub.add_argument("--heads", type=int, default=8, metavar="N", help="query heads (default: 8)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    sub.add_argument("--tune", action="store_true", help="time every candidate for tiles and keep the fastest")
    sub.add_argument("--json", action="store_true", help="print one JSON object a shape")


def run(args):
    import jax
    import jax.numpy as jnp

    from jaxml.attention import tune, tuned
    from jaxml.attention.cases import Case

    for flag, values in (("--lengths", args.lengths), ("--widths", args.widths), ("--heads", [args.heads])):
        if min(values) < 1:
            raise ValueError(f"bench: {flag} is at least 1, got {min(values)}.")
    dtype, ran = jnp.dtype(args.dtype), 0
    causal = lambda case, rng: dict(is_causal=True)
    for T in args.lengths:
        for H in args.widths:
            case = Case(f"T{T} H{H}", T=T, N=args.heads, K=args.heads, H=H, options=causal)
            if not args.tune:
                _times(case, dtype, args.json)
                continue
            for backend in ("mosaic_gpu", "triton"):
                try:
                    entries = tune.tune(case, dtype, backend)
                except NotImplementedError as error:
                    print(error)
                    continue
                ran += 1
                print(f"{case.name}, {backend}: written to {tuned.save(jax.devices()[0].device_kind, entries)}")
    if args.tune and not ran:
        raise NotImplementedError("bench: --tune needs a backend with tiles to choose, none runs here.")
    return 0


def _times(case, dtype, as_json: bool) -> None:
    """One line: milliseconds of the forward pass and of it with gradients, by backend."""
    import jax
    import jax.numpy as jnp

    from jaxml.attention import flash_attention, tune
    from jaxml.attention.dispatch import BACKENDS

    arrays, kwargs, found = case.arrays(dtype), case.kwargs(dtype), {}
    for backend in BACKENDS:
        call = lambda *a, by=backend: flash_attention(*a, **kwargs, implementation=by)
        total = lambda *a, f=call: jnp.sum(f(*a).astype(jnp.float32))
        try:
            both = [tune.timed(f, arrays, rounds=5) for f in (call, jax.grad(total, (0, 1, 2)))]
        except NotImplementedError:  # doctor says why
            continue
        except RuntimeError as error:  # a library or a program that should be there
            print(f"{backend} failed: {error}", file=sys.stderr)
            continue
        found[backend] = dict(zip(("forward_ms", "gradient_ms"), (round(1e3 * s, 3) for s in both)))
    if as_json:
        print(json.dumps({"case": case.name, "dtype": dtype.name, "backends": found}))
        return
    shown = ", ".join(f"{n} {t['forward_ms']} / {t['gradient_ms']} ms" for n, t in found.items())
    print(f"{case.name:12} {dtype.name}: {shown}", flush=True)
