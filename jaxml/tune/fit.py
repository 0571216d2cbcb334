"""One training loop: any trainable tree, interrupted at any moment, resumed to the same bits."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml import log, parallel
from jaxml.axes import Array, Params
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.lm.model import Model
from jaxml.optim.sharding import state_sharding
from jaxml.parallel import RULES, hosts
from jaxml.parallel.mesh import live
from jaxml.tune import adapters, data
from jaxml.tune.loss import cross_entropy, divergence
from jaxml.tune.run import Diverged, Guard, Run, State, Stopped, begin, signals

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
        anchor_rows, anchor_weight: where `fit` is given anchors: their rows in each batch, and the factor of
            their part of the loss.
        seed: of the order of the data.
        save_every, eval_every, log_every: in steps (0: at the end only).
        keep: checkpoints to keep, beside the best by held-out loss.
        spike: a gradient whose norm is more than this many times the median of the last 64 is skipped, as one that is
            not finite always is (None: only those). Its batch is passed over, and nothing of the state changes.
        patience: so many skipped steps in a row, and the run goes back to its last checkpoint and on with the batches
            that follow; at most `rollbacks` times.
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
    anchor_rows: int = 1
    anchor_weight: float = 1.0
    seed: int = 0
    save_every: int = 100
    eval_every: int = 0
    log_every: int = 1
    keep: int = 3
    spike: float | None = None
    patience: int = 5
    rollbacks: int = 3

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "length", "keep", "anchor_rows", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"Options: {name} is at least 1, got {getattr(self, name)}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Options: steps is at least 1, got {self.steps}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Options: schedule is one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        if self.spike is not None and self.spike <= 1:
            raise ValueError(f"Options: spike is above 1, got {self.spike}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"Options: warmup is in [0, 1), got {self.warmup}.")


def fit(
    model: Model,
    examples: Sequence[dict[str, Any]],
    options: Options = Options(),
    *,
    eval_examples: Sequence[dict[str, Any]] = (),
    anchors: Sequence[dict[str, Any]] = (),
    tx: optax.GradientTransformation | Callable[[int], optax.GradientTransformation] | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    about: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains a model: its adapters where it has any (`adapters.attach`), all of its parameters otherwise.

    Args:
        model: gradients are taken of the trainable tree only; the rest is an argument of the step.
        examples: in the forms of `tune.data`.
        eval_examples: held out; their loss is logged, and chooses the best checkpoint.
        anchors: texts on which the adapted model shall go on saying what the model under the adapters says, so
            that learning the examples forgets less: each batch has rows of them, and the loss adds the mean
            Kullback–Leibler divergence of the next token from base to adapted model. Texts sampled from the
            model itself will do.
        tx: any Optax transformation, or a function that makes one of the number of steps; `optimizer(options, steps)`
            where None.
        folder: for checkpoints/, log.jsonl and run.json. A run that stopped there goes on, to the same bits
            that it would have reached undisturbed. Nothing is written where None.
        progress: show the progress bar.
        about: what else a run in the folder must agree in to be gone on with (of `tx`, perhaps); JSON.
        mesh: of `jaxml.parallel.mesh`: rows, weights, states and places of the sequence are spread over it, and the
            numbers are those of one device to the rounding of sums. It may be another one when a run goes on.

    Returns:
        The trained model, where the mesh has it, and a dictionary: steps, loss (of the last step), eval_loss, tokens,
        seconds, skipped (steps), rollbacks.

    Raises:
        ValueError: no examples, one longer than a row, anchors without adapters, a folder with a run of other
            options, or a batch that the mesh does not divide.
        Diverged: steps were skipped again and again.
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
    places = decoder.num_places(model.params)
    if o.length + places > model.config.max_length:
        also = f" and {places} of a prompt" if places else ""
        raise ValueError(
            f"fit: length is at most the context of {model.config.max_length} tokens, got {o.length}{also}."
        )
    prepare = _prepare(model, o)
    if anchors and adapters.tasks(model.params):
        raise ValueError("fit: anchors are for one prompt, and the model has one for each task. Leave them out.")
    batches = prepare(examples, seed=o.seed)
    held = prepare(eval_examples, seed=0) if eval_examples else None
    kept = prepare(anchors, seed=o.seed, batch_size=o.anchor_rows, learn_all=True) if anchors else None
    steps = o.steps or max(1, round(o.epochs * batches.per_epoch / o.accumulate))
    tx = optimizer(o, steps) if tx is None else tx(steps) if callable(tx) else tx

    _check_mesh(mesh, o, kept is not None)
    given, untouched = adapters.split(model.params)
    if kept and not untouched:
        raise ValueError("fit: anchors compare with the model under the adapters, and there are none. Attach some.")
    trainable, frozen = for_training(given, untouched, o)
    state, frozen, shardings, place = _begun(trainable, frozen, tx, mesh)
    counts = {"examples": len(examples)} | ({"anchors": len(anchors)} if anchors else {})
    train_step, evaluate = make_step(model.config, tx, o, shardings), make_evaluate(model.config, o, place)

    with _over(mesh), Run(folder, o, steps, counts | (about or {}), best="eval_loss" if held else None) as run:
        state = run.restore(state)
        info: dict[str, Any] = {"steps": steps, "loss": None, "eval_loss": None, "tokens": 0}
        info |= {"skipped": 0, "rollbacks": 0}
        started, first = time.perf_counter(), int(state.step)
        fields = dict(loss="–", speed="–")
        shown = progress and hosts.is_main()
        with log.progress("training", enabled=shown, fields=("loss", "speed")) as bar, signals() as asked:
            task = bar.add_task("train", total=steps, completed=first, **fields)
            step, passed = first, int(state.guard.passed)
            while step < steps:
                step += 1
                numbers = [(step - 1 + passed) * o.accumulate + i for i in range(o.accumulate)]
                batch = _stack([_with_anchors(batches(n), kept and kept(n)) for n in numbers])
                state, metrics = train_step(state, frozen, place(batch))
                info["loss"] = float(metrics["loss"])  # waits for the step
                info["tokens"] += int((batch["segment_ids"] > 0).sum())
                speed = info["tokens"] / (time.perf_counter() - started)
                bar.update(task, completed=step, loss=f"{info['loss']:.3f}", speed=f"{speed:,.0f} tokens/s")
                last, norm = step == steps, float(metrics["grad_norm"])
                if last or step % o.log_every == 0:
                    run.write(step=step, loss=info["loss"], grad_norm=norm, tokens_per_s=speed)
                if bad := int(metrics["bad"]):
                    info["skipped"] += 1
                    why = f"step {step} was skipped, its loss is {info['loss']:.4g} and its gradient's norm {norm:.4g}"
                    bar.console.print(why, highlight=False) if shown else None
                    run.write(step=step, skipped=why)
                    if bad >= o.patience:
                        info["rollbacks"] += 1
                        why = f"{bad} steps up to {step} were skipped in a row"
                        if info["rollbacks"] > o.rollbacks:
                            raise Diverged(f"fit: {why}, after {o.rollbacks} rollbacks. Lower the learning rate.")
                        state = run.rolled_back(state, why)
                        step, passed = int(state.step), int(state.guard.passed)
                        continue
                if held and (last or (o.eval_every and step % o.eval_every == 0)):
                    info["eval_loss"] = evaluate(state.trainable, frozen, held)
                    run.write(step=step, eval_loss=info["eval_loss"])
                signum = asked.asked(step)
                if last or (o.save_every and step % o.save_every == 0) or signum:
                    run.save(step, state, info["eval_loss"])
                if signum and not last:
                    run.wait()
                    raise Stopped(signum, step)
        info["seconds"] = time.perf_counter() - started
    trained = jax.tree.map(lambda new, old: new.astype(old.dtype), state.trainable, given)
    return model.replace(params=adapters.combine(trained, untouched)), info


def optimizer(options: Options, steps: int, around=lambda adamw: adamw) -> optax.GradientTransformation:
    """AdamW after clipping, with the schedule of the options.

    Args:
        around: what to make of AdamW, as `lambda adamw: galore(adamw, rank=128)`.
    """
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
    return optax.chain(*clip, around(optax.adamw(rate, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay)))


def make_step(config: DecoderConfig, tx: optax.GradientTransformation, options: Options, shardings: Any = None):
    """The jitted step: (state, frozen, batch [accumulate, B, T] each) → (state, metrics); consumes the state.

    Args:
        shardings: of the state that it returns; where XLA puts it, if None.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings and (shardings, None))
    def step(state: State, frozen: Params, batch: dict[str, Array]) -> tuple[State, dict[str, Array]]:
        grad = jax.value_and_grad(functools.partial(batch_loss, config=config, options=options), has_aux=True)

        key = jax.random.fold_in(jax.random.key(options.seed), state.step)  # of dropout
        (total, count), grads = _summed(grad, state.trainable, frozen, batch, key)
        count = jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, state.trainable)
        loss, norm = total / count, optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~_spikes(state.guard, norm, options.spike)

        def update(trainable, opt_state):
            updates, opt_state = tx.update(grads, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state

        keep = lambda trainable, opt_state: (trainable, opt_state)
        trainable, opt_state = jax.lax.cond(good, update, keep, state.trainable, state.opt_state)
        norms = jnp.where(good, jnp.roll(state.guard.norms, 1).at[0].set(norm), state.guard.norms)
        bad = jnp.where(good, 0, state.guard.bad + 1)
        metrics = {"loss": loss, "grad_norm": norm, "bad": bad}
        return State(trainable, opt_state, state.step + 1, Guard(norms, bad, state.guard.passed)), metrics

    return step


def _spikes(guard: Guard, norm: Array, spike: float | None) -> Array:
    """Whether a gradient is far above the last ones, once there are enough of them to know."""
    if spike is None:
        return jnp.zeros((), bool)
    known = jnp.sum(jnp.isfinite(guard.norms))
    return (known >= 16) & (norm > spike * jnp.nanmedian(guard.norms))


def _summed(grad: Callable, trainable: Params, frozen: Params, batch: dict[str, Array], key: Array):
    """((Σ loss, Σ weights), gradients) over all batches of a step.

    Devices that have the weights whole add up their own rows' gradients first, and each other's once: where batches
    are accumulated and rows have nothing in common (dropout's numbers and anchors are of a whole batch).
    """
    accumulate = batch["tokens"].shape[0]
    if accumulate == 1:
        return grad(trainable, frozen, jax.tree.map(lambda a: a[0], batch), key=key)

    def over_batches(trainable, frozen, batch):
        def micro(sums, numbered):
            number, part = numbered
            more = grad(trainable, frozen, part, key=jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, sums, more), None

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), trainable)
        zeros = ((jnp.zeros(()), jnp.zeros(())), zeros)
        return jax.lax.scan(micro, zeros, (jnp.arange(accumulate), batch))[0]

    rows = tuple(axis for axis in ("data", "expert") if axis in live())
    if not rows or "anchors" in batch or any(getattr(w, "dropout", 0) for w in adapters.tree.of(frozen).values()):
        return over_batches(trainable, frozen, batch)

    # Without the check gradients inside are a device's own.
    own = lambda *given: jax.lax.psum(over_batches(*given), rows)
    specs = dict(in_specs=(P(), P(), P(None, rows)), out_specs=P())
    return jax.shard_map(own, **specs, axis_names=set(rows), check_vma=False)(trainable, frozen, batch)


