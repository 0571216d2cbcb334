"""One row of the catalogue."""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable

INF = math.inf
TRAITS = ("monotonic", "odd", "even", "zero_centred")


@dataclasses.dataclass(frozen=True)
class Activation:
    """What is known of an activation; numbers are None where they depend on parameters, noise or several inputs.

    Example:
        >>> row = Activation("tanh", "tanh(x)", limits=(-1.0, 1.0), traits="monotonic odd zero_centred")
        >>> row.parity, row.saturating, float(row.function(0.0))
        ('odd', 'both', 0.0)
    """

    name: str  # in jaxml.activations, or after its module's name: "learnable.snake"
    formula: str
    kind: str = "fixed"  # or "gated", "learnable", "simplex", "features", "noisy"
    range: tuple[float, float] | None = None  # infimum and supremum
    limits: tuple[float | None, float | None] | None = None  # at −∞ and ∞
    traits: str = ""  # words of TRAITS; odd and even about 0; zero-centred: mean 0 of standard normal inputs
    smooth: float | None = None  # continuous derivatives, math.inf for all; −1: it jumps
    lipschitz: float | None = None
    gain: float | None = None  # 1 / √E f(z)², z standard normal: the factor that keeps the mean square 1
    paper: str = ""
    torch: str = ""  # in torch.nn
    keras: str = ""  # in keras.activations
    note: str = ""  # defaults that differ

    @property
    def monotonic(self) -> bool:
        return "monotonic" in self.traits

    @property
    def parity(self) -> str:
        """ "odd", "even" or ""."""
        return next((word for word in ("odd", "even") if word in self.traits.split()), "")

    @property
    def zero_centred(self) -> bool:
        return "zero_centred" in self.traits

    @property
    def saturating(self) -> str:
        """The sides on which it tends to a number: "left", "right", "both" or ""."""
        if self.limits is None:
            return ""
        left, right = (limit is not None and math.isfinite(limit) for limit in self.limits)
        return "both" if left and right else "left" if left else "right" if right else ""

    @functools.cached_property
    def function(self) -> Callable:
        """The function itself; of a learnable one its `init` and `apply`."""
        module, _, name = f"jaxml.activations.{self.name}".rpartition(".")
        return getattr(importlib.import_module(module), name)


def fixed(name: str, formula: str, **facts) -> Activation:
    """A function of one array, element by element.

    Example:
        >>> row = fixed("relu", "max(x, 0)", limits=(0.0, INF), traits="monotonic")
        >>> row.kind, row.monotonic, row.saturating
        ('fixed', True, 'left')
    """
    return Activation(name, formula, **facts)
