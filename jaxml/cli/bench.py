"""Time attention on this machine, by each backend that can compute it; or a part beside its rivals.

examples:
  jaxml bench attention
  jaxml bench attention --lengths 1024 4096 --widths 64 128 --heads 16 --dtype bfloat16
  jaxml bench attention --tune
  jaxml bench lm
  jaxml bench kan -- --table

Other subjects are the scripts in benchmarks/ of a clone of the repository (jaxml bench --list): each runs beside rivals
that are installed (pip install -e ".[oracle]"), writes its figures to benchmarks/results/ and prints their table. What
stands behind -- is handed on to the script, as --help is.
"""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def add(sub):
    sub.add_argument("what", nargs="?", metavar="SUBJECT", help="attention, or a script of benchmarks/")
    sub.add_argument("rest", nargs="*", metavar="…", help="behind --: handed on to the script")
    sub.add_argument("--list", action="store_true", help="show the subjects and stop")
    sub.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], metavar="T", help="of queries and keys")
    sub.add_argument("--widths", type=int, nargs="+", default=[64, 128], metavar="H", help="head dims")
    sub.add_argument("--heads", type=int, default=8, metavar="N", help="query heads (default: 8)")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    sub.add_argument("--tune", action="store_true", help="time every candidate for tiles and keep the fastest")
    sub.add_argument("--json", action="store_true", help="print one JSON object a shape")


def run(args):
    if args.list:
        for name, about in subjects().items():
            print(f"{name:18} {about}")
        return 0
    if args.what is None:
        raise ValueError(f"bench: a subject is one of {', '.join(subjects())}, got none.")
    if args.what != "attention":
        return _script(args.what, args.rest)
    if args.rest:
        raise ValueError(f"bench: attention takes options only, got {args.rest[0]!r}.")
    return _attention(args)


def subjects() -> dict[str, str]:
    """Name → what is compared; of scripts where this is a clone of the repository."""
    found = {"attention": "attention by each backend that runs here"}
    for path in sorted(FOLDER.glob("*.py")):
        head = path.read_text(encoding="utf-8").partition("\n")[0].strip('"')
        if path.stem not in ("attention", "headlines", "about"):
            found[path.stem] = head
    return found


def _script(name: str, rest: list[str]) -> int:
    known = subjects()
    if name not in known:
        elsewhere = "" if len(known) > 1 else " The other scripts are in a clone of the repository, which this is not."
        raise ValueError(f"bench: a subject is one of {', '.join(known)}, got {name!r}.{elsewhere}")
    path = FOLDER / f"{name}.py"
    done = subprocess.run([sys.executable, str(path), *rest]).returncode
    if done == 0 and not rest and "def table(" in path.read_text(encoding="utf-8"):
        done = subprocess.run([sys.executable, str(path), "--table"]).returncode
    return done


def _attention(args):
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
