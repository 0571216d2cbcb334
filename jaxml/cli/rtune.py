"""Teach a model to say when it does not know (R-Tuning), and measure whether it does.

examples:
  jaxml rtune                                           (SmolLM2 on facts about countries)
  jaxml rtune --data pararel:path/to/pararel --out runs/pararel --train 600
  jaxml rtune --data questions.jsonl --model path/to/model --method qlora --variant refusal --out runs/mine
  jaxml rtune evaluate runs/rtune --data more.jsonl     (the finished run's model and threshold, on other questions)
  jaxml rtune ask runs/rtune "What is the capital of Peru?" "What is the capital of Balavia?"

DATA is JSONL with the keys question and answers (a list) or answer, and where there is one context, choices, group and
answerable (false for questions that nothing answers); or the word countries; or pararel:FOLDER. Some groups are kept
out of training, to be asked at the end.

============ ===================================================================
standard     R-Tuning: the answer, then "I am sure." or "I am unsure."
refusal      R-Tuning-R: unknown questions are answered by a refusal
unsupervised R-Tuning-U: sure where sampled answers agree
graded       Alignment for Honesty: as sure as sampled answers are right
craft        CRaFT: what is in between, or put right by a rehearsal, is left out
grounded     US-Tuning, for questions over a text: two stages
============ ===================================================================

Beside this model one is trained on the same questions without "Are you sure?", for comparison, and for fresh labels one
on each half of them. A run that was stopped goes on with the same command.
"""

import dataclasses
from pathlib import Path

from jaxml.cli.main import FORMATS, given

METHODS = {"lora": 1e-3, "qlora": 1e-3, "dora": 1e-3, "full": 5e-5, "prompt": 0.02}  # with their learning rates
SCALES = ("sure", "words", "numbers")


def add(sub):
    sub.add_argument("action", nargs="?", choices=("run", "evaluate", "ask"), default="run")
    sub.add_argument("given", nargs="*", metavar="RUN", help="of evaluate: a finished run; of ask: that and questions")
    sub.add_argument("--model", default="smollm2-135m", help="a known name or a path")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the parameters")
    sub.add_argument("--quantize", choices=FORMATS, help="its matrices, as they are read (qlora: nf4)")
    sub.add_argument("--data", metavar="DATA", help="default: countries; of evaluate to be given")
    sub.add_argument("--unanswerable", metavar="FILE", help="JSONL of questions that nothing answers, to be asked")
    sub.add_argument("--train-unanswerable", metavar="FILE", help="others, to be trained on; or invented:NUMBER")
    sub.add_argument("--out", default="runs/rtune", metavar="FOLDER")
    sub.add_argument("--variant", default="standard", help="see below")
    sub.add_argument("--labels", choices=("fresh", "untuned"), default="fresh", help="from models tuned on the others")
    sub.add_argument("--unknown", default="gold", help="trained after unknown questions: gold, own, heard or refusal")
    sub.add_argument("--scale", choices=SCALES, help="how certainty is asked for (default: sure; of graded words)")
    sub.add_argument("--no-balance", action="store_true", help="sure and unsure as often as they come")
    sub.add_argument("--method", choices=tuple(METHODS), default="lora")
    sub.add_argument("--rank", type=int, default=8, help="of lora and its kin; of prompt the places")
    sub.add_argument("--epochs", type=float, default=3.0)
    sub.add_argument("--learning-rate", type=float, help="default: by the method")
    sub.add_argument("--length", type=int, default=256, help="tokens a row of training")
    sub.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    sub.add_argument("--shots", type=int, default=4, help="questions shown to the untuned model")
    sub.add_argument("--train", type=int, default=200, help="questions")
    sub.add_argument("--calibration", type=int, default=80, help="questions that choose threshold and weight")
    sub.add_argument("--test", type=int, default=80, help="questions of each kind at the end")
    sub.add_argument(
        "--new-groups", metavar="NAMES",
        help="kept out of training, by comma; '' for none (default: a quarter; of countries three relations)",
    )  # fmt: skip
    sub.add_argument("--risk", type=float, help="share of wrong answers among those given, at most")
    sub.add_argument("--max-new-tokens", type=int, default=10, help="of an answer")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--no-progress", action="store_true")
    sub.set_defaults(usual={name: sub.get_default(name) for name in (*NAMES, "risk", "out")})


def run(args):
    return {"run": _run, "evaluate": _evaluate, "ask": _ask}[args.action](args)


# ---- run --------------------------------------------------------------------------------------------


