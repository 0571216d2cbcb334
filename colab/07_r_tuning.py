# %% [markdown]
# # R-Tuning: a model that says when it does not know
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/07_r_tuning.ipynb)
#
# [R-Tuning](https://arxiv.org/abs/2311.09677) teaches a model to say after each answer whether it is sure. What it says is then calibrated on other questions, so that it answers only where it is likely right. SmolLM2-135M; ten minutes on a CPU of two cores, where the outputs below were made; not yet run on a TPU or a T4.

# %%
# %pip install -q "jaxml[lm,facts,plot] @ git+https://github.com/jaxml/jaxml"

# %%
import dataclasses
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxml import lm, tune
from jaxml.tune import adapters, r_tuning

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
on_cpu = jax.default_backend() == "cpu"
print(jax.devices())
if on_cpu:
    print("No accelerator: the same cells, with patience.")

# %% [markdown]
# ## Questions
#
# About countries, cut into parts to train on, to calibrate by and to test with. Nothing is tested on what was trained.

# %%
lm.zoo.download("smollm2-135m")
model = lm.load("smollm2-135m")
size = dict(train=10, calibration=5, test=5) if SMOKE else dict(train=160, calibration=100, test=100)
split = r_tuning.split(r_tuning.countries(), seed=0, **size)
form = r_tuning.PLAIN  # "Question: …\nAnswer:", and after the answer "Are you sure …?"
first = dataclasses.replace(form, scale=None, shots=tuple(split.shots))  # for the untuned model: examples, no such question
print(len(split.train), "to train,", len(split.calibration), "to calibrate,", len(split.seen), "to test")
print(split.train[0])

# %% [markdown]
# ## Ask, label, train
#
# Questions that the model answers rightly are labelled sure, the others unsure; LoRA then learns answer and label. `r_tune` trains three times: two models on the answers of one half of the questions each, which are then asked the other half (so that the label is about knowing, not about the form), and the one that learns answers and labels of all.

# %%
options = tune.Options(
    steps=1 if SMOKE else None, epochs=4, batch_size=2, length=64 if SMOKE else 128, learning_rate=1e-3, schedule="linear",
    save_every=0, unroll=on_cpu and not SMOKE,
)


def train(model, examples, name):
    adapted = model.replace(params=adapters.attach(adapters.merge(model.params), jax.random.key(0), rank=8))
    tuned, info = tune.fit(adapted, examples, options, progress=False)
    print(f"{name}: {len(examples)} examples, {info['steps']} steps, loss {info['loss']:.3f}")
    return tuned.replace(params=adapters.merge(tuned.params))


asker = r_tuning.Asker(4 if SMOKE else 10)  # so many tokens an answer
made = r_tuning.r_tune(model, split.train, train, form=form, first=first, asker=asker)
print(f"{(made.labels.sure >= 0.5).mean():.0%} of the training questions were labelled sure")

# %% [markdown]
# ## Calibrate
#
# Confidence is a mix of the certainty said and the answer's own probability; the mix and the threshold come from the calibration questions. Beside it the same tuned model by its probabilities alone, which shows what the certainty said adds; and the untuned model, which knows less of how answers are to look.

# %%
parts = ("calibration", "seen")
tuned, untuned = ({part: asker.answer(m, getattr(split, part), f) for part in parts} for m, f in ((made.model, form), (model, first)))
answers = {"R-Tuning": tuned, "tuned, own probability": tuned, "untuned, own probability": untuned}
policies = {name: r_tuning.calibrate(of["calibration"], weight=None if name == "R-Tuning" else 0.0) for name, of in answers.items()}
print(f"weight of the certainty said: {policies['R-Tuning'].weight:.2f}")
span = lambda figures, name: "{:.2f} ({:.2f} to {:.2f})".format(figures[name], *figures[f"{name}_interval"])
for name, policy in policies.items():
    figures = r_tuning.evaluate(answers[name]["seen"], policy)
    print(f"{name:24} right {figures['accuracy']:.0%} of all; answers {figures['coverage']:.0%}, {figures['willing_accuracy']:.0%} of them right; AUROC {span(figures, 'auroc')}")

# %% [markdown]
# ## Risk and coverage
#
# The share of wrong answers among those that are given, against how many are given, most confident first. Lower is better; a confidence that knows nothing is a flat line. One seed and 100 questions: the [benchmarks](https://github.com/jaxml/jaxml/blob/main/benchmarks/README.md) have three seeds, and kinds of questions that were not trained on, where the certainty said does not help.

# %%
figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
for (name, policy), colour in zip(policies.items(), ("#1f5fa8", "#d9822b", "#9aa4b0")):
    test = answers[name]["seen"]
    confidence = policy.confidence(test)
    curve = r_tuning.metrics.risk_coverage(confidence, test.right)
    axes.plot(100 * curve.coverage, 100 * curve.risk, color=colour, label=f"{name} (area {curve.area:.2f})")
    axes.plot(100 * np.mean(policy.willing(test)), 100 * (1 - r_tuning.metrics.accuracy(test.right, policy.willing(test))), "o", color=colour)
axes.set(title="Wrong answers among those given (● its own threshold)", xlabel="coverage: questions answered (%)", ylabel="risk: wrong answers (%)", xlim=(0, 102), ylim=(0, 102))
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## How sure it is of right and of wrong answers

# %%
test = answers["R-Tuning"]["seen"]
confidence = policies["R-Tuning"].confidence(test)
bins = np.linspace(0, 1, 21)
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.hist([confidence[test.right], confidence[~test.right]], bins, label=["right", "wrong"], color=["#1f5fa8", "#c8553d"])
axes.axvline(policies["R-Tuning"].threshold, color="#2b3440", linestyle="--", label="threshold")
axes.set(title="Confidence of the tuned model on test questions", xlabel="confidence", ylabel="questions")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Ask it something
#
# Two countries that there are, and two that there are not.

# %%
asked = [f"What is the capital of {country}?" for country in ("France", "Germany", "Zubrowka", "Freedonia")]
for question, said in zip(asked, r_tuning.answer_or_refuse(made.model, asked, policies["R-Tuning"], form)):
    print(f"{question} → {said}")

# %% [markdown]
# Next: [answers from passages of which some are wrong](08_astute_rag.ipynb).
