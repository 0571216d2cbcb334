"""What a training step needs on a TPU slice that is not there: the step itself, compiled ahead of time by libtpu."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import mesh_utils
from jax.extend.core import Literal
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh

from jaxml import parallel
from jaxml.axes import Params
from jaxml.lm import decoder
from jaxml.lm.config import DecoderConfig
from jaxml.parallel import flops, program, topology
from jaxml.parallel.rules import parts, spec
from jaxml.target import target
from jaxml.tune import adapters
from jaxml.tune.options import Options
from jaxml.tune.place import check_length, for_training, state_shardings
from jaxml.tune.run import begin
from jaxml.tune.step import batch_loss, make_step

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step on one slice; bytes are those of one device, of which v4 and tpu7x have two a chip.

    Example:
        >>> made = Plan(
        ...     "v5e:2x2", "fsdp=4", devices=4, tokens=8192, weights=2 * GIB, states=GIB, temporary=15 * GIB,
        ...     activations=9 * GIB, total=18 * GIB, limit=15 * GIB, flops=1e14, bytes_moved=None, collectives=None,
        ...     seconds=9,
        ... )
        >>> made.fits
        False
    """

    topology: str
    mesh: str
    devices: int
    tokens: int  # of a step, on all devices
    weights: int  # trained and frozen ones
    states: int  # of the optimizer
    temporary: int  # gradients, activations, gathered weights, and what products need
    activations: int  # about so much of it is kept for the backward pass
    total: int
    limit: int
    flops: float  # of products
    bytes_moved: int | None  # None where it does not fit: there is no program to read then
    collectives: dict[str, tuple[int, int]] | None  # kind → (how often, bytes)
    seconds: float  # to compile

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


def shapes(config: DecoderConfig, dtype: Any = jnp.bfloat16) -> Params:
    """A decoder's parameters as shapes.

    Example:
        >>> from jaxml import testing
        >>> found = shapes(testing.tiny_config())
        >>> found["layers"]["q"].shape, found["layers"]["q"].dtype.name
        ((2, 32, 32), 'bfloat16')
    """
    is_shape = lambda s: isinstance(s, tuple)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), decoder.shapes(config), is_leaf=is_shape)


def plan(
    config: DecoderConfig,
    params: Params,
    options: Options,
    tx: optax.GradientTransformation,
    name: str,
    axes: str = "fsdp=-1",
    *,
    rows: int = 1,
) -> Plan:
    """Compiles the step that `fit` would run there, and reads what it needs.

    Args:
        params: shapes, with adapters and quantised weights where there shall be (`shapes`, `jax.eval_shape`).
        options: as for `fit`; `batch_size` is put in here.
        name: of the slice, as "v5e:8x8" (`parallel.topology`).
        axes: the mesh, as `parallel.parse` reads it.
        rows: of a batch, on each part that the mesh cuts it into.

    Raises:
        ImportError: libtpu is not installed.
        ValueError: no such slice, or axes that do not fit it.

    Example:
        >>> from jaxml import testing
        >>> config, options = testing.tiny_config(), Options(length=128)
        >>> plan(config, shapes(config), options, optax.adam(1e-3), "v5e:2x2").fits  # doctest: +SKIP
        True
        >>> plan(config, shapes(config), options, optax.adam(1e-3), "v4:2x2")
        Traceback (most recent call last):
            ...
        ValueError: topology: v4 comes in slices of 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8, got '2x2'.
    """
    generation, _ = topology.parse(name)
    found = topology.devices(name)
    mesh = _mesh(axes, found)
    sizes = dict(mesh.shape)
    check_length("plan", config, options.length, context=sizes["context"])
    options = dataclasses.replace(options, batch_size=rows * parts(sizes))
    started = time.perf_counter()
    with target(f"TPU {generation.name}"), topology.without_compilation_cache(), use_abstract_mesh(mesh.abstract_mesh):
        state, frozen, batch, shardings = _arguments(params, options, tx, mesh)
        step = make_step(config, tx, options, shardings)
        traced = step.trace(state, frozen, batch)
        products = flops.flops(traced.jaxpr)
        kept = _kept(config, options, state.trainable, frozen, batch, sizes)
        compiled, exhausted = _compile(traced.lower())
    held = lambda tree: sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))
    weights, states = held((state.trainable, frozen)), held(state.opt_state)
    if compiled is None:
        total, temporary, moved, sent = exhausted, exhausted - weights - states, None, None
    else:
        m = compiled.memory_analysis()
        total = m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        temporary = total - weights - states
        text = program.Program(compiled.as_text())
        moved, sent = text.bytes_moved(), _by_kind(text.collectives())
    return Plan(
        topology=name,
        mesh=parallel.spell(sizes),
        devices=len(found),
        tokens=options.batch_size * options.accumulate * options.length,
        weights=weights,
        states=states,
        temporary=temporary,
        activations=kept,
        total=total,
        limit=round(generation.hbm_gib * GIB),
        flops=products,
        bytes_moved=moved,
        collectives=sent,
        seconds=time.perf_counter() - started,
    )


