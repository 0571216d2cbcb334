"""Checkpoints of pykan (`MultKAN.saveckpt` and `loadckpt`), read and written.

They are three files: PATH_config.yml, PATH_state (a state dictionary of torch) and PATH_cache_data.
"""

import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.extras import need
from jaxml.kan import symbolic
from jaxml.kan.layer import Layer, Spec
from jaxml.kan.library import ALIASES, LIBRARY
from jaxml.kan.network import KAN, Affine

BASES = {"silu": "silu", "identity": "identity", "zero": "zero"}  # pykan's base_fun_name → ours
AFFINE = ("subnode_scale", "subnode_bias", "node_scale", "node_bias")


def load(path: str | Path) -> KAN:
    """The network of a checkpoint of pykan, with all that it has; its splines are zero outside their grids.

    After pykan's `prune_input` it takes the columns that were kept, and no others (pykan does not store which).

    Args:
        path: as it was given to `saveckpt`, without _config.yml.

    Raises:
        FileNotFoundError: no such checkpoint.
        ImportError: torch or PyYAML is missing.
        ValueError: a damaged checkpoint; a base function or a fixed function that jaxml does not have.
    """
    torch, yaml = need("torch", "pykan"), need("yaml", "pykan")
    config_path, state_path = (Path(f"{path}{end}") for end in ("_config.yml", "_state"))
    for file in (config_path, state_path):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a checkpoint of pykan is PATH_config.yml and PATH_state.")
    try:
        config = yaml.safe_load(config_path.read_text())
        state = torch.load(state_path, weights_only=True, map_location="cpu")
        state = {k: (v.float() if v.dtype == torch.bfloat16 else v).detach().numpy() for k, v in state.items()}
    except (yaml.YAMLError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, LookupError,
            AttributeError, TypeError, ValueError) as error:  # fmt: skip
        raise ValueError(f"{path}: not a checkpoint of pykan, or damaged ({type(error).__name__}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path}: not a configuration of pykan, got {config!r}.")
    missing = {"width", "k", "base_fun_name", "mult_arity"} - set(config)
    if missing:
        raise ValueError(f"{config_path}: not a configuration of pykan, {', '.join(sorted(missing))} missing.")
    if config["base_fun_name"] not in BASES:
        raise ValueError(f"{path}: base_fun is one of {', '.join(BASES)}, got {config['base_fun_name']!r}.")
    try:
        return _network(config, state, path)
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: configuration and state do not fit each other ({error}).") from error


def _network(config: dict[str, Any], state: dict[str, np.ndarray], path: str | Path) -> KAN:
    width = [w if isinstance(w, (list, tuple)) else [w, 0] for w in config["width"]]
    layers, affine, arities = [], [], []
    for n in range(len(width) - 1):
        part = lambda name: _tensor(state, name, path)
        layers.append(_layer(part, n, config, path))
        four = [jnp.asarray(part(f"{name}_{n}")) for name in AFFINE]
        is_plain = all(np.all(np.asarray(a) == (0 if "bias" in name else 1)) for a, name in zip(four, AFFINE))
        affine.append(() if is_plain else Affine(*four))
        products = width[n + 1][1]
        homogeneous = isinstance(config["mult_arity"], int)
        arities.append((config["mult_arity"],) * products if homogeneous else tuple(config["mult_arity"][n + 1]))
    return KAN(tuple(layers), tuple(affine), tuple(arities))


def _tensor(state: dict[str, np.ndarray], name: str, path: str | Path) -> np.ndarray:
    if name not in state:
        raise ValueError(f"{path}: the state has no {name}; it is damaged or of another version of pykan.")
    return state[name]


def _layer(part, n: int, config: dict[str, Any], path: str | Path) -> Layer:
    order = int(config["k"])
    knots, coef = part(f"act_fun.{n}.grid"), part(f"act_fun.{n}.coef")
    points = knots[:, order : knots.shape[1] - order]
    shapes = [coef.shape, part(f"act_fun.{n}.scale_base").shape]
    if shapes != [(len(knots), coef.shape[1], knots.shape[1] - order - 1), coef.shape[:2]] or points.shape[1] < 2:
        raise ValueError(f"{path}: layer {n} has arrays of shapes {shapes} on knots {knots.shape}; it is damaged.")
    steps = np.diff(points, axis=1)
    uniform = bool(np.allclose(steps, steps.mean(axis=1, keepdims=True), rtol=1e-4, atol=0))
    coef = coef * part(f"act_fun.{n}.scale_sp")[..., None]
    names = config.get(f"symbolic.funs_name.{n}")
    numbers, mask = part(f"symbolic_fun.{n}.affine"), part(f"symbolic_fun.{n}.mask")
    fixed = []
    for out, into in np.argwhere(mask != 0).tolist():
        name = ALIASES.get(names[out][into], names[out][into])
        if name not in LIBRARY:
            raise ValueError(f"{path}: the function {name!r} of edge ({n}, {into}, {out}) is not in the library.")
        a, b, c, d = numbers[out, into]
        scale = mask[out, into]
        edge = symbolic.Edge(jnp.asarray([a, b, c * scale, d * scale]), into, out, LIBRARY[name])
        fixed.append(edge)
    return Layer(
        jnp.asarray(np.moveaxis(coef, 2, 0)),
        jnp.asarray(part(f"act_fun.{n}.scale_base")),
        jnp.asarray(points),
        None if np.all(part(f"act_fun.{n}.mask") == 1) else jnp.asarray(part(f"act_fun.{n}.mask")),
        tuple(fixed),
        Spec(points.shape[1] - 1, order, "bspline", BASES[config["base_fun_name"]], "zero", uniform),
    )


