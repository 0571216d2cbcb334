"""A store in Qdrant, for more passages than one machine holds.

```python
store = Qdrant.open(qdrant_client.QdrantClient("http://host:6333"), "passages", width=384)
index = rag.Index.create("runs/index", encoder, store=store)
```
"""

import dataclasses
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxml.extras import need
from jaxml.rag.passages import Passage
from jaxml.rag.store import Hit

PART = 256  # points a request


@dataclasses.dataclass(frozen=True)
class Qdrant:
    """`store.Store` over a collection: a point a passage, its key as id, the passage as payload.

    Args:
        client: a `qdrant_client.QdrantClient`.
        exact: search every vector rather than Qdrant's graph of neighbours.

    Example:
        >>> from qdrant_client import QdrantClient
        >>> store = Qdrant.open(QdrantClient(":memory:"), "passages", width=2)
        >>> store.add([Passage("a", "x"), Passage("b", "y")], np.eye(2, dtype=np.float32))
        2
        >>> [hit.passage.text for hit in store.search(np.array([[0.1, 0.9]], np.float32), 1)[0]]
        ['b']
    """

    client: Any
    collection: str
    exact: bool = False

    @classmethod
    def open(cls, client: Any, collection: str, width: int, *, exact: bool = False) -> "Qdrant":
        """The collection, made where there is none.

        Raises:
            ValueError: one of another width, or whose vectors are not compared by their product.
        """
        models = need("qdrant_client", "qdrant").models
        if not client.collection_exists(collection):
            client.create_collection(collection, models.VectorParams(size=width, distance=models.Distance.DOT))
        there = client.get_collection(collection).config.params.vectors
        if (there.size, there.distance) != (width, models.Distance.DOT):
            raise ValueError(
                f"Qdrant.open: the collection {collection!r} holds vectors of {width} numbers compared by Dot, got "
                f"{there.size} and {there.distance.value}. Choose another collection."
            )
        return cls(client, collection, exact)

    def __len__(self) -> int:
        return self.client.count(self.collection, exact=True).count

    @property
    def revision(self) -> int:
        """Others may change a collection, which tells its size alone: words that were indexed are indexed again when
        that changes."""
        return 0

    def add(self, passages: Sequence[Passage], vectors: np.ndarray) -> int:
        models = need("qdrant_client", "qdrant").models
        rows = {p.key: i for i, p in reversed(list(enumerate(passages)))}
        there = {p.key for p in self._retrieve(list(rows))}
        new = [i for key, i in rows.items() if key not in there]
        for first in range(0, len(new), PART):
            points = [
                models.PointStruct(
                    id=_id(passages[i].key), vector=np.asarray(vectors[i], np.float32).tolist(),
                    payload=dataclasses.asdict(passages[i]),
                )
                for i in new[first : first + PART]
            ]  # fmt: skip
            self.client.upsert(self.collection, points, wait=True)
        return len(new)

    def delete(self, keys: Sequence[str]) -> int:
        there = [p.key for p in self._retrieve(list(dict.fromkeys(keys)))]
        if there:
            self.client.delete(self.collection, [_id(key) for key in there], wait=True)
        return len(there)

    def search(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        models = need("qdrant_client", "qdrant").models
        params = models.SearchParams(exact=self.exact)
        requests = [
            models.QueryRequest(query=v.tolist(), limit=k, with_payload=True, params=params)
            for v in np.asarray(vectors, np.float32)
        ]
        found = self.client.query_batch_points(self.collection, requests) if requests else []
        return [[Hit(Passage(**point.payload), point.score) for point in one.points] for one in found]

    def passages(self, keys: Sequence[str] | None = None) -> Iterator[Passage]:
        if keys is not None:
            found = {p.key: p for p in self._retrieve(list(keys))}
            if missing := [key for key in keys if key not in found]:
                raise KeyError(f"{self.collection}: no passage has the key {missing[0]!r}.")
            yield from (found[key] for key in keys)
            return
        after = None
        while True:
            points, after = self.client.scroll(self.collection, limit=PART, offset=after, with_payload=True)
            yield from (Passage(**point.payload) for point in points)
            if after is None:
                return

    def _retrieve(self, keys: list[str]) -> Iterator[Passage]:
        for first in range(0, len(keys), PART):
            ids = [_id(key) for key in keys[first : first + PART]]
            for point in self.client.retrieve(self.collection, ids, with_payload=True):
                yield Passage(**point.payload)


def _id(key: str) -> str:
    return str(uuid.UUID(key))