def smallest(make: Callable[[str], Plan], held: Callable[[str], int], generation: str) -> Iterator[Plan]:
    """Plans for ever larger slices of a generation, until one fits.

    Args:
        make: the plan for a slice.
        held: bytes that weights and states take of a device there, which is known without compiling: slices that not
            even these fit on are passed over.

    Example:
        >>> from types import SimpleNamespace
        >>> make = lambda name: SimpleNamespace(topology=name, fits=name == "v5e:2x4")   # in the place of `plan`
        >>> bytes_of = lambda name: 40 * GIB // topology.chips(name.removeprefix("v5e:"))   # in the place of `held`
        >>> [made.topology for made in smallest(make, bytes_of, "v5e")]   # one chip cannot hold 40 GiB
        ['v5e:2x2', 'v5e:2x4']
    """
    g = topology.GENERATIONS[generation]
    for size in g.slices:
        name = f"{generation}:{size}"
        if held(name) > g.hbm_gib * GIB:
            continue
        made = make(name)
        yield made
        if made.fits:
            return


def held(params: Params, options: Options, tx: optax.GradientTransformation, name: str, axes: str = "fsdp=-1") -> int:
    """Bytes of weights and states on one device of a slice; nothing is compiled.

    Example:
        >>> from unittest import mock
        >>> params, tx = {"norm": jax.ShapeDtypeStruct((1000,), jnp.float32)}, optax.adam(1e-3)
        >>> with mock.patch.object(topology, "devices", lambda name: jax.devices()[:1]):   # as if libtpu were here
        ...     held(params, Options(), tx, "v5e:1x1") // 1000   # 4 bytes of each weight, 8 of Adam's averages
        12
    """
    state, frozen, _, _ = _arguments(params, options, tx, _mesh(axes, topology.devices(name)))
    return sum(_bytes(leaf) for leaf in jax.tree.leaves((state, frozen)))


def table(plans: list[Plan], title: str) -> Any:
    """Plans side by side, for `rich`.

    Example:
        >>> sizes = (n * GIB for n in (2, 1, 9, 6, 12, 15))
        >>> made = Plan("v5e:2x2", "fsdp=4", 4, 8192, *sizes, flops=1e14, bytes_moved=None, collectives=None, seconds=9)
        >>> column = table([made], "a model").columns[1]
        >>> column.header, list(column.cells)[:4]
        ('v5e:2x2', ['fsdp=4', '8,192', '2.00 GiB', '1.00 GiB'])
    """
    from rich.table import Table

    gib = lambda n: f"{n / GIB:,.2f} GiB"
    rows: dict[str, Callable[[Plan], str]] = {
        "mesh": lambda p: p.mesh,
        "tokens a step": lambda p: f"{p.tokens:,}",
        "weights": lambda p: gib(p.weights),
        "optimizer states": lambda p: gib(p.states),
        "gradients, activations, scratch": lambda p: gib(p.temporary),
        "  of it activations, about": lambda p: gib(p.activations),
        "in all": lambda p: gib(p.total),
        "of": lambda p: gib(p.limit),
        "fits": lambda p: "yes" if p.fits else "no",
        "TFLOP": lambda p: f"{p.flops / p.devices / 1e12:,.2f}",
        "memory traffic, about": lambda p: "–" if p.bytes_moved is None else gib(p.bytes_moved),
    }
    kinds = sorted({kind for p in plans for kind in p.collectives or {}})
    for kind in kinds:
        rows[kind] = lambda p, kind=kind: _sent((p.collectives or {}).get(kind))
    rows["seconds to compile"] = lambda p: f"{p.seconds:.0f}"
    made = Table(title=f"{title}: one step, on each device")
    made.add_column("")
    for p in plans:
        made.add_column(p.topology, justify="right")
    for name, cell in rows.items():
        made.add_row(name, *map(cell, plans))
    return made