def save(path: str | Path, params: KAN, x: Any = None) -> None:
    """Writes a checkpoint that `kan.KAN.loadckpt(path)` of pykan reads.

    Args:
        path: a name without ending; its folder exists.
        x: samples [N, inputs] that pykan keeps as cache_data; pykan plots, prunes and names functions by them.

    Raises:
        ImportError: torch or PyYAML is missing.
        ValueError: what pykan does not have: another basis than splines, layers of different grids, orders or base
            functions, functions that are not in its library. (Outside its grid a spline of pykan is 0.)
    """
    torch, yaml = need("torch", "pykan"), need("yaml", "pykan")
    specs = {dataclasses.replace(layer.spec, uniform=True, outside="zero") for layer in params.layers}
    if len(specs) > 1:
        raise ValueError("pykan.save: all layers of pykan have one grid, order and base function, got different ones.")
    spec = specs.pop()
    if spec.basis != "bspline" or spec.base not in BASES:
        raise ValueError(f"pykan.save: pykan has splines beside {', '.join(BASES)}, "
                         f"got {spec.basis!r} beside {spec.base!r}.")  # fmt: skip
    if any(layer.spec.outside == "periodic" for layer in params.layers):
        raise ValueError("pykan.save: pykan has no periodic splines.")
    widths = [[params.layers[0].width[0], 0]]
    state: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for n, (layer, affine, arities) in enumerate(zip(params.layers, params.affine, params.arities)):
        sums = layer.width[1]
        widths.append([sums - sum(arities), len(arities)])
        outputs = sums - sum(arities) + len(arities)
        state |= {f"act_fun.{n}.{name}": a for name, a in _spline_state(layer).items()}
        names, numbers, mask = _symbolic_state(layer)
        config[f"symbolic.funs_name.{n}"] = names
        state |= {f"symbolic_fun.{n}.affine": numbers, f"symbolic_fun.{n}.mask": mask}
        four = affine or Affine(np.ones(sums), np.zeros(sums), np.ones(outputs), np.zeros(outputs))
        four = four.inner_scale, four.inner_shift, four.outer_scale, four.outer_shift
        state |= {f"{name}_{n}": a for name, a in zip(AFFINE, four)}
    alike = {a for arities in params.arities for a in arities}
    mult_arity: Any = (alike or {2}).pop() if len(alike) <= 1 else [[], *(list(a) for a in params.arities)]
    config |= dict(
        width=widths, grid=spec.grid, k=spec.order, mult_arity=mult_arity, base_fun_name=spec.base,
        symbolic_enabled=True, affine_trainable=False, grid_eps=1.0, grid_range=[-1, 1], sp_trainable=True,
        sb_trainable=True, state_id=0, auto_save=False, ckpt_path="./model", round=0, device="cpu",
    )  # fmt: skip
    tensors = {k: torch.tensor(np.array(v, np.float32)) for k, v in jax.device_get(state).items()}
    cache = None if x is None else torch.tensor(np.array(x, np.float32))
    Path(f"{path}_config.yml").write_text(yaml.safe_dump(config))
    torch.save(tensors, f"{path}_state")
    torch.save(cache, f"{path}_cache_data")


def _spline_state(layer: Layer) -> dict[str, Any]:
    order = layer.spec.order
    points = np.asarray(layer.points, np.float64)
    step = (points[:, -1:] - points[:, :1]) / layer.spec.grid
    more = np.arange(1, order + 1)[None] * step
    return {
        "grid": np.concatenate([points[:, :1] - more[:, ::-1], points, points[:, -1:] + more], axis=1),
        "coef": jnp.moveaxis(layer.coef, 0, 2),
        "mask": layer.kept,
        "scale_base": layer.base,
        "scale_sp": jnp.ones_like(layer.base),
    }


def _symbolic_state(layer: Layer) -> tuple[list[list[str]], np.ndarray, np.ndarray]:
    inputs, sums = layer.width
    names: list[list[str]] = [["0"] * inputs for _ in range(sums)]
    numbers, mask = np.zeros((sums, inputs, 4)), np.zeros((sums, inputs))
    for edge in layer.fixed:
        if LIBRARY.get(edge.function.name) is not edge.function:
            raise ValueError(f"pykan.save: pykan's library has no function {edge.function.name!r}.")
        names[edge.out][edge.into] = edge.function.name
        numbers[edge.out, edge.into], mask[edge.out, edge.into] = np.asarray(edge.numbers), 1
    return names, numbers, mask
