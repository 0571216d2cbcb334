"""Plans for TPU slices that are not there, and what is read from a program's text."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml import parallel, quant, tune
from jaxml.cli.main import main
from jaxml.lm import published
from jaxml.parallel import flops, topology
from jaxml.parallel.program import Program, size_of
from jaxml.testing import tiny_config
from jaxml.tune import adapters, plan

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install jaxml[tpu]"
)
OPTIONS = tune.Options(steps=10, length=128, dtype="bfloat16")
CONFIG = tiny_config(
    width=256, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=512, max_length=512
)


def test_products_are_counted_as_often_as_loops_turn():
    x = jnp.ones((64, 32))
    product = 2 * 64 * 32 * 32

    def f(x, w):
        turn = lambda x, _: (jnp.tanh(x @ w), None)
        x, _ = jax.lax.scan(turn, x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert flops.of(f, x, jnp.ones((32, 32))) == 7 * product
    codes = quant.nf4.quantize(jnp.ones((32, 64)))
    assert flops.of(lambda x: codes.matmul(x), x) == 2 * 64 * 32 * 64
    on = parallel.mesh(data=8)
    part = jax.shard_map(lambda x, w: x @ w, mesh=on, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops.of(part, x, jnp.ones((32, 32))) == product


def test_sizes_of_arrays_as_a_program_writes_them():
    assert [size_of(*a) for a in (("bf16", "8,128"), ("f32", ""), ("s4", "16"), ("pred", "3"), ("token", ""))] == [
        2048, 4, 8, 3, 0,
    ]  # fmt: skip


def test_collectives_in_loops_are_counted_as_often_as_they_turn():
    on = parallel.mesh(fsdp=8)
    spread, whole = NamedSharding(on, P(None, "fsdp")), NamedSharding(on, P())
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(on, P(None, "fsdp")))

    def f(x, weights):
        turn = lambda x, w: (jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None)
        return jax.lax.scan(turn, x, weights)[0]

    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=whole)
    program = Program(jax.jit(f).lower(x, weights).compile().as_text())
    (gather,) = program.collectives()
    assert (gather.kind, gather.times, gather.depth, gather.bytes) == ("all-gather", 5, 1, 64 * 64 * 4)
    assert program.bytes_moved() > 5 * 64 * 64 * 4 and spread is not None


@pytest.mark.parametrize(
    "name, said",
    [("v3:8x8", "of v4, v5e"), ("v5e:3x3", "slices of 1x1, 2x2"), ("v5e", "slices of")],
)
def test_slices_that_there_are_none_of(name, said):
    with pytest.raises(ValueError, match=said):
        topology.parse(name)


def test_the_published_numbers_are_those_models():
    def count(name):
        leaves = jax.tree.leaves(plan.shapes(published.CONFIGS[name]))
        return sum(leaf.size for leaf in leaves)

    # As transformers counts them.
    assert count("llama-3.1-8b") == 8_030_261_248 and count("llama-3.1-70b") == 70_553_706_496
    assert count("llama-3.2-1b") == 1_235_814_400 and count("qwen3-32b") == 32_762_123_264


@needs_libtpu
@pytest.mark.parametrize("mesh", ["fsdp=-1", "tensor=2,fsdp=2", "context=2,data=2"])
def test_a_step_is_planned_for_a_slice(mesh):
    params = plan.shapes(CONFIG)
    made = plan.plan(CONFIG, params, OPTIONS, optax.adam(1e-3), "v5e:2x2", mesh)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    share = {"fsdp=-1": 4, "tensor=2,fsdp=2": 4, "context=2,data=2": 1}[mesh]
    assert made.devices == 4 and made.fits and made.limit == int(15.75 * 2**30)
    assert made.weights == pytest.approx(4 * numbers / share, rel=0.02)  # what is trained is float32
    assert made.states == pytest.approx(2 * made.weights, rel=0.02)
    assert made.total == made.weights + made.states + made.temporary and made.activations < made.temporary
    assert made.flops > 6 * numbers * made.tokens and made.bytes_moved > made.weights
    kinds = set(made.collectives)
    assert kinds & {"all-gather", "reduce-scatter", "collective-permute", "all-reduce"}
    assert plan.held(params, OPTIONS, optax.adam(1e-3), "v5e:2x2", mesh) == pytest.approx(
        made.weights + made.states, rel=0.01
    )


@needs_libtpu
@pytest.mark.slow
def test_codes_under_adapters_are_multiplied_by_the_kernel_on_every_chip():
    params = jax.eval_shape(lambda p: quant.quantize_params(p, "nf4"), plan.shapes(CONFIG))
    params = jax.eval_shape(lambda p: adapters.attach(p, jax.random.key(0), rank=4), params)
    made = plan.plan(CONFIG, params, OPTIONS, optax.adam(1e-3), "v5e:2x2")
    assert made.fits and made.weights < 4 * 512 * 256


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_it_would_need():
    config = published.CONFIGS["llama-3.2-1b"]
    options = tune.Options(steps=10, length=2048, dtype="bfloat16", remat=True)
    params, tx = plan.shapes(config), optax.adam(1e-3)
    assert plan.held(params, options, tx, "v5e:1x1") < 15.75 * 2**30
    made = plan.plan(config, params, options, tx, "v5e:1x1", rows=4)
    assert not made.fits and made.total > made.limit and made.collectives is None and made.bytes_moved is None


def test_the_smallest_slice_is_looked_for_from_below():
    tried = []

    def make(name):
        tried.append(name)
        fits = name == "v5e:4x4"
        numbers = dict(weights=1, states=1, temporary=1, activations=0, total=1 if fits else 9, limit=5, flops=1.0)
        return plan.Plan(name, "fsdp=1", 1, 1, **numbers, bytes_moved=None, collectives=None, seconds=0.0)

    held = lambda name: 100 * 2**30 if name == "v5e:1x1" else 0
    assert [p.fits for p in plan.smallest(make, held, "v5e")] == [False, False, True]
    assert tried == ["v5e:2x2", "v5e:2x4", "v5e:4x4"]


@needs_libtpu
def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    how = ["plan", str(tmp_path), "--topology", "v5e:2x2", "--method", "lora", "--length", "128"]
    assert main([*how, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fits"] and made["topology"] == "v5e:2x2" and made["mesh"] == "fsdp=4"
    assert main(how) == 0
    said = capsys.readouterr().out
    assert "in all" in said and "15.75 GiB" in said and "all-gather" in said


@pytest.mark.parametrize(
    "more, said",
    [
        (["--topology", "v9"], "--topology is of v4"),
        (["--topology", "v5e:2x2", "--batch-size", "3"], "Leave --batch-size out"),
        (["--topology", "v5e:2x2", "--rows", "0"], "at least 1"),
        (["--topology", "v5e:7x7"], "comes in slices"),
        (["--topology", "v5e:2x2", "--method", "full", "--rank", "3"], "no option of --method full"),
    ],
)
def test_wrong_plans_are_sentences(more, said, capsys):
    assert main(["plan", "llama-3.1-8b", *more]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_nobody_knows_is_a_sentence(capsys):
    assert main(["plan", "llama-9", "--topology", "v5e:2x2"]) == 2
    assert "published are llama-3.1-8b" in capsys.readouterr().err
