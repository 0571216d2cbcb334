"""Cross entropy over a large vocabulary that never holds all logits at once."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxml.axes import Array, Float, Int
from jaxml.linear import vary, varying_axes
from jaxml.parallel.mesh import automatic, live
from jaxml.parallel.rules import spec
from jaxml.target import platform
from jaxml.weights import Weight, einsum, is_node


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Weight,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    soft_cap: float | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Σ weights · −log softmax(hidden headᵀ)[targets], in float32, and Σ weights.

    Tokens with a weight are gathered in front and taken `chunk` at a time, so that at most [chunk, V] logits
    exist, and chunks without any weight are not computed: the loss of a short response to a long prompt costs
    what the response costs. Under differentiation the gradients of hidden (and of head, where it is asked
    for) are made in the same pass, from the same logits; nothing is computed again backwards.

    Args:
        hidden: final hidden states.
        head: the matrix that makes logits; of a weight node (adapted, quantised) logits are made again backwards.
        targets: the token to predict at each place.
        weights: of each place; 0 leaves it out.
        soft_cap: c·tanh(logits / c).
        chunk: places per chunk; where None, 128 on CPU and 1024 elsewhere (with few rows, reading the head
            takes longer than multiplying).

    Example:
        >>> import jax.numpy as jnp
        >>> total, count = cross_entropy(
        ...     jnp.zeros((1, 3, 4)), jnp.ones((10, 4)), jnp.array([[1, 2, 3]]), jnp.array([[1.0, 1.0, 0.0]]))
        >>> round(float(total / count), 4), float(count)   # log 10
        (2.3026, 2.0)
    """
    targets, weights = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
    sizes = live()
    if not automatic() or is_node(head):
        return _over_tokens(_sum, (hidden, targets, weights), head, soft_cap, chunk), jnp.sum(weights)
    table = spec(("vocabulary", "width"), head.shape, sizes)

    def part(hidden, targets, weights, head, *rest):
        if table[1] is not None:  # gradients are scattered over it again
            head = jax.lax.all_gather(head, table[1], axis=1, tiled=True)
        return _sum(hidden, targets, weights, head, *rest, split=table[0])

    return _over_tokens(part, (hidden, targets, weights), head, soft_cap, chunk, table), jnp.sum(weights)


def _over_tokens(part, tokens, heads, soft_cap, chunk, of_heads: P | None = None) -> Float[Array, ""]:
    """Σ part(tokens …, heads, soft_cap, chunk); on the mesh that is set each device has tokens of its own.

    Args:
        of_heads: how the heads are spread; whole on each device where None.
    """
    sizes = live()
    if not automatic():
        return part(*tokens, heads, soft_cap, chunk)
    row = spec(("batch", "length"), tokens[-1].shape, sizes)
    along = tuple(jax.tree.leaves(tuple(row)))
    specs = [P(*row, *[None] * (a.ndim - 2)) for a in tokens]

    def run(tokens, heads):
        total = part(*tokens, heads, soft_cap, chunk)
        return jax.lax.psum(total, along) if along else total

    over = jax.shard_map(run, in_specs=(specs, of_heads or P()), out_specs=P(), axis_names=automatic())
    return over(list(tokens), heads)


def _sum(hidden, targets, weights, head, soft_cap, chunk, split: str | None = None) -> Float[Array, ""]:
    """The sum over these tokens; with `split`, of a head whose rows lie along that mesh axis."""
    x = hidden.reshape(-1, hidden.shape[-1])
    targets, weights = targets.reshape(-1), weights.reshape(-1)
    chunk = min(chunk or _chunk(), x.shape[0])
    more = -x.shape[0] % chunk
    order = jnp.argsort(weights == 0, stable=True)  # weighted places first
    x = jnp.pad(x[order], ((0, more), (0, 0)))
    targets, weights = jnp.pad(targets[order], (0, more)), jnp.pad(weights[order], (0, more))
    if is_node(head):
        return _total_of_node(x, head, targets, weights, soft_cap, chunk)
    return _total(x, head, targets, weights, soft_cap, chunk, split)


