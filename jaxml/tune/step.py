"""What one step of training computes, whatever is trained and wherever it lies."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxml.axes import Array, Params
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.parallel.mesh import live
from jaxml.tune import adapters, data
from jaxml.tune.loss import cross_entropy, divergence
from jaxml.tune.options import Options
from jaxml.tune.run import Guard, State


def optimizer(options: Options, steps: int, around=lambda adamw: adamw) -> optax.GradientTransformation:
    """AdamW after clipping, with the schedule of the options.

    Args:
        around: what to make of AdamW, as `lambda adamw: galore(adamw, rank=128)`.

    Example:
        >>> tx = optimizer(Options(learning_rate=1e-3), steps=100)
        >>> tx.init({"w": jnp.zeros(3)}) is not None
        True
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

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune.run import begin
        >>> model, tx = testing.tiny_model(num_layers=1), optax.sgd(0.1)
        >>> examples = data.pack([data.Encoded([4, 5, 6], [1, 1, 1])], length=8)
        >>> batch = {name: a[None] for name, a in data.Batches(examples, 1)(0).items()}
        >>> step = make_step(model.config, tx, Options(length=8))
        >>> state, before = step(begin(model.params, tx), {}, batch)
        >>> state, after = step(state, {}, batch)
        >>> bool(after["loss"] < before["loss"]), state.step.item()
        (True, 2)
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
    """(trainable, frozen, batches) → mean loss of a learnt token over one pass; `place` puts a batch on devices.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model(num_layers=1)
        >>> nothing = jax.tree.map(jnp.zeros_like, model.params)   # all 64 tokens are alike
        >>> batches = data.Batches(data.pack([data.Encoded([4, 5, 6], [1, 1, 1])], length=8), batch_size=1)
        >>> round(make_evaluate(model.config, Options(length=8))(nothing, {}, batches), 3)   # log 64
        4.159
    """
    loss = jax.jit(functools.partial(batch_loss, config=config, options=options))

    def evaluate(trainable: Params, frozen: Params, batches: data.Batches) -> float:
        sums = [loss(trainable, frozen, place(batches(i))) for i in range(batches.per_epoch)]
        total, count = (float(sum(float(s[i]) for s in sums)) for i in (0, 1))
        return total / max(count, 1.0)

    return evaluate


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

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model(num_layers=1)
        >>> batch = data.Batches(data.pack([data.Encoded([4, 5, 6], [0, 1, 0.5])], length=8), batch_size=1)(0)
        >>> nothing = jax.tree.map(jnp.zeros_like, model.params)   # all 64 tokens are alike
        >>> loss = jax.jit(functools.partial(batch_loss, config=model.config, options=Options(length=8)))
        >>> total, count = loss(nothing, {}, batch)
        >>> round(float(total / count), 3), float(count)   # log 64
        (4.159, 1.5)
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
