"""Retrieval beside the libraries people use, and Astute RAG where one can see what it does.

    python benchmarks/rag.py --pararel FOLDER --ramdocs FILE   # all; conflict takes an hour or more on 2 cores
    python benchmarks/rag.py --subjects search words           # minutes
    python benchmarks/rag.py --table                           # the tables of the newest results

encoding: passages of 20 to 120 words to vectors, all-MiniLM-L6-v2, beside sentence-transformers with the best of three
batch sizes; the rates take turns, the best of three each. search: the ten best of random unit vectors of 384 numbers,
beside numpy and faiss's flat index; and among int8 codes, eighty candidates ranked again: how many of the exactly best
are found. words: bm25s as the index builds and asks it. scripted: a model that is sure of 60 % of the answers, mistaken
about 10 % and ignorant of the rest, four passages of which a share misleads. conflict: SmolLM2-135M on ParaRel's facts,
two passages in the words of ParaRel's own patterns from two sources, which for a share of the questions say another
object of the same relation. p(sure) is of a model that `jaxml rtune --data OUT/rest.jsonl --new-groups ''` has tuned on
other facts: conflict writes that file, and is run again with --sure RUN (replies are kept). ramdocs: `jaxml rag
evaluate` on the first questions of RAMDocs, whose documents disagree on purpose.
"""

import argparse
import datetime
import functools
import json
import tempfile
import time
from pathlib import Path

import about
import numpy as np

SUBJECTS = ("encoding", "search", "words", "scripted", "conflict", "ramdocs")
SEEN = 200  # facts that were looked at while the method was made: not asked here
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--pararel", help="folder of ParaRel, for conflict")
    parser.add_argument("--ramdocs", help="RAMDocs_test.jsonl, for ramdocs")
    parser.add_argument("--questions", type=int, default=200, help="of conflict")
    parser.add_argument("--sure", help="of conflict: a run of jaxml rtune on OUT/rest.jsonl, which conflict writes")
    parser.add_argument("--rows", nargs="+", type=int, default=(100_000, 1_000_000), help="of search")
    parser.add_argument("--out", default="runs/benchmark-rag", help="replies that are kept, of conflict")
    parser.add_argument("--table", action="store_true", help="print the tables of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if "conflict" in options.subjects and not options.pararel:
        parser.error("conflict asks ParaRel's facts: --pararel FOLDER, or other --subjects.")
    if "ramdocs" in options.subjects and not options.ramdocs:
        parser.error("ramdocs asks RAMDocs' questions: --ramdocs FILE, or other --subjects.")
    import jax

    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = about.RESULTS / f"rag-{device}-{datetime.date.today()}.json"
    report = json.loads(path.read_text()) if path.is_file() else {"device": device}
    report |= about.made("torch", "sentence-transformers", "faiss-cpu", "numpy")
    for subject in options.subjects:
        report[subject] = globals()[subject](options)
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(subject, json.dumps(report[subject]), flush=True)
    print(path)


def _best(*runs, times: int = 3) -> list[float]:
    """Seconds of each, the least of several, in turns."""
    for run in runs:
        run()
    taken = [[] for _ in runs]
    for _ in range(times):
        for of, run in zip(taken, runs):
            started = time.perf_counter()
            run()
            of.append(time.perf_counter() - started)
    return [min(of) for of in taken]


# ---- retrieval --------------------------------------------------------------------------------------


def encoding(options) -> dict:
    from sentence_transformers import SentenceTransformer

    from jaxml.lm import encoder, zoo

    texts, ours = _texts(512), encoder.load("minilm")
    theirs = SentenceTransformer(str(zoo.find("minilm").parent))
    alike = np.abs(np.asarray(ours(texts[:64])) - theirs.encode(texts[:64])).max()
    others = [lambda size=size: theirs.encode(texts, batch_size=size) for size in (8, 32, 64)]
    seconds = _best(lambda: np.asarray(ours(texts)), *others)
    return {
        "passages": len(texts), "ours_per_s": len(texts) / seconds[0], "theirs_per_s": len(texts) / min(seconds[1:]),
        "largest_difference": float(alike),
    }  # fmt: skip


def search(options) -> dict:
    import faiss

    from jaxml.rag import dense

    out = {}
    for rows in options.rows:
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((rows, 384), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        matrix = dense.place(vectors)
        codes, scales = dense.quantize(vectors)
        coded = dense.place(codes, scales=scales)
        index = faiss.IndexFlatIP(384)
        index.add(vectors)
        for count in (1, 16):
            asked = vectors[:count] + 0.5 * rng.standard_normal((count, 384), np.float32) / np.sqrt(384)

            def by_numpy(asked=asked, vectors=vectors):
                products = asked @ vectors.T
                rows = np.argpartition(-products, 10, axis=1)[:, :10]
                order = np.argsort(-np.take_along_axis(products, rows, 1), 1)
                return np.take_along_axis(rows, order, 1)

            ours = lambda asked=asked, matrix=matrix: np.asarray(dense.search(matrix, asked, 10)[1])
            by_codes = lambda asked=asked, coded=coded, vectors=vectors: dense.refine(
                vectors, asked, dense.search(coded, asked, 80)[1], 10
            )[1]
            seconds = _best(ours, lambda: index.search(asked, 10), by_numpy, by_codes)
            exact = by_numpy()
            out[f"{rows} {count}"] = {
                "ours_ms": 1e3 * seconds[0], "faiss_ms": 1e3 * seconds[1], "numpy_ms": 1e3 * seconds[2],
                "codes_ms": 1e3 * seconds[3], "same_as_numpy": dense.recall(ours(), exact),
                "recall_of_codes": dense.recall(by_codes(), exact),
            }  # fmt: skip
    return out


def words(options) -> dict:
    from jaxml.rag import Lexical, Passage

    passages = [Passage(text, f"{i}") for i, text in enumerate(_texts(50_000))]
    asked = [" ".join(p.text.split()[:6]) for p in passages[:: len(passages) // 100]][:100]
    started = time.perf_counter()
    made = Lexical.build(passages)
    built = time.perf_counter() - started
    [seconds] = _best(lambda: made.search(asked, 10))
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder) / "words", "1")
        size = sum(p.stat().st_size for p in (Path(folder) / "words").iterdir())
    return {"passages": len(passages), "build_s": built, "queries_per_s": len(asked) / seconds, "megabytes": size / 1e6}


def _texts(count: int) -> list[str]:
    """Texts of 20 to 120 words, out of the words of this file and the README."""
    pool = (Path(__file__).parents[1] / "README.md").read_text().split() + Path(__file__).read_text().split()
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(pool, rng.integers(20, 121))) for _ in range(count)]