def _run(args):
    import time

    from rich.console import Console

    from jaxml import log
    from jaxml.prompts.llm import fingerprint
    from jaxml.prompts.store import Store
    from jaxml.tune import r_tuning
    from jaxml.tune.run import agree, alone

    if args.given:
        raise ValueError(f"rtune: run takes options only, got {args.given[0]!r}. --data DATA names the questions.")
    args.data = args.data or "countries"
    out, console = Path(args.out), Console()
    if (out / "report.md").is_file():
        raise FileExistsError(f"{out / 'report.md'}: this run is finished. Choose another --out.")
    started = time.perf_counter()
    recipe, form = _recipe(args), _form(args)
    split = _split(args)
    recipe.check(split.train)
    _check_risk(args, len(split.calibration))
    model = _model(args)
    with alone(out):
        agree(out / "rtune.json", _about(args) | {"questions": _hash(split), "weights": fingerprint(model)}, "rtune")
    console.print(
        f"{len(split.train)} questions to train on, {len(split.calibration)} to calibrate, {len(split.seen)} of the "
        f"same kinds and {len(split.new)} of other kinds to ask, {len(split.unanswerable)} that nothing answers."
    )
    bare = dataclasses.replace(form, scale=None)  # the others are not taught to say how sure they are
    first = dataclasses.replace(bare, shots=tuple(split.shots))
    parts = {k: v for k in ("calibration", "seen", "new", "unanswerable") if (v := getattr(split, k))}
    with (
        alone(out),
        Store(out / "answers.jsonl") as store,
        log.progress("asking", enabled=not args.no_progress, fields=("who",)) as bar,
    ):
        asker = lambda who, count: _asker(args, store, bar, who, count)
        tune = lambda model, examples, name: _tune(args, model, examples, out / name)
        everything = lambda who, model, form: {
            k: asker(f"{who}: {k}", len(items)).answer(model, items, form) for k, items in parts.items()
        }

        untuned = everything("untuned", model, first)
        plain = tune(model, r_tuning.examples.plain(model.tokenizer, split.train, form), "plain")
        plain = everything("tuned", plain, bare)
        made = r_tuning.r_tune(
            model, split.train, tune, recipe, form=form, first=first, seed=args.seed,
            asker=asker("labels", len(split.train) * recipe.rounds),
        )  # fmt: skip
        ours = everything("R-Tuning", made.model, recipe.form(form))
    methods = [
        r_tuning.Method(f"R-Tuning, {args.variant}", _policy(args, ours), ours),
        r_tuning.Method("tuned, own probability", _policy(args, plain, weight=0.0), plain),
        r_tuning.Method("untuned, own probability", _policy(args, untuned, weight=0.0), untuned),
    ]
    before = {part: untuned[part].right for part in ("seen", "new") if part in untuned}
    report = r_tuning.compare(methods, before)
    methods[0].policy.save(out / "policy.json")
    report |= {"seconds": round(time.perf_counter() - started, 1), "device": _device()}
    report["about"] = _about(args) | {"risk": args.risk}
    above = _above(args, split, made, methods[0].policy)
    page = r_tuning.report.save(report, methods, out, above)
    print(page.read_text())
    print(
        f"{report['seconds']:.0f} s since this start, on {report['device']}: {page}, risk_coverage.png, "
        "reliability.png, the tuned model"
    )
    return 0


def _policy(args, answers, weight=None):
    from jaxml.tune import r_tuning

    answered = answers["calibration"]
    if args.risk is not None and weight is not None:  # the threshold from as many as R-Tuning's
        answered = answered.take(r_tuning.policy.halves(len(answered.right))[1])
    return r_tuning.calibrate(answered, risk=args.risk, weight=weight)


def _check_risk(args, calibration: int) -> None:
    """Refuses a promise that so few questions cannot keep, before anything is trained."""
    from jaxml.tune import r_tuning

    if args.risk is None:
        return
    least = 2 * r_tuning.policy.needed(args.risk)  # half of them choose the weight
    if calibration < least:
        raise ValueError(
            f"rtune: --risk {args.risk:g} takes at least {least} calibration questions, got {calibration}. Give "
            f"--calibration {least} or more (and data that has them), or a larger risk."
        )


