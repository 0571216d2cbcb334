"""Retrieval: passages from files, found by meaning and by words.

index = rag.Index.create("runs/index", encoder.load())   # encoder from jaxml.lm
index.update("docs/")
[hits] = index.search(["who keeps the lighthouse?"], 5)
"""

from jaxml.rag import chunk, dense, index, lexical, passages, read, retrieve, store
from jaxml.rag.chunk import Chunking
from jaxml.rag.index import Changes, Index
from jaxml.rag.lexical import Lexical
from jaxml.rag.passages import Passage
from jaxml.rag.read import Limits
from jaxml.rag.store import Folder, Hit, Store

__all__ = [
    "Changes", "Chunking", "Folder", "Hit", "Index", "Lexical", "Limits", "Passage", "Store", "chunk", "dense", "index",
    "lexical", "passages", "read", "retrieve", "store",
]  # fmt: skip