def make_evaluate(config: DecoderConfig, options: Options, place: Callable = lambda batch: batch):
    """(trainable, frozen, batches) → mean loss of a learnt token over one pass; `place` puts a batch on devices."""
    loss = jax.jit(functools.partial(batch_loss, config=config, options=options))

    def evaluate(trainable: Params, frozen: Params, batches: data.Batches) -> float:
        sums = [loss(trainable, frozen, place(batches(i))) for i in range(batches.per_epoch)]
        total, count = (float(sum(float(s[i]) for s in sums)) for i in (0, 1))
        return total / max(count, 1.0)

    return evaluate


def loss_of(model: Model, examples: Sequence[dict[str, Any]], options: Options = Options()) -> float:
    """The mean loss of a learnt token over examples, in nats, in the rows and the dtype of the options.

    Example:
        >>> from jaxml import testing
        >>> loss_of(testing.tiny_model(), [{"prompt": "hi ", "response": "you"}], Options(length=16)) > 0
        True
    """
    o = options
    rows = _prepare(model, o)(examples)
    trainable, frozen = adapters.split(decoder.cast(model.params, o.dtype) if o.dtype else model.params)
    return make_evaluate(model.config, o)(trainable, frozen, rows)


def batch_loss(
    trainable: Params,
    frozen: Params,
    batch: dict[str, Array],
    *,
    config: DecoderConfig,
    options: Options,
    key: Array | None = None,
) -> tuple[Array, Array]:
    """(Σ loss, Σ weights) of one batch [B, T], in float32; where adapters drop out, `key` decides what.

    With "anchors" in the batch, its last `options.anchor_rows` rows are anchors and that array their weights.
    """
    params = adapters.combine(decoder.cast(trainable, options.dtype) if options.dtype else trainable, frozen)
    params = decoder.unstack(params) if options.unroll else params
    params = params if key is None else adapters.with_key(params, key)
    params = adapters.select(params, batch["tasks"][:, 0]) if "tasks" in batch else params
    x = decoder.hidden(
        params,
        config,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        remat=options.remat,
    )
    head, soft_cap = decoder.head(params), config.logits_soft_cap
    total, count = cross_entropy(x, head, batch["targets"], batch["weights"], soft_cap=soft_cap)
    if "anchors" not in batch:
        return total, count
    last = lambda name: batch[name][-options.anchor_rows :]
    kept = adapters.detach(frozen)
    base = decoder.hidden(kept, config, last("tokens"), positions=last("positions"), segment_ids=last("segment_ids"))
    distance, places = divergence(
        base, x[-options.anchor_rows :], head, batch["anchors"], base_head=decoder.head(kept), soft_cap=soft_cap
    )
    return total + options.anchor_weight * count * distance / jnp.maximum(places, 1.0), count


