"""From JSONL to packed batches: deterministic, and every batch a function of its step number."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxml import files
from jaxml.lm import chat
from jaxml.lm.tokenizer import Tokenizer
from jaxml.parallel import hosts

LINE_BYTES = 64 * files.MIB
MOST = float(np.finfo(np.float32).max)  # of a weight in the loss
FORMS = "an object with the key text, the keys prompt and response, the key messages, or the key parts"


class Encoded(NamedTuple):
    """One example as tokens.

    Example:
        >>> packed = pack([Encoded([5, 6, 7], [0, 1, 0.5])], length=4)
        >>> packed.targets.tolist(), packed.weights.tolist()
        ([[6, 7, 0, 0]], [[1.0, 0.5, 0.0, 0.0]])
    """

    tokens: list[int]
    learn: list[float]  # the weight of each token in the loss; False and True are 0 and 1


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Examples laid one after the other into rows of equal length.

    Padding has segment 0, position 0 and weight 0.

    Example:
        >>> packed = pack([Encoded([5, 6, 7], [1, 1, 1])], length=4)
        >>> packed.take(np.array([0, -1]))["segment_ids"].tolist()   # the second row is empty
        [[1, 1, 1, 0], [0, 0, 0, 0]]
    """

    tokens: np.ndarray  # [rows, T] int32
    targets: np.ndarray  # [rows, T] int32, the token after each
    weights: np.ndarray  # [rows, T] float32, above 0 where the target is learnt
    segment_ids: np.ndarray  # [rows, T] int32, from 1 in each row
    positions: np.ndarray  # [rows, T] int32, from 0 in each example
    tasks: np.ndarray | None = None  # [rows, 1] int32, which task a row's examples are of

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """These rows as a batch; the row −1 is empty."""
        empty = rows < 0
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        batch = {name: a[np.maximum(rows, 0)] for name, a in arrays.items() if a is not None}
        return {k: np.where(np.expand_dims(empty, -1), np.zeros((), v.dtype), v) for k, v in batch.items()}

    def digest(self) -> str:
        """Of all that is learnt, and in which rows."""
        found = hashlib.sha256()
        for field in dataclasses.fields(self):
            if (a := getattr(self, field.name)) is not None:
                found.update(np.ascontiguousarray(a).data)
        return found.hexdigest()[:16]


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Examples from a file, one JSON object a line, each in one of the four forms.

    Raises:
        FileNotFoundError, ValueError: no such file, an empty one, or a wrong line, by its number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\\n\\n{"text": "Two."}\\n')
        ...     read_jsonl(Path(folder, "a.jsonl"))
        [{'prompt': '1+1=', 'response': '2'}, {'text': 'Two.'}]
    """

    def read(example: Any) -> dict[str, Any]:
        check(example)
        return example

    return read_lines(path, read, "example")


def read_lines(path: str | Path, read: Callable[[Any], Any], what: str) -> list[Any]:
    """What `read` makes of the JSON of each line that is not empty; it raises ValueError where that is wrong.

    Raises:
        FileNotFoundError, ValueError: no such file, one without any `what`, or a wrong line, by its number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.jsonl").write_text('{"n": 1}\\n{"n": 2}\\n')
        ...     read_lines(Path(folder, "a.jsonl"), lambda line: line["n"], "number")
        [1, 2]
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a file of JSON lines is wanted, this is a folder.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    found, number = [], 0
    with path.open("rb") as lines:
        while line := lines.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise ValueError(f"{path}, line {number}: a line has at most {LINE_BYTES:,} bytes. Cut it.")
            if not line.strip():
                continue
            value = files.json_of(line, f"{path}, line {number}")
            try:
                found.append(read(value))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not found:
        raise ValueError(f"{path}: holds at least one {what}, got an empty file.")
    return found


def check(example: Any) -> None:
    """Raises ValueError unless the example has one of the four forms.

    Example:
        >>> check({"prompt": "1+1=", "response": ""})
        Traceback (most recent call last):
            ...
        ValueError: response is not empty.
    """
    if not isinstance(example, dict):
        raise ValueError(f"an example is {FORMS}, got {type(example).__name__}.")
    keys = set(example)
    forms = [form for form in (("text",), ("prompt", "response"), ("messages",), ("parts",)) if set(form) <= keys]
    if len(forms) > 1:
        both = " as well as ".join(" and ".join(form) for form in forms)
        raise ValueError(f"an example has one form, got {both}. Leave out what is not to be learnt.")
    if "messages" in keys:
        chat.check(example["messages"])
        if not any(m["role"] == "assistant" for m in example["messages"]):
            raise ValueError("messages hold at least one turn of the assistant to learn from, got none.")
        return
    if "parts" in keys:
        _check_parts(example["parts"])
        return
    wanted = ("text",) if "text" in keys else ("prompt", "response")
    if not set(wanted) <= keys:
        raise ValueError(f"an example is {FORMS}, got the keys {', '.join(sorted(keys)) or 'none'}.")
    for key in wanted:
        if not isinstance(example[key], str):
            raise ValueError(f"{key} is text, got {type(example[key]).__name__}.")
    if not example[wanted[-1]]:
        raise ValueError(f"{wanted[-1]} is not empty.")


