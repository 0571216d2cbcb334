"""The TPU kernels, compiled for real TPUs by libtpu, with no TPU."""

import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml.attention import Pages, flash_attention, paged_attention, ring_attention
from jaxml.attention.cases import CASES
from jaxml.target import target
from jaxml.testing import TPU_TOPOLOGIES, compile_for_tpu, tpu_mesh, without_compilation_cache

pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with the tpu extra")

by_name = {case.name: case for case in CASES}
EVERYWHERE = ("grouped heads", "packed", "sinks")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tpu_schedule.py"


def gradients(case, dtype):
    """(function, its arguments): value and gradients of a case."""
    kwargs = case.kwargs(dtype)
    arrays = {k: v for k, v in kwargs.items() if hasattr(v, "shape") or k == "mask"}
    rest = {k: v for k, v in kwargs.items() if k not in arrays}

    def total(qkv, arrays):
        out = flash_attention(*qkv, **arrays, **rest, implementation="mosaic_tpu")
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.value_and_grad(total), (case.arrays(dtype), arrays)


@pytest.mark.parametrize("chip", TPU_TOPOLOGIES)
@pytest.mark.parametrize(
    "name",
    [*EVERYWHERE, *[pytest.param(n, marks=pytest.mark.slow) for n in ("bias", "dropout")]],
)
def test_compiles_for_every_generation(name, chip):
    compile_for_tpu(*gradients(by_name[name], jnp.bfloat16), chip)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in by_name if n not in (*EVERYWHERE, "bias", "dropout")])
def test_every_case_compiles(name):
    compile_for_tpu(*gradients(by_name[name], jnp.bfloat16), "v6e")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_dtype_compiles(dtype):
    compile_for_tpu(*gradients(by_name["causal"], dtype), "v5e")


@pytest.mark.parametrize("chip", TPU_TOPOLOGIES)
@pytest.mark.parametrize(
    "heads", [dict(N=32, K=8, H=128), dict(N=9, K=3, H=64, page=16), dict(N=32, K=32, H=128, T=4)], ids=str
)
def test_paged_decoding_compiles_for_every_generation(heads, chip):
    N, K, H, T, page = heads["N"], heads["K"], heads["H"], heads.get("T", 1), heads.get("page", 128)
    shape = lambda *n, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(n, dtype)
    store, table, lengths = shape(64, page, K * H), shape(4, 16, dtype=jnp.int32), shape(4, dtype=jnp.int32)
    attend = lambda q, k, v, *rows: paged_attention(q, Pages(k, v, K), *rows, implementation="mosaic_tpu")
    compile_for_tpu(attend, [shape(4, T, N, H), store, store, table, lengths], chip)


@pytest.mark.slow
def test_a_ring_of_four_chips_compiles_with_its_gradients():
    """Keys are passed on, never gathered; memory is that of a part, not of the sequence."""
    mesh, spec = tpu_mesh("v5e", "context"), P(None, "context")
    part = functools.partial(ring_attention, axis_name="context", is_causal=True, zigzag=True)
    spread = jax.shard_map(part, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    total = lambda *a: jnp.sum(spread(*a).astype(jnp.float32) ** 2)
    shape = lambda n: jax.ShapeDtypeStruct((1, 8192, n, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    with target("TPU v5e"), without_compilation_cache():
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape(8), shape(2), shape(2)).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text and "collective-permute" in text and "all-gather" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**20


@pytest.mark.slow
def test_a_million_tokens_need_no_memory_that_grows_with_their_square():
    """Beside arguments and results; the arrays come and go with heads first, as the kernels take them."""
    x = jax.ShapeDtypeStruct((1, 1, 2**20, 128), jnp.bfloat16)
    turned = lambda a: a.swapaxes(1, 2)
    attend = lambda *a: turned(flash_attention(*map(turned, a), is_causal=True, implementation="mosaic_tpu"))
    extra = compile_for_tpu(attend, [x, x, x], "v6e").memory_analysis().temp_size_in_bytes
    assert extra < 16 * 2**20


@pytest.mark.slow
def test_the_backward_pass_of_sixteen_heads_needs_little_memory():
    x = jax.ShapeDtypeStruct((1, 16, 4096, 128), jnp.bfloat16)
    turned = lambda a: a.swapaxes(1, 2)
    attend = lambda *a: turned(flash_attention(*map(turned, a), is_causal=True, implementation="mosaic_tpu"))
    backward = lambda q, k, v, ct: jax.vjp(attend, q, k, v)[1](ct)
    extra = compile_for_tpu(backward, [x] * 4, "v6e").memory_analysis().temp_size_in_bytes
    assert extra < 66 * 2**20


BUNDLES = {"0.0.42.1": {"v6e": 8828}, "0.0.50.1": {"v6e": 8926}}


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v6e"])
def test_the_schedule_has_not_grown(chip):
    version = importlib.metadata.version("libtpu")
    if version not in BUNDLES:
        pytest.skip(f"bundle counts are known for libtpu {', '.join(BUNDLES)}, this is {version}")
    job = json.dumps(dict(subject="jaxml", chip=chip, width=128, kind="forward", mask="full", blocks={}))
    done = subprocess.run([sys.executable, str(BENCHMARK), "--one", job], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bundles"] <= 1.02 * BUNDLES[version][chip]
