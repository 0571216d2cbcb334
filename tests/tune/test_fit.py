import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import checkpoint, log, tune
from jaxml.lm import decoder
from jaxml.testing import tiny_model, tolerance
from jaxml.tune import adapters, data
from jaxml.tune.loss import divergence
from jaxml.tune.run import Run, alone, begin
from jaxml.tune.step import make_step

EXAMPLES = [{"prompt": f"{a} and ", "response": b * n + "."} for n, a in enumerate("abcdef") for b in "uvwx"]
OPTIONS = tune.Options(steps=12, batch_size=2, length=32, learning_rate=1e-2, save_every=3)


def lora(model):
    return model.replace(params=adapters.attach(model.params, jax.random.key(1), rank=4))


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a.params, b.params))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_loss_falls_and_what_is_frozen_stays(method):
    model = tiny_model()
    start = lora(model) if method == "lora" else model
    steps = 60 if method == "full" else 240  # with the head frozen and random, factors have far to go
    options = tune.Options(steps=steps, batch_size=4, length=32, learning_rate=2e-2)
    tuned, info = tune.fit(start, EXAMPLES, options, progress=False)
    _, before = tune.fit(
        start, EXAMPLES, tune.Options(steps=1, batch_size=4, length=32, learning_rate=0.0), progress=False
    )
    assert info["loss"] < 0.7 * before["loss"]
    if method == "lora":
        jax.tree.map(np.testing.assert_array_equal, adapters.detach(tuned.params), model.params)
    assert jax.tree.map(lambda a: a.dtype, tuned.params) == jax.tree.map(lambda a: a.dtype, start.params)


@pytest.mark.slow
def test_anchors_keep_the_adapted_model_nearer_to_the_one_below():
    model = lora(tiny_model())
    anchors = [{"text": "the quick brown fox jumps"}, {"text": "over the lazy dog again"}]
    batch = data.prepare(anchors, model.tokenizer, length=32, batch_size=2, learn_all=True)(0)
    hidden = lambda params: decoder.hidden(
        params, model.config, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )

    def moved(**options):
        options = tune.Options(steps=60, batch_size=4, length=32, learning_rate=2e-2, accumulate=2, **options)
        tuned, info = tune.fit(model, EXAMPLES, options, anchors=anchors, progress=False)
        base, now = hidden(model.params), hidden(tuned.params)
        return float(divergence(base, now, decoder.head(model.params), batch["weights"])[0]), info["loss"]

    (free, _), (held, loss) = moved(anchor_weight=0.0), moved(anchor_weight=3.0)
    assert held < 0.3 * free
    assert np.isfinite(loss)


def test_anchors_without_adapters_are_refused():
    with pytest.raises(ValueError, match="model under the adapters"):
        tune.fit(tiny_model(), EXAMPLES, OPTIONS, anchors=[{"text": "the fox"}], progress=False)


def test_anchors_may_be_strings():
    model, options = lora(tiny_model()), tune.Options(steps=2, batch_size=2, length=32, anchor_weight=1.0)
    runs = [
        tune.fit(model, EXAMPLES, options, anchors=anchors, progress=False)[1]["loss"]
        for anchors in (["the fox", "a dog"], [{"text": "the fox"}, {"text": "a dog"}])
    ]
    assert runs[0] == runs[1]


