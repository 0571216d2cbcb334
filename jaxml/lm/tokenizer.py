"""Text to token ids and back: a thin shell around the ``tokenizers`` library.

From a Hugging Face ``tokenizer.json``, or rebuilt from the vocabulary in a GGUF file.
"""

import base64
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxml import files
from jaxml.extras import need

STEPS, GROWTH = 64, 1000  # of a tokenizer.json: its steps, and how many characters they make of one
TOKEN = 1024  # characters of a token, at most; published ones have up to 130


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Encodes without surprises: special tokens only where the text or `add_bos` says so.

    Example:
        >>> from jaxml.testing import tiny_tokenizer
        >>> made = tiny_tokenizer()
        >>> made.decode(made.encode("the fox"))
        'the fox'
    """

    backend: Any  # tokenizers.Tokenizer
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    add_bos: bool = False  # whether raw prompts of this model start with the bos token
    chat_template: str | None = None
    rows: int | None = None  # of the model's embedding; what the vocabulary has beyond them cannot be encoded

    def __post_init__(self):
        if not 0 <= self.pad_id < 2**31:
            raise ValueError(f"tokenizer: ids are whole numbers in 0 … 2³¹ - 1, got the padding {self.pad_id}.")

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids; special tokens that are written out in the text are recognised.

        Raises:
            ValueError: half of a character in the text, or a token that the model has no vector of.
        """
        _check_text(text)
        with _rust("tokenizer"):
            ids = self.backend.encode(text, add_special_tokens=False).ids
        ids = [self.bos_id, *ids] if bos and self.add_bos and self.bos_id is not None else ids
        self._check_ids(ids)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, within the special tokens that the tokenizer's own template puts around one.

        Raises:
            ValueError: as `encode`.
        """
        for text in texts:
            _check_text(text)
        with _rust("tokenizer"):
            rows = [of.ids for of in self.backend.encode_batch(list(texts), add_special_tokens=True)]
        for ids in rows:
            self._check_ids(ids)
        return rows

    def _check_ids(self, ids: Sequence[int]) -> None:
        if self.rows is not None and ids and max(ids) >= self.rows:
            token = self.token(max(ids))
            raise ValueError(
                f"tokenizer: the model's embedding has {self.rows:,} rows, got {token!r}, id {max(ids):,}."
            )

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids."""
        with _rust("tokenizer"):
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def token(self, i: int | None) -> str | None:
        """A token as the vocabulary spells it."""
        return None if i is None else self.backend.id_to_token(i)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "bos_token": self.token(self.bos_id),
            "eos_token": self.token(self.eos_ids[0]) if self.eos_ids else None,
            "pad_token": self.token(self.pad_id),
        }
        if self.chat_template:
            config["chat_template"] = self.chat_template
            (folder / "chat_template.jinja").write_text(self.chat_template)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def from_folder(
    folder: str | Path, *, eos_ids: tuple[int, ...] = (), pad_id: int | None = None, rows: int | None = None
) -> Tokenizer:
    """From a Hugging Face folder with ``tokenizer.json`` (and tokenizer_config.json, chat_template.jinja).

    Args:
        eos_ids, pad_id: the model config's, which win over the tokenizer's own where given.
        rows: of the model's embedding.

    Raises:
        FileNotFoundError, ValueError: no tokenizer.json there, or one that cannot be read.

    Example:
        >>> import tempfile
        >>> from jaxml import testing
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     testing.tiny_tokenizer().save(folder)
        ...     from_folder(folder).encode("fox")
        [9, 18, 27]
    """
    tokenizers = need("tokenizers", "lm")
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: a model folder has a tokenizer.json; it is missing. "
            "SentencePiece files (tokenizer.model) are not read: convert them with transformers first."
        )
    text = files.read_text(path)
    with files.reading(path, "a tokenizer"), _rust(path):
        about = files.json_of(text, path)
        _check_steps(about, path)
        _check_model(about, path)
        backend = tokenizers.Tokenizer.from_str(text)
    with files.reading(folder, "a tokenizer"), _rust(folder):
        return dataclasses.replace(_of_folder(folder, backend, eos_ids, pad_id), rows=rows)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("tokenizer: a text has half of a character (a lone surrogate). Leave it out.") from error


@contextlib.contextmanager
def _rust(where: str | Path) -> Iterator[None]:
    """The Rust library raises plain Exception, and panics, which are not even that."""
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise ValueError(f"{where}: no tokenizer can be made of it ({error}).") from error
        raise


def _check_steps(about: dict[str, Any], path: Path) -> None:
    """Refuses steps that make very much of little: the Rust library would end the process for lack of memory."""
    for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        count, grown, left = 0, 1, [about.get(part)]
        while left:
            step = left.pop()
            if step is None:
                continue
            count += 1
            grown *= _growth(step) if part in ("normalizer", "decoder") else 1
            for inner in ("normalizers", "pretokenizers", "decoders", "processors"):
                left += step.get(inner) or []
            if count > STEPS:
                raise ValueError(f"{path}: a {part} has at most {STEPS} steps, got more.")
            if grown > GROWTH:
                raise ValueError(f"{path}: a {part} makes at most {GROWTH:,} characters of one, got {grown:,}.")


def _check_model(about: dict[str, Any], path: Path) -> None:
    """Refuses what takes very long or very much: many ids around each text, words that are tried in all their parts."""
    model, after = about.get("model") or {}, about.get("post_processor") or {}
    if model.get("max_input_chars_per_word", 0) > TOKEN:
        raise ValueError(f"{path}: max_input_chars_per_word is at most {TOKEN:,}.")
    for one in (after, *(after.get("processors") or ())):
        ids = {name: len(of["ids"]) for name, of in (one.get("special_tokens") or {}).items()}
        pieces = [
            p["SpecialToken"]["id"] for p in [*one.get("single", ()), *one.get("pair", ())] if "SpecialToken" in p
        ]
        if sum(ids.get(name, 0) for name in pieces) > GROWTH:
            raise ValueError(f"{path}: a post_processor puts at most {GROWTH:,} ids around a text.")