# ---- Astute RAG -------------------------------------------------------------------------------------


def scripted(options) -> dict:
    from jaxml import rag
    from jaxml.rag.scripted import Scripted

    n, rng = 400, np.random.default_rng(0)
    asked, gold, luck = [f"what is item {i}?" for i in range(n)], [f"gold{i}" for i in range(n)], rng.random(n)
    known = {q: gold[i] if luck[i] < 0.6 else f"false{i}" for i, q in enumerate(asked) if luck[i] < 0.7}
    sure = frozenset(q for q, of in zip(asked, luck) if of < 0.6)
    out = {}
    for misreads in (0.0, 0.1):
        llm = Scripted(known, sure=sure, misreads=misreads)
        for share in SHARES:
            says = lambda i, share=share: f"bad{i}" if rng.random() < share else gold[i]
            passages = [
                [rag.Passage(f"Item {i}, source {j}: the answer is {says(i)}.", f"s{j}") for j in range(4)]
                for i in range(n)
            ]  # fmt: skip
            found = {m: rag.answer(llm, asked, passages, m) for m in rag.METHODS}
            out[f"{misreads} {share}"] = {
                m: float(np.mean([a.text == g for a, g in zip(of, gold)])) for m, of in found.items()
            }
    return out


FIRST = {"astute, prompts": 24}  # questions of a method that writes much; the others answer all
METHODS = {
    "none": {}, "none, lines": {"form": "lines"}, "plain": {}, "plain, lines": {"form": "lines"}, "isolated": {},
    "isolated, lines": {"form": "lines"}, "routed": {}, "astute, prompts": {"mode": "prompt", "max_new_tokens": 256},
    "astute, scores": {"mode": "score", "least": 0.0},
    "astute, scores, trust 0.2": {"mode": "score", "least": 0.0, "trust": 0.2},
    "astute, scores and p(sure)": {"mode": "score", "least": 0.0},
}  # fmt: skip


