"""Strict by default: 8 CPU devices, rank promotion raises, warnings are errors."""

import gc
import os

import jax
import pytest

# Thousands of small programs, each run once or a few times: what matters is that they compile quickly.
FLAGS = ["--xla_force_host_platform_device_count=8"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # half the time of compiling; later XLA has nothing else
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"

gc.set_threshold(100_000, 50, 1000)  # a tenth of the time of tracing is the collector's
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # A program that another test, or the last run, has compiled is read from here; a folder a worker, since JAX does
    # not write its files whole.
    if hasattr(config, "cache"):  # unless pytest is told to keep none
        folder = config.cache.mkdir("xla") / os.environ.get("PYTEST_XDIST_WORKER", "alone")
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Orbax and its dependencies, on import; nothing of ours.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:orbax.*")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:etils.*")


@pytest.fixture(autouse=True)
def quick_compiles(request):
    """XLA optimises nothing, but where tests ask for it (the marker `optimised`) or run a real model."""
    optimised = request.node.get_closest_marker("optimised") or "smollm2" in request.fixturenames
    jax.config.update("jax_disable_most_optimizations", not optimised)
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
