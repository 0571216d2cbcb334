"""One program on many processes: how they find each other, and what only one of them does."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxml.parallel.rules import put, spec


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat_s: int = 100,
) -> None:
    """Joins the processes of one program, once, before anything is computed.

    Args:
        coordinator: host:port of process 0; None or "auto": as Cloud TPU, SLURM, Open MPI or Kubernetes say.
        processes, process: how many there are, and which this one is, from 0; None as they say.
        heartbeat_s: seconds without a sign of a process after which the others give it up.

    Raises:
        ValueError: an address without a port, or numbers that do not fit each other.
        RuntimeError: nobody answers there.
    """
    coordinator = None if coordinator == "auto" else coordinator
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"parallel.start: coordinator is HOST:PORT or auto, got {coordinator!r}.")
    if (processes is None) != (process is None):
        raise ValueError(f"parallel.start: processes and process are given together, got {processes} and {process}.")
    if processes is not None and not 0 <= process < processes:
        raise ValueError(f"parallel.start: process is in 0 … {processes - 1}, got {process}.")
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_s)


def called() -> bool:
    """Whether this machine's scheduler started several processes, which find each other by `start` without arguments.

    Cloud TPU slices of several hosts, and SLURM steps of several tasks.
    """
    tpus = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return len(tpus) > 1 or (tasks.isdigit() and int(tasks) > 1)


def is_main() -> bool:
    """Whether this is the process that prints and writes what one process writes."""
    return jax.process_index() == 0


def say(text: Any) -> None:
    """Prints, once for all processes."""
    if is_main():
        print(text)


def meet(where: str) -> None:
    """Waits until all processes are there; `where` tells places apart."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def shared(count: int, make: Callable[[int], tuple[Sequence[int], Sequence[float]]]) -> list[tuple]:
    """``[make(0), make(1), …]``, of which each process makes its own part; then all tell each other.

    Args:
        make: (whole numbers, as many numbers) of one; it raises ValueError where there is something wrong.

    Raises:
        ValueError: in all processes, what `make` raised in any.
    """
    me, processes = jax.process_index(), jax.process_count()
    if processes == 1:
        return [make(i) for i in range(count)]
    from jax.experimental import multihost_utils

    own, wrong = [], None
    try:
        own = [make(i) for i in range(me, count, processes)]
    except ValueError as error:
        own, wrong = [], str(error)
    text = (wrong or "").encode()[:1000]
    sizes = np.array([len(own), sum(len(numbers) for numbers, _ in own), len(text)], np.int32)
    most = multihost_utils.process_allgather(sizes).max(axis=0)

    def told(values: Any, length: int, dtype: Any) -> np.ndarray:
        values = np.asarray(values, dtype)
        return multihost_utils.process_allgather(np.pad(values, (0, int(length) - len(values))))

    texts = told(np.frombuffer(text, np.uint8), most[2], np.uint8)
    if said := next((bytes(t).rstrip(b"\0").decode(errors="replace") for t in texts if t.any()), None):
        raise ValueError(said)
    lengths = told([len(numbers) for numbers, _ in own], most[0], np.int32)
    wholes = told([n for numbers, _ in own for n in numbers], most[1], np.int32)
    floats = told([n for _, numbers in own for n in numbers], most[1], np.float32)
    ends, out = np.cumsum(lengths, axis=1), []
    for i in range(count):
        process, at = i % processes, i // processes
        part = slice(ends[process, at] - lengths[process, at], ends[process, at])
        out.append((wholes[process, part].tolist(), floats[process, part].tolist()))
    return out


def place(batch: dict[str, np.ndarray], on: Mesh) -> dict[str, Any]:
    """Arrays [..., B, T], the same in all processes, with rows and places where the mesh has them."""

    def one(a: np.ndarray):
        axes = (*[None] * (a.ndim - 2), "batch", "length")
        return put(a, NamedSharding(on, spec(axes, a.shape, dict(on.shape))))

    return {name: one(a) for name, a in batch.items()}


def to_host(a: Any) -> np.ndarray:
    """A whole array in this process's memory; where it is spread over processes, all of them call this."""
    if not isinstance(a, jax.Array) or a.is_fully_addressable:
        return np.asarray(a)
    if a.is_fully_replicated:
        return np.asarray(a.addressable_data(0))
    whole = jax.jit(lambda a: a, out_shardings=NamedSharding(a.sharding.mesh, jax.sharding.PartitionSpec()))(a)
    return np.asarray(whole.addressable_data(0))
