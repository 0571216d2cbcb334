"""Every number of the catalogue, measured; the table and the picture made from it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import activations
from jaxml.activations import CATALOGUE, catalogue, plot
from tests.activations.conftest import evaluated

FIXED = [name for name, a in CATALOGUE.items() if a.kind == "fixed"]
STEPS = ("step", "sign")  # whose gradient is that of something else


@functools.lru_cache
def measured():
    """{name: (x, f, f')} in float64 on an even grid between −20 and 20."""
    x = np.linspace(-20, 20, 40001) + 1e-9
    with jax.enable_x64(True):
        at = lambda name: jnp.asarray(np.linspace(1e-6, 1 - 1e-6, 40001) if name == "logit" else x)
        values = {name: CATALOGUE[name].function(at(name)) for name in FIXED}
        return {name: (np.asarray(at(name)), np.asarray(value)) for name, value in values.items()}


def test_at_least_seventy_of_which_each_name_exists():
    assert len(CATALOGUE) >= 70 and len({a.name for a in CATALOGUE.values()}) == len(CATALOGUE)
    assert {a.kind for a in CATALOGUE.values()} == set(catalogue.KINDS)
    for entry in CATALOGUE.values():
        assert callable(entry.function if entry.kind != "learnable" else entry.function.apply), entry.name
        assert entry.formula and entry.kind in catalogue.KINDS
    named = {a.name.rpartition(".")[2] for a in CATALOGUE.values()}
    own = "activation halves fit_rational gain gelu swish hard_swish standardize log1mexp logsumexp".split()
    own += ["gated_feed_forward"]
    exported = {n for n in activations.__all__ if callable(getattr(activations, n)) and n not in own}
    assert exported <= named, exported - named


@pytest.mark.parametrize("name", FIXED)
def test_range_monotonicity_and_parity(name):
    entry, (_, y) = CATALOGUE[name], measured()[name]
    low, high = entry.range
    slack = 1e-4 * max(1, abs(low) if math.isfinite(low) else 0, abs(high) if math.isfinite(high) else 0)
    assert low - slack <= y.min() and y.max() <= high + slack
    ends = [v for v in entry.limits if v is not None]
    for bound, reached in ((low, min([y.min(), *ends])), (high, max([y.max(), *ends]))):
        reach = abs(reached) > 18 if name == "gcu" else reached == bound
        assert reach or abs(reached - bound) <= slack, (bound, reached)
    assert entry.monotonic == bool((np.diff(y) >= -1e-12 * np.maximum(1, np.abs(y[1:]))).all())
    x = np.linspace(0.03, 9, 300).astype(np.float32)
    if name != "logit":
        right, left = entry.function(x), entry.function(-x)
        parity = "odd" if np.allclose(right, -left, 1e-6) else "even" if np.allclose(right, left, 1e-6) else ""
        assert entry.parity == parity


@pytest.mark.parametrize("name", FIXED)
def test_lipschitz_constant(name):
    entry, (x, y) = CATALOGUE[name], measured()[name]
    slopes = np.abs(np.diff(y) / np.diff(x))
    if entry.smooth < 0:
        assert entry.lipschitz == math.inf and np.abs(np.diff(y)).max() > 0.4
    elif entry.lipschitz == math.inf:
        assert slopes.max() > 15
    else:
        assert entry.lipschitz * 0.995 < slopes.max() <= entry.lipschitz * (1 + 1e-4)


@pytest.mark.parametrize("name", [name for name in FIXED if CATALOGUE[name].gain is not None])
def test_gain_and_centre(name):
    entry, (x, y) = CATALOGUE[name], measured()[name]
    weight = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    with np.errstate(over="ignore"):
        square, mean = np.sum(np.where(weight > 0, weight * y * y, 0)), np.sum(np.where(weight > 0, weight * y, 0))
    assert abs(entry.gain - 1 / math.sqrt(square)) < 2e-4 * entry.gain
    assert entry.zero_centred == (abs(mean) < 1e-3)
    if name != "symexp":
        assert abs(activations.gain(entry.function) - entry.gain) < 2e-3


@pytest.mark.parametrize("name", [name for name in FIXED if name not in ("logit", *STEPS)])
def test_number_of_continuous_derivatives(name):
    """A jump is a step between neighbours that is much larger than the steps before and after it."""
    smooth, derivatives = CATALOGUE[name].smooth, evaluated("float64")["kinks"][name][1]
    for order in range(min(3, int(min(smooth, 2)) + 2)):
        steps = np.abs(np.diff(derivatives[order]))
        jump = np.max(steps[1:-1] - np.maximum(steps[:-2], steps[2:]))
        assert jump > 0.009 if order == smooth + 1 else jump < 1e-3, (order, jump)


def test_saturation_follows_from_the_limits():
    sides = {name: CATALOGUE[name].saturating for name in ("relu", "tanh", "leaky_relu", "sin", "log_sigmoid")}
    assert sides == {"relu": "left", "tanh": "both", "leaky_relu": "", "sin": "", "log_sigmoid": "right"}


def test_select_and_find():
    odd = catalogue.select(parity="odd", saturating="both", smooth=math.inf)
    assert [a.name for a in odd] == ["tanh", "lecun_tanh", "arctan", "erf", "isru"]
    assert catalogue.find("snakebeta").name == "learnable.snakebeta" and catalogue.find("gelu").name == "gelu_tanh"
    with pytest.raises(ValueError, match=r"Near: .*mish"):
        catalogue.find("mishh")
    with pytest.raises(ValueError, match=r"select: attributes are .*gain"):
        catalogue.select(colour="blue")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_has_a_panel_for_each(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    entries = [catalogue.find(name) for name in ("relu", "mish", "logit", "spline", "apl")]
    path = plot.gallery(tmp_path / f"gallery.{suffix}", entries)
    assert path.stat().st_size > 5000
    if suffix == "svg":
        text = path.read_text()
        assert all(f"<!-- {a.name} -->" in text for a in entries)
