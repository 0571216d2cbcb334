"""Retrieval, and Astute RAG: answers from documents, some of which are wrong.

examples:
  jaxml rag index docs/ --out runs/index                         (and again, when files have changed)
  jaxml rag ask "Who keeps the lighthouse?" --index runs/index --trace answer.html
  jaxml rag ask "Who?" --index runs/index --method plain --model http://host/v1#name
  jaxml rag ask "Who?" --index runs/index --mode score --trust 0.8 --sure runs/rtune     (a run of jaxml rtune)
  jaxml rag evaluate --data ramdocs:path/to/RAMDocs_test.jsonl --methods none plain astute --limit 40 --out runs/rag

index reads text, Markdown, HTML, PDF and JSONL files (an object a line: text, title, source); hidden ones and links are
left out. ask prints the answer with what it rests on; --trace writes all that led to it as a page.

evaluate takes JSONL with the keys question, answers, and where there is one wrong (answers that are known to be) and
passages (texts, or objects with text and source); questions without passages are searched for in --index. Replies are
kept: an evaluation that was stopped goes on with the same command.

By scores, the answers of the passages and what memory believes are weighed against each other: --trust is how likely
retrieval is right, and --sure takes memory's certainty from a model that was tuned to know it.

========== ==================================================================================
none       what the model knows
plain      all passages in one prompt
consistent the answer that most of several samples come to
isolated   each passage answered from alone, and a vote (RobustRAG)
generated  from what the model wrote down itself (GenRead)
routed     from the passages, or from memory if they do not answer (Self-Route)
instructed a word about each passage first (InstructRAG)
astute     Astute RAG: --mode prompt, the paper's; score, by likelihoods; auto, those if there are
========== ==================================================================================
"""

import json
from pathlib import Path

from jaxml.cli.main import FORMATS, closing, given, is_address, llm

FORMS = ("chat", "lines")
OF_FORM = ("none", "plain", "isolated")
METHODS = ("none", "plain", "consistent", "isolated", "generated", "routed", "instructed", "astute")


def add(sub):
    sub.add_argument("action", choices=("index", "ask", "evaluate"), help="what to do")
    sub.add_argument("given", nargs="*", metavar="FOLDER or QUESTION", help="of index: what to read; of ask: questions")
    sub.add_argument("--index", metavar="FOLDER", help="an index that jaxml rag index has made")
    sub.add_argument("--out", metavar="FOLDER", help="of index: the index; of evaluate: the run's folder")
    sub.add_argument("--encoder", default="minilm", help="a known name or a sentence-transformers folder")
    sub.add_argument("--size", type=int, default=120, help="of index: words of a passage at most")
    sub.add_argument("--overlap", type=int, default=24, help="of index: words shared with the passage before, at most")
    sub.add_argument("--codes", action="store_true", help="of index: search among int8 codes, then exactly")
    sub.add_argument("--k", type=int, default=5, help="passages for a question")
    sub.add_argument("--how", choices=("hybrid", "dense", "lexical"), default="hybrid")
    sub.add_argument(
        "--trade", type=float, metavar="SHARE", help="choose different passages; 1 looks at likeness alone"
    )
    sub.add_argument("--model", default="smollm2-135m", help="a known name, a path, or http://host/v1#name")
    sub.add_argument("--adapter", metavar="FOLDER", help="a PEFT adapter folder to put on the model")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the parameters")
    sub.add_argument("--quantize", choices=FORMATS, help="its matrices, as they are read")
    sub.add_argument("--method", choices=METHODS, default="astute", help="of ask")
    sub.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="of evaluate")
    sub.add_argument("--mode", choices=("auto", "prompt", "score"), default="auto", help="of astute")
    sub.add_argument("--rounds", type=int, help="of astute by prompts: consolidations")
    sub.add_argument("--least", type=float, help="of astute by scores: confidence below which nothing is answered")
    sub.add_argument("--trust", type=float, help="of astute by scores: how likely retrieval as a whole is right (0.5)")
    sub.add_argument("--reliability", type=float, help="of astute by scores: how likely a passage is, if so (0.9)")
    sub.add_argument(
        "--sure", metavar="RUN", help="of astute by scores: a run of jaxml rtune, whose model says how sure memory is"
    )
    sub.add_argument("--form", choices=FORMS, default="chat", help="of none, plain, isolated: how they ask")
    sub.add_argument("--trace", metavar="FILE.html", help="of ask: all that led to the answers, as a page")
    sub.add_argument("--data", metavar="DATA", help="of evaluate: JSONL, or ramdocs:FILE")
    sub.add_argument("--limit", type=int, help="of evaluate: the first questions")
    sub.add_argument("--no-progress", action="store_true")
    sub.set_defaults(usual={name: sub.get_default(name) for of in TAKEN.values() for name in of})


