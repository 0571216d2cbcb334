"""A model whose knowledge and mistakes are known: it answers the prompts of this package by rules.

With it one can see what a method does, apart from what a model can do.
"""

import dataclasses
import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxml.lm.generate import Prompt
from jaxml.prompts.llm import Reply, Scores
from jaxml.rag.wording import UNKNOWN

SAYS = re.compile(r"the answer is ([\w-]+)\.", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """An `LLM` that reads "the answer is WORD." in a text, and knows what it was told.

    Args:
        known: question → the answer that it remembers, rightly or not; of others it says that it does not know.
        trust: how many texts its memory weighs against, where it chooses between groups. `sure` questions' memory
            weighs more than any number of texts.
        sure: questions whose answer it is certain of.
        misreads: share of texts, by their hash, that it reads as saying something else.
        name: of the model and its script.

    Example:
        >>> llm = Scripted({"who?": "ada"})
        >>> texts = "Texts between marks named t.\\n<t number=1>\\nThe answer is bob.\\n</t>\\n\\nQuestion: who?"
        >>> [reply.text for reply in llm.generate(["who?", texts])]
        ['ada', 'bob']
    """

    known: Mapping[str, str]
    trust: float = 1.5
    sure: frozenset[str] = frozenset()
    misreads: float = 0.0
    name: str = "scripted"

    def cost(self, prompt: Prompt, choices: Sequence[str] = ()) -> int:
        return len(_text(prompt).split()) + sum(len(c.split()) for c in choices)

    def generate(self, prompts, *, max_new_tokens=128, temperature=0.0, stop=(), seed=0) -> list[Reply]:
        return [self._reply(_text(prompt)) for prompt in prompts]

    def sample(self, prompt, n, *, max_new_tokens=128, temperature=1.0, stop=(), seed=0) -> list[Reply]:
        return [self._reply(_text(prompt))] * n

    def score(self, prompts, choices) -> list[Scores]:
        raise NotImplementedError("a scripted model tells no likelihoods.")

    def _reply(self, prompt: str) -> Reply:
        text = self._says(prompt)
        return Reply(text, len(prompt.split()), len(text.split()))

    def _says(self, prompt: str) -> str:
        found = re.search(r"between marks named (\S+?)[.,]", prompt)
        texts = []
        if found is not None:
            mark = re.compile(rf"<{found.group(1)}([^>]*)>\n(.*?)\n</{found.group(1)}>", re.DOTALL)
            texts, prompt = mark.findall(prompt), mark.sub("", prompt)  # what is quoted is no order
            texts = [text for text in texts if text[0]]  # without number: earlier groups
        question = (re.findall(r"Question: (.*)", prompt) or [prompt.splitlines()[0]])[-1]
        own = self.known.get(question)
        if found is None:
            if prompt.startswith("Write a short document"):
                return f"The answer is {own}." if own else UNKNOWN
            return own or UNKNOWN
        said = [self._reads(text) for _, text in texts]
        if '"irrelevant"' in prompt:
            return self._groups(texts, said)
        if '"final"' in prompt:
            return self._decides(question, texts, said)
        counts = Counter(answer for answer in said if answer)
        return counts.most_common(1)[0][0] if counts else UNKNOWN

    def _reads(self, text: str) -> str | None:
        found = SAYS.search(text)
        if found is None:
            return None
        wrong = (zlib.crc32(text.encode()) % 1000) / 1000 < self.misreads
        return f"{found.group(1)}-misread" if wrong else found.group(1)

    def _groups(self, texts, said) -> str:
        answers = list(dict.fromkeys(answer for answer in said if answer))
        groups = [
            {
                "claim": f"The answer is {answer}.",
                "texts": [i for i, one in enumerate(said, 1) if one == answer],
                "conflicts": [j for j, other in enumerate(answers, 1) if other != answer],
            }
            for answer in answers
        ]
        return json.dumps({"groups": groups, "irrelevant": [i for i, one in enumerate(said, 1) if one is None]})

    def _decides(self, question: str, texts, said) -> str:
        weights = []
        for attributes, _ in texts:
            kinds = re.search(r"from=(\S+)", attributes).group(1).split(",")
            memory = float("inf") if question in self.sure else self.trust
            weights.append(sum(memory if kind == "memory" else 1.0 for kind in kinds))
        total = sum(w for w in weights if w != float("inf")) + 1
        answers = [
            {"group": i, "answer": answer or UNKNOWN, "confidence": 95 if w == float("inf") else round(90 * w / total)}
            for i, (answer, w) in enumerate(zip(said, weights), 1)
        ]
        return json.dumps({"answers": answers, "final": weights.index(max(weights)) + 1})


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[0]["content"]
