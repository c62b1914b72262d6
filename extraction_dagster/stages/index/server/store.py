"""The store on a Qdrant server, through qdrant-client over gRPC.

The collection's name is an alias: `video_frames` stands for `video_frames-<fingerprint>`, so that another model's
collection can be loaded beside it and take over in one step. The client's own retries are weak (they give up within
a second, or never) and are not used; ours repeat what may pass and are safe because every write is idempotent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self, TypeVar

from extraction_dagster.errors.index import CollectionMissingError, StoreNotOpenError
from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore
from extraction_dagster.stages.index.server import wire as server_wire
from extraction_dagster.stages.index.server.collections import ServerCollections
from extraction_dagster.stages.index.server.retry import RetryPolicy, require_completed

if TYPE_CHECKING:
    from collections.abc import Callable

    from qdrant_client import QdrantClient

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.index.points import Dialect, PointBatch

_Result = TypeVar("_Result")


class ServerStore(PointStore):
    """The store on a Qdrant server.

    Args:
        client: Connected, or on its local engine; it is closed with the store.
        url: For messages; without credentials.
        wire: `local` for the client's local engine, which takes no gRPC messages.
        timeout_seconds: Limit for one call.
        retry: How calls are repeated.
    """

    def __init__(
        self,
        client: QdrantClient,
        *,
        url: str,
        wire: server_wire.Wire = "grpc",
        timeout_seconds: float = 60.0,
        retry: RetryPolicy | None = None,
    ) -> None:
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

    def _call(self, operation: str, function: Callable[[], _Result]) -> _Result:
        return self._retry.call(operation, self._url, function)

    def _open(self, operation: str) -> tuple[CollectionSpec, str]:
        if self._spec is None:
            raise StoreNotOpenError(operation, self._url)
        return self._spec, self._target

    @property
    def _dialect(self) -> Dialect:
        return server_wire.dialect()

    def _write(self, batch: PointBatch) -> None:
        _, target = self._open("write points")
        upsert = server_wire.prepare_upsert(
            self._client, target, batch, wire=self._wire, timeout_seconds=self._timeout_seconds
        )
        self._call("write points", lambda: require_completed(upsert()))

    def _remove(self, condition: Any) -> None:  # noqa: ANN401 - the engine's own filter
        _, target = self._open("remove points")
        self._call("remove points", lambda: require_completed(self._client.delete(target, condition, wait=True)))

    def _count(self, condition: Any) -> int:  # noqa: ANN401
        _, target = self._open("count points")
        return self._call("count points", lambda: self._client.count(target, condition, exact=True)).count

    def _count_by_record(self, condition: Any, limit: int) -> list[Any]:  # noqa: ANN401
        _, target = self._open("count points")
        found = self._call(
            "count points",
            lambda: self._client.facet(target, "record_id", facet_filter=condition, limit=limit, exact=True),
        )
        return list(found.hits)

    def _nearest(self, vector: list[float], limit: int, condition: Any, score_threshold: float | None) -> list[Any]:  # noqa: ANN401
        _, target = self._open("search")
        found = self._call(
            "search",
            lambda: self._client.query_points(
                target,
                query=vector,
                query_filter=condition,
                limit=limit,
                score_threshold=score_threshold,
                with_payload=True,
            ),
        )
        return list(found.points)

    def _page(self, condition: Any, size: int, offset: Any, *, content: bool) -> tuple[list[Any], Any]:  # noqa: ANN401
        _, target = self._open("read points")
        return self._call(
            "read points",
            lambda: self._client.scroll(
                target, condition, limit=size, offset=offset, with_payload=content, with_vectors=content
            ),
        )
