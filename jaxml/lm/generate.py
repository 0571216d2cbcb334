"""Generation: prefill, a jitted decode loop over a cache, and strings around them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxml import weights
from jaxml.axes import Array, Bool, Float, Int, Params
from jaxml.lm import cache as caches
from jaxml.lm import chat, decoder
from jaxml.lm.cache import EMPTY, Cache
from jaxml.lm.config import DecoderConfig
from jaxml.lm.model import Model
from jaxml.lm.sampling import Sampling, sample

Prompt = str | Sequence[chat.Message]


SHARED = 32  # tokens that all prompts begin with are read once, if there are so many


class DecodeState(NamedTuple):
    """What the decode loop carries from token to token."""

    cache: Cache
    logits: Float[Array, "B V"]  # for the token that comes next
    positions: Int[Array, "B"]  # of that token
    keys: Array  # [B] one random key a row
    done: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None  # for the repetition penalty


# ---- token level ------------------------------------------------------------------------------------


def pad(rows: Sequence[Sequence[int]], *, side: str = "right", to: int | None = None, pad_id: int = 0):
    """Ragged token rows as (tokens [B, T] int32, positions [B, T] int32 with `EMPTY` on padding).

    Example:
        >>> tokens, positions = pad([[5, 6], [7]], side="left")
        >>> tokens.tolist(), positions[1, 1].item()
        ([[5, 6], [0, 7]], 0)
    """
    if side not in ("left", "right"):
        raise ValueError(f"generate.pad: side is left or right, got {side!r}.")
    if not rows or min(map(len, rows)) == 0:
        raise ValueError("generate.pad: every row has at least one token, got an empty one.")
    width = max(max(map(len, rows)), to or 0)
    tokens = np.full((len(rows), width), pad_id, np.int32)
    positions = np.full((len(rows), width), EMPTY, np.int32)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, where], positions[i, where] = row, np.arange(len(row))
    return tokens, positions


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads prompts into a cache (empty, or holding a prefix; it is consumed).

    Args:
        positions: of each token in its own row, counted on from the prefix; `EMPTY` on padding, which may
            stand on either side.

    Returns:
        Logits after each row's last token, and the cache.
    """
    x, cache = decoder.apply_cached(params, config, tokens, cache, positions=positions)
    last = jnp.argmax(jnp.where(positions == EMPTY, -1, positions), axis=1)
    x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return decoder.logits(params, config, x), cache


def start(
    logits: Float[Array, "B V"],
    cache: Cache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    keys: Array,
    sampling: Sampling,
) -> DecodeState:
    """The state in which `decode` begins, from what `prefill` was given and gave."""
    after = jnp.max(jnp.where(positions == EMPTY, -1, positions), axis=1) + 1
    seen = None
    if sampling.repetition_penalty != 1.0:
        rows = jnp.arange(tokens.shape[0])[:, None]
        seen = jnp.zeros(logits.shape, bool).at[rows, tokens].max(positions != EMPTY)
    done = jnp.zeros(tokens.shape[0], bool)
    # `decode` consumes the state; the caller's keys stay alive.
    return DecodeState(cache, logits, after.astype(jnp.int32), jax.random.clone(keys), done, seen)


@functools.partial(
    jax.jit, static_argnames=("config", "steps", "sampling", "eos_ids", "pad_id"), donate_argnames="state"
)
def decode(
    params: Params,
    config: DecoderConfig,
    state: DecodeState,
    *,
    steps: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    allowed: Int[Array, "B V/32"] | None = None,
) -> tuple[Int[Array, "B steps"], DecodeState]:
    """Up to `steps` tokens for every row; stops early when all rows are done.

    A row is done after one of `eos_ids`; from then on its tokens are `pad_id`. The state is consumed and
    given back, so that the loop can go on where it stopped. Row b draws token t with
    ``fold_in(keys[b], position of t)``: what a row gets does not depend on its neighbours.

    Args:
        allowed: which tokens may come, a bit each, the lowest of each int32 first (`prompts.constrain`).
    """
    batch = state.positions.shape[0]
    tokens = jnp.full((batch, steps), pad_id, jnp.int32)

    def more(carry):
        i, _, state = carry
        return (i < steps) & ~jnp.all(state.done)

    def step(carry):
        i, tokens, s = carry
        keys = jax.vmap(jax.random.fold_in)(s.keys, s.positions)
        logits = s.logits if allowed is None else jnp.where(_bits(allowed, s.logits.shape[-1]), s.logits, -jnp.inf)
        token = jnp.where(s.done, pad_id, sample(logits, sampling, keys, s.seen))
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))
        positions = jnp.where(s.done, EMPTY, s.positions)
        x, cache = decoder.apply_cached(params, config, token[:, None], s.cache, positions=positions[:, None])
        done = s.done
        for eos in eos_ids:
            done = done | (token == eos)
        seen = s.seen if s.seen is None else s.seen.at[jnp.arange(batch), token].set(True)
        logits = decoder.logits(params, config, x[:, 0])
        return i + 1, tokens, DecodeState(cache, logits, s.positions + 1, s.keys, done, seen)

    _, tokens, state = jax.lax.while_loop(more, step, (jnp.zeros((), jnp.int32), tokens, state))
    return tokens, state


