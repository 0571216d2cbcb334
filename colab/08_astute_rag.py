# %% [markdown]
# # Astute RAG: when passages are wrong
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/08_astute_rag.ipynb)
#
# Retrieval makes a model believe what it reads. [Astute RAG](https://arxiv.org/abs/2410.07176) sets passages against each other and against what the model remembers, and shows how it came to its answer. Here an index is made of a few pages, some of which mislead, and a conflict is resolved. SmolLM2-135M and all-MiniLM; a minute or two, a CPU is enough.

# %%
# %pip install -q "jaxml[lm,rag,plot] @ git+https://github.com/jaxml/jaxml"

# %%
import os
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML

from jaxml import lm, prompts, rag

SMOKE = "JAXML_SMOKE" in os.environ  # smallest sizes, for tests
print(jax.devices())
if jax.default_backend() == "cpu":
    print("No accelerator is needed here.")

# %% [markdown]
# ## Pages
#
# Six files. Two of them say that the capital of France is Lyon, in nearly the same words: one was copied from the other.

# %%
docs = Path("docs")
docs.mkdir(exist_ok=True)
pages = {
    "travel.md": "# France\n\nThe capital of France is Paris, on the Seine, where the government sits.",
    "rivers.md": "# Rivers\n\nThe Seine flows through Paris and reaches the sea at Le Havre. The Rhône flows through Lyon.",
    "blog.md": "# My summer\n\nWe drove down to Lyon, the capital of France, and stayed for a week.",
    "copy.md": "# Their summer\n\nThey drove down to Lyon, the capital of France, and stayed for a week.",
    "food.md": "# Cheese\n\nComté is made in the Jura from cows' milk and ripens for at least four months.",
    "towers.md": "# Towers\n\nThe Eiffel Tower in Paris was finished in 1889 and is 330 metres high.",
}
for name, text in pages.items():
    (docs / name).write_text(text)

# %% [markdown]
# ## An index
#
# `update` reads what is new or changed; `search` ranks by meaning and by words together.

# %%
lm.zoo.download("smollm2-135m")
lm.zoo.download("minilm")
encoder = lm.encoder.load("minilm")
index = rag.Index.create("index", encoder)
print(index.update(docs))
question = "What is the capital of France?"
[hits] = index.search([question], 5)
for hit in hits:
    print(f"{hit.score:.4f}  {hit.passage.place:28} {hit.passage.text[:70]}")

# %% [markdown]
# ## Plain retrieval, and Astute RAG
#
# By likelihoods: what each source says and what memory believes are told together; sources that copy each other count once.

# %%
llm = prompts.Local(lm.load("smollm2-135m"))
passages = [hit.passage for hit in hits]
found = {}
for method in ("none", "astute") if SMOKE else ("none", "plain", "isolated", "astute"):
    [found[method]] = rag.answer(llm, [question], [passages], method)
    print(f"{method:9} {found[method]}")

# %%
print(rag.report(found["astute"]))

# %% [markdown]
# ## The trace as a page
#
# Every prompt, reply, group and confidence; `jaxml rag ask --page answer.html` writes the same.

# %%
HTML(f"<div><iframe srcdoc='{rag.page([found['astute']]).replace(chr(39), '&#39;')}' width='100%' height='520' style='border:1px solid #ccc'></iframe></div>")

# %% [markdown]
# ## How much can be wrong?
#
# For some questions that the model knows, none to all of four passages name something else, at random places. Which share of the answers stays right? With right passages plain retrieval is as good; with wrong ones memory holds against them.

# %%
known = [
    ("What is the capital of Italy?", "Rome", "Turin"),
    ("What is the capital of Japan?", "Tokyo", "Osaka"),
    ("What is the capital of Germany?", "Berlin", "Munich"),
    ("What is the capital of Spain?", "Madrid", "Seville"),
    ("What is the capital of Russia?", "Moscow", "Kazan"),
    ("What is the capital of Egypt?", "Cairo", "Luxor"),
    ("What is the capital of Greece?", "Athens", "Patras"),
    ("What is the capital of Portugal?", "Lisbon", "Porto"),
][: 1 if SMOKE else 8]
ways = (
    "The capital of {country} is {place}.",
    "{country}'s capital, {place}, is its largest city.",
    "{place} is the capital of {country} and the seat of its government.",
    "As every child learns, the capital of {country} is {place}.",
)
dice = np.random.default_rng(0)
orders = {question: dice.permutation(4) for question, *_ in known}


def four(question, right, wrong, misleading):
    country = question.removeprefix("What is the capital of ").rstrip("?")
    places = [wrong if orders[question][n] < misleading else right for n in range(4)]
    return [rag.Passage(way.format(place=place, country=country), f"source {n + 1}") for n, (way, place) in enumerate(zip(ways, places))]


shares = [0] if SMOKE else [0, 1, 2, 3, 4]
right = {method: [] for method in ("plain", "astute")}
for misleading in shares:
    texts = [four(*one, misleading) for one in known]
    for method in right:
        answers = rag.answer(llm, [q for q, *_ in known], texts, method)
        right[method].append(np.mean([rag.metrics.contains(str(a), (want,)) for a, (_, want, _) in zip(answers, known)]))
        print(f"{misleading} of 4 mislead, {method:7} {right[method][-1]:.0%} right")

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for (method, values), colour in zip(right.items(), ("#9aa4b0", "#1f5fa8")):
    axes.plot(shares, 100 * np.array(values), marker="o", color=colour, label={"plain": "plain retrieval", "astute": "Astute RAG"}[method])
axes.set(title=f"{len(known)} questions, four passages each", xlabel="passages that mislead (of 4)", ylabel="right answers (%)", ylim=(-5, 105), xticks=shares)
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Eight questions are an illustration; 200 with intervals are in the [benchmarks](https://github.com/jaxml/jaxml/blob/main/benchmarks/README.md). Next: [many devices](09_many_devices.ipynb).
