"""Runs kernels written for Hopper's warp groups on a CPU, to find wrong numbers, races and deadlocks with no GPU.

Every warp group of a program is a thread, and they take turns in a random order at whatever synchronises them. What is
asynchronous on the device is as late as it may be: a copy fills its destination with NaN at once and arrives when
somebody waits for it; a product reads shared memory when its result is waited for; a store leaves at its own wait. So
who forgets to wait, or gives memory free too early, computes NaN. Registers and instructions are the compiler's
business, not looked at here.
"""

import contextlib
import functools
import random
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Shared(NamedTuple):
    shape: tuple
    dtype: Any


class BarrierType(NamedTuple):
    num_arrivals: int = 1
    num_barriers: int = 1


class Ref:
    """A view of an array in memory: for each of its axes a number, or (start, size)."""

    def __init__(self, memory: "Memory", index: tuple, axes: tuple[int, ...] | None = None):
        self.memory, self.index = memory, index
        kept = [n for n, i in enumerate(index) if not isinstance(i, int)]
        self.axes = tuple(kept) if axes is None else axes

    shape = property(lambda self: tuple(self.index[n][1] for n in self.axes))
    dtype = property(lambda self: self.memory.array.dtype)
    at = property(lambda self: _At(self))

    def transpose(self, order):
        return Ref(self.memory, self.index, tuple(self.axes[n] for n in order))

    def narrowed(self, key) -> "Ref":
        key = key if isinstance(key, tuple) else (key,)
        key = [k for k in key if k is not Ellipsis] if Ellipsis in key else list(key)
        index, axes = list(self.index), []
        for n, k in zip(self.axes, [*key, *[slice(None)] * (len(self.axes) - len(key))], strict=True):
            start, size = index[n]
            if isinstance(k, slice):
                assert k == slice(None), k
                axes.append(n)
            elif isinstance(k, pl.Slice):
                index[n] = (start + int(k.start), k.size)
                axes.append(n)
            else:
                index[n] = start + int(k)
                assert 0 <= int(k) < size, f"index {int(k)} of {size}"
        return Ref(self.memory, tuple(index), tuple(axes))

    def read(self, beyond: bool = False) -> np.ndarray:
        """`beyond`: what lies beyond the array is 0; otherwise it is an error."""
        array = self.memory.array
        at = []
        for i, size in zip(self.index, array.shape):
            places = np.asarray([i]) if isinstance(i, int) else np.arange(i[0], i[0] + i[1])
            assert beyond or (places.min() >= 0 and places.max() < size), f"{self.index} is outside {array.shape}"
            at.append(places)
        inside = [(p >= 0) & (p < size) for p, size in zip(at, array.shape)]
        got = array[np.ix_(*(np.clip(p, 0, size - 1) for p, size in zip(at, array.shape)))]
        for axis, ok in enumerate(inside):
            got = np.where(ok.reshape([-1 if n == axis else 1 for n in range(got.ndim)]), got, np.zeros((), got.dtype))
        kept = sorted(self.axes)
        got = got.reshape([self.index[n][1] for n in kept])
        return got.transpose([kept.index(n) for n in self.axes])

    def write(self, value) -> None:
        """Whatever lies beyond the array is left out."""
        array, kept = self.memory.array, sorted(self.axes)
        value = np.broadcast_to(np.asarray(value), self.shape).transpose(np.argsort([kept.index(n) for n in self.axes]))
        at, cut = [], []
        for n, i in enumerate(self.index):
            places = np.asarray([i]) if isinstance(i, int) else np.arange(i[0], i[0] + i[1])
            ok = (places >= 0) & (places < array.shape[n])
            at.append(places[ok])
            if not isinstance(i, int):
                cut.append(ok)
        shape = [len(p) for p in at]
        array[np.ix_(*at)] = value[np.ix_(*[np.flatnonzero(ok) for ok in cut])].reshape(shape)

    def __getitem__(self, key):
        return jnp.asarray(self.narrowed(key).read())

    def __setitem__(self, key, value):
        ref = self.narrowed(key)
        ref.write(np.asarray(value))
        if self.memory.shared:
            self.memory.dirty.add(_machine().me())


class _At:
    def __init__(self, ref: Ref):
        self.ref = ref

    def __getitem__(self, key):
        return self.ref.narrowed(key)


class Memory:
    def __init__(self, array: np.ndarray, shared: bool):
        self.array, self.shared, self.dirty = array, shared, set()

    def ref(self) -> Ref:
        return Ref(self, tuple((0, n) for n in self.array.shape))


class Barrier:
    """Of several: how many times all that it counts have arrived, and which wait each thread has come to."""

    def __init__(self, arrivals: int, number: int):
        self.arrivals, self.shape = arrivals, (number,)
        self.each = [dict(arrived=0, done=0, waits={}) for _ in range(number)]
        self.at = _BarrierAt(self)