def _begun(trainable: Params, frozen: Params, tx: optax.GradientTransformation, mesh: Mesh | None):
    """(state, frozen, shardings of the state, what places a batch): on the mesh, if there is one."""
    if mesh is None:
        return begin(trainable, tx), frozen, None, lambda batch: batch
    trainable, frozen = parallel.shard(trainable, mesh), parallel.shard(frozen, mesh)
    shardings = state_shardings(trainable, tx, mesh)
    with jax.set_mesh(mesh):
        without = lambda state: state._replace(trainable=None)
        rest = jax.jit(lambda t: without(begin(t, tx)), out_shardings=without(shardings))(trainable)
    state = rest._replace(trainable=trainable)
    return state, frozen, shardings, functools.partial(hosts.place, on=mesh)


def state_shardings(trainable: Params, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """Where the arrays of a run's state lie, by what is trained (arrays, or shapes, that have shardings)."""
    whole = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda a: whole, jax.eval_shape(lambda t: begin(t, tx), trainable))
    placed = jax.tree.map(lambda a: a.sharding, trainable)
    return shardings._replace(trainable=placed, opt_state=state_sharding(tx, trainable))


def _over(mesh: Mesh | None):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _check_mesh(mesh: Mesh | None, o: Options, anchored: bool) -> None:
    if mesh is None:
        return
    if missing := [axis for axis in parallel.AXES if axis not in mesh.shape]:
        raise ValueError(f"fit: the mesh has the axes {', '.join(parallel.AXES)}, got none called {missing[0]}.")
    rows, parts = o.batch_size + anchored * o.anchor_rows, math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if rows % parts:
        raise ValueError(
            f"fit: rows of a batch are a multiple of data · fsdp · expert = {parts} of the mesh, got {rows}"
            f"{' with anchor_rows' if anchored else ''}. Change batch_size, or spread over tensor or context."
        )
    if o.length % mesh.shape["context"]:
        raise ValueError(f"fit: length is a multiple of context = {mesh.shape['context']}, got {o.length}.")