def _check_parts(parts: Any) -> None:
    well = isinstance(parts, list | tuple) and all(
        isinstance(part, list | tuple) and len(part) == 2 and isinstance(part[0], str)
        and isinstance(part[1], int | float) and 0 <= part[1] <= MOST
        for part in parts
    )  # fmt: skip
    if not well:
        raise ValueError(f"parts are a list of [text, weight in the loss], the weight from 0 to {MOST:.3g}.")
    if not any(text and weight for text, weight in parts):
        raise ValueError("parts hold at least one text to learn, got none with a weight above 0.")


def encode(example: dict[str, Any], tokenizer: Tokenizer, *, learn_all: bool = False) -> Encoded:
    """Tokens of an example, and which of them are learnt.

    ``text``: all, with the end token. ``prompt`` and ``response``: joined as they are, the response and the end
    token learnt. ``messages``: through the chat template, every turn of the assistant learnt with its end. ``parts``:
    texts joined as they are, each with its weight in the loss, from 0; no end token is added.

    Args:
        learn_all: learn the prompts as well.

    Example:
        >>> from jaxml import testing
        >>> encode({"prompt": "a", "response": "bc"}, testing.tiny_tokenizer())
        Encoded(tokens=[4, 5, 6, 2], learn=[False, True, True, True])
    """
    check(example)
    end = list(tokenizer.eos_ids[:1])
    if "text" in example:
        tokens = tokenizer.encode(example["text"], bos=True) + end
        learn = [True] * len(tokens)
    elif "messages" in example:
        tokens, learn = _encode_messages(example["messages"], tokenizer)
    elif "parts" in example:
        first = tokenizer.token(tokenizer.bos_id)  # that a rendered chat may begin with
        opens = first is None or not example["parts"][0][0].startswith(first)
        pieces = [(tokenizer.encode(text, bos=opens and not i), w) for i, (text, w) in enumerate(example["parts"])]
        tokens = [token for ids, _ in pieces for token in ids]
        learn = [weight for ids, weight in pieces for _ in ids]
    else:
        prompt = tokenizer.encode(example["prompt"], bos=True)
        response = tokenizer.encode(example["response"]) + end
        tokens, learn = prompt + response, [False] * len(prompt) + [True] * len(response)
    return Encoded(tokens, [w or True for w in learn] if learn_all else learn)


