"""How attention's kernels for Triton reach a GPU: by Pallas's own lowering, or as source by jax-triton.

The kernels are the same functions; the choice between the two is here alone. Pallas's lowering comes with JAX and is
deprecated; jax-triton takes the Triton that is installed.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxml import triton_call
from jaxml.attention import triton_source
from jaxml.axes import Array
from jaxml.linear import vary
from jaxml.target import INTERPRET_GPU, platform


class Launch(Protocol):
    """Runs a kernel, as Pallas has it, over a grid.

    Args:
        kernel: a function of references to the operands and the results, all whole.
        grid: at most three numbers of programs.
        cut: has the number of `warps` of a program and of `stages`, loads that are under way.
        axes: of `jax.shard_map`, over which the results vary.
        cost: for XLA's scheduler, None where it does not matter.
    """

    def __call__(
        self,
        kernel: Callable,
        operands: list[Array],
        out_shape: list[jax.ShapeDtypeStruct],
        grid: tuple[int, ...],
        cut: Any,
        name: str,
        axes: frozenset,
        cost: pl.CostEstimate | None = None,
    ) -> list[Array]: ...


def by_pallas(kernel, operands, out_shape, grid, cut, name, axes, cost=None) -> list[Array]:
    """A `Launch`."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        cost_estimate=cost,
        interpret=platform() == INTERPRET_GPU,
        name=name,
    )(*vary(operands, axes))


def by_jax_triton(kernel, operands, out_shape, grid, cut, name, axes, cost=None) -> list[Array]:
    """A `Launch`."""
    source = triton_source.translate(kernel, operands, out_shape, grid, name, platform() == INTERPRET_GPU)
    plain = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in out_shape]
    function = triton_source.function(source)
    return vary(triton_call.call(function, vary(operands, axes), plain, grid, cut.warps, cut.stages), axes)
