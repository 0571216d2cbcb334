"""GaLore against a float64 port of the papers, against itself in its three spellings, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxml import optim
from jaxml.optim import galore, lora, refresh
from jaxml.optim.galore import Options
from tests.golden import low_rank

M, N, RANK, GAP, STEPS = 24, 40, 6, 5, 23


@pytest.fixture(scope="module")
def gradients():
    """Slowly turning, with a falling spectrum, as in training."""
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.standard_normal((M, M)))[0], np.linalg.qr(rng.standard_normal((N, M)))[0]
    base = (u * np.arange(1.0, M + 1) ** -1.0) @ v.T
    return [base + 0.05 * rng.standard_normal((M, N)) for _ in range(STEPS)]


def train(tx, gradients, params=None, dtype=jnp.float64):
    """The parameters after the steps, and the last state."""
    params = {"w": jnp.zeros(np.shape(gradients[0]), dtype)} if params is None else params
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update({"w": g.astype(params["w"].dtype)}, state, params)
        return optax.apply_updates(params, updates), state

    for g in gradients:
        params, state = step(params, state, jnp.asarray(g))
    return params, state


def as_authors(inner, side, **kwargs):
    return galore(
        inner, rank=RANK, gap=GAP, scale=0.25, side=side, method="svd", moments="carry", spread=False, **kwargs
    )


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_equals_the_papers_algorithm_over_five_refreshes(gradients, side):
    # With both sides a fresh basis makes R diagonal: with a tiny ε Adam blows the rounding of the rest up to 1.
    eps = 1e-3 if side == "full" else 1e-8
    want = -1e-2 * sum(low_rank.galore(gradients, rank=RANK, gap=GAP, scale=0.25, side=side, eps=eps))
    tx = as_authors(optax.adam(1e-2, eps=eps), side)
    with jax.enable_x64(True):
        np.testing.assert_allclose(train(tx, gradients)[0]["w"], want, atol=1e-10)
    params, _ = train(tx, gradients, dtype=jnp.float32)
    np.testing.assert_allclose(params["w"], want, atol=1e-4 * np.abs(want).max())


def test_fira_equals_the_papers_algorithm(gradients):
    want = -1e-2 * sum(low_rank.fira(gradients, rank=RANK, gap=GAP, scale=0.25))
    with jax.enable_x64(True):
        params, _ = train(as_authors(optax.adam(1e-2), "left", mode="fira"), gradients)
        np.testing.assert_allclose(params["w"], want, atol=1e-10)
        apart = optax.chain(
            as_authors(None, "left", mode="fira"), optim.aware(optax.scale_by_adam()), optax.scale(-1e-2)
        )
        np.testing.assert_allclose(train(apart, gradients)[0]["w"], want, atol=1e-10)


@pytest.mark.parametrize("mode", ["apollo", "apollo-mini"])
def test_apollo_equals_the_papers_algorithm(gradients, mode):
    rank, scale = (1, 128.0) if mode == "apollo-mini" else (RANK, 1.0)
    with jax.enable_x64(True):
        tx = galore(optax.adam(1e-2), rank=rank, gap=GAP, side="left", mode=mode, spread=False)
        params, _ = train(tx, gradients)
        options = Options(rank=rank, gap=GAP, side="left", mode=mode, spread=False)
        schedule = refresh.Schedule.of(options.find(params), options)
        bases = [np.asarray(refresh.bases(schedule, 0, jnp.asarray(t), (), jnp.float64)[0]) for t in range(STEPS)]
    want = -1e-2 * sum(low_rank.apollo(gradients, bases, scale=scale, whole=mode == "apollo-mini"))
    np.testing.assert_allclose(params["w"], want, atol=1e-9)
    assert len({b.tobytes() for b in bases}) == -(-STEPS // GAP)


def test_a_learning_rate_that_begins_at_zero_does_not_stop_the_limited_modes(gradients):
    warm = optax.linear_schedule(0.0, 1e-2, 5)
    for mode in ("fira", "apollo"):
        tx = galore(optax.adam(warm), rank=RANK, gap=GAP, mode=mode)
        plain = galore(optax.adam(1e-2), rank=RANK, gap=GAP, mode=mode)
        slow, fast = (np.linalg.norm(train(t, gradients, dtype=jnp.float32)[0]["w"]) for t in (tx, plain))
        assert 0.6 * fast < slow < fast


def test_equals_optax_contrib_galore_where_both_are_defined(gradients):
    """One refresh in the first step: its basis has other signs, which cancel as long as it stays."""
    theirs = optax.contrib.galore(1e-2, rank=RANK, update_proj_gap=100, scale=0.25)
    ours = galore(
        optax.adam(1e-2), rank=RANK, gap=100, scale=0.25, side="left", method="svd", moments="carry", spread=False
    )
    ours_right = galore(optax.adam(1e-2), rank=RANK, gap=100, side="auto", method="svd", spread=False)
    tall = [g.T for g in gradients]  # theirs projects the longer side, in float32
    with jax.enable_x64(True):
        for tx, given in ((ours, tall), (ours_right, gradients)):
            a, b = (train(t, given)[0]["w"] for t in (tx, theirs))
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


SPELLINGS = {
    "optax.chain and adam": lambda: optax.chain(galore(rank=RANK, gap=GAP), optim.adam(1e-2)),
    "optax.chain and aware": lambda: optax.chain(galore(rank=RANK, gap=GAP), optim.aware(optax.adam(1e-2))),
    "chain and stock adam": lambda: optim.chain(galore(rank=RANK, gap=GAP), optax.adam(1e-2)),
    "inside another chain": lambda: optax.chain(
        optax.chain(optax.identity(), galore(rank=RANK, gap=GAP), optim.adam(1e-2)), optax.identity()
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_the_same_to_the_bit(gradients, name):
    params, state = train(SPELLINGS[name](), gradients, dtype=jnp.float32)
    want, _ = train(galore(optax.adam(1e-2), rank=RANK, gap=GAP), gradients, dtype=jnp.float32)
    assert (params["w"] == want["w"]).all()
    whole = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (M, N)]
    assert not whole and any(leaf.shape == (M, RANK) for leaf in jax.tree.leaves(state))


def test_an_aware_optimizer_alone_is_the_stock_one(gradients):
    ours, theirs = (train(tx, gradients, dtype=jnp.float32)[0]["w"] for tx in (optim.adam(1e-2), optax.adam(1e-2)))
    assert (ours == theirs).all()
    with pytest.raises(TypeError):
        zip(galore(rank=RANK), None)  # as in a chain that fails: leaves nothing behind for the next chain
    tx = optax.chain(optim.adam(1e-2))
    assert (train(tx, gradients, dtype=jnp.float32)[0]["w"] == theirs).all()


def test_a_stock_optimizer_behind_it_trains_with_a_warning_that_names_the_spellings(gradients):
    tx = optax.chain(galore(rank=RANK, gap=GAP), optax.adam(1e-2))
    with pytest.warns(UserWarning, match=r"no memory is saved. Write optax.chain\(galore") as caught:
        params, state = train(tx, gradients, dtype=jnp.float32)
    assert len(caught) == 1 and state[1][0].mu["w"].shape == (M, N)
    assert np.linalg.norm(params["w"]) > 0.1


def test_members_before_see_whole_gradients_and_members_after_act_in_full_space(gradients):
    decay, rate = 0.1, 1e-2
    start = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((M, N)))}
    apart = optax.chain(
        optax.clip_by_global_norm(0.5), galore(rank=RANK, gap=GAP), optim.aware(optax.scale_by_adam()),
        optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate),
    )  # fmt: skip
    whole = optax.chain(
        optax.clip_by_global_norm(0.5), galore(rank=RANK, gap=GAP), optim.adamw(rate, weight_decay=decay)
    )
    clipped = [g * min(1.0, 0.5 / np.linalg.norm(g)) for g in gradients]
    with jax.enable_x64(True):
        start = jax.tree.map(lambda a: a.astype(jnp.float64), start)
        a, b = (train(tx, gradients, start)[0]["w"] for tx in (apart, whole))
        np.testing.assert_allclose(a, b, atol=1e-12)
        want, _ = train(galore(optax.adamw(rate, weight_decay=decay), rank=RANK, gap=GAP), clipped, start)
        np.testing.assert_allclose(a, want["w"], atol=1e-12)
        nothing, _ = train(galore(optax.adamw(rate, weight_decay=decay), rank=RANK), [0 * g for g in gradients], start)
        np.testing.assert_allclose(nothing["w"], start["w"] * (1 - rate * decay) ** STEPS, rtol=1e-9)


INNERS = {
    "lion": lambda: optax.lion(1e-2, weight_decay=0.1),
    "sgd": lambda: optax.sgd(0.5, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.5, momentum=0.9, nesterov=True),
    "adafactor": lambda: optax.adafactor(1e-1, min_dim_size_to_factor=4),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(5e-2),
    "lamb": lambda: optax.lamb(5e-2),
    "adan": lambda: optax.adan(5e-2),
    "rmsprop": lambda: optax.rmsprop(5e-2),
    "injected": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=5e-2),
    "eight bits": lambda: optim.adamw8bit(5e-2, min_size=16),
}


OTHER = ("carry", "reset")


@pytest.mark.parametrize(
    "name, moments", [*((name, "rotate") for name in INNERS), *((n, m) for n in ("lion", "eight bits") for m in OTHER)]
)
def test_any_optimizer_finds_the_minimum_through_a_few_directions_at_a_time(name, moments):
    target = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 12)))
    tx = galore(INNERS[name](), rank=4, gap=3, scale=1.0, moments=moments)
    params = {"w": target + 1.0, "b": jnp.zeros(3)}
    loss = lambda p: jnp.mean((p["w"] - target) ** 2) + jnp.mean((p["b"] - 1) ** 2)

    traced = []

    @jax.jit
    def step(params, state, _):
        traced.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, before = tx.init(params), loss(params)
    for n in range(80):
        params, state = step(params, state, n)
    assert loss(params) < 0.5 * before and len(traced) == 1


def test_stacked_leaves_are_as_many_matrices(gradients):
    g = np.stack([gradients[0], gradients[1], 0.3 * gradients[2], -gradients[3]])
    steps = [g * (1 + 0.1 * n) for n in range(8)]
    tx = galore(optax.adam(1e-2), rank=RANK, gap=3, spread=False, method="svd")
    with jax.enable_x64(True):
        stacked, _ = train(tx, [s.reshape(2, 2, M, N) for s in steps])
        for k in range(4):
            alone, _ = train(tx, [s[k] for s in steps])
            np.testing.assert_allclose(stacked["w"].reshape(4, M, N)[k], alone["w"], atol=1e-12)


DIMS = {
    "query kernel": ((20, 4, 6), optim.DimensionNumbers(0, (1, 2)), (20, 24)),
    "output kernel": ((4, 6, 20), optim.DimensionNumbers((0, 1), 2), (24, 20)),
    "stacked query kernels": ((3, 20, 4, 6), optim.DimensionNumbers(1, (2, 3)), (20, 24)),
    "heads in front": ((4, 20, 6), optax.contrib.MuonDimensionNumbers(1, (0, 2)), (20, 24)),
    "convolution": ((3, 3, 8, 10), optim.DimensionNumbers((0, 1, 2), 3), (72, 10)),
}


@pytest.mark.parametrize("name", DIMS)
def test_dimension_numbers_make_the_matrix(name):
    shape, dims, (m, n) = DIMS[name]
    rng = np.random.default_rng(0)
    steps = [rng.standard_normal(shape) for _ in range(4)]
    (target,) = Options(rank=4, dims=dims).find({"w": jnp.zeros(shape)})
    assert (target.m, target.n) == (m, n)
    with jax.enable_x64(True):
        matrices = [np.asarray(target.matrices(jnp.asarray(s))) for s in steps]
        np.testing.assert_array_equal(target.restore(jnp.asarray(matrices[0])), steps[0])
        for given in (dims, {"^w$": dims}, lambda path, shape: dims):
            tx = galore(optax.adam(1e-2), rank=4, gap=2, dims=given, spread=False)
            ours, _ = train(tx, steps)
            plain, _ = train(galore(optax.adam(1e-2), rank=4, gap=2, spread=False), matrices)
            np.testing.assert_allclose(target.matrices(ours["w"]), plain["w"], atol=1e-12)


def test_ranks_and_targets_by_leaf():
    params = {"attn": {"q": jnp.zeros((64, 32)), "o": jnp.zeros((32, 32))}, "embed": jnp.zeros((99, 32)),
              "mlp": jnp.zeros((2, 32, 128)), "b": jnp.zeros(32)}  # fmt: skip
    ranks = lambda **kwargs: [t and t.rank for t in Options(**kwargs).find(params)]  # o, q, b, embed, mlp
    assert ranks(rank=8) == [8, 8, None, None, 8]
    assert ranks(rank=0.25) == [8, 8, None, None, 8]
    assert ranks(rank={"attn": 4, "mlp": 0.5}) == [4, 4, None, None, 16]
    assert ranks(rank=lambda path, shape: shape[-2] // 8) == [4, 8, None, None, 4]
    assert ranks(rank=8, targets="attn/.$") == [8, 8, None, None, None]
    assert ranks(rank=8, targets=["embed", "q"]) == [None, 8, None, 8, None]
    assert ranks(rank=8, targets=lambda path, shape: "mlp" in path) == [None, None, None, None, 8]


def test_sides():
    side = lambda shape, **kwargs: Options(rank=4, **kwargs).find({"w": jnp.zeros(shape)})[0].side
    tall, wide, square = (64, 32), (32, 64), (32, 32)
    assert [side(s) for s in (tall, wide, square)] == ["left", "right", "right"]
    assert [side(s, side="reverse_std") for s in (tall, wide, square)] == ["left", "right", "right"]
    assert [side(s, side="std") for s in (tall, wide, square)] == ["right", "left", "left"]
    assert [side(s, side="full") for s in (tall, wide)] == ["full", "full"]


def test_refreshes_take_turns_over_the_gap(gradients):
    """In the first step all, then each matrix once in every gap steps and never many in one step."""
    tx = galore(optax.sgd(1.0), rank=RANK, gap=4, method="svd")
    params = {"w": jnp.zeros((6, M, N)), "v": jnp.zeros((2, M, N))}
    state, seen = tx.init(params), []
    for step in range(13):
        g = jnp.asarray(gradients[step], jnp.float32)
        _, new = tx.update(jax.tree.map(lambda p, g=g: jnp.broadcast_to(g, p.shape), params), state)
        basis = lambda s: jnp.concatenate([s.targets[k].basis[0] for k in ("v", "w")])
        seen.append(jnp.any(basis(new) != basis(state), axis=(1, 2)))
        state = new
    seen = np.stack(seen)
    assert seen[0].all() and (seen[1:].sum(axis=1) == 2).all()
    assert (seen[1:5].sum(axis=0) == 1).all() and (seen[5:9].sum(axis=0) == 1).all()


def test_the_gap_doubles_while_the_subspace_stays(gradients):
    still = [gradients[0]] * 60
    turning = [np.random.default_rng(n).standard_normal((M, N)) for n in range(60)]
    tx = galore(optax.sgd(1.0), rank=RANK, gap=2, adaptive=0.8, spread=False)
    _, state = train(tx, still, dtype=jnp.float32)
    assert state.targets["w"].turns.gap >= 8
    _, state = train(tx, turning, dtype=jnp.float32)
    assert state.targets["w"].turns.gap == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_basis_in_few_bits_gives_nearly_the_same(gradients, basis_dtype, dtype):
    tx = lambda kind: galore(optax.adam(1e-2), rank=RANK, gap=GAP, basis_dtype=kind)
    want, _ = train(tx("float32"), gradients, dtype=jnp.float32)
    params, state = train(tx(basis_dtype), gradients, dtype=jnp.dtype(dtype))
    kept = state.targets["w"].basis[0]
    assert params["w"].dtype == dtype and (kept.codes if "int" in basis_dtype else kept).dtype == basis_dtype
    off = np.linalg.norm(params["w"].astype(jnp.float32) - want["w"]) / np.linalg.norm(want["w"])
    bound = {"float32": 1e-6, "bfloat16": 0.05, "int8": 0.1, "int4": 0.4}[basis_dtype]
    assert off < bound + (0.05 if dtype == "bfloat16" else 0.0)


BAD = {
    "nothing matched": (dict(targets="nothing"), "matches at least one path, got 'nothing'. There are b, w"),
    "no leaf": (dict(rank=64), r"at least one leaf is a target, got none .* There are b \(3,\), w \(8, 4\)"),
    "rank too large": (dict(rank=5, targets="w"), "rank is in 1 … 4 for w, seen as 8 × 4.*got 5"),
    "rank zero": (dict(rank=0), "got 0"),
    "one axis": (dict(rank=2, targets="b"), "at least two axes, got b"),
    "axes": (dict(rank=2, dims=optim.DimensionNumbers(0, 2)), "axes of w are within its 2"),
    "same axis": (dict(rank=2, dims=optim.DimensionNumbers(0, 0)), "no axis of both"),
    "rank pattern": (dict(rank={"x": 2}), "a pattern of rank matches each target, got x and w"),
    "side": (dict(side="top"), "side is one of auto, std"),
    "method": (dict(method="qr"), "method is one of power, rsvd, svd, random, got 'qr'"),
    "mode": (dict(mode="lora"), "mode is one of"),
    "gap": (dict(gap=0), "gap is a number of steps, at least 1, got 0"),
    "full": (dict(mode="fira", side="full"), "goes with mode 'galore' only"),
    "adaptive": (dict(method="random", adaptive=0.4), "no overlap"),
    "axis_name": (dict(mode="fira", axis_name="data"), "needs whole gradients. Average them before"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_said(name):
    options, sentence = BAD[name]
    with pytest.raises(ValueError, match=sentence):
        galore(optax.adam(1e-3), **options).init({"b": jnp.zeros(3), "w": jnp.zeros((8, 4))})


def test_misplaced_members_are_said():
    with pytest.raises(ValueError, match="an optimizer follows galore"):
        optim.chain(optax.adam(1e-3), galore(rank=2))
    with pytest.raises(ValueError, match="got a galore"):
        galore(galore(rank=2), rank=2)
    with pytest.raises(ValueError, match="mode 'fira' has an optimizer inside"):
        optax.chain(galore(rank=2, mode="fira"), optax.adam(1e-3)).init({"w": jnp.zeros((8, 4))})


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_projected_gradients_are_averaged_over_devices_instead_of_whole_ones(how):
    devices = jax.devices()[:4]
    params = {"w": jnp.ones((2, 32, 24)), "b": jnp.zeros(24)}
    rng = np.random.default_rng(0)
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.standard_normal((4, *p.shape))), params) for _ in range(7)]
    tx = lambda **options: galore(optax.adam(1e-2), rank=4, gap=3, **options)
    alone, local = tx(), tx(axis_name="data")

    def step(params, state, grads):
        grads = jax.tree.map(lambda g, p: g.reshape(p.shape), grads, params)
        updates, state = local.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    many = jax.pmap(step, "data", in_axes=(None, None, 0), out_axes=None, devices=devices)
    if how == "shard_map":
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
        P = jax.sharding.PartitionSpec
        many = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()))
    want, got = (params, alone.init(params)), (params, local.init(params))
    for g in grads:
        updates, state = jax.jit(alone.update)(jax.tree.map(lambda a: a.mean(0), g), want[1], want[0])
        want, got = (optax.apply_updates(want[0], updates), state), many(*got, g)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    averaged = [v.aval.shape for v in _averaged(jax.make_jaxpr(many)(*got, grads[0]).jaxpr)]
    assert (2, 4, 24) in averaged and (2, 32, 24) not in averaged


def _averaged(jaxpr):
    """What is summed over devices in every step: loops, which are for refreshes, are left out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith("psum"):
            yield from equation.invars
        elif equation.primitive.name != "while":
            for inner in jaxprs_in_params(equation.params):
                yield from _averaged(inner)


