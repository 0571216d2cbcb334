"""TPU slices that are not there: their chips as libtpu describes them, to compile for."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import jax

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Without these libtpu looks for the host that it is not on, and complains; what is compiled does not depend on them.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """Chips of one kind. A device is what JAX calls one: of v4 and tpu7x half a chip.

    Example:
        >>> of = GENERATIONS["v4"]
        >>> chips(of.slices[0]) * of.devices, of.hbm_gib   # devices of the smallest slice, and what each holds
        (8, 15.25)
    """

    name: str
    slices: tuple[str, ...]
    hbm_gib: float  # of a device, what libtpu leaves to programs
    devices: int = 1  # of a chip


GENERATIONS = {
    g.name: g
    for g in (
        Generation("v4", DEEP, 15.25, 2),
        Generation("v5e", FLAT, 15.75),
        Generation("v5p", DEEP, 95.74),
        Generation("v6e", FLAT, 31.25),
        Generation("tpu7x", DEEP, 94.75, 2),
    )
}


def parse(name: str) -> tuple[Generation, str]:
    """(generation, slice) of a name as "v5e:8x8".

    Raises:
        ValueError: no such generation, or a slice that it does not come in.

    Example:
        >>> parse("v5e:8x8")[0].hbm_gib
        15.75
    """
    generation, _, size = name.partition(":")
    if generation not in GENERATIONS:
        raise ValueError(f"topology: a slice is GENERATION:SIZE, of {', '.join(GENERATIONS)}, got {name!r}.")
    found = GENERATIONS[generation]
    if size not in found.slices:
        raise ValueError(f"topology: {generation} comes in slices of {', '.join(found.slices)}, got {size!r}.")
    return found, size


def chips(size: str) -> int:
    """How many chips a slice has: 64 of "8x8".

    Example:
        >>> chips("8x8"), chips("2x2x4")
        (64, 16)
    """
    return math.prod(int(n) for n in size.split("x"))


def devices(name: str) -> list[Any]:
    """The devices of a slice, in libtpu's order.

    Raises:
        ImportError: libtpu is not installed.
        ValueError: as `parse`.

    Example:
        >>> len(devices("v5e:4x4"))  # doctest: +SKIP
        16
        >>> devices("v5e:3x3")
        Traceback (most recent call last):
            ...
        ValueError: topology: v5e comes in slices of 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16, got '3x3'.
    """
    from jax.experimental import topologies

    generation, size = parse(name)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    whole = "2x2" if size == "1x1" else size  # the smallest host that libtpu knows, of which one chip is taken
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{generation.name}:{whole}").devices
    except (RuntimeError, NotImplementedError) as error:
        raise ImportError(f'topology: programs for TPUs need libtpu: pip install "jaxml[tpu]" ({error}).') from error
    return found[:1] if size == "1x1" else found


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """What is compiled for a device that is not there cannot be read back.

    Example:
        >>> with without_compilation_cache():
        ...     jax.config.jax_enable_compilation_cache
        False
    """
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it has looked at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
