import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxml import lm, optim, parallel, quant
from jaxml.attention import ring, zigzag_order
from jaxml.lm import cache as caches
from jaxml.lm import decoder
from jaxml.optim.sharding import state_sharding
from jaxml.parallel import rules
from jaxml.parallel.mesh import automatic, live
from jaxml.testing import tiny_model, tolerance
from jaxml.tune import adapters


def specs(tree, on):
    return jax.tree.map(lambda s: s.spec, parallel.shardings(tree, on))


def test_a_mesh_has_all_axes_and_one_takes_the_rest():
    on = parallel.mesh(fsdp=-1, tensor=2)
    assert dict(on.shape) == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}
    assert parallel.spell(on.shape) == "fsdp=4,tensor=2"
    assert parallel.parse("tensor=2, fsdp=-1").shape == on.shape
    assert parallel.mesh(context=2, devices=jax.devices()[:2]).devices.size == 2


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: parallel.mesh(data=3), "the number of devices, 8, got data=3"),
        (lambda: parallel.mesh(data=-1, fsdp=-1), "one may be -1"),
        (lambda: parallel.mesh(data=0), "at least 1"),
        (lambda: parallel.parse("rows=8"), "of data, fsdp"),
        (lambda: parallel.parse("data=x"), "got 'data=x'"),
        (lambda: parallel.parse("data=²"), "got 'data=²'"),
        (lambda: parallel.parse("data=2,data=4"), "got data twice"),
        (lambda: parallel.parse("data"), "got 'data'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_a_sentence(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_weights_are_spread_by_their_names():
    on = parallel.mesh(fsdp=4, tensor=2)
    found = specs(tiny_model(width=64, num_heads=8, num_kv_heads=4, hidden_dim=64).params, on)
    assert found["layers"]["q"] == P(None, "fsdp", "tensor")
    assert found["layers"]["o"] == P(None, "tensor", "fsdp")
    assert found["layers"]["down"] == P(None, "tensor", "fsdp")
    assert found["layers"]["attn_norm"] == P(None, None)
    assert found["embed"] == P("tensor", "fsdp")


def test_what_does_not_divide_is_not_spread():
    on = parallel.mesh(fsdp=8)
    assert specs({"q": jnp.ones((12, 7))}, on)["q"] == P(None, None)
    assert rules.spec(("batch",), (4,), {"data": 2, "fsdp": 4}) == P("data")  # as many of the axes as divide it


def test_parts_of_adapters_and_codes_lie_as_their_matrix_does():
    model = tiny_model(width=64, num_heads=8, num_kv_heads=4, hidden_dim=128, tied_embeddings=False)
    params = quant.quantize_params(model.params, "nf4")
    params = adapters.attach(params, jax.random.key(0), rank=4, method="dora", targets=["q", "down", "head"])
    found = specs(params, parallel.mesh(fsdp=2, tensor=2, data=2))["layers"]
    assert found["q"].a == P(None, "fsdp", None) and found["q"].b == P(None, None, ("tensor", "fsdp"))
    assert found["q"].magnitude == P(None, ("tensor", "fsdp"))
    assert found["q"].base.codes == P(None, "tensor", "fsdp")  # outputs lie in rows
    assert found["down"].base.codes == P(None, "fsdp", "tensor")
    assert found["down"].a == P(None, ("tensor", "fsdp"), None) and found["down"].b == P(None, None, "fsdp")
    assert set(jax.tree.leaves(found["q"].base.nested, is_leaf=lambda s: isinstance(s, P))) <= {P(None, None), P(None)}
    head = specs(params, parallel.mesh(fsdp=2, tensor=2, data=2))["head"]
    assert head.a == P("fsdp", None) and head.b == P(None, ("tensor", "fsdp"))


def test_a_quantised_matrix_without_rows_is_whole_everywhere():
    q = quant.nf4.quantize(jnp.ones((24, 64)))  # rows of 24 weights in blocks of 64
    found = specs({"q": q}, parallel.mesh(fsdp=8))["q"]
    assert all(all(axis is None for axis in s) for s in jax.tree.leaves(found, is_leaf=lambda s: isinstance(s, P)))


def test_names_of_ones_own():
    found = specs_of = parallel.shardings(
        {"tower": {"w": jnp.ones((8, 16))}}, parallel.mesh(fsdp=8), names={"w": ("width", "hidden")}
    )
    assert found["tower"]["w"].spec == P("fsdp", None) and specs_of is found


@pytest.mark.parametrize(
    "make, share", [(lambda tx: optim.galore(tx, rank=8), 1.1), (optim.eight_bit, 7.5), (lambda tx: tx, 7.9)]
)
def test_states_lie_where_their_parameters_do(make, share):
    import optax

    on = parallel.mesh(fsdp=8)
    params = parallel.shard({"q": jax.random.normal(jax.random.key(0), (2, 256, 512))}, on)
    tx = make(optax.adam(1e-3))
    state = jax.jit(tx.init, out_shardings=state_sharding(tx, params))(params)
    leaves = jax.tree.leaves(state)
    own = sum(a.addressable_shards[0].data.nbytes for a in leaves)
    assert own < sum(a.nbytes for a in leaves) / share


def test_hints_do_nothing_without_a_mesh_and_are_gone_in_manual_axes():
    assert live() == {} and automatic() == set()
    x = jnp.ones((8, 4))
    assert rules.hint(x, "batch", None) is x and rules.whole({"q": x})["q"] is x
    on, seen = parallel.mesh(data=2, fsdp=4), []

    def inside(x):
        seen.append(live())
        return x

    with jax.set_mesh(on):
        jax.jit(jax.shard_map(inside, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))(x)
        jax.jit(lambda x: seen.append(live()))(x)
    assert seen[0] == {"fsdp": 4} and seen[-1] == {"data": 2, "fsdp": 4}


def test_zigzag_moves_places_as_the_order_says():
    on = parallel.mesh(context=4, data=2)
    x = jnp.arange(2 * 16 * 3).reshape(2, 16, 3)
    move = lambda f: jax.jit(
        jax.shard_map(lambda x: f(x, "context"), mesh=on, in_specs=P("data", "context"), out_specs=P("data", "context"))
    )
    turned = move(ring.into_zigzag)(x)
    np.testing.assert_array_equal(turned, x[:, zigzag_order(16, 4)])
    np.testing.assert_array_equal(move(ring.out_of_zigzag)(turned), x)


def test_rows_of_a_spread_table_are_the_tables():
    on = parallel.mesh(tensor=4, fsdp=2)
    table = jax.random.normal(jax.random.key(0), (16, 8))
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, 16)
    loss = lambda table: jnp.sum(jnp.sin(rules.take(table, tokens)))
    wanted = jax.value_and_grad(loss)(table)
    with jax.set_mesh(on):
        spread = parallel.shard({"embed": table}, on)["embed"]
        got = jax.jit(jax.value_and_grad(loss))(spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance("float32", 192)), got, wanted)


