"""Strict by default: 8 CPU devices, rank promotion raises, warnings are errors."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # Orbax and its dependencies, on import; nothing of ours.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:orbax.*")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:etils.*")


@pytest.fixture(autouse=True)
def quick_compiles(request):
    """Where arrays are small and programs many, each run once or a few times, compiling quickly is what matters."""
    quick = {"attention", "kan", "optim", "quant", "tune", "test_docs"} & {request.path.parent.name, request.path.stem}
    jax.config.update("jax_disable_most_optimizations", bool(quick))
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def bounded_caches():
    """Thousands of small programs in one process fill JAX's caches, whose size some tests look at, and its memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct; the tests that need it skip where its package is not installed."""
    from jaxml import lm

    try:
        lm.zoo.find("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return lm.load("smollm2-135m")
