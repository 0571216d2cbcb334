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

Each line of the file is an object with the key text, the keys prompt and response, or the key messages.
The folder gets adapter/ (PEFT's format) or model/ (Hugging Face's), checkpoints/, log.jsonl and loss.png.
"""

import fnmatch
from pathlib import Path

from jaxml.cli.main import join, load, mesh_arguments, model_arguments


def add(sub):
    model_arguments(sub)
    mesh_arguments(sub)
    sub.add_argument("data", metavar="DATA", help="JSONL to learn from")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="the run's folder")
    sub.add_argument("--eval", metavar="DATA", help="JSONL held out")
    step_arguments(sub)
    sub.add_argument("--steps", type=int, help="optimizer steps (default: from --epochs)")
    sub.add_argument("--epochs", type=float, default=1.0)
    sub.add_argument("--learning-rate", type=float, default=2e-4)
    sub.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="cosine")
    sub.add_argument("--weight-decay", type=float, default=0.0)
    sub.add_argument("--learn-all", action="store_true", help="learn prompts as well as responses")
    sub.add_argument("--save-every", type=int, default=100)
    sub.add_argument("--eval-every", type=int, default=0)
    sub.add_argument("--keep", type=int, default=3)
    sub.add_argument("--spike", type=float, help="skip a gradient of more than this many times the usual norm")
    sub.add_argument("--no-progress", action="store_true")


def step_arguments(sub, batch_size: int | None = 4):
    """What a step computes."""
    sub.add_argument("--method", choices=tuple(TAKES), default="lora")
    sub.add_argument("--rank", type=int, help="default: 8; of adalora 12, of galore 128, of vera 256 (or the most)")
    sub.add_argument("--alpha", type=float, help="of lora and its kin (default: twice the rank)")
    sub.add_argument("--start", help="default, gaussian, orthogonal, pissa, pissa_niter_4, olora or loftq")
    sub.add_argument("--rslora", action="store_true", help="scale by alpha / √rank")
    sub.add_argument("--lora-plus", type=float, metavar="RATIO", help="learning rate of B over that of A")
    sub.add_argument("--dropout", type=float, help="of adapters' inputs")
    sub.add_argument("--target-rank", type=int, help="of adalora, in the end (default: two thirds of --rank)")
    sub.add_argument("--whole", help="weights trained whole, by comma (embed, head, norm, *_norm)")
    sub.add_argument("--gap", type=int, help="of galore: steps between refreshes of a basis (default: 200)")
    sub.add_argument("--eight-bit", action="store_true", help="the optimizer's state in eight bits")
    sub.add_argument("--targets", default="*", help="patterns of matrices, by comma (q,k,v,o,gate,up,down; *: all)")
    sub.add_argument("--batch-size", type=int, default=batch_size, help="rows of --length tokens a step")
    sub.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    sub.add_argument("--length", type=int, default=512, help="tokens a row")
    sub.add_argument("--clip", type=float, default=1.0, help="global norm of the gradient (0: never)")
    sub.add_argument("--compute", choices=("float32", "bfloat16"), help="dtype to compute in")
    sub.add_argument("--remat", action="store_true", help="less memory for more time")
    sub.add_argument("--unroll", action="store_true", help="unroll the layers: faster on CPU, slower to compile")
    sub.add_argument("--seed", type=int, default=0)


def run(args):
    import jax

    from jaxml import lm, log, tune
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
    )
    check(args)
    examples = data.read_jsonl(args.data)
    held = data.read_jsonl(args.eval) if args.eval else []
    out = Path(args.out)
    result = out / ("model" if args.method in ("full", "galore") else "adapter")
    if result.exists():
        raise FileExistsError(f"{result}: this run is finished. Choose another --out.")
    mesh = join(args)
    model = _adapted(args, mesh)
    if (quantised := _quantised(model)) and adapters.starts.moves(args.start):
        # A part of the weights is in the adapter, and the rest is rounded: neither is of use without the other.
        if not (out / "base").exists():
            lm.save(model.replace(params=adapters.detach(model.params)), out / "base")
        hosts.say(f"what is left of the weights, in {quantised}: {out / 'base'}")
    elif adapters.starts.moves(args.start) and args.start not in adapters.starts.FOUND_AGAIN:
        raise ValueError(
            f"finetune: PEFT cannot find again what --start {args.start} moves into the adapter, unless the rest is "
            "quantised and written (--quantize nf4). Take pissa or olora."
        )
    tx = lambda steps: tune.optimizer(options, steps, around=lambda adamw: around(args, adamw, steps))
    model, info = tune.fit(
        model, examples, options, eval_examples=held, tx=tx, folder=out, progress=not args.no_progress,
        about=_method(args), mesh=mesh,
    )  # fmt: skip
    if result.name == "adapter":
        base = str(out / "base") if (out / "base").exists() else args.model
        trained, rest = adapters.split(model.params)
        trained = jax.tree.map(hosts.to_host, trained)
        if hosts.is_main():
            adapters.save_peft(result, adapters.combine(trained, rest), model.config, base_model=base)
    else:
        lm.save(model, result)
    if hosts.is_main():
        log.plot_loss(log.read(out / "log.jsonl"), out / "loss.png", title=f"Fine-tuning {Path(args.model).name}")
    shown = "" if info["eval_loss"] is None else f", held-out loss {info['eval_loss']:.4f}"
    hosts.say(
        f"{info['steps']} steps, loss {info['loss']:.4f}{shown}: {result}" if info["loss"] is not None else result
    )
    hosts.meet("a run ends")
    return 0


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
OPTIONS = ("rank", "alpha", "gap", "start", "rslora", "lora_plus", "dropout", "target_rank", "whole", "quantize")


def check(args):
    """Refuses what the method does not take."""
    for name in OPTIONS:
        value, option = getattr(args, name), name.replace("_", "-")
        if value and name not in TAKES[args.method]:
            raise ValueError(f"finetune: --{option} is no option of --method {args.method}. Leave it out.")
        if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0 and name != "dropout":
            raise ValueError(f"finetune: --{option} is above 0, got {value}.")
        if value and args.adapter and name != "quantize":
            raise ValueError(f"finetune: --{option} is what --adapter has been made with. Leave it out.")
    if args.adapter and args.targets != "*":
        raise ValueError("finetune: --targets are those of --adapter. Leave them out.")
    if args.method == "full" and args.targets != "*":
        raise ValueError("finetune: --targets is no option of --method full. Leave it out.")


def _method(args) -> dict:
    """What a run must agree in to be gone on with, beside its options."""
    return {k: getattr(args, k) for k in ("method", *OPTIONS, "targets", "eight_bit")}


def _adapted(args, mesh):
    """The model with what is going to be trained on it."""
    from rich.console import Console

    from jaxml.parallel import hosts
    from jaxml.tune import adapters

    format = quantised_as(args)
    moving = adapters.starts.moves(args.start)
    args.quantize = None if moving else format  # such a start needs the weights as they were
    model = load(args, mesh)
    if args.adapter and args.method not in ("full", "galore"):
        return model
    show = lambda plan: hosts.is_main() and Console().print(plan, highlight=False)
    return model.replace(params=attached(args, model.params, format if moving else None, show))


def quantised_as(args) -> str | None:
    """The format of the weights under what is trained."""
    return args.quantize or ("nf4" if args.method in ("qlora", "qdora") else None)


def attached(args, params, quantize: str | None = None, show=None):
    """Parameters with what the arguments want trained; `quantize`: what a start leaves of them."""
    import jax

    from jaxml import paths
    from jaxml.tune import adapters

    if args.method in ("full", "galore"):
        paths.match(paths.matrices(params), args.targets.split(","), "finetune --targets")
        return adapters.merge(params)
    most = min(max(w.shape[-2:]) for w in paths.matrices(params).values())
    return adapters.attach(
        params,
        jax.random.key(args.seed),
        method={"qlora": "lora", "qdora": "dora"}.get(args.method, args.method),
        rank=args.rank or {"vera": min(256, most), "adalora": 12}.get(args.method, 8),
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
        target = args.target_rank or max(1, (args.rank or 12) * 2 // 3)
        return adapters.adalora.optimizer(
            adamw, target_rank=target, steps=steps, begin=steps // 10, end=steps // 4, every=max(1, steps // 100)
        )
    if args.lora_plus:
        return adapters.lora_plus(adamw, args.lora_plus)
    if args.method != "galore":
        return adamw
    names = [] if args.targets == "*" else args.targets.split(",")
    where = lambda name: "^" if "/" in name else "(?:^|/)(?=[^/]*$)"  # as `adapters.attach` has it
    targets = [where(name) + fnmatch.translate(name) for name in names] or None
    kind = "int8" if args.eight_bit else "float32"
    return optim.galore(adamw, rank=args.rank or 128, gap=args.gap or 200, targets=targets, basis_dtype=kind)
