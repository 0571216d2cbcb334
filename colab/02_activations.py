# %% [markdown]
# # Activations: a gallery, and what their gradients cost
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/02_activations.ipynb)
#
# More than 110 activations as pure functions, computed in float32 inside and rounded once, whose derivatives keep one array and no others. Here: how they look, how exact a gradient is in bfloat16, what a backward pass keeps, and one that learns its own shape. A CPU is enough.

# %%
# %pip install -q "jaxml[plot] @ git+https://github.com/jaxml/jaxml"

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from jaxml import activations
from jaxml.activations import plot

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
print(jax.devices())
if jax.default_backend() == "cpu":
    print("No accelerator is needed here.")

# %% [markdown]
# ## The gallery
#
# Those of one argument: a function (blue) with the derivative that gradients take (orange) from −4 to 4. (`step` and `sign`, whose derivative is 0, have a surrogate.) Gated ones and those to the simplex take more than a number.

# %%
chosen = plot.drawable()[:6] if SMOKE else plot.drawable()
print(len(chosen), "functions")
Image(plot.gallery("gallery.png", chosen), width=1000)

# %% [markdown]
# ## What is known of each
#
# `CATALOGUE` has the formula, the range, the gain for initialisation, the paper, and the names in torch and Keras.

# %%
for name in ("gelu_exact", "silu", "mish", "relu_squared", "snake"):
    known = activations.CATALOGUE[name]
    print(f"{name:13} {known.formula:28} range {known.range}, gain {known.gain and round(known.gain, 3)}  ({known.paper or 'folklore'})")

# %% [markdown]
# ## Gradients where numbers are narrow
#
# The derivative of mish in bfloat16 against float64, by jaxml and by the formula written down with `jax.nn`: arithmetic in bfloat16 loses digits that float32 inside keeps. (At x = −1.19, where the derivative is 0, a relative error says little.)

# %%
def written_down(x):
    return x * jnp.tanh(jax.nn.softplus(x))


at = np.linspace(-12, 4, 200 if SMOKE else 2000).astype(jnp.bfloat16)
x64 = at.astype(np.float64)
t, s = np.tanh(np.logaddexp(0, x64)), 1 / (1 + np.exp(-x64))
exact = t + x64 * s * (1 - t * t)
slope = lambda f: np.asarray(jax.vmap(jax.grad(f))(jnp.asarray(at)), np.float64)
errors = {
    "jaxml.activations.mish": abs(slope(activations.mish) - exact) / abs(exact),
    "x * tanh(softplus(x))": abs(slope(written_down) - exact) / abs(exact),
}

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for (name, error), colour in zip(errors.items(), ("#1f5fa8", "#d9822b")):
    axes.semilogy(x64, error + 1e-6, color=colour, linewidth=0.8, label=name)
axes.axhline(2.0**-8, color="#2b3440", linestyle="--", linewidth=1, label="half a unit of the last place")
axes.set(title="Error of mish's derivative in bfloat16", xlabel="x", ylabel="relative error")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What a backward pass keeps
#
# Memory that the compiled gradient of a stack of activations needs, beside the arrays that go in and out. The derivative of jaxml's functions is a rule of their own that keeps the input alone; of softplus jax.nn keeps no more either.

# %%
layers, shape = (4, (64, 128)) if SMOKE else (24, (1024, 1024))


def temporary_mib(f):
    def stack(x):
        return jnp.sum(jax.lax.scan(lambda y, _: (f(y) * 1.01, None), x, length=layers)[0])

    compiled = jax.jit(jax.grad(stack)).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


pairs = {
    "mish": (activations.mish, jax.nn.mish),
    "gelu_tanh": (activations.gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True)),
    "silu": (activations.silu, jax.nn.silu),
    "softplus": (activations.softplus, jax.nn.softplus),
}
memory = {name: [temporary_mib(f) for f in both] for name, both in pairs.items()}
for name, (ours, theirs) in memory.items():
    print(f"{name:10} {ours:8.1f} MiB, jax.nn's arithmetic {theirs:8.1f} MiB")

# %%
places = np.arange(len(memory))
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for shift, column, label, colour in ((-0.2, 0, "jaxml", "#1f5fa8"), (0.2, 1, "jax.nn", "#d9822b")):
    axes.bar(places + shift, [m[column] for m in memory.values()], 0.4, label=label, color=colour)
axes.set_xticks(places, list(memory))
axes.set(title=f"Gradient through {layers} activations of {shape[0]} × {shape[1]}, float32", xlabel="activation", ylabel="temporary memory (MiB)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## One that learns
#
# `snake` is x + sin²(ax)/a with a trained a for each feature ([Ziyin et al. 2020](https://arxiv.org/abs/2006.08195)): it finds a period by gradient descent and goes on waving beyond the samples, less and less exactly; ReLU goes on straight.

# %%
import optax

wave = lambda x: jnp.sin(2.5 * x) + 0.3 * x
x = jnp.linspace(-4, 4, 256)[:, None]
y, wider = wave(x), jnp.linspace(-9, 9, 512)[:, None]
features = 64


def init(key):
    one, two, three = jax.random.split(key, 3)
    return {
        "w1": jax.random.normal(one, (1, features)), "b1": jax.random.uniform(two, (features,), minval=-3.0, maxval=3.0),
        "w2": jax.random.normal(three, (features, 1)) / features**0.5, "a": activations.learnable.snake.init((features,)),
    }


def network(act):
    return lambda p, x: act(p["a"], x @ p["w1"] + p["b1"]) @ p["w2"]


def train(apply, steps):
    tx = optax.adam(1e-2)
    params = init(jax.random.key(0))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((apply(p, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


steps = 20 if SMOKE else 4000
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.axvspan(-4, 4, color="#cfd9e6", label="samples")
axes.plot(wider, wave(wider), color="#2b3440", linewidth=1, linestyle="--", label="truth")
for label, act, colour in (("snake, learnt", activations.learnable.snake.apply, "#1f5fa8"), ("relu", lambda a, x: activations.relu(x), "#d9822b")):
    apply = network(act)
    axes.plot(wider, apply(train(apply, steps), wider), color=colour, label=label)
axes.set(title=f"One hidden layer of {features}, {steps:,} steps", xlabel="x", ylabel="y", ylim=(-5, 5))
axes.legend(facecolor="white", framealpha=1, ncols=2)
plt.show()

# %% [markdown]
# Next: [attention](03_flash_attention.ipynb).
