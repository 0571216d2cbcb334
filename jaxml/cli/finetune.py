"""Fine-tune a model on a JSONL file; the same command resumes a run that was stopped.

examples:
  jaxml finetune smollm2-135m train.jsonl --out runs/mine
  jaxml finetune smollm2-135m train.jsonl --out runs/mine --eval held.jsonl --rank 16 --targets q,v --epochs 3
  jaxml finetune path/to/model train.jsonl --out runs/full --method full --dtype bfloat16 --remat
  jaxml finetune smollm2-135m train.jsonl --out runs/low --method galore --rank 128 --eight-bit

Each line of the file is an object with the key text, the keys prompt and response, or the key messages.
The folder gets adapter/ (PEFT's format) or model/ (Hugging Face's), checkpoints/, log.jsonl and loss.png.
"""

import fnmatch
from pathlib import Path

from jaxml.cli.main import load, model_arguments


def add(sub):
    model_arguments(sub)
    sub.add_argument("data", metavar="DATA", help="JSONL to learn from")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="the run's folder")
    sub.add_argument("--eval", metavar="DATA", help="JSONL held out")
    sub.add_argument("--method", choices=("lora", "full", "galore"), default="lora")
    sub.add_argument("--rank", type=int, help="default: 8 of lora, 128 of galore")
    sub.add_argument("--alpha", type=float, help="of lora (default: twice the rank)")
    sub.add_argument("--gap", type=int, help="of galore: steps between refreshes of a basis (default: 200)")
    sub.add_argument("--eight-bit", action="store_true", help="the optimizer's state in eight bits")
    sub.add_argument("--targets", default="*", help="patterns of matrices, by comma (q,k,v,o,gate,up,down; *: all)")
    sub.add_argument("--steps", type=int, help="optimizer steps (default: from --epochs)")
    sub.add_argument("--epochs", type=float, default=1.0)
    sub.add_argument("--batch-size", type=int, default=4, help="rows of --length tokens a step")
    sub.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    sub.add_argument("--length", type=int, default=512, help="tokens a row")
    sub.add_argument("--learning-rate", type=float, default=2e-4)
    sub.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="cosine")
    sub.add_argument("--weight-decay", type=float, default=0.0)
    sub.add_argument("--clip", type=float, default=1.0, help="global norm of the gradient (0: never)")
    sub.add_argument("--compute", choices=("float32", "bfloat16"), help="dtype to compute in")
    sub.add_argument("--remat", action="store_true", help="less memory for more time")
    sub.add_argument("--unroll", action="store_true", help="unroll the layers: faster on CPU, slower to compile")
    sub.add_argument("--learn-all", action="store_true", help="learn prompts as well as responses")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--save-every", type=int, default=100)
    sub.add_argument("--eval-every", type=int, default=0)
    sub.add_argument("--keep", type=int, default=3)
    sub.add_argument("--no-progress", action="store_true")


def run(args):
    import jax

    from jaxml import lm, log, tune
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
    )
    _check(args)
    examples = data.read_jsonl(args.data)
    held = data.read_jsonl(args.eval) if args.eval else []
    out = Path(args.out)
    result = out / ("adapter" if args.method == "lora" else "model")
    if result.exists():
        raise FileExistsError(f"{result}: this run is finished. Choose another --out.")
    model = load(args)
    if args.method == "lora" and not args.adapter:
        targets = args.targets.split(",")
        key = jax.random.key(args.seed)
        model = model.replace(
            params=adapters.attach(model.params, key, rank=args.rank or 8, alpha=args.alpha, targets=targets)
        )
    elif args.method != "lora":
        model = model.replace(params=adapters.merge(model.params))
    tx = lambda steps: tune.optimizer(options, steps, around=lambda adamw: _around(args, adamw))
    model, info = tune.fit(
        model, examples, options, eval_examples=held, tx=tx, folder=out, progress=not args.no_progress,
        about=_method(args),
    )  # fmt: skip
    if args.method == "lora":
        adapters.save_peft(result, model.params, model.config, base_model=args.model)
    else:
        lm.save(model, result)
    log.plot_loss(log.read(out / "log.jsonl"), out / "loss.png", title=f"Fine-tuning {Path(args.model).name}")
    shown = "" if info["eval_loss"] is None else f", held-out loss {info['eval_loss']:.4f}"
    print(f"{info['steps']} steps, loss {info['loss']:.4f}{shown}: {result}" if info["loss"] is not None else result)
    return 0


def _check(args):
    """Refuses what the method does not take."""
    takes = {"lora": ("rank", "alpha"), "full": (), "galore": ("rank", "gap")}[args.method]
    for name in ("rank", "alpha", "gap"):
        value = getattr(args, name)
        if value is not None and name not in takes:
            raise ValueError(f"finetune: --{name} is no option of --method {args.method}. Leave it out.")
        if value is not None and value <= 0:
            raise ValueError(f"finetune: --{name} is above 0, got {value}.")
    if args.method == "full" and args.targets != "*":
        raise ValueError("finetune: --targets is no option of --method full. Leave it out.")


def _method(args) -> dict:
    """What a run must agree in to be gone on with, beside its options."""
    return {k: getattr(args, k) for k in ("method", "rank", "alpha", "gap", "targets", "eight_bit")}


def _around(args, adamw):
    """The optimizer that the arguments ask for, around AdamW."""
    from jaxml import optim

    adamw = optim.eight_bit(adamw) if args.eight_bit else adamw
    if args.method != "galore":
        return adamw
    names = [] if args.targets == "*" else args.targets.split(",")
    where = lambda name: "^" if "/" in name else "(?:^|/)(?=[^/]*$)"  # as `adapters.attach` has it
    targets = [where(name) + fnmatch.translate(name) for name in names] or None
    kind = "int8" if args.eight_bit else "float32"
    return optim.galore(adamw, rank=args.rank or 128, gap=args.gap or 200, targets=targets, basis_dtype=kind)
