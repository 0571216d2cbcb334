"""One program on many processes: how they find each other, and what only one of them does."""

import contextlib
import os
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxml.parallel.rules import put, spec

Value = TypeVar("Value")
WAIT_S = 300  # for the others, before anything is computed


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat_s: int = 100,
    wait_s: int = WAIT_S,
) -> None:
    """Joins the processes of one program, once, before anything is computed.

    Where the others do not come, the process ends: one sentence and status 2 (JAX itself would abort).

    Args:
        coordinator: host:port of process 0; None or "auto": as Cloud TPU, SLURM, Open MPI or Kubernetes say.
        processes, process: how many there are, and which this one is, from 0; None as they say.
        heartbeat_s: seconds without a sign of a process after which the others give it up.
        wait_s: seconds in which all of them begin.

    Raises:
        ValueError: an address without a port, or numbers that do not fit each other.
        ConnectionError: nothing answers at the address.

    Example:
        >>> start("host0:1234", processes=2, process=2)
        Traceback (most recent call last):
        ...
        ValueError: parallel.hosts.start: process is in 0 … 1, got 2.
    """
    who = "parallel.hosts.start"
    coordinator = None if coordinator == "auto" else coordinator
    host, port = _address(coordinator) if coordinator is not None else (None, 0)
    if (processes is None) != (process is None):
        raise ValueError(f"{who}: processes and process are given together, got {processes} and {process}.")
    if processes is not None and processes < 1:
        raise ValueError(f"{who}: processes is at least 1, got {processes}.")
    if processes is not None and not 0 <= process < processes:
        raise ValueError(f"{who}: process is in 0 … {processes - 1}, got {process}.")
    for name, value in (("heartbeat_s", heartbeat_s), ("wait_s", wait_s)):
        if value < 1:
            raise ValueError(f"{who}: {name} is at least 1, got {value}.")
    where = f" at {coordinator}" if coordinator else ""
    all_of = f"all {processes} processes" if processes else "all processes"
    missing = (
        f"{who}: not {all_of} came{where} within {wait_s} s. Start them all, with one address and each its own number."
    )
    with _or_end(wait_s, f"waiting for {all_of}{where}", missing):
        if process and host:
            _reach(host, port, wait_s)
        _initialize(coordinator, processes, process, heartbeat_s, wait_s)


def _initialize(coordinator, processes, process, heartbeat_s: int, wait_s: int) -> None:
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=heartbeat_s, initialization_timeout=wait_s + 30
        )
    except ValueError as error:
        if coordinator is not None and processes is not None:
            raise
        raise ValueError(
            "parallel.hosts.start: no scheduler here tells what is missing (Cloud TPU, SLURM, Open MPI and Kubernetes "
            f"would; {error}). Give the coordinator as HOST:PORT, how many processes there are, and which this one is."
        ) from error


def _address(coordinator: str) -> tuple[str, int]:
    found = re.fullmatch(r"([^\s/:]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})", coordinator)
    if not found or not 1 <= int(found[2]) <= 65535:
        raise ValueError(
            "parallel.hosts.start: coordinator is HOST:PORT (a port in 1 … 65535, no scheme) or auto, "
            f"got {coordinator!r}."
        )
    return found[1].strip("[]"), int(found[2])


def _reach(host: str, port: int, wait_s: int) -> None:
    """Waits for process 0 to listen; JAX would wait for a wrong address as long, and abort.

    Raises:
        ConnectionError: it does not.
    """
    end = time.monotonic() + wait_s - 1
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionError(
                    f"parallel.hosts.start: process 0 does not answer at {host}:{port} ({error}). See that it runs "
                    f"(it is waited for, {wait_s} s), and that all are given its address."
                ) from error
        time.sleep(0.2)


