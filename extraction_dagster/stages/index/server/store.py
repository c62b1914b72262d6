"""The store on a Qdrant server, through qdrant-client over gRPC.

The collection's name is an alias: `video_frames` stands for `video_frames-<fingerprint>`, so that another model's
collection can be loaded beside it and take over in one step. The client's own retries are weak (they give up within
a second, or never) and are not used; ours repeat what may pass and are safe because every write is idempotent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import numpy as np

from extraction_dagster.errors.base import RecordShapeError
from extraction_dagster.errors.index import CollectionMissingError, StoreNotOpenError
from extraction_dagster.stages.index.filters import PointFilter, translate
from extraction_dagster.stages.index.points import PointBatch
from extraction_dagster.stages.index.protocol import (
    MAX_BYTES_PER_CALL,
    MAX_POINTS_PER_CALL,
    CollectionSpec,
    Hit,
)
from extraction_dagster.stages.index.server import wire as server_wire
from extraction_dagster.stages.index.server.collections import ServerCollections
from extraction_dagster.stages.index.server.retry import RetryPolicy, require_completed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from qdrant_client import QdrantClient, models

    from extraction_dagster.settings import Settings

_Result = TypeVar("_Result")
_PAGE = 4096


class ServerStore:
    """A `PointStore` on a Qdrant server; see `PointStore` for what each method promises."""

    def __init__(
        self,
        client: QdrantClient,
        *,
        url: str,
        wire: server_wire.Wire = "grpc",
        timeout_seconds: float = 60.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        """Take over a client, which is closed with the store.

        Args:
            client: Connected, or on its local engine.
            url: For messages; without credentials.
            wire: `local` for the client's local engine, which takes no gRPC messages.
            timeout_seconds: Limit for one call.
            retry: How calls are repeated.
        """
        self._client = client
        self._url = url
        self._wire = wire
        self._timeout_seconds = timeout_seconds
        self._retry = retry or RetryPolicy()
        self._collections = ServerCollections(client, url, self._call)
        self._spec: CollectionSpec | None = None
        self._target = ""

    @classmethod
    def connect(cls, settings: Settings, *, retry: RetryPolicy | None = None) -> Self:
        """Make a client from the settings; nothing is sent before a collection is opened."""
        from qdrant_client import QdrantClient

        url = settings.qdrant_url or ""
        key = settings.qdrant_api_key
        client = QdrantClient(
            url=url,
            grpc_port=settings.qdrant_grpc_port,
            prefer_grpc=True,
            api_key=key.get_secret_value() if key else None,
            timeout=math.ceil(settings.qdrant_timeout_seconds),
            check_compatibility=False,
            pool_size=1,
        )
        timeout = settings.qdrant_timeout_seconds
        return cls(client, url=url, timeout_seconds=timeout, retry=retry)

    def __repr__(self) -> str:
        """The server; never the key."""
        return f"ServerStore({self._url!r})"

    def ensure_collection(self, spec: CollectionSpec, *, staged: bool = False) -> None:
        """Open the collection, and create it when there is none."""
        current = self._collections.behind(spec.name)
        target = spec.full_name if staged else current or spec.full_name
        self._collections.ensure(target, spec)
        self._spec, self._target = spec, target
        if current is None and not staged:
            self.publish()

    def open_collection(self, name: str, *, fingerprint: str | None = None) -> CollectionSpec:
        """Open the collection in use, or another of that name."""
        target = self._collections.behind(name) if fingerprint is None else f"{name}-{fingerprint}"
        if target is None or (fingerprint is not None and not self._collections.exists(target)):
            raise CollectionMissingError(target or name, self._url)
        self._spec, self._target = self._collections.spec(target, name), target
        return self._spec

    def publish(self) -> None:
        """Make the open collection the one in use, in one step on the server."""
        spec, target = self._open("publish a collection")
        self._collections.publish(spec.name, target)

    def collections(self, name: str) -> dict[str, bool]:
        """The fingerprints under a name, and whether each is in use."""
        return self._collections.under(name)

    def drop(self, name: str, fingerprint: str) -> None:
        """Remove a collection that is not in use."""
        target = f"{name}-{fingerprint}"
        self._collections.drop(name, target)
        if self._target == target:
            self._spec, self._target = None, ""

    def upsert(self, batch: PointBatch) -> None:
        """Write points, and return once they are applied."""
        spec, target = self._open("write points")
        if batch.dim != spec.dim and len(batch):
            raise RecordShapeError(
                record="PointBatch", why=f"collection {spec.name!r} takes dim {spec.dim}", shapes=f"dim {batch.dim}"
            )
        for chunk in batch.chunks(max_points=MAX_POINTS_PER_CALL, max_bytes=MAX_BYTES_PER_CALL):
            self._upsert_chunk(target, chunk)

    def count(self, filters: PointFilter | None = None) -> int:
        """The exact number of points."""
        _, target = self._open("count points")
        condition = translate(filters, server_wire.dialect())
        result = self._call("count points", lambda: self._client.count(target, condition, exact=True))
        return int(result.count)

    def count_by_record(self, filters: PointFilter | None = None) -> dict[int, int]:
        """The exact number of points of each record that has any."""
        limit = _PAGE
        while True:
            hits = self._facet(filters, limit)
            if len(hits) < limit:
                return {int(hit.value): hit.count for hit in hits}
            limit *= 8

    def delete(self, filters: PointFilter) -> None:
        """Remove points of named records, and return once they are gone."""
        _, target = self._open("remove points")
        if not filters.names_points:
            raise RecordShapeError(
                record="PointFilter", why="removing needs records or points by name", shapes=repr(filters)
            )
        condition = cast("models.Filter", translate(filters, server_wire.dialect()))
        self._call("remove points", lambda: require_completed(self._client.delete(target, condition, wait=True)))

    def search(
        self,
        vector: np.ndarray,
        *,
        limit: int,
        filters: PointFilter | None = None,
        score_threshold: float | None = None,
    ) -> list[Hit]:
        """The points nearest to a vector."""
        _, target = self._open("search")
        condition = translate(filters, server_wire.dialect())
        query = vector.astype(np.float32).tolist()
        found = self._call(
            "search",
            lambda: self._client.query_points(
                target,
                query=query,
                query_filter=condition,
                limit=limit,
                score_threshold=score_threshold,
                with_payload=True,
            ),
        )
        return sorted(
            (Hit.from_payload(hit.payload or {}, hit.score) for hit in found.points), key=lambda hit: hit.order
        )

    def point_ids(self, filters: PointFilter | None = None) -> set[str]:
        """The ids of the points."""
        return {str(record.id) for page in self._pages(filters, _PAGE, content=False) for record in page}

    def read(self, filters: PointFilter | None = None, *, batch_size: int = 256) -> Iterator[PointBatch]:
        """The points themselves, in the order of their ids."""
        for page in self._pages(filters, batch_size, content=True):
            yield PointBatch(
                ids=tuple(str(record.id) for record in page),
                vectors=np.asarray([record.vector for record in page], dtype=np.float32),
                payloads=tuple(record.payload or {} for record in page),
            )

    def optimize(self) -> None:
        """Nothing: a server does it by itself."""
        self._open("optimize")

    def flush(self) -> None:
        """Nothing: a completed write is in the server's log."""
        self._open("flush")

    def close(self) -> None:
        """Close the connection."""
        self._spec, self._target = None, ""
        self._client.close()

    def __enter__(self) -> Self:
        """The store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def _call(self, operation: str, function: Callable[[], _Result]) -> _Result:
        return self._retry.call(operation, self._url, function)

    def _open(self, operation: str) -> tuple[CollectionSpec, str]:
        if self._spec is None:
            raise StoreNotOpenError(operation, self._url)
        return self._spec, self._target

    def _upsert_chunk(self, target: str, chunk: PointBatch) -> None:
        upsert = server_wire.prepare_upsert(
            self._client, target, chunk, wire=self._wire, timeout_seconds=self._timeout_seconds
        )
        self._call("write points", lambda: require_completed(upsert()))

    def _facet(self, filters: PointFilter | None, limit: int) -> list[Any]:
        _, target = self._open("count points")
        condition = translate(filters, server_wire.dialect())
        found = self._call(
            "count points",
            lambda: self._client.facet(target, "record_id", facet_filter=condition, limit=limit, exact=True),
        )
        return list(found.hits)

    def _pages(self, filters: PointFilter | None, size: int, *, content: bool) -> Iterator[list[Any]]:
        offset: Any = None
        while True:
            page, offset = self._page(filters, size, offset, content=content)
            if page:
                yield page
            if offset is None:
                return

    def _page(
        self,
        filters: PointFilter | None,
        size: int,
        offset: Any,  # noqa: ANN401 - an engine's own id
        *,
        content: bool,
    ) -> tuple[list[Any], Any]:
        _, target = self._open("read points")
        condition = translate(filters, server_wire.dialect())
        return self._call(
            "read points",
            lambda: self._client.scroll(
                target, condition, limit=size, offset=offset, with_payload=content, with_vectors=content
            ),
        )
