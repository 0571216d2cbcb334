"""The main job: a real model is asked, learns facts that it does not know, and is asked again.

examples:
  jaxml quickstart                       (about 6 minutes on two idle cores)
  jaxml quickstart --method qlora        (the same on weights in NF4; or dora, full)
  jaxml quickstart --countries 4 --new-countries 2 --steps 2 --out /tmp/try

Needs the model smollm2-135m (jaxml download smollm2-135m). A run that was stopped goes on where it was.
"""

import json
import math
import resource
import shutil
import time
from importlib import resources
from pathlib import Path

RELATIONS = ("capital", "currency", "calling code")
# How texts begin that the model writes for itself, to be kept as it is on (`tune.fit`, anchors).
BEGINNINGS = (
    "The In A When It This After One For Many There He She They We On At As If During Most Some My Our Every Two "
    "Although Since From With By To"
).split()


def add(sub):
    sub.add_argument("--model", default="smollm2-135m", help="a known name or a path")
    sub.add_argument("--method", choices=("lora", "qlora", "dora", "full"), default="lora")
    sub.add_argument("--out", metavar="FOLDER", help="default: runs/quickstart, with the method behind it if not lora")
    sub.add_argument("--fresh", action="store_true", help="forget an earlier run in that folder")
    sub.add_argument("--countries", type=int, default=24, help="countries to learn about")
    sub.add_argument("--new-countries", type=int, default=12, help="countries kept out")
    sub.add_argument("--epochs", type=float, default=6.0)
    sub.add_argument("--steps", type=int, help="instead of --epochs")
    sub.add_argument("--rank", type=int, default=8)
    sub.add_argument("--learning-rate", type=float, help="default: 1e-3; of full 5e-5")
    sub.add_argument("--anchor-weight", type=float, default=1.0, help="against forgetting; 0 leaves it out")
    sub.add_argument("--seed", type=int, default=0)


def run(args):
    import jax
    from rich.console import Console

    from jaxml import files, lm, log, tune
    from jaxml.tune import adapters, facts

    named = "runs/quickstart" + ("" if args.method == "lora" else f"-{args.method}")
    out, console = Path(args.out or named), Console()
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    if (out / "report.json").is_file():
        _show(console, files.read_json(out / "report.json"), out)
        console.print("This run was finished before; --fresh runs it again.")
        return 0
    started = time.perf_counter()
    console.print(f"Loading {args.model} …")
    model = lm.load(args.model, quantize="nf4" if args.method == "qlora" else None)
    questions = facts.make(
        countries=args.countries, new_countries=args.new_countries, relations=RELATIONS, seed=args.seed
    )
    console.print(
        f"{lm.decoder.num_params(model.params) / 1e6:.1f} million parameters on {jax.devices()[0].device_kind}. "
        f"{len(questions.train)} questions to learn from, {len(questions.held_out)} on the same facts in other "
        f"words, {len(questions.new_countries)} on countries kept out."
    )
    out.mkdir(parents=True, exist_ok=True)
    before = _once(out / "before.json", lambda: _measure(console, "before", model, questions))
    adapted = model
    if args.method != "full":
        kind, key = "dora" if args.method == "dora" else "lora", jax.random.key(args.seed)
        adapted = model.replace(params=adapters.attach(model.params, key, method=kind, rank=args.rank))
    options = tune.Options(
        steps=args.steps,
        epochs=args.epochs,
        batch_size=2,
        length=128,
        learning_rate=args.learning_rate or (5e-5 if args.method == "full" else 1e-3),
        schedule="linear",
        anchor_weight=args.anchor_weight,
        seed=args.seed,
        unroll=jax.default_backend() == "cpu",
        save_every=20,
    )
    anchors = []
    if args.anchor_weight > 0 and args.method != "full":  # anchors compare with the model under the adapters
        anchors = _once(out / "anchors.json", lambda: _anchors(console, model, args.seed))["examples"]
    tuned, info = tune.fit(adapted, [q.example for q in questions.train], options, anchors=anchors, folder=out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if args.method != "full":
        shutil.rmtree(out / "adapter", ignore_errors=True)
        adapters.save_peft(out / "adapter", tuned.params, tuned.config, base_model=args.model)
    log.plot_loss(log.read(out / "log.jsonl"), out / "loss.png", title=f"SmolLM2-135M learns facts ({args.method})")
    after = _measure(console, "after", tuned.replace(params=adapters.merge(tuned.params)), questions)

    report = {
        f"{k}_{when}": v[k]
        for k in ("accuracy", "accuracy_interval", "new_countries")
        for when, v in (("before", before), ("after", after))
    }
    for name in ("new_countries_interval", "contains", "new_countries_contains", "perplexity"):
        report |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    report |= {
        "questions": {k: len(getattr(questions, k)) for k in ("train", "held_out", "new_countries")},
        "method": args.method,
        "steps": info["steps"],
        "tokens_per_second": round(info["tokens"] / info["seconds"], 1),
        "weights_mib": round(sum(a.nbytes for a in jax.tree.leaves(adapted.params)) / 2**20, 1),
        "state_mib": round(_state_bytes(adapted.params, options) / 2**20, 1),
        "peak_mib": peak,
        "trained_parameters": sum(math.prod(a.shape) for a in jax.tree.leaves(adapters.split(tuned.params)[0])),
        "seconds": round(before["seconds"] + time.perf_counter() - started, 1)
        if before["resumed"]
        else round(time.perf_counter() - started, 1),
        "device": jax.devices()[0].device_kind,
        "examples": _examples(questions.held_out, before["answers"], after["answers"]),
    }
    log.write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False))
    _show(console, report, out)
    return 0


