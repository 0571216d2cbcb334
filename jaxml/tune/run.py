"""A training run on disk: its folder, its log, its checkpoints, and the signals that end it."""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxml import files, log
from jaxml.axes import Array, Float, Params
from jaxml.checkpoint import Checkpoints
from jaxml.parallel import hosts

SEEN_S = 60  # a file that one host has written is seen by the others within


class Guard(NamedTuple):
    """What is remembered of steps that went well, to tell those that do not."""

    norms: Float[Array, "64"]  # of the last gradients that were taken; NaN where there was none yet
    bad: Array  # int32, steps in a row that were skipped
    passed: Array  # int32, steps whose batches were passed over when the run was rolled back


class State(NamedTuple):
    """What a step carries and a checkpoint holds."""

    trainable: Params
    opt_state: Any
    step: Array  # int32, optimizer steps done, skipped ones among them
    guard: Guard


def begin(trainable: Params, tx: optax.GradientTransformation) -> State:
    """The state before the first step; steps consume it, so that none of its arrays is another's."""
    number = lambda: jnp.zeros((), jnp.int32)
    return State(trainable, tx.init(trainable), number(), Guard(jnp.full(64, jnp.nan, jnp.float32), number(), number()))


class Stopped(Exception):
    """The run was asked to stop by a signal; its state is on disk.

    Example:
        >>> print(Stopped(signal.SIGTERM, 40))
        stopped by SIGTERM after step 40; the same command goes on from there.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; the same command goes on from there."
        )
        self.signum, self.step = signum, step


class Diverged(ArithmeticError):
    """Steps were skipped one after the other, and going back did not help.

    Example:
        >>> issubclass(Diverged, Exception)
        True
    """


def check_finite(state: State, step: int) -> None:
    """Refuses to end with what no one can use.

    Raises:
        Diverged: a trained number is not finite, or every step was skipped.
    """
    if not bool(_finite(state.trainable)):
        raise Diverged(f"fit: what was trained is not finite after step {step}. Lower the learning rate.")
    if not bool(jnp.any(jnp.isfinite(state.guard.norms))):
        raise Diverged(
            f"fit: each of {step} steps was skipped, its loss or gradient was not finite. See to the model's weights "
            "and the examples."
        )


@jax.jit
def _finite(tree: Params) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)]))


class Run:
    """The folder of a run, or nothing where there is none. Of several processes one writes, but all save."""

    def __init__(self, folder, options: Any, steps: int, counts: dict[str, int], best: str | None):
        self.folder = None if folder is None else Path(folder)
        self.about = {"options": dataclasses.asdict(options) | {"steps": steps}, **counts}
        self.options, self.best = options, best

    def __enter__(self) -> "Run":
        if self.folder is None:
            return self
        with contextlib.ExitStack() as opened:
            hosts.together(lambda: self._open(opened) if hosts.is_main() else None)
            # The others are to see what that one wrote there.
            hosts.together(lambda: None if hosts.is_main() else self._agree())
            self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=self.options.keep, best=self.best)
            self._opened = opened.pop_all()
        return self

    def _open(self, opened: contextlib.ExitStack) -> None:
        opened.enter_context(alone(self.folder))
        self._agree()

    def _agree(self) -> None:
        agree(self.folder / "run.json", self.about, "fit")

    def restore(self, state: State) -> State:
        if self.folder is None:
            return state
        if self.checkpoints.steps():
            state = self.checkpoints.restore(state)
        if hosts.is_main():
            self.log = log.JSONL(self.folder / "log.jsonl", resume_from=int(state.step))
        return state

    def rolled_back(self, state: State, why: str) -> State:
        """The last checkpoint, whose next batches are those after the present one.

        Raises:
            Diverged: there is none.
        """
        step = int(state.step)
        if self.folder is not None:
            self.wait()
        if self.folder is None or not self.checkpoints.steps():
            raise Diverged(f"fit: {why}, and there is no checkpoint to go back to. Lower the learning rate.")
        old = self.checkpoints.restore(state)
        good = jax.device_put(jnp.zeros((), jnp.int32), old.guard.bad.sharding)
        passed = old.guard.passed + (step - int(old.step))
        self.write(step=step, rolled_back_to=int(old.step), why=why)
        passed = jax.device_put(passed, old.guard.passed.sharding)
        return old._replace(guard=old.guard._replace(passed=passed, bad=good))

    def write(self, **row) -> None:
        if hasattr(self, "log"):
            self.log.write(**row)

    def save(self, step: int, state: State, eval_loss: float | None) -> None:
        if self.folder is not None:
            metrics = None if eval_loss is None else {"eval_loss": eval_loss}
            # The next step consumes the state while the files are being written: save copies.
            self.checkpoints.save(step, jax.tree.map(jnp.copy, state), metrics)

    def wait(self) -> None:
        if self.folder is not None:
            self.checkpoints.wait()

    def __exit__(self, *_) -> None:
        if self.folder is not None:
            with self._opened:
                self.checkpoints.close()
                if hasattr(self, "log"):
                    self.log.close()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A run's folder, made if it is not there, that no other process has meanwhile.

    Raises:
        OSError: it cannot be made or written.
        RuntimeError: another process has it.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.locked(folder / ".lock"))
        except BlockingIOError as error:
            raise RuntimeError(
                f"{folder}: another process is at work in this folder. Wait for it, or choose another."
            ) from error
        except OSError as error:
            raise OSError(
                f"{folder}: a run's folder is one that can be made and written ({error.strerror}). Choose another."
            ) from error
        yield


def agree(path: Path, about: dict[str, Any], who: str) -> None:
    """Writes what a run is about into its folder; where it was written before, refuses a run that is about another.

    Of several processes the main one writes, and comes first.

    Raises:
        ValueError: they differ.
    """
    about = json.loads(json.dumps(about, default=_plain))
    if not _is_there(path, SEEN_S):
        if not hosts.is_main():
            raise ValueError(
                f"{who}: a run's folder is one that all processes share, and {path.parent} is none: "
                f"{path.name}, which process 0 wrote, is not there."
            )
        if path.exists() or any((path.parent / "checkpoints").glob("[0-9]*")):
            raise ValueError(
                f"{who}: {path.parent} holds checkpoints, but no file {path.name} that says what they are of. Choose "
                "another folder."
            )
        log.write_text(path, json.dumps(about, indent=2))
        return
    flat = lambda d: {k: v for k, v in d.items() if k != "options"} | d.get("options", {})
    try:
        with files.reading(path, "a run"):
            before, now = flat(files.read_json(path)), flat(about)
    except ValueError as error:
        raise ValueError(f"{error} It says what the run was about: choose another folder.") from error
    differ = [k for k in now if before.get(k) != now[k]]
    if differ:
        what = ", ".join(f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in differ)
        raise ValueError(f"{who}: {path.parent} holds a run of other options or data ({what}). Choose another folder.")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def _is_there(path: Path, seconds: float) -> bool:
    """Whether the main process has written a file; other hosts may see that a while later."""
    end = time.monotonic() + (0 if hosts.is_main() else seconds)
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # a network's file system looks again
    return path.is_file()


class Signals:
    """Whether the run was asked to stop; of several processes all stop after the same step."""

    def __init__(self):
        self.caught: list[int] = []

    def asked(self, step: int) -> int | None:
        """The signal, if this step is the last one; ask after every step, in all processes."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # SIGTERM to any process is passed on to all by JAX, which takes notice of it itself.
            reached = multihost_utils.reached_preemption_sync_point(step)
            return (self.caught or [signal.SIGTERM])[0] if reached else None
        return self.caught[0] if self.caught else None

    def late(self) -> int | None:
        """One that came while the last step was being saved; several processes end together without it."""
        return self.caught[0] if self.caught and jax.process_count() == 1 else None


@contextmanager
def signals() -> Iterator[Signals]:
    """Collects SIGINT and SIGTERM; a second one acts as it would have."""
    asked, many = Signals(), jax.process_count() > 1
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM) if s == signal.SIGINT or not many}

    def note(signum, frame):
        asked.caught.append(signum)
        signal.signal(signum, before[signum])
        if many:
            os.kill(os.getpid(), signal.SIGTERM)

    for s in before:
        signal.signal(s, note)
    try:
        yield asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
