"""One training loop: any trainable tree, interrupted at any moment, resumed to the same bits."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxml import log, parallel
from jaxml.lm import decoder
from jaxml.lm.model import Model
from jaxml.parallel import hosts
from jaxml.tune import adapters, data
from jaxml.tune.options import MOST, USUAL, Options
from jaxml.tune.place import begun, check_length, check_mesh, for_training, over
from jaxml.tune.run import Diverged, Run, Stopped, check_finite, signals
from jaxml.tune.step import make_evaluate, make_step, optimizer


def fit(
    model: Model,
    examples: Sequence[dict[str, Any]],
    options: Options = USUAL,
    *,
    eval_examples: Sequence[dict[str, Any]] = (),
    anchors: Sequence[str | dict[str, Any]] = (),
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
        anchors: texts (strings, or examples) on which the adapted model shall go on saying what the model under the
            adapters says, so that learning the examples forgets less: each batch has rows of them, and the loss adds
            the mean Kullback–Leibler divergence of the next token from base to adapted model. Texts sampled from the
            model itself will do.
        tx: any Optax transformation, or a function that makes one of the number of steps; `optimizer(options, steps)`
            where None.
        folder: for checkpoints/, log.jsonl and run.json. A run that stopped there goes on, to the same bits
            that it would have reached undisturbed. Nothing is written where None.
        progress: show the progress bar.
        about: what else a run in the folder must agree in to be gone on with (of `tx`, or of the frozen weights); JSON.
            Options, tokens and the number of steps are agreed in without it.
        mesh: of `jaxml.parallel.mesh`: rows, weights, states and places of the sequence are spread over it, and the
            numbers are those of one device to the rounding of sums (with adapters that drop out, only where places of
            the sequence are not spread). It may be another one when a run goes on.

    Returns:
        The trained model, where the mesh has it, and a dictionary: steps, loss (of the last step), eval_loss, tokens,
        seconds, skipped (steps), rollbacks.

    Raises:
        ValueError: no examples, one longer than a row, anchors without adapters, a folder with a run of other
            options, or a batch that the mesh does not divide.
        Diverged: steps were skipped again and again, or what was trained is not finite in the end.
        RuntimeError: another process is at work in the folder.
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
    counts = {"examples": len(examples)} | ({"anchors": len(anchors)} if anchors else {})
    hosts.same(counts | {"options": o, "mesh": getattr(mesh, "shape", mesh), "held out": len(eval_examples)}, "fit")
    check_mesh(mesh, o, bool(anchors))
    check_length("fit", model.config, o.length, places, mesh.shape["context"] if mesh else 1)
    prepare = _prepare(model, o)
    if anchors and adapters.tasks(model.params):
        raise ValueError("fit: anchors are for one prompt, and the model has one for each task. Leave them out.")
    batches = prepare(examples, seed=o.seed)
    held = prepare(eval_examples, seed=0) if eval_examples else None
    anchors = [{"text": a} if isinstance(a, str) else a for a in anchors]
    kept = prepare(anchors, seed=o.seed, batch_size=o.anchor_rows, learn_all=True) if anchors else None
    steps = o.steps or max(1, round(o.epochs * batches.per_epoch / o.accumulate))
    if steps > MOST:
        raise ValueError(f"fit: a run has at most {MOST} steps, got {steps:.3g} by epochs={o.epochs}.")
    tx = optimizer(o, steps) if tx is None else tx(steps) if callable(tx) else tx

    given, untouched = adapters.split(model.params if mesh is None else parallel.shard(model.params, mesh))
    if kept and not untouched:
        raise ValueError("fit: anchors compare with the model under the adapters, and there are none. Attach some.")
    trainable, frozen = for_training(given, untouched, o)
    state, frozen, shardings, place = begun(trainable, frozen, tx, mesh)
    counts |= {"tokens_digest": batches.packed.digest()} | ({"anchors_digest": kept.packed.digest()} if kept else {})
    train_step, evaluate = make_step(model.config, tx, o, shardings), make_evaluate(model.config, o, place)

    with over(mesh), Run(folder, o, steps, counts | (about or {}), best="eval_loss" if held else None) as run:
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
                if last or (o.log_every and step % o.log_every == 0):
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
                measured = None
                if held and (last or (o.eval_every and step % o.eval_every == 0)):
                    measured = info["eval_loss"] = evaluate(state.trainable, frozen, held)
                    run.write(step=step, eval_loss=info["eval_loss"])
                signum = asked.asked(step)
                # What a bad step follows may be its cause: to go back there would not help.
                due = o.save_every and (step % o.save_every == 0 or measured is not None) and not bad
                if last:
                    check_finite(state, step)
                if last or due or signum:
                    run.save(step, state, measured)
                if signum or last:
                    run.wait()
                    if (signum := signum or asked.late()) and (folder is not None or not last):
                        raise Stopped(signum, step)
        info["seconds"] = time.perf_counter() - started
    trained = jax.tree.map(lambda new, old: new.astype(old.dtype), state.trainable, given)
    return model.replace(params=adapters.combine(trained, untouched)), info


def loss_of(model: Model, examples: Sequence[dict[str, Any]], options: Options = USUAL) -> float:
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


def _prepare(model: Model, o: Options) -> Callable[..., data.Batches]:
    """Examples to batches, as the options and the model want them."""
    return functools.partial(
        data.prepare, tokenizer=model.tokenizer, length=o.length, batch_size=o.batch_size, learn_all=o.learn_all,
        tasks=adapters.tasks(model.params),
    )  # fmt: skip


def _with_anchors(batch: dict[str, np.ndarray], anchors: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """The batch with rows of anchors below, which the cross entropy leaves out."""
    if anchors is None:
        return batch
    below = anchors | {"weights": np.zeros_like(anchors["weights"])}
    return {k: np.concatenate([batch[k], below[k]]) for k in batch} | {"anchors": anchors["weights"]}


def _stack(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {k: np.stack([p[k] for p in parts]) for k in parts[0]}
