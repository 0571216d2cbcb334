"""Which of several answers a model finds most likely, corrected for how they are worded."""

from collections.abc import Sequence

import numpy as np

from jaxml.lm import Model
from jaxml.lm.generate import Prompt
from jaxml.prompts.llm import LLM, Local, Scores

CORRECTIONS = ("sum", "tokens", "bytes", "pmi", "domain")
CONTENT_FREE = ("N/A", "[MASK]", "")


def score_choices(
    model: Model | LLM,
    prompts: Sequence[Prompt],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    correction: str = "sum",
    domain: str | None = None,
) -> list[np.ndarray]:
    """How likely each choice is after each prompt.

    One forward pass reads a prompt once and all its choices after it: each choice sees the prompt and itself, at the
    positions that it would have alone. What all prompts begin with is read once for all of them.

    Args:
        prompts: strings or lists of messages.
        choices: the same for all prompts, or a list for each.
        correction: "sum": log p(choice | prompt), in nats; "tokens", "bytes": the same per token, per byte of UTF-8;
            "pmi": minus log p(choice) after nothing, since common words are likely after anything; "domain": minus
            log p(choice | domain) after a text that only says what kind of answer follows.
        domain: that text ("Answer:").

    Returns:
        [choices] float64 for each prompt; larger is better.

    Raises:
        ValueError: lists that do not agree, an empty choice, or one that comes twice.
        NotImplementedError: the model does not tell likelihoods.

    Example:
        >>> from jaxml import testing
        >>> score_choices(testing.tiny_model(), ["is it? ", "who? "], ["yes", "no"])[0].shape
        (2,)

    Reference:
        Holtzman et al. 2021, "Surface Form Competition" (pmi, domain).
    """
    llm = Local(model) if isinstance(model, Model) else model
    if isinstance(prompts, str):
        raise ValueError("score_choices: prompts are a list, got a single string.")
    if correction not in CORRECTIONS:
        raise ValueError(f"score_choices: correction is one of {', '.join(CORRECTIONS)}, got {correction!r}.")
    if (correction == "domain") != (domain is not None):
        raise ValueError(f"score_choices: domain is given with correction 'domain' only, got {domain!r}.")
    each = per_prompt(choices, len(prompts))
    found = llm.score(prompts, each)
    if correction not in ("pmi", "domain"):
        return [corrected(s, of, correction) for s, of in zip(found, each)]
    alone = domain if correction == "domain" else _nothing(llm)
    different = list(dict.fromkeys(tuple(of) for of in each))
    before = dict(zip(different, llm.score([alone] * len(different), different)))
    return [s.log_probs - before[tuple(of)].log_probs for s, of in zip(found, each)]


def corrected(scores: Scores, choices: Sequence[str], correction: str) -> np.ndarray:
    """Log-likelihoods as they are, per token or per byte.

    Example:
        >>> scores = Scores(np.array([-2.0, -3.0]), np.array([1, 3]), cost=9)
        >>> [corrected(scores, ["no", "nobody"], by).tolist() for by in ("sum", "tokens", "bytes")]
        [[-2.0, -3.0], [-2.0, -1.0], [-1.0, -0.5]]
    """
    if correction == "tokens":
        return scores.log_probs / scores.tokens
    if correction == "bytes":
        return scores.log_probs / np.array([len(c.encode()) for c in choices])
    return scores.log_probs


def per_prompt(choices: Sequence[str] | Sequence[Sequence[str]], count: int) -> list[list[str]]:
    """A list of choices for each of `count` prompts.

    Raises:
        ValueError: another number of lists, no choices, an empty one, or one that comes twice.

    Example:
        >>> per_prompt(["yes", "no"], 2), per_prompt([["1", "2"], ["yes", "no"]], 2)
        ([['yes', 'no'], ['yes', 'no']], [['1', '2'], ['yes', 'no']])
    """
    if isinstance(choices, str):
        raise ValueError(f"score_choices: choices are a list, got the single string {choices!r}.")
    shared = bool(choices) and isinstance(choices[0], str)
    each = [list(choices)] * count if shared else [list(of) for of in choices]
    if len(each) != count:
        raise ValueError(f"score_choices: choices are one list, or one for each of {count} prompts, got {len(each)}.")
    for of in each:
        if not of or not all(of) or len(set(of)) < len(of):
            raise ValueError(f"score_choices: choices are different texts, none empty, got {of}.")
    return each


def calibrate(log_probs: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """Scores without the bias that the prompt itself has towards some choices.

    p(choice) ∝ p(choice | prompt) / mean over content-free inputs of p(choice | that).

    Args:
        log_probs: [Q, C] or [C], of the same choices after each prompt.
        content_free: [F, C], after the same prompt around inputs that say nothing (`CONTENT_FREE`).

    Returns:
        Log-probabilities over the choices, shaped as `log_probs`.

    Example:
        >>> bias = np.log([[0.9, 0.1]])
        >>> np.exp(calibrate(np.log([0.9, 0.1]), bias)).round(2).tolist()
        [0.5, 0.5]

    Reference:
        Zhao et al. 2021, "Calibrate Before Use", section 5: W = diag(p̂_cf)⁻¹, b = 0.
    """
    log_probs, content_free = np.asarray(log_probs, np.float64), np.asarray(content_free, np.float64)
    if content_free.ndim != 2 or log_probs.shape[-1:] != content_free.shape[-1:] or not len(content_free):
        raise ValueError(
            f"calibrate: log_probs are [prompts, choices] and content_free [inputs, choices] of the same choices, got "
            f"{log_probs.shape} and {content_free.shape}."
        )
    bias = np.exp(normalised(content_free)).mean(0)
    return normalised(log_probs - np.log(bias))


def normalised(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, of scores in nats.

    Example:
        >>> np.exp(normalised(np.log([1.0, 3.0]))).round(2).tolist()
        [0.25, 0.75]
    """
    most = log_probs.max(-1, keepdims=True)
    return log_probs - most - np.log(np.exp(log_probs - most).sum(-1, keepdims=True))


def _nothing(llm: LLM) -> str:
    """The emptiest prompt that the model can be given."""
    if not isinstance(llm, Local):
        return "\n"
    tokenizer = llm.model.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id is not None else (tokenizer.eos_ids or (None,))[0]
    return "" if tokenizer.add_bos else tokenizer.token(first) or "\n"
