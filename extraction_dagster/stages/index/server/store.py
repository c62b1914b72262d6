"""The store on a Qdrant server, through qdrant-client over gRPC.

The collection's name is an alias: `video_frames` stands for `video_frames-<fingerprint>`, so that another model's
collection can be loaded beside it and take over in one step. The client's own retries are weak (they give up within
a second, or never) and are not used; ours repeat what may pass and are safe because every write is idempotent.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np

from extraction_dagster.errors.index import CollectionMissingError, StoreNotOpenError
from extraction_dagster.stages.index.points import Dialect
from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore, as_rows
from extraction_dagster.stages.index.server.collections import ServerCollections
from extraction_dagster.stages.index.server.retry import RetryPolicy, require_completed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from qdrant_client import QdrantClient, models

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.index.points import PointBatch

_Result = TypeVar("_Result")
Wire = Literal["grpc", "local"]


class ServerStore(PointStore):
    """The store on a Qdrant server.

    Args:
        client: Connected, or on its local engine; it is closed with the store.
        url: For messages; without credentials.
        wire: `local` for the client's local engine, which takes no gRPC messages.
        timeout_seconds: Limit for one call.
        retry: How calls are repeated.
        source: The identity of the source table whose points it keeps; any when it is empty.
    """

    def __init__(  # noqa: PLR0913 - how it is reached, and whose points it keeps
        self,
        client: QdrantClient,
        *,
        url: str,
        wire: Wire = "grpc",
        timeout_seconds: float = 60.0,
        retry: RetryPolicy | None = None,
        source: str = "",
    ) -> None:
        self._client = client
        self._url = url
        self._wire = wire
        self._timeout_seconds = timeout_seconds
        self._retry = retry or RetryPolicy()
        self._source = source
        self._collections = ServerCollections(client, url, self._call)
        self._spec: CollectionSpec | None = None
        self._target = ""

    @classmethod
    def connect(cls, settings: Settings, *, retry: RetryPolicy | None = None, source: str = "") -> Self:
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
        return cls(client, url=url, timeout_seconds=settings.qdrant_timeout_seconds, retry=retry, source=source)

    def __repr__(self) -> str:
        """The server; never the key."""
        return f"ServerStore({self._url!r})"

    def ensure_collection(self, spec: CollectionSpec, *, staged: bool = False) -> None:
        """Open the collection, and create it when there is none."""
        current = self._collections.behind(spec.name)
        target = spec.full_name if staged else current or spec.full_name
        if current is not None and current != target:
            self._require_own(self._collections.spec(current, spec.name))
        found = self._collections.ensure(target, replace(spec, source=self._source), self._require_own)
        self._spec, self._target = found, target
        self._claim()
        if current is None and not staged:
            self.publish()

    def open_collection(self, name: str, *, fingerprint: str | None = None) -> CollectionSpec:
        """Open the collection in use, or another of that name."""
        target = self._collections.behind(name) if fingerprint is None else f"{name}-{fingerprint}"
        if target is None or (fingerprint is not None and not self._collections.is_under(target, name)):
            raise CollectionMissingError(target or name, self._url)
        found = self._collections.spec(target, name)
        self._require_own(found)
        self._spec, self._target = found, target
        return found

    def publish(self) -> None:
        """Make the open collection the one in use, in one step on the server."""
        spec, target = self._open("publish a collection")
        current = self._collections.behind(spec.name)
        if current is not None and current not in {target, spec.name}:
            self._require_own(self._collections.spec(current, spec.name))
        self._claim()
        self._collections.publish(spec.name, target)

    def collections(self, name: str) -> dict[str, bool]:
        """The fingerprints under a name, and whether each is in use."""
        return self._collections.under(name)

    def drop(self, name: str, fingerprint: str) -> None:
        """Remove a collection that is not in use."""
        target = f"{name}-{fingerprint}"
        self._collections.drop(name, target, self._require_own)
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

    @functools.cached_property
    def _dialect(self) -> Dialect:
        from qdrant_client import models

        return Dialect(
            models,
            number_range=models.Range,
            datetime_range=models.DatetimeRange,
            has_ids=lambda ids: models.HasIdCondition(has_id=list(ids)),
        )

    def _note_source(self, source: str) -> bool:
        spec, target = self._open("claim a collection")
        found = self._collections.note_source(target, spec, source)
        self._require_own(found)  # another may have been first
        self._spec = replace(found, source=source)  # what can't be kept is not tried again
        return bool(found.source)

    def _write(self, batch: PointBatch) -> None:
        _, target = self._open("write points")
        upsert = _prepare_upsert(self._client, target, batch, wire=self._wire, timeout_seconds=self._timeout_seconds)
        self._call("write points", lambda: require_completed(upsert()))

    def _remove(self, condition: Any) -> None:  # noqa: ANN401 - the engine's own filter
        _, target = self._open("remove points")
        self._call("remove points", lambda: require_completed(self._client.delete(target, condition, wait=True)))

    def _count(self, condition: Any) -> int:  # noqa: ANN401
        _, target = self._open("count points")
        seconds = self._server_seconds
        count = functools.partial(self._client.count, target, condition, exact=True, timeout=seconds)
        return self._call("count points", count).count

    def _nearest(self, vector: list[float], limit: int, condition: Any, score_threshold: float | None) -> list[Any]:  # noqa: ANN401
        from qdrant_client import models

        _, target = self._open("search")
        rescored = models.SearchParams(quantization=models.QuantizationSearchParams(rescore=True))
        found = self._call(
            "search",
            lambda: self._client.query_points(
                target,
                query=vector,
                query_filter=condition,
                limit=limit,
                score_threshold=score_threshold,
                search_params=None if self._wire == "local" else rescored,
                timeout=self._server_seconds,
            ),
        )
        return list(found.points)

    @property
    def _server_seconds(self) -> int:
        """The limit of one call, for the server: its own is 60 s unless a request says another."""
        return math.ceil(self._timeout_seconds)

    def _page(
        self,
        condition: Any,  # noqa: ANN401 - the engine's own filter
        size: int,
        offset: Any,  # noqa: ANN401 - the engine's own point id
        *,
        payload: bool | Sequence[str],
        vectors: bool,
    ) -> tuple[Sequence[Any], Any]:
        _, target = self._open("read points")
        fields = payload if isinstance(payload, bool) else list(payload)
        if self._wire == "local":
            return self._call(
                "read points",
                lambda: self._client.scroll(
                    target, condition, limit=size, offset=offset, with_payload=fields, with_vectors=vectors
                ),
            )
        from qdrant_client import grpc
        from qdrant_client.conversions.conversion import RestToGrpc

        request = grpc.ScrollPoints(
            collection_name=target,
            filter=condition and RestToGrpc.convert_filter(condition),
            offset=offset,
            limit=size,
            with_payload=RestToGrpc.convert_with_payload_interface(fields),
            with_vectors=grpc.WithVectorsSelector(enable=vectors),
            timeout=self._server_seconds,
        )
        scroll = functools.partial(self._client.grpc_points.Scroll, request, timeout=self._timeout_seconds)
        found = self._call("read points", scroll)
        return found.result, found.next_page_offset if found.HasField("next_page_offset") else None

    # What a page of messages holds is taken out of them directly: the client's own records cost four times as much.

    def _ids(self, page: Sequence[Any]) -> list[str]:
        if self._wire == "local":
            return super()._ids(page)
        return [point.id.uuid or str(point.id.num) for point in page]

    def _payloads(self, page: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
        if self._wire == "local":
            return super()._payloads(page)
        from qdrant_client.conversions.conversion import value_to_json

        return ({key: value_to_json(value) for key, value in point.payload.items()} for point in page)

    def _vectors(self, page: Sequence[Any]) -> np.ndarray:
        """A serialized vector ends with its floats; an older server has none but those."""
        if self._wire == "local":
            return super()._vectors(page)
        dim = self._open("read points")[0].dim
        messages = [point.vectors.vector for point in page]
        parts = [item.dense if item.HasField("dense") else item for item in messages]
        return as_rows([part.SerializeToString()[-4 * dim :] for part in parts], dim)


def _prepare_upsert(
    client: QdrantClient, target: str, batch: PointBatch, *, wire: Wire, timeout_seconds: float
) -> Callable[[], models.UpdateResult]:
    """A call that writes the batch and waits until it is applied; it can be repeated without encoding again."""
    if wire == "local":
        from qdrant_client import models

        points = [
            models.PointStruct(id=point_id, vector=vector, payload=dict(payload))
            for point_id, vector, payload in zip(batch.ids, batch.vectors.tolist(), batch.payloads, strict=True)
        ]
        return lambda: client.upsert(target, points, wait=True)
    from qdrant_client.conversions.conversion import GrpcToRest

    request = _grpc_request(target, batch)
    return lambda: GrpcToRest.convert_update_result(client.grpc_points.Upsert(request, timeout=timeout_seconds).result)


def _grpc_request(target: str, batch: PointBatch) -> Any:  # noqa: ANN401 - a generated class
    """The points as one gRPC message.

    They are made in their place, which saves a copy, and out of bytes: those of a vector go in as they are, those of
    a payload's entry are made once for all points that share it. A third of what Python floats and values cost.
    """
    from qdrant_client import grpc

    request = grpc.UpsertPoints(collection_name=target, wait=True)
    prefix = _vector_prefix(batch.dim)
    rows = np.ascontiguousarray(batch.vectors, dtype="<f4")
    for point_id, row, payload in zip(batch.ids, rows, batch.payloads, strict=True):
        point = request.points.add()
        point.id.uuid = point_id
        point.MergeFromString(b"".join([_entry(key, value) for key, value in payload.items()]))
        point.vectors.vector.dense.MergeFromString(prefix + row.tobytes())
    return request


def _entry(key: str, value: object) -> bytes:
    """An entry of a point's payload, serialized."""
    try:
        return _known_entry(key, value)
    except TypeError:  # a list or an object can't be looked up
        return _known_entry.__wrapped__(key, value)


@functools.lru_cache(maxsize=4096, typed=True)  # typed: 1, 1.0 and true are equal, and not the same in JSON
def _known_entry(key: str, value: object) -> bytes:
    from qdrant_client import grpc
    from qdrant_client.conversions.conversion import json_to_value

    return bytes(grpc.PointStruct(payload={key: json_to_value(value)}).SerializeToString())


@functools.cache
def _vector_prefix(dim: int) -> bytes:
    """What stands before the floats in a serialized vector of this length."""
    from qdrant_client import grpc

    message = grpc.DenseVector(data=[0.0] * dim)
    return bytes(message.SerializeToString()[: -4 * dim])