@pytest.mark.parametrize("mesh", ["data=8", "tensor=4,data=2", "context=2,fsdp=2,tensor=2"])
def test_generation_and_scores_on_a_mesh_are_those_of_one_device(mesh):
    model = tiny_model(width=64, num_heads=8, num_kv_heads=4, hidden_dim=128)
    asked, on = ["hello", "the fox is", "a", "bcd efg"] * 2, parallel.parse(mesh)
    tokens, scores = lm.generate(model, asked, max_new_tokens=6), lm.score(model, asked, [" yes"] * 8)
    with jax.set_mesh(on):
        spread = model.replace(params=parallel.shard(model.params, on))
        assert lm.generate(spread, asked, max_new_tokens=6) == tokens
        np.testing.assert_allclose(lm.score(spread, asked, [" yes"] * 8), scores, atol=1e-4)
        cache = jax.jit(lambda: caches.init(model.config, 8, 16))()
        more = jax.jit(functools.partial(decoder.apply_cached, config=model.config))
        positions = jnp.broadcast_to(jnp.arange(4)[None], (8, 4))
        _, cache = more(spread.params, tokens=jnp.ones((8, 4), jnp.int32), cache=cache, positions=positions)
    assert cache.key.addressable_shards[0].data.size * (8 if on.shape["context"] == 1 else 4) == cache.key.size
