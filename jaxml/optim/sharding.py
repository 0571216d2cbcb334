"""Where the optimizer's state lives: shardings of a state, derived from those of the parameters.

`jit(tx.init)` gives zeros that live nowhere in particular, and XLA then keeps the bases of a projection whole on every
device. A basis P [m, r] is spread as the parameter's m axes are, a moment of full shape as its parameter, R and its
moments [r, n] over the mesh axes of both m and n, since r is short; everything else is on every device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxml.optim.galore import TargetState
from jaxml.optim.lora import Factors
from jaxml.optim.offload import HOST, Offloaded, is_large
from jaxml.optim.packed import Packed, is_packed
from jaxml.optim.plain import plain
from jaxml.optim.targets import Target
from jaxml.parallel.rules import dividing
from jaxml.paths import path_of


def state_sharding(tx: optax.GradientTransformation, params: Any) -> Any:
    """A tree like `tx.init(params)` with a `NamedSharding` for each array.

    An axis is spread over as many of its mesh axes as divide its length.

    Args:
        params: arrays, or `jax.ShapeDtypeStruct`s, with named shardings on one mesh.

    Raises:
        ValueError: no parameter has a named sharding.

    Example:
        >>> from jaxml.optim import galore
        >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> rows = NamedSharding(mesh, P("fsdp", None))
        >>> params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)}
        >>> tx = galore(optax.adam(1e-3), rank=4)
        >>> shardings = state_sharding(tx, params)
        >>> shardings.targets["w"].basis[0].spec, shardings.inner[0].mu["w"].spec
        (P('fsdp', None), P(None, 'fsdp'))
        >>> state = jax.jit(tx.init, out_shardings=shardings)({"w": jnp.zeros((64, 32))})
    """
    params = plain(params)
    codes = lambda w: w.codes if is_packed(w) else w
    whole = {path: codes(w) for path, w in jax.tree.leaves_with_path(params, is_leaf=is_packed)}
    meshes = [leaf.sharding.mesh for leaf in whole.values() if _is_named(leaf)]
    if not meshes:
        raise ValueError("state_sharding: parameters have a NamedSharding, got none. Place them with jax.device_put.")
    is_node = lambda x: isinstance(x, TargetState | Factors | Packed)
    state = jax.eval_shape(tx.init, params)
    targets = {n.target.path: n.target for n in jax.tree.leaves(state, is_leaf=is_node) if hasattr(n, "target")}

    def of(path: tuple, node: Any) -> Any:
        owner = next((path[i:] for i in range(len(path) + 1) if path[i:] in whole), None)
        if owner is None:
            return _spread(meshes[0], P(), node)
        leaf, target = whole[owner], targets.get(path_of(owner))
        spec = leaf.sharding.spec if _is_named(leaf) else P()
        if target is not None:
            batch, m, n = _axes(target, spec)
            both = P(*batch, _flat(m, n), None), P(*batch, None, _flat(n, m)), P(*batch, m, n)
            low = both[("right", "left", "full").index(target.side)]
            if isinstance(node, Factors):
                parts = _spread(meshes[0], P(*batch, m, None), node.a), _spread(meshes[0], P(*batch, None, n), node.b)
                return Factors(*parts, target)
            if isinstance(node, TargetState):
                axes = {"left": (m,), "right": (n,), "full": (m, n)}[target.side]
                basis = tuple(_spread(meshes[0], P(*batch, axis, None), b) for axis, b in zip(axes, node.basis))
                turns, norm = _spread(meshes[0], P(*batch), (node.turns, node.norm))
                return TargetState(basis, turns, norm, _spread(meshes[0], low, node.coordinates), target)
            if jnp.shape(node) == target.low_shape:
                return _spread(meshes[0], low, node)
        return _spread(meshes[0], spec if jnp.shape(node) == jnp.shape(leaf) else P(), node)

    return _away(jax.tree.map_with_path(of, state, is_leaf=is_node), state)


def _away(shardings: Any, state: Any) -> Any:
    """What `offload` keeps lies in the host's memory."""
    is_offloaded = lambda x: isinstance(x, Offloaded)

    def away(node: Any, like: Any) -> Any:
        if not is_offloaded(node):
            return node
        move = lambda s, a: s.with_memory_kind(HOST) if is_large(a, like.min_size) else s
        return jax.tree.map(move, node, like)

    return jax.tree.map(away, shardings, state, is_leaf=is_offloaded)


def _is_named(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


def _axes(target: Target, spec: P) -> tuple[tuple, Any, Any]:
    """(mesh axes of each batch axis, of m, of n); where m or n is made of several axes, those of the first."""
    spec = (*spec, *[None] * (len(target.shape) - len(spec)))
    batch = tuple(s for i, s in enumerate(spec) if i not in target.reduction + target.output)
    return batch, spec[target.reduction[0]], spec[target.output[0]]


def _spread(mesh: Mesh, spec: P, tree: Any) -> Any:
    """The sharding of every array of the tree, without the axes that do not fit it."""

    fitting = lambda n, axes: dividing(n, _flat(axes) or (), mesh.shape)
    place = lambda array: NamedSharding(mesh, P(*(fitting(n, axes) for n, axes in zip(array.shape, spec))))

    return jax.tree.map(place, tree)


def _flat(*axes: Any) -> tuple[str, ...] | None:
    """Mesh axes of several entries of a spec, as one entry."""
    return tuple(a for entry in axes for a in ((entry,) if isinstance(entry, str) else entry or ())) or None