def test_accumulated_small_batches_step_like_one_large_one():
    model = lora(tiny_model())
    base = dict(length=32, learning_rate=1e-2, clip=None)
    batches = data.prepare(EXAMPLES, model.tokenizer, length=32, batch_size=4)
    halves = lambda v: v.reshape(2, 2, *v.shape[1:])
    unequal = lambda b: len({float(w.sum()) for w in halves(b["weights"])}) == 2  # numbers of learnt tokens
    batch = next(b for b in map(batches, range(batches.per_epoch)) if unequal(b))
    whole, parts = {k: v[None] for k, v in batch.items()}, {k: halves(v) for k, v in batch.items()}
    out = []
    for batch, accumulate in ((whole, 1), (parts, 2)):
        options = tune.Options(accumulate=accumulate, **base)
        trainable, frozen = adapters.split(model.params)
        tx = optax.sgd(1.0)
        state = begin(jax.tree.map(jnp.copy, trainable), tx)
        state, metrics = make_step(model.config, tx, options)(state, frozen, batch)
        out.append((state.trainable, metrics["loss"]))
    bound = tolerance("float32", 512)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=bound), *out)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_unrolled_layers_train_like_scanned_ones(method):
    model = lora(tiny_model()) if method == "lora" else tiny_model()
    base = dict(steps=4, batch_size=2, length=32, learning_rate=1e-3)
    scanned, _ = tune.fit(model, EXAMPLES, tune.Options(**base), progress=False)
    unrolled, _ = tune.fit(model, EXAMPLES, tune.Options(unroll=True, **base), progress=False)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * 1e-2 + tolerance("float32"))  # of what Adam moves
    jax.tree.map(close, scanned.params, unrolled.params)


def test_bfloat16_with_float32_masters_trains_the_float32_parameters():
    model = lora(tiny_model())
    options = tune.Options(steps=3, batch_size=2, length=32, learning_rate=1e-6, dtype="bfloat16", schedule="constant")
    tuned, _ = tune.fit(model, EXAMPLES, options, progress=False)
    moved = adapters.split(tuned.params)[0]["layers"]["q"]["a"] - adapters.split(model.params)[0]["layers"]["q"]["a"]
    assert 0 < float(jnp.abs(moved).max()) < 1e-5  # far below bfloat16's spacing at these weights


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    model = lora(tiny_model())
    undisturbed, _ = tune.fit(
        model, EXAMPLES, OPTIONS, eval_examples=EXAMPLES[:3], folder=tmp_path / "a", progress=False
    )
    hits = []

    def interrupt(*args):  # SIGINT arrives during step 5
        hits.append(1)
        if len(hits) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    original = log.JSONL.write
    try:
        log.JSONL.write = lambda self, **row: (original(self, **row), interrupt())
        with pytest.raises(tune.Stopped) as stopped:
            tune.fit(model, EXAMPLES, OPTIONS, eval_examples=EXAMPLES[:3], folder=tmp_path / "b", progress=False)
    finally:
        log.JSONL.write = original
    assert stopped.value.step == 5 and checkpoint.latest(tmp_path / "b" / "checkpoints") == 5
    resumed, _ = tune.fit(model, EXAMPLES, OPTIONS, eval_examples=EXAMPLES[:3], folder=tmp_path / "b", progress=False)
    assert same(resumed, undisturbed)
    steps = [r["step"] for r in log.read(tmp_path / "b" / "log.jsonl") if "loss" in r]
    assert steps == list(range(1, 13))
    again, _ = tune.fit(model, EXAMPLES, OPTIONS, eval_examples=EXAMPLES[:3], folder=tmp_path / "b", progress=False)
    assert same(again, undisturbed)  # a finished run is only read
    other = tune.Options(**OPTIONS.__dict__ | {"learning_rate": 1.0})
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01"):
        tune.fit(model, EXAMPLES, other, folder=tmp_path / "b", progress=False)


