"""Find or train a prompt: tune vectors, search for words, score choices.

examples:
  jaxml prompt tune smollm2-135m facts --out runs/prompt
  jaxml prompt tune smollm2-135m train.jsonl --out runs/prefix --kind prefix --start text --text "Answer in a word."
  jaxml prompt search smollm2-135m facts --out runs/search --instruction "Answer in one word." --shots 0,4
  jaxml prompt search smollm2-135m train.jsonl --out runs/search --instructions file.txt --budget 200000
  jaxml prompt score smollm2-135m "The capital of France is" " Paris" " London"
  jaxml prompt score smollm2-135m --data questions.jsonl --correction pmi

MODEL of search and score may be an endpoint that speaks OpenAI's protocol, http://host/v1#name; a key for it is read
from the environment, JAXML_API_KEY. DATA is JSONL as for jaxml finetune (of prompt and response; choices, a list, where
they are counted), or the word facts: questions about countries from the package countryinfo. Without --eval it is cut
in two, and the report is on the part that nothing was chosen by. A run or a search that was stopped goes on with the
same command.
"""

from pathlib import Path

from jaxml.cli.main import closing, digest, endpoint, is_address, llm, load, model_arguments


def add(sub):
    kinds = sub.add_subparsers(dest="kind_of", required=True, metavar="tune|search|score")
    tune = kinds.add_parser("tune", help="train a soft prompt or a prefix; the model stays as it is")
    model_arguments(tune, adapter=False)
    _data(tune)
    tune.add_argument("--kind", choices=("soft", "prefix"), default="soft", help="vectors, or keys and values")
    tune.add_argument("--length", type=int, help="places of the prompt (default: 20, or those of --text)")
    tune.add_argument("--start", help="random, common, text or labels; of a prefix sink, text, random or zero")
    tune.add_argument("--text", help="for --start text")
    tune.add_argument("--labels", help="for --start labels, by comma")
    tune.add_argument("--hidden-dim", type=int, help="of an MLP that makes the prefix while it is trained")
    tune.add_argument("--tasks", type=int, default=1, help="one shared prompt for so many, by the examples' key task")
    tune.add_argument("--rank", type=int, help="of each task's own factors (default: 1)")
    tune.add_argument("--steps", type=int, default=200)
    tune.add_argument("--batch-size", type=int, default=2, help="rows of --row tokens a step")
    tune.add_argument("--row", type=int, default=128, help="tokens a row")
    tune.add_argument("--learning-rate", type=float, help="default: 0.02; of a prefix 0.01")
    tune.add_argument("--compute", choices=("float32", "bfloat16"), help="dtype to compute in")
    tune.add_argument("--harden", type=int, default=0, metavar="STEPS", help="then look for words as good, so long")
    tune.add_argument("--candidates", type=int, default=16, help="of --harden: swaps that are scored in a step")
    tune.add_argument("--save-every", type=int, default=100)
    tune.add_argument("--no-progress", action="store_true")

    search = kinds.add_parser("search", help="find words: instructions and examples, by successive halving")
    model_arguments(search)
    _data(search)
    search.add_argument("--instruction", action="append", default=[], metavar="TEXT", help="to try; may come again")
    search.add_argument("--instructions", metavar="FILE", help="to try, one a line")
    search.add_argument("--shots", default="0,2,4", help="numbers of examples to show, by comma")
    search.add_argument("--sets", type=int, default=3, help="sets of examples of each number")
    search.add_argument("--metric", choices=("likelihood", "accuracy", "match"), default="likelihood")
    search.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    search.add_argument("--budget", type=int, metavar="TOKENS", help="at most")
    search.add_argument("--propose", type=int, default=0, metavar="ROUNDS", help="a model writes instructions too")
    search.add_argument("--proposer", metavar="MODEL", help="that does (default: MODEL itself); or an endpoint")
    search.add_argument("--batch-size", type=int, default=16)
    search.add_argument("--no-progress", action="store_true")

    score = kinds.add_parser("score", help="how likely each answer is")
    model_arguments(score)
    score.add_argument("prompt", nargs="?", metavar="PROMPT")
    score.add_argument("choices", nargs="*", metavar="CHOICE", help="answers as they follow the prompt, spaces and all")
    score.add_argument("--data", metavar="DATA", help="JSONL of prompt, choices and response instead: the accuracy")
    score.add_argument("--correction", default="sum", help="sum, tokens, bytes, pmi or domain")
    score.add_argument("--domain", metavar="TEXT", help="what kind of answer follows, for --correction domain")
    score.add_argument("--calibrate", metavar="FIELD", help="text of the PROMPT that is the input: taken out, for bias")
    score.add_argument("--json", action="store_true", help="print one JSON object")


