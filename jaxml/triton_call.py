"""Kernels in Triton's own language: called by the package jax-triton, or by Triton's interpreter where told so."""

import functools
import importlib.metadata
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.axes import Array
from jaxml.target import INTERPRET_GPU, compute_capability, named, platform

BROKEN = ("0.3.1", "0.4.0", "0.4.1")  # with jax 0.12 and later


def unsupported() -> str | None:
    """Why such kernels cannot be called with the packages that are installed, or None; on a GPU or interpreted."""
    return _unsupported(interpreted=platform() == INTERPRET_GPU)


@functools.cache
def _unsupported(interpreted: bool) -> str | None:
    for package in ("triton", "torch" if interpreted else "jax-triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"it needs the package {package}: python -m pip install 'jaxml[cuda]'"
    if not interpreted and version in BROKEN and jax.__version_info__ >= (0, 12):
        return f"jax-triton {version} fails with jax {jax.__version__}: it wants jax below 0.12, or a newer jax-triton"
    return None


def call(
    kernel: Callable,
    arguments: list[Array],
    out_shape: list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    **constants,
) -> list[Array]:
    """The results of a function of pointers to the arguments and to the results, run for every place of the grid."""
    if platform() == INTERPRET_GPU:
        run = functools.partial(_interpreted, kernel, out_shape, grid, constants)
        launch = lambda *arguments: jax.pure_callback(run, out_shape, *arguments)
    else:
        import jax_triton  # where it is used: it is an extra

        launch = functools.partial(
            jax_triton.triton_call,
            kernel=_jit(kernel),
            out_shape=out_shape,
            grid=grid,
            num_warps=warps,
            num_stages=stages,
            compute_capability=compute_capability() if named() else None,
            **constants,
        )
    return jax.custom_batching.sequential_vmap(launch)(*arguments)


@functools.lru_cache(maxsize=1024)
def _jit(kernel: Callable):
    """The same for a function each time: what is compiled is found by it."""
    import triton

    return triton.jit(kernel)


def _interpreted(kernel: Callable, out_shape: list, grid: tuple, constants: dict, *arguments) -> list[np.ndarray]:
    """By Triton's interpreter, which wants PyTorch."""
    import torch
    from triton.runtime.interpreter import InterpretedFunction

    def tensor(a):
        bits = np.array(a).view(np.int16 if a.dtype == jnp.bfloat16 else a.dtype)
        return torch.from_numpy(bits).view(torch.bfloat16) if a.dtype == jnp.bfloat16 else torch.from_numpy(bits)

    def array(t, dtype):
        return t.view(torch.int16).numpy().view(dtype) if dtype == jnp.bfloat16 else t.numpy()

    outs = [tensor(np.zeros(out.shape, out.dtype)) for out in out_shape]
    with np.errstate(all="ignore"):  # a GPU says nothing of a division by zero either
        InterpretedFunction(kernel)[grid](*[tensor(a) for a in arguments], *outs, **constants)
    return [array(t, out.dtype) for t, out in zip(outs, out_shape)]