SCORES = ("least", "trust", "reliability", "sure")
MODEL = ("model", "adapter", "dtype", "quantize", "mode", "rounds", *SCORES, "form")
FOUND = ("index", "encoder", "k", "how", "trade")
TAKEN = {
    "index": ("out", "encoder", "size", "overlap", "codes"),
    "ask": (*FOUND, *MODEL, "method", "trace"),
    "evaluate": (*FOUND, *MODEL, "out", "methods", "data", "limit"),
}  # fmt: skip


def run(args):
    _check(args)
    return {"index": _index, "ask": _ask, "evaluate": _evaluate}[args.action](args)


def _index(args):
    from jaxml import log, rag
    from jaxml.lm import encoder

    if len(args.given) != 1 or not args.out:
        raise ValueError("rag index: one FOLDER to read and --out for the index are given.")
    rag.read.find(args.given[0])  # before an index is made of nothing
    model, out = encoder.load(args.encoder), Path(args.out)
    if (out / "index.json").is_file():
        index = rag.Index(out, model)
        if index.chunking != rag.Chunking(args.size, args.overlap):
            raise ValueError(
                f"{out}: its passages have size {index.chunking.size} and overlap {index.chunking.overlap}, got "
                f"{args.size} and {args.overlap}. Choose another --out."
            )
        if args.codes and not index.store.codes:
            raise ValueError(f"{out}: it is searched without codes, got --codes. Choose another --out.")
    else:
        index = rag.Index.create(out, model, rag.Chunking(args.size, args.overlap), codes=args.codes)
    with log.progress("reading", enabled=not args.no_progress) as bar:
        task = bar.add_task("read", total=None)
        changes = index.update(args.given[0], tick=lambda done, of: bar.update(task, completed=done, total=of))
    for reason in changes.refused:
        print(f"left out: {reason}")
    print(
        f"{out}: {changes.added} files added, {changes.changed} changed, {changes.removed} removed, "
        f"{changes.unchanged} as they were; {len(index)} passages."
    )
    return 0 if len(index) else 2


def _ask(args):
    from jaxml import rag

    if not args.given:
        raise ValueError("rag ask: at least one question is given, got none.")
    alone = args.method in ("none", "generated")  # which look at no passages
    passages = [[] for _ in args.given] if alone else _found(args, args.given)
    model = llm(args)
    answers = rag.answer(model, args.given, passages, args.method, **_options(args, args.method))
    for answer in answers:
        print(rag.report(answer) + "\n")
    if args.trace:
        print(rag.write_page(answers, args.trace, f"Answers by {args.method}"))
    return 0


