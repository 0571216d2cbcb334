"""float64 against mpmath, then float32 and bfloat16 against float64: values and gradients, limits, every order."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.activations import CATALOGUE
from tests.activations.conftest import NAMES, evaluated, quick
from tests.activations.definitions import DEFINITIONS, KINKS

pytestmark = pytest.mark.optimised  # it is what XLA makes of the arithmetic that counts
mp = pytest.importorskip("mpmath")

NO_LIMIT = ("sin", "cos", "gcu")
# exp(−exp(−x)): the rounding of the inner exponential counts exp(−x) times.
AMPLIFIED = {"gompertz": lambda x: 1 + np.exp(-np.clip(x, -90, 0))}


def away(name, x, distance=0.0):
    """Whether x is farther from every kink than this."""
    return np.min(np.abs(x[:, None] - np.array([*KINKS.get(name, ()), 1e9])), axis=1) > distance


@functools.lru_cache
def taylor(name):
    """(x, [f, f', f'', f'''] at x) in mpmath."""
    x = evaluated("float64")["exact"][name][0]
    x = x[away(name, x, 1e-7)]
    series = [mp.taylor(DEFINITIONS[name], mp.mpf(v), 3, chop=False) for v in x]
    return x, np.array([[float(c) * math.factorial(k) for k, c in enumerate(s)] for s in series]).T


def zero_within(name, order, x, share):
    """Whether this derivative changes sign, or touches 0, between (1 − share) x and (1 + share) x."""
    at, derivatives = evaluated("float64")["grid"][name]
    f, size = derivatives[order], np.abs(derivatives[order])
    crossing = f[:-1] * f[1:] < 0
    touching = np.zeros(len(f), bool)
    touching[1:-1] = (size[1:-1] < size[:-2]) & (size[1:-1] <= size[2:]) & (size[1:-1] < 1e-3 * np.max(size[1:-1]))
    zeros = np.sort(np.concatenate([at[:-1][crossing], at[touching]]))
    ends = np.sort(np.stack([(1 - share) * x, (1 + share) * x]), axis=0)
    return np.searchsorted(zeros, ends[1]) > np.searchsorted(zeros, ends[0])


def within(name, order, x, mine, true, dtype, units):
    """Asserts |mine − true| ≤ units · eps · |true|; within 50 % of a zero of it, units · eps · |x slope|."""
    info = jnp.finfo(dtype)
    size = np.abs(true[order])
    size = np.where(zero_within(name, order, x, 0.5), np.maximum(size, np.abs(x * true[order + 1])), size)
    allowed = units * float(info.eps) * size * AMPLIFIED.get(name, np.ones_like)(x)
    allowed += 4 * float(info.tiny) * np.maximum(1, np.abs(x)) ** 3  # a factor that small is 0 on this device
    measured = away(name, x) & (size < float(info.max))
    with np.errstate(invalid="ignore"):
        excess = np.where(measured, np.abs(mine - true[order]) / allowed, 0)
    worst = excess.argmax()
    assert excess[worst] <= 1, (name, order, x[worst], mine[worst], true[order][worst], units * excess[worst])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_float64_is_the_definition(order):
    for name in NAMES:
        all_x, mine = evaluated("float64")["exact"][name]
        equals_definition(name, order, mine[order][away(name, all_x, 1e-7)])


def equals_definition(name, order, mine):
    """Asserts equality with mpmath, relative to the value or, near its zeros, to what a change of x makes."""
    x, true = taylor(name)
    size = np.abs(true[order])
    if order == 3:
        size += np.abs(true[2] / x)
    else:
        near = zero_within(name, order, x, 0.5)
        size = np.where(near, np.maximum(size, np.abs(x * true[order + 1])), size)
    size *= AMPLIFIED.get(name, np.ones_like)(x)
    known = (size > 1e-290) & (size > 1e-40 * np.abs(true[0]))  # of sixty digits
    error = np.where(known, np.abs(mine - true[order]) / (size + 1e-300), 0)
    worst = error.argmax()
    tolerance = 1e-12 if order < 2 else 1e-9
    assert error[worst] < tolerance, (name, order, x[worst], mine[worst], true[order][worst], error[worst])


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_within_4_eps_in_value_and_gradient(name):
    x, mine = evaluated("float32")["float32"][name]
    for order in (0, 1):
        within(name, order, x, mine[order], evaluated("float64")["float32"][name][1], "float32", 4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_within_one_unit_in_value_and_gradient(name):
    x, mine = evaluated("bfloat16")["bfloat16"][name]
    for order in (0, 1):
        within(name, order, x, mine[order], evaluated("float64")["bfloat16"][name][1], "bfloat16", 1)


def test_float32_without_jit_is_within_4_eps():
    for name in NAMES:
        x, true = evaluated("float64")["float32"][name]
        mine = np.asarray(CATALOGUE[name].function(jnp.asarray(x, jnp.float32)), np.float64)
        within(name, 0, x, mine, true, "float32", 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_limits_at_infinity_are_right_and_nothing_is_nan(dtype):
    for name in NAMES:
        _, derivatives = evaluated(dtype)["huge"][name]
        finite = [a[1:-1] if name in NO_LIMIT else a for a in derivatives[:3]]
        assert not any(np.isnan(a).any() for a in finite), (name, finite)
        if name not in (*NO_LIMIT, "logit"):
            np.testing.assert_allclose(
                derivatives[0][[0, -1]], CATALOGUE[name].limits, rtol=1e-2, atol=1e-5, err_msg=name
            )


def test_second_derivatives_are_finite():
    for name in NAMES:
        x, derivatives = evaluated("float32")["float32"][name]
        assert all(np.isfinite(a[np.abs(x) < 40]).all() for a in derivatives), name


@pytest.mark.slow
def test_forward_and_mixed_modes_are_reverse_mode_and_the_third_order_is_the_definition():
    forward, reverse = lambda f: lambda v: jax.jvp(f, (v,), (jnp.ones_like(v),))[1], jax.grad
    modes = (
        forward,
        lambda f: forward(forward(f)),
        lambda f: forward(reverse(f)),
        lambda f: reverse(forward(forward(f))),
    )

    def run(points):
        return {name: [jax.vmap(mode(CATALOGUE[name].function))(points[name]) for mode in modes] for name in NAMES}

    exact = evaluated("float64")["exact"]
    with jax.enable_x64(True), quick(True):
        out = jax.jit(run)({name: jnp.asarray(exact[name][0]) for name in NAMES})
    for name, (first, second, mixed, third) in out.items():
        x, true = exact[name]
        for mine, order in ((first, 1), (second, 2), (mixed, 2)):
            np.testing.assert_allclose(mine, true[order], 1e-9, 1e-12 * np.abs(true[order]).max(), err_msg=name)
        equals_definition(name, 3, np.asarray(third)[away(name, x, 1e-7)])


@pytest.mark.parametrize("name", [a.name for a in CATALOGUE.values() if a.smooth == math.inf and a.name != "logit"])
def test_derivatives_at_zero_are_those_of_the_definition(name):
    true = mp.taylor(DEFINITIONS[name], mp.mpf("1e-20"), 3, chop=False)
    x, derivatives = evaluated("float64")["huge"][name]
    mine = [order[x == 0][0] for order in derivatives]
    true = [float(c) * math.factorial(k) for k, c in enumerate(true)][: len(mine)]
    np.testing.assert_allclose(mine, true, rtol=1e-10, atol=1e-10)
