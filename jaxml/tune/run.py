"""A training run on disk: its folder, its log, its checkpoints, and the signals that end it."""

import dataclasses
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxml import log
from jaxml.axes import Array, Params
from jaxml.checkpoint import Checkpoints


class State(NamedTuple):
    """What a step carries and a checkpoint holds."""

    trainable: Params
    opt_state: Any
    step: Array  # int32, optimizer steps done


class Stopped(Exception):
    """The run was asked to stop by a signal; its state is on disk."""

    def __init__(self, signum: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; the same command goes on from there."
        )
        self.signum, self.step = signum, step


class Run:
    """The folder of a run, or nothing where there is none."""

    def __init__(self, folder, options: Any, steps: int, counts: dict[str, int], best: str | None):
        self.folder = None if folder is None else Path(folder)
        self.about = {"options": dataclasses.asdict(options) | {"steps": steps}, **counts}
        self.options, self.best = options, best

    def __enter__(self) -> "Run":
        if self.folder is None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        agree(self.folder / "run.json", self.about, "fit")
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=self.options.keep, best=self.best)
        return self

    def restore(self, state: State) -> State:
        if self.folder is None:
            return state
        if self.checkpoints.steps():
            state = self.checkpoints.restore(state)
        self.log = log.JSONL(self.folder / "log.jsonl", resume_from=int(state.step))
        return state

    def write(self, **row) -> None:
        if self.folder is not None:
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
            self.checkpoints.close()
            if hasattr(self, "log"):
                self.log.close()


def agree(path: Path, about: dict[str, Any], who: str) -> None:
    """Writes what a run is about into its folder; where it was written before, refuses a run that is about another.

    Raises:
        ValueError: they differ.
    """
    if not path.is_file():
        log.write_text(path, json.dumps(about, indent=2))
        return
    then = json.loads(path.read_text())
    flat = lambda d: {k: v for k, v in d.items() if k != "options"} | d.get("options", {})
    before, now = flat(then), flat(about)
    differ = [k for k in now if before.get(k) != now[k]]
    if differ:
        what = ", ".join(f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in differ)
        raise ValueError(f"{who}: {path.parent} holds a run with other options ({what}). Choose another folder.")


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one acts as it would have."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(signum, frame):
        caught.append(signum)
        signal.signal(signum, before[signum])

    for s in before:
        signal.signal(s, note)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
