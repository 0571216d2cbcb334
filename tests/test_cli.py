"""The command line as a person meets it: real processes where the exit code matters, `main` elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxml import lm
from jaxml.cli.main import VERBS, main
from jaxml.testing import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, and a JSONL to learn."""
    root = tmp_path_factory.mktemp("cli")
    lm.save(tiny_model(), root / "model")
    lines = [{"prompt": f"{a} and ", "response": f"{b}."} for a in "abc" for b in "uv"]
    (root / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return root


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


def refused(capsys, *argv):
    """The one sentence on stderr of a command that must exit with 2."""
    assert main([str(a) for a in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("jaxml: ") and "Traceback" not in message
    return message


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0 and f"examples:\n  jaxml {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["nope"], ["generate"], ["finetune", "m", "d.jsonl"], ["convert", "a", "b", "--to", "x"]]
)
def test_wrong_usage_exits_with_2(argv):
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code == 2


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "jaxml.cli.main", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("jaxml ")


def test_importing_jaxml_touches_no_jax():
    code = "import sys, jaxml; assert 'jax' not in sys.modules, 'jax'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_finetune_evaluate_generate_and_convert(folder, capsys):
    run = folder / "run"
    argv = ["finetune", folder / "model", folder / "train.jsonl", "--out", run, "--eval", folder / "train.jsonl"]
    argv += [
        "--steps",
        120,
        "--batch-size",
        2,
        "--length",
        32,
        "--learning-rate",
        0.02,
        "--eval-every",
        50,
        "--no-progress",
    ]
    assert main([str(a) for a in argv]) == 0
    assert {p.name for p in run.iterdir()} == {".lock", "adapter", "checkpoints", "log.jsonl", "loss.png", "run.json"}
    assert "finished" in refused(capsys, *argv)

    def evaluate(*more):
        assert main([str(a) for a in ["evaluate", folder / "model", folder / "train.jsonl", "--json", *more]]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    before, after = evaluate(), evaluate("--adapter", run / "adapter")
    assert after["perplexity"] < 0.5 * before["perplexity"] and 0 <= after["exact_match"] <= 1

    for form in ("hf", "orbax"):
        merged = folder / f"merged-{form}"
        argv = ["convert", folder / "model", merged, "--adapter", run / "adapter", "--to", form]
        assert main([str(a) for a in argv]) == 0
        assert "not empty" in refused(capsys, *argv)
    hf, orbax = lm.load(folder / "merged-hf"), lm.load(folder / "merged-orbax")
    for x, y in zip(*(sorted(m.params["layers"].items()) for m in (hf, orbax))):
        np.testing.assert_array_equal(x[1], y[1])
    capsys.readouterr()
    assert main(["generate", str(folder / "merged-hf"), "a and ", "--max-new-tokens", "5", "--no-stream"]) == 0
    expected = lm.generate(hf, "a and ", max_new_tokens=5)[0]
    assert capsys.readouterr().out.strip() == expected.strip()


def test_full_fine_tuning_writes_a_model(folder, capsys):
    argv = [
        "finetune",
        folder / "model",
        folder / "train.jsonl",
        "--out",
        folder / "full",
        "--method",
        "full",
        "--steps",
        2,
    ]
    argv += ["--batch-size", 2, "--length", 32, "--accumulate", 2, "--remat", "--compute", "bfloat16", "--no-progress"]
    assert main([str(a) for a in argv]) == 0
    assert lm.load(folder / "full" / "model").config == tiny_model().config


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "qlora", "--lora-plus", 4, "--rslora"],
        pytest.param(
            ["--method", "qdora", "--start", "loftq", "--dropout", 0.1, "--targets", "q,up"], marks=pytest.mark.slow
        ),
        pytest.param(["--method", "vera", "--rank", 16], marks=pytest.mark.slow),
        pytest.param(["--method", "adalora", "--rank", 6, "--target-rank", 3], marks=pytest.mark.slow),
        ["--method", "ia3", "--quantize", "int8"],
        ["--method", "lora", "--start", "pissa", "--whole", "norm"],
    ],
    ids=lambda options: options[1],
)
def test_each_method_writes_an_adapter_that_loads_on_its_model(options, folder, capsys):
    run = folder / "-".join(map(str, options[1:4]))
    argv = [
        "finetune",
        folder / "model",
        folder / "train.jsonl",
        "--out",
        run,
        *options,
        "--steps",
        40,
        "--batch-size",
        2,
    ]
    argv += ["--length", 32, "--learning-rate", 0.02, "--no-progress", "--save-every", 0]
    assert main([str(a) for a in argv]) == 0
    assert "in all" in capsys.readouterr().out  # the plan
    base = run / "base" if (run / "base").exists() else folder / "model"
    assert (run / "base").exists() == ("loftq" in options)
    argv = ["evaluate", base, folder / "train.jsonl", "--json", "--adapter", run / "adapter"]
    argv += ["--quantize", "nf4"] if options[1] == "qlora" else ["--quantize", "int8"] if "int8" in options else []
    assert main([str(a) for a in argv]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert found < np.exp(logged[0]["loss"])


def test_quantize_and_merge_write_folders_that_load(folder, capsys):
    from jaxml import quant

    model, small = folder / "model", folder / "small"
    assert main(["quantize", str(model), str(small)]) == 0
    assert "nf4" in capsys.readouterr().out
    read = lm.load(small).params["layers"]["q"]
    np.testing.assert_allclose(
        read.dense(), quant.nf4.quantize(lm.load(model).params["layers"]["q"]).dense(), rtol=1e-5
    )
    assert main(["quantize", str(model), str(folder / "four"), "--format", "int4", "--targets", "q,embed"]) == 0
    assert lm.load(folder / "four").params["embed"].kind == "int4"
    run = folder / "for-merging"
    argv = ["finetune", small, folder / "train.jsonl", "--out", run, "--steps", 2, "--batch-size", 2, "--length", 32]
    assert main([str(a) for a in [*argv, "--no-progress"]]) == 0
    for more, kind in (([], jax.Array), (["--requantize"], quant.QArray)):
        out = folder / f"merged{len(more)}"
        assert main([*map(str, ["merge", small, run / "adapter", out]), *more]) == 0
        assert isinstance(lm.load(out).params["layers"]["q"], kind)
        assert "not empty" in refused(capsys, "merge", small, run / "adapter", out)
    for more, kind in (([], jax.Array), (["--requantize"], quant.QArray)):
        out = folder / f"merged four{len(more)}"
        assert main([*map(str, ["merge", folder / "four", run / "adapter", out]), *more]) == 0
        assert isinstance(lm.load(out).params["layers"]["q"], kind)
    assert "got 'zz'" in refused(capsys, "quantize", model, folder / "no", "--targets", "zz")
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", str(model), str(folder / "no"), "--adapter", str(run / "adapter")])
    assert "unrecognized arguments: --adapter" in capsys.readouterr().err
    assert not (folder / "no").exists()


@pytest.mark.parametrize(
    "options, word",
    [
        (["--method", "ia3", "--rank", "4"], "--rank is no option"),
        (["--method", "galore", "--quantize", "nf4"], "--quantize is no option"),
        (["--method", "galore", "--targets", "nosuch"], "finetune --targets: a pattern matches at least one weight, "),
        (["--method", "full", "--dropout", "0.1"], "--dropout is no option"),
        (["--start", "nope"], "start is one of"),
        (["--start", "loftq"], "is for quantised weights"),
        (["--start", "pissa", "--quantize", "int4"], "in int4 cannot be. Take --quantize nf4"),
        (["--method", "galore", "--gap", str(10**12)], "--gap is below 2³¹"),
        (["--accumulate", str(10**9)], "the tokens of a step"),
        (["--wait", "0"], "--wait is at least 1 s"),
        (["--whole", "zz"], "'zz'"),
        (["--lora-plus", "-1"], "above 0"),
        (["--rank", "4000"], "1 … 32"),
    ],
)
def test_what_a_method_does_not_take_is_refused(options, word, folder, capsys):
    argv = ["finetune", folder / "model", folder / "train.jsonl", "--out", folder / "no-run", *options]
    assert word in refused(capsys, *argv)


def test_an_adapter_is_gone_on_with_or_merged(folder, capsys):
    base = ["finetune", folder / "model", folder / "train.jsonl", "--no-progress", "--steps", 1, "--batch-size", 1]
    run = lambda name, *more: [str(a) for a in [*base, "--length", 32, "--out", folder / name, *more]]
    given = ["--adapter", folder / "first" / "adapter"]
    assert main(run("first", "--rank", 4)) == 0
    assert main(run("merged", "--method", "galore", "--rank", 8, *given)) == 0
    assert main(run("faster", "--lora-plus", 4, *given)) == 0
    assert "--rank is what --adapter has been made with" in refused(capsys, *run("never", "--rank", 4, *given))
    assert "Give --method lora" in refused(capsys, *run("never", "--method", "dora", *given))
    (folder / "first" / "run.json").unlink()
    shutil.rmtree(folder / "first" / "adapter")
    assert "holds checkpoints, but no file run.json" in refused(capsys, *run("first", "--rank", 8))


def test_what_a_start_left_of_the_weights_is_the_only_base_of_its_adapter(folder, capsys):
    train, run = folder / "train.jsonl", folder / "moved"
    argv = ["finetune", folder / "model", train, "--no-progress", "--steps", 1, "--batch-size", 1, "--length", 32]
    argv += ["--method", "qlora", "--start", "pissa", "--eval", train]
    assert "1 … 32" in refused(capsys, *argv, "--rank", 99, "--out", run)
    assert not run.exists()
    assert main([str(a) for a in [*argv, "--rank", 4, "--out", run]]) == 0
    told = capsys.readouterr().out.rpartition("held-out loss ")[2].partition(":")[0]
    given = ["--adapter", run / "adapter", "--length", 32]
    assert main([str(a) for a in ["evaluate", run / "base", train, *given]]) == 0
    assert f"loss {told} nats" in capsys.readouterr().out
    for options in ([], ["--quantize", "nf4"]):
        assert "Load it on" in refused(capsys, "evaluate", folder / "model", train, *given, *options)


@pytest.mark.slow
def test_galore_of_eight_bits_goes_on_where_it_stopped(folder, capsys):
    argv = ["finetune", folder / "model", folder / "train.jsonl", "--method", "galore", "--rank", 8, "--eight-bit"]
    argv += ["--gap", 2, "--batch-size", 2, "--length", 32, "--no-progress", "--steps", 4, "--save-every", 2]
    runs = folder / "galore", folder / "galore again"
    assert main([str(a) for a in [*argv, "--out", runs[0]]]) == 0
    shutil.copytree(runs[0], runs[1], ignore=shutil.ignore_patterns("model", "4"))  # as if it had stopped at step 2
    assert main([str(a) for a in [*argv, "--out", runs[1]]]) == 0
    a, b = (lm.load(run / "model").params for run in runs)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    shutil.rmtree(runs[1] / "model")
    assert "rank was 8, is 4" in refused(capsys, *argv, "--rank", 4, "--out", runs[1])
    assert "below the shorter side of at least one matrix" in refused(
        capsys, *argv, "--rank", 999, "--out", folder / "never"
    )
    assert "no option of --method galore" in refused(capsys, *argv, "--alpha", 2, "--out", folder / "never")
    assert "got 'nope'" in refused(capsys, *argv, "--targets", "q,nope", "--out", folder / "never")


def test_bad_input_is_one_sentence_and_nothing_is_written(folder, tmp_path, capsys):
    model, train = folder / "model", folder / "train.jsonl"
    out = ["--out", tmp_path / "run", "--no-progress", "--length", 32]
    assert "no file, folder or known model" in refused(capsys, "generate", "nowhere", "hi")
    assert "no such file" in refused(capsys, "finetune", model, tmp_path / "no.jsonl", *out)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    assert "line 2" in refused(capsys, "finetune", model, tmp_path / "bad.jsonl", *out)
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty" in refused(capsys, "finetune", model, tmp_path / "empty.jsonl", *out)
    assert "layers/q" in refused(capsys, "finetune", model, train, *out, "--targets", "zz")
    assert "context of 128" in refused(capsys, "generate", model, "a" * 300)
    assert "top_p" in refused(capsys, "generate", model, "a", "--top-p", "2")
    assert "adapter_config.json" in refused(capsys, "generate", model, "a", "--adapter", tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00")
    assert "GGUF" in refused(capsys, "generate", tmp_path / "x.gguf", "a")
    assert "nope" in refused(capsys, "download", "nope")
    assert not (tmp_path / "run").exists()


def test_chat_answers_each_line(folder):
    argv = [sys.executable, "-m", "jaxml.cli.main", "chat", str(folder / "model"), "--max-new-tokens", "4"]
    done = subprocess.run(argv, input="hi\nyou\n\n", capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_doctor_tells_versions_devices_and_backends(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["jax"] and len(report["devices"]) == 8 and report["attention"]
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "attention backends" in printed and "XLA; no kernel: it needs a GPU" in printed


@pytest.mark.slow
def test_the_main_job_in_small(smollm2, tmp_path, capsys):
    argv = ["quickstart", "--out", tmp_path / "q", "--countries", 3, "--new-countries", 2, "--steps", 3]
    assert main([str(a) for a in argv]) == 0
    report = json.loads((tmp_path / "q" / "report.json").read_text())
    wanted = {f"{k}_{w}" for k in ("accuracy", "new_countries", "perplexity") for w in ("before", "after")}
    assert wanted | {"seconds"} <= set(report) and 20 < report["perplexity_before"] < 35
    assert {"adapter", "checkpoints", "loss.png", "report.json"} <= {p.name for p in (tmp_path / "q").iterdir()}
    assert main([str(a) for a in argv]) == 0 and "finished before" in capsys.readouterr().out


def test_activations_are_a_table_a_picture_or_one(tmp_path, capsys):
    assert main(["activations", "--kind", "gated"]) == 0
    assert "swiglu" in capsys.readouterr().out
    assert main(["activations"]) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("gelu_exact", "1.5335", "learnable.snake", "sparsemax", "noisy.rrelu"))
    assert main(["activations", "--name", "gelu"]) == 0
    assert "torch and Keras" not in (text := capsys.readouterr().out) and "GELU(approximate='tanh')" in text
    assert main(["activations", "--name", "mish", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mish"]["limits"] == [0, "inf"]
    picture = tmp_path / "three.png"
    assert main(["activations", "--name", "relu", "--name", "silu", "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 5000 and "2 activations" in capsys.readouterr().out
    assert "Near: " in refused(capsys, "activations", "--name", "mishh")
    assert "ends in .png" in refused(capsys, "activations", "--name", "relu", "--plot", tmp_path / "x.bmp")
    assert "a curve is drawn" in refused(capsys, "activations", "--kind", "noisy", "--plot", picture)


@pytest.mark.slow
def test_a_prompt_is_tuned_and_used_and_put_into_words(folder, capsys):
    run, model, train = folder / "prompt", folder / "model", folder / "train.jsonl"
    argv = ["prompt", "tune", model, train, "--out", run, "--eval", train, "--steps", 30, "--batch-size", 1]
    argv += ["--row", 64, "--length", 4, "--learning-rate", 0.2, "--harden", 2, "--no-progress"]
    assert main([str(a) for a in argv]) == 0
    said = capsys.readouterr().out
    assert "soft prompt of 4 places, 128 numbers" in said and "in words: " in said and "gap" in said
    found = {p.name for p in run.iterdir()}
    assert found == {".lock", "adapter", "checkpoints", "log.jsonl", "loss.png", "run.json", "words.txt"}
    before, after = (float(x) for x in re.search(r"loss ([\d.]+) before, ([\d.]+) after", said).groups())
    assert after < before
    assert "finished" in refused(capsys, *argv)
    (run / "words.txt").unlink()  # as if it had been stopped there
    assert main([str(a) for a in argv]) == 0 and (run / "words.txt").exists()
    capsys.readouterr()
    assert main(["evaluate", str(model), str(train), "--json", "--adapter", str(run / "adapter")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] < before
    assert "cannot be merged" in refused(capsys, "merge", model, run / "adapter", folder / "never")
    prefix = ["prompt", "tune", model, train, "--out", folder / "no", "--kind", "prefix"]
    assert "for one soft prompt" in refused(capsys, *prefix, "--harden", 1)
    assert "option of --kind soft" in refused(capsys, *prefix, "--rank", 1)
    assert "option of --kind prefix" in refused(
        capsys, "prompt", "tune", model, train, "--out", folder / "no", "--hidden-dim", 4
    )
    assert "start is one of sink" in refused(
        capsys, "prompt", "tune", model, train, "--out", folder / "no", "--kind", "prefix", "--start", "labels"
    )
    assert not (folder / "no" / "adapter").exists()


def test_a_prompt_is_searched_for_and_choices_are_scored(folder, tmp_path, capsys):
    model, train = folder / "model", folder / "train.jsonl"
    (tmp_path / "said.txt").write_text("say it.\n\nnow!\n")
    held = [{"prompt": f"{a} and ", "response": "u."} for a in "xyz"]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(x) + "\n" for x in held))
    argv = ["prompt", "search", model, train, "--out", tmp_path / "search", "--instruction", "go."]
    assert "question is in both" in refused(capsys, *argv, "--eval", train)
    argv += ["--eval", tmp_path / "held.jsonl"]
    argv += ["--instructions", tmp_path / "said.txt", "--shots", "0,1", "--sets", 1, "--no-progress"]
    assert main([str(a) for a in argv]) == 0
    said = capsys.readouterr().out
    assert "# Prompt search" in said and "95 % interval" in said
    assert {p.name for p in (tmp_path / "search").iterdir()} == {"answers.jsonl", "report.md", "search.png"}
    assert "budget pays for" in refused(capsys, *argv, "--budget", 5)
    assert "Add --propose" in refused(capsys, *argv, "--proposer", model)
    assert "http://host/v1#name" in refused(capsys, "prompt", "score", "http://127.0.0.1:9/v1", "a", "b")
    assert "MODEL is an endpoint" in refused(capsys, "prompt", "score", "http://x/v1#m", "a", "b", "--dtype", "float32")

    assert main(["prompt", "score", str(model), "a and ", "u.", "v.", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    want = lm.score(lm.load(model), ["a and "] * 2, ["u.", "v."])
    np.testing.assert_allclose([r["score"] for r in rows], want, atol=1e-4)
    assert main(["prompt", "score", str(model), "a and ", "u.", "v.", "--calibrate", "a "]) == 0
    assert "%" in capsys.readouterr().out
    lines = [{"prompt": "a and ", "response": "u.", "choices": ["u.", "v."]}]
    (tmp_path / "asked.jsonl").write_text(json.dumps(lines[0]) + "\n")
    score = ["prompt", "score", model, "--data", tmp_path / "asked.jsonl"]
    assert main([str(a) for a in [*score, "--json"]]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == float(want[0] > want[1])
    assert "got both or neither" in refused(capsys, "prompt", "score", model)
    assert "at least one CHOICE" in refused(capsys, "prompt", "score", model, "a")
    assert "correction is one of" in refused(capsys, *score, "--correction", "most")
    assert "lacks choices" in refused(capsys, "prompt", "score", model, "--data", train)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 4)
    assert "a prompt and a response" in refused(
        capsys, "prompt", "search", model, tmp_path / "text.jsonl", "--out", tmp_path / "no"
    )


@pytest.mark.slow
def test_a_model_is_taught_to_say_when_it_is_unsure(folder, tmp_path, capsys):
    rows = [{"question": f"is {a}{b} so?", "answer": a, "group": a} for a in "abcd" for b in "uvwxyz"]
    rows += [{"question": f"who is {a}?", "answerable": False} for a in "mn"]
    asked, out = tmp_path / "asked.jsonl", tmp_path / "run"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--train", 8, "--calibration", 4, "--test", 3, "--shots", 1, "--epochs", 1, "--max-new-tokens", 2]
    command = ["rtune", "--model", folder / "model", "--data", asked, "--out", out, "--scale", "words", *small]
    assert main([str(a) for a in [*command, "--no-progress"]]) == 0
    page = capsys.readouterr().out
    assert "Kept out of training:" in page and "D0, unsure" in page and "Questions that nothing answers (2)" in page
    report = json.loads((out / "report.json").read_text())
    assert set(report["seen"]) == {"R-Tuning, standard", "tuned, own probability", "untuned, own probability"}
    assert {p.name for p in out.glob("*.png")} == {"risk_coverage.png", "reliability.png"}
    assert "is finished" in refused(capsys, *command)
    (out / "report.md").unlink()
    assert "other options or data (rank was 8, is 4)" in refused(capsys, *command, "--rank", 4)
    asked.write_text(asked.read_text().replace("who is m?", "who is k?"))
    assert "other options or data (questions was" in refused(capsys, *command)
    evaluate = ["rtune", "evaluate", out, "--data", asked]
    assert "has its own options, got --risk" in refused(capsys, *evaluate, "--risk", 0.5)
    assert "one run is given" in refused(capsys, *evaluate[:3])
    assert main([str(a) for a in ["rtune", "evaluate", out, "--data", asked, "--no-progress"]]) == 0
    assert "2 questions that nothing answers:" in capsys.readouterr().out
    assert main(["rtune", "ask", str(out), "who is m?", "is au so?"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("confidence 0." in line for line in said)


def test_r_tuning_refuses_what_it_cannot_use(folder, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text('{"question": "a?", "answer": "b"}\n')
    out = tmp_path / "run"
    assert "at least 20 different questions" in refused(capsys, "rtune", "--data", few, "--out", out)
    assert "no such file" in refused(capsys, "rtune", "--data", tmp_path / "none.jsonl", "--out", tmp_path / "other")
    assert "variant is one of" in refused(capsys, "rtune", "--variant", "loud", "--out", tmp_path / "third")
    assert "no finished run" in refused(capsys, "rtune", "evaluate", tmp_path / "nowhere")
    assert "a finished run is given" in refused(capsys, "rtune", "ask")
    assert "takes options only" in refused(capsys, "rtune", "run", "questions.jsonl")
    rows = [{"question": f"is {a}{b} so?", "answer": a} for a in "abcd" for b in "uvwxyz"]
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["rtune", "--data", few, "--out", out, "--train", 8, "--calibration", 4, "--test", 3]
    assert "takes at least 88 calibration questions, got 4" in refused(capsys, *command, "--risk", 0.1)
    assert "risk and delta are in (0, 1), got 20" in refused(capsys, *command, "--risk", 20)
    assert "every question has a context" in refused(capsys, *command, "--variant", "grounded")
    assert "asks for no certainty" in refused(capsys, *command, "--variant", "refusal", "--scale", "words")
    assert "trains dense weights" in refused(capsys, *command, "--method", "full", "--quantize", "nf4")
    assert "unknown: b" in refused(capsys, *command, "--new-groups", "b")
    assert not out.exists()  # nothing is written before all is checked
