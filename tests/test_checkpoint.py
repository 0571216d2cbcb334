import collections
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxml.checksum
from jaxml import checkpoint, parallel
from jaxml.checkpoint import DELETED, Checkpoints
from jaxml.checksum import checksum
from jaxml.tune.run import begin


def tree(x=0.0):
    params = {"a": {"w": jnp.arange(6.0).reshape(2, 3) + x}, "b": [jnp.ones(2, jnp.bfloat16) * x]}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1.0, 0.0, 5)))
    return begin(params, tx)._replace(step=jnp.int32(x))


def test_restores_structure_dtype_and_bits(tmp_path):
    checkpoint.save(tmp_path, 7, tree(7.0))
    again = checkpoint.restore(tmp_path, tree())
    assert jax.tree.structure(again) == jax.tree.structure(tree())
    jax.tree.map(np.testing.assert_array_equal, again, tree(7.0))
    assert again.trainable["b"][0].dtype == jnp.bfloat16


def test_keeps_the_last_and_the_best(tmp_path):
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
        checkpoint.save(tmp_path, step, tree(step), metrics={"loss": loss}, keep=2, best="loss")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3", "4"]
    assert checkpoint.latest(tmp_path) == 4
    assert int(checkpoint.restore(tmp_path, tree(), step=1).step) == 1


def test_restores_onto_the_shardings_of_the_template(tmp_path):
    checkpoint.save(tmp_path, 0, {"w": jnp.arange(16.0)})
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    template = {"w": jax.device_put(jnp.zeros(16), sharding)}
    again = checkpoint.restore(tmp_path, template)["w"]
    assert again.sharding == sharding
    np.testing.assert_array_equal(again, np.arange(16.0))


