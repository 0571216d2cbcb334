"""Fine-tune a model on a JSONL file; the same command resumes a run that was stopped.

examples:
  jaxml finetune smollm2-135m train.jsonl --out runs/mine
  jaxml finetune smollm2-135m train.jsonl --out runs/mine --eval held.jsonl --rank 16 --targets q,v --epochs 3
  jaxml finetune path/to/model train.jsonl --out runs/full --method full --dtype bfloat16 --remat
  jaxml finetune smollm2-135m train.jsonl --out runs/small --method qlora --rank 16 --compute bfloat16
  jaxml finetune smollm2-135m train.jsonl --out runs/dora --method dora --start pissa --dropout 0.05
  jaxml finetune smollm2-135m train.jsonl --out runs/low --method galore --rank 128 --eight-bit
  jaxml finetune path/to/model train.jsonl --out runs/wide --method full --mesh fsdp=4,tensor=2
  jaxml finetune path/to/model train.jsonl --out runs/wide --coordinator host0:1234 --processes 2 --process 0

======= ================================================================
lora    two thin factors around every matrix (--start, --rslora, --lora-plus)
qlora   the same around weights in NF4, quantised as they are read
dora    with a magnitude for each output; qdora: around NF4
vera    two vectors around random factors that all layers share
adalora ranks that move where they count
ia3     one number for each key, value and hidden unit
full    every weight
galore  every weight, with gradients projected to a low rank
======= ================================================================

Each line of the file is an object with the key text, the keys prompt and response, the key messages, or the key parts
([text, weight in the loss] each). The folder gets adapter/ (PEFT's format) or model/ (Hugging Face's), checkpoints/,
log.jsonl and loss.png. Going on, --mesh, the number of processes, --eval and --no-progress may be others, nothing else
(on the same mesh, to the same bits). Several processes are given one shared --out, and the same MODEL and DATA.
"""

import argparse
import fnmatch
import hashlib
import math
import shutil
from pathlib import Path

from jaxml.cli.main import digest, join, load, mesh_arguments, model_arguments


def add(sub):
    model_arguments(sub)
    mesh_arguments(sub)
    sub.add_argument("data", metavar="DATA", help="JSONL to learn from")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="the run's folder")
    sub.add_argument("--eval", metavar="DATA", help="JSONL held out")
    step_arguments(sub)
    sub.add_argument("--steps", type=int, help="optimizer steps (default: from --epochs)")
    sub.add_argument("--epochs", type=float, default=1.0, help="passes over DATA, in whole steps (default: 1)")
    sub.add_argument("--learning-rate", type=float, default=2e-4, help="at its highest (default: 2e-4)")
    sub.add_argument(
        "--schedule", choices=("constant", "linear", "cosine"), default="cosine", help="of the rate (default: cosine)"
    )
    sub.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW (default: 0)")
    sub.add_argument("--learn-all", action="store_true", help="learn prompts as well as responses")
    sub.add_argument("--save-every", type=int, default=100, help="steps (default: 100; 0: at the end only)")
    sub.add_argument("--eval-every", type=int, default=0, help="steps (default: 0, at the end only)")
    sub.add_argument("--keep", type=int, default=3, help="checkpoints, beside the best (default: 3)")
    sub.add_argument("--spike", type=float, help="skip a gradient of more than this many times the usual norm")
    sub.add_argument("--patience", type=int, default=5, help="skipped steps in a row, then a step back (default: 5)")
    sub.add_argument("--rollbacks", type=int, default=3, help="to the last checkpoint, at most (default: 3)")
    sub.add_argument("--no-progress", action="store_true", help="no progress bar")


