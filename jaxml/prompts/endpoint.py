"""A language model behind an OpenAI-compatible HTTP endpoint: patient with its failures, strict about its answers."""

import concurrent.futures
import dataclasses
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxml import files
from jaxml.extras import need
from jaxml.lm.generate import Prompt
from jaxml.prompts.llm import Reply, Scores
from jaxml.prompts.store import Store

RETRIED = (408, 409, 429, 500, 502, 503, 504)
GRACE_S = 2.0  # for answers that are on their way when one has failed
ANSWER_BYTES = 64 * files.MIB  # of one answer; a long prompt's log-probabilities have a few MiB
Body = tuple[str, dict[str, Any]]  # (path, JSON) of a request


class EndpointError(RuntimeError):
    """The endpoint did not answer, or not as it should, however often it was asked.

    Example:
        >>> issubclass(EndpointError, RuntimeError)
        True
    """


@dataclasses.dataclass
class Endpoint:
    """An `LLM` over HTTP.

    Strings go to /completions, messages to /chat/completions.

    Args:
        url: up to and with /v1.
        model: its name there.
        api_key: sent as a bearer token, and to nobody else.
        timeout: seconds for one answer, from the request to its last byte.
        retries: how often a request is repeated after a status of `RETRIED`, a cut connection, a timeout or an answer
            that is no JSON of the right form; with pauses that double from `backoff` seconds, or as long as the server
            asks for, never longer than `longest_pause`.
        concurrency: requests under way at once.
        cache: a file of answers that need not be asked for again (temperature 0 or a seed makes them repeatable).

    Raises:
        EndpointError: after the last retry, or at once for a status that a retry does not help; says what came.

    Example:
        >>> llm = Endpoint("http://localhost:8000/v1", "my-model")
        >>> llm.name, llm.cost("Who keeps the lighthouse?")
        ('http://localhost:8000/v1#my-model', 7)
        >>> llm.close()
    """

    url: str
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 0.5
    longest_pause: float = 30.0
    concurrency: int = 8
    cache: str | Path | None = None
    _client: Any = dataclasses.field(default=None, repr=False)
    _likelihood: bool | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        httpx = need("httpx", "prompts")
        for name in ("timeout", "concurrency"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Endpoint: {name} is above 0, got {getattr(self, name)}.")
        if self.retries < 0:
            raise ValueError(f"Endpoint: retries is at least 0, got {self.retries}.")
        if self.api_key and not self.api_key.isprintable():
            raise ValueError("Endpoint: api_key is one line of printable characters. Strip it.")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"Endpoint: url begins with http:// or https://, got {self.url!r}.")
        headers = {"Accept-Encoding": "identity"}  # little that becomes much when it is unpacked
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        options = dict(base_url=self.url.rstrip("/"), headers=headers, timeout=self.timeout, limits=limits)
        try:
            self._client = httpx.Client(**options)
        except httpx.InvalidURL as error:
            raise ValueError(f"Endpoint: url is an address, got {self.url!r} ({error}).") from error
        self._store = Store(self.cache)

    @property
    def name(self) -> str:
        return f"{self.url}#{self.model}"

    def cost(self, prompt: Prompt, choices: Sequence[str] = ()) -> int:
        """A guess at four characters a token, the tokenizer being elsewhere. Each choice pays for the prompt."""
        texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]
        read = sum(1 + len(text) // 4 for text in texts)
        return sum(read + 2 + len(c) // 4 for c in choices) if choices else read

    def generate(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 128, temperature: float = 0.0,
        stop: Sequence[str] = (), seed: int = 0,
    ) -> list[Reply]:  # fmt: skip
        """One continuation of each prompt."""
        bodies = [self._body(p, max_new_tokens, temperature, stop, seed + i) for i, p in enumerate(prompts)]
        return self._all([(body, _reply) for body in bodies])

    def sample(
        self, prompt: Prompt, n: int, *, max_new_tokens: int = 128, temperature: float = 1.0,
        stop: Sequence[str] = (), seed: int = 0,
    ) -> list[Reply]:  # fmt: skip
        """n continuations of one prompt, each asked for with a seed of its own; likelihoods where they are told."""
        bodies = [self._body(prompt, max_new_tokens, temperature, stop, seed + i) for i in range(n)]
        tell = {"logprobs": 1} if isinstance(prompt, str) else {"logprobs": True}
        return self._all([((path, body | tell), _reply) for path, body in bodies])

    def score(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[Scores]:
        """The likelihood of each prompt's choices, from the prompt's own log-probabilities ("echo").

        Raises:
            NotImplementedError: the prompts are messages, or the server tells nothing, or zeros.
        """
        if any(not isinstance(p, str) for p in prompts):
            raise NotImplementedError(
                "Endpoint.score: a chat endpoint does not tell how likely a given answer is. Give prompts as text, or "
                "take a model in this process (prompts.Local)."
            )
        self._probe()
        texts = [p + c for p, of in zip(prompts, choices, strict=True) for c in of]
        answers = iter(self._all([self._echo(text) for text in texts]))
        out = []
        for prompt, of in zip(prompts, choices):
            log_probs, tokens, cost = [], [], 0
            for choice, answer in zip(of, (next(answers) for _ in of)):
                offsets, values = answer
                if len(prompt) not in offsets:
                    raise ValueError(
                        "Endpoint.score: a token ends where the prompt ends, but the server's straddles it in "
                        f"{prompt[-10:] + choice[:10]!r}. End the prompt without a space, begin the choice with one."
                    )
                first = offsets.index(len(prompt))
                if any(v is None for v in values[first:]):
                    raise NotImplementedError(
                        f"Endpoint.score: {self.name} leaves out the log-probability of a token of {choice!r} "
                        "(the prompt is empty?). Give a prompt of at least one token."
                    )
                log_probs.append(sum(values[first:]))
                tokens.append(len(values) - first)
                cost += len(values)
            out.append(Scores(np.array(log_probs, np.float64), np.array(tokens), cost))
        return out

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()
        self._store.__exit__()

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- what is asked ----------------------------------------------------------------------------------

    def _body(self, prompt, max_new_tokens, temperature, stop, seed) -> Body:
        body = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        body |= {"stop": list(stop)} if stop else {}
        if isinstance(prompt, str):
            return "/completions", body | {"prompt": prompt}
        return "/chat/completions", body | {"messages": list(prompt)}

    def _echo(self, text: str) -> tuple[Body, Callable[[Any], Any]]:
        # One token more than nothing: some servers refuse 0.
        body = dict(model=self.model, prompt=text, max_tokens=1, temperature=0.0, echo=True, logprobs=1)
        return ("/completions", body), lambda answer: _token_log_probs(answer, text)

    def _probe(self) -> None:
        """Refuses a server that tells no likelihoods, before anything is made of its zeros."""
        if self._likelihood:
            return
        text = "The quick brown fox jumps over the lazy dog"
        try:
            offsets, values = self._ask(*self._echo(text), threading.Event())
        except (EndpointError, ValueError) as error:
            raise NotImplementedError(
                f"Endpoint.score: {self.name} does not tell a prompt's likelihood ({error}). "
                "Take a model in this process (prompts.Local)."
            ) from error
        inside = [v for o, v in zip(offsets, values) if 0 < o < len(text)]
        if len(inside) < 2 or any(v is None for v in inside) or not any(v < -1e-3 for v in inside):
            raise NotImplementedError(
                f"Endpoint.score: {self.name} answers with {inside[:3]} in the place of a prompt's log-probabilities. "
                "Take a model in this process (prompts.Local)."
            )
        self._likelihood = True

    # ---- how it is asked --------------------------------------------------------------------------------

    def _all(self, asked: Sequence[tuple[Body, Callable[[Any], Any]]]) -> list[Any]:
        """What is made of the answer to each request; the first failure, or Ctrl-C, ends all of them."""
        over, futures = threading.Event(), []
        pool = concurrent.futures.ThreadPoolExecutor(self.concurrency)
        try:
            futures = [pool.submit(self._ask, body, parse, over) for body, parse in asked]
            done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            failed = [f for f in futures if f in done and f.exception()]
            return [f.result() for f in failed or futures]  # of one that failed its error is raised
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            concurrent.futures.wait(futures, GRACE_S)  # what is on its way already is paid for, and kept

    def _ask(self, body: Body, parse: Callable[[Any], Any], over: threading.Event) -> Any:
        path, content = body
        question = {"url": self.url, "path": path, "body": content}
        kept = self._store.get(question)
        answer = self._post(path, content, over) if kept is None else kept
        try:
            parsed = parse(answer)
        except files.IMPOSSIBLE as error:
            said = f"{type(error).__name__}: {error}"[:200]
            raise EndpointError(f"{self.url}{path}: fields of an answer are not of the usual kind ({said}).") from error
        if kept is None:
            self._store.put(question, answer)
        return parsed

    def _post(self, path: str, body: dict[str, Any], over: threading.Event) -> Any:
        """An answer that holds choices."""
        httpx = need("httpx", "prompts")
        for attempt in range(self.retries + 1):
            pause = self.backoff * 2**attempt * random.uniform(0.8, 1.2)
            try:
                with self._client.stream("POST", path, json=body) as response:
                    content = self._content(response, over)
                    if response.status_code == 200:
                        answer = files.json_of(content, "the answer")
                        _choice(answer)
                        return answer
                    said = f"status {response.status_code}: {content[:200].decode(errors='replace')}"
                    if response.status_code not in RETRIED:
                        raise EndpointError(f"{self.url}{path}: {said}")
                    pause = max(pause, _asked_pause(response))
            except httpx.LocalProtocolError as error:  # the request itself is wrong
                raise EndpointError(f"{self.url}{path}: the request cannot be sent. Look at the address.") from error
            except (httpx.TransportError, httpx.DecodingError) as error:
                said = f"{type(error).__name__}: {error}"
            except ValueError as error:  # no JSON, or not of the form that was asked for
                said = f"not the answer that was asked for: {error}"
            if attempt < self.retries and over.wait(min(pause, self.longest_pause)):
                break
        raise EndpointError(f"{self.url}{path}: no answer after {attempt + 1} attempts; the last one: {said}")

    def _content(self, response: Any, over: threading.Event) -> bytes:
        """The whole of an answer, unless it is too late, too long, or no longer wanted."""
        httpx = need("httpx", "prompts")
        until, content = time.monotonic() + self.timeout, bytearray()
        whole = response.headers.get("content-length", "")
        if (packed := response.headers.get("content-encoding", "identity")) != "identity":
            raise EndpointError(f"{self.url}: an answer is not packed, got content-encoding {packed[:50]!r}.")
        for part in response.iter_bytes():
            content += part
            if len(content) > ANSWER_BYTES:
                raise EndpointError(f"{self.url}: an answer has at most {ANSWER_BYTES:,} bytes, got more.")
            if whole.isdigit() and len(content) >= int(whole):
                break
            if over.is_set() or time.monotonic() > until:
                raise httpx.ReadTimeout(f"an answer is whole within {self.timeout} s")
        return bytes(content)


def _asked_pause(response: Any) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:  # a date
        return 0.0


def _choice(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"an answer holds choices, got {str(answer)[:200]}") from error
    if not isinstance(choice, dict):
        raise ValueError(f"a choice is an object, got {choice!r}")
    return choice


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reply(answer: Any) -> Reply:
    choice = _choice(answer)
    message = choice.get("message") or {}
    text = choice.get("text", message.get("content"))
    if text is None and "content" in message:  # nothing but thoughts, a refusal or a call of a tool
        text = ""
    if not isinstance(text, str):
        raise EndpointError(f"a choice holds text or a message with content, got {str(choice)[:200]}")
    usage = answer.get("usage") or {}
    told = choice.get("logprobs") or {}
    values = told.get("token_logprobs") or [t.get("logprob") for t in told.get("content") or []]
    known = bool(values) and all(map(_number, values)) and any(v < 0 for v in values)
    if odd := [v for v in map(usage.get, ("prompt_tokens", "completion_tokens")) if v is not None and not _number(v)]:
        raise TypeError(f"tokens are a number, got {str(odd[0])[:50]!r}")
    count = lambda name: max(0, int(usage.get(name) or 0))
    new = count("completion_tokens") or len(values) or 1 + len(text) // 4
    return Reply(text, count("prompt_tokens"), new, float(sum(values)) if known else None)


def _token_log_probs(answer: Any, text: str) -> tuple[list[int], list[float | None]]:
    """(where each token of the text begins in it, its log-probability), of an answer that repeats the text.

    Some servers count a token in front, which is no part of the text, among the characters; and one token had to be
    written after it.
    """
    told = _choice(answer).get("logprobs")
    if not isinstance(told, dict) or not told.get("token_logprobs") or not told.get("text_offset"):
        raise ValueError("the answer holds no log-probabilities of the prompt's tokens")
    offsets, values, tokens = told["text_offset"], told["token_logprobs"], told.get("tokens")
    if len(offsets) != len(values) or not all(v is None or _number(v) for v in values):
        raise ValueError("the answer holds a log-probability and an offset for each token; these do not fit")
    if not all(isinstance(offset, int) for offset in offsets):
        raise ValueError("an offset is a whole number")
    first = tokens[0] if tokens and isinstance(tokens[0], str) else ""
    shift = 0 if text.startswith(first) else len(first)
    if shift and values[0] is not None:
        raise ValueError(f"the answer begins with {first!r}, which is not the text")
    pairs = [(o - shift, v) for o, v in zip(offsets, values) if o - shift < len(text)]
    pairs = pairs[1:] if shift else pairs
    if len(pairs) + bool(shift) < len(offsets) and len(text) + shift not in offsets:
        raise ValueError("the offsets of the tokens do not add up to the text")
    return [o for o, _ in pairs], [v for _, v in pairs]
