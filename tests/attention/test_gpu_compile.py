"""The GPU kernels compiled to machine code, with no GPU: what fits, and that no register is spilled to memory."""

import importlib.util
import shutil

import jax
import pytest

from jaxml.attention.cases import CASES
from jaxml.testing import compile_for_gpu
from tests.attention.test_triton_kernels import gradients

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimised,
    pytest.mark.skipif(
        shutil.which("ptxas") is None or importlib.util.find_spec("jax_plugins") is None,
        reason="needs CUDA's assembler ptxas, jax-cuda13-plugin and jax-cuda13-pjrt",
    ),
]


by_name = {case.name: case for case in CASES}
# Head dim → bytes that may be spilled. Of float32 each operand is split in two for the tensor cores.
SPILLED = {
    "bfloat16": {64: 0, 128: 0, 192: 200, 256: 200},
    "float32": {128: 0, 256: 400},
}


def kernels(case, dtype, device, by="triton"):
    _, found = compile_for_gpu(*gradients(case, dtype, by), device)
    return [k for k in found if k.name.startswith("flash_attention") or "mosaic_gpu" in k.name]


@pytest.mark.parametrize(
    "H, dtype, device",
    [
        *((H, "bfloat16", "NVIDIA H100") for H in (64, 128, 192, 256)),
        *((H, "bfloat16", "NVIDIA A100") for H in (128, 256)),
        *((H, "float32", "NVIDIA A100") for H in (128, 256)),
    ],
)
def test_registers_suffice(H, dtype, device):
    case = by_name["causal"].scaled(T=4096, N=8, K=4, H=H)
    found = kernels(case, dtype, device)
    assert len(found) == 3 and all(k.spilled <= SPILLED[dtype][H] for k in found), found


@pytest.mark.parametrize(
    "name, device",
    [
        *((n, "NVIDIA A100") for n in ("causal", "one query", "packed", "bias of queries", "soft cap", "dropout")),
        *((n, "NVIDIA H100") for n in ("causal", "algebra of masks")),
    ],
)
def test_what_else_a_tile_does_fits_in_registers(name, device):
    case = by_name[name]
    found = kernels(case.scaled(T=520 if case.T > 1 else 1, H=128), "bfloat16", device)
    assert len(found) == 3 and all(k.spilled <= 200 for k in found), found


def test_blackwell_takes_them():
    assert len(kernels(by_name["causal"].scaled(T=1024, H=128), "bfloat16", "NVIDIA B200")) == 3


def test_a_kernel_needs_no_memory_beside_its_results():
    function, arrays = gradients(by_name["causal"].scaled(T=4096, N=8, K=8, H=64), "bfloat16")
    compiled, _ = compile_for_gpu(function, arrays, "NVIDIA H100")
    x = jax.eval_shape(function, *arrays)[0]
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * x.size * x.dtype.itemsize


# ---- Hopper's warp groups ---------------------------------------------------------------------------


@pytest.mark.parametrize("H, H2, spilled", [(64, 64, 16), (128, 128, 16), (192, 128, 200), (256, 256, 200)])
def test_hopper_registers_suffice_and_products_overlap(H, H2, spilled):
    case = by_name["causal"].scaled(T=4096, N=8, K=4, H=H, H2=H2)
    found = {k.name.split("_mosaic")[0]: k for k in kernels(case, "bfloat16", "NVIDIA H100", "mosaic_gpu")}
    assert len(found) == 3 and not any(k.serialized for k in found.values()), found
    assert all(k.spilled <= spilled for k in found.values()), found
    assert found["flash_attention_forward"].spilled <= (0 if H == H2 else 16), found


@pytest.mark.parametrize("H, spilled", [(64, 16), (128, 320)])
def test_hopper_in_one_backward_kernel(H, spilled):
    case = by_name["causal"].scaled(T=4096, N=8, K=4, H=H)
    found = kernels(case, "bfloat16", "NVIDIA H100", "mosaic_gpu_fused")
    found = [k for k in found if "forward" not in k.name]  # which may have been compiled before, and then is not told
    assert len(found) == 1 and found[0].spilled <= spilled and not found[0].serialized, found


@pytest.mark.parametrize("name", ["odd lengths", "packed", "bias", "dropout"])
def test_hopper_compiles_whatever_a_tile_does(name):
    case = by_name[name].scaled(H=128, H2=128)
    found = kernels(case, "bfloat16", "NVIDIA H100", "mosaic_gpu")
    assert len(found) == 3 and all(
        k.spilled <= (300 if name == "dropout" else 100) and not k.serialized for k in found
    ), found
