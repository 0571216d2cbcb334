"""One training loop: any trainable tree, interrupted at any moment, resumed to the same bits."""

import dataclasses
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxml import log
from jaxml.axes import Array, Params
from jaxml.checkpoint import Checkpoints
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.lm.model import Model
from jaxml.tune import adapters, data
from jaxml.tune.loss import cross_entropy

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run trains; a run is resumed only with the options that it began with.

    Args:
        steps: optimizer steps; from `epochs` where None.
        epochs: passes over the packed rows.
        batch_size: rows a step takes forward at once.
        accumulate: such batches per optimizer step; their losses are summed, then divided by all their tokens.
        length: tokens a row.
        learning_rate: at the top of the schedule.
        schedule: "constant", "linear" or "cosine" (to 0), after the warm-up.
        warmup: share of the steps over which the rate rises from 0.
        weight_decay, b1, b2: of AdamW.
        clip: global norm of the gradient at most (None: never).
        remat: recompute each layer backwards instead of keeping its activations.
        unroll: unroll the layers instead of scanning them: no copy of each layer's weights and activations, at
            twice the compile time and, with adapters, a copy of the frozen layers. Faster on CPU.
        dtype: to compute in ("bfloat16"); the parameters' own where None.
        master: keep the trained parameters and the optimizer in float32 whatever `dtype` is.
        learn_all: the loss counts prompts as well as responses.
        seed: of the order of the data.
        save_every, eval_every, log_every: in steps (0: at the end only).
        keep: checkpoints to keep, beside the best by held-out loss.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    length: int = 512
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip: float | None = 1.0
    remat: bool = False
    unroll: bool = False
    dtype: str | None = None
    master: bool = True
    learn_all: bool = False
    seed: int = 0
    save_every: int = 100
    eval_every: int = 0
    log_every: int = 1
    keep: int = 3

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "length", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"Options: {name} is at least 1, got {getattr(self, name)}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Options: steps is at least 1, got {self.steps}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Options: schedule is one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"Options: warmup is in [0, 1), got {self.warmup}.")


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


def fit(
    model: Model,
    examples: Sequence[dict[str, Any]],
    options: Options = Options(),
    *,
    eval_examples: Sequence[dict[str, Any]] = (),
    tx: optax.GradientTransformation | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> tuple[Model, dict[str, Any]]:
    """Trains a model: its adapters where it has any (`adapters.attach`), all of its parameters otherwise.

    Args:
        model: gradients are taken of the trainable tree only; the rest is an argument of the step.
        examples: in the three forms of `tune.data`.
        eval_examples: held out; their loss is logged, and chooses the best checkpoint.
        tx: any Optax transformation; AdamW with clipping and the schedule of `options` where None.
        folder: for checkpoints/, log.jsonl and run.json. A run that stopped there goes on, to the same bits
            that it would have reached undisturbed. Nothing is written where None.
        progress: show the progress bar.

    Returns:
        The trained model, and a dictionary: steps, loss (of the last step), eval_loss, tokens, seconds.

    Raises:
        ValueError: no examples, one longer than a row, or a folder with a run of other options.
        Stopped: SIGINT or SIGTERM came; the state was saved.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> tuned, info = fit(model, [{"prompt": "hi ", "response": "you"}],
        ...                   Options(steps=3, batch_size=1, length=16), progress=False)
        >>> info["steps"]
        3
    """
    o = options
    if o.length > model.config.max_length:
        raise ValueError(f"fit: length is at most the context of {model.config.max_length} tokens, got {o.length}.")
    prepare = functools.partial(
        data.prepare, tokenizer=model.tokenizer, length=o.length, batch_size=o.batch_size, learn_all=o.learn_all
    )
    batches = prepare(examples, seed=o.seed)
    held = prepare(eval_examples, seed=0) if eval_examples else None
    steps = o.steps or max(1, round(o.epochs * batches.per_epoch / o.accumulate))
    tx = optimizer(o, steps) if tx is None else tx

    trainable, frozen = adapters.split(model.params)
    # The step consumes its state; the caller's arrays stay alive.
    trainable = jax.tree.map(lambda a: jnp.array(a, _kept_dtype(a, o), copy=True), trainable)
    frozen = decoder.cast(frozen, o.dtype) if o.dtype else frozen
    frozen = decoder.unstack(frozen) if o.unroll and frozen else frozen
    state = State(trainable, tx.init(trainable), jnp.zeros((), jnp.int32))
    train_step, evaluate = make_step(model.config, tx, o), make_evaluate(model.config, o)

    with _Run(folder, o, steps, examples, best="eval_loss" if held else None) as run:
        state = run.restore(state)
        info: dict[str, Any] = {"steps": steps, "loss": None, "eval_loss": None, "tokens": 0}
        started, first = time.perf_counter(), int(state.step)
        fields = dict(loss="–", speed="–")
        with log.progress("training", enabled=progress, fields=("loss", "speed")) as bar, _signals() as caught:
            task = bar.add_task("train", total=steps, completed=first, **fields)
            for step in range(first + 1, steps + 1):
                batch = _stack([batches((step - 1) * o.accumulate + i) for i in range(o.accumulate)])
                state, metrics = train_step(state, frozen, batch)
                info["loss"] = float(metrics["loss"])  # waits for the step
                info["tokens"] += int((batch["segment_ids"] > 0).sum())
                speed = info["tokens"] / (time.perf_counter() - started)
                bar.update(task, advance=1, loss=f"{info['loss']:.3f}", speed=f"{speed:,.0f} tokens/s")
                last = step == steps
                if last or step % o.log_every == 0:
                    run.write(step=step, loss=info["loss"], grad_norm=float(metrics["grad_norm"]), tokens_per_s=speed)
                if held and (last or (o.eval_every and step % o.eval_every == 0)):
                    info["eval_loss"] = evaluate(state.trainable, frozen, held)
                    run.write(step=step, eval_loss=info["eval_loss"])
                if last or (o.save_every and step % o.save_every == 0) or caught:
                    run.save(step, state, info["eval_loss"])
                if caught and not last:
                    run.wait()
                    raise Stopped(caught[0], step)
        info["seconds"] = time.perf_counter() - started
    trainable = jax.tree.map(lambda new, old: new.astype(old.dtype), state.trainable, adapters.split(model.params)[0])
    return model.replace(params=adapters.combine(trainable, adapters.split(model.params)[1])), info


def optimizer(options: Options, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping, with the schedule of the options."""
    o, warm = options, round(options.warmup * steps)
    top = o.learning_rate
    rest = max(steps - warm, 1)
    after = {
        "constant": optax.constant_schedule(top),
        "linear": optax.linear_schedule(top, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(top, rest),
    }[o.schedule]
    rate = optax.join_schedules([optax.linear_schedule(0.0, top, warm), after], [warm]) if warm else after
    clip = [optax.clip_by_global_norm(o.clip)] if o.clip else []
    return optax.chain(*clip, optax.adamw(rate, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay))


def make_step(config: DecoderConfig, tx: optax.GradientTransformation, options: Options):
    """The jitted step: (state, frozen, batch [accumulate, B, T] each) → (state, metrics); consumes the state."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Params, batch: dict[str, Array]) -> tuple[State, dict[str, Array]]:
        grad = jax.value_and_grad(functools.partial(batch_loss, config=config, options=options), has_aux=True)

        def micro(sums, part):
            (total, count), grads = grad(state.trainable, frozen, part)
            return jax.tree.map(jnp.add, sums, (total, count, grads)), None

        if options.accumulate == 1:
            (total, count), grads = grad(state.trainable, frozen, jax.tree.map(lambda a: a[0], batch))
        else:
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), state.trainable)
            zeros = (jnp.zeros(()), jnp.zeros(()), zeros)
            (total, count, grads), _ = jax.lax.scan(micro, zeros, batch)
        count = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, state.trainable)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": total / count, "grad_norm": optax.tree.norm(grads)}
        return State(trainable, opt_state, state.step + 1), metrics

    return step


