"""Training on 8 simulated devices is training on one, to the rounding of sums; and each holds its part."""

import math

import jax
import numpy as np
import pytest

from jaxml import lm, log, optim, parallel, quant, tune
from jaxml.parallel.program import Program
from jaxml.testing import tiny_model
from jaxml.tune import adapters, data
from jaxml.tune.place import begun, for_training
from jaxml.tune.step import make_step, optimizer

EXAMPLES = [{"prompt": f"say {i} ", "response": "abcdefgh"[i % 8 :] + " x" * (i % 5)} for i in range(64)]
MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=4,fsdp=2",
    "context=4,data=2",
    "data=2,fsdp=2,tensor=2",
    "context=2,fsdp=2,tensor=2",
)
METHODS = ("full", "lora", "qlora", "galore", "eight_bit")
OPTIONS = dict(steps=20, batch_size=8, length=32, learning_rate=1e-3, warmup=0.1)


def start(method):
    """(model, what makes its optimizer)."""
    model = tiny_model(width=64, num_heads=8, num_kv_heads=8, hidden_dim=128)
    params = quant.quantize_params(model.params, "nf4") if method == "qlora" else model.params
    if method in ("lora", "qlora"):
        params = adapters.attach(params, jax.random.key(1), rank=4)
    around = {"galore": lambda a: optim.galore(a, rank=8, gap=5), "eight_bit": optim.eight_bit}
    options = tune.Options(**OPTIONS)
    return model.replace(params=params), lambda steps: optimizer(options, steps, around.get(method, lambda a: a))


