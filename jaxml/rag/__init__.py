"""Retrieval, and Astute RAG: answers that survive bad passages.

```python
index = rag.Index.create("runs/index", encoder.load())   # encoder from jaxml.lm
index.update("docs/")
[hits] = index.search(["who keeps the lighthouse?"], 5)
[found] = rag.answer(prompts.Local(model), ["who keeps the lighthouse?"], [[hit.passage for hit in hits]], "astute")
print(rag.report(found))
```
"""

from jaxml.rag import (
    astute,
    calls,
    chunk,
    dense,
    index,
    lexical,
    methods,
    metrics,
    passages,
    qdrant,
    questions,
    read,
    retrieve,
    store,
    trace,
    weigh,
    wording,
)  # fmt: skip
from jaxml.rag.chunk import Chunking
from jaxml.rag.index import Changes, Index
from jaxml.rag.lexical import Lexical
from jaxml.rag.methods import METHODS, answer
from jaxml.rag.page import page
from jaxml.rag.page import write as write_page
from jaxml.rag.passages import Passage
from jaxml.rag.read import Limits
from jaxml.rag.store import Folder, Hit, Store
from jaxml.rag.trace import Answer, Evidence, Group, report

__all__ = [
    "METHODS", "Answer", "Changes", "Chunking", "Evidence", "Folder", "Group", "Hit", "Index", "Lexical", "Limits",
    "Passage", "Store", "answer", "astute", "calls", "chunk", "dense", "index", "lexical", "methods", "metrics", "page",
    "passages", "qdrant", "questions", "read", "report", "retrieve", "store", "trace", "weigh", "wording", "write_page",
]  # fmt: skip
