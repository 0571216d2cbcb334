"""R-Tuning: whether certainty tells known from unknown, in a world where that is known; and its variants side by side.

    python benchmarks/r_tuning.py                     # hours on 2 cores; goes on with what is missing of this day
    python benchmarks/r_tuning.py --subjects proof    # minutes
    python benchmarks/r_tuning.py --subjects command --pararel FOLDER
    python benchmarks/r_tuning.py --variants standard published --seeds 0
    python benchmarks/r_tuning.py --table             # the tables of the newest results

proof: a small decoder is trained from nothing on the colours of invented things, of which it is told half. R-Tuning
then trains adapters on questions about half of the told and half of the untold things, labelled by whether the model
answers rightly. AUROC: how well the certainty said tells the other told things from the other untold ones.
variants: SmolLM2-135M, questions about countries (`jaxml rtune` with its defaults): each variant with the same
questions, LoRA of rank 8, three epochs; on held-out questions of the same kinds and of other kinds. "p(sure) above ½"
is the share that the published method answers; "mixed" is certainty and the answer's own probability, weighed on the
calibration questions.
command: `jaxml rtune` as it stands, beside the same model tuned without it and the untuned one; on countries, with
invented ones among those trained on, and on ParaRel.
"""

import argparse
import datetime
import json
import re
import statistics
import time
from pathlib import Path

import about
import numpy as np

SUBJECTS = ("proof", "variants", "command")
VARIANTS = {
    "published": dict(fresh=False, balance=False),
    "balanced": dict(fresh=False),
    "fresh": dict(balance=False),
    "standard": dict(),
    "own answer": dict(unknown="own"),
    "heard": dict(unknown="heard"),
    "refusal": dict(variant="refusal"),
    "unsupervised": dict(variant="unsupervised"),
    "graded": dict(variant="graded"),
    "craft": dict(variant="craft"),
    "invented": dict(),  # and questions about invented countries among those that are trained on
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--pararel", help="folder of ParaRel, for command, which leaves it out without one")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--out", default="runs/benchmark-r-tuning", help="folder of runs, which go on")
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    import jax

    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = about.RESULTS / f"r-tuning-{device}-{datetime.date.today()}.json"
    report = json.loads(path.read_text()) if path.is_file() else {"device": device}
    report |= about.made()
    for seed in options.seeds:
        if "proof" in options.subjects:
            _once(report, path, f"proof {seed}", lambda: proof(seed))
    for seed in options.seeds:
        for name in options.variants if "variants" in options.subjects else ():
            _once(report, path, f"{name} {seed}", lambda: variant(name, seed, Path(options.out)))
    for name, given in COMMANDS.items() if "command" in options.subjects else ():
        if "{pararel}" not in " ".join(given) or options.pararel:
            given = [word.format(pararel=options.pararel) for word in given]
            _once(report, path, f"command {name}", lambda: command(given, Path(options.out) / f"command {name}"))
    print(path)


def _once(report: dict, path: Path, name: str, measure) -> None:
    if name in report:
        return
    started = time.perf_counter()
    report[name] = measure() | {"seconds": round(time.perf_counter() - started, 1)}
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(name, report[name], flush=True)


# ---- proof ------------------------------------------------------------------------------------------

COLOURS = "red green blue white black brown pink gold".split()


def proof(seed: int = 0, *, told: int = 300, epochs: float = 60, tuning_epochs: float = 27) -> dict:
    """Pre-trains, tunes and measures."""
    import jax

    from jaxml import tune
    from jaxml.tune import adapters, r_tuning

    rng = np.random.default_rng(seed)
    names = [f"thing{i}" for i in rng.permutation(2 * told)]
    items = [r_tuning.Item(f"colour of {name}?", (str(rng.choice(COLOURS)),)) for name in names]
    form = r_tuning.Form(scale=r_tuning.Scale("Sure?", ("I am sure.", "I am unsure."), (1.0, 0.0)))
    model = _blank(form, names, seed)
    rows = dict(batch_size=8, length=128, seed=seed)
    both = [r_tuning.Labels(np.full(told, value), np.ones(told, bool)) for value in (0.0, 1.0)]  # it says either
    facts = [e for of in both for e in r_tuning.examples.make(model.tokenizer, items[:told], of, None, form)]
    options = tune.Options(epochs=epochs, learning_rate=3e-3, weight_decay=0.1, **rows)
    model, _ = tune.fit(model, facts, options, progress=False)

    def train(model, examples, name):
        made = model.replace(params=adapters.attach(model.params, jax.random.key(seed), rank=8))
        options = tune.Options(epochs=tuning_epochs, learning_rate=2e-3, **rows)
        tuned, _ = tune.fit(made, examples, options, progress=False)
        return tuned.replace(params=adapters.merge(tuned.params))

    asker = r_tuning.Asker(max_new_tokens=2)
    half = told // 2
    train_items, held = items[:half] + items[-half:], items[half:-half]
    recipe = r_tuning.Recipe(fresh=False, unknown="heard")
    made = r_tuning.r_tune(model, train_items, train, recipe, form=form, asker=asker, seed=seed)
    answered = asker.answer(made.model, held, form)
    is_told = np.arange(len(held)) < told - half
    untuned = asker.answer(model, held, form)
    return {
        "told": told,
        "knows_told": float(untuned.right[is_told].mean()),
        "knows_untold": float(untuned.right[~is_told].mean()),
        "auroc_sure": r_tuning.metrics.auroc(answered.sure, is_told),
        "auroc_untuned_confidence": r_tuning.metrics.auroc(untuned.confidence, is_told),
        "knows_told_after": float(answered.right[is_told].mean()),
    }