def step_arguments(sub, batch_size: int | None = 4, length: int = 512):
    """What a step computes."""
    usual = f" (default: {batch_size})" if batch_size else ""
    sub.add_argument("--method", choices=tuple(TAKES), default="lora", help="(default: lora)")
    sub.add_argument("--rank", type=int, help="default: 8; of adalora 12, of galore 128, of vera 256 (or the most)")
    sub.add_argument("--alpha", type=float, help="of lora and its kin (default: twice the rank)")
    sub.add_argument("--start", help="default, gaussian, orthogonal, pissa, pissa_niter_4, olora or loftq")
    sub.add_argument("--rslora", action="store_true", help="scale by alpha / √rank")
    sub.add_argument("--lora-plus", type=float, metavar="RATIO", help="learning rate of B over that of A")
    sub.add_argument("--dropout", type=float, help="of adapters' inputs (default: 0)")
    sub.add_argument("--target-rank", type=int, help="of adalora, in the end (default: two thirds of --rank)")
    sub.add_argument("--whole", help="weights trained whole, by comma (embed, head, norm, *_norm)")
    sub.add_argument("--gap", type=int, help="of galore: steps between refreshes of a basis (default: 200)")
    sub.add_argument("--eight-bit", action="store_true", help="the optimizer's state in eight bits")
    sub.add_argument("--targets", default="*", help="patterns of matrices, by comma (q,k,v,o,gate,up,down; *: all)")
    sub.add_argument("--batch-size", type=int, default=batch_size, help=f"rows of --length tokens a step{usual}")
    sub.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step (default: 1)")
    sub.add_argument("--length", type=int, default=length, help=f"tokens a row (default: {length})")
    sub.add_argument("--clip", type=float, default=1.0, help="global norm of the gradient (default: 1; 0: never)")
    sub.add_argument("--compute", choices=("float32", "bfloat16"), help="dtype to compute in")
    sub.add_argument("--remat", action="store_true", help="less memory for more time")
    sub.add_argument("--unroll", action="store_true", help="unroll the layers: faster on CPU, slower to compile")
    sub.add_argument("--seed", type=int, default=0, help="of adapters and of the order of rows (default: 0)")


def run(args):
    import jax

    from jaxml import lm, log, tune
    from jaxml.lm import hf
    from jaxml.parallel import hosts
    from jaxml.tune import adapters, data

    options = tune.Options(
        steps=args.steps,
        epochs=args.epochs,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        length=args.length,
        learning_rate=args.learning_rate,
        schedule=args.schedule,
        weight_decay=args.weight_decay,
        clip=args.clip or None,
        remat=args.remat,
        unroll=args.unroll,
        dtype=args.compute,
        learn_all=args.learn_all,
        seed=args.seed,
        save_every=args.save_every,
        eval_every=args.eval_every,
        keep=args.keep,
        spike=args.spike,
        patience=args.patience,
        rollbacks=args.rollbacks,
    )
    check(args, "finetune")
    if not args.out.strip():
        raise ValueError("finetune: --out is the name of a folder, got an empty one.")
    out = Path(args.out)
    result = out / ("model" if args.method in ("full", "galore") else "adapter")
    mesh = join(args)
    hosts.together(lambda: _check_new(out, result))
    examples, held = hosts.together(lambda: [data.read_jsonl(path) if path else [] for path in (args.data, args.eval)])
    hosts.same(hosts.together(lambda: _given(args)), "finetune")
    model = hosts.together(lambda: _loaded(args, mesh))
    about = {"model_digest": digest(model)}
    model = _adapted(args, model)
    quantised = _quantised(model)
    moved = quantised is not None and adapters.starts.moves(args.start)
    if moved and (bad := hf.unwritable(adapters.detach(model.params))):
        raise ValueError(
            f"finetune: with --start {args.start} what is left of the weights is written as well, and "
            f"{next(iter(bad))} in {quantised} cannot be. Take --quantize nf4, fp4 or int8, or another start."
        )
    if not moved and adapters.starts.moves(args.start) and args.start not in adapters.starts.FOUND_AGAIN:
        raise ValueError(
            f"finetune: PEFT cannot find again what --start {args.start} moves into the adapter, unless the rest is "
            "quantised and written (--quantize nf4). Take pissa or olora."
        )
    tx = lambda steps: tune.optimizer(options, steps, around=lambda adamw: around(args, adamw, steps))
    model, info = tune.fit(
        model, examples, options, eval_examples=held, tx=tx, folder=out, progress=not args.no_progress,
        about=_method(args) | about, mesh=mesh,
    )  # fmt: skip
    if hosts.is_main():
        log.plot_loss(log.read(out / "log.jsonl"), out / "loss.png", title=f"Fine-tuning {Path(args.model).name}")
    if result.name == "adapter":
        if moved:
            # A part of the weights is in the adapter, and the rest is rounded: neither is of use without the other.
            _write_base(model.replace(params=adapters.detach(model.params)), out / "base")
            hosts.say(f"what is left of the weights, in {quantised}: {out / 'base'}")
        base = str((out / "base").resolve()) if moved else args.model
        checksum = adapters.base_checksum(model.params)
        trained, rest = adapters.split(model.params)
        trained = jax.tree.map(hosts.to_host, trained)
        if hosts.is_main():
            adapters.save_peft(result, adapters.combine(trained, rest), model.config, base_model=base, base=checksum)
    else:
        lm.save(model, result)
    hosts.say(_told(info, out, result))
    hosts.meet("a run ends")
    return 0


