# %% [markdown]
# # Exact attention at any length
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/03_flash_attention.ipynb)
#
# `flash_attention` takes the arguments of `jax.nn.dot_product_attention` and gives the same numbers in memory that grows with the length instead of its square. Choose a TPU under Runtime › Change runtime type: there it takes Pallas kernels, forward and backward. On a GPU or CPU it works in blocks by XLA, and kernels for GPUs can be asked for by name. The outputs below were made on a CPU; the kernels are compiled for TPUs and tested in Pallas's interpreter, and have not yet run on one.

# %%
# %pip install -q "jaxml[plot] @ git+https://github.com/jaxml/jaxml"

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxml import attention
from jaxml.attention import Causal, Prefix, Window, flash_attention

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
on_tpu = jax.default_backend() == "tpu"
print(jax.devices())
if not on_tpu:
    print("No TPU: the cells run all the same, in blocks by XLA and at smaller sizes.")

# %% [markdown]
# ## Which program runs, and why not the others

# %%
heads, width = (8, 128) if on_tpu else (4, 64)
dtype = jnp.bfloat16 if on_tpu else jnp.float32


def arrays(T, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (1, T, heads, width), dtype) for key in keys)


q, k, v = arrays(256)
explained = attention.explain(q, k, v, is_causal=True)
print("runs:", explained.chosen)
for name, reason in explained.refused.items():
    print(f"  not {name}: {reason}")

# %% [markdown]
# ## The same numbers
#
# Against the definition in NumPy's float64.

# %%
def definition(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / width**0.5
    logits = np.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


for name, attend in {"flash_attention": flash_attention, "jax.nn": jax.nn.dot_product_attention}.items():
    error = np.abs(np.asarray(attend(q, k, v, is_causal=True), np.float64) - definition(q, k, v)).max()
    print(f"largest error in {jnp.dtype(dtype).name}: {name:16} {error:.1e}")

# %% [markdown]
# ## Memory against length
#
# What the compiled gradient needs beside its arguments and results, by XLA's own account. jax.nn's definition keeps every pair of a query and a key; in blocks there are fewer and larger blocks at first, then memory grows with the length alone.

# %%
lengths = [128, 256] if SMOKE else [512, 1024, 2048, 4096, 8192, 16384]


def loss(attend):
    return lambda q, k, v: jnp.sum(attend(q, k, v, is_causal=True).astype(jnp.float32))


def memory_mib(attend, T):
    shape = jax.ShapeDtypeStruct((1, T, heads, width), dtype)
    compiled = jax.jit(jax.grad(loss(attend), (0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


rivals = {"flash_attention": flash_attention, "jax.nn.dot_product_attention": jax.nn.dot_product_attention}
memory = {name: [memory_mib(f, T) for T in lengths] for name, f in rivals.items()}
for name, of in memory.items():
    print(f"{name:28}", " ".join(f"{m:9.1f}" for m in of), "MiB")

# %%
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for (name, of), colour in zip(memory.items(), ("#1f5fa8", "#d9822b")):
    axes.loglog(lengths, of, marker="o", color=colour, label=name, base=2)
axes.set(title=f"Gradient of causal attention, {heads} heads of {width}, {jnp.dtype(dtype).name}", xlabel="length (tokens)", ylabel="temporary memory (MiB)")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Speed
#
# Beside what JAX has itself: `jax.nn.dot_product_attention`, and on a TPU also its Pallas kernel (`splash_attention`, with blocks of 1,024 rather than its default of 128, which is slow). The median of five runs.

# %%
timed_lengths = [128] if SMOKE else [1024, 4096, 16384] if on_tpu else [512, 1024, 2048]


def splash():
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    def attend(q, k, v, is_causal):
        T = q.shape[1]
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * heads)
        at = min(1024, T)
        blocks = splash_attention_kernel.BlockSizes(
            block_q=at, block_kv=at, block_kv_compute=min(512, T), block_q_dkv=at, block_kv_dkv=at,
            block_kv_dkv_compute=min(512, T), use_fused_bwd_kernel=True,
        )
        kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)
        of_rows = lambda a: a.swapaxes(1, 2)
        return jax.vmap(kernel)(of_rows(q) * width**-0.5, of_rows(k), of_rows(v)).swapaxes(1, 2)

    return attend


def milliseconds(attend, T):
    step = jax.jit(jax.grad(loss(attend), (0, 1, 2)))
    of = arrays(T)
    jax.block_until_ready(step(*of))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(step(*of))
        times.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(times))


contenders = rivals | ({"splash_attention": splash()} if on_tpu else {})
speed = {}
for name, attend in contenders.items():
    speed[name] = [milliseconds(attend, T) if T <= 4096 or attend is not jax.nn.dot_product_attention else np.nan for T in timed_lengths]
    print(f"{name:28}", " ".join(f"{ms:9.1f}" for ms in speed[name]), "ms for forward and backward at", timed_lengths)

# %%
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
places, share = np.arange(len(timed_lengths)), 0.8 / len(speed)
for n, ((name, of), colour) in enumerate(zip(speed.items(), ("#1f5fa8", "#d9822b", "#5b8c5a"))):
    axes.bar(places + n * share, of, share, label=name, color=colour)
axes.set_xticks(places + share * (len(speed) - 1) / 2, [f"{T:,}" for T in timed_lengths])
axes.set(title=f"Forward and backward on {jax.devices()[0].device_kind}", xlabel="length (tokens)", ylabel="time (ms)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Masks without arrays
#
# Masks are values that combine with `&`, `|` and `~`; tiles that they leave out are never computed, and the call makes nothing of size T². Here a window of 64 tokens, with the first 16 of the text seen by all; an explicit mask stands beside it for comparison.

# %%
T = 256
mask = (Causal() & Window(left=63)) | Prefix(jnp.array([16]))
got = flash_attention(*arrays(T), mask=mask)

rows, columns = np.arange(T)[:, None], np.arange(T)[None]
seen = ((columns <= rows) & (rows - columns <= 63)) | (columns < 16)
expected = jax.nn.dot_product_attention(*arrays(T), mask=jnp.asarray(seen)[None, None])
print("largest difference from an explicit mask:", f"{float(jnp.max(jnp.abs(got - expected))):.1e}")

figure, axes = plt.subplots(figsize=(3.6, 3.6), layout="constrained")
axes.imshow(seen, cmap="Blues", vmax=1.5, interpolation="nearest")
axes.set(title="What each query sees", xlabel="key (token)", ylabel="query (token)")
plt.show()

# %% [markdown]
# Next: [load a model and generate](04_generate.ipynb). Attention over several devices, pages for decoding, dropout, biases and score functions: the [README](https://github.com/jaxml/jaxml#i-want-to-).
