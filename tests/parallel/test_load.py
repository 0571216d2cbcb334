"""Models that are read onto a mesh: no device ever holds one whole."""

import jax
import numpy as np
import pytest

from jaxml import lm, parallel, quant
from jaxml.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(width=64, num_heads=8, num_kv_heads=8, hidden_dim=128)


@pytest.mark.parametrize("kind", ["folder", "orbax", "nf4 folder", "nf4 as it is read"])
def test_a_model_is_read_onto_a_mesh(model, tmp_path, kind):
    saved, on = model, parallel.mesh(fsdp=4, tensor=2)
    if kind == "nf4 folder":
        saved = model.replace(params=quant.quantize_params(model.params, "nf4"))
    (lm.save_orbax if kind == "orbax" else lm.save)(saved, tmp_path / "model")
    how = {"quantize": "nf4"} if kind == "nf4 as it is read" else {}
    one, many = lm.load(tmp_path / "model", **how), lm.load(tmp_path / "model", **how, mesh=on)
    assert jax.tree.structure(one.params) == jax.tree.structure(many.params)
    jax.tree.map(np.testing.assert_array_equal, many.params, one.params)
    wanted = parallel.shardings(one.params, on)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), many.params, wanted))
    largest = max(jax.tree.leaves(many.params["layers"]), key=lambda a: a.nbytes)
    assert largest.addressable_shards[0].data.nbytes * 8 == largest.nbytes


def test_a_spread_model_is_written_as_it_was(model, tmp_path):
    spread = model.replace(params=parallel.shard(model.params, parallel.mesh(fsdp=8)))
    lm.save(spread, tmp_path / "a")
    lm.save(model, tmp_path / "b")
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