def _encode_messages(messages, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The rendered chat cut at the assistant's turns; each piece is tokenised by itself."""
    tokens: list[int] = []
    learn: list[bool] = []
    shown = ""

    def add(text: str, counts: bool) -> None:
        nonlocal shown
        if not text.startswith(shown):
            raise ValueError("the chat template rewrites earlier turns; such a chat cannot be cut into turns.")
        ids = tokenizer.encode(text[len(shown) :])
        tokens.extend(ids)
        learn.extend([counts] * len(ids))
        shown = text

    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            if i:
                add(chat.render(tokenizer, messages[:i], generation_prompt=True), False)
            add(chat.render(tokenizer, messages[: i + 1], generation_prompt=False), True)
    return tokens, learn


def pack(examples: Iterable[Encoded], length: int) -> Packed:
    """Lays examples into rows of `length` tokens by first fit, in the order given; under 8 free places are not filled.

    Raises:
        ValueError: no examples, or one with more than `length` tokens (nothing is cut silently).

    Example:
        >>> packed = pack([Encoded([4] * n, [1] * n) for n in (6, 12, 4)], length=16)
        >>> packed.tokens.shape, packed.segment_ids.max(axis=1).tolist()   # the third goes into the first row
        ((2, 16), [2, 1])
    """
    rows: list[list[Encoded]] = []
    room: list[int] = []
    open_from = 0  # rows before this one are full
    for example in examples:
        n = len(example.tokens)
        if n > length:
            raise ValueError(
                f"data.pack: an example fits a row of {length} tokens, got one of {n}. "
                "Give a larger length, or shorten the example."
            )
        i = next((i for i in range(open_from, len(rows)) if room[i] >= n), len(rows))
        if i == len(rows):
            rows.append([])
            room.append(length)
        rows[i].append(example)
        room[i] -= n
        while open_from < len(rows) and room[open_from] < 8:
            open_from += 1
    if not rows:
        raise ValueError("data.pack: at least one example is given, got none.")
    packed = Packed(
        tokens=np.zeros((len(rows), length), np.int32),
        targets=np.zeros((len(rows), length), np.int32),
        weights=np.zeros((len(rows), length), np.float32),
        segment_ids=np.zeros((len(rows), length), np.int32),
        positions=np.zeros((len(rows), length), np.int32),
    )
    for r, row in enumerate(rows):
        at = 0
        for segment, (tokens, learn) in enumerate(row, 1):
            n = len(tokens)
            packed.tokens[r, at : at + n] = tokens
            packed.targets[r, at : at + n - 1] = tokens[1:]
            packed.weights[r, at : at + n - 1] = learn[1:]
            packed.segment_ids[r, at : at + n] = segment
            packed.positions[r, at : at + n] = np.arange(n)
            at += n
    return packed


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run: number `step` is the same whenever and wherever it is asked for.

    Example:
        >>> packed = pack([Encoded([1, 2, 3], [True] * 3)] * 5, length=4)
        >>> batches = Batches(packed, batch_size=2, seed=0)
        >>> batches.per_epoch, batches(7)["tokens"].shape
        (3, (2, 4))
    """

    packed: Packed
    batch_size: int
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        return -(-len(self.packed.tokens) // self.batch_size)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step`, [batch_size, T] each; an epoch's last one is filled up with empty rows."""
        epoch, i = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.packed.tokens))
        rows = order[i * self.batch_size : (i + 1) * self.batch_size]
        return self.packed.take(np.pad(rows, (0, self.batch_size - len(rows)), constant_values=-1))


def prepare(
    examples: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    learn_all: bool = False,
    tasks: int | None = None,
) -> Batches:
    """Examples to batches: encoded (of several processes each encodes its part), shuffled by the seed, packed.

    Args:
        tasks: how many there are; each example then has the key task, a number below that, and each row holds examples
            of one task.

    Example:
        >>> from jaxml import testing
        >>> examples = [{"text": "fox"}, {"prompt": "a", "response": "b"}]
        >>> batches = prepare(examples, testing.tiny_tokenizer(), length=16, batch_size=1)
        >>> batches.per_epoch, sorted(batches(0)["tokens"][0].tolist())[-7:]
        (1, [2, 2, 4, 5, 9, 18, 27])
    """
    if not examples:
        raise ValueError("data.prepare: at least one example is given, got none.")
    order = np.random.default_rng(seed).permutation(len(examples))

    def one(i: int) -> Encoded:
        try:
            return encode(examples[order[i]], tokenizer, learn_all=learn_all)
        except ValueError as error:
            raise ValueError(f"data.prepare: example {order[i] + 1} (blank lines do not count): {error}") from error

    made = hosts.shared(len(order), one)
    encoded = [Encoded(*one) for one in made]
    if long := [(order[i] + 1, n) for i, one in enumerate(encoded) if (n := len(one.tokens)) > length]:
        number, n = min(long)
        raise ValueError(
            f"data.prepare: an example fits a row of {length} tokens, got {n} in example {number} (blank lines do not "
            f"count){f', and {len(long) - 1} more' if len(long) > 1 else ''}. Give a larger length, or shorten it."
        )
    if tasks is None:
        return Batches(pack(encoded, length), batch_size, seed)
    given = [examples[i].get("task") for i in order]
    if wrong := [t for t in given if not isinstance(t, int) or isinstance(t, bool) or not 0 <= t < tasks]:
        raise ValueError(f"data.prepare: each example's task is a number in 0 … {tasks - 1}, got {wrong[0]!r}.")
    parts = [(t, pack([e for e, of in zip(encoded, given) if of == t], length)) for t in sorted(set(given))]
    join = lambda name: np.concatenate([getattr(part, name) for _, part in parts])
    names = [f.name for f in dataclasses.fields(Packed) if f.name != "tasks"]
    rows = np.concatenate([np.full((len(part.tokens), 1), t, np.int32) for t, part in parts])
    return Batches(Packed(**{name: join(name) for name in names}, tasks=rows), batch_size, seed)