DECAYING = {
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(1e-2, weight_decay=0.1), 3),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(1e-2, weight_decay=0.1), 1).gradient_transformation(),
    "eight bits": lambda: optim.adamw8bit(1e-2, weight_decay=0.1, min_size=16),
}


@pytest.mark.parametrize("name", DECAYING)
def test_weight_decay_acts_in_full_space_whatever_is_around_it(name):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((16, 12)), jnp.float32)
    tx = galore(DECAYING[name](), rank=2, moments="carry")
    state = tx.init({"w": w})
    updates, _ = jax.jit(tx.update)({"w": jnp.zeros_like(w)}, state, {"w": w})
    np.testing.assert_allclose(updates["w"], -1e-3 * w, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moments_are_wide_whatever_the_parameters_are(dtype):
    params = {"embed": jnp.ones((8, 4), dtype), "w": jnp.ones((8, 4), dtype)}
    for tx in (galore(optax.adam(1e-3), rank=2), optim.adam8bit(1e-3, min_size=1000)):
        state = tx.init(params)
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(state.inner) if a.ndim)
        g = jax.tree.map(lambda p: jnp.full_like(p, 1e-4), params)  # whose square is 0 in float16
        updates, _ = tx.update(g, state, params)
        np.testing.assert_allclose(updates["embed"].astype(jnp.float32), -1e-3, rtol=1e-2)
        assert updates["embed"].dtype == params["embed"].dtype


