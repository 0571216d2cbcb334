"""Prompts: choices scored in one pass against separate passes and transformers; methods of adapting side by side.

    python benchmarks/prompts.py                     # half an hour on 2 cores; needs the extra "oracle"
    python benchmarks/prompts.py --subjects choices  # some of choices, starts, methods
    python benchmarks/prompts.py --table             # the tables of the newest results

choices: SmolLM2-135M in float32, a prompt of 200 tokens and choices of 4: `score_choices`' one pass; the same texts as
rows of one batch, nothing shared; one text after the other; transformers on the rows of a batch; transformers with the
prompt's cache read once and used again. And four such prompts, whose first 150 tokens are the same.
Seconds are the median of rounds in turn, compile time not counted.
starts: how far a prefix or a soft prompt of 20 places moves the model before training: nats of divergence of the next
token, against the model after its first token, over two texts.
methods: facts about 30 countries (capital, demonym, subregion), for all the same rows of tokens and as many steps; a
search for a prompt in words may read three times as many tokens, since a training step costs that of three passes.
Exact match on questions about the same facts in other words, and about countries never trained on. A run that was
stopped goes on with what is missing of this day.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import about
import numpy as np

SUBJECTS = ("choices", "starts", "methods")
PROMPT, LENGTH_OF_CHOICE = 200, 4
STEPS, ROWS, LENGTH, PLACES = 80, 2, 128, 20
RELATIONS = ("capital", "demonym", "subregion")
METHODS = {
    "nothing": None,
    "soft prompt": 2e-2,
    "prefix": 1e-2,
    "LoRA, rank 8": 5e-4,
    "full": 3e-5,
    "words, searched": None,
}
INSTRUCTIONS = (
    "",
    "Answer each question about a country in one or two words.",
    "Questions and short answers about geography:",
    "Complete the answer with the right name only.",
)
TEXTS = (
    "The capital of France is Paris. It lies on the Seine, and about two million people live there today.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # prints three and nothing else at all",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    import jax

    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = about.RESULTS / f"prompts-{kind}-{datetime.date.today().isoformat()}.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= about.made("torch", "transformers")
    report["device"] = jax.devices()[0].device_kind

    def save(subject: str, rows: list[dict]) -> None:
        report[subject] = rows
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(report, indent=1))
        os.replace(temporary, path)

    for subject in options.subjects:
        rows = globals()[subject](lambda rows, subject=subject: save(subject, rows), report.get(subject, []))
        save(subject, rows)
    print(path)


# ---- choices -----------------------------------------------------------------------------------------


def choices(save, done) -> list[dict]:
    import torch
    import transformers

    from jaxml import lm
    from jaxml.lm.score import score_trees
    from jaxml.lm.tree import Node

    model = lm.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        lm.save(model, Path(folder) / "m")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "m", dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(100, 40000, n).tolist()
    rows = list(done)
    for count, number in ((2, 1), (4, 1), (8, 1), (16, 1), (4, 4)):
        if any((row["choices"], row["prompts"]) == (count, number) for row in rows):
            continue
        common, of = draw(PROMPT - 50), [draw(LENGTH_OF_CHOICE) for _ in range(count)]
        asked = [common + draw(50) for _ in range(number)]
        trees = [Node(prompt, [Node(c, scored=True) for c in of]) for prompt in asked]
        apart = [Node(prompt, [Node(c, scored=True)]) for prompt in asked for c in of]
        calls = {
            "tree": lambda: [v.sum() for nodes in score_trees(model, trees) for v in nodes],
            "separate": lambda: [v[0].sum() for v in score_trees(model, apart, share=False)],
            "one_by_one": lambda: [score_trees(model, [one])[0][0].sum() for one in apart],
            "transformers": lambda: [v for prompt in asked for v in _rows_of(theirs, prompt, of)],
            "transformers_cache": lambda: [v for prompt in asked for v in _cache_of(theirs, prompt, of)],
        }
        values = {name: np.array(call(), np.float64) for name, call in calls.items()}
        times = {name: [] for name in calls}
        for _ in range(5 if number == 1 else 2):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
        row = {"prompts": number, "choices": count} | {f"{name}_s": statistics.median(t) for name, t in times.items()}
        row |= {f"{name}_times": row[f"{name}_s"] / row["tree_s"] for name in calls if name != "tree"}
        row["largest_difference"] = float(max(np.abs(v - values["tree"]).max() for v in values.values()))
        rows.append(row | {"times": times})
        print({k: v for k, v in row.items() if k != "times"}, flush=True)
        save(rows)
    return rows


def _rows_of(model, prompt, of):
    import torch

    ids = torch.tensor([prompt + c for c in of])
    with torch.no_grad():
        logs = model(input_ids=ids, logits_to_keep=LENGTH_OF_CHOICE + 1).logits.log_softmax(-1)[:, :-1]
    return logs.gather(-1, ids[:, -LENGTH_OF_CHOICE:, None]).sum((1, 2)).tolist()


def _cache_of(model, prompt, of):
    import torch

    with torch.no_grad():
        first = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(of))
        ids = torch.tensor(of)
        rest = model(input_ids=ids, past_key_values=cache).logits[:, :-1]
        logs = torch.cat([first.logits.expand(len(of), -1, -1), rest], 1).log_softmax(-1)
    return logs.gather(-1, ids[..., None]).sum((1, 2)).tolist()


# ---- starts ------------------------------------------------------------------------------------------


def starts(save, done) -> list[dict]:
    import jax
    import jax.numpy as jnp

    from jaxml import lm
    from jaxml.lm import decoder
    from jaxml.tune import prompt

    model = lm.load("smollm2-135m")
    tokens = jnp.array([model.tokenizer.encode(text)[:20] for text in TEXTS])
    run = jax.jit(lambda params, tokens: jax.nn.log_softmax(decoder.apply(params, model.config, tokens)))
    first = jnp.full((len(TEXTS), 1), model.tokenizer.bos_id)
    base = run(model.params, jnp.concatenate([first, tokens], 1))[:, 1:]
    rows = []
    for make, kinds in ((prompt.prefix, ("sink", "zero", "random")), (prompt.soft, ("common", "random"))):
        for start in kinds:
            got = run(make(model, start=start, length=PLACES).params, tokens)
            moved = float((jnp.exp(base) * (base - got)).sum(-1)[:, 1:].mean())
            rows.append({"prompt": make.__name__, "start": start, "divergence": moved})
            print(rows[-1], flush=True)
    return rows


# ---- methods -----------------------------------------------------------------------------------------


def methods(save, done) -> list[dict]:
    from jaxml import lm
    from jaxml.tune import facts

    model = lm.load("smollm2-135m")
    asked = facts.make(countries=30, new_countries=20, relations=RELATIONS)
    rows = list(done)
    for name in METHODS:
        if any(row["method"] == name for row in rows):
            continue
        started = time.perf_counter()
        tuned, asking, trained, spent = _adapted(name, model, asked)
        row = {"method": name, "trained": trained, "tokens": spent, "seconds": time.perf_counter() - started}
        for part in ("held_out", "new_countries"):
            questions = getattr(asked, part)
            texts = lm.generate(tuned, [asking(q) for q in questions], max_new_tokens=12, stop=["\n"], batch_size=60)
            found = facts.exact_match([t.strip() for t in texts], questions)
            row |= {part: found.value, f"{part}_interval": list(found.interval), f"{part}_asked": found.asked}
            pairs = [asking(q) for q in questions], [f" {q.answer}\n" for q in questions]
            row[f"{part}_log_likelihood"] = float(lm.score(tuned, *pairs, batch_size=30).mean())
        rows.append(row)
        print(row, flush=True)
        save(rows)
    return rows


def _adapted(name, model, asked):
    """(model, question → prompt, numbers trained, tokens read)."""
    import jax

    from jaxml import prompts, tune
    from jaxml.tune import adapters, prompt

    plain = lambda q: q.prompt
    examples = [q.example for q in asked.train]
    if name == "nothing":
        return model, plain, 0, 0
    if name == "words, searched":
        order = np.random.default_rng(0).permutation(len(examples))
        pool, dev, last = ([examples[i] for i in part] for part in np.split(order, [40, 140]))
        task = prompts.Task(pool)
        budget = 3 * STEPS * ROWS * LENGTH
        report = prompts.search(
            prompts.Local(model), task, INSTRUCTIONS, dev, last[:20], shots=(0, 4, 8), budget=budget
        )
        return model, lambda q: task.prompt(report.winner, q.example), 0, report.spent
    start = {
        "soft prompt": lambda: prompt.soft(model, length=PLACES),
        "prefix": lambda: prompt.prefix(model, length=PLACES),
        "LoRA, rank 8": lambda: model.replace(params=adapters.attach(model.params, jax.random.key(0), rank=8)),
        "full": lambda: model,
    }[name]()
    options = tune.Options(steps=STEPS, batch_size=ROWS, length=LENGTH, learning_rate=METHODS[name], save_every=0)
    tuned, info = tune.fit(start, examples, options, progress=False)
    trained = sum(a.size for a in jax.tree.leaves(adapters.split(tuned.params)[0]))
    return tuned, plain, trained, info["tokens"]


# ---- tables ------------------------------------------------------------------------------------------


def newest(subject: str) -> dict:
    """The newest results that hold a subject."""
    return about.newest("prompts-*", lambda one: subject in one) or {}


def table() -> str:
    """The tables of benchmarks/README.md."""
    out = []
    if of := newest("choices"):
        out += [f"Seconds on {of['device']}, {about.said(of)}:", ""]
        out += ["| prompts × choices | one pass | rows of a batch | one by one | transformers | its cache used again "]
        out[-1] += "| largest difference |"
        out += ["|---|---|---|---|---|---|---|"]
        for r in of["choices"]:
            cell = lambda name, r=r: f"{r[f'{name}_s']:.2f} ({r[f'{name}_times']:.2f}×)"
            out.append(
                f"| {r['prompts']} × {r['choices']} | {r['tree_s']:.2f} | {cell('separate')} | {cell('one_by_one')} | "
                f"{cell('transformers')} | "
                f"{cell('transformers_cache')} | {r['largest_difference']:.1e} |"
            )
    if of := newest("starts"):
        out += ["", "| prompt of 20 places | start | divergence before training, nats |", "|---|---|---|"]
        out += [f"| {r['prompt']} | {r['start']} | {r['divergence']:.2f} |" for r in of["starts"]]
    if of := newest("methods"):
        out += ["", f"On {of['device']}, {about.said(of)}:", ""]
        out += ["| method | numbers trained | tokens read | seconds | same facts, other words | new countries |"]
        out += ["|---|---|---|---|---|---|"]
        for r in of["methods"]:
            share = lambda part, r=r: (
                f"{r[part]:.1%} ({r[f'{part}_interval'][0]:.0%} to {r[f'{part}_interval'][1]:.0%}; "
                f"{r[f'{part}_log_likelihood']:.2f} nats)"
            )
            out.append(
                f"| {r['method']} | {r['trained']:,} | {r['tokens']:,} | {r['seconds']:.0f} | "
                f"{share('held_out')} | {share('new_countries')} |"
            )
    return "\n".join(out)


if __name__ == "__main__":
    main()