def _above(args, split, made, policy) -> str:
    """The top of the page: what was done."""
    from jaxml.tune.r_tuning import report as pages

    lines = [f"# R-Tuning of {Path(args.model).name}", ""]
    groups = ", ".join(sorted({i.group for i in split.new if i.group})) or "none"
    lines += [f"Kept out of training: {groups}.", ""]
    if made.labels is not None:
        sure, kept = made.labels.sure >= 0.5, made.labels.keep
        lines += [
            f"D1 (sure): {int((sure & kept).sum())} questions; D0 (unsure): {int((~sure & kept).sum())}; left out: "
            f"{int((~kept).sum())}.", "",
            pages.examples_table(split.train, made.answered, made.labels), "",
        ]  # fmt: skip
    lines += [
        f"Confidence: {policy.weight:.2f} · certainty said + {1 - policy.weight:.2f} · the answer's own probability; "
        f"answered above {policy.threshold:.3f}, so that {policy.promise}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _asker(args, store, bar, who: str, count: int):
    from jaxml.tune import r_tuning

    task = bar.add_task("ask", total=count, who=who)
    tick = lambda n: bar.update(task, advance=n)
    return r_tuning.Asker(args.max_new_tokens, store=store, tick=tick)


def _tune(args, model, examples, folder: Path):
    """Trains by the method that was asked for; goes on with what an earlier stage has put onto the model."""
    import jax

    from jaxml import tune
    from jaxml.tune import adapters, prompt
    from jaxml.tune.adapters.tree import is_adapter
    from jaxml.weights import is_node

    key = jax.random.key(args.seed)
    adapted = any(is_adapter(w) for w in jax.tree.leaves(model.params, is_leaf=is_node))
    if args.method == "full" or adapted:
        made = model
    elif args.method == "prompt":
        made = prompt.soft(model, args.seed, length=args.rank)
    else:
        kind = "dora" if args.method == "dora" else "lora"
        made = model.replace(params=adapters.attach(model.params, key, method=kind, rank=args.rank))
    options = tune.Options(
        epochs=args.epochs,
        batch_size=1,
        length=min(args.length, model.config.max_length - (args.rank if args.method == "prompt" else 0)),
        learning_rate=args.learning_rate or METHODS[args.method],
        schedule="linear",
        seed=args.seed,
        unroll=jax.default_backend() == "cpu",
        save_every=20,
        keep=1,
    )
    tuned, _ = tune.fit(made, examples, options, folder=folder, progress=not args.no_progress)
    _keep(args, tuned, folder)
    return tuned


def _keep(args, tuned, folder: Path) -> None:
    from jaxml import lm
    from jaxml.tune import adapters

    if args.method == "full":
        if not (folder / "model").exists():
            lm.save(tuned, folder / "model")
    elif not (folder / "adapter").exists():
        adapters.save_peft(folder / "adapter", tuned.params, tuned.config, base_model=args.model)


def _recipe(args):
    from jaxml.tune import r_tuning

    if args.scale and args.variant in ("refusal", "grounded"):
        raise ValueError(f"rtune: --variant {args.variant} asks for no certainty, got --scale {args.scale}.")
    if args.variant == "grounded" and (args.labels, args.unknown, args.no_balance) != ("fresh", "gold", False):
        raise ValueError("rtune: --variant grounded labels nothing, got --labels, --unknown or --no-balance.")
    if args.quantize and args.method == "full":
        raise ValueError(f"rtune: --method full trains dense weights, got --quantize {args.quantize}. Take qlora.")
    return r_tuning.Recipe(
        variant=args.variant, fresh=args.labels == "fresh", unknown=args.unknown, balance=not args.no_balance
    )


def _form(args):
    from jaxml.tune import r_tuning

    name = args.scale or ("words" if args.variant == "graded" else "sure")
    scales = {"sure": r_tuning.SURE, "words": r_tuning.WORDS, "numbers": r_tuning.NUMBERS}
    return r_tuning.Form(scale=scales[name], chat=args.chat)


def _model(args):
    from jaxml import lm

    quantize = args.quantize or ("nf4" if args.method == "qlora" else None)
    return lm.load(args.model, args.dtype, quantize=quantize)


def _questions(data: str):
    from jaxml.tune import r_tuning

    if data == "countries":
        return r_tuning.countries()
    if data.startswith("pararel:"):
        return r_tuning.pararel(data.partition(":")[2])
    return r_tuning.read(data)


def _split(args):
    from jaxml.tune import r_tuning

    nothing = [] if args.unanswerable is None else r_tuning.read(args.unanswerable)
    if args.data == "countries" and args.unanswerable is None:
        nothing = r_tuning.invented(args.test, seed=args.seed)
    names = r_tuning.sources.NEW if args.data == "countries" else 0.25
    if args.new_groups is not None:
        names = [name.strip() for name in args.new_groups.split(",") if name.strip()]
    return r_tuning.split(
        _questions(args.data), train=args.train, calibration=args.calibration, test=args.test, new=args.test,
        shots=args.shots, new_groups=names, unanswerable=nothing, train_unanswerable=_taught(args), seed=args.seed,
    )  # fmt: skip


def _taught(args) -> list:
    """Questions that nothing answers, to train on."""
    from jaxml.tune import r_tuning

    given = args.train_unanswerable
    if given is None:
        return []
    if given.startswith("invented:"):
        count = given.partition(":")[2]
        if not count.isdigit():
            raise ValueError(f"rtune: --train-unanswerable invented:NUMBER has a number, got {count!r}.")
        return r_tuning.invented(int(count), seed=args.seed, part="train")
    items = r_tuning.read(given)
    if known := [item.question for item in items if item.answerable]:
        raise ValueError(f"rtune: --train-unanswerable holds questions without an answer, {known[0]!r} has one.")
    return items


NAMES = (
    "model", "dtype", "quantize", "data", "unanswerable", "train_unanswerable", "variant", "labels", "unknown", "scale",
    "no_balance", "method", "rank", "epochs", "learning_rate", "length", "chat", "shots", "train", "calibration",
    "test", "new_groups", "max_new_tokens", "seed",
)  # fmt: skip


def _about(args) -> dict:
    return {name: getattr(args, name) for name in NAMES}


def _hash(split) -> str:
    """Of all questions and where they stand."""
    from jaxml.prompts.store import key
    from jaxml.tune import r_tuning

    return key({name: [r_tuning.items.row(item) for item in part] for name, part in vars(split).items()})


def _device() -> str:
    import jax

    return jax.devices()[0].device_kind


# ---- a finished run ---------------------------------------------------------------------------------


def _finished(args):
    """What `finished` finds, of the run that was given."""
    if not args.given:
        raise ValueError(f"rtune {args.action}: a finished run is given, got none.")
    taken = ("data",) if args.action == "evaluate" else ()
    if other := [name for name in given(args) if name not in taken]:
        raise ValueError(
            f"rtune {args.action}: the finished run has its own options, got --{other[0].replace('_', '-')} as well."
        )
    return finished(args.given[0])


def finished(folder: str | Path):
    """(its options, model, form, policy) of a run.

    Raises:
        FileNotFoundError, ValueError: no run, one that is not finished, or a damaged one.
    """
    import argparse

    from jaxml import files, lm
    from jaxml.tune import adapters, r_tuning

    folder = Path(folder)
    if not (folder / "policy.json").is_file():
        raise FileNotFoundError(f"{folder}: no finished run (policy.json is missing).")
    policy = r_tuning.Policy.load(folder / "policy.json")
    try:
        kept = files.read_json(folder / "rtune.json")
        then = argparse.Namespace(**{name: kept[name] for name in NAMES})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'rtune.json'}: missing or damaged ({error!r}).") from error
    last = max((p for p in folder.glob("stage-*")), default=folder / "r-tuned")
    if then.method == "full":
        model = lm.load(last / "model")
    else:
        model = _model(then)
        model = model.replace(params=adapters.load_peft(last / "adapter", model.params, model.config))
    return then, model, _recipe(then).form(_form(then)), policy


