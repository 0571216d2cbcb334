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

from jaxml import files
from jaxml.extras import need
from jaxml.kan import network, symbolic
from jaxml.kan.layer import Layer, Spec
from jaxml.kan.library import ALIASES, LIBRARY
from jaxml.kan.network import KAN, Affine

CONFIG_BYTES, NODES = 4 * files.MIB, 10**6
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

    Example:
        >>> import tempfile
        >>> from jaxml.extras import version
        >>> params = network.init(jax.random.key(0), [2, 3, 1], outside="zero")
        >>> if version("torch") and version("pyyaml"):  # jaxml[pykan]
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         save(f"{folder}/small", params)
        ...         read = load(f"{folder}/small")
        ...     assert read.widths == (2, 3, 1) and (read.layers[0].coef == params.layers[0].coef).all()
    """
    torch, yaml = need("torch", "pykan"), need("yaml", "pykan")
    config_path, state_path = (Path(f"{path}{end}") for end in ("_config.yml", "_state"))
    for file in (config_path, state_path):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a checkpoint of pykan is PATH_config.yml and PATH_state.")
    with files.reading(config_path, "pykan's configuration", (yaml.YAMLError,)):
        # Every scalar as text: other loaders turn them into numbers and merge mappings as the file says.
        config = yaml.load(files.read_text(config_path, CONFIG_BYTES), Loader=yaml.BaseLoader)
    with files.reading(state_path, "a state of torch", (pickle.UnpicklingError, RuntimeError)):
        state = _state(torch, state_path)
    if not isinstance(config, dict):
        raise ValueError(f"{config_path}: not a configuration of pykan, got {type(config).__name__}.")
    missing = {"width", "k", "base_fun_name", "mult_arity"} - set(config)
    if missing:
        raise ValueError(f"{config_path}: not a configuration of pykan, {', '.join(sorted(missing))} missing.")
    base = config["base_fun_name"]
    if not isinstance(base, str) or base not in BASES:
        raise ValueError(f"{path}: base_fun is one of {', '.join(BASES)}, got {_said(base)}.")
    try:
        made = _network(config, state, path)
    except files.IMPOSSIBLE as error:
        raise ValueError(f"{path}: configuration and state do not fit each other ({error}).") from error
    try:
        return network.check(made)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _state(torch: Any, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dictionary, none of which is larger than its file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        files.check_stored(archive, size, path)
    tensors = torch.load(path, weights_only=True, map_location="cpu")
    if sum(v.numel() * v.element_size() for v in tensors.values()) > size:
        raise ValueError(f"{path}: its tensors are larger than its {size:,} bytes.")
    if odd := [k for k, v in tensors.items() if not v.is_floating_point() or v.is_sparse]:
        raise ValueError(f"{path}: a state holds dense tensors of real numbers, got another one as {odd[0]}.")
    return {k: (v.float() if v.dtype == torch.bfloat16 else v).detach().numpy() for k, v in tensors.items()}


def _network(config: dict[str, Any], state: dict[str, np.ndarray], path: str | Path) -> KAN:
    width = [w if isinstance(w, list) else [w, 0] for w in _counts(config["width"], path)]
    arity = _counts(config["mult_arity"], path)
    if len(width) < 2:
        raise ValueError(f"{path}: a network has at least two widths, got {width}.")
    layers, affine, arities = [], [], []
    for n in range(len(width) - 1):
        part = lambda name: _tensor(state, name, path)
        layers.append(_layer(part, n, config, path))
        four = [jnp.asarray(part(f"{name}_{n}")) for name in AFFINE]
        is_plain = all(np.all(np.asarray(a) == (0 if "bias" in name else 1)) for a, name in zip(four, AFFINE))
        affine.append(() if is_plain else Affine(*four))
        products = width[n + 1][1]
        if products > layers[-1].width[1]:
            raise ValueError(f"{path}: layer {n} multiplies at most its {layers[-1].width[1]} sums, got {products}.")
        arities.append((arity,) * products if isinstance(arity, int) else tuple(arity[n + 1]))
    return KAN(tuple(layers), tuple(affine), tuple(arities))


def _tensor(state: dict[str, np.ndarray], name: str, path: str | Path) -> np.ndarray:
    if name not in state:
        raise ValueError(f"{path}: the state has no {name}; it is damaged or of another version of pykan.")
    return state[name]


def _counts(value: Any, path: str | Path) -> Any:
    """A number, a list of them or a list of such lists, from text."""

    def number(text: Any) -> int:
        if not isinstance(text, str) or not text.isdecimal() or len(text) > 9:
            raise ValueError(f"{path}: a configuration of pykan counts in whole numbers, got {_said(text)}.")
        return int(text)

    if not isinstance(value, list):
        return number(value)
    if sum(len(inner) if isinstance(inner, list) else 1 for inner in value) > NODES:
        raise ValueError(f"{path}: a configuration of pykan counts at most {NODES:,} times.")
    return [list(map(number, inner)) if isinstance(inner, list) else number(inner) for inner in value]


def _said(value: Any) -> str:
    """A text in short, or what is there in its place, which may refer to itself."""
    return repr(value[:50]) if isinstance(value, str) else type(value).__name__


def _layer(part, n: int, config: dict[str, Any], path: str | Path) -> Layer:
    order = _counts(config["k"], path)
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

    Example:
        >>> import tempfile
        >>> from jaxml.extras import version
        >>> params = network.init(jax.random.key(0), [2, 3, 1], outside="zero")
        >>> if version("torch") and version("pyyaml"):  # jaxml[pykan]
        ...     with tempfile.TemporaryDirectory() as folder:
        ...         save(f"{folder}/small", params, jnp.zeros((10, 2)))
        ...         names = sorted(path.name for path in Path(folder).iterdir())
        ...     assert names == ["small_cache_data", "small_config.yml", "small_state"]
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