def _evaluate(args):
    from jaxml import log, rag
    from jaxml.prompts.store import Store
    from jaxml.rag import metrics
    from jaxml.tune.r_tuning.report import without_nan

    if not args.data or not args.out or args.given:
        raise ValueError("rag evaluate: --data and --out are given, and no questions.")
    rows = rag.questions.read(args.data)[: args.limit]
    missing = [i for i, row in enumerate(rows) if row.passages is None]
    passages = [row.passages for row in rows]
    for i, found in zip(missing, _found(args, [rows[i].question for i in missing]) if missing else ()):
        passages[i] = found
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model = llm(args, cache=out / "endpoint.jsonl")
    supports = [metrics.supporting(of, row.answers) for of, row in zip(passages, rows)]
    methods = list(dict.fromkeys(("none", *args.methods)))  # what memory knows decides the classes
    report, answers = {}, {}
    with (
        closing(model),
        Store(out / "replies.jsonl") as store,
        log.progress("asking", enabled=not args.no_progress, fields=("method", "prompts")) as bar,
    ):
        for method in methods:
            task = bar.add_task("ask", total=len(rows), method=method, prompts=0)
            answers[method] = rag.answer(
                model, [row.question for row in rows], passages, method, store=store,
                tick=lambda done, put, task=task: bar.update(task, completed=done, prompts=put),
                **_options(args, method),
            )  # fmt: skip
            memory = [metrics.contains(a.text, row.answers) for a, row in zip(answers["none"], rows)]
            report[method] = metrics.evaluate(
                answers[method], [row.answers for row in rows], wrong=[row.wrong for row in rows], supports=supports,
                memory=memory,
            )  # fmt: skip
    name = args.model if is_address(args.model) else Path(args.model).name
    about = {
        "model": name,
        "data": Path(args.data).name,
        "questions": len(rows),
        "k": args.k,
        "mode": args.mode,
        **{option: getattr(args, option) for option in (*SCORES, "form")},
    }
    found = without_nan({"about": about, "methods": report})
    log.write_text(out / "report.json", json.dumps(found, indent=1, allow_nan=False))
    page = f"# {len(rows)} questions, {name}\n\n{metrics.markdown(report)}"
    log.write_text(out / "report.md", page)
    traces = [answers[m][i] for i in range(min(len(rows), 12)) for m in methods if m == "astute"]
    if traces:
        rag.write_page(traces, out / "astute.html", "Astute RAG")
    print(page)
    print(f"{out / 'report.md'}" + (f", {out / 'astute.html'}" if traces else ""))
    return 0


def _found(args, questions: list[str]):
    """Passages of each question, from the index."""
    from jaxml import rag
    from jaxml.lm import encoder

    if not args.index:
        raise ValueError(f"rag {args.action}: an --index is given (jaxml rag index makes one), got none.")
    rag.index.check(args.index)  # before the encoder is read
    index = rag.Index(args.index, encoder.load(args.encoder))
    hits = index.search(questions, args.k, how=args.how, trade=args.trade)
    return [[hit.passage for hit in of] for of in hits]


def _options(args, method: str) -> dict:
    """What the method is told."""
    if method in OF_FORM:
        return {"form": args.form}
    if method != "astute":
        return {}
    told = {name: getattr(args, name) for name in ("rounds", *SCORES) if getattr(args, name) is not None}
    if args.sure is not None:
        from jaxml.cli.rtune import finished
        from jaxml.tune import r_tuning

        _, model, form, policy = finished(args.sure)
        told["sure"] = r_tuning.sure(model, policy, form)
    return {"mode": args.mode, **told}


def _check(args) -> None:
    """Refuses, before anything is read or asked, options out of range or that the action does not take."""
    changed = given(args)
    if other := [name for name in changed if name not in TAKEN[args.action]]:
        raise ValueError(f"rag {args.action}: --{other[0]} is not of {args.action}. Leave it out.")
    for name, good, rule in (
        ("k", args.k >= 1, "at least 1"), ("limit", args.limit is None or args.limit >= 1, "at least 1"),
        ("rounds", args.rounds is None or args.rounds >= 0, "at least 0"),
        *(
            (name, getattr(args, name) is None or 0 <= getattr(args, name) <= 1, "in [0, 1]")
            for name in ("trade", "least", "trust", "reliability")
        ),
    ):  # fmt: skip
        if not good:
            raise ValueError(f"rag {args.action}: --{name} is {rule}, got {getattr(args, name)}.")
    for name, mode in (("rounds", "prompt"), *((name, "score") for name in SCORES)):
        if getattr(args, name) is not None and args.mode != mode:
            raise ValueError(f"rag: --{name} is of --mode {mode}, got --mode {args.mode}.")
    if args.action != "ask":
        return
    of_astute, of_form = {"mode", "rounds", *SCORES}, {"form"}
    takes = of_astute if args.method == "astute" else of_form if args.method in OF_FORM else set()
    if wrong := ((of_astute | of_form) - takes) & set(changed):
        raise ValueError(f"rag ask: --{min(wrong)} is not of --method {args.method}. Leave it out.")
