"""`optax.chain(galore(rank=128), adam(1e-3))`: how a projection finds the optimizer that follows it.

`optax.chain` gives every member the whole parameters, so that a stock optimizer behind a projection would keep moments
of full shape. An *aware* optimizer (`aware(tx)`, or `adam`, `adamw`, `lion`, … of this package) notices when it is
unpacked behind a *pending* one (`galore(...)` without an optimizer) and is taken into it; the member in front then
passes gradients through. `chain` does the same for any optimizer without relying on how `optax.chain` unpacks.
"""

import threading
import weakref
from collections.abc import Callable, Iterator

import jax
import optax

Transformation = optax.GradientTransformationExtraArgs

_unpacked = threading.local()  # .one: (the pending member that waits for its optimizer, weakly its iterator)


class Aware(optax.GradientTransformationExtraArgs):
    """An optimizer that a pending member before it in a chain takes in; alone it is what it was."""

    def __iter__(self) -> Iterator:
        before, tx = _waiting(), self
        _unpacked.one = None
        if before is not None:
            before.found = True
            tx = before.take(self)
        return iter((tx.init, tx.update))


class Pending(optax.GradientTransformationExtraArgs):
    """A member that takes in the optimizer behind it; its own functions are for when there is none."""

    name: str
    take: Callable[[optax.GradientTransformation], Transformation]
    found: bool

    def __iter__(self) -> Iterator:
        self.found, parts = False, self._parts()
        _unpacked.one = self, weakref.ref(parts)
        return parts

    def _parts(self) -> Iterator:
        """Runs when every member's iterator has been made, so that a successor has made itself known."""
        if _waiting() is self:
            _unpacked.one = None
        through = optax.with_extra_args_support(optax.identity())
        yield through.init if self.found else self.init
        yield through.update if self.found else self.update


def _waiting() -> Pending | None:
    """The pending member of the chain that is being made; one whose iterator is gone was of a chain that failed."""
    member, parts = getattr(_unpacked, "one", None) or (None, lambda: None)
    return member if parts() is not None else None


def pending(
    name: str, alone: Transformation, take: Callable[[optax.GradientTransformation], Transformation]
) -> Pending:
    """A member called `name` that is `alone` unless an aware optimizer follows it, and `take(optimizer)` then."""
    out = Pending(alone.init, alone.update)
    out.name, out.take, out.found = name, take, False
    return out


def aware(tx: optax.GradientTransformation) -> Aware:
    """Lets any Optax optimizer stand behind `galore(...)` in `optax.chain`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxml.optim import galore
        >>> tx = optax.chain(galore(rank=2), aware(optax.sgd(0.1, momentum=0.9)))
        >>> state = tx.init({"w": jnp.zeros((8, 4))})
        >>> state[1].inner[0].trace["w"].shape
        (2, 4)
    """
    tx = optax.with_extra_args_support(tx)
    return Aware(tx.init, tx.update)


def optimizer(name: str, tx: optax.GradientTransformation) -> Transformation:
    """`tx`, which `name` was given, with extra arguments.

    Raises:
        TypeError: it is no transformation; a learning rate or a rank, perhaps.
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"{name}: the first argument is an Optax transformation, got {tx!r}. Give numbers by name: "
            f"{name}(optax.adam(1e-3), ...)."
        )
    return optax.with_extra_args_support(tx)


def chain(*members: optax.GradientTransformation) -> Transformation:
    """`optax.chain`, in which a `galore(...)` without an optimizer takes in the next one.

    That is the first member behind it that is aware, else the first that keeps moments. Members between the two see
    whole gradients.

    Raises:
        ValueError: nothing follows that it could take in.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxml.optim import galore
        >>> tx = chain(galore(rank=2), optax.adam(1e-3))
        >>> tx.init({"w": jnp.zeros((8, 4))})[0].inner[0].mu["w"].shape
        (2, 4)
    """
    out, rest = [], list(members)
    while rest:
        member = rest.pop(0)
        if isinstance(member, Pending):
            place = _next_optimizer(rest)
            if place is None:
                raise ValueError(f"optim.chain: an optimizer follows {member.name}(...), got none. Put one behind it.")
            out += rest[:place]
            member, rest = member.take(rest[place]), rest[place + 1 :]
        out.append(member)
    return optax.chain(*out)


def _next_optimizer(members: list[optax.GradientTransformation]) -> int | None:
    """The place of the first aware member before another pending one, else of the first that keeps moments."""
    end = next((n for n, m in enumerate(members) if isinstance(m, Pending)), len(members))
    places = [n for n in range(end) if isinstance(members[n], Aware)]
    places += [n for n in range(end) if _keeps_moments(members[n])]
    return places[0] if places else 0 if end else None


def _keeps_moments(tx: optax.GradientTransformation) -> bool:
    """Whether its state has an array of a parameter's shape."""
    parameter = jax.ShapeDtypeStruct((17, 19), "float32")
    return any(leaf.shape == parameter.shape for leaf in jax.tree.leaves(jax.eval_shape(tx.init, {"w": parameter})))