def _bits(words: Int[Array, "B W"], count: int) -> Bool[Array, "B V"]:
    bits = (words[..., None] >> jnp.arange(32, dtype=words.dtype).reshape(1, 1, 32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :count] == 1


# ---- strings ----------------------------------------------------------------------------------------


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008
    stop: Sequence[str] = (),
    key: Array | int = 0,
    keys: Array | None = None,
    padding: str = "right",
    batch_size: int | None = None,
    unroll: bool = False,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Continues every prompt.

    Args:
        prompts: strings, continued as they are, or lists of chat messages, put through the model's template;
            or a single one of either.
        max_new_tokens: at most so many tokens a row.
        sampling: greedy by default.
        stop: a row ends before the first of these strings.
        key: a random key or a seed, from which each row's own key is made by its number.
        keys: the rows' keys themselves, [number of prompts], instead of `key`.
        padding: "right" or "left"; makes no difference to the result.
        batch_size: rows decoded together; all of them where None.
        unroll: decode with unrolled layers: a copy of the weights and twice the compile time for about half
            the time per token on CPU, where a scan copies each layer's weights at each token. For long
            outputs, or many calls.
        on_text: called with (row, new text) while it is being written.

    Returns:
        The new text of each prompt, without the prompt, its special tokens and the stop string.

    Raises:
        ValueError: a prompt with as many tokens as the context or more, or an empty one.

    Example:
        >>> from jaxml import testing
        >>> model = testing.tiny_model()
        >>> [text] = generate(model, ["the fox"], max_new_tokens=4)
        >>> text == generate(model, "the fox", max_new_tokens=4)[0]
        True
    """
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)):
        prompts = [prompts]
    rows = [encode_prompt(model, p) for p in prompts]
    keys = row_keys(key, len(rows)) if keys is None else keys
    texts: list[str] = []
    for first, here, part, of in batches(model, rows, keys, batch_size):
        texts += _continue(here, part, max_new_tokens, sampling, stop, of, padding, unroll, on_text, first)
    return texts


def samples(
    model: Model,
    prompt: Prompt,
    n: int,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(temperature=1.0),  # noqa: B008
    stop: Sequence[str] = (),
    key: Array | int = 0,
    unroll: bool = False,
) -> list[str]:
    """n continuations of one prompt, which is read once.

    The same texts as `generate` gives for n copies of the prompt and the same key.

    Raises:
        ValueError: n below 1, or as in `generate`.

    Example:
        >>> from jaxml import testing
        >>> len(samples(testing.tiny_model(), "the fox", 3, max_new_tokens=2))
        3
    """
    if n < 1:
        raise ValueError(f"generate.samples: n is at least 1, got {n}.")
    row, keys = encode_prompt(model, prompt), row_keys(key, n)
    return _continue(model, [row], max_new_tokens, sampling, stop, keys, "right", unroll, None, 0)


def encode_prompt(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: a string with the model's bos token where it wants one, or a rendered chat."""
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt, bos=True)
    else:
        ids = model.tokenizer.encode(chat.render(model.tokenizer, prompt))
    if not ids:
        raise ValueError("generate: a prompt has at least one token, got an empty one.")
    return ids


def row_keys(key: Array | int, count: int) -> Array:
    """Each row's own random key, made by its number from a key or a seed."""
    key = jax.random.key(key) if isinstance(key, int) else key
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def batches(
    model: Model, rows: Sequence[list[int]], keys: Array, size: int | None
) -> Iterator[tuple[int, Model, list[list[int]], Array]]:
    """(number of the first row, the model as these rows take it, rows, keys) of each batch."""
    size = size or max(len(rows), 1)
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        here = model.replace(params=weights.of_rows(model.params, range(len(rows))[part]))
        yield first, here, rows[part], keys[part]


class Prefilled(NamedTuple):
    """Prompts that were read."""

    logits: Float[Array, "B V"]
    cache: Cache
    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    limit: int  # how many tokens may follow


