"""What stands at ``params["prefix"]``: a trained prompt, before every text that the model is given.

========== ======================================================================
SoftPrompt vectors in front of the first layer; their keys and values are computed
Prefix     keys and values of every layer themselves
Projected  a Prefix that an MLP makes of a table, while it is trained
========== ======================================================================

Each has N prompts of P places. What the decoder asks for is `cache`: a past like any other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Float, Params
from jaxml.lm import cache as caches
from jaxml.lm import decoder
from jaxml.lm.cache import Cache
from jaxml.lm.config import DecoderConfig
from jaxml.tune.adapters.nodes import Adapter, static
from jaxml.weights import Rows


class Prompt(Adapter):
    """What all prompts have in common; they stand around nothing.

    Example:
        >>> two = SoftPrompt(jnp.zeros((2, 4, 32)))
        >>> isinstance(two, Prompt), two.count, two.places
        (True, 2, 4)
    """

    base = None
    ids: Rows | None

    @property
    def count(self) -> int:
        """N, how many prompts there are."""
        raise NotImplementedError

    @property
    def places(self) -> int:
        """P, how long each prompt is."""
        raise NotImplementedError

    def cache(self, params: Params, config: DecoderConfig) -> Cache:
        """The prompts' keys and values: N rows, or one for each row of the batch where ids say which."""
        made = self.make(params, config)
        if self.ids is None:
            if self.count > 1:
                raise ValueError(
                    f"prompt: there are {self.count} prompts, and which of them each row takes is not said. Call "
                    "`adapters.select`, `prompt.take` one, or train on examples with the key task."
                )
            return made
        pick = lambda a, axis: jnp.take(a, self.ids.value, axis=axis)
        return dataclasses.replace(
            made, key=pick(made.key, 1), value=pick(made.value, 1), positions=pick(made.positions, 0)
        )

    def make(self, params: Params, config: DecoderConfig) -> Cache:
        """All N prompts' keys and values."""
        raise NotImplementedError

    def matmul(self, x, transpose=False):
        raise ValueError(f"prompt: a {type(self).__name__} is no matrix to multiply with.")

    take = matmul

    def dense(self):
        raise ValueError(
            f"adapters.merge: a {type(self).__name__} is no part of a matrix and cannot be merged. Save it beside the "
            "model (`adapters.save_peft`), or leave it away (`adapters.detach`)."
        )

    def astype(self, dtype: Any) -> "Prompt":
        cast = lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a
        return jax.tree.map(cast, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftPrompt(Prompt):
    """Trained vectors in the place of a prompt's embeddings (Lester et al. 2021).

    With `columns` and `tasks`, the prompt of task n is rows ⊙ (columns[n] tasks[n]): one prompt that all tasks share,
    times a matrix of low rank of its own (Wang et al. 2023, multitask prompt tuning).

    Example:
        >>> SoftPrompt(jnp.zeros((1, 4, 32))).places
        4
    """

    rows: Float[Array, "N P D"]  # as the first layer reads them
    columns: Float[Array, "N P R"] | None = None
    tasks: Float[Array, "N R D"] | None = None
    ids: Rows | None = None
    method: str = static("prompt")
    train: tuple[str, ...] = static(("rows",))

    @property
    def count(self) -> int:
        return (self.rows if self.columns is None else self.columns).shape[0]

    @property
    def places(self) -> int:
        return self.rows.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.rows.shape[1:])

    @property
    def dtype(self) -> Any:
        return self.rows.dtype

    def table(self) -> Float[Array, "N P D"]:
        """The vectors of every prompt."""
        return self.rows if self.columns is None else self.rows * jnp.matmul(self.columns, self.tasks)

    def make(self, params: Params, config: DecoderConfig) -> Cache:
        return decoder.read(params, config, self.table().astype(params["embed"].dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix(Prompt):
    """Trained keys and values of every layer (Li and Liang 2021; Liu et al. 2022, P-tuning v2).

    Example:
        >>> Prefix(jnp.zeros((2, 1, 2, 4, 8)), jnp.zeros((2, 1, 2, 4, 8))).places
        4
    """

    key: Float[Array, "L N K P H"]  # as attention reads them: rotated
    value: Float[Array, "L N K P H"]
    ids: Rows | None = None
    method: str = static("prefix")
    train: tuple[str, ...] = static(("key", "value"))

    @property
    def count(self) -> int:
        return self.key.shape[1]

    @property
    def places(self) -> int:
        return self.key.shape[3]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.key.shape

    @property
    def dtype(self) -> Any:
        return self.key.dtype

    def make(self, params: Params, config: DecoderConfig) -> Cache:
        return caches.full(self.key, self.value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projected(Prompt):
    """A prefix made of a table by an MLP, which steadies training: W₂ tanh(W₁ table + b₁) + b₂ (+ where it began).

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import prompt
        >>> made = prompt.prefix(testing.tiny_model(), length=4, start="random", hidden_dim=8).params["prefix"]
        >>> isinstance(made, Projected), made.table.shape[1]
        (True, 4)
    """

    table: Float[Array, "N P E"]
    w1: Float[Array, "E M"]
    b1: Float[Array, "M"]
    w2: Float[Array, "M X"]  # X = L·2·K·H
    b2: Float[Array, "X"]
    start: Prefix | None  # stays as it is
    layout: tuple[int, int, int] = static()  # L, K, H
    ids: Rows | None = None
    method: str = static("prefix")
    train: tuple[str, ...] = static(("table", "w1", "b1", "w2", "b2"))

    @property
    def count(self) -> int:
        return self.table.shape[0]

    @property
    def places(self) -> int:
        return self.table.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        L, K, H = self.layout
        N, P, _ = self.table.shape
        return (L, N, K, P, H)

    @property
    def dtype(self) -> Any:
        return self.table.dtype

    def settled(self) -> Prefix:
        """The keys and values that the MLP makes now, without it."""
        L, K, H = self.layout
        across = lambda b: b.reshape(1, 1, -1)
        hidden = jnp.tanh(jnp.matmul(self.table, self.w1) + across(self.b1))
        made = jnp.matmul(hidden, self.w2) + across(self.b2)  # N P X
        made = made.reshape(*made.shape[:2], L, 2, K, H).transpose(3, 2, 0, 4, 1, 5)  # 2 L N K P H
        key, value = made if self.start is None else (made[0] + self.start.key, made[1] + self.start.value)
        return Prefix(key, value, self.ids)

    def make(self, params: Params, config: DecoderConfig) -> Cache:
        return self.settled().make(params, config)


def only(params: Params, who: str) -> Prompt:
    """The prompt of an adapted tree.

    Raises:
        ValueError: there is none.
        TypeError: a model rather than its parameters.

    Example:
        >>> only({"prefix": SoftPrompt(jnp.zeros((1, 4, 32)))}, "prompt.take").places
        4
        >>> only({}, "prompt.take")
        Traceback (most recent call last):
            ...
        ValueError: prompt.take: the parameters have a prompt in front, got none. Put one there: `prompt.soft`.
    """
    if not isinstance(params, dict):
        raise TypeError(f"{who}: parameters are wanted, got {type(params).__name__}. Of a model give model.params.")
    node = params.get("prefix")
    if not isinstance(node, Prompt):
        raise ValueError(f"{who}: the parameters have a prompt in front, got none. Put one there: `prompt.soft`.")
    return node
