"""LoRA+ and LoRA-FA: what becomes of the gradients of A and B."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxml.axes import Params
from jaxml.tune.adapters.nodes import LoRA
from jaxml.tune.adapters.tree import of


def lora_plus(inner: optax.GradientTransformation, ratio: float = 16.0) -> optax.GradientTransformation:
    """The inner optimizer with a learning rate `ratio` times as high for every B.

    Example:
        >>> tx = lora_plus(optax.sgd(1.0), ratio=4.0)
        >>> grads = {"q": {"a": jnp.ones(1), "b": jnp.ones(1)}}
        >>> jax.tree.map(lambda u: float(u[0]), tx.update(grads, tx.init(grads), grads)[0])
        {'q': {'a': -1.0, 'b': -4.0}}

    Reference:
        Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
    """

    def update(grads, state, params=None, **extra):
        updates, state = inner.update(grads, state, params, **extra)
        faster = lambda path, u: u * ratio if _name(path) == "b" else u
        return jax.tree_util.tree_map_with_path(faster, updates), state

    inner = optax.with_extra_args_support(inner)
    return optax.GradientTransformationExtraArgs(inner.init, update)


def lora_fa(inner: optax.GradientTransformation, adapted: Params, damping: float = 1e-8) -> Any:
    """The inner optimizer on gradients of B that make W move as far towards its own gradient as B can move it.

    (AᵀA)⁻¹ dB / s² for every B, where A is frozen (`attach(..., freeze_a=True)`).

    Args:
        adapted: the tree with its adapters, whose A and scales are used; r × r numbers of each are kept.
        damping: added to the diagonal of AᵀA.

    Raises:
        ValueError: a LoRA whose A is trained, or none at all.

    Example:
        >>> from jaxml import testing
        >>> from jaxml.tune import adapters
        >>> params = adapters.attach(testing.tiny_model().params, jax.random.key(0), rank=2, freeze_a=True)
        >>> tx = lora_fa(optax.adam(1e-3), params)
        >>> trained, _ = adapters.split(params)
        >>> updates, _ = tx.update(trained, tx.init(trained), trained)
        >>> jax.tree.structure(updates) == jax.tree.structure(trained)
        True

    Reference:
        Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning";
        the corrected gradient of its authors' optimizer, as in PEFT.
    """
    inverses: dict[str, Any] = {}
    for path, w in of(adapted).items():
        if not isinstance(w, LoRA):
            continue
        if "a" in w.train or "b" not in w.train:
            raise ValueError(f"lora_fa: A is frozen, that of {path} is trained. Attach with freeze_a=True.")
        a = w._a().astype(jnp.float32)
        gram = jnp.matmul(a.swapaxes(-1, -2), a)
        gram = gram + jnp.broadcast_to(damping * jnp.eye(w.rank), gram.shape)
        inverses[path] = jnp.linalg.inv(gram) / w.scale[..., None, None] ** 2
    if not inverses:
        raise ValueError("lora_fa: the tree has LoRAs whose A is frozen, got none. Attach with freeze_a=True.")

    def update(grads, state, params=None, **extra):
        def correct(path, g):
            owner = "/".join(jax.tree_util.keystr((entry,), simple=True) for entry in path[:-1])
            if _name(path) != "b" or owner not in inverses:
                return g
            return jnp.matmul(inverses[owner], g.astype(jnp.float32)).astype(g.dtype)

        return inner.update(jax.tree_util.tree_map_with_path(correct, grads), state, params, **extra)

    inner = optax.with_extra_args_support(inner)
    return optax.GradientTransformationExtraArgs(inner.init, update)


def _name(path) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)
