# %% [markdown]
# # Prompts: trained, and searched
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/06_prompts.ipynb)
#
# Two ways to get more out of a model that stays as it is: a soft prompt, 20 trained vectors in front of every text ([Lester et al. 2021](https://arxiv.org/abs/2104.08691)), and words found by search, with an interval that says whether they are better or lucky. SmolLM2-135M; a quarter of an hour on a CPU of two cores, where the outputs below were made; not yet run on a TPU or a T4.

# %%
# %pip install -q "jaxml[lm,facts,prompts,plot] @ git+https://github.com/jaxml/jaxml"

# %%
import os
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxml import lm, log, prompts, tune
from jaxml.tune import facts, prompt

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
on_cpu = jax.default_backend() == "cpu"
print(jax.devices())
if on_cpu:
    print("No accelerator: the same cells, with patience.")

# %%
lm.zoo.download("smollm2-135m")
model = lm.load("smollm2-135m")
questions = facts.make(countries=3 if SMOKE else 16, new_countries=3 if SMOKE else 16, relations=("capital", "currency"), seed=0)
train = [q.example for q in questions.train]
held_out = [q.example for q in questions.new_countries]
print(len(train), "examples to work with,", len(held_out), "about other countries, to see what it is worth")
print(train[0])

# %% [markdown]
# ## A soft prompt
#
# 20 vectors begin as common tokens and are the only thing that is trained: 11,520 numbers.

# %%
options = tune.Options(steps=2 if SMOKE else 80, batch_size=1 if SMOKE else 2, length=64 if SMOKE else 128, learning_rate=2e-2, save_every=0, unroll=on_cpu and not SMOKE)
soft = prompt.soft(model, length=20, start="common")
folder = tempfile.mkdtemp()
tuned, info = tune.fit(soft, train, options, folder=folder, progress=False)
before, after = (tune.loss_of(m, held_out, options) for m in (model, tuned))
print(f"loss of a token of an answer about other countries: {before:.3f} without, {after:.3f} with the prompt")

# %%
losses = [row["loss"] for row in log.read(f"{folder}/log.jsonl") if "loss" in row]
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(range(1, len(losses) + 1), losses, color="#1f5fa8", label="training batch")
axes.axhline(before, color="#9aa4b0", linestyle="--", label="other countries, without the prompt")
axes.axhline(after, color="#d9822b", linestyle="--", label="other countries, with it")
axes.set(title="Twenty vectors learn what is wanted", xlabel="optimizer step", ylabel="loss (nats per learnt token)")
axes.set_ylim(bottom=0)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# What it learns is the form, a name or a code and nothing else; facts about other countries it cannot learn here. Exact match of greedy answers says how many of them the model knew:

# %%
for name, m in (("without", model), ("with", tuned)):
    said = facts.answer(m, questions.new_countries)
    print(f"{name:7} right {facts.exact_match(said, questions.new_countries).value:5.1%}, such as", said[:6:2])
print("wanted                     ", [q.answer for q in questions.new_countries[:6:2]])

# %% [markdown]
# ## Words
#
# Instructions and worked examples are tried on a few questions; the best third goes on to three times as many, and so on. The winner is then compared, on questions that the search never saw, with saying nothing.

# %%
pool, dev = train[: len(train) // 2], train[len(train) // 2 :]
seen = {e["prompt"] for e in pool}
dev = [e for e in dev if e["prompt"] not in seen]
instructions = [
    "",
    "Answer the question.",
    "Answer in one or two words.",
    "You are an expert in geography. Give the short answer.",
    "Give only the name, nothing else.",
]
report = prompts.search(
    prompts.Local(model), prompts.Task(pool), instructions[:2] if SMOKE else instructions, dev, held_out,
    shots=(0, 1) if SMOKE else (0, 2, 4), sets=1 if SMOKE else 2, first=2 if SMOKE else 8, folder=tempfile.mkdtemp(),
)
print(report.markdown())

# %% [markdown]
# Each round asks more examples, and others: a later dot that lies lower is not a worse prompt, its questions were harder. Prompts are compared within a round.

# %%
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
spent = np.array([t.spent for t in report.trials]) / 1000
means = [t.mean for t in report.trials]
sizes = [t.examples for t in report.trials]
dots = axes.scatter(spent, means, c=sizes, cmap="viridis", s=30)
axes.set(title="Every prompt that was tried, round by round", xlabel="tokens spent (thousands)", ylabel="log-likelihood of the answer (nats)")
figure.colorbar(dots, label="examples asked in its round")
plt.show()

# %% [markdown]
# ## One against the other
#
# The log-likelihood of a right answer on the held-out questions: nothing, the words that were found, the vectors.

# %%
bare = lm.score(model, [e["prompt"] for e in held_out], [e["response"] for e in held_out])
vectors = lm.score(tuned, [e["prompt"] for e in held_out], [e["response"] for e in held_out])
words = report.held_out[report.winner].values
rows = {"nothing": bare, "words, searched": words, "vectors, trained": vectors}
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for place, (name, values) in enumerate(rows.items()):
    low, high = prompts.report.bootstrap(np.asarray(values))
    mean = float(np.mean(values))
    axes.barh(place, mean, xerr=[[mean - low], [high - mean]], capsize=3, color=("#9aa4b0", "#d9822b", "#1f5fa8")[place])
axes.set_yticks(range(3), list(rows))
axes.set(title="Answers about countries never seen", xlabel="log-likelihood of the right answer (nats, 95 % intervals)", ylabel="prompt")
plt.show()

# %% [markdown]
# Next: [a model that says when it does not know](07_r_tuning.ipynb).
