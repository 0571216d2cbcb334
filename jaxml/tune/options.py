"""How a run trains."""

import dataclasses
import math
import numbers

SCHEDULES = ("constant", "linear", "cosine")
MOST = 2**31 - 1  # of a count


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

    Example:
        >>> Options(steps=100, learning_rate=1e-3).schedule
        'cosine'
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
        least = dict.fromkeys(("batch_size", "accumulate", "length", "keep", "anchor_rows", "patience", "steps"), 1)
        least |= dict.fromkeys(("save_every", "eval_every", "log_every", "rollbacks", "seed"), 0)
        for name, low in least.items():
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            most = 2**32 - 1 if name == "seed" else MOST
            if not whole or not low <= value <= most:
                raise ValueError(f"Options: {name} is a whole number in {low} … {most}, got {value!r}.")
        if (tokens := self.accumulate * self.batch_size * self.length) > MOST:
            raise ValueError(
                f"Options: accumulate · batch_size · length, the tokens of a step, are below 2³¹, got {tokens:,}."
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Options: schedule is one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        finite = lambda value, low: low <= value < math.inf  # NaN is neither
        for name, value, low in (
            ("epochs", self.epochs, 1e-9), ("learning_rate", self.learning_rate, 0),
            ("weight_decay", self.weight_decay, 0), ("anchor_weight", self.anchor_weight, 0),
        ):  # fmt: skip
            if not finite(value, low):
                rule = "above 0" if low else "at least 0"
                raise ValueError(f"Options: {name} is a finite number, {rule}, got {value}.")
        for name in ("clip", "spike"):
            value, low = getattr(self, name), 1 if name == "spike" else 0
            if value is not None and not (low < value < math.inf):
                raise ValueError(f"Options: {name} is above {low}, got {value}.")
        for name in ("warmup", "b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Options: {name} is in [0, 1), got {getattr(self, name)}.")


USUAL = Options()