def _check_new(out: Path, result: Path) -> None:
    if result.exists():
        raise FileExistsError(f"{result}: this run is finished. Choose another --out.")
    if (out / "base").exists() and not (out / "run.json").is_file():
        raise FileExistsError(f"{out / 'base'}: is of no run, and may have to be written. Choose another --out.")


def _given(args) -> dict:
    """What all processes of a run must have been given alike: where a file lies is their own affair."""
    import jax

    if jax.process_count() == 1:
        return {}
    own = {"process", "coordinator", "model", "adapter", "data", "eval", "run", "heartbeat", "wait", "no_progress"}
    contents = {"MODEL": args.model, "--adapter": args.adapter, "DATA": args.data, "--eval": args.eval}
    options = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in own}
    options["--out"] = Path(args.out).name  # the folder may be mounted elsewhere
    return options | {name: _content(path) for name, path in contents.items()}


def _content(name: str | None) -> str | None:
    """Tells files or folders apart: sizes, and the first and last 64 MiB of each."""
    from jaxml.lm import zoo

    if name is None:
        return None
    path = zoo.find(name) if name in zoo.NAMES else Path(name)
    found = hashlib.sha256()
    hidden = lambda file: any(part.startswith(".") for part in file.relative_to(path).parts)  # a hub's own notes
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and not hidden(file):
            with file.open("rb") as content:
                size = file.stat().st_size
                found.update(f"{file.relative_to(path)} {size} ".encode() + content.read(2**26))
                content.seek(max(0, size - 2**26))
                found.update(content.read(2**26))
    return found.hexdigest()


def _write_base(model, folder: Path) -> None:
    """The weights under the adapters; what a run that was killed just here has left of them is replaced."""
    from jaxml import lm
    from jaxml.parallel import hosts

    if hosts.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    hosts.meet("the weights are written")
    lm.save(model, folder)


def _told(info: dict, out: Path, result: Path) -> str:
    """How a run ended, in one line; where its last step had been done before, as its log has it."""
    from jaxml import log

    rows = log.read(out / "log.jsonl")
    last = lambda name: next((row[name] for row in reversed(rows) if name in row), None)
    loss, held = (last(name) if info[name] is None else info[name] for name in ("loss", "eval_loss"))
    parts = [f"{info['steps']} steps"]
    parts += [f"{name} {value:.4f}" for name, value in (("loss", loss), ("held-out loss", held)) if value is not None]
    for name in ("skipped", "rollbacks"):
        if info[name]:
            parts.append(f"{name}: {info[name]} (log.jsonl says why)")
    return f"{', '.join(parts)}: {result}"


_LORA = ("rank", "alpha", "start", "rslora", "lora_plus", "dropout", "whole", "quantize")
TAKES = {
    "lora": _LORA,
    "qlora": _LORA,
    "dora": _LORA,
    "qdora": _LORA,
    "vera": ("rank", "dropout", "whole", "quantize"),
    "adalora": ("rank", "alpha", "target_rank", "dropout", "whole", "quantize"),
    "ia3": ("whole", "quantize"),
    "full": (),
    "galore": ("rank", "gap"),
}
MADE_WITH = ("rank", "alpha", "start", "rslora", "dropout", "whole")  # of these an adapter says itself what they were
PLAIN = {"qlora": "lora", "qdora": "dora"}  # a method by the adapters that it attaches
OPTIONS = ("rank", "alpha", "gap", "start", "rslora", "lora_plus", "dropout", "target_rank", "whole", "quantize")