def conflict(options) -> dict:
    from jaxml import lm, log, prompts, rag
    from jaxml.prompts.store import Store
    from jaxml.rag import metrics
    from jaxml.tune import r_tuning

    items, (asked, right, wrong, patterns) = _facts(Path(options.pararel), options.questions)
    rest = items[SEEN + options.questions :][:400]
    Path(options.out).mkdir(parents=True, exist_ok=True)
    log.write_text(Path(options.out) / "rest.jsonl", "".join(json.dumps(r_tuning.items.row(i)) + "\n" for i in rest))
    methods, tuned = dict(METHODS), "astute, scores and p(sure)"
    how = methods.pop(tuned)
    if options.sure:
        from jaxml.cli.rtune import finished

        _, model, form, policy = finished(options.sure)
        methods[tuned] = how | {"sure": functools.cache(r_tuning.sure(model, policy, form))}
    llm = prompts.Local(lm.load("smollm2-135m"))
    out: dict = {"questions": len(asked)}
    with Store(Path(options.out) / "replies.jsonl") as store:
        for share in (0.0, 0.5, 1.0):
            rng = np.random.default_rng(1)
            bad = rng.permutation(len(asked)) < round(share * len(asked))
            passages = [
                [rag.Passage(p.replace("[Y]", w if b else r), f"source {j}") for j, p in enumerate(of)]
                for of, r, w, b in zip(patterns, right, wrong, bad)
            ]  # fmt: skip
            by: dict[str, np.ndarray] = {}
            for name, how in methods.items():
                n = FIRST.get(name)
                found = rag.answer(llm, asked[:n], passages[:n], name.split(",")[0], store=store, **how)
                by[name] = np.array([metrics.contains(a.text, [r]) for a, r in zip(found, right)], float)
                out[f"{share} {name}"] = {
                    "questions": len(found),
                    "right": float(np.mean(by[name])),
                    "interval": list(metrics.metrics.interval(np.mean, by[name])),
                    "wrong": float(np.mean([metrics.contains(a.text, [w]) for a, w in zip(found, wrong)])),
                    "fallbacks": float(np.mean([any("could not be read" in note for note in a.notes) for a in found])),
                }  # fmt: skip
                for other in ("none", "none, lines", "plain", "plain, lines"):
                    if other in by:
                        more = by[name] - by[other][:n]
                        out[f"{share} {name}"][f"more than {other}"] = [
                            float(more.mean()), *metrics.metrics.interval(np.mean, more)
                        ]  # fmt: skip
                print(share, name, out[f"{share} {name}"], flush=True)
    return out


def _facts(folder: Path, count: int):
    """(all items, of which those after `SEEN` are asked; questions, right and wrong objects, and for each question two
    sentences with [Y] for the object)."""
    from jaxml.tune import r_tuning

    items = r_tuning.pararel(folder, ["P36", "P17", "P103", "P495", "P30", "P364"])
    rng = np.random.default_rng(0)
    mixed = [items[i] for i in rng.permutation(len(items))]
    objects = {g: sorted({i.answers[0] for i in items if i.group == g}) for g in {i.group for i in items}}
    asked, right, wrong, patterns = [], [], [], []
    for item in mixed[SEEN : SEEN + count]:
        template = r_tuning.sources.PARAREL[item.group]
        before, after = template.split("{}")
        subject = item.question.removeprefix(before).removesuffix(after)
        lines = (folder / "data" / "pattern_data" / "graphs_json" / f"{item.group}.jsonl").read_text().splitlines()
        forms = [json.loads(line)["pattern"] for line in lines]
        two = rng.choice(len(forms), 2, replace=False)
        asked.append(item.question)
        right.append(item.answers[0])
        wrong.append(str(rng.choice([o for o in objects[item.group] if o not in item.answers])))
        patterns.append([forms[i].replace("[X]", subject) for i in two])
    return mixed, (asked, right, wrong, patterns)


