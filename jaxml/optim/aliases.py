"""Optax's optimizers, aware of a `galore(...)` or `lora(...)` before them in `optax.chain`, and their 8-bit forms.

Alone each is the Optax optimizer of the same name, to the bit. Any other becomes aware by `aware(tx)`.
"""

import functools
from collections.abc import Callable

import optax

from jaxml.optim.chain import Aware, aware
from jaxml.optim.eight_bit import eight_bit


def _aware(factory: Callable) -> Callable[..., Aware]:
    @functools.wraps(factory)
    def make(*args, **kwargs) -> Aware:
        return aware(factory(*args, **kwargs))

    return make


adam, adamw, adafactor, adabelief = map(_aware, (optax.adam, optax.adamw, optax.adafactor, optax.adabelief))
adan, lamb, lion, nadam, nadamw = map(_aware, (optax.adan, optax.lamb, optax.lion, optax.nadam, optax.nadamw))
radam, rmsprop, sgd, yogi = map(_aware, (optax.radam, optax.rmsprop, optax.sgd, optax.yogi))


def adam8bit(learning_rate, *, stochastic: bool = False, min_size: int = 4096, **kwargs) -> Aware:
    """`optax.adam` with moments of eight bits; other arguments are its own.

    Example:
        >>> import jax.numpy as jnp
        >>> adam8bit(1e-3).init({"w": jnp.zeros((64, 256))}).inner[0].mu["w"].codes.dtype.name
        'uint8'
    """
    return eight_bit(optax.adam(learning_rate, **kwargs), stochastic=stochastic, min_size=min_size)


def adamw8bit(learning_rate, *, stochastic: bool = False, min_size: int = 4096, **kwargs) -> Aware:
    """`optax.adamw` with moments of eight bits; other arguments are its own.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((64, 64))}
        >>> tx = adamw8bit(1e-3)
        >>> updates, state = tx.update({"w": jnp.ones((64, 64))}, tx.init(params), params)
        >>> updates["w"].shape
        (64, 64)
    """
    return eight_bit(optax.adamw(learning_rate, **kwargs), stochastic=stochastic, min_size=min_size)


def lion8bit(learning_rate, *, stochastic: bool = False, min_size: int = 4096, **kwargs) -> Aware:
    """`optax.lion` with its moment in eight bits; other arguments are its own.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones((64, 64))}
        >>> tx = lion8bit(1e-4)
        >>> updates, state = tx.update({"w": jnp.ones((64, 64))}, tx.init(params), params)
        >>> updates["w"].shape
        (64, 64)
    """
    return eight_bit(optax.lion(learning_rate, **kwargs), stochastic=stochastic, min_size=min_size)