SCRIPT = """
import sys, jax, numpy as np
from jaxml import tune
from tests.tune.test_fit import EXAMPLES, OPTIONS, lora
from jaxml.testing import tiny_model
options = tune.Options(**OPTIONS.__dict__ | {"steps": 60})
tuned, _ = tune.fit(lora(tiny_model()), EXAMPLES * 4, options, folder=sys.argv[1], progress=False)
np.savez(sys.argv[1] + "/final.npz", *[np.asarray(a) for a in jax.tree.leaves(tuned.params)])
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_resumes_to_the_same_bits(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    start = lambda name: subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / name)], env=environment)
    assert start("whole").wait() == 0
    kills, rng = 0, np.random.default_rng(0)
    while True:
        process = start("killed")
        seen = lambda: len(log.read(tmp_path / "killed" / "log.jsonl"))
        before = seen()
        # Let it make some progress, then kill it within a few steps.
        while process.poll() is None and (seen() <= before or kills >= 2):
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.1)))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        if code == 0:
            break
        kills += 1
        assert kills < 10
    assert kills >= 1
    with np.load(tmp_path / "whole" / "final.npz") as a, np.load(tmp_path / "killed" / "final.npz") as b:
        assert all((a[k] == b[k]).all() for k in a.files)


def test_a_packed_batch_has_the_loss_of_its_examples_apart():
    model = tiny_model()
    together = data.prepare(EXAMPLES[:4], model.tokenizer, length=64, batch_size=1)
    options = tune.Options(length=64)
    from jaxml.tune.step import batch_loss

    total, count = batch_loss(model.params, {}, together(0), config=model.config, options=options)
    alone = [
        batch_loss(
            model.params,
            {},
            data.prepare([e], model.tokenizer, length=64, batch_size=1)(0),
            config=model.config,
            options=options,
        )
        for e in EXAMPLES[:4]
    ]
    np.testing.assert_allclose(total, sum(a[0] for a in alone), rtol=1e-5)
    assert float(count) == sum(float(a[1]) for a in alone)


def test_bad_options_are_refused():
    for fields, word in (
        (dict(batch_size=0), "batch_size"),
        (dict(schedule="step"), "schedule"),
        (dict(warmup=1), "warmup"),
        (dict(learning_rate=float("nan")), "learning_rate is a finite number, at least 0, got nan"),
        (dict(learning_rate=-1.0), "learning_rate"),
        (dict(weight_decay=float("inf")), "weight_decay"),
        (dict(epochs=0.0), "epochs is a finite number, above 0"),
        (dict(b2=1.0), "b2 is in"),
        (dict(clip=0.0), "clip is above 0"),
        (dict(steps=2.5), "steps is a whole number in 1 … 2147483647, got 2.5"),
        (dict(seed=10**20), "seed is a whole number in 0 … "),
        (dict(save_every=-1), "save_every is a whole number in 0 … 2147483647, got -1"),
    ):
        with pytest.raises(ValueError, match=word):
            tune.Options(**fields)
    with pytest.raises(ValueError, match="context of 128"):
        tune.fit(tiny_model(), EXAMPLES, tune.Options(length=500), progress=False)
    with pytest.raises(ValueError, match="at least one example"):
        tune.fit(tiny_model(), [], tune.Options(length=32), progress=False)


def test_the_loss_plot_is_a_picture(tmp_path):
    rows = [{"step": i, "loss": 3.0 / i} for i in range(1, 30)] + [{"step": 29, "eval_loss": 0.5}]
    path = log.plot_loss(rows, tmp_path / "loss.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


def test_a_log_cut_off_by_a_crash_is_read_up_to_there(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert log.read(path) == [{"step": 1}]


def test_no_recompilation_on_the_second_step():
    model = tiny_model()
    trainable, frozen = adapters.split(lora(model).params)
    step = make_step(model.config, tx := optax.adam(1e-3), tune.Options(length=32))
    batches = data.prepare(EXAMPLES, model.tokenizer, length=32, batch_size=2)
    state = begin(trainable, tx)
    for i in range(3):
        state, _ = step(state, frozen, {k: v[None] for k, v in batches(i).items()})
    assert step._cache_size() == 1 and decoder.num_params(model.params) > 0


# ---- steps that go wrong -----------------------------------------------------------------------------

INFINITE = {"parts": [["boom boom boom", 3e38]]}  # a loss that is not finite; a row of its own


def test_a_step_that_is_not_finite_is_skipped_and_told(tmp_path):
    model = tiny_model()
    options = tune.Options(steps=4, batch_size=1, length=16, learning_rate=1e-2, schedule="constant", warmup=0.0)
    examples = [{"text": "abcdefghijkl"}, INFINITE, {"text": "mnopqrstuvwx"}, {"text": "yzabcdefghij"}]
    tuned, info = tune.fit(model, examples, options, folder=tmp_path, progress=False)
    assert info["skipped"] == 1 and info["rollbacks"] == 0
    assert all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(tuned.params))
    rows = log.read(tmp_path / "log.jsonl")
    (told,) = [row for row in rows if "skipped" in row]
    before = tune.fit(model, examples, options, folder=None, progress=False)[0]
    assert same(tuned, before) and "its loss is nan" in told["skipped"]


def test_a_skipped_step_changes_nothing_but_its_number():
    model = tiny_model()
    options = tune.Options(batch_size=1, length=16)
    tx = optax.adam(1e-2)
    batch = {k: v[None] for k, v in data.prepare([INFINITE], model.tokenizer, length=16, batch_size=1)(0).items()}
    state = begin(jax.tree.map(jnp.copy, model.params), tx)
    after, metrics = make_step(model.config, tx, options)(jax.tree.map(jnp.copy, state), {}, batch)
    assert int(metrics["bad"]) == int(after.guard.bad) == 1 and int(after.step) == 1
    alike = jax.tree.map(lambda a, b: bool((a == b).all()), (after.trainable, after.opt_state), state[:2])
    assert all(jax.tree.leaves(alike))


def test_a_gradient_far_above_the_usual_is_skipped():
    model = tiny_model()
    tx = optax.adam(1e-2)
    batch = {k: v[None] for k, v in data.prepare(EXAMPLES, model.tokenizer, length=32, batch_size=4)(0).items()}
    step = make_step(model.config, tx, tune.Options(batch_size=4, length=32, spike=5.0))

    def bad(norms):
        state = begin(jax.tree.map(jnp.copy, model.params), tx)
        state = state._replace(guard=state.guard._replace(norms=jnp.asarray(norms, jnp.float32)))
        return int(step(state, {}, batch)[1]["bad"])

    norm = float(step(begin(jax.tree.map(jnp.copy, model.params), tx), {}, batch)[1]["grad_norm"])
    few = [norm / 10] * 15 + [np.nan] * 49
    assert bad([norm / 10] * 64) == 1 and bad([norm / 4] * 64) == 0 and bad(few) == 0


def test_after_many_bad_steps_a_run_goes_back_and_on_with_other_data(tmp_path):
    model = tiny_model()
    options = tune.Options(
        steps=6, batch_size=1, length=16, learning_rate=1e-2, save_every=2, patience=2, rollbacks=2, seed=1
    )
    good = [{"text": letter * 12} for letter in "abcdefgh"]
    order = np.random.default_rng(1).permutation(8)  # of the examples; then of the rows, in each epoch
    rows = np.random.default_rng((1, 0)).permutation(8)
    examples = list(good)
    for place in (2, 3):  # the third and the fourth step
        examples[order[rows[place]]] = INFINITE
    _, info = tune.fit(model, examples, options, folder=tmp_path, progress=False)
    assert (info["skipped"], info["rollbacks"]) == (2, 1) and np.isfinite(info["loss"])
    log_rows = log.read(tmp_path / "log.jsonl")
    (back,) = [row for row in log_rows if "rolled_back_to" in row]
    assert back["rolled_back_to"] == 2 and back["step"] == 4
    assert [row["step"] for row in log_rows if "loss" in row] == [1, 2, 3, 4, 3, 4, 5, 6]


def test_a_run_that_only_goes_wrong_says_so(tmp_path):
    options = tune.Options(steps=9, batch_size=1, length=16, patience=2, save_every=1, rollbacks=1)
    with pytest.raises(tune.Diverged, match="no checkpoint to go back to"):
        tune.fit(tiny_model(), [INFINITE], options, progress=False)
    with pytest.raises(tune.Diverged, match="no checkpoint to go back to"):  # none is made of a bad step
        tune.fit(tiny_model(), [INFINITE], options, folder=tmp_path / "bad", progress=False)
    good = [{"text": "a" * 12}]
    place = np.random.default_rng(0).permutation(8)[np.random.default_rng((0, 0)).permutation(8)[0]]
    examples = [INFINITE] * place + good + [INFINITE] * (7 - place)
    with pytest.raises(tune.Diverged, match="after 1 rollbacks"):
        tune.fit(tiny_model(), examples, options, folder=tmp_path / "mostly", progress=False)


def test_nothing_that_is_not_finite_is_called_trained(tmp_path):
    options = tune.Options(steps=2, batch_size=1, length=16)
    with pytest.raises(tune.Diverged, match="each of 2 steps was skipped"):
        tune.fit(tiny_model(), [INFINITE], options, folder=tmp_path / "skipped", progress=False)
    tx = optax.scale(float("nan"))
    with pytest.raises(tune.Diverged, match="not finite after step 1"):
        one = dataclasses.replace(options, steps=1)
        tune.fit(tiny_model(), EXAMPLES, one, tx=tx, folder=tmp_path / "nan", progress=False)
    assert not [path for run in tmp_path.iterdir() for path in (run / "checkpoints").glob("[0-9]*")]


def test_a_streak_of_bad_steps_begins_anew_after_a_rollback(tmp_path):
    options = tune.Options(steps=5, batch_size=1, length=16, save_every=1, patience=3, rollbacks=2, seed=1)
    order, rows = np.random.default_rng(1).permutation(8), np.random.default_rng((1, 0)).permutation(8)
    examples = [{"text": letter * 12} for letter in "abcdefgh"]
    for place in (1, 2, 3, 4, 5):  # three bad steps, a rollback, two more
        examples[order[rows[place]]] = INFINITE
    _, info = tune.fit(tiny_model(), examples, options, folder=tmp_path, progress=False)
    assert (info["skipped"], info["rollbacks"]) == (5, 1)


@pytest.mark.parametrize("changed", ["response", "order"])
def test_a_run_goes_on_with_its_own_data_only(changed, tmp_path):
    options = tune.Options(steps=2, batch_size=1, length=32)
    tune.fit(tiny_model(), EXAMPLES, options, folder=tmp_path, progress=False)
    others = EXAMPLES[::-1] if changed == "order" else [*EXAMPLES[:-1], {"prompt": "hi ", "response": "no"}]
    with pytest.raises(ValueError, match=r"other options or data \(tokens_digest was"):
        tune.fit(tiny_model(), others, options, folder=tmp_path, progress=False)


def test_a_folder_has_one_run_at_a_time(tmp_path):
    options = tune.Options(steps=1, batch_size=1, length=32)
    with alone(tmp_path), pytest.raises(RuntimeError, match="another process is at work in this folder"):
        tune.fit(tiny_model(), EXAMPLES, options, folder=tmp_path, progress=False)
    tune.fit(tiny_model(), EXAMPLES, options, folder=tmp_path, progress=False)
    (tmp_path / "run.json").write_text('{"opt')
    with pytest.raises(ValueError, match=r"run.json: not JSON .* what the run was about: choose another folder"):
        tune.fit(tiny_model(), EXAMPLES, options, folder=tmp_path, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="a run's folder is one that can be made and written"):
        tune.fit(tiny_model(), EXAMPLES, options, folder=tmp_path / "file", progress=False)


def test_a_run_is_about_what_json_makes_of_it(tmp_path):
    options = tune.Options(steps=1, batch_size=1, length=32, learning_rate=np.float32(1e-3))
    about = {"targets": ("q", "v"), 3: np.int64(4)}
    for _ in range(2):
        tune.fit(tiny_model(), EXAMPLES, options, folder=tmp_path, progress=False, about=about)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"), alone(tmp_path):
        pass


def test_a_signal_while_the_last_step_is_saved_loses_nothing(tmp_path, monkeypatch):
    waited = Run.wait

    def wait(self):
        os.kill(os.getpid(), signal.SIGINT)
        waited(self)

    options = tune.Options(steps=2, batch_size=1, length=32)
    monkeypatch.setattr(Run, "wait", wait)
    with pytest.raises(tune.Stopped, match="SIGINT after step 2"):
        tune.fit(tiny_model(), EXAMPLES, options, folder=tmp_path, progress=False)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "checkpoints") == 2
    _, info = tune.fit(tiny_model(), EXAMPLES, options, folder=tmp_path, progress=False)
    assert info["steps"] == 2 and info["loss"] is None  # all is done