RAMDOCS = "--limit 60 --methods none plain isolated astute --mode score --least 0 --form lines".split()


def ramdocs(options) -> dict:
    from jaxml.cli import main as cli

    out = Path(options.out) / "ramdocs"
    command = ["rag", "evaluate", "--data", f"ramdocs:{options.ramdocs}", "--out", str(out), "--no-progress", *RAMDOCS]
    if cli.main(command):
        raise SystemExit("rag.py: jaxml rag evaluate failed.")
    return json.loads((out / "report.json").read_text())


# ---- table ------------------------------------------------------------------------------------------


def table() -> str:
    """Markdown: each device's subjects, of the newest results that have them."""
    parts = []
    for device in about.of_devices("rag"):
        for subject in SUBJECTS:
            report = about.newest(device, lambda one, subject=subject: subject in one)
            if report:
                head = f"`{subject}` ({report['device']}, {about.said(report)}):"
                parts.append("\n".join([head, "", *TABLES[subject](report[subject])]))
    return "\n\n".join(parts)


def _encoding(of: dict) -> list[str]:
    return [
        "| encoding, passages/s | jaxml | sentence-transformers | times | largest difference |",
        "|---|---|---|---|---|",
        f"| {of['passages']} passages | {of['ours_per_s']:.0f} | {of['theirs_per_s']:.0f} | "
        f"{of['ours_per_s'] / of['theirs_per_s']:.2f} | {of['largest_difference']:.1e} |",
    ]


def _search(of: dict) -> list[str]:
    lines = [
        "| search, ms | jaxml | faiss flat | numpy | of faiss's time | int8 codes | recall of codes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, f in of.items():
        rows, count = map(int, name.split())
        lines.append(
            f"| {rows:,} rows, {count} at once | {f['ours_ms']:.1f} | {f['faiss_ms']:.1f} | {f['numpy_ms']:.1f} | "
            f"{f['ours_ms'] / f['faiss_ms']:.2f} | {f['codes_ms']:.1f} | {f['recall_of_codes']:.3f} |"
        )
    return lines


def _words(of: dict) -> list[str]:
    return [
        f"BM25 of {of['passages']:,} passages: built in {of['build_s']:.1f} s, {of['megabytes']:.0f} MB, "
        f"{of['queries_per_s']:.0f} questions/s."
    ]


def _scripted(of: dict) -> list[str]:
    names = list(next(iter(of.values())))
    lines = ["| misread | misleading | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for name, f in of.items():
        misreads, share = map(float, name.split())
        lines.append(f"| {misreads:.0%} | {share:.0%} | " + " | ".join(f"{f[m]:.0%}" for m in names) + " |")
    return lines


def _conflict(of: dict) -> list[str]:
    lines = [
        f"| {of['questions']} facts, SmolLM2-135M: right (wrong) | no passage wrong | half | all |",
        "|---|---|---|---|",
    ]
    for name in (m for m in METHODS if f"0.5 {m}" in of):
        cells = [f"{of[f'{s} {name}']['right']:.0%} ({of[f'{s} {name}']['wrong']:.0%})" for s in (0.0, 0.5, 1.0)]
        first = f" (the first {of[f'0.5 {name}']['questions']})" if name in FIRST else ""
        lines.append(f"| {name}{first} | " + " | ".join(cells) + " |")
    return lines


def _ramdocs(of: dict) -> list[str]:
    from jaxml.rag import metrics

    return [f"{of['about']['questions']} questions, SmolLM2-135M.", "", metrics.markdown(of["methods"]).rstrip()]


TABLES = {
    "encoding": _encoding, "search": _search, "words": _words, "scripted": _scripted, "conflict": _conflict,
    "ramdocs": _ramdocs,
}  # fmt: skip


if __name__ == "__main__":
    main()
