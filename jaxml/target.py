"""Which device a computation is going to run on, so that kernels can be chosen and sized when it is built.

Normally the one that JAX finds; `target` names another, for compilation ahead of time and for tests.
"""

import contextlib
import contextvars

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)

INTERPRET, INTERPRET_GPU = "interpret", "interpret gpu"


@contextlib.contextmanager
def target(device_kind: str):
    """Choose backends and blocks for that kind of device, whatever this machine has.

    For compilation ahead of time ("TPU v5e", "NVIDIA H100", …), and for tests: "interpret" runs the kernels for TPUs on
    any platform, "interpret gpu" those for GPUs.

    Example:
        >>> with target("TPU v6e"):
        ...     generation()
        'v6e'
    """
    token = _target.set(device_kind)
    try:
        yield
    finally:
        _target.reset(token)


def named() -> bool:
    """Whether `target` says what it is, rather than JAX."""
    return _target.get() is not None


def platform() -> str:
    """Where the computation is going to run: "cpu", "gpu", "tpu", "interpret" or "interpret gpu"."""
    kind = _target.get()
    if kind is None or kind in (INTERPRET, INTERPRET_GPU):
        return kind or jax.default_backend()
    return "gpu" if kind.startswith("NVIDIA") else "tpu"


def generation() -> str:
    """The row of the table: "v4", "v5e", "v5p", "v6e", "tpu7x"; the device's own name where there is none."""
    kind = _target.get() or jax.devices()[0].device_kind
    kind = kind.lower().replace("tpu", "").strip()
    names = {"v5 lite": "v5e", "v5": "v5p", "v6 lite": "v6e", "7x": "tpu7x", "v7x": "tpu7x"}
    return names.get(kind, kind)


CAPABILITIES = {"A100": 80, "A10": 86, "L4": 89, "H100": 90, "H200": 90, "B200": 100}  # of the GPUs that `target` names


def compute_capability() -> int:
    """Ten times that of the GPU: 90 is Hopper's.

    Example:
        >>> with target("NVIDIA H100"):
        ...     compute_capability()
        90
    """
    kind = _target.get()
    if kind is None:
        return round(10 * float(jax.devices()[0].compute_capability))
    name = kind.removeprefix("NVIDIA ").split()[0]
    if name not in CAPABILITIES:
        raise ValueError(f"target: the GPUs that can be named are NVIDIA {', '.join(CAPABILITIES)}, got {kind!r}.")
    return CAPABILITIES[name]
