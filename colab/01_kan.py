# %% [markdown]
# # Kolmogorov–Arnold networks: from data to a formula
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/01_kan.ipynb)
#
# A Kolmogorov–Arnold network ([Liu et al. 2024](https://arxiv.org/abs/2404.19756)) learns a function on every edge instead of a number. Here one is fitted on finer and finer grids, looked at, pruned, and at the end written down as the formula that the data came from. A CPU is enough.

# %%
# %pip install -q "jaxml[plot,symbolic] @ git+https://github.com/jaxml/jaxml"

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from IPython.display import Image, Math

from jaxml import kan

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
print(jax.devices())
if jax.default_backend() == "cpu":
    print("No accelerator is needed here: the networks are small.")

# %% [markdown]
# ## Data
#
# 1,000 samples of exp(sin(πx) + y²), and 1,000 others to see what was learnt.

# %%
def samples(seed, count=1000):
    x = jax.random.uniform(jax.random.key(seed), (count, 2), minval=-1.0)
    return x, jnp.exp(jnp.sin(jnp.pi * x[:, 0]) + x[:, 1] ** 2)


x, y = samples(0)
held_out = samples(1)

# %% [markdown]
# ## Fit, and refine the grids
#
# Two inputs, one hidden node, one output: three edges, three functions. Each grid begins where the one before it ended; on a finer grid the splines follow the data more closely.

# %%
grids = [3, 5] if SMOKE else [3, 5, 10, 20, 40]
params, info = kan.fit(kan.init(jax.random.key(2), [2, 1, 1]), x, y, grids=grids, held_out=held_out, steps=5 if SMOKE else 40)
for cells, train, test in zip(info["grids"], info["train"], info["held_out"]):
    print(f"grid {cells:3}: error {train:.2e} on the samples, {test:.2e} on others")

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.loglog(info["grids"], info["train"], marker="o", label="samples that were fitted")
axes.loglog(info["grids"], info["held_out"], marker="s", label="other samples")
axes.set(title="A finer grid, a smaller error", xlabel="cells of the grid", ylabel="root mean square error")
axes.set_xticks(info["grids"], info["grids"], minor=False)
axes.xaxis.set_minor_locator(plt.NullLocator())
axes.grid(alpha=0.3, which="both")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Look at it
#
# Every edge's function stands where it acts. The lower ones are a sine and a parabola, the upper one an exponential, all up to scale and shift.

# %%
kan.plot(params, x, "fitted.png", names=["x", "y"], outputs=["f"], title="Three functions, fitted")
Image("fitted.png", width=320)

# %% [markdown]
# ## A network that is too wide, pruned
#
# Mostly one does not know the shape. Here are five hidden nodes, with a penalty on what they pass on: those that nothing needs fade.

# %%
wide, _ = kan.fit(kan.init(jax.random.key(4), [2, 5, 1], grid=5), x, y, sparse=1e-2, steps=10 if SMOKE else 200)
kan.plot(wide, x, "wide.png", names=["x", "y"], outputs=["f"], title="Five hidden nodes; pale edges count little")
Image("wide.png", width=520)

# %%
scores = kan.attribute(wide, x)
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
bars = axes.bar([f"node {n + 1}" for n in range(5)], scores.nodes[1], color="#1f5fa8", label="score")
axes.bar_label(bars, fmt="%.4f", padding=2)
axes.axhline(1e-2, color="#b5443c", linestyle="--", label="threshold of prune")
axes.set(title="What each hidden node counts for", xlabel="hidden node", ylabel="score (share of the output's spread)", ylim=(0, 1.12))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# `prune` takes out what is below its threshold. The penalty has bent the functions that are left; fitted again without it, and on a finer grid, they come back to what the data say.

# %%
small = kan.prune(wide, x)
small, info = kan.fit(small, x, y, grids=[5] if SMOKE else [5, 20], held_out=held_out, steps=5 if SMOKE else 60)
print("nodes:", wide.widths, "before,", small.widths, f"after; error on other samples {info['held_out'][-1]:.1e}")
kan.plot(small, x, "small.png", names=["x", "y"], outputs=["f"], title="What is left, fitted again")
Image("small.png", width=320)

# %% [markdown]
# ## Names for the functions
#
# `auto_symbolic` replaces each spline by the function of a library that fits it best, weighing simplicity; a last fit tunes the numbers that are left, and `formula` writes the network down.

# %%
named, told = kan.auto_symbolic(small, x)
for layer, into, out, best in told:
    print(f"edge ({layer}, {into}, {out}): {best.name}, r² = {best.r2:.6f}")
named, info = kan.fit(named, x, y, held_out=held_out, steps=5 if SMOKE else 40)
print(f"error on other samples {info['held_out'][-1]:.1e}")
Math("f(x, y) = " + kan.latex(kan.simplify(named), ["x", "y"], digits=4)[0])

# %% [markdown]
# ## All of it in one call
#
# `discover` tries shapes, prunes, names and refits by itself; `jaxml kan fit data.csv --target f` does the same for a table on disk.

# %%
if not SMOKE:
    discovery = kan.discover(jax.random.key(4), x, y, names=["x", "y"])
    print("f =", *discovery.formulas)

# %% [markdown]
# Next: [activations](02_activations.ipynb). KANs as layers of Flax, in convolutions, decoders and for differential equations: the [README](https://github.com/jaxml/jaxml#i-want-to-).
