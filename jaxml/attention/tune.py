"""Which tiles are fastest on this GPU: every candidate of a kernel timed, those that do not compile left out."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jaxml.attention import blocks, tuned
from jaxml.attention.blocks import GpuCut, HopperCut
from jaxml.attention.cases import Case
from jaxml.attention.dispatch import BACKENDS, flash_attention, normalise

KERNELS = ("forward", "queries", "keys")


def candidates(backend: str, which: str, H: int, H2: int) -> Iterator[GpuCut | HopperCut]:
    """Tiles that a kernel could have."""
    if backend == "triton":
        for rows, columns, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
            if (rows, columns) != (32, 32):
                yield GpuCut(rows, columns, warps, stages)
        return
    fixed = {"forward": (128,), "queries": (64, 128), "keys": (64,)}[which]
    size = blocks.shared_bytes
    for rows, columns, stages in itertools.product(fixed, (64, 128), (2, 3, 4)):
        of_rows, of_columns = (rows, columns) if which != "keys" else (columns, rows)
        held = size(of_rows, H) if which == "forward" else size(of_rows, H, H2)
        if held + stages * size(of_columns, H, H2) <= blocks.SHARED:
            yield HopperCut(rows, columns, stages)


def tune(case: Case, dtype, backend: str, seconds: Callable | None = None, report: Callable = print) -> dict[str, dict]:
    """The entries for `tuned.save` of a call like the case's: each kernel's fastest tiles.

    Args:
        seconds: (function, arrays) → what a call takes; measured on the device where None.
        report: told of every candidate.

    Raises:
        NotImplementedError: the backend cannot compute the case here; says why.
    """
    arrays, kwargs = case.arrays(dtype), case.kwargs(dtype)
    rules, x, _ = normalise(*arrays, **kwargs)
    if (reason := BACKENDS[backend].supports(rules, x)) is not None:
        raise NotImplementedError(f"tune: {backend} cannot compute {case.name}: {reason}.")
    call = lambda q, k, v: flash_attention(q, k, v, **kwargs, implementation=backend)
    total = lambda *a: jnp.sum(call(*a).astype(jnp.float32))
    run = {"forward": call, "queries": jax.grad(total), "keys": jax.grad(total, (1, 2))}
    H, H2 = arrays[0].shape[3], arrays[2].shape[3]
    found = {}
    for which in KERNELS:
        best = None
        for cut in candidates(backend, which, H, H2):
            tiles = dataclasses.asdict(cut)
            jax.clear_caches()  # a program is the same but for its tiles, which no cache asks for
            with tuned.trying(found | {which: tiles}):
                try:
                    took = (seconds or timed)(run[which], arrays)
                except Exception as error:  # of any compiler: tiles that do not fit
                    report(f"{which} {tiles}: {type(error).__name__}")
                    continue
            report(f"{which} {tiles}: {1e3 * took:.3f} ms")
            if best is None or took < best[0]:
                best = took, tiles
        if best is None:
            raise RuntimeError(f"tune: some tiles of {backend}'s kernel {which} run, none does for {case.name}.")
        found[which] = best[1]
    length, width = arrays[0].shape[1], max(H, H2)
    return {tuned.name(backend, which, length, width, dtype): tiles for which, tiles in found.items()}


def timed(function, arrays, rounds: int = 20) -> float:
    """Seconds that a compiled call takes, the median."""
    compiled = jax.jit(function).lower(*arrays).compile()
    jax.block_until_ready(compiled(*arrays))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - started)
    return statistics.median(times)
