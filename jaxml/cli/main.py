"""The command line: one file a verb, each with `add` (its arguments) and `run` (what it does)."""

import argparse
import contextlib
import hashlib
import importlib
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jaxml

VERBS = (
    "quickstart",
    "download",
    "generate",
    "chat",
    "finetune",
    "plan",
    "prompt",
    "rtune",
    "rag",
    "evaluate",
    "quantize",
    "merge",
    "convert",
    "activations",
    "kan",
    "bench",
    "doctor",
)
FORMATS = ("nf4", "fp4", "int4", "int8")  # of `jaxml.quant`, said here so that --help need not import it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0 on success, 2 for wrong usage or input (one sentence on stderr), 128 + n after signal n."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print("jaxml: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (
        ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError, ArithmeticError, MemoryError,
    ) as error:  # fmt: skip
        if os.environ.get("JAXML_TRACEBACK"):
            raise
        print(f"jaxml: {error}", file=sys.stderr)
        return 2


def _main(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    if args.verb != "download":
        _compilation_cache()
    from jaxml.tune.run import Stopped

    if not os.environ.get("JAXML_TRACEBACK"):
        for name in ("absl", "asyncio"):  # Orbax tells of each write that a failure has ended; jaxml once, what failed
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return args.run(args) or 0
    except Stopped as stopped:
        print(f"jaxml: {stopped}", file=sys.stderr)
        return 128 + stopped.signum


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="jaxml",
        description="Adapt neural networks efficiently in JAX.",
        epilog="JAXML_TRACEBACK=1 shows where an error came from.",
    )
    top.add_argument("--version", action="version", version=f"jaxml {jaxml.__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        module = importlib.import_module(f"jaxml.cli.{verb}")
        summary, _, examples = module.__doc__.partition("\n\n")
        sub = verbs.add_parser(
            verb,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=summary,
            epilog=examples.rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add(sub)
        sub.set_defaults(run=module.run)
    return top


def _compilation_cache() -> None:
    """Compiled programs are kept between commands; JAX_COMPILATION_CACHE_DIR chooses another place."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(root / "jaxml" / "xla"))


def model_arguments(sub: argparse.ArgumentParser, adapter: bool = True, quantize: bool = True) -> None:
    """MODEL, --adapter, --dtype and --quantize, as most verbs take them."""
    sub.add_argument("model", metavar="MODEL", help="a known name (jaxml download), a GGUF file or a model folder")
    if adapter:
        sub.add_argument("--adapter", metavar="FOLDER", help="a PEFT adapter folder to put on the model")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the parameters (default: the file's)"
    )
    if quantize:
        sub.add_argument("--quantize", choices=FORMATS, help="its matrices, as they are read")


def mesh_arguments(sub: argparse.ArgumentParser) -> None:
    """--mesh, and what finds the other processes of the same program."""
    sub.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices by axis: data=2,fsdp=4 (data, fsdp, tensor, context, expert; -1: the rest; default: fsdp)",
    )
    sub.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0 (auto, and the default on TPU slices and in SLURM: found)",
    )
    sub.add_argument("--processes", type=int, metavar="N", help="how many there are")
    sub.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")
    sub.add_argument(
        "--wait", type=int, default=300, metavar="S", help="seconds in which all processes begin (default: 300)"
    )
    sub.add_argument(
        "--heartbeat",
        type=int,
        default=100,
        metavar="S",
        help="seconds after which a process that gives no sign is lost, and the others end (default: 100)",
    )


def join(args: argparse.Namespace):
    """The mesh that the arguments ask for, once all processes have found each other; None on one device."""
    import jax

    from jaxml import parallel
    from jaxml.parallel import hosts

    for name in ("wait", "heartbeat"):
        if getattr(args, name) < 1:
            raise ValueError(f"{args.verb}: --{name} is at least 1 s, got {getattr(args, name)}.")
    if args.coordinator is not None or hosts.called():
        hosts.start(args.coordinator, args.processes, args.process, heartbeat_s=args.heartbeat, wait_s=args.wait)
    elif args.processes is not None or args.process is not None:
        raise ValueError(f"{args.verb}: --processes and --process need --coordinator HOST:PORT.")
    count, processes = jax.device_count(), jax.process_count()
    if args.mesh is not None or processes > 1:
        mesh = parallel.parse("fsdp=-1" if args.mesh is None else args.mesh)
        of = f" of {processes} processes" if processes > 1 else ""
        hosts.say(f"{count} devices{of}: {parallel.spell(mesh.shape)}")
        return mesh
    used = math.gcd(count, args.batch_size)
    if count > 1:
        why = "" if used == count else f" of {count}, as many as divide --batch-size {args.batch_size}"
        hosts.say(f"{used} device{'s' * (used > 1)}{why}: fsdp={used}")
    return parallel.mesh(fsdp=used, devices=jax.devices()[:used]) if used > 1 else None


def load(args: argparse.Namespace, mesh=None):
    """The model that `model_arguments` named."""
    from jaxml import lm
    from jaxml.tune import adapters

    model = lm.load(args.model, args.dtype, quantize=args.quantize, mesh=mesh)
    if args.adapter:
        model = model.replace(params=adapters.load_peft(args.adapter, model.params, model.config))
    return model


def digest(model) -> str:
    """Of a model's configuration and of all bits of its parameters."""
    from jaxml.checksum import checksum

    return hashlib.sha256(f"{model.config} {checksum(model.params)}".encode()).hexdigest()[:16]


def given(args: argparse.Namespace) -> list[str]:
    """The options that are not as usual (`args.usual`: name → default)."""
    return [name for name, usual in args.usual.items() if getattr(args, name) != usual]


def llm(args: argparse.Namespace, batch_size: int = 16, cache: Path | None = None):
    """That model as `prompts.LLM`, or the one at an endpoint (http://host/v1#name), whose answers are kept in the file
    `cache` as they come: what was paid for is not lost where it fails in the middle of a batch."""
    from jaxml import prompts

    if not is_address(args.model):
        return prompts.Local(load(args), batch_size=batch_size)
    for option in ("adapter", "dtype", "quantize"):
        if getattr(args, option):
            raise ValueError(
                f"{args.verb}: --{option} is for a model in this process, MODEL is an endpoint. Leave it out."
            )
    return endpoint(args.model, cache=cache)


def closing(model):
    """Closes an endpoint's file and connections at the end; a model in this process has none."""
    return contextlib.closing(model) if hasattr(model, "close") else contextlib.nullcontext()


def is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def endpoint(address: str, **options):
    """The model at http://host/v1#name; a key for it is read from JAXML_API_KEY."""
    from jaxml import prompts

    url, _, name = address.partition("#")
    if not name:
        raise ValueError(f"an endpoint is http://host/v1#name, got {address!r}.")
    return prompts.Endpoint(url, name, api_key=os.environ.get("JAXML_API_KEY"), **options)


def save(model, folder: str) -> None:
    """A Hugging Face folder, or an Orbax checkpoint where weights are quantised as that has no format for."""
    from jaxml import lm
    from jaxml.lm import hf

    (lm.save_orbax if hf.unwritable(model.params) else lm.save)(model, folder)


if __name__ == "__main__":
    sys.exit(main())