def read(model: Model, rows: Sequence[Sequence[int]], limit: int, *, who: str, padding: str = "right") -> Prefilled:
    """Reads prompts into a cache of their own, after what the model was tuned to have in front of them.

    What all of them begin with (examples that are shown, instructions) is read once.

    Args:
        limit: tokens that are to follow, at most; fewer where the context ends.
        who: the caller's name, for errors.

    Raises:
        ValueError: a prompt as long as the context, or a limit below 0.
    """
    config = model.config
    if limit < 0:
        raise ValueError(f"{who}: max_new_tokens is at least 0, got {limit}.")
    longest = max(map(len, rows)) + decoder.num_places(model.params)
    if longest >= config.max_length:
        raise ValueError(
            f"{who}: a prompt is shorter than the context of {config.max_length} tokens, got {longest}. "
            "Shorten the prompt."
        )
    limit = min(limit, config.max_length - longest)
    share = 0 if weights.has_rows(model.params) else common(rows)
    past = _prefix(model.params, config) if not share else read(model, [rows[0][:share]], 0, who=who).cache
    padded = functools.partial(pad, side=padding, pad_id=model.tokenizer.pad_id)
    rest = [row[share:] for row in rows]
    width = bucket(max(map(len, rest)))
    tokens, positions = padded(rest, to=width)
    cache, positions = caches.begin(past, config, positions, bucket(width + limit), model.params["embed"].dtype)
    logits, cache = prefill(model.params, config, tokens, positions, cache)
    if share:
        tokens, positions = padded(rows)
        positions = np.where(positions == EMPTY, EMPTY, positions + decoder.num_places(model.params))
    return Prefilled(logits, cache, jnp.asarray(tokens), jnp.asarray(positions), limit)


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, short of the last one of any; 0 where reading them once gains little."""
    if len(rows) < 2:
        return 0
    least = min(map(len, rows)) - 1
    same = next((i for i in range(least) if any(row[i] != rows[0][i] for row in rows)), max(least, 0))
    return same if same >= SHARED else 0


@functools.partial(jax.jit, static_argnames="config")
def _prefix(params: Params, config: DecoderConfig) -> Cache | None:
    return decoder.prefix(params, config)


def _continue(model, rows, limit, sampling, stop, keys, padding, unroll, on_text, first) -> list[str]:
    """The texts of one batch, told to `on_text` as they grow; of a single row with many keys, as many texts."""
    config, tokenizer = model.config, model.tokenizer
    logits, cache, tokens, positions, limit = read(model, rows, limit, who="generate", padding=padding)
    params = decoder.unstack(model.params) if unroll else model.params
    if (n := len(keys)) > len(rows):
        rows = rows * n
        logits, tokens, positions = (jnp.repeat(a, n, 0) for a in (logits, tokens, positions))
        cache = caches.broadcast(cache, n)
        params = weights.of_rows(params, [0] * n)
    state = start(logits, cache, tokens, positions, keys, sampling)
    chunk = 4 if on_text else (16 if stop else 64)
    ids: list[list[int]] = [[] for _ in rows]
    texts, finished = [""] * len(rows), [False] * len(rows)
    for begin in range(0, limit, chunk):
        steps = min(chunk, limit - begin)
        new, state = decode(
            params, config, state, steps=steps, sampling=sampling, eos_ids=config.eos_ids, pad_id=tokenizer.pad_id
        )
        for i, row in enumerate(np.asarray(new).tolist()):
            if finished[i]:
                continue
            end = next((j for j, t in enumerate(row) if t in config.eos_ids), None)
            ids[i] += row[:end]
            text, stopped = _cut(tokenizer.decode(ids[i]), stop)
            finished[i] = stopped or end is not None
            shown = text if finished[i] or begin + steps >= limit else _settled(text, stop)
            if on_text and shown[len(texts[i]) :]:
                on_text(first + i, shown[len(texts[i]) :])
            texts[i] = shown
        if all(finished):
            break
        state = state._replace(done=state.done | jnp.asarray(finished))
    return texts


def bucket(n: int, multiple: int = 32) -> int:
    """Lengths are rounded up, so that few shapes are compiled."""
    return -(-n // multiple) * multiple


def _cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    found = [i for s in stop if (i := text.find(s)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _settled(text: str, stop: Sequence[str]) -> str:
    """What can be shown already: no unfinished character, no possible beginning of a stop string."""
    while text.endswith("\ufffd"):
        text = text[:-1]
    held = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return text[: len(text) - max(held)] if held else text