def trained(method, mesh, folder, **options):
    """(losses, what was trained) on a mesh."""
    model, tx = start(method)
    on = None if mesh is None else parallel.parse(mesh)
    options = tune.Options(**OPTIONS | options)
    tuned, _ = tune.fit(model, EXAMPLES, options, tx=tx, mesh=on, folder=folder, progress=False)
    losses = [row["loss"] for row in log.read(folder / "log.jsonl") if "loss" in row]
    return np.array(losses), jax.tree.map(np.asarray, adapters.split(tuned.params)[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device comes to, once a method."""
    done = {}

    def of(method):
        if method not in done:
            done[method] = trained(method, None, tmp_path_factory.mktemp(method))
        return done[method]

    return of


def check(method, got, wanted):
    apart = np.concatenate([abs(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (got[1], wanted[1])))])
    if method != "eight_bit":
        np.testing.assert_allclose(got[0], wanted[0], atol=1e-5)
        assert apart.max() < 1e-5
        return
    # A moment next to the border between two codes falls on either side by the last bit of a sum, on one device too
    # where rows are summed in another order; Adam then steps otherwise at that place, by less than a learning rate.
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-4)
    assert (apart > 1e-5).mean() < 0.02 and apart.max() < 2 * OPTIONS["learning_rate"]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_mesh_trains_as_one_device_does(method, mesh, alone, tmp_path):
    check(method, trained(method, mesh, tmp_path), alone(method))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", ["lora", "galore", "eight_bit"])
def test_a_mesh_trains_as_one_device_does_by_the_other_methods(method, mesh, alone, tmp_path):
    check(method, trained(method, mesh, tmp_path), alone(method))


@pytest.mark.parametrize("mesh", ["data=8", "data=2,tensor=2,context=2", "data=4,fsdp=2"])
def test_accumulated_batches_on_a_mesh_are_those_of_one_device(mesh, tmp_path):
    one, many = (trained("full", on, tmp_path / str(on), accumulate=2) for on in (None, mesh))
    check("full", many, one)


def test_dropout_and_anchors_are_those_of_one_device(tmp_path):
    model = tiny_model(width=64, num_heads=8, num_kv_heads=4)
    params = adapters.attach(model.params, jax.random.key(1), rank=4, dropout=0.2)
    options = tune.Options(**OPTIONS | dict(steps=3, accumulate=2, batch_size=7, anchor_rows=1))
    anchors = [{"text": "the fox"}, {"text": "a dog"}]
    one, many = (
        tune.fit(model.replace(params=params), EXAMPLES, options, anchors=anchors, mesh=on, progress=False)
        for on in (None, parallel.mesh(data=2, fsdp=4))
    )
    assert abs(one[1]["loss"] - many[1]["loss"]) < 1e-5
    trees = [jax.tree.leaves(adapters.split(run[0].params)[0]) for run in (one, many)]
    assert max(float(abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(*trees)) < 1e-5


def test_a_run_goes_on_with_another_mesh(tmp_path):
    model, tx = start("full")
    options = tune.Options(**OPTIONS | dict(steps=6, save_every=3))
    wanted, _ = tune.fit(model, EXAMPLES, options, tx=tx, folder=tmp_path / "one", progress=False)

    class Enough(Exception):
        pass

    original = log.JSONL.write

    def write(self, **row):
        original(self, **row)
        if row["step"] == 5:
            raise Enough

    log.JSONL.write = write
    try:
        with pytest.raises(Enough):
            tune.fit(
                model, EXAMPLES, options, tx=tx, folder=tmp_path / "two", progress=False, mesh=parallel.mesh(fsdp=8)
            )
    finally:
        log.JSONL.write = original
    for on in (parallel.mesh(tensor=2, data=4),):
        got, _ = tune.fit(model, EXAMPLES, options, tx=tx, folder=tmp_path / "two", progress=False, mesh=on)
    apart = jax.tree.map(lambda a, b: float(abs(np.asarray(a) - np.asarray(b)).max()), got.params, wanted.params)
    assert max(jax.tree.leaves(apart)) < 1e-5
    rows = [row["step"] for row in log.read(tmp_path / "two" / "log.jsonl")]
    assert rows == list(range(1, 7))


def test_a_model_from_a_mesh_lies_on_it_whole_and_generates():
    model, tx = start("qlora")
    options, on = tune.Options(**OPTIONS | dict(steps=1)), parallel.mesh(fsdp=8)
    tuned, _ = tune.fit(model, EXAMPLES, options, tx=tx, mesh=on, progress=False)
    assert all(a.sharding.mesh.size == 8 for a in jax.tree.leaves(tuned.params))
    one, _ = tune.fit(model, EXAMPLES, options, tx=tx, progress=False)
    with jax.set_mesh(on):
        assert lm.generate(tuned, ["say 3 "] * 8, max_new_tokens=4) == lm.generate(
            one, ["say 3 "] * 8, max_new_tokens=4
        )


# ---- the compiled program ---------------------------------------------------------------------------


def compiled(method, mesh, **options):
    model, tx = start(method)
    o, on = tune.Options(**OPTIONS | options), None if mesh is None else parallel.parse(mesh)
    tx = tx(20)
    state, frozen, shardings, place = begun(*for_training(*adapters.split(model.params), o), tx, on)
    batches = data.prepare(EXAMPLES, model.tokenizer, length=32, batch_size=8)
    batch = {k: np.stack([v] * o.accumulate) for k, v in batches(0).items()}
    step = make_step(model.config, tx, o, shardings)
    if on is None:
        return step.lower(state, frozen, batch).compile()
    with jax.set_mesh(on):
        return step.lower(state, frozen, place(batch)).compile()


def gathered(program):
    """All-gathers of floating numbers or codes, by depth of loops."""
    return [c for c in program.collectives() if c.kind == "all-gather" and not c.shape.startswith("s32")]


@pytest.mark.parametrize("mesh", ["data=8", "tensor=8", "tensor=4,data=2", "context=8"])
def test_no_weight_is_gathered_but_over_fsdp(mesh):
    assert gathered(Program(compiled("full", mesh).as_text())) == []


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_over_fsdp_one_layer_at_a_time_is_gathered_for_each_pass(method):
    model, _ = start(method)
    found = gathered(Program(compiled(method, "fsdp=8").as_text()))
    largest = 4 * math.prod(model.params["layers"]["gate"].shape[1:])
    outside = [c for c in found if c.depth == 0]
    assert all(c.bytes == 4 * model.params["embed"].size for c in outside) and len(outside) == 1  # the head's
    inside = [c for c in found if c.depth]
    assert all(c.bytes <= largest for c in inside)  # never a stack of layers
    forward, backward = (sum(("transpose" in c.name) == back for c in inside) for back in (False, True))
    assert forward == backward
    if method == "qlora":  # codes, not what they stand for
        assert max(c.bytes for c in inside) * 8 == largest and any(c.shape.startswith("u8") for c in inside)


@pytest.mark.parametrize("mesh", ["data=8", "data=4,fsdp=2"])
def test_accumulated_gradients_are_summed_over_data_once(mesh):
    program = Program(compiled("full", mesh, accumulate=4).as_text())
    sums = [c for c in program.collectives() if c.kind == "all-reduce" and c.bytes > 4 * 64]
    weights = sum(math.prod(a.shape) for a in jax.tree.leaves(start("full")[0].params)) * 4
    once = sum(c.bytes for c in sums if c.depth == 0)
    if mesh == "data=8":
        assert all(c.depth == 0 for c in sums) and weights <= once < 1.01 * weights
    else:
        assert once >= weights // 2  # of the shards that each device has


def test_what_a_device_holds_falls_as_the_mesh_grows():
    held = lambda method, mesh: compiled(method, mesh).memory_analysis().argument_size_in_bytes
    for method in ("full", "qlora", "galore", "eight_bit"):
        one, spread = held(method, None), held(method, "fsdp=8")
        assert spread < one / (4 if method in ("full", "qlora") else 3)
    assert held("full", "tensor=8") < held("full", None) / 4
    assert held("full", "data=8") > 0.9 * held("full", None) - 8 * 8 * 32 * 4 * 5


@pytest.mark.parametrize(
    "mesh, options, said",
    [
        (dict(data=8), dict(batch_size=4), "a multiple of data · fsdp · expert = 8 of the mesh, got 4"),
        (dict(context=8), dict(length=36), "length is a multiple of context = 8, got 36"),
    ],
)
def test_batches_that_do_not_divide_are_refused(mesh, options, said):
    model, _ = start("full")
    with pytest.raises(ValueError, match=said):
        tune.fit(model, EXAMPLES, tune.Options(**OPTIONS | options), mesh=parallel.mesh(**mesh), progress=False)


def test_a_mesh_of_other_axes_is_refused():
    model, _ = start("full")
    on = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="none called data"):
        tune.fit(model, EXAMPLES, tune.Options(**OPTIONS), mesh=on, progress=False)