class _BarrierAt:
    def __init__(self, barrier):
        self.barrier = barrier

    def __getitem__(self, n):
        return self.barrier, int(n)


def _one(barrier) -> tuple[Barrier, dict]:
    barrier, n = barrier if isinstance(barrier, tuple) else (barrier, 0)
    return barrier, barrier.each[n]


class Accumulator:
    def __init__(self, value):
        self.value, self.pending = value, 0

    def __getitem__(self, key):
        assert key is Ellipsis
        return _accumulated(self)


class Plain:
    """A value that `run_state` lets a function change."""

    def __init__(self, value):
        self.value = value

    def __getitem__(self, key):
        assert key is Ellipsis
        return self.value

    def __setitem__(self, key, value):
        assert key is Ellipsis
        assert value.shape == self.value.shape and value.dtype == self.value.dtype, (value.shape, value.dtype)
        self.value = value


class Machine:
    """One program: its threads, one running at a time."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.turn = threading.Condition()
        self.running, self.ready, self.errors, self.copies = None, {}, [], []

    def me(self) -> int:
        return _here.group

    def run(self, function, groups: int, tile: dict) -> None:
        def one(group):
            _here.machine, _here.group, _here.axes, _here.products, _here.stores = self, group, tile, [], []
            try:
                with self.turn:
                    self.turn.wait_for(lambda: self.running == group or self.errors)
                if not self.errors:
                    function()
                    assert not _here.products, "a product is never waited for"
                    _flush_stores()
            except BaseException as error:
                self.errors.append(error)
            with self.turn:
                del self.ready[group]
                self._next()

        self.ready = dict.fromkeys(range(groups), lambda: True)
        threads = [threading.Thread(target=one, args=(g,)) for g in range(groups)]
        for thread in threads:
            thread.start()
        with self.turn:
            self._next()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _next(self) -> None:
        while True:
            can = [g for g, ready in self.ready.items() if ready()]
            if can or not self.copies:
                break
            self._arrive()  # nobody can go on: a copy arrives
        if self.ready and not can and not self.errors:
            self.errors.append(RuntimeError(f"deadlock: warp groups {sorted(self.ready)} wait for each other"))
        self.running = self.random.choice(can) if can else None
        self.turn.notify_all()

    def _arrive(self) -> None:
        self.copies.pop(self.random.randrange(len(self.copies)))()

    def wait(self, ready=lambda: True) -> None:
        """Lets others run; goes on when `ready`."""
        group = self.me()
        if self.copies and self.random.random() < 0.3:
            self._arrive()
        with self.turn:
            self.ready[group] = ready
            self._next()
            self.turn.wait_for(lambda: self.running == group or self.errors)
            if self.errors:
                raise RuntimeError("another warp group has failed")
            self.ready[group] = lambda: True


_here = threading.local()


def _machine() -> Machine:
    return _here.machine


def _complete(state: dict, arrivals: int) -> None:
    state["arrived"] += 1
    if state["arrived"] == arrivals:
        state["arrived"], state["done"] = 0, state["done"] + 1


def _arrive(barrier) -> None:
    barrier, state = _one(barrier)
    _complete(state, barrier.arrivals)
    _machine().wait()


def _wait(barrier) -> None:
    _, state = _one(barrier)
    me = _machine().me()
    count = state["waits"].get(me, 0)
    assert state["done"] <= count + 1, "a barrier went on twice while somebody waited: it counts modulo 2"
    _machine().wait(lambda: (state["done"] - count) % 2 == 1)
    state["waits"][me] = count + 1


def _to_shared(source: Ref, target: Ref, barrier) -> None:
    assert source.shape == target.shape and source.dtype == target.dtype, (source.shape, target.shape)
    barrier, state = _one(barrier)
    target.write(np.full(target.shape, np.nan))

    def arrive():
        target.write(source.read(beyond=True))
        _complete(state, barrier.arrivals)

    _machine().copies.append(arrive)
    _machine().wait()


def _to_global(source: Ref, target: Ref, reduction_op: str | None = None) -> None:
    assert source.shape == target.shape, (source.shape, target.shape)
    assert _machine().me() not in source.memory.dirty, "shared memory is stored before commit_smem()"
    assert reduction_op in (None, "add"), reduction_op
    before = (lambda: target.read(beyond=True)) if reduction_op else (lambda: 0)
    _here.stores.append(lambda: target.write(before() + source.read()))


def _flush_stores(*_, **__) -> None:
    for store in _here.stores:
        store()
    _here.stores.clear()


def _commit() -> None:
    for memory in _here.machine.memories:
        memory.dirty.discard(_machine().me())


def _wgmma(acc: Accumulator, a, b: Ref) -> None:
    for ref in (a, b):
        if isinstance(ref, Ref):
            assert _machine().me() not in ref.memory.dirty, "shared memory is multiplied before commit_smem()"
    acc.pending += 1

    def work():
        left = np.asarray(a.read() if isinstance(a, Ref) else a, np.float32)
        acc.value = acc.value + left @ np.asarray(b.read(), np.float32)
        acc.pending -= 1

    assert acc.value.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0], (acc.value.shape, a.shape, b.shape)
    _here.products.append(work)
    _machine().wait()


def _products(most: int) -> None:
    while len(getattr(_here, "products", ())) > most:  # a state around a whole kernel has none
        _here.products.pop(0)()


def _accumulated(acc: Accumulator, wait_n=0):
    _products(wait_n)
    assert not acc.pending, "an accumulator is read while its product is under way"
    return acc.value


class Acc:
    """In place of `plgpu.ACC`."""

    def __init__(self, shape, dtype=jnp.float32):
        self.shape, self.dtype = shape, dtype

    @staticmethod
    def init(value):
        return Accumulator(value)


def _run_scoped(function, *types, **named):
    make = lambda t: Accumulator(jnp.zeros(t.shape, t.dtype))
    return function(*map(make, types), **{k: make(t) for k, t in named.items()})


def _run_state(function):
    def run(start):
        refs = jax.tree.map(lambda v: v if isinstance(v, Accumulator) else Plain(v), start)
        function(refs)
        _products(0)
        return jax.tree.map(lambda r: r.value, refs, is_leaf=lambda r: isinstance(r, Accumulator | Plain))

    return run


def _when(condition):
    return lambda function: function() if bool(condition) else None


def _loop(low, high, **_):
    def run(function):
        for n in range(int(low), int(high)):
            function(jnp.int32(n))

    return run


def _fori(low, high, body, carry, **_):
    for n in range(int(low), int(high)):
        carry = body(jnp.int32(n), carry)
    return carry


def _kernel(seed: int, body, *, out_type, grid, grid_names, num_threads, thread_name, scratch_types, **_):
    def call(*operands):
        outs = [Memory(np.full(o.shape, np.nan, o.dtype), False) for o in out_type]
        arrays = [Memory(np.array(a[...]), False) for a in operands]
        for place in np.ndindex(*grid):
            machine = Machine(seed + hash(place))
            machine.memories = []
            scratch = []
            for t in scratch_types:
                if isinstance(t, BarrierType):
                    scratch.append(Barrier(t.num_arrivals, t.num_barriers))
                else:
                    machine.memories.append(Memory(np.full(t.shape, np.nan, t.dtype), True))
                    scratch.append(machine.memories[-1].ref())
            refs = [m.ref() for m in (*arrays, *outs)]
            axes = dict(zip(grid_names, map(jnp.int32, place)))
            machine.run(lambda refs=refs, scratch=scratch: body(*refs, *scratch), num_threads, axes)
        for a, memory in zip(operands, arrays):
            if isinstance(a, Plain):  # a reference
                a[...] = jnp.asarray(memory.array)
        return [jnp.asarray(m.array) for m in outs]

    return call


@contextlib.contextmanager
def simulated(seed: int = 0):
    """Kernels for Mosaic GPU that are called in here, outside `jit`, run on the simulator; `seed`: of their order."""
    nothing = lambda *_, **__: None
    index = lambda name: jnp.int32(_here.group) if name == "group" else _here.axes[name]
    memory = dict(
        SMEM=lambda shape, dtype, transforms=(): Shared(shape, dtype),
        copy_gmem_to_smem=_to_shared,
        copy_smem_to_gmem=_to_global,
        commit_smem=_commit,
        wait_smem_to_gmem=_flush_stores,
        load=lambda ref, *_, **__: ref[...],
    )
    groups = dict(
        kernel=functools.partial(_kernel, seed),
        Barrier=BarrierType,
        barrier_arrive=_arrive,
        barrier_wait=_wait,
        set_max_registers=nothing,
    )
    products = dict(ACC=Acc, wgmma=_wgmma, wgmma_accumulator_load=_accumulated)
    swap = [
        (plgpu, memory | groups | products),
        (pl, dict(run_scoped=_run_scoped, run_state=_run_state, when=_when, loop=_loop)),
        (jax.lax, dict(axis_index=index, fori_loop=_fori)),
    ]
    old = [(module, name, getattr(module, name)) for module, names in swap for name in names]
    try:
        for module, names in swap:
            for name, value in names.items():
                setattr(module, name, value)
        yield
    finally:
        for module, name, value in old:
            setattr(module, name, value)