def test_norms_biases_and_scales_are_no_targets_unless_named():
    layers = {"attn_norm": jnp.ones((30, 32)), "up": jnp.ones((30, 32, 64)), "mlp": {"bias": jnp.ones((30, 64))}}
    params = {"layers": layers | {"ln_1": {"scale": jnp.ones((30, 32))}, "balance": jnp.ones((32, 64))}}
    found = [t.path for t in Options(rank=8).find(params) if t is not None]
    assert found == ["layers/balance", "layers/up"]
    assert [t.path for t in Options(rank=8, targets="norm").find(params) if t] == ["layers/attn_norm"]


def test_dimension_numbers_as_muon_takes_them_and_flax_attention_by_name():
    params = {"query": {"kernel": jnp.ones((64, 4, 8))}, "out": {"kernel": jnp.ones((4, 8, 64))}}
    shapes = lambda **options: [(t.m, t.n, t.batch) for t in Options(rank=4, **options).find(params)]
    by_name = shapes()
    assert by_name == [(32, 64, ()), (64, 32, ())]
    numbers = optax.contrib.MuonDimensionNumbers
    tree = {"query": {"kernel": numbers(0, (1, 2))}, "out": {"kernel": numbers((0, 1), 2)}}
    assert shapes(dims=tree) == shapes(dims=lambda params: tree) == by_name