def check(args, who: str):
    """Refuses what the method does not take, and puts in the defaults of what it takes."""
    for name in OPTIONS:
        value, option = getattr(args, name), name.replace("_", "-")
        if value and name not in TAKES[args.method]:
            raise ValueError(f"{who}: --{option} is no option of --method {args.method}. Leave it out.")
        number = isinstance(value, int | float) and not isinstance(value, bool) and name != "dropout"
        if number and not 0 < value < math.inf:
            raise ValueError(f"{who}: --{option} is above 0, got {value}.")
        if isinstance(value, int) and value >= 2**31:
            raise ValueError(f"{who}: --{option} is below 2³¹, got {value}.")
        if value and args.adapter and name in MADE_WITH and args.method not in ("full", "galore"):
            raise ValueError(f"{who}: --{option} is what --adapter has been made with. Leave it out.")
    if args.adapter and args.targets != "*":
        raise ValueError(f"{who}: --targets are those of --adapter. Leave them out.")
    if args.method == "full" and args.targets != "*":
        raise ValueError(f"{who}: --targets is no option of --method full. Leave it out.")
    args.quantize = args.quantize or ("nf4" if args.method in ("qlora", "qdora") else None)
    if (args.start or "").startswith("loftq") and not args.quantize:
        raise ValueError(f"{who}: --start {args.start} is for quantised weights. Give --quantize or --method qlora.")
    rank = args.rank or {"adalora": 12, "galore": 128, "vera": None}.get(args.method, 8)  # VeRA's: as it fits
    usual = dict(rank=rank, start="default", gap=200, dropout=0.0)
    usual |= dict(alpha=2.0 * rank, target_rank=max(1, rank * 2 // 3)) if rank else {}
    for name in usual.keys() & set(TAKES[args.method]):
        setattr(args, name, getattr(args, name) or usual[name])


def _method(args) -> dict:
    """What a run must agree in to be gone on with, beside its options."""
    return {k: getattr(args, k) for k in ("method", *OPTIONS, "targets", "eight_bit")}


def _loaded(args, mesh):
    """The model as it is before anything is put on it; quantised, unless the start needs the weights as they were."""
    from jaxml.tune import adapters

    format = None if adapters.starts.moves(args.start) else args.quantize
    return load(argparse.Namespace(**vars(args) | {"quantize": format}), mesh)


def _adapted(args, model):
    """The model with what is going to be trained on it."""
    from rich.console import Console

    from jaxml.parallel import hosts
    from jaxml.tune import adapters

    if args.adapter and args.method not in ("full", "galore"):
        made, wanted = _method_of(model.params), PLAIN.get(args.method, args.method)
        if made != wanted:
            raise ValueError(f"finetune: --adapter is one of {made}, got --method {args.method}. Give --method {made}.")
        return model
    format = args.quantize if adapters.starts.moves(args.start) else None
    show = lambda plan: hosts.is_main() and Console().print(plan, highlight=False)
    return model.replace(params=attached(args, model.params, format, show))


def _method_of(params) -> str:
    """How the adapters of a model have been made."""
    from jaxml.tune import adapters

    found = {
        "dora" if getattr(node, "magnitude", None) is not None else node.method
        for node in adapters.tree.of(params).values()
    }
    return min(found - {"whole"}, default="whole")


def attached(args, params, quantize: str | None = None, show=None):
    """Parameters with what the arguments want trained; `quantize`: what a start leaves of them."""
    import jax

    from jaxml import paths
    from jaxml.tune import adapters

    if args.method in ("full", "galore"):
        found = paths.matrices(params)
        chosen = paths.match(found, args.targets.split(","), "finetune --targets")
        if args.method == "galore" and args.rank >= (most := max(min(found[path].shape[-2:]) for path in chosen)):
            raise ValueError(
                f"{args.verb}: --rank is below the shorter side of at least one matrix, {most}, got {args.rank}. "
                "Lower it."
            )
        return adapters.merge(params)
    most = min(max(w.shape[-2:]) for w in paths.matrices(params).values())
    return adapters.attach(
        params,
        jax.random.key(args.seed),
        method=PLAIN.get(args.method, args.method),
        rank=args.rank or (min(256, most) if args.method == "vera" else 8),
        alpha=args.alpha,
        targets=None if args.targets == "*" else args.targets.split(","),
        start=args.start or "default",
        rslora=args.rslora,
        dropout=args.dropout or 0.0,
        whole=args.whole.split(",") if args.whole else (),
        quantize=quantize,
        show=show,
    )


def _quantised(model) -> str | None:
    """The format of the model's weights under adapters, if they have one."""
    from jaxml import paths
    from jaxml.quant import QArray
    from jaxml.tune import adapters

    kinds = [w.kind for w in paths.named(adapters.detach(model.params)).values() if isinstance(w, QArray)]
    return kinds[0] if kinds else None


def around(args, adamw, steps: int):
    """The optimizer that the arguments ask for, around AdamW."""
    from jaxml import optim
    from jaxml.tune import adapters

    adamw = optim.eight_bit(adamw) if args.eight_bit else adamw
    if args.method == "adalora":
        return adapters.adalora.optimizer(
            adamw,
            target_rank=args.target_rank,
            steps=steps,
            begin=steps // 10,
            end=steps // 4,
            every=max(1, steps // 100),
        )
    if args.lora_plus:
        return adapters.lora_plus(adamw, args.lora_plus)
    if args.method != "galore":
        return adamw
    names = [] if args.targets == "*" else args.targets.split(",")
    where = lambda name: "^" if "/" in name else "(?:^|/)(?=[^/]*$)"  # as `adapters.attach` has it
    targets = [where(name) + fnmatch.translate(name) for name in names] or None
    kind = "int8" if args.eight_bit else "float32"
    return optim.galore(adamw, rank=args.rank, gap=args.gap, targets=targets, basis_dtype=kind)