def _evaluate(args):
    from jaxml import log
    from jaxml.prompts.store import Store
    from jaxml.tune import r_tuning

    then, model, form, policy = _finished(args)
    if len(args.given) > 1 or args.data is None:
        raise ValueError("rtune evaluate: one run is given, and its questions by --data DATA.")
    items = _questions(args.data)
    with (
        Store(Path(args.given[0]) / "answers.jsonl") as store,
        log.progress("asking", enabled=not args.no_progress, fields=("who",)) as bar,
    ):
        answered = _asker(then, store, bar, "R-Tuning", len(items)).answer(model, items, form)
    has = [i for i, item in enumerate(items) if item.answerable]
    not_ = [i for i, item in enumerate(items) if not item.answerable]
    method = r_tuning.Method("R-Tuning", policy, {"given": answered.take(has)} if has else {})
    report = r_tuning.compare([method]) if has else {}
    if has:
        print(r_tuning.report.markdown(report))
    if not_:
        refused = ~policy.willing(answered.take(not_))
        print(f"{len(not_)} questions that nothing answers: {refused.mean():.1%} refused")
    return 0


def _ask(args):
    from jaxml.tune import r_tuning

    then, model, form, policy = _finished(args)
    if not args.given[1:]:
        raise ValueError("rtune ask: at least one question is given, got none.")
    said = r_tuning.answer_or_refuse(model, args.given[1:], policy, form, max_new_tokens=then.max_new_tokens)
    for question, one in zip(args.given[1:], said):
        print(f"{question} {one} (confidence {one.confidence:.2f}, answered above {policy.threshold:.2f})")
    return 0