def _sent(found: tuple[int, int] | None) -> str:
    return "–" if found is None else f"{found[0]:,} × , {found[1] / GIB:,.3f} GiB".replace(" × ,", "×,")


def _mesh(axes: str, devices: list[Any]) -> Mesh:
    mesh = parallel.parse(axes, devices)
    if len(devices) == 1:
        return mesh
    placed = mesh_utils.create_device_mesh(mesh.devices.shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, mesh.axis_names, axis_types=mesh.axis_types)


def _arguments(params: Params, o: Options, tx: optax.GradientTransformation, mesh: Mesh):
    """(state, frozen, batch) as shapes with shardings, and the shardings of the state."""
    trainable, frozen = jax.eval_shape(lambda p: for_training(*adapters.split(p), o), params)
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    trainable, frozen = (jax.tree.map(place, tree, parallel.shardings(tree, mesh)) for tree in (trainable, frozen))
    shardings = state_shardings(trainable, tx, mesh)
    state = jax.tree.map(place, jax.eval_shape(lambda t: begin(t, tx), trainable), shardings)
    shape = (o.accumulate, o.batch_size, o.length)
    rows = NamedSharding(mesh, spec((None, "batch", "length"), shape, dict(mesh.shape)))
    of = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    batch = {name: of(jnp.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return state, frozen, batch | {"weights": of(jnp.float32)}, shardings


def _kept(config, options, trainable, frozen, batch, sizes) -> int:
    """About how many bytes of activations a device keeps for the backward pass of one batch."""
    part = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch)

    def backward(trainable, frozen, part):
        loss = lambda t: batch_loss(t, frozen, part, config=config, options=options)[0]
        return jax.vjp(loss, trainable)[1]

    jaxpr = jax.make_jaxpr(backward)(trainable, frozen, part).jaxpr
    given = set(jaxpr.invars)
    total = 0
    for var in {v for v in jaxpr.outvars if not isinstance(v, Literal) and v not in given}:
        shape = var.aval.shape
        if options.length not in shape:
            continue  # no activation
        split = parts(sizes) * sizes["context"]
        inner = shape[-1] in (config.hidden_dim, config.num_heads * config.head_dim) or config.num_heads in shape
        total += var.aval.size * var.aval.dtype.itemsize // (split * (sizes["tensor"] if inner else 1))
    return total


def _compile(lowered: Any) -> tuple[Any, int]:
    """(the program, 0), or (None, bytes that it would need) where that is more than there is."""
    try:
        return lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        needed = re.search(r"Used ([\d.]+)([GMT]) of", text) or re.search(r"\(([\d.]+)([GMT])\) exceeds", text)
        if "RESOURCE_EXHAUSTED" not in text or needed is None:
            raise
        return None, round(float(needed[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[needed[2]])


def _by_kind(found: list[program.Collective]) -> dict[str, tuple[int, int]]:
    kinds: dict[str, tuple[int, int]] = {}
    for one in found:
        times, size = kinds.get(one.kind, (0, 0))
        kinds[one.kind] = times + one.times, size + one.times * one.bytes
    return kinds


def _bytes(leaf: Any) -> int:
    """Of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