def make_evaluate(config: DecoderConfig, options: Options):
    """(trainable, frozen, batches) → mean loss of a learnt token over one pass."""
    loss = jax.jit(functools.partial(batch_loss, config=config, options=options))

    def evaluate(trainable: Params, frozen: Params, batches: data.Batches) -> float:
        sums = [loss(trainable, frozen, batches(i)) for i in range(batches.per_epoch)]
        total, count = (float(sum(float(s[i]) for s in sums)) for i in (0, 1))
        return total / max(count, 1.0)

    return evaluate


def batch_loss(
    trainable: Params, frozen: Params, batch: dict[str, Array], *, config: DecoderConfig, options: Options
) -> tuple[Array, Array]:
    """(Σ loss, Σ weights) of one batch [B, T], in float32."""
    params = adapters.combine(decoder.cast(trainable, options.dtype) if options.dtype else trainable, frozen)
    params = decoder.unstack(params) if options.unroll else params
    x = decoder.hidden(
        params,
        config,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        remat=options.remat,
    )
    return cross_entropy(x, decoder.head(params), batch["targets"], batch["weights"], soft_cap=config.logits_soft_cap)


def _kept_dtype(a: Array, o: Options):
    return jnp.float32 if o.master and jnp.issubdtype(a.dtype, jnp.floating) else a.dtype


def _stack(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {k: np.stack([p[k] for p in parts]) for k in parts[0]}


# ---- what is on disk --------------------------------------------------------------------------------


class _Run:
    """The folder of a run, or nothing where there is none."""

    def __init__(self, folder, options: Options, steps: int, examples, best: str | None):
        self.folder = None if folder is None else Path(folder)
        self.about = {"options": dataclasses.asdict(options) | {"steps": steps}, "examples": len(examples)}
        self.options, self.best = options, best

    def __enter__(self) -> "_Run":
        if self.folder is None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.json"
        if path.is_file():
            _same_run(path, self.about)
        else:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.about, indent=2))
            os.replace(temporary, path)
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


def _same_run(path: Path, about: dict[str, Any]) -> None:
    then = json.loads(path.read_text())
    flat = lambda d: {"examples": d.get("examples")} | d.get("options", {})
    before, now = flat(then), flat(about)
    differ = [k for k in now if before.get(k) != now[k]]
    if differ:
        what = ", ".join(f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in differ)
        raise ValueError(f"fit: {path.parent} holds a run with other options ({what}). Choose another folder.")


@contextmanager
def _signals() -> Iterator[list[int]]:
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
