"""A mesh of devices with five axes, and what of it a program that is being traced may spread arrays over."""

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "context", "tensor")  # the last ones between the nearest devices


def mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Devices by what lies along each axis of them; one axis may be −1, for all that are left.

    Args:
        data: rows of a batch; weights are whole on each, gradients are summed once a step.
        fsdp: rows of a batch, and weights, gradients and states as well: a layer's are gathered while it runs.
        tensor: heads, hidden units and vocabulary: products are split, their results summed.
        context: places of a sequence; attention passes keys and values round a ring.
        expert: rows of a batch, and experts (weights with an axis of that name).
        devices: all of all processes where None, in an order that suits their network.

    Raises:
        ValueError: the product is not the number of devices.

    Example:
        >>> mesh(data=-1).shape["data"] == jax.device_count()
        True
    """
    sizes = dict(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
    count = jax.device_count() if devices is None else len(devices)
    if count == 0 or (devices is not None and len(set(devices)) < count):
        raise ValueError(f"parallel.mesh: devices are at least one, each once, got {list(devices)}.")
    for axis, n in sizes.items():
        if not isinstance(n, numbers.Integral) or isinstance(n, bool) or (n < 1 and n != -1):
            raise ValueError(
                f"parallel.mesh: sizes are whole numbers, at least 1, or one of them -1, got {axis}={n!r}."
            )
    asked = spell(sizes)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"parallel.mesh: of the sizes one may be -1, for all devices that are left, got {asked}.")
    known = math.prod(n for n in sizes.values() if n != -1)
    sizes = {axis: count // known if n == -1 else n for axis, n in sizes.items()}
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"parallel.mesh: the product of the axes is the number of devices, {count}, got {asked}. "
            "Set one axis to -1, or in Python name fewer devices (devices=jax.devices()[:n])."
        )
    shape, types = tuple(sizes[axis] for axis in AXES), (AxisType.Auto,) * len(AXES)
    if devices is not None:
        return Mesh(np.asarray(devices, object).reshape(shape), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types)


def parse(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh from words as ``data=2,fsdp=4`` (``fsdp=-1``: all that are left).

    Raises:
        ValueError: an axis that there is none of, a size that is no number, a product that does not fit.

    Example:
        >>> parse("fsdp=-1").shape["fsdp"] == jax.device_count()
        True
    """
    if not isinstance(text, str) or not text.strip(", "):
        raise ValueError(f"parallel.parse: a mesh is AXIS=SIZE by comma, of {', '.join(AXES)}, got {text!r}.")
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in AXES or not re.fullmatch(r"-?[0-9]{1,9}", size):
            raise ValueError(f"parallel.parse: a mesh is AXIS=SIZE by comma, of {', '.join(AXES)}, got {part!r}.")
        if axis in sizes:
            raise ValueError(f"parallel.parse: an axis of a mesh is given once, got {axis} twice in {text!r}.")
        sizes[axis] = int(size)
    return mesh(**sizes, devices=devices)


def spell(sizes: Any) -> str:
    """The axes of more than one device, as `parse` reads them.

    Example:
        >>> spell({"data": 2, "fsdp": 4, "tensor": 1})
        'data=2,fsdp=4'
    """
    return ",".join(f"{axis}={n}" for axis, n in dict(sizes).items() if n != 1) or "data=1"


def live() -> dict[str, int]:
    """The axes that XLA may spread arrays of the function being traced over: axis → size, none of size 1.

    Those of the mesh that `jax.set_mesh` has set, without what `jax.shard_map` has made manual.

    Example:
        >>> on = jax.sharding.AbstractMesh((2, 4, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 5)
        >>> with jax.sharding.use_abstract_mesh(on):
        ...     live()
        {'data': 2, 'fsdp': 4}
    """
    sizes, free = jax.sharding.get_abstract_mesh().shape, automatic()
    return {axis: sizes[axis] for axis in AXES if axis in free and sizes[axis] > 1}


def automatic() -> set[str]:
    """The axes, of any size, that are left to XLA: kernels need them all to be manual.

    Example:
        >>> on = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Manual))
        >>> with jax.sharding.use_abstract_mesh(on):
        ...     sorted(automatic())
        ['data']
    """
    ambient = jax.sharding.get_abstract_mesh()
    if ambient.empty:
        return set()
    return {
        axis for axis, kind in zip(ambient.axis_names, ambient.axis_types) if axis in AXES and kind == AxisType.Auto
    }