def test_a_first_argument_that_is_no_optimizer_is_said():
    for call in (lambda: galore(128), lambda: galore(1e-3, rank=4), lambda: lora(8), lambda: optim.eight_bit(1e-3)):
        with pytest.raises(TypeError, match="first argument is an Optax transformation, got"):
            call()


def test_a_mesh_with_explicit_axes_is_said():
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    params = {"w": jax.device_put(jnp.ones((8, 6)), where)}
    tx = galore(optax.adam(1e-3), rank=2)
    with pytest.raises(NotImplementedError, match=r"of type Auto, got fsdp of type Explicit"):
        jax.jit(tx.update)(params, tx.init(params), params)


def test_members_between_a_projection_and_its_optimizer_see_whole_gradients():
    params = {"w": jnp.ones((16, 12))}
    make = lambda chain: chain(galore(rank=2), optax.clip_by_global_norm(0.1), optim.adam(1e-3))
    a, b = make(optax.chain), make(optim.chain)
    updates = [tx.update(params, tx.init(params), params)[0]["w"] for tx in (a, b)]
    np.testing.assert_array_equal(*updates)
    stock = optim.chain(galore(rank=2), optax.clip_by_global_norm(0.1), optax.adam(1e-3))
    assert {leaf.shape for leaf in jax.tree.leaves(stock.init(params)) if leaf.ndim} == {(2, 12), (16, 2)}
    eight = optax.chain(galore(rank=2), optim.eight_bit(optax.adam(1e-3), min_size=4))
    assert eight.init(params)[1].inner.inner[0].mu["w"].codes.shape == (2, 12)
