"""Every fixed activation on many points, in three programs: one a dtype, derivatives by reverse mode."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.activations import CATALOGUE
from tests.activations.definitions import DEFINITIONS

NAMES = tuple(DEFINITIONS)
HUGE = np.array([-np.inf, -3e38, -1e30, -1e19, -2e9, -1e5, -200, 0, 200, 1e5, 2e9, 1e19, 1e30, 3e38, np.inf])
ORDERS = {"float64": (0, 1, 2), "float32": (0, 1, 2), "bfloat16": (0, 1)}


def derivative(function, order):
    """The derivative of an element-wise function, by reverse mode."""
    for _ in range(order):
        function = jax.grad(function)
    return function


@functools.lru_cache
def points():
    """{set: x}, both signs, seven decades and a dense middle; "logit"'s sets lie in (0, 1)."""
    rng = np.random.default_rng(0)

    def both(dtype, count):
        x = np.concatenate([10 ** rng.uniform(-5, 2.2, count), rng.uniform(0, 12, count)])
        x = np.asarray(jnp.asarray(np.concatenate([-x, x]), dtype), np.float64)
        z = np.concatenate([10 ** rng.uniform(-5, -0.3, 2 * count), rng.uniform(0.01, 0.99, 2 * count)])
        return np.sort(x), np.sort(np.clip(np.asarray(jnp.asarray(z, dtype), np.float64), 1e-5, 0.99))

    grid = np.geomspace(1e-6, 300, 6000)
    return {
        "exact": both("float32", 16),
        "float32": both("float32", 4000),
        "bfloat16": both("bfloat16", 2000),
        "grid": (np.concatenate([-grid[::-1], grid]), np.linspace(1e-4, 1 - 1e-4, 12000)),
        "kinks": (np.linspace(-3.5, 3.5, 7001) + 1e-7, np.linspace(0.1, 0.9, 7001)),
        "huge": (HUGE, np.linspace(0.01, 0.99, len(HUGE))),
    }


@functools.lru_cache
def evaluated(dtype):
    """{set: {name: (x, [array of each order])}} computed in a dtype, as float64."""
    sets = points()
    if dtype != "float64":
        sets = {"huge": sets["huge"], dtype: sets[dtype]}

    def run(x, z):
        of = lambda name, order: jax.vmap(derivative(CATALOGUE[name].function, order))
        return {name: [of(name, order)(z if name == "logit" else x) for order in ORDERS[dtype]] for name in NAMES}

    with jax.enable_x64(dtype == "float64"), quick(dtype == "float64"):
        joined = [jnp.asarray(np.concatenate([s[i] for s in sets.values()]), dtype) for i in range(2)]
        out = {name: [np.asarray(a, np.float64) for a in values] for name, values in jax.jit(run)(*joined).items()}
    split = np.cumsum([len(s[0]) for s in sets.values()])[:-1]
    parts = {name: [np.split(a, split) for a in values] for name, values in out.items()}
    return {
        key: {name: (s[name == "logit"], [order[i] for order in parts[name]]) for name in NAMES}
        for i, (key, s) in enumerate(sets.items())
    }


@contextlib.contextmanager
def quick(on):
    """Compiles quickly, where only the numbers matter."""
    jax.config.update("jax_disable_most_optimizations", on)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