def test_what_does_not_fit_is_a_sentence(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="no such folder"):
        checkpoint.restore(tmp_path / "none", tree())
    checkpoint.save(tmp_path, 3, {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"w is \(3,\) in the checkpoint, \(4,\)"):
        checkpoint.restore(tmp_path, {"w": jnp.zeros(4)})
    with pytest.raises(ValueError, match="v is absent"):
        checkpoint.restore(tmp_path, {"w": jnp.zeros(3), "v": jnp.zeros(3)})
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 9"):
        checkpoint.restore(tmp_path, {"w": jnp.zeros(3)}, step=9)


FULL_DISK = """
import resource, sys
import jax.numpy as jnp, numpy as np
from jaxml import checkpoint
noise = lambda seed: {"w": jnp.asarray(np.random.default_rng(seed).standard_normal(200_000))}
checkpoint.save(sys.argv[1], 1, noise(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file can grow beyond this: writes fail
try:
    checkpoint.save(sys.argv[1], 2, noise(2))
except Exception as error:
    print("FAILED", type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "c")], capture_output=True, text=True)
    assert "FAILED" in done.stdout, done.stderr[-2000:]
    assert checkpoint.latest(tmp_path / "c") == 1
    again = checkpoint.restore(tmp_path / "c", {"w": jnp.zeros(200_000)})["w"]
    expected = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    np.testing.assert_array_equal(again, expected)


def test_a_checkpoint_that_is_being_deleted_has_no_name(tmp_path, monkeypatch):
    gone = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: gone.append(path))  # killed before anything is removed
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step))
            checkpoints.wait()
        assert checkpoints.steps() == [3]
    assert {path.parent.name for path in gone} == {DELETED}
    monkeypatch.undo()
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # the next start removes what was left
        assert checkpoints.steps() == [3] and not list((tmp_path / DELETED).iterdir())
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(tree()), tree(3))


def test_a_full_disk_is_a_sentence_and_what_was_there_stays(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tree(1))
    with Checkpoints(tmp_path) as checkpoints:

        def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: Error writing\nmany lines more")

        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(OSError, match=r"could not be written \(RESOURCE_EXHAUSTED: Error writing\)"):
            checkpoints.save(2, tree(2))
    assert checkpoint.latest(tmp_path) == 1


def test_who_reads_deletes_nothing_and_a_link_is_no_way_out(tmp_path):
    tree = {"w": jnp.arange(3.0)}
    checkpoint.save(tmp_path / "run", 1, tree)
    (tmp_path / "mine" / "kept").mkdir(parents=True)
    (tmp_path / "run" / ".deleted").symlink_to(tmp_path / "mine")
    assert checkpoint.latest(tmp_path / "run") == 1
    checkpoint.restore(tmp_path / "run", tree)
    checkpoint.save(tmp_path / "run", 2, tree)
    assert (tmp_path / "mine" / "kept").is_dir()


def test_what_is_not_finite_is_never_the_best(tmp_path):
    tree = {"w": jnp.arange(3.0)}
    with checkpoint.Checkpoints(tmp_path, keep=1, best="eval_loss") as checkpoints:
        for step, loss in enumerate((3.0, 1.0, float("nan"), 2.0)):
            checkpoints.save(step, tree, {"eval_loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


def test_one_bit_that_changed_on_disk_is_noticed(tmp_path):
    saved = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
    checkpoint.save(tmp_path, 1, saved)
    noticed = 0
    for path in sorted((tmp_path / "1" / "default").rglob("d/*")):
        content = path.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 8)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            try:
                np.testing.assert_array_equal(
                    checkpoint.restore(tmp_path, saved)["w"], saved["w"]
                )  # none of the numbers
            except ValueError as error:
                assert "damaged" in str(error)
                noticed += 1
        path.write_bytes(content)
    assert noticed


def test_a_checksum_is_of_every_bit_wherever_it_lies():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4, bool, jnp.float8_e4m3fn, jnp.complex64):
        one = jnp.zeros((3, 8), dtype)
        assert len({checksum([one.at[i, j].set(one.dtype.type(1))]) for i in range(3) for j in range(8)}) == 24, dtype
    wide = np.zeros(4)
    wide[2] = 5e-324
    assert checksum([wide]) != checksum([np.zeros(4)])
    w = jnp.arange(64.0).reshape(8, 8)
    mesh = parallel.mesh(fsdp=2, tensor=2, data=2)
    for spec in (P(), P("fsdp"), P("tensor", "fsdp"), P(None, ("data", "tensor"))):
        assert checksum([parallel.put(w, NamedSharding(mesh, spec))]) == checksum([w]) != checksum([w.T])
    with jax.set_mesh(mesh):
        assert checksum([w]) == checksum([parallel.put(w, NamedSharding(mesh, P("fsdp")))])
    assert checksum({"a": w}) != checksum({"b": w})
    wide = np.arange(6, dtype=np.complex64)
    assert checksum([wide]) == checksum([jnp.asarray(wide)])
    assert len({checksum([a]) for a in (jnp.zeros((0, 3)), np.zeros((0, 2)), jax.random.key(0), 3, 4)}) == 5


def test_a_checksum_takes_no_memory():
    a = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    of_axes = jax.ShapeDtypeStruct((2,), jnp.uint32)
    compiled = jaxml.checksum._sums.lower(a, of_axes, of_axes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096


def test_what_is_saved_may_lie_on_different_devices_and_have_other_names_for_its_keys(tmp_path):
    mixed = {"w": parallel.put(jnp.arange(8.0), NamedSharding(parallel.mesh(fsdp=8), P("fsdp"))), "s": jnp.zeros(())}
    checkpoint.save(tmp_path, 1, mixed)
    np.testing.assert_array_equal(checkpoint.restore(tmp_path, mixed)["w"], mixed["w"])
    named = collections.namedtuple("named", "z a")
    checkpoint.save(tmp_path, 2, named(jnp.ones(2), jnp.zeros(3)))
    assert checkpoint.restore(tmp_path, {"z": jnp.zeros(2), "a": jnp.ones(3)})["z"].tolist() == [1, 1]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="checkpoints cannot be written there"):
        checkpoint.Checkpoints(tmp_path / "checkpoints")
