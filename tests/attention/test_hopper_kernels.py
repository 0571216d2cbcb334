"""The kernels for Hopper's warp groups on the simulator, against the definition; that it finds faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxml.attention import blockwise, explain, flash_attention, hopper_backward, hopper_forward, reference
from jaxml.attention.cases import CASES
from jaxml.attention.dispatch import normalise
from jaxml.target import target
from jaxml.testing import lower_for_gpu
from tests.attention.hopper_simulator import simulated
from tests.attention.test_triton_kernels import gradients

by_name = {case.name: case for case in CASES}
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def forward(case):
    rules, x, _ = normalise(*case.arrays(), **case.kwargs())
    with simulated(), target("NVIDIA H100"):
        ours = hopper_forward.forward(rules, x)
    equal(ours, reference.attend(rules, x))


def backward(case, fused=False):
    rules, x, _ = normalise(*case.arrays(), **case.kwargs())
    out, lse = reference.attend(rules, x)
    cotangent = lambda a, f: f(jnp.arange(a.size, dtype=jnp.float32)).reshape(a.shape)
    arguments = rules, x, out, lse, cotangent(out, jnp.sin), cotangent(lse, jnp.cos), ("query", "key", "value")
    with simulated(), target("NVIDIA H100"):
        ours = hopper_backward.backward(*arguments, fused=fused)
    theirs = blockwise.backward(*arguments)
    equal([ours[n] for n in theirs], [theirs[n] for n in theirs])


def equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


CALLS = [
    ("causal", dict(T=140, N=2, K=1, H=64)),
    slow("causal", dict(T=300, N=2, K=1)),
    slow("plain", dict(T=200, S=330)),
    slow("one query", dict(N=2)),
    slow("odd lengths", dict(T=267, S=241, N=2)),
    slow("packed", dict(B=1, T=400)),
    slow("lengths", dict(B=2, T=200, N=1, K=1)),
    slow("dense mask, rows without keys", dict(B=1, T=280, N=2)),
    slow("soft cap", dict(T=140, N=1, K=1)),
    slow("bias", dict(B=1, T=140)),
    slow("ALiBi", dict(T=200, N=2)),
    slow("algebra of masks", dict(B=1, T=300)),
    slow("dropout", dict(B=1, T=140, N=1, K=1)),
]


@pytest.mark.parametrize("name, sizes", CALLS)
def test_forward(name, sizes):
    forward(by_name[name].scaled(**sizes))


@pytest.mark.parametrize("name, sizes", CALLS)
def test_backward(name, sizes):
    backward(by_name[name].scaled(**sizes))


@pytest.mark.parametrize("name, sizes", CALLS)
def test_fused_backward(name, sizes):
    backward(by_name[name].scaled(**sizes), fused=True)


@pytest.mark.slow
@pytest.mark.parametrize("H, H2", [(128, 128), (128, 64), (40, 128)])
def test_widths_fused(H, H2):
    backward(by_name["causal"].scaled(T=270, N=2, K=1, H=H, H2=H2), fused=True)


@pytest.mark.slow
@pytest.mark.parametrize("H, H2", [(128, 128), (192, 128), (64, 256), (256, 256)])
def test_widths(H, H2):
    case = by_name["causal"].scaled(T=270, N=2, K=1, H=H, H2=H2)
    forward(case)
    backward(case)


# ---- the simulator ----------------------------------------------------------------------------------


def add(*, seed=0, wait=True, commit=True, free=True, arrivals=1, late=True):
    """Four blocks of x, each times a matrix of ones, added up by one group; another one copies them."""

    def kernel(x, y, blocks, ones, out, here, done):
        group = jax.lax.axis_index("group")

        @pl.when(group == 1)
        def _():
            for n in range(4):
                if n >= 2 and free:
                    plgpu.barrier_wait(done.at[n % 2])
                plgpu.copy_gmem_to_smem(x.at[pl.ds(n * 64, 64)], blocks.at[n % 2], here.at[n % 2])

        @pl.when(group == 0)
        def _():
            ones[...] = jnp.ones((64, 64), jnp.float32)
            plgpu.commit_smem()
            total = jnp.zeros((64, 64), jnp.float32)
            for n in range(4):
                if wait:
                    plgpu.barrier_wait(here.at[n % 2])

                def product(ref, n=n):
                    plgpu.wgmma(ref, blocks.at[n % 2], ones)
                    if not late:
                        plgpu.barrier_arrive(done.at[n % 2])

                total = pl.run_state(product)(plgpu.ACC.init(total))
                if late:
                    plgpu.barrier_arrive(done.at[n % 2])
            out[...] = total
            if commit:
                plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, y)
            plgpu.wait_smem_to_gmem(0)

    shared = lambda *shape: plgpu.SMEM(shape, jnp.float32)
    x = jnp.arange(256 * 64, dtype=jnp.float32).reshape(256, 64) / 2**14
    with simulated(seed):
        (y,) = plgpu.kernel(
            kernel,
            out_type=[jnp.zeros((64, 64))],
            grid=(1,),
            grid_names=("tile",),
            num_threads=2,
            thread_name="group",
            scratch_types=[
                shared(2, 64, 64),
                shared(64, 64),
                shared(64, 64),
                plgpu.Barrier(num_barriers=2),
                plgpu.Barrier(num_arrivals=arrivals, num_barriers=2),
            ],
        )(x)
    return np.allclose(y, (x.reshape(4, 64, 64).sum(0) @ jnp.ones((64, 64))), rtol=1e-5)


def fails(**fault) -> bool:
    """Whether it is wrong in some order of the warp groups."""

    def once(seed):
        try:
            return not add(seed=seed, **fault)
        except RuntimeError as error:
            return "deadlock" in str(error)

    return any(map(once, range(10)))


def test_the_simulator_runs_what_is_right():
    assert not fails()


@pytest.mark.parametrize("fault", [dict(wait=False), dict(late=False), dict(free=False), dict(arrivals=2)])
def test_the_simulator_finds_what_is_read_too_early_overwritten_too_early_or_waited_for_in_vain(fault):
    assert fails(**fault)


def test_the_simulator_finds_stores_without_a_fence():
    with pytest.raises(AssertionError, match="commit_smem"):
        add(commit=False)


# ---- lowering ---------------------------------------------------------------------------------------

LOWERED = ("causal", "odd lengths", "lengths", "dense mask, rows without keys", "bias", "ALiBi", "algebra of masks")


@pytest.mark.parametrize("name", [n if n == "causal" else slow(n) for n in LOWERED])
def test_cases_are_lowered_for_cuda(name):
    text = lower_for_gpu(*gradients(by_name[name].scaled(H=128, H2=128), "bfloat16", "mosaic_gpu")).as_text()
    assert all(f"flash_attention_{which}" in text for which in ("forward", "backward_queries", "backward_keys"))


# ---- what is refused --------------------------------------------------------------------------------


def test_calls_that_the_kernels_refuse():
    x = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    with target("NVIDIA A100"):
        assert "Hopper GPU, this one has compute capability 8.0" in explain(x, x, x).refused["mosaic_gpu"]
    with target("NVIDIA H100"):
        assert "name it" in explain(x, x, x).refused["mosaic_gpu"]
        assert explain(x, x, x, implementation="mosaic_gpu").chosen == "mosaic_gpu"
        wide = jnp.zeros((1, 64, 2, 264), jnp.bfloat16)
        assert "at most 256" in explain(wide, wide, wide).refused["mosaic_gpu"]
        with pytest.raises(NotImplementedError, match="query is float32"):
            flash_attention(*(a.astype(jnp.float32) for a in (x, x, x)), implementation="mosaic_gpu")
