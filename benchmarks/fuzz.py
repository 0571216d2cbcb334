"""Every reader of jaxml on files that are damaged or made to harm: no crash, no hang, little memory, clear errors.

    python benchmarks/fuzz.py                       # 3,000 files a reader; an hour; needs the extras "lm" and "rag"
    python benchmarks/fuzz.py --files 200 --readers gguf_model jsonl
    python benchmarks/fuzz.py --table               # the table of the newest results

A reader works in a process of its own with at most 1.5 GiB above what it had at the start and five seconds of CPU time
for a file. From whole files a mutator of bytes makes others (bits turned, numbers put to their extremes, parts cut out,
doubled, exchanged, filled, cut off), and one of values changes what JSON files say. The reader has to give a value or
raise ValueError, FileNotFoundError, NotImplementedError or another OSError; what else happens is a failure, whose file
is kept.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import about

ALLOWED = (ValueError, FileNotFoundError, NotImplementedError, OSError)
MEMORY, SECONDS = 1536 * 2**20, 5
Reader = Callable[[Path], Any]


# ---- mutators ----------------------------------------------------------------------------------------


def mutate(content: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """Bytes that a few accidents have made of these."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        size = len(data)
        # Where files say what is in them: at the beginning, more often than not.
        at = dice.randrange(max(1, min(size, dice.choice((16, 256, 4096, size)))))
        length = dice.choice((1, 2, 4, 8, 16, 64, 512))
        kind = dice.randrange(9)
        if kind == 0 and size:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            width = dice.choice((1, 2, 4, 8))
            top = 2 ** (8 * width)
            number = dice.choice((0, 1, top - 1, top // 2, top // 2 - 1, top // 4, dice.randrange(top)))
            data[at : at + width] = number.to_bytes(width, "little")
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length] * dice.choice((1, 1, 2, 50))
        elif kind == 4:
            data[at : at + length] = bytes([dice.choice((0, 255, 0x20, 0x7F, dice.randrange(256)))]) * length
        elif kind == 5:
            data[at : at + length] = dice.randbytes(length)
        elif kind == 6:
            del data[dice.randrange(size + 1) :]
        elif kind == 7:
            other = dice.choice(others)
            start = dice.randrange(len(other) + 1)
            data[at : at + length] = other[start : start + length]
        else:
            far = dice.randrange(size + 1)
            data[at : at + length], data[far : far + length] = data[far : far + length], data[at : at + length]
    return bytes(data)


DEEP = "nested"  # stands for what is nested very deeply
ODD = (
    None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**400, 1e308, -0.0, float("nan"), float("inf"), "", "a",
    "../../etc/passwd", "/etc/passwd", "\x00", "a" * 5000, "{{ 1/0 }}", [], {}, [[]], [None], {"a": {}}, ["x"] * 300,
)  # fmt: skip


def mutate_json(value: Any, dice: random.Random) -> Any:
    """A JSON value with something odd at some places."""
    places: list[tuple[Any, Any]] = []

    def find(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                find(node[key])

    value = json.loads(json.dumps(value))
    if not isinstance(value, dict | list):
        return dice.choice(ODD)
    find(value)
    for node, key in dice.sample(places, min(len(places), dice.choice((1, 1, 2, 4)))):
        kind = dice.randrange(8)
        try:
            if kind == 0:
                del node[key]
            elif kind == 1 and isinstance(node, dict):
                node[dice.choice(("", "type", "x" * 100, "a/b"))] = node.pop(key)
            elif kind == 2 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
                node[key] = dice.choice((-node[key], node[key] * 1000, node[key] + 1, 0, 2**40, float(node[key])))
            elif kind == 3:
                node[key] = [node[key]]
            elif kind == 4:
                node[key] = DEEP if dice.random() < 0.5 else [[[node[key]]]]
            else:
                node[key] = dice.choice(ODD)
        except (KeyError, IndexError):  # gone by an earlier change
            continue
    return value


def spoiled(path: Path, content: bytes, others: list[bytes], dice: random.Random) -> bytes:
    """A file's content, spoiled as bytes or, now and then, as the JSON that it is."""
    if path.suffix in (".json", ".jsonl") and dice.random() < 0.6:
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        at = dice.randrange(len(lines))
        try:
            lines[at] = _dumps(mutate_json(json.loads(lines[at]), dice))
            return "\n".join(lines).encode("utf-8", "surrogatepass")
        except ValueError:
            pass
    return mutate(content, others, dice)


def _dumps(value: Any) -> str:
    """JSON, of values that are nested deeper than Python's writer goes as well."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000)


# ---- readers -----------------------------------------------------------------------------------------


def gguf_model(folder: Path) -> tuple[list[Path], Reader]:
    import gguf as package
    import jax

    from jaxml import lm
    from jaxml.lm import decoder, tensors
    from jaxml.testing import tiny_config

    config = tiny_config(width=32, num_layers=1, vocab_size=64)
    writer = package.GGUFWriter(str(folder / "model.gguf"), "llama")
    numbers = dict(
        context_length=config.max_length, embedding_length=config.width, block_count=1,
        feed_forward_length=config.hidden_dim, head_count=config.num_heads, head_count_kv=config.num_kv_heads,
        layer_norm_rms_eps=config.norm_eps, rope_freq_base=config.rope_theta, vocab_size=config.vocab_size,
    )  # fmt: skip
    for name, value in numbers.items():
        getattr(writer, f"add_{name}")(value)
    letters = ["!#", *(chr(33 + i) for i in range(63))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters)
    writer.add_token_merges(["! #"])
    writer.add_token_types([1] * 64)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    kinds = package.GGMLQuantizationType
    for name, array in tensors.disassemble(decoder.init(jax.random.key(0), config), config, "gguf"):
        kind = kinds.Q4_1 if array.ndim == 2 and array.shape[1] % 32 == 0 else kinds.F32
        writer.add_tensor(name, package.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [folder / "model.gguf"], lambda where: lm.load(where / "model.gguf")


def _model(folder: Path, **fields: Any) -> Any:
    from jaxml import lm
    from jaxml.testing import tiny_model

    model = tiny_model(num_layers=1, **fields)
    lm.save(model, folder / "model")
    return model


def weights(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml import lm

    _model(folder)
    return [folder / "model" / name for name in ("model.safetensors", "config.json")], lambda at: lm.load(at / "model")


def tokenizer(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml.lm import chat
    from jaxml.lm import tokenizer as tokenizers

    _model(folder)

    def read(where: Path) -> None:
        made = tokenizers.from_folder(where / "model")
        made.encode("the fox <assistant>")
        if made.chat_template:
            chat.render(made, [{"role": "user", "content": "hi"}])

    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return [folder / "model" / name for name in names], read


def nf4(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml import lm, quant
    from jaxml.testing import tiny_model

    model = tiny_model(num_layers=1, width=64, num_heads=8, num_kv_heads=4, hidden_dim=64)
    lm.save(model.replace(params=quant.quantize_params(model.params, "nf4")), folder / "model")
    return [folder / "model" / name for name in ("model.safetensors", "config.json")], lambda at: lm.load(at / "model")


def adapter(folder: Path) -> tuple[list[Path], Reader]:
    import jax

    from jaxml.testing import tiny_model
    from jaxml.tune import adapters

    model = tiny_model(num_layers=1)
    params = adapters.attach(model.params, jax.random.key(0), rank=2, method="dora")
    adapters.save_peft(folder / "adapter", params, model.config)
    files = [folder / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return files, lambda at: adapters.load_peft(at / "adapter", model.params, model.config)


def prompt(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml.testing import tiny_model
    from jaxml.tune import adapters
    from jaxml.tune import prompt as prompts

    model = tiny_model(num_layers=1)
    adapters.save_peft(folder / "adapter", prompts.soft(model, length=3).params, model.config)
    files = [folder / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    return files, lambda at: adapters.load_peft(at / "adapter", model.params, model.config)


def jsonl(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml.testing import tiny_tokenizer
    from jaxml.tune import data

    lines = [
        {"text": "the fox"},
        {"prompt": "a", "response": "b", "task": 1},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        {"parts": [["a", 0], ["b", 1.5]]},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 3))
    made = tiny_tokenizer(chat_template="{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")

    def read(where: Path) -> None:
        data.prepare(data.read_jsonl(where / "train.jsonl"), made, length=64, batch_size=2)(0)

    return [folder / "train.jsonl"], read


def passages(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml.rag import read as reader

    page = "<html><head><title>T</title><style>p{}</style></head><body><h1>A</h1><p>One &amp; two<ul><li>x</ul>"
    (folder / "a.html").write_text(page + "<table><tr><td>1<td>2</table><script>if(1<2){}</script></body></html>")
    (folder / "b.md").write_text(
        "# A\n\nText *here*.\n\n```\ncode\n```\n\n- a\n- b\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    (folder / "c.txt").write_text("One paragraph.\n\nAnother, with é.\n")
    (folder / "d.jsonl").write_text('{"text": "one", "title": "t"}\n{"text": "two", "source": "s"}\n')
    files = [folder / name for name in ("a.html", "b.md", "c.txt", "d.jsonl")]
    return files, lambda at: [list(reader.read(at / file.name)) for file in files]


def pdf(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml.rag import read as reader

    stream = b"BT /F1 12 Tf 72 700 Td (Hello paged world) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    out += b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\n" % (size, table, size)
    (folder / "a.pdf").write_bytes(out + b"startxref\n%d\n%%%%EOF\n" % out.index(b"xref\n0 "))
    return [folder / "a.pdf"], lambda at: list(reader.read(at / "a.pdf"))


def index(folder: Path) -> tuple[list[Path], Reader]:
    import numpy as np

    from jaxml.rag import passages as kinds
    from jaxml.rag import store

    made = store.Folder.create(folder / "store", 8, codes=True)
    of = [kinds.Passage(text=f"text {i}", source="s", title="t") for i in range(5)]
    vectors = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    made.add(of, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    made.delete([of[1].key])

    def read(where: Path) -> None:
        opened = store.Folder(where / "store")
        opened.search(vectors[:1], 2)
        list(opened.passages())

    return [path for path in sorted((folder / "store").rglob("*")) if path.is_file()], read


def words(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml.rag import Lexical
    from jaxml.rag.passages import Passage

    of = [Passage(f"the cat number {i} sat by the dog", "a", start=i) for i in range(9)]
    Lexical.build(of).save(folder / "words", "1")

    def read(where: Path) -> None:
        made = Lexical.load(where / "words", "1")
        if made is not None:
            made.search(["a cat", "number 3"], 4)

    return [path for path in sorted((folder / "words").iterdir()) if path.is_file()], read


def questions(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml.rag import questions as rag
    from jaxml.tune import r_tuning

    (folder / "a.jsonl").write_text('{"question": "q?", "answer": "a", "passages": ["x", {"text": "y"}]}\n' * 3)
    document = {"text": "t", "type": "noise"}
    row = {"question": "q?", "documents": [document] * 2, "gold_answers": ["a"], "wrong_answers": ["b"]}
    (folder / "b.jsonl").write_text((json.dumps(row) + "\n") * 3)
    (folder / "c.jsonl").write_text('{"question": "q?", "answers": ["a"], "choices": ["a", "b"], "group": "g"}\n' * 3)

    def read(where: Path) -> None:
        rag.read(str(where / "a.jsonl"))
        rag.read(f"ramdocs:{where / 'b.jsonl'}")
        r_tuning.read(where / "c.jsonl")

    return [folder / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")], read


def columns(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml.kan import table as tables

    rows = "".join(f"{i / 7},{i % 3},w{i},{i * i}\n" for i in range(30))
    (folder / "a.csv").write_text("a,b,word,y\n" + rows)
    return [folder / "a.csv"], lambda at: tables.read(at / "a.csv", "y")


def checkpoint(folder: Path) -> tuple[list[Path], Reader]:
    import jax.numpy as jnp

    from jaxml import checkpoint as checkpoints

    tree = {"a": {"w": jnp.arange(60.0).reshape(12, 5)}, "b": [jnp.ones(3, jnp.bfloat16), jnp.zeros((), jnp.int32)]}
    checkpoints.save(folder / "run", 3, tree)
    files = [path for path in sorted((folder / "run").rglob("*")) if path.is_file()]
    return files, lambda at: checkpoints.restore(at / "run", tree)


def orbax(folder: Path) -> tuple[list[Path], Reader]:
    from jaxml import lm, quant
    from jaxml.testing import tiny_model

    model = tiny_model(num_layers=1, width=64, num_heads=8, num_kv_heads=4, hidden_dim=64)
    lm.save_orbax(model.replace(params=quant.quantize_params(model.params, "int4")), folder / "model")
    files = [path for path in sorted((folder / "model").rglob("*")) if path.is_file()]
    return files, lambda at: lm.load(at / "model")


def network(folder: Path) -> tuple[list[Path], Reader]:
    import jax

    from jaxml import kan
    from jaxml.kan import file

    file.save(folder / "net.npz", kan.init(jax.random.key(0), [2, 3, 1]))
    return [folder / "net.npz"], lambda at: file.load(at / "net.npz")


def encoder(folder: Path) -> tuple[list[Path], Reader]:
    import numpy as np

    from jaxml.lm import encoder as encoders
    from jaxml.lm import hf
    from jaxml.testing import tiny_tokenizer

    about = dict(
        model_type="bert", hidden_act="gelu", vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, type_vocab_size=2, layer_norm_eps=1e-12,
    )  # fmt: skip
    where = folder / "encoder"
    tiny_tokenizer().save(where)
    (where / "config.json").write_text(json.dumps(about))
    config, arrays = encoders.read_config(where), {}
    shapes = encoders.shapes(config)
    for path, name in encoders._names().items():
        shape = shapes["layers"][path] if "{}" in name else shapes[path]
        for layer in range(config.num_layers if "{}" in name else 1):
            arrays[name.format(layer)] = np.ones(
                (shape[1:] if "{}" in name else shape)[::-1]
                if path in ("up", "down")
                else (shape[1:] if "{}" in name else shape),
                np.float32,
            )
    hf.save_safetensors(where / "model.safetensors", arrays)
    return sorted(where.iterdir()), lambda at: encoders.load(at / "encoder")


READERS = (
    gguf_model, weights, tokenizer, nf4, adapter, prompt, jsonl, passages, pdf, index, words, questions, columns,
    checkpoint, orbax, network, encoder,
)  # fmt: skip


# ---- one reader --------------------------------------------------------------------------------------


def attack(name: str, files: int, seed: int, kept: Path) -> dict[str, Any]:
    """Spoils so many files for a reader, in this process."""
    made = next(reader for reader in READERS if reader.__name__ == name)
    dice, outcome, failures = random.Random(f"{seed} {name}"), {"read": 0, "refused": 0}, []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        targets, read = made(where)
        read(where)  # whole, it is read; and all is imported and compiled
        _limit()
        memory = _resident()
        whole = {path: path.read_bytes() for path in targets}
        others = list(whole.values())
        for number in range(files):
            path = dice.choice(targets)
            content = spoiled(path, whole[path], others, dice)
            path.write_bytes(content)
            started = time.process_time()
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                read(where)
                outcome["read"] += 1
            except ALLOWED as error:
                outcome["refused"] += 1
                if not str(error).strip():
                    failures.append(_kept(kept, name, number, path, content, "an error without a sentence"))
            except BaseException as error:  # whatever it is, it is counted
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures.append(_kept(kept, name, number, path, content, f"{type(error).__name__}: {error}"[:300]))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - started)
            path.write_bytes(whole[path])
    grown = (_resident() - memory) / 2**20
    numbers = {"slowest_s": slowest, "grown_mib": grown, "failures": failures}
    return {"reader": name, "files": files, **outcome, **numbers}


class Hang(BaseException):
    """A file took too long."""


def _limit() -> None:
    import faulthandler

    def late(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    faulthandler.enable()
    signal.signal(signal.SIGPROF, late)
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    now = int(data.split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, now + MEMORY))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _kept(folder: Path, name: str, number: int, path: Path, content: bytes, what: str) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{number}-{path.name}").write_bytes(content)
    return {"file": f"{name}-{number}-{path.name}", "what": what}


def run(name: str, files: int, seed: int, kept: Path) -> dict[str, Any]:
    """The same in a process of its own, which may die of it."""
    command = [sys.executable, __file__, "--child", name, "--files", files, "--seed", seed, "--kept", kept]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = (done.stderr or done.stdout)[-2000:]
        return {"reader": name, "files": files, "failures": [{"file": "", "what": f"ended {done.returncode}: {tail}"}]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    names = [reader.__name__ for reader in READERS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", nargs="+", default=names, choices=names)
    parser.add_argument("--files", type=int, default=3000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=Path, default=Path("runs/fuzz"), help="where files go that did harm")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print the table of the newest results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    if options.child:
        print(json.dumps(attack(options.child, options.files, options.seed, options.kept)))
        return
    rows = []
    for name in options.readers:
        rows.append(run(name, options.files, options.seed, options.kept))
        shown = {k: v for k, v in rows[-1].items() if k != "failures"}
        print(shown, len(rows[-1]["failures"]), "failures", flush=True)
        for failure in rows[-1]["failures"][:5]:
            print("  ", failure, flush=True)
    if options.readers == names and options.files >= 1000:
        report = {**about.made(), "seed": options.seed, "rows": rows}
        (about.RESULTS / f"fuzz-{report['date']}.json").write_text(json.dumps(report, indent=1))


def table() -> str:
    """Markdown of the newest results."""
    report = about.newest("fuzz")
    columns = ("reader", "files", "read all the same", "refused", "failures", "slowest, s", "memory grown, MiB")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in report["rows"]:
        cells = [r["reader"], f"{r['files']:,}", r["read"], r["refused"], len(r["failures"])]
        lines.append(f"| {' | '.join(map(str, cells))} | {r['slowest_s']:.2f} | {r['grown_mib']:.0f} |")
    total = sum(r["files"] for r in report["rows"])
    return f"{total:,} spoiled files, seed {report['seed']}, CPU, {report['date']}:\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