def _prepare(model: Model, o: Options) -> Callable[..., data.Batches]:
    """Examples to batches, as the options and the model want them."""
    return functools.partial(
        data.prepare, tokenizer=model.tokenizer, length=o.length, batch_size=o.batch_size, learn_all=o.learn_all,
        tasks=adapters.tasks(model.params),
    )  # fmt: skip


def for_training(given: Params, untouched: Params, o: Options) -> tuple[Params, Params]:
    """(trainable, frozen) in the dtypes that they are kept in."""
    # The step consumes its state; the caller's arrays stay alive.
    trainable = jax.tree.map(lambda a: jnp.array(a, _kept_dtype(a, o), copy=True), given)
    frozen = decoder.cast(untouched, o.dtype) if o.dtype else untouched
    return trainable, decoder.unstack(frozen) if o.unroll and frozen else frozen


def _kept_dtype(a: Array, o: Options):
    return jnp.float32 if o.master and jnp.issubdtype(a.dtype, jnp.floating) else a.dtype


def _with_anchors(batch: dict[str, np.ndarray], anchors: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """The batch with rows of anchors below, which the cross entropy leaves out."""
    if anchors is None:
        return batch
    below = anchors | {"weights": np.zeros_like(anchors["weights"])}
    return {k: np.concatenate([batch[k], below[k]]) for k in batch} | {"anchors": anchors["weights"]}


def _stack(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {k: np.stack([p[k] for p in parts]) for k in parts[0]}