@contextlib.contextmanager
def _or_end(seconds: int, told: str, said: str) -> Iterator[None]:
    """Tells, where what is within it takes long; ends the process where it takes too long: it cannot be interrupted."""
    done = threading.Event()

    def watch():
        if not done.wait(min(5, seconds)):
            print(f"jaxml: {told}, for up to {seconds} s", file=sys.stderr, flush=True)
            if not done.wait(max(seconds - 5, 0)):
                print(f"jaxml: {said}", file=sys.stderr, flush=True)
                os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def called() -> bool:
    """Whether this machine's scheduler started several processes, which find each other by `start` without arguments.

    Cloud TPU slices of several hosts, and SLURM steps of several tasks.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, SLURM_STEP_NUM_TASKS="4"):
        ...     called()
        True
    """
    tpus = [name for name in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return len(tpus) > 1 or (tasks.isdigit() and int(tasks) > 1)


def is_main() -> bool:
    """Whether this is the process that prints and writes what one process writes.

    Example:
        >>> is_main()   # a process of its own is number 0
        True
    """
    return jax.process_index() == 0


def say(text: Any) -> None:
    """Prints, once for all processes.

    Example:
        >>> say("step 1: loss 2.3")
        step 1: loss 2.3
    """
    if is_main():
        print(text)


def meet(where: str) -> None:
    """Waits until all processes are there; `where` tells places apart.

    Example:
        >>> meet("the data are read")   # a process of its own waits for none
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def together(make: Callable[[], Value]) -> Value:
    """What `make` gives in this process, once it has given something in all.

    Where it fails in one of them, none waits for that one: all fail.

    Raises:
        Exception: what it raised here; or a ValueError, with what it said in another process.

    Example:
        >>> together(lambda: 1)
        1
    """
    if jax.process_count() == 1:
        return make()
    made, own = None, None
    try:
        made = make()
    except Exception as error:  # whatever it is, the others are waiting
        own = error

    def failed(process: int) -> tuple[list[int], list[float]]:
        if own is not None:
            raise ValueError(f"process {process}: {own}")
        return [], []

    try:
        shared(jax.process_count(), failed)
    except Exception:
        if own is None:
            raise
    if own is not None:
        raise own
    return made


def same(values: Mapping[str, Any], who: str) -> None:
    """Checks that all processes were given the same.

    Args:
        values: what they were given, by its name.

    Raises:
        ValueError: in all of them, with the names of what differs.

    Example:
        >>> same({"steps": 3}, "train")
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = np.array([zlib.crc32(f"{name}={value!r}".encode()) for name, value in values.items()], np.uint32)
    everyones = multihost_utils.process_allgather(own)
    if differ := [name for name, column in zip(values, everyones.T) if len(set(column.tolist())) > 1]:
        raise ValueError(f"{who}: all processes are given the same, and they differ in {', '.join(differ)}.")


def shared(count: int, make: Callable[[int], tuple[Sequence[int], Sequence[float]]]) -> list[tuple]:
    """``[make(0), make(1), …]``, of which each process makes its own part; then all tell each other.

    Args:
        make: (whole numbers, as many numbers) of one; it raises ValueError where there is something wrong.

    Raises:
        ValueError: in all processes, what `make` raised in any.

    Example:
        >>> shared(3, lambda i: ([i], [i / 2]))
        [([0], [0.0]), ([1], [0.5]), ([2], [1.0])]
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
    """Arrays [..., B, T], the same in all processes, with rows and places where the mesh has them.

    Example:
        >>> from jaxml import parallel
        >>> on = parallel.mesh(data=-1)
        >>> tokens = place({"tokens": np.ones((2 * on.size, 4), np.int32)}, on)["tokens"]
        >>> tokens.sharding.shard_shape(tokens.shape)   # of each device
        (2, 4)
    """

    def one(a: np.ndarray):
        axes = (*[None] * (a.ndim - 2), "batch", "length")
        return put(a, NamedSharding(on, spec(axes, a.shape, dict(on.shape))))

    return {name: one(a) for name, a in batch.items()}


def to_host(a: Any) -> np.ndarray:
    """A whole array in this process's memory; where it is spread over processes, all of them call this.

    Example:
        >>> from jaxml import parallel
        >>> spread = place({"a": np.arange(8.0).reshape(8, 1)}, parallel.mesh(data=-1))["a"]
        >>> to_host(spread)[:, 0].tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    if not isinstance(a, jax.Array) or a.is_fully_addressable:
        return np.asarray(a)
    if a.is_fully_replicated:
        return np.asarray(a.addressable_data(0))
    whole = jax.jit(lambda a: a, out_shardings=NamedSharding(a.sharding.mesh, jax.sharding.PartitionSpec()))(a)
    return np.asarray(whole.addressable_data(0))