def divergence(
    base: Float[Array, "B T D"],
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | Weight,
    weights: Float[Array, "B T"],
    *,
    base_head: Float[Array, "V D"] | Weight | None = None,
    soft_cap: float | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Σ weights · KL(base model ‖ this model) of the next token, in float32, and Σ weights.

    At most [chunk, V] logits of either model exist; backwards they are computed again.

    Args:
        base: final hidden states of the model that is to be kept; no gradient flows there.
        hidden: final hidden states of this model, on the same tokens.
        head, weights, soft_cap, chunk: as in `cross_entropy`.
        base_head: of the model that is to be kept; the same where None.

    Example:
        >>> import jax.numpy as jnp
        >>> x, head = jnp.ones((1, 3, 4)), jnp.eye(10, 4)
        >>> total, count = divergence(x, x, head, jnp.ones((1, 3)))
        >>> round(float(total), 4), float(count)
        (0.0, 3.0)
    """
    base, base_head = jax.lax.stop_gradient((base, head if base_head is None else base_head))
    total = _over_tokens(_divergence, (base, hidden, weights), (base_head, head), soft_cap, chunk)
    return total, jnp.sum(weights)


def _divergence(base, hidden, weights, heads, soft_cap, chunk) -> Float[Array, ""]:
    rows = lambda a: a.reshape(-1, a.shape[-1])
    (base_head, head), base, hidden, weights = heads, rows(base), rows(hidden), weights.reshape(-1)
    chunk = min(chunk or _chunk(), hidden.shape[0])
    more = -hidden.shape[0] % chunk
    parts = lambda a: jnp.pad(a, ((0, more),) + ((0, 0),) * (a.ndim - 1)).reshape(-1, chunk, *a.shape[1:])

    log_probabilities = lambda x, head: jax.nn.log_softmax(_logits(x, head, soft_cap))

    @jax.checkpoint
    def one(part):
        base, hidden, weights = part
        p, q = log_probabilities(base, base_head), log_probabilities(hidden, head)
        return jnp.sum(weights * jnp.sum(jnp.exp(p) * (p - q), axis=-1))

    return jnp.sum(jax.lax.map(one, (parts(base), parts(hidden), parts(weights))))


def _logits(x: Float[Array, "C D"], head, soft_cap: float | None) -> Float[Array, "C V"]:
    logits = einsum("CD,VD->CV", x, head).astype(jnp.float32)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _total_of_node(x, head, targets, weights, soft_cap, chunk) -> Float[Array, ""]:
    """The sum for a head that is no array: differentiated as it stands, chunk by chunk."""

    @jax.checkpoint
    def one(part):
        x, targets, weights = part
        logits = _logits(x, head, soft_cap)
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jnp.sum(weights * nll)

    axes = varying_axes(x, head, targets, weights)
    skip = lambda part: vary(jnp.zeros((), jnp.float32), axes)
    parts = [a.reshape(-1, chunk, *a.shape[1:]) for a in (x, targets, weights)]
    return jnp.sum(jax.lax.map(lambda part: jax.lax.cond(jnp.any(part[2] != 0), one, skip, part), tuple(parts)))


def _chunk() -> int:
    return 128 if platform() == "cpu" else 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _total(x, head, targets, weights, soft_cap, chunk, split):
    return _scan(x, head, targets, weights, soft_cap, chunk, split, False, False)[0]


def _forward(x, head, targets, weights, soft_cap, chunk, split):
    total, nll, dx, dhead = _scan(
        x.value, head.value, targets.value, weights.value, soft_cap, chunk, split, x.perturbed, head.perturbed
    )
    return total, (nll, dx, dhead, head.value[:0])


def _backward(soft_cap, chunk, split, residuals, ct):
    nll, dx, dhead, like_head = residuals
    if isinstance(ct, jax.custom_derivatives.SymbolicZero):
        ct = jnp.zeros((), jnp.float32)
    scaled = lambda g: None if g is None else (ct * g.astype(jnp.float32))
    dx_out = None if dx is None else scaled(dx).astype(dx.dtype)
    dhead_out = None if dhead is None else scaled(dhead)
    if dhead is not None:
        # Inside `jax.shard_map` each device has its own tokens' part; the head is the same for all.
        apart = varying_axes(dhead_out) - varying_axes(like_head)
        dhead_out = (jax.lax.psum(dhead_out, tuple(apart)) if apart else dhead_out).astype(like_head.dtype)
    return dx_out, dhead_out, None, ct * nll


_total.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan(x, head, targets, weights, soft_cap, chunk, split, want_dx: bool, want_dhead: bool):
    """(total, each place's loss, gradient of x or None, gradient of head in float32 or None)."""
    parts = lambda a: a.reshape(-1, chunk, *a.shape[1:])
    first = 0 if split is None else jax.lax.axis_index(split) * head.shape[0]  # of this device's rows of the head

    def pick(logits, norm, targets):
        """(−log softmax at the targets, the norm) over all rows of the head."""
        if split is None:
            return norm - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], norm
        top = jax.lax.pmax(jax.lax.stop_gradient(norm), split)
        norm = top + jnp.log(jax.lax.psum(jnp.exp(norm - top), split))
        here = (targets >= first) & (targets < first + logits.shape[-1])
        at = jnp.where(here, targets - first, 0)
        own = jnp.where(here, jnp.take_along_axis(logits, at[:, None], axis=-1)[:, 0], 0.0)
        return norm - jax.lax.psum(own, split), norm

    def compute(x, targets, weights, dhead):
        logits = jnp.einsum("CD,VD->CV", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
        if soft_cap is not None:
            tanh = jnp.tanh(logits / soft_cap)
            logits = soft_cap * tanh
        nll, norm = pick(logits, jax.nn.logsumexp(logits, axis=-1), targets)
        if not (want_dx or want_dhead):
            return nll, None, None
        g = jnp.exp(logits - norm[:, None])
        own = jnp.where(targets >= first, targets - first, head.shape[0])  # past the end: no row, nothing is added
        g = g.at[jnp.arange(chunk), own].add(-1.0, mode="drop") * weights[:, None]
        if soft_cap is not None:
            g = g * (1.0 - tanh * tanh)
        g = g.astype(x.dtype)
        dx = jnp.einsum("CV,VD->CD", g, head.astype(x.dtype)) if want_dx else None
        if want_dhead:
            dhead = dhead + jnp.einsum("CV,CD->VD", g, x, preferred_element_type=jnp.float32)
        return nll, dx, dhead

    axes = varying_axes(x, head, targets, weights)  # of a mesh, inside `jax.shard_map`
    same = axes - {split}  # all devices along `split` know a token's loss

    def skip(x, targets, weights, dhead):
        nothing = jnp.zeros_like(x) if want_dx else None
        return vary(jnp.zeros(chunk, jnp.float32), same), vary(nothing, axes), dhead

    def body(dhead, part):
        x, targets, weights = part
        nll, dx, dhead = jax.lax.cond(jnp.any(weights != 0), compute, skip, x, targets, weights, dhead)
        return dhead, (nll, dx)

    dhead = vary(jnp.zeros(head.shape, jnp.float32), axes) if want_dhead else None
    dhead, (nll, dx) = jax.lax.scan(body, dhead, (parts(x), parts(targets), parts(weights)))
    nll = nll.reshape(-1)
    if dx is not None:
        dx = dx.reshape(x.shape)
        dx = dx if split is None else jax.lax.psum(dx, split)
    return jnp.sum(nll * weights), nll, dx, dhead
