"""Each way of adapting: where it begins, what it computes, what it trains."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxml import paths, quant, weights
from jaxml.lm import decoder
from jaxml.testing import tiny_model, tolerance
from jaxml.tune import Options, adapters, fit
from jaxml.tune.adapters import starts
from tests.tune.test_peft import moved, untied

needs_oracle = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the extra 'oracle' is not installed"
)
TOKENS = np.random.default_rng(0).integers(3, 64, (3, 9)).astype(np.int32)
W = jax.random.normal(jax.random.key(3), (24, 16))
KEY = jax.random.key(0)

EXACT = {
    "lora": dict(),
    "rslora": dict(rslora=True, start="gaussian"),
    "dora": dict(method="dora"),
    "vera": dict(method="vera", rank=16),
    "adalora": dict(method="adalora"),
    "ia3": dict(method="ia3"),
    "pissa": dict(start="pissa"),
    "pissa, fast": dict(start="pissa_niter_3"),
    "olora": dict(start="olora"),
    "orthogonal": dict(start="orthogonal"),
    "embedding": dict(targets=["q", "embed"]),
    "dora, embedding": dict(method="dora", targets=["q", "embed"], alpha=4),
    "head": dict(targets=["up", "head"]),
    "dora, head": dict(method="dora", targets=["up", "head"]),
    "ranks": dict(ranks={"q": 4, "layers/0/up": 2}, alphas={"layers/1/*": 3}),
    "whole": dict(targets=["q"], whole=["norm", "*_norm", "embed"]),
    "lora-fa": dict(freeze_a=True),
}
QUANTISED = {
    "qlora": dict(quantize="nf4"),
    "qlora, int8": dict(quantize="int8"),
    "qdora": dict(method="dora", quantize="nf4"),
    "loftq": dict(start="loftq", quantize="nf4"),
    "qpissa": dict(start="pissa", quantize="nf4"),
    "qvera": dict(method="vera", rank=16, quantize="nf4"),
    "qia3": dict(method="ia3", quantize="fp4"),
}


def other(target="q"):
    """An adapter of another model."""
    return adapters.attach({"layers": {name: jnp.ones((2, 64, 64)) for name in "qv"}}, KEY, targets=[target])


def close(a, b, rtol=2e-5):
    np.testing.assert_allclose(a, b, atol=rtol * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", EXACT | QUANTISED)
def test_it_begins_with_the_same_function_and_merges_into_what_it_becomes(name):
    options = (EXACT | QUANTISED)[name]
    model = tiny_model(tied_embeddings="head" not in options.get("targets", ()))
    if "head" in model.params:
        model.params["head"] = model.params["head"] * 25
    run = jax.jit(lambda params: decoder.apply(params, model.config, TOKENS))
    begun = adapters.attach(model.params, jax.random.key(0), **options)
    before = run(model.params)
    if name in EXACT:
        close(run(begun), before)
    params = moved(begun)
    after = run(params)
    assert float(jnp.abs(after - before).max()) > 1e-2
    close(run(decoder.unstack(params)), after)
    merged = adapters.merge(params)
    assert all(isinstance(w, jax.Array) for w in paths.named(merged).values())
    close(run(merged), after)
    apart = adapters.unmerge(merged, params)
    close(run(apart), after, 1e-4)
    for path, w in adapters.tree.of(params).items():
        if not isinstance(w, adapters.Whole):
            close(weights.dense(adapters.tree.of(apart)[path].base), weights.dense(w.base), 1e-4)
    before, after = paths.named(adapters.detach(params)), paths.named(merged)
    for path, delta in adapters.delta(params).items():
        close(weights.dense(before[path]) + delta, after[path], 1e-4)
    trainable, frozen = adapters.split(params)
    again = adapters.combine(trainable, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    grads = jax.jit(jax.grad(lambda t: jnp.sum(run(adapters.combine(t, frozen)) ** 2)))(trainable)
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    quantised = jax.tree.leaves(params, is_leaf=lambda w: isinstance(w, quant.QArray))
    kept = adapters.merge(params, requantize=True)
    assert sum(isinstance(w, quant.QArray) for w in quantised) == sum(
        isinstance(w, quant.QArray) for w in paths.named(kept).values()
    )


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_model_comes_apart_where_nothing_but_the_adapters_is_left(method):
    model = tiny_model()
    params = moved(adapters.attach(model.params, KEY, method=method))
    alone = jax.tree.map(
        lambda w: dataclasses.replace(w, base=None) if adapters.tree.is_adapter(w) else w,
        params,
        is_leaf=weights.is_node,
    )
    assert jax.tree.structure(alone) != jax.tree.structure(params)
    apart = adapters.unmerge(adapters.merge(params), alone)
    for path, w in adapters.tree.of(params).items():
        close(adapters.tree.of(apart)[path].base, w.base, 1e-4)


@pytest.mark.parametrize(
    "method, field, factor, words",
    [
        ("dora", "b", 1e3, "layers/q has the magnitude 0 or has grown"),
        ("dora", "magnitude", 0.0, "layers/q has the magnitude 0 or has grown"),
        ("ia3", "outer", 0.0, "a factor of layers/k is 0"),
    ],
)
def test_what_merging_loses_is_not_made_up(method, field, factor, words):
    params = moved(adapters.attach(tiny_model().params, KEY, method=method, targets=["q" if field != "outer" else "k"]))
    change = lambda w: dataclasses.replace(w, **{field: getattr(w, field) * factor})
    params = paths.replaced(params, {path: change(w) for path, w in adapters.tree.of(params).items()})
    with pytest.raises(ValueError, match=words):
        adapters.unmerge(adapters.merge(params), params)


def test_ranks_of_adalora_by_layer_stay_what_they_are():
    model = tiny_model()
    params = adapters.attach(model.params, KEY, method="adalora", rank=6, ranks={"layers/0/q": 2}, targets=["q"])
    trainable, frozen = adapters.split(params)
    tx = adapters.adalora.optimizer(optax.adam(1e-2), target_rank=3, steps=8, begin=1, end=2)

    @jax.jit
    def step(trainable, state):
        loss = lambda t: jnp.mean(decoder.apply(adapters.combine(t, frozen), model.config, TOKENS) ** 2)
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable)
    for i in range(8):
        trainable, state = step(trainable, state)
        e = trainable["layers"]["q"]["diagonal"]
        assert int((e[0] != 0).sum()) <= 2 and (i or int((e != 0).sum()) == 8)
    assert int((e != 0).sum()) == 6


def test_doras_norms_are_those_of_the_whole_matrix_and_constants_to_derivatives():
    params = moved(adapters.attach({"w": W}, jax.random.key(0), method="dora", rank=3, targets=["w"]))
    node = params["w"]
    x = jax.random.normal(jax.random.key(1), (5, 24))

    def definition(a, b, m):
        v = W + node.scale * a @ b
        return x @ (v / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0, keepdims=True)) * m[None])

    ours = lambda a, b, m: weights.dot(x, dataclasses.replace(node, a=a, b=b, magnitude=m))
    args = (node.a, node.b, node.magnitude)
    close(ours(*args), definition(*args))
    loss = lambda f: jax.grad(lambda args: jnp.sum(jnp.sin(f(*args))))(args)
    jax.tree.map(close, loss(ours), loss(definition))


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora", "ia3"])
def test_a_node_multiplies_from_both_sides_as_its_matrix_does(method):
    node = moved(adapters.attach({"layers": {"down": W}}, jax.random.key(0), method=method, rank=3, targets=["down"]))
    node, x = node["layers"]["down"], jax.random.normal(jax.random.key(1), (2, 5, 24))
    close(weights.dot(x, node), x @ node.dense())
    y = jax.random.normal(jax.random.key(2), (5, 16))
    close(weights.einsum("TD,VD->TV", y, node), y @ node.dense().T)
    close(weights.take(node, jnp.array([3, 1])), node.dense()[jnp.array([3, 1])])
    half = node.astype(jnp.bfloat16)
    assert weights.dot(x.astype(jnp.bfloat16), half).dtype == jnp.bfloat16


def test_pissa_and_olora_take_the_largest_part_and_leave_the_rest():
    io = W
    for start in ("pissa", "pissa_niter_8", "olora"):
        node = adapters.attach({"w": W}, jax.random.key(0), rank=4, alpha=6, start=start, targets=["w"])["w"]
        close(node.dense(), io)
        if start != "olora":
            largest = jnp.linalg.svd(io)[1][4]
            assert float(jnp.linalg.norm(node.base, 2)) == pytest.approx(float(largest), rel=2e-2)


def test_loftq_is_nearer_to_the_weights_than_quantising_them():
    error = lambda node: float(jnp.linalg.norm(node.dense() - W))
    w = {"w": jax.random.normal(jax.random.key(0), (128, 96)) * jnp.linspace(0.1, 2, 96)[None]}
    error = lambda node: float(jnp.linalg.norm(node.dense() - w["w"]))
    attach = lambda **o: adapters.attach(w, jax.random.key(0), rank=16, targets=["w"], quantize="nf4", **o)["w"]
    plain, one, five = error(attach()), error(attach(start="loftq")), error(attach(start="loftq_5"))
    assert five < one < 0.9 * plain


def test_dropout_drops_inputs_of_a_and_only_with_a_key():
    w = {"layers": {"up": W}}
    params = moved(adapters.attach(w, jax.random.key(0), rank=4, dropout=0.5, targets=["up"]))
    x = jax.random.normal(jax.random.key(1), (64, 24))
    node = params["layers"]["up"]
    close(weights.dot(x, node), x @ node.dense())
    keyed = adapters.with_key(params, jax.random.key(2))["layers"]["up"]
    dropped = weights.dot(x, keyed) - x @ W
    kept = jax.random.bernoulli(keyed.key, 0.5, x.shape)
    close(dropped, node.scale * (2 * kept * x) @ node.a @ node.b, 1e-4)
    other = adapters.with_key(params, jax.random.key(3))["layers"]["up"]
    assert float(jnp.abs(weights.dot(x, other) - weights.dot(x, keyed)).max()) > 0.1
    many = [weights.dot(x, adapters.with_key(params, jax.random.key(i))["layers"]["up"]) for i in range(300)]
    np.testing.assert_allclose(jnp.mean(jnp.stack(many), 0), weights.dot(x, node), atol=0.5)
    dora = moved(adapters.attach(w, jax.random.key(0), method="dora", rank=4, dropout=0.5, targets=["up"]))
    gain = dora["layers"]["up"].gain()[None]
    keyed = adapters.with_key(dora, jax.random.key(2))["layers"]["up"]
    low = jnp.where(jax.random.bernoulli(keyed.key, 0.5, x.shape), 2 * x, 0)
    expected = x @ W + (gain - 1) * (low @ W) + gain * (keyed.scale * low @ keyed.a @ keyed.b)
    close(weights.dot(x, keyed), expected, 1e-4)


def test_a_run_with_dropout_resumes_to_the_same_bits_and_layers_drop_differently(tmp_path):
    model = tiny_model()
    params = adapters.attach(model.params, jax.random.key(0), rank=4, dropout=0.3)
    keyed = adapters.with_key(params, jax.random.key(1))["layers"]["q"].key
    assert keyed.shape == (2,) and keyed[0] != keyed[1]
    examples = [{"prompt": "ab ", "response": "cd"}] * 4
    options = Options(steps=3, batch_size=2, length=16, save_every=1)
    run = lambda folder: fit(model.replace(params=params), examples, options, folder=folder, progress=False)[0].params
    whole = run(None)
    jax.tree.map(np.testing.assert_array_equal, whole, run(tmp_path / "a"))
    jax.tree.map(np.testing.assert_array_equal, whole, run(tmp_path / "a"))


@pytest.mark.parametrize(
    "options",
    [
        dict(quantize="nf4"),
        pytest.param(dict(method="dora", quantize="nf4"), marks=pytest.mark.slow),
        dict(targets=["q", "head"]),
        pytest.param(dict(method="ia3"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_trains_any_of_them(options):
    model = tiny_model(tied_embeddings=False)
    params = adapters.attach(model.params, jax.random.key(0), **options)
    examples = [{"prompt": "ab ", "response": "cd"}] * 4
    how = Options(steps=30, batch_size=2, length=16, learning_rate=5e-2, dtype="bfloat16", unroll=True, remat=True)
    before = adapters.split(params)[1]
    tuned, info = fit(model.replace(params=params), examples, how, progress=False)
    first = fit(model.replace(params=params), examples, dataclasses.replace(how, steps=1), progress=False)[1]["loss"]
    assert info["loss"] < (0.98 if options.get("method") == "ia3" else 0.9) * first
    jax.tree.map(np.testing.assert_array_equal, adapters.split(tuned.params)[1], before)


@pytest.mark.slow
def test_many_adapters_serve_one_batch_row_by_row_without_compiling_again():
    model = tiny_model(tied_embeddings=False)
    trees = [
        moved(adapters.attach(model.params, jax.random.key(i), rank=r, targets=t), seed=i)
        for i, (r, t) in enumerate([(4, ["q", "head"]), (2, ["q", "up"]), (3, ["q", "embed"])])
    ]
    stacked = adapters.stack(trees)
    run = jax.jit(lambda params: decoder.apply(params, model.config, TOKENS))
    for ids in ([2, 0, 1], [1, 1, -1]):
        got = run(adapters.select(stacked, jnp.array(ids)))
        for row, i in enumerate(ids):
            alone = decoder.apply(model.params if i < 0 else trees[i], model.config, TOKENS[row : row + 1])
            close(got[row], alone[0])
    assert run._cache_size() == 1
    close(run(adapters.take(stacked, 1)), run(trees[1]))
    one_token = adapters.select(stacked, jnp.array([2, -1, 1]))
    got = decoder.apply(one_token, model.config, TOKENS[:, :1])
    for row, tree in enumerate((trees[2], model.params, trees[1])):
        close(got[row], decoder.apply(tree, model.config, TOKENS[row : row + 1, :1])[0])
    unrolled = adapters.select(stacked, jnp.array([2, 0, 1]))
    close(run(decoder.unstack(unrolled)), run(unrolled))


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda m, p: adapters.stack([]), "at least one"),
        (lambda m, p: adapters.stack([adapters.attach(m.params, jax.random.key(0), method="ia3")]), "are LoRAs"),
        (lambda m, p: adapters.select(m.params, [0]), "adapters.stack"),
        (lambda m, p: adapters.take(adapters.stack([p]), 1), "0 … 0, got 1"),
        (lambda m, p: decoder.apply(adapters.stack([p]), m.config, TOKENS), "adapters.select"),
        (lambda m, p: decoder.apply(adapters.select(adapters.stack([p]), [0]), m.config, TOKENS), "batch's 3 rows"),
        (lambda m, p: adapters.merge(adapters.stack([p])), "no one matrix"),
        (lambda m, p: adapters.attach(p, jax.random.key(0)), "has an adapter"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), method="loha"), "method is one of"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), start="svd"), "start is one of"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), start="loftq"), "got no format"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), start="orthogonal", rank=3), "even rank"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), ranks={"zz": 3}), "zz"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), whole=["zz"]), "zz"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), dropout=1.0), "dropout is in"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), quantize="nf3"), "one of nf4"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), start={}), "begins with directions"),
        (lambda m, p: adapters.attach(m.params, jax.random.key(0), method="ia3", targets=["embed"]), "is a table"),
        (lambda m, p: adapters.lora_fa(optax.sgd(1.0), p), "A is frozen"),
        (lambda m, p: adapters.lora_fa(optax.sgd(1.0), m.params), "got none"),
        (lambda m, p: adapters.adalora.optimizer(optax.sgd(1.0), target_rank=2, steps=4, begin=4), "below steps"),
        (lambda m, p: adapters.adalora.optimizer(optax.sgd(1.0), target_rank=2, steps=4).init(p), "got none"),
        (lambda m, p: adapters.mix([p], [1.0], "sum"), "method is one of"),
        (lambda m, p: adapters.mix([p], [1.0, 2.0]), "one factor for each"),
        (lambda m, p: adapters.mix([p], [1.0], "ties"), "takes a density"),
        (lambda m, p: adapters.mix([p], [1.0], "dare_ties", density=0.5), "takes a key"),
        (lambda m, p: adapters.mix([p], [1.0], "linear", density=0.5), "takes no density, got 0.5"),
        (lambda m, p: adapters.mix([p], [1.0], "ties", density=0.5, rank=3), "takes no rank, got 3"),
        (lambda m, p: adapters.mix([p], [float("nan")]), "factors are finite, got nan"),
        (lambda m, p: adapters.mix([p, other()], [1.0, 1.0]), r"layers/q is of the shapes \[\(2, 32, 32\), \(2, 64"),
        (lambda m, p: adapters.stack([p, other()]), "of one model, layers/q"),
        (lambda m, p: adapters.take(p, 0), "got one without stacks"),
        (
            lambda m, p: adapters.combine(adapters.split(other("v"))[0], adapters.split(p)[1]),
            "layers/q is trained in a",
        ),
        (lambda m, p: adapters.unmerge(other(), p), "array that `merge` gave, got a LoRA"),
        (lambda m, p: adapters.unmerge({"norm": jnp.ones(3)}, p), "layers/q is an array .*, got nothing"),
        (lambda m, p: adapters.unmerge(adapters.merge(other()), p), "shape \\(2, 32, 32\\), got \\(2, 64, 64\\)"),
        (lambda m, p: p["layers"]["q"].matmul(jnp.ones((2, 1, 3))), "last axis of x"),
        (lambda m, p: adapters.attach(quant.quantize_params(m.params), KEY, quantize="int8"), "in nf4 already"),
        (lambda m, p: adapters.eva(lambda p, b: 0.0, m.params, []), "at least one batch"),
    ],
)
def test_a_wrong_call_is_answered_by_a_sentence(call, word):
    model = tiny_model()
    with pytest.raises(ValueError, match=word):
        call(model, adapters.attach(model.params, jax.random.key(0), targets=["q"]))


def test_a_plan_says_what_is_trained():
    said = []
    params = adapters.attach(
        tiny_model().params, jax.random.key(0), rank=4, targets=["q", "up"], ranks={"layers/0/q": 2}, whole=["norm"],
        quantize="nf4", show=said.append,
    )  # fmt: skip
    (text,) = said
    assert "layers/q" in text and "2–4" in text and "lora over nf4" in text and "whole" in text
    count = sum(a.size for a in jax.tree.leaves(adapters.split(params)[0]))
    assert f"{count:,} (" in text


def test_eva_begins_along_what_inputs_vary_most_along():
    model = tiny_model()
    run = lambda params, tokens: decoder.hidden(params, model.config, tokens).sum()
    batches = [jax.random.randint(jax.random.key(i), (4, 16), 3, 64) for i in range(3)]
    directions, ranks = adapters.eva(run, model.params, batches, rank=4, targets=["q", "down"])
    assert sum(ranks.values()) == 4 * 4 and max(ranks.values()) <= 8 and directions["layers/down"].shape == (2, 48, 8)
    inputs = [
        decoder._norm(model.params["embed"][b], model.params["layers"]["attn_norm"][0], model.config) for b in batches
    ]
    centred = jnp.concatenate(inputs).reshape(-1, 32)
    centred = centred - centred.mean(0, keepdims=True)
    _, _, vt = jnp.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(jnp.abs(jnp.sum(directions["layers/q"][0].T * vt[:8], -1)), 1, atol=1e-3)
    params = adapters.attach(
        model.params, jax.random.key(0), start=directions, ranks=ranks, rank=4, targets=["q", "down"]
    )  # fmt: skip
    close(decoder.apply(params, model.config, TOKENS), decoder.apply(model.params, model.config, TOKENS))


def test_adaloras_ranks_fall_along_a_cubic_to_the_target():
    model = tiny_model()
    params = moved(adapters.attach(model.params, jax.random.key(0), method="adalora", rank=6, targets=["q", "up"]))
    trainable, frozen = adapters.split(params)
    tx = adapters.adalora.optimizer(optax.adam(1e-2), target_rank=2, steps=30, begin=5, end=10)
    state = tx.init(trainable)

    @jax.jit
    def step(trainable, state):
        loss = lambda t: jnp.mean(decoder.apply(adapters.combine(t, frozen), model.config, TOKENS) ** 2)
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    left = []
    for _ in range(30):
        trainable, state = step(trainable, state)
        left.append(sum(int((t["diagonal"] != 0).sum()) for t in trainable["layers"].values()))
    assert left[:5] == [24] * 5 and left[-1] == 8
    expected = [int(8 + 16 * (1 - (s - 5) / 15) ** 3) for s in range(6, 20)]
    assert left[5:19] == expected


@needs_oracle
@pytest.mark.filterwarnings("ignore")
def test_adaloras_choices_are_those_of_peft(tmp_path):
    import peft
    import torch

    model, params, config = untied(tmp_path)
    about = peft.AdaLoraConfig(
        init_r=6, target_r=3, total_step=8, tinit=1, tfinal=2, deltaT=1, target_modules=["q_proj", "down_proj"]
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, about)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "lora_" in key:
                value.add_(0.3 * torch.randn(value.shape))
    theirs.save_pretrained(tmp_path / "begun")
    ours = adapters.load_peft(tmp_path / "begun", params, config)
    trainable, frozen = adapters.split(ours)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    tx = adapters.adalora.optimizer(optax.sgd(0.05), target_rank=3, steps=8, begin=1, end=2)
    state = tx.init(trainable)
    loss = lambda t: jnp.mean(decoder.apply(adapters.combine(t, frozen), config, TOKENS) ** 2)
    step = jax.jit(lambda t, s: tx.update(jax.grad(loss)(t), s, t))
    for i in range(8):
        out = theirs.base_model.model(input_ids=torch.from_numpy(TOKENS).long()).logits
        total = (out**2).mean() + 0.5 * sum_orthogonal(theirs)
        total.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(i + 1)
        optimizer.zero_grad()
        updates, state = step(trainable, state)
        trainable = optax.apply_updates(trainable, updates)
    for name, module in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
        for layer in range(2):
            e = theirs.get_submodule(f"base_model.model.model.layers.{layer}.{module}").lora_E["default"]
            np.testing.assert_allclose(
                trainable["layers"][name]["diagonal"][layer], e.detach().numpy()[:, 0], atol=2e-4, err_msg=name
            )


def sum_orthogonal(model):
    """PEFT adds this only where its own forward makes the loss."""
    import torch

    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.norm(gram - torch.eye(len(gram)), p="fro"))
    return sum(norms) / len(norms)


@needs_oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method, options",
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", dict(rank=5)),
        ("ties", dict(density=0.4)),
        ("ties", dict(density=0.4, sign="frequency")),
        ("ties_svd", dict(density=0.4, rank=4)),
        ("magnitude_prune", dict(density=0.3)),
        ("magnitude_prune_svd", dict(density=0.3, rank=4)),
    ],
    ids=str,
)
def test_mixtures_are_those_of_peft(method, options, tmp_path):
    import peft
    import torch

    model, params, config = untied(tmp_path)
    about = dict(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**about), adapter_name="one")
    for name in ("two", "three"):
        theirs.add_adapter(name, peft.LoraConfig(**about))
    theirs.save_pretrained(tmp_path / "a")
    trees = [adapters.load_peft(tmp_path / "a" / name, params, config) for name in ("one", "two", "three")]
    factors = [0.7, -0.2, 1.1]
    how = {"rank": "svd_rank", "density": "density", "sign": "majority_sign_method"}
    theirs.add_weighted_adapter(
        ["one", "two", "three"], factors, "mixed", combination_type=method, **{how[k]: v for k, v in options.items()}
    )
    ours = adapters.mix(trees, factors, method, **options)
    for name, module in (("q", "self_attn.q_proj"), ("up", "mlp.up_proj")):
        for layer in range(2):
            there = theirs.get_submodule(f"base_model.model.model.layers.{layer}.{module}").get_delta_weight("mixed")
            np.testing.assert_allclose(ours["layers"][name].delta()[layer], there.detach().numpy().T, atol=2e-5)


def test_dare_keeps_the_mean():
    w = {"w": jnp.zeros((12, 8))}
    node = moved(adapters.attach(w, jax.random.key(0), rank=4, targets=["w"]))
    for method in ("dare_linear_svd", "dare_ties_svd"):
        mixed = lambda key: adapters.mix([node], [1.0], method, density=0.5, rank=8, key=key)["w"].delta()
        many = jax.jit(jax.vmap(mixed))(jax.random.split(jax.random.key(0), 400))
        delta = node["w"].delta()
        error = jnp.linalg.norm(jnp.mean(many, 0) - delta) / jnp.linalg.norm(delta)
        assert float(error) < 3 / 400**0.5 and float(jnp.linalg.norm(many[0] - delta) / jnp.linalg.norm(delta)) > 0.5
    halves = adapters.mix([node], [1.0], "dare_linear", density=0.5, key=jax.random.key(0))["w"]
    assert 0.3 < float((halves.a == 0).mean()) < 0.7


@needs_oracle
@pytest.mark.filterwarnings("ignore")
def test_lora_fa_moves_as_peft_does(tmp_path, monkeypatch):
    import peft
    import torch
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it would round the gradients
    model, params, config = untied(tmp_path)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    theirs.save_pretrained(tmp_path / "a")
    read = adapters.load_peft(tmp_path / "a", params, config)
    frozen_a = {path: dataclasses.replace(w, train=("b",)) for path, w in adapters.tree.of(read).items()}
    ours = paths.replaced(read, frozen_a)
    optimizer = create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=1e-3)
    trainable, frozen = adapters.split(ours)
    tx = adapters.lora_fa(optax.adam(1e-3, eps=1e-6), ours)
    state = tx.init(trainable)
    loss = lambda t: 1e4 * jnp.mean(decoder.apply(adapters.combine(t, frozen), config, TOKENS) ** 2)
    step = jax.jit(lambda t, s: tx.update(jax.grad(loss)(t), s, t))
    for _ in range(3):
        (1e4 * (theirs.base_model.model(input_ids=torch.from_numpy(TOKENS).long()).logits ** 2).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        updates, state = step(trainable, state)
        trainable = optax.apply_updates(trainable, updates)
    b = theirs.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").lora_B["default"].weight
    b = b.detach().numpy()  # Adam makes much of what rounding leaves in entries that have no gradient
    assert np.linalg.norm(trainable["layers"]["q"]["b"][1].T - b) < 0.02 * np.linalg.norm(b)


def test_any_tree_is_adapted_and_experts_have_adapters_of_their_own():
    params = {"experts": [{"up": jax.random.normal(jax.random.key(0), (3, 8, 6))}], "scale": jnp.ones(4)}
    adapted = moved(adapters.attach(params, jax.random.key(0), rank=2, targets=["up"], method="dora"))
    node = adapted["experts"][0]["up"]
    x = jax.random.normal(jax.random.key(1), (3, 5, 8))
    close(weights.einsum("ETD,EDF->ETF", x, node), jnp.einsum("ETD,EDF->ETF", x, node.dense()))
    alone = jax.vmap(lambda w, x: weights.dot(x, w))(node, x)
    close(alone, jnp.einsum("ETD,EDF->ETF", x, node.dense()))
    function = weights.materialized(lambda params, x: jnp.tanh(x @ params["experts"][0]["up"]).sum())
    close(function(adapted, x), function(adapters.merge(adapted), x))
    with pytest.raises(ValueError, match="There are experts/0/up"):
        adapters.attach(params, jax.random.key(0), targets=["down"])


def test_starts_are_named_where_they_are_described():
    assert all(start.removesuffix("_niter_N").removesuffix("_N") in starts.__doc__ for start in starts.STARTS)
    assert tolerance("float32") > 0


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_dora_begins_at_the_model_whatever_its_start(start, quantize):
    model = tiny_model()
    params = adapters.attach(
        model.params, jax.random.key(0), method="dora", rank=4, targets=["q"], start=start, quantize=quantize
    )
    w = params["layers"]["q"]
    np.testing.assert_allclose(w.gain(), 1, rtol=1e-5)
    squares = adapters.starts.squared_norms(w.base, False)
    np.testing.assert_allclose(w.squares, squares, rtol=1e-6)
    if quantize is None:
        np.testing.assert_allclose(w.dense(), model.params["layers"]["q"], atol=1e-5)


def test_adapters_that_hold_a_part_of_the_weights_are_not_put_around_another_base():
    model = tiny_model()
    params = adapters.attach(model.params, jax.random.key(0), rank=4, targets=["q"], start="pissa")
    for together in (lambda: adapters.stack([params]), lambda: adapters.mix([params, params], [0.5, 0.5], "cat")):
        with pytest.raises(ValueError, match=r"moved a part of layers/q.*adapters\.plain"):
            together()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(method="vera", start="pissa"), "begins in its own way"),
        (dict(method="ia3", start="nonsense"), "begins in its own way"),
        (dict(method="adalora", freeze_a=True), "begins in its own way"),
        (dict(method="vera", ranks={"q": 2}), "one rank"),
        (dict(whole=["q"], targets=["q"]), "in targets and whole"),
        (dict(alpha=-8.0), "above 0 and finite"),
        (dict(alpha=float("nan")), "above 0 and finite"),
        (dict(rank=4.5), "whole number in 1 … 32 for layers/down"),
        (dict(method="vera", rank=33), "whole number in 1 … 32 for layers/k"),
    ],
)
def test_what_attach_would_not_use_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        adapters.attach(tiny_model().params, jax.random.key(0), **(dict(rank=4) | options))


def test_nan_in_a_weight_that_a_start_takes_apart_is_named():
    params = tiny_model().params
    params["layers"]["q"] = params["layers"]["q"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="every weight of layers/q is finite where pissa"):
        adapters.attach(params, jax.random.key(0), rank=4, targets=["q"], start="pissa")


def test_a_number_that_no_adapter_has_is_refused():
    model = tiny_model()
    tree = adapters.attach(model.params, jax.random.key(0), rank=4, targets=["q"])
    with pytest.raises(ValueError, match=r"ids are in -1 … 1, got \[0, 5\]"):
        adapters.select(adapters.stack([tree, tree]), jnp.array([0, 5]))


def test_a_merged_head_is_written_with_the_model(tmp_path):
    from jaxml import lm

    model = tiny_model(tied_embeddings=True)
    params = adapters.attach(model.params, jax.random.key(0), rank=4, targets=["embed"])
    noisy = lambda a: a + 0.3 * jax.random.normal(jax.random.key(1), a.shape)
    trainable, frozen = adapters.split(params)
    merged = adapters.merge(adapters.combine(jax.tree.map(noisy, trainable), frozen))
    tokens = jnp.array([[1, 5, 9, 20]])
    for save in (lm.save, lm.save_orbax):
        save(model.replace(params=merged), tmp_path / save.__name__)
        again = lm.load(tmp_path / save.__name__)
        expected = lm.decoder.apply(merged, model.config, tokens)
        np.testing.assert_allclose(lm.decoder.apply(again.params, again.config, tokens), expected, atol=1e-5)