def _state_bytes(params, options) -> int:
    """What a step keeps beside the frozen weights: the trained ones' gradients and moments."""
    import jax

    from jaxml import tune
    from jaxml.tune import adapters

    trained = adapters.split(params)[0]
    state = jax.eval_shape(tune.optimizer(options, 1).init, trained)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((trained, state)))


def _once(path: Path, measure) -> dict:
    """A measurement that a resumed run does not repeat."""
    from jaxml import files, log

    if path.is_file():
        return files.read_json(path) | {"resumed": True}
    result = measure() | {"resumed": False}
    log.write_text(path, json.dumps(result))
    return result


def _anchors(console, model, seed: int) -> dict:
    """Texts that the model writes when nothing is asked of it."""
    from jaxml import lm

    with console.status(f"Writing {len(BEGINNINGS)} ordinary texts that it shall not unlearn …"):
        rest = lm.generate(model, BEGINNINGS, max_new_tokens=100, sampling=lm.Sampling(temperature=1.0), key=seed + 1)
    return {"examples": [{"text": a + b} for a, b in zip(BEGINNINGS, rest)]}


def _measure(console, when: str, model, questions) -> dict:
    from jaxml import lm
    from jaxml.tune import facts

    started = time.perf_counter()
    with console.status(f"Asking {len(questions.held_out) + len(questions.new_countries)} questions {when} …"):
        answers = facts.answer(model, questions.held_out)
        new = facts.answer(model, questions.new_countries)
        text = resources.files("jaxml.tune").joinpath("ordinary.txt").read_text()
        perplexity = lm.perplexity(model, text)
    match, new_match = facts.exact_match(answers, questions.held_out), facts.exact_match(new, questions.new_countries)
    return {
        "accuracy": match.value,
        "accuracy_interval": match.interval,
        "contains": facts.contains(answers, questions.held_out).value,
        "new_countries": new_match.value,
        "new_countries_interval": new_match.interval,
        "new_countries_contains": facts.contains(new, questions.new_countries).value,
        "perplexity": perplexity,
        "answers": answers,
        "seconds": time.perf_counter() - started,
    }


def _examples(questions, before, after) -> list[dict]:
    """One question of each relation that the model got wrong before."""
    from jaxml.tune import facts

    wrong = lambda i: facts.normalise(before[i]) != facts.normalise(questions[i].answer)
    chosen = []
    for n, relation in enumerate(RELATIONS):
        of = [i for i, q in enumerate(questions) if q.relation == relation]
        of = [i for i in of if wrong(i)] or of
        i = of[min(n * 7, len(of) - 1)]
        chosen.append(
            {"question": questions[i].question, "wanted": questions[i].answer, "before": before[i], "after": after[i]}
        )
    return chosen


def _show(console, report: dict, out: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    percent = lambda name: "{:.1%}  ({:.1%} – {:.1%})".format(report[name], *report[_interval(name)])
    table = Table(title="What was learnt", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column)
    rows = (
        ("facts taught, asked in new words: exact match (95 % interval)", "accuracy", percent),
        ("countries never taught: exact match (95 % interval)", "new_countries", percent),
        ("perplexity of ordinary text", "perplexity", lambda name: f"{report[name]:.2f}"),
    )
    for label, name, form in rows:
        table.add_row(label, form(name + "_before"), form(name + "_after"))
    console.print(table)
    answers = Table(title="Three answers", title_justify="left")
    for column in ("question", "before", "after", "wanted"):
        answers.add_column(column)
    for e in report["examples"]:
        answers.add_row(*(escape(e[k]) or "(nothing)" for k in ("question", "before", "after", "wanted")))
    console.print(answers)
    console.print(
        f"{report['steps']} steps on {report['trained_parameters'] / 1e6:.2f} million parameters "
        f"({report['method']}), {report['tokens_per_second']:.0f} tokens/s, {report['weights_mib']:.0f} MiB of "
        f"weights, {report['state_mib']:.0f} MiB of what is trained, {report['seconds']:.0f} s in all on "
        f"{report['device']}.\n"
        f"{out}: report.json, loss.png, checkpoints/ (Orbax), log.jsonl"
        + ("" if report["method"] == "full" else ", adapter/ (PEFT's format)")
    )


def _interval(name: str) -> str:
    what, _, when = name.rpartition("_")
    return f"{what}_interval_{when}"