def _data(sub):
    sub.add_argument("data", metavar="DATA", help="JSONL, or the word facts")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="the run's folder")
    sub.add_argument("--eval", metavar="DATA", help="JSONL held out")
    sub.add_argument("--countries", type=int, default=30, help="of facts: how many are asked about")
    sub.add_argument("--seed", type=int, default=0)


def run(args):
    return {"tune": _tune, "search": _search, "score": _score}[args.kind_of](args)


# ---- tune -------------------------------------------------------------------------------------------


def _tune(args):
    from jaxml.tune import adapters, prompt

    out = Path(args.out)
    if args.harden and (args.kind != "soft" or args.tasks > 1):
        raise ValueError("prompt tune: --harden is for one soft prompt. Leave it out.")
    args.adapter = None
    if not (out / "adapter").exists():
        _train(args, out)
    elif not args.harden or (out / "words.txt").exists():
        raise FileExistsError(f"{out / 'adapter'}: this run is finished. Choose another --out.")
    if args.harden:
        model = load(args)
        params = adapters.load_peft(out / "adapter", model.params, model.config)
        _into_words(args, out, model.replace(params=params), prompt)
    return 0


def _train(args, out: Path):
    from jaxml import lm, log, tune
    from jaxml.tune import adapters, prompt

    train, held = _examples(args)
    model = load(args)
    made = _prompt(args, model, prompt)
    options = tune.Options(
        steps=args.steps,
        batch_size=args.batch_size,
        length=args.row,
        learning_rate=args.learning_rate or (0.02 if args.kind == "soft" else 0.01),
        dtype=args.compute,
        seed=args.seed,
        save_every=args.save_every,
        eval_every=max(1, args.steps // 10),
    )
    names = ("kind", "length", "start", "text", "labels", "hidden_dim", "tasks", "rank", "quantize")
    tuned, info = tune.fit(
        made, train, options, eval_examples=held, folder=out, progress=not args.no_progress,
        about={k: getattr(args, k) for k in names} | {"model_digest": digest(model)},
    )  # fmt: skip
    params = prompt.settle(tuned.params)
    before, after = (tune.loss_of(m, held, options) for m in (made, tuned.replace(params=params)))
    log.plot_loss(log.read(out / "log.jsonl"), out / "loss.png", title=f"Prompt tuning of {Path(args.model).name}")
    adapters.save_peft(out / "adapter", params, tuned.config, base_model=args.model)
    numbers = lm.decoder.num_params(adapters.split(params)[0])
    print(
        f"{args.kind} prompt of {params['prefix'].places} places, {numbers:,} numbers: held-out loss {before:.4f} "
        f"before, {after:.4f} after {info['steps']} steps: {out / 'adapter'}"
    )


def _into_words(args, out: Path, model, prompt):
    from jaxml import lm, log
    from jaxml.tune import adapters

    train, held = _examples(args)
    found = prompt.harden(
        model, train, steps=args.harden, candidates=args.candidates, length=args.row, batch_size=1, seed=args.seed,
        on_step=None if args.no_progress else _show,
    )  # fmt: skip
    bare = model.replace(params=adapters.detach(model.params))
    words = lm.score(bare, [found.text + e["prompt"] for e in held], [e["response"] for e in held]).mean()
    nothing = lm.score(bare, [e["prompt"] for e in held], [e["response"] for e in held]).mean()
    log.write_text(out / "words.txt", found.text)
    print(
        f"in words: {found.text!r}\nloss of a training token {found.soft_loss:.4f} as vectors, "
        f"{found.projected_loss:.4f} as the nearest tokens, {found.loss:.4f} after {args.harden} steps of swaps "
        f"(gap {found.gap:+.4f}); log-likelihood of a held-out answer {nothing:.3f} without, {words:.3f} with them: "
        f"{out / 'words.txt'}"
    )


def _prompt(args, model, prompt):
    given = dict(length=args.length, text=args.text)
    if args.kind == "soft":
        if args.hidden_dim:
            raise ValueError("prompt tune: --hidden-dim is an option of --kind prefix. Leave it out.")
        labels = args.labels.split(",") if args.labels else ()
        many = dict(count=args.tasks, rank=args.rank or (1 if args.tasks > 1 else None))
        return prompt.soft(model, args.seed, start=args.start or "common", labels=labels, **many, **given)
    for option, value in (("labels", args.labels), ("tasks", args.tasks > 1), ("rank", args.rank)):
        if value:
            raise ValueError(f"prompt tune: --{option} is an option of --kind soft. Leave it out.")
    return prompt.prefix(model, args.seed, start=args.start or "sink", hidden_dim=args.hidden_dim, **given)


def _show(step: int, loss: float) -> None:
    import sys

    end = "\n" if not sys.stderr.isatty() else ""
    print(f"\rswaps: step {step}, loss {loss:.4f}", end=end, file=sys.stderr, flush=True)


# ---- search -----------------------------------------------------------------------------------------


def _search(args):
    from jaxml import files, prompts

    out = Path(args.out)
    pool, held = _examples(args)
    pool, dev = _cut(pool, 0.5, group=len(pool) // args.countries if args.data == "facts" else 1)
    if not dev:
        raise ValueError("prompt search: DATA holds at least 2 questions, one to show and one to measure, got 1.")
    said = [*args.instruction]
    if args.instructions:
        lines = files.read_text(args.instructions).splitlines()
        said += [line.strip() for line in lines if line.strip()]
    ask = [{"role": "user", "content": "{prompt}"}] if args.chat else "{prompt}"
    task = prompts.Task(pool, ask=prompts.Template(ask), metric=args.metric)
    if args.proposer and not args.propose:
        raise ValueError("prompt search: --proposer is asked in the rounds of --propose, got none. Add --propose 1.")
    model, proposer = llm(args, args.batch_size, out / "endpoint.jsonl"), None
    if args.propose:
        writer = _other(args.proposer) if args.proposer else model
        proposer = prompts.propose(writer, [(e["prompt"], e["response"]) for e in pool[:4]], seed=args.seed)
    shots = args.shots.split(",")
    if not all(n.strip().isdecimal() for n in shots):
        raise ValueError(f"prompt search: --shots are whole numbers parted by commas, got {args.shots!r}.")
    shots = list(map(int, shots))
    with closing(model):
        report = prompts.search(
            model, task, ["", *said], dev, held, shots=[n for n in shots if n <= len(pool)], sets=args.sets,
            budget=args.budget, proposer=proposer, rounds=1 + args.propose, folder=out, seed=args.seed,
            progress=not args.no_progress,
        )  # fmt: skip
    print(report.markdown())
    print(f"{out / 'report.md'}, {out / 'search.png'}")
    return 0


def _other(name: str):
    from jaxml import lm, prompts

    return endpoint(name) if is_address(name) else prompts.Local(lm.load(name))


def _examples(args) -> tuple[list[dict], list[dict]]:
    """(examples to work with, those of one country in a row; examples held out)."""
    import numpy as np

    from jaxml.tune import data, facts

    if args.data == "facts":
        if args.eval:
            raise ValueError("prompt: facts have held-out questions of their own. Leave --eval out.")
        asked = facts.make(countries=args.countries, new_countries=max(1, args.countries // 2), seed=args.seed)
        return [q.example for q in asked.train], [q.example for q in asked.new_countries]
    read = [data.read_jsonl(path) for path in (args.data, args.eval) if path]
    for examples in read:
        if any(not isinstance(e.get(key), str) for e in examples for key in ("prompt", "response")):
            raise ValueError("prompt: each example has a prompt and a response. Texts and messages have none.")
    if args.eval:
        return read[0], read[1]
    if len(read[0]) < 4:
        raise ValueError(f"prompt: {args.data} is split into parts, of at least 4 examples, got {len(read[0])}.")
    order = np.random.default_rng(args.seed).permutation(len(read[0]))
    held, rest = _cut([read[0][i] for i in order], 0.3)
    return rest, held


def _cut(examples: list[dict], share: float, group: int = 1) -> tuple[list[dict], list[dict]]:
    """Two parts, the first with that share of the questions; a question asked twice, or one of a group, in one part."""
    asked = list(dict.fromkeys(e["prompt"] for e in examples))
    number = max(1, round(share * len(asked) / group)) * group
    first = set(asked[:number])
    return [e for e in examples if e["prompt"] in first], [e for e in examples if e["prompt"] not in first]


# ---- score ------------------------------------------------------------------------------------------


def _score(args):
    import json

    import numpy as np

    from jaxml import prompts

    if (args.data is None) == (args.prompt is None):
        raise ValueError("prompt score: a PROMPT with its CHOICEs, or --data, got both or neither.")
    how = dict(correction=args.correction, domain=args.domain)
    if args.data:
        return _score_data(args, how)
    if not args.choices:
        raise ValueError("prompt score: at least one CHOICE is given, got none.")
    model = llm(args)
    scores = prompts.score_choices(model, [args.prompt], args.choices, **how)[0]
    if args.calibrate:
        if args.prompt.count(args.calibrate) != 1:
            raise ValueError(f"prompt score: --calibrate is a text that the PROMPT holds once, got {args.calibrate!r}.")
        free = [args.prompt.replace(args.calibrate, text) for text in prompts.CONTENT_FREE]
        scores = prompts.calibrate(scores, np.array(prompts.score_choices(model, free, args.choices, **how)))
    share = np.exp(prompts.choices.normalised(scores))
    rows = [dict(choice=c, score=float(s), share=float(p)) for c, s, p in zip(args.choices, scores, share)]
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in sorted(rows, key=lambda r: -r["score"]):
        print(f"{row['score']:10.3f} {row['share']:7.1%}  {row['choice']!r}")
    return 0


def _score_data(args, how):
    import json

    from jaxml import prompts
    from jaxml.tune import data, facts

    if args.calibrate:
        raise ValueError("prompt score: --calibrate is for one PROMPT. Leave it out.")
    examples = data.read_jsonl(args.data)
    prompts.Task(metric="accuracy").check(examples)
    if any(not isinstance(e["prompt"], str) for e in examples):
        raise ValueError("prompt score: a prompt is a text.")
    found = prompts.score_choices(llm(args), [e["prompt"] for e in examples], [e["choices"] for e in examples], **how)
    right = sum(e["choices"][int(s.argmax())] == e["response"] for e, s in zip(examples, found))
    accuracy = facts.Accuracy(right, len(examples))
    report = {"examples": len(examples), "accuracy": accuracy.value, "interval": list(accuracy.interval)}
    print(json.dumps(report) if args.json else f"most likely choice right: {accuracy}")
    return 0
