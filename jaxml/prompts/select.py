"""Which examples to show: near the question, unlike each other, or those that help."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxml.lm import Model, tree
from jaxml.lm.generate import encode_prompt
from jaxml.lm.score import encode_continuation, score_trees, sums
from jaxml.prompts.task import Candidate, Example, Task

Embed = Callable[[Sequence[str]], np.ndarray]


def nearest(embed: Embed, pool: Sequence[str], queries: Sequence[str], count: int) -> list[list[int]]:
    """For each query, the texts of the pool that are most like it, the most alike last (nearest to the question).

    Args:
        embed: texts to unit vectors (`lm.encoder.load()`).
        count: of texts for each query.

    Example:
        >>> letters = lambda texts: np.array([[t.count(c) / len(t) for c in "ab"] for t in texts])
        >>> nearest(letters, ["aa", "ab", "bb"], ["b"], 2)
        [[1, 2]]
    """
    asked, vectors = _vectors(embed, pool, queries, count)
    return [np.argsort(-row, kind="stable")[:count][::-1].tolist() for row in asked @ vectors.T]


def diverse(
    embed: Embed, pool: Sequence[str], queries: Sequence[str], count: int, *, trade: float = 0.5
) -> list[list[int]]:
    """For each query, texts that are like it and unlike each other: maximal marginal relevance.

    One after the other, the text with the largest trade · (likeness to the query) − (1 − trade) · (largest likeness to
    one that was taken); the first taken last in the list.

    Args:
        trade: 1 looks at the query alone, 0 at the others alone.

    Reference:
        Carbonell and Goldstein 1998, "The Use of MMR".

    Example:
        >>> letters = lambda texts: np.array([[t.count(c) / len(t) for c in "ab"] for t in texts])
        >>> diverse(letters, ["bb", "bbb", "ab"], ["b"], 2, trade=0.4)
        [[2, 0]]
    """
    asked, vectors = _vectors(embed, pool, queries, count)
    among = vectors @ vectors.T
    return [mmr(row, among, count, trade=trade)[::-1] for row in asked @ vectors.T]


def mmr(near: np.ndarray, among: np.ndarray, count: int, *, trade: float = 0.5) -> list[int]:
    """Numbers of texts in the order in which `diverse` takes them.

    Args:
        near: [n] likeness to the query.
        among: [n, n] likeness to each other.

    Example:
        >>> near = np.array([1.0, 0.9, 0.5])
        >>> among = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])   # the first two are alike
        >>> mmr(near, among, 2), mmr(near, among, 2, trade=1)
        ([0, 2], [0, 1])
    """
    if not 0 <= trade <= 1:
        raise ValueError(f"select.mmr: trade is in [0, 1], got {trade}.")
    taken: list[int] = []
    while len(taken) < min(count, len(near)):
        alike = among[:, taken].max(1) if taken else np.zeros(len(near))
        worth = trade * near - (1 - trade) * alike
        worth[taken] = -np.inf
        taken.append(int(worth.argmax()))
    return taken


def influence(
    model: Model, task: Task, dev: Sequence[Example], *, instruction: str = "", at_once: int = 16
) -> np.ndarray:
    """How much each example of the pool, shown alone, helps each question: log p(y | x, example) − log p(y | x).

    One row of a forward pass reads an example once and many questions after it (`lm.tree`), and what all examples have
    in front of them is read once for all.

    Args:
        task: its prompts are texts.
        at_once: questions in a row.

    Returns:
        [pool, dev] float64, in nats.

    Raises:
        ValueError: an empty pool, no questions, or prompts that are messages.

    Example:
        >>> from jaxml import lm, testing
        >>> model, task = testing.tiny_model(), Task([{"prompt": "one and one: ", "response": "2"}])
        >>> found = influence(model, task, [{"prompt": "two and two: ", "response": "4"}])
        >>> apart = lm.score(model, ["one and one: 2\\n\\ntwo and two: ", "two and two: "], ["4", "4"])
        >>> found.shape, bool(abs(found[0, 0] - (apart[0] - apart[1])) < 1e-3)
        ((1, 1), True)
    """
    if not task.pool or not dev:
        raise ValueError(f"select.influence: pool and dev hold examples, got {len(task.pool)} and {len(dev)}.")
    if not isinstance(task.prompt(Candidate(), dev[0]), str):
        raise ValueError("select.influence: prompts are texts, got messages. Ask with a Template of a text.")
    opening = instruction + task.between if instruction else ""
    fields = lambda example: {field: example[field] for field in task.ask.fields}
    shown = [opening + (task.ask(**fields(e)) + task.answer(e)).rstrip("\n") + task.between for e in task.pool]
    encode = model.tokenizer.encode
    roots = [encode_prompt(model, text) for text in shown]
    nothing = encode(opening, bos=True)
    questions = [
        tree.Node(encode(task.ask(**fields(e))), [tree.Node(encode_continuation(model, task.answer(e)), scored=True)])
        for e in dev
    ]
    out = np.zeros((len(roots) + 1, len(dev)))
    for first in range(0, len(dev), at_once):
        part = questions[first : first + at_once]
        trees = [tree.Node(root, part) for root in [*roots, nothing]]
        # The row without an example begins otherwise: it is scored apart, so that the others share their beginning.
        rows = [*score_trees(model, trees[:-1]), *score_trees(model, trees[-1:])]
        out[:, first : first + len(part)] = [sums(row) for row in rows]
    return out[:-1] - out[-1:]


def by_influence(matrix: np.ndarray, count: int) -> tuple[int, ...]:
    """Examples that together help the most questions most: one after the other, the one that adds most to the sum over
    questions of the largest influence of those taken; the best last.

    Args:
        matrix: [pool, dev], from `influence`.

    Example:
        >>> by_influence(np.array([[3.0, 0.0], [2.9, 0.1], [0.0, 2.0]]), 2)
        (2, 0)
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or not 0 < count <= len(matrix):
        raise ValueError(f"select.by_influence: count is in 1 … pool size, got {count} and the shape {matrix.shape}.")
    taken: list[int] = []
    covered = np.full(matrix.shape[1], -np.inf)
    for _ in range(count):
        gain = np.maximum(matrix, covered).sum(1)
        gain[taken] = -np.inf
        taken.append(int(gain.argmax()))
        covered = np.maximum(covered, matrix[taken[-1]])
    return tuple(taken[::-1])


def _vectors(embed: Embed, pool: Sequence[str], queries: Sequence[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(of the queries, of the pool), [·, D] each."""
    if not 0 < count <= len(pool):
        raise ValueError(f"select: count is in 1 … {len(pool)}, the size of the pool, got {count}.")
    return np.asarray(embed(list(queries))), np.asarray(embed(list(pool)))
