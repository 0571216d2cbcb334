"""One interface to language models: the decoder here, or whatever answers over HTTP (`prompts.endpoint`)."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxml import paths
from jaxml.lm import Model, Sampling, tree
from jaxml.lm.generate import Prompt, encode_prompt, generate, samples
from jaxml.lm.score import encode_continuation, score_trees, sums


class Reply(NamedTuple):
    """What a model wrote.

    Example:
        >>> Reply("Paris", prompt_tokens=6, new_tokens=1).log_prob is None
        True
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    log_prob: float | None = None  # of the text under the model at temperature 1, in nats; None where unknown


class Scores(NamedTuple):
    """How likely each of C continuations of one prompt is.

    Example:
        >>> Scores(np.array([-0.3, -7.6]), np.array([1, 1]), cost=14).log_probs.argmax().item()
        0
    """

    log_probs: np.ndarray  # [C] float64, in nats, summed over its tokens
    tokens: np.ndarray  # [C] how many it has
    cost: int  # tokens read for it, prompt included


class LLM(Protocol):
    """What the functions of this package ask of a model.

    Example:
        >>> from jaxml import testing
        >>> Local(testing.tiny_model()).cost("the fox") > 0
        True
    """

    name: str  # of the model and all that changes its answers: what a kept answer belongs to

    def cost(self, prompt: Prompt, choices: Sequence[str] = ()) -> int:
        """How many tokens are read to score a prompt's choices, or to go on from it; to foresee what it costs."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Reply]:
        """One continuation of each prompt."""
        ...

    def sample(
        self, prompt: Prompt, n: int, *, max_new_tokens: int = 128, temperature: float = 1.0,
        stop: Sequence[str] = (), seed: int = 0,
    ) -> list[Reply]:  # fmt: skip
        """n continuations of one prompt."""
        ...

    def score(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[Scores]:
        """The likelihood of each prompt's choices.

        Raises:
            NotImplementedError: this model does not tell.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Local:
    """A model in this process.

    Args:
        batch_size: prompts in a batch.
        unroll: as in `lm.generate`.

    Example:
        >>> from jaxml import testing
        >>> llm = Local(testing.tiny_model())
        >>> [s.log_probs.shape for s in llm.score(["is it? "], [["yes", "no"]])]
        [(2,)]
    """

    model: Model
    batch_size: int = 16
    unroll: bool = False
    label: str = "local"

    @functools.cached_property
    def name(self) -> str:
        return f"{self.label}-{fingerprint(self.model)}"

    def cost(self, prompt, choices=()) -> int:
        return len(encode_prompt(self.model, prompt)) + sum(len(self.model.tokenizer.encode(c)) for c in choices)

    def generate(self, prompts, *, max_new_tokens=128, temperature=0.0, stop=(), seed=0) -> list[Reply]:
        texts = generate(
            self.model, list(prompts), max_new_tokens=max_new_tokens, sampling=Sampling(temperature=temperature),
            stop=stop, key=seed, batch_size=self.batch_size, unroll=self.unroll,
        )  # fmt: skip
        return [self._reply(prompt, text) for prompt, text in zip(prompts, texts)]

    def sample(self, prompt, n, *, max_new_tokens=128, temperature=1.0, stop=(), seed=0) -> list[Reply]:
        texts = samples(
            self.model, prompt, n, max_new_tokens=max_new_tokens, sampling=Sampling(temperature=temperature),
            stop=stop, key=seed, unroll=self.unroll,
        )  # fmt: skip
        different = sorted({t for t in texts if t})
        scored = self.score([prompt], [different])[0].log_probs if different else []
        log_probs = dict(zip(different, map(float, scored)))
        return [self._reply(prompt, text)._replace(log_prob=log_probs.get(text)) for text in texts]

    def score(self, prompts, choices) -> list[Scores]:
        trees = [self._tree(prompt, of) for prompt, of in zip(prompts, choices, strict=True)]
        scored = score_trees(self.model, trees, batch_size=self.batch_size)
        out = []
        for one, nodes in zip(trees, scored):
            out.append(Scores(sums(nodes), np.array([len(v) for v in nodes]), len(tree.lay(one).tokens)))
        return out

    def _tree(self, prompt: Prompt, choices: Sequence[str]) -> tree.Node:
        follow = [tree.Node(encode_continuation(self.model, c), scored=True) for c in choices]
        return tree.Node(encode_prompt(self.model, prompt), follow)

    def _reply(self, prompt: Prompt, text: str) -> Reply:
        return Reply(text, len(encode_prompt(self.model, prompt)), len(self.model.tokenizer.encode(text)))


def fingerprint(model: Model) -> str:
    """Of configuration and parameters, from a few numbers of each array: other weights, another name.

    Example:
        >>> from jaxml import testing
        >>> one, same, other = (fingerprint(testing.tiny_model(seed)) for seed in (0, 0, 1))
        >>> one == same, one == other
        (True, False)
    """
    t = model.tokenizer
    said = (model.config, t.bos_id, t.eos_ids, t.add_bos, t.chat_template, t.vocab_size)
    digest = hashlib.sha256(repr(said).encode())
    for path, w in paths.named(model.params).items():
        for leaf in jax.tree.leaves(w):
            digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
            digest.update(_few(leaf).tobytes())
    return digest.hexdigest()[:16]


def _few(a: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        return np.zeros(0)
    return np.asarray(a.reshape(-1)[np.random.default_rng(0).integers(0, max(a.size, 1), min(a.size, 256))])
