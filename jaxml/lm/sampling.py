"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxml.axes import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the default is greedy.

    Args:
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: keep the k most likely tokens (0: all).
        top_p: keep the smallest set of tokens whose probabilities add up to p, in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one, in [0, 1).
        repetition_penalty: positive logits of tokens seen before are divided by it, negative ones
            multiplied (1: nothing), as in CTRL (Keskar et al. 2019), on prompt and output alike.

    Filters act in the order in which they stand here, each on what the one before has left.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.9).top_k
        0
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, rule, good in (
            ("temperature", "at least 0", self.temperature >= 0),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("min_p", "in [0, 1)", 0 <= self.min_p < 1),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
        ):
            if not good:
                raise ValueError(f"Sampling: {name} is {rule}, got {getattr(self, name)}.")


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, keys: Array, seen: Bool[Array, "B V"] | None = None
) -> Int[Array, "B"]:
    """One token for each row, from that row's own key [B].

    Args:
        seen: tokens that the repetition penalty applies to.

    Example:
        >>> logits, keys = jnp.array([[1.0, 3.0, 2.0]]), jax.random.split(jax.random.key(0), 1)
        >>> seen = jnp.array([[False, True, False]])
        >>> [sample(logits, Sampling(repetition_penalty=p), keys, seen).tolist() for p in (1.0, 2.0)]
        [[1], [2]]
    """
    if sampling.repetition_penalty != 1.0 and seen is not None:
        p = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / p, logits * p), logits)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / sampling.temperature, sampling)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """−inf where top-k, top-p or min-p leave a token out.

    Example:
        >>> filter_logits(jnp.array([[1.0, 3.0, 2.0]]), Sampling(top_k=2)).tolist()
        [[-inf, 3.0, 2.0]]
    """
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        kept = jnp.where(before < sampling.top_p, ordered, jnp.inf)  # always the first
        logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
    if sampling.min_p > 0.0:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
