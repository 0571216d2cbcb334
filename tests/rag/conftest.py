"""An encoder that is instant: a vector of hashed words."""

import dataclasses
import zlib
from types import SimpleNamespace

import numpy as np
import pytest


@dataclasses.dataclass
class Words:
    """As `lm.encoder.Encoder` to an index."""

    width: int = 64
    seed: int = 0

    @property
    def config(self):
        return SimpleNamespace(width=self.width, seed=self.seed)

    @property
    def params(self):
        return {}

    tokenizer = SimpleNamespace(bos_id=0, eos_ids=(), add_bos=False, chat_template=None, vocab_size=1)

    def __call__(self, texts):
        out = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(out, texts):
            for word in text.lower().split():
                row[zlib.crc32(f"{self.seed}{word.strip('.,?')}".encode()) % self.width] += 1
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def words():
    return Words()