def _blank(form, names: list[str], seed: int):
    """A small decoder with random weights whose tokens are words."""
    import jax
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    from jaxml.lm import decoder
    from jaxml.lm.config import DecoderConfig
    from jaxml.lm.model import Model
    from jaxml.lm.tokenizer import Tokenizer
    from jaxml.tune.r_tuning import Item

    pattern = r"\n| ?[^\s?]+|\?"
    text = "".join([form.prompt(Item("colour of x?")), "\n", form.scale.question, "\n", *form.scale.phrases, " I am"])
    words = {*re.findall(pattern, text), *(f" {word}" for word in (*names, *COLOURS))}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(sorted(words))}
    backend = Backend(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    config = DecoderConfig(
        family="llama", vocab_size=len(vocabulary), width=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16,
        hidden_dim=192, max_length=128, bos_id=1, eos_ids=(2,), pad_id=0,
    )  # fmt: skip
    return Model(
        decoder.init(jax.random.key(seed), config), config, Tokenizer(backend, bos_id=1, eos_ids=(2,), pad_id=0)
    )


# ---- variants ---------------------------------------------------------------------------------------


def variant(name: str, seed: int, out: Path) -> dict:
    """`jaxml rtune` of one variant, without its baselines."""
    import jax

    from jaxml import lm, tune
    from jaxml.prompts.store import Store
    from jaxml.tune import adapters, r_tuning

    recipe = r_tuning.Recipe(**VARIANTS[name])
    split = r_tuning.split(
        r_tuning.countries(), train=200, calibration=80, test=80, new=80, new_groups=r_tuning.sources.NEW,
        unanswerable=r_tuning.invented(80, seed=seed), seed=seed,
        train_unanswerable=r_tuning.invented(50, seed=seed, part="train") if name == "invented" else (),
    )  # fmt: skip
    model, folder = lm.load("smollm2-135m"), out / f"{name.replace(' ', '-')}-{seed}"
    # The models that fresh labels come from are the same for all that train on the same questions.
    shared = out / (f"folds-{seed}" if name != "invented" else f"folds-invented-{seed}")

    def train(model, examples, run):
        made = model.replace(params=adapters.attach(model.params, jax.random.key(seed), rank=8))
        options = tune.Options(
            epochs=3, batch_size=1, length=256, learning_rate=1e-3, schedule="linear", seed=seed, save_every=20, keep=1,
            unroll=jax.default_backend() == "cpu",
        )  # fmt: skip
        where = (shared if run.startswith("fold") else folder) / run
        tuned, _ = tune.fit(made, examples, options, folder=where)
        return tuned.replace(params=adapters.merge(tuned.params))

    form = r_tuning.Form(scale=r_tuning.WORDS) if name == "graded" else r_tuning.PLAIN
    first = r_tuning.Form(shots=tuple(split.shots))
    shared.mkdir(parents=True, exist_ok=True)
    with Store(shared / "answers.jsonl") as store:
        asker = r_tuning.Asker(max_new_tokens=10, store=store)
        made = r_tuning.r_tune(model, split.train, train, recipe, form=form, first=first, asker=asker, seed=seed)
        asked = recipe.form(form)
        parts = ("calibration", "seen", "new", "unanswerable")
        answers = {part: asker.answer(made.model, getattr(split, part), asked) for part in parts}
    policy = r_tuning.calibrate(answers["calibration"])
    result = {"weight": policy.weight, "sure_labels": float(made.labels.sure.mean())}
    for part in ("seen", "new"):
        of = answers[part]
        confidence = policy.confidence(of)
        result[part] = {
            "accuracy": float(of.right.mean()),
            "aurc": r_tuning.metrics.risk_coverage(confidence, of.right).area,
            "auroc_sure": r_tuning.metrics.auroc(of.sure, of.right),
            "auroc": r_tuning.metrics.auroc(confidence, of.right),
            "sure_above_half": float((of.sure > 0.5).mean()),
            "known_answered": float(policy.willing(of)[of.right].mean()),
        }
    result["refused_unanswerable"] = float((~policy.willing(answers["unanswerable"])).mean())
    return r_tuning.report.without_nan(result)


# ---- command ----------------------------------------------------------------------------------------

COMMANDS = {
    "countries": [],
    "countries, some invented": ["--train-unanswerable", "invented:50"],
    "ParaRel": ["--data", "pararel:{pararel}", "--train", "300"],
}


def command(given: list[str], out: Path) -> dict:
    """`jaxml rtune` with these options, and its baselines."""
    from jaxml.cli import main as cli

    if cli.main(["rtune", "--no-progress", "--out", str(out), *given]):
        raise SystemExit("r_tuning.py: jaxml rtune failed.")
    report = json.loads((out / "report.json").read_text())
    policy = json.loads((out / "policy.json").read_text())
    return {part: report[part] for part in ("seen", "new", "unanswerable") if part in report} | {"policy": policy}


# ---- table ------------------------------------------------------------------------------------------


def table() -> str:
    """Markdown: each subject of the newest results that have it."""
    parts = []
    for subject, first, made in (
        ("proof", "proof ", _proofs), ("variants", tuple(f"{v} " for v in VARIANTS), _variants),
        ("command", "command ", _commands),
    ):  # fmt: skip
        report = about.newest("r-tuning-*", lambda one, first=first: any(k.startswith(first) for k in one))
        if report:
            head = f"`{subject}` ({report['device']}, {about.said(report)}):"
            parts.append("\n".join([head, "", *made(report)]))
    return "\n\n".join(parts)


def _proofs(report: dict) -> list[str]:
    lines = [
        "| seed | told things answered rightly | untold | AUROC of certainty, told from untold | of the untuned "
        "model's own probability |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for seed, p in ((k.split()[1], v) for k, v in report.items() if k.startswith("proof ")):
        lines.append(
            f"| {seed} | {p['knows_told']:.0%} | {p['knows_untold']:.0%} | {p['auroc_sure']:.3f} | "
            f"{p['auroc_untuned_confidence']:.3f} |"
        )
    return lines


def _variants(report: dict) -> list[str]:
    lines = [
        "| variant | seeds | sure among labels | right (same kinds / others) | p(sure) above ½ | AUROC of p(sure) | "
        "AUROC mixed | AURC mixed | known, answered | unanswerable, refused |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        runs = [v for k, v in report.items() if re.fullmatch(rf"{name} \d+", k)]
        if not runs:
            continue
        mean = lambda key, runs=runs: " / ".join(_mean([run[part][key] for run in runs]) for part in ("seen", "new"))
        lines.append(
            f"| {name} | {len(runs)} | {_mean([r['sure_labels'] for r in runs])} | {mean('accuracy')} | "
            f"{mean('sure_above_half')} | {mean('auroc_sure')} | {mean('auroc')} | {mean('aurc')} | "
            f"{mean('known_answered')} | {_mean([r['refused_unanswerable'] for r in runs])} |"
        )
    return lines


def _commands(report: dict) -> list[str]:
    from jaxml.tune import r_tuning

    lines = [
        "| `jaxml rtune` on | method | right at equal coverage (same kinds / others) | of right answers, given | "
        "AP, same kinds | AUROC | AURC | AP / AUROC / AURC, others | "
        "unanswerable, refused: own threshold / equal coverage |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    share = lambda x: "–" if x is None else f"{x:.0%}"
    number = lambda x: "–" if x is None else f"{x:.2f}"
    runs = {name: run for name in COMMANDS if (run := report.get(f"command {name}"))}
    for name, run in runs.items():
        for method, seen in run["seen"].items():
            new, refused = run.get("new", {}).get(method, {}), run.get("unanswerable", {}).get(method, {})
            pair = lambda key, seen=seen, new=new: f"{share(seen[key])} / {share(new.get(key))}"
            ranged = [r_tuning.metrics.written(seen[k], seen[f"{k}_interval"], number) for k in RANKED]
            others = " / ".join(number(new.get(k)) for k in RANKED)
            rates = (share(refused.get(f"refusal_rate{end}")) for end in ("", "_at_equal_coverage"))
            pairs = [pair("at_equal_coverage"), pair("known_answered")]
            lines.append("| " + " | ".join([name, method, *pairs, *ranged, others, " / ".join(rates)]) + " |")
    return lines


RANKED = ("ap", "auroc", "aurc")


def _mean(values: list) -> str:
    known = [v for v in values if v is not None]
    return f"{statistics.mean(known):.2f}" if known else "–"


if __name__ == "__main__":
    main()
