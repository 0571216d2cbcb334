# %% [markdown]
# # Astute RAG: when passages are wrong
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxml/jaxml/blob/main/colab/08_astute_rag.ipynb)
#
# Retrieval makes a model believe what it reads. [Astute RAG](https://arxiv.org/abs/2410.07176) sets passages against each other and against what the model remembers, and shows how it came to its answer. Here an index is made of a few pages, two of which mislead, and a conflict is resolved. SmolLM2-135M and all-MiniLM; a few minutes on a CPU, which is enough.

# %%
# %pip install -q "jaxml[lm,rag,plot] @ git+https://github.com/jaxml/jaxml"

# %%
import html
import os
import tempfile
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
# Six files. Two of them say that Yuri Gagarin was the first man on the Moon, in nearly the same words: one was copied from the other.

# %%
docs = Path("docs")
docs.mkdir(exist_ok=True)
pages = {
    "apollo.md": "Neil Armstrong was the first man on the Moon, in July 1969.",
    "school.md": "In class we heard that Yuri Gagarin was the first man on the Moon.",
    "copied.md": "In class they heard that Yuri Gagarin was the first man on the Moon.",
    "orbit.md": "Yuri Gagarin flew around the Earth in April 1961, in 108 minutes.",
    "tides.md": "The Moon draws the water of the sea, which rises twice a day.",
    "cheese.md": "Comté is made in the Jura from cows' milk and ripens for at least four months.",
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
index = rag.Index.create(tempfile.mkdtemp() + "/index", encoder)
print(index.update(docs))
question = "Who was the first man on the Moon?"
[hits] = index.search([question], 3)
for hit in hits:
    print(f"{hit.score:.4f}  {hit.passage.place:16} {hit.passage.text}")

# %% [markdown]
# ## Plain retrieval, and Astute RAG
#
# From the three passages found, of which two are wrong. Plain retrieval has all of them in one prompt. Astute RAG works by likelihoods here: what each passage makes likelier, and what memory believes, are told together by Bayes' rule; passages of nearly the same words speak once.

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
# Every prompt, reply, group and confidence; `jaxml rag ask "Who …?" --index FOLDER --trace answer.html` writes the same.

# %%
page = html.escape(rag.page([found["astute"]]))
HTML(f'<div><iframe srcdoc="{page}" width="100%" height="520" style="border:1px solid #ccc"></iframe></div>')

# %% [markdown]
# ## How much can be wrong?
#
# 24 questions with four passages each, of which none to all say something else, at random places. The model knows most of these facts by itself, so that not retrieving at all (dashed) would serve it well; with other facts retrieval is what helps. What is asked here: how much does reading harm it?

# %%
facts = [  # question, statement, right, wrong
    ("Who wrote Hamlet?", "{} wrote Hamlet", "William Shakespeare", "Christopher Marlowe"),
    ("Who painted the Mona Lisa?", "{} painted the Mona Lisa", "Leonardo da Vinci", "Michelangelo"),
    ("In which country is the Eiffel Tower?", "the Eiffel Tower is in {}", "France", "Belgium"),
    ("Which company makes the iPhone?", "{} makes the iPhone", "Apple", "Nokia"),
    ("Which planet is closest to the Sun?", "{} is the planet closest to the Sun", "Mercury", "Venus"),
    ("In which city is the Colosseum?", "the Colosseum is in {}", "Rome", "Naples"),
    ("In which city is the Louvre?", "the Louvre is in {}", "Paris", "Lyon"),
    ("Which language is spoken in Brazil?", "the language of Brazil is {}", "Portuguese", "Spanish"),
    ("Who discovered penicillin?", "{} discovered penicillin", "Alexander Fleming", "Louis Pasteur"),
    ("Who developed the theory of relativity?", "{} developed the theory of relativity", "Albert Einstein", "Isaac Newton"),
    ("Which is the largest ocean?", "the largest ocean is the {}", "Pacific", "Atlantic"),
    ("What is the currency of Japan?", "the currency of Japan is the {}", "yen", "won"),
    ("Who was the first man on the Moon?", "{} was the first man on the Moon", "Neil Armstrong", "Yuri Gagarin"),
    ("What is the capital of Japan?", "the capital of Japan is {}", "Tokyo", "Osaka"),
    ("In which country is Machu Picchu?", "Machu Picchu is in {}", "Peru", "Chile"),
    ("Which river flows through London?", "the {} flows through London", "Thames", "Severn"),
    ("In which city is the Kremlin?", "the Kremlin is in {}", "Moscow", "Minsk"),
    ("Who invented the telephone?", "{} invented the telephone", "Alexander Graham Bell", "Thomas Edison"),
    ("Which metal is liquid at room temperature?", "{} is liquid at room temperature", "mercury", "tin"),
    ("In which country were the first Olympic Games held?", "the first Olympic Games were held in {}", "Greece", "Egypt"),
    ("Who wrote Pride and Prejudice?", "{} wrote Pride and Prejudice", "Jane Austen", "Emily Brontë"),
    ("Which is the highest mountain on Earth?", "the highest mountain on Earth is {}", "Mount Everest", "Mont Blanc"),
    ("Which animal is the largest on Earth?", "the largest animal on Earth is the {}", "blue whale", "elephant"),
    ("In which ocean is Madagascar?", "Madagascar lies in the {} Ocean", "Indian", "Pacific"),
][: 1 if SMOKE else 24]
frames = ("It is known that {}.", "As every child learns, {}.", "Our guide told us that {}.", "{}, says the book.")
dice = np.random.default_rng(0)
places = [dice.permutation(4) for _ in facts]


capital = lambda text: text[0].upper() + text[1:]


def four(statement, right, wrong, order, misleading):
    said = [statement.format(wrong if place < misleading else right) for place in order]
    return [rag.Passage(capital(frame.format(text)), f"source {n}") for n, (frame, text) in enumerate(zip(frames, said), 1)]


questions, wanted = [f[0] for f in facts], [(f[2], f[2].split()[-1]) for f in facts]  # a last name is enough


def share_right(texts, method):
    answers = rag.answer(llm, questions, texts, method)
    return np.mean([rag.metrics.contains(str(a), want) for a, want in zip(answers, wanted)])


shares = [0] if SMOKE else [0, 1, 2, 3, 4]
alone = share_right([[] for _ in facts], "none")
right = {method: [] for method in ("plain", "astute")}
print(f"no retrieval: {alone:.0%} right")
for misleading in shares:
    texts = [four(*fact[1:], order, misleading) for fact, order in zip(facts, places)]
    for method in right:
        right[method].append(share_right(texts, method))
    print(f"{misleading} of 4 mislead:", ", ".join(f"{method} {values[-1]:.0%}" for method, values in right.items()))

# %%
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.axhline(100 * alone, color="#2b3440", linestyle="--", linewidth=1, label="no retrieval")
for (method, values), colour in zip(right.items(), ("#d9822b", "#1f5fa8")):
    axes.plot(shares, 100 * np.array(values), marker="o", color=colour, label={"plain": "plain retrieval", "astute": "Astute RAG"}[method])
axes.set(title=f"{len(facts)} questions, four passages each", xlabel="passages that mislead (of 4)", ylabel="right answers (%)", ylim=(-5, 105), xticks=shares)
axes.grid(alpha=0.3)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# While the passages disagree both follow the majority. Where all of them mislead, plain retrieval is lost, and Astute RAG holds on to three fifths of what the model knew. 24 questions are an illustration; 200 with intervals, among them facts that the model does not know, are in the [benchmarks](https://github.com/jaxml/jaxml/blob/main/benchmarks/README.md). Next: [many devices](09_many_devices.ipynb).