def _growth(step: Mapping[str, Any]) -> int:
    """The most characters that a step of a normalizer or decoder makes of one."""
    if step.get("type") == "Replace":
        regex = "Regex" in step["pattern"]  # may fit between any two characters
        return len(step["content"]) + 1 if regex or not step["pattern"]["String"] else max(1, len(step["content"]))
    if step.get("type") == "Prepend":
        return 1 + len(step["prepend"])
    if step.get("type") == "Precompiled":  # a trie, its length before it, and the texts that it points to
        table = base64.b64decode(step["precompiled_charsmap"])
        return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")), default=1) or 1
    return {"NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "ByteLevel": 2, "Lowercase": 3}.get(step.get("type"), 1)


def _of_folder(folder: Path, backend: Any, eos_ids: tuple[int, ...], pad_id: int | None) -> Tokenizer:
    backend.no_padding()  # what the file's last user had set
    backend.no_truncation()
    path = folder / "tokenizer_config.json"
    config = files.read_json(path) if path.is_file() else {}
    id_of = lambda key: _token_id(backend, config.get(key))
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = files.read_text(folder / "chat_template.jinja", files.MIB)
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: a chat template is text, got {type(template).__name__}.")
    eos = eos_ids or tuple(i for i in [id_of("eos_token")] if i is not None)
    pad = pad_id if pad_id is not None else id_of("pad_token")
    bos = id_of("bos_token")
    add_bos = config.get("add_bos_token")
    if add_bos is None:  # fast tokenizers say it in their post-processor only
        first = backend.encode("a", add_special_tokens=True).ids[:1]
        add_bos = bos is not None and first == [bos]
    return Tokenizer(
        backend=backend,
        bos_id=bos,
        eos_ids=eos,
        pad_id=pad if pad is not None else (eos[0] if eos else 0),
        add_bos=bool(add_bos),
        chat_template=template,
    )


def _token_id(backend, token) -> int | None:
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else backend.token_to_id(token)


# ---- GGUF -------------------------------------------------------------------------------------------

_GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def from_gguf(metadata: Mapping[str, Any], *, rows: int | None = None) -> Tokenizer:
    """From the vocabulary in a GGUF header: byte-level BPE, or SentencePiece-style BPE with scores.

    Raises:
        ValueError: a tokenizer model or pre-tokenizer that is not implemented, by name.

    Example:
        >>> about = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
        >>> made = from_gguf({f"tokenizer.ggml.{key}": value for key, value in about.items()})
        >>> made.encode("aba"), made.decode([2, 0])
        ([2, 0], 'aba')
    """
    need("tokenizers", "lm")
    with files.reading("tokenizer.ggml", "a vocabulary"), _rust("tokenizer.ggml"):
        return dataclasses.replace(_of_gguf(metadata), rows=rows)


def _of_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    get = lambda key, default=None: metadata.get("tokenizer.ggml." + key, default)
    model = get("model")
    if model == "gpt2":
        backend = _byte_level(get("tokens"), get("merges"), get("pre", "gpt-2"))
    elif model == "llama":
        backend = _sentencepiece(get("tokens"), get("scores"), get("add_space_prefix", True))
    else:
        raise ValueError(f"tokenizer.from_gguf: tokenizer.ggml.model is gpt2 or llama, got {model!r}.")
    _mark_special(backend, get("tokens"), get("token_type", []))
    eos = tuple(sorted({get("eos_token_id"), get("eot_token_id")} - {None}))
    pad = get("padding_token_id")
    return Tokenizer(
        backend=backend,
        bos_id=get("bos_token_id"),
        eos_ids=eos,
        pad_id=pad if pad is not None else (eos[0] if eos else 0),
        add_bos=bool(get("add_bos_token", model == "llama")),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _byte_level(tokens, merges, pre: str):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = lambda pattern: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": split(_GPT4_SPLIT % 3),
        "smaug-bpe": split(_GPT4_SPLIT % 3),
        "qwen2": split(_GPT4_SPLIT.replace("{1,%s}", "")),
    }
    if pre not in known:
        raise ValueError(
            f"tokenizer.from_gguf: tokenizer.ggml.pre is one of {', '.join(known)}, got {pre!r}. "
            "Load the model from its Hugging Face folder instead."
        )
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    vocab = {t: i for i, t in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = known[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens, scores, add_space_prefix: bool):
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {t: i for i, t in enumerate(tokens)}
    # Two pieces merge where their union is a piece; a higher score merges first.
    merges = []
    if (longest := max(map(len, tokens), default=0)) > TOKEN:
        raise ValueError(f"tokenizer.from_gguf: a token has at most {TOKEN:,} characters, got {longest:,}.")
    for i, token in enumerate(tokens):
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                merges.append((-scores[i], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:]))
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unk = tokens[0] if "<unk>" not in vocab else "<unk>"
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=unk, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _mark_special(backend, tokens, types) -> None:
    from tokenizers import AddedToken

    plain = lambda t, special: AddedToken(t, normalized=False, special=special)
    control = [plain(t, True) for t, kind in zip(tokens, types) if kind == _CONTROL]
    user = [plain(t, False) for t, kind in zip(tokens, types) if kind == _USER_DEFINED]
    backend.add_special_tokens(control)
    backend.add_tokens(user)
