"""The store on a Qdrant server, through qdrant-client over gRPC.

The collection's name is an alias: `video_frames` stands for `video_frames-<fingerprint>`, so that another model's
collection can be loaded beside it and take over in one step. The client's own retries are weak (they give up within
a second, or never) and are not used; ours repeat what may pass and are safe because every write is idempotent.
"""

from __future__ import annotations

import functools
import logging
import math
import urllib.parse
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from extraction_dagster.errors.index import (
    CollectionMissingError,
    CollectionUnnamedError,
    StoreLimitError,
    StoreNotOpenError,
    StoreRefusedError,
)
from extraction_dagster.stages.index.points import Dialect, PointBatch
from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore, as_rows
from extraction_dagster.stages.index.server.collections import ServerCollections
from extraction_dagster.stages.index.server.limits import ServerLimits, halves
from extraction_dagster.stages.index.server.messages import Wire, prepare_upsert
from extraction_dagster.stages.index.server.retry import RetryPolicy, require_completed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from qdrant_client import QdrantClient, models

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.index.points import PointFilter

_Result = TypeVar("_Result")
# gRPC waits up to 120 s between attempts to connect, for each address and process: a server that is back is used
# at once. An attempt itself, with TLS, may take 5 s.
_GRPC_OPTIONS = {
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.min_reconnect_backoff_ms": 5000,
    "grpc.max_reconnect_backoff_ms": 1000,
}
_IDS_PER_PAGE = 4096
_NOBODY = str(uuid.UUID(int=0))  # no point has it: ours are of version 5
_log = logging.getLogger(__name__)


class ServerStore(PointStore):
    """The store on a Qdrant server.

    Args:
        client: Connected, or on its local engine; it is closed with the store.
        where: The address that is asked, for messages.
        wire: `local` for the client's local engine, which takes no gRPC messages.
        timeout_seconds: Limit for one call.
        retry: How calls are repeated.
        source: The identity of the source table whose points it keeps; any when it is empty.
    """

    def __init__(  # noqa: PLR0913 - how it is reached, and whose points it keeps
        self,
        client: QdrantClient,
        *,
        where: str,
        wire: Wire = "grpc",
        timeout_seconds: float = 60.0,
        retry: RetryPolicy | None = None,
        source: str = "",
    ) -> None:
        self._client = client
        self.where = where
        self._wire = wire
        self._timeout_seconds = timeout_seconds
        self._limits = ServerLimits()
        self._retry = retry or RetryPolicy()
        self._source = source
        self._collections = ServerCollections(client, where, self._call, math.ceil(timeout_seconds))
        self._spec: CollectionSpec | None = None
        self._target = ""

    @classmethod
    def connect(cls, settings: Settings, *, retry: RetryPolicy | None = None, source: str = "") -> Self:
        """Make a client from the settings; nothing is sent before a collection is opened."""
        from qdrant_client import QdrantClient

        url, key = settings.qdrant_url or "", settings.qdrant_api_key
        address, port = urllib.parse.urlsplit(url), settings.qdrant_grpc_port
        where = f"{address.hostname}:{port} (gRPC)"
        if address.path.strip("/"):
            _log.warning("gRPC ignores the path %r of EXTRACTION_QDRANT_URL: %s is asked", address.path, where)
        client = QdrantClient(
            url=url,
            grpc_port=port,
            prefer_grpc=True,
            api_key=key.get_secret_value() if key else None,
            timeout=math.ceil(settings.qdrant_timeout_seconds),
            check_compatibility=False,
            pool_size=1,
            grpc_options=dict(_GRPC_OPTIONS),
        )
        retry = retry or RetryPolicy(budget_seconds=settings.qdrant_retry_seconds)
        return cls(client, where=where, timeout_seconds=settings.qdrant_timeout_seconds, retry=retry, source=source)

    def __repr__(self) -> str:
        """The server; never the key."""
        return f"ServerStore({self.where!r})"

    @property
    def target(self) -> str:
        """The open collection's own name."""
        return self._open("name a collection")[1]

    def ask(self, operation: str, function: Callable[[QdrantClient], _Result]) -> _Result:
        """Make a call of the client's, and repeat it as all others."""
        return self._call(operation, lambda: function(self._client))

    def ensure_collection(self, spec: CollectionSpec, *, staged: bool = False) -> None:
        """Open the collection, and create it when there is none."""
        current = self._collections.behind(spec.name)
        target = spec.full_name if staged else current or spec.full_name
        if current is None:
            self._collections.require_new(spec.name)
        elif current != target:
            self._require_own(self._collections.spec(current, spec.name))
        found, info = self._collections.ensure(target, replace(spec, source=self._source), self._require_own)
        self._use(found, target, info)
        self._claim()
        if current is None and not staged:
            current = self._collections.behind(spec.name)
            if current not in {None, target}:  # a run with another model was first
                spec.require_same_vectors(self._collections.spec(current, spec.name), self.where)
            self._collections.publish(spec.name, target, current)

    def open_collection(self, name: str, *, fingerprint: str | None = None) -> CollectionSpec:
        """Open the collection in use, or another of that name."""
        target = self._collections.behind(name) if fingerprint is None else f"{name}-{fingerprint}"
        if target is None and (there := self._collections.unnamed(name)):
            raise CollectionUnnamedError(name, self.where, there=there)
        if target is None or (fingerprint is not None and not self._collections.is_under(target, name)):
            raise CollectionMissingError(target or name, self.where)
        info = self._collections.info(target)
        found = self._collections.spec(target, name, info)
        self._require_own(found)
        self._use(found, target, info)
        return found

    def require_writable(self, name: str, fingerprint: str) -> None:
        """See, before any work, that points of this fingerprint will be taken: rights, vectors, a disk with room.

        Raises:
            PointStoreError: They won't; it says why.
        """
        current, own = self._collections.behind(name), f"{name}-{fingerprint}"
        target = own if self._collections.is_under(own, name) else current
        if current is None:
            self._collections.require_new(name)
        if target is None:
            self._collections.require_right_to_create(name)
            return
        info = self._collections.info(target)
        found, self._limits = self._collections.spec(target, name, info), ServerLimits.of(info.config)
        self._require_own(found)
        replace(found, fingerprint=fingerprint).require_same_vectors(found, self.where)
        self._collections.holds_points(target)
        self._remove_from(target, self._dialect.models.PointIdsList(points=[_NOBODY]))

    def publish(self) -> None:
        """Make the open collection the one in use, in one step on the server."""
        spec, target = self._open("publish a collection")
        current = self._collections.behind(spec.name)
        if current is not None and current not in {target, spec.name}:
            self._require_own(self._collections.spec(current, spec.name))
        self._claim()
        self._collections.publish(spec.name, target, current)

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

    def _use(self, spec: CollectionSpec, target: str, info: Any) -> None:  # noqa: ANN401 - the client's own record
        self._spec, self._target, self._limits = spec, target, ServerLimits.of(info.config)

    @property
    def _server_seconds(self) -> int:
        """Sent with each request: a server gives up after 60 s otherwise."""
        return self._limits.at_most(math.ceil(self._timeout_seconds))

    def _call(self, operation: str, function: Callable[[], _Result]) -> _Result:
        return self._retry.call(operation, self.where, function)

    def _open(self, operation: str) -> tuple[CollectionSpec, str]:
        if self._spec is None:
            raise StoreNotOpenError(operation, self.where)
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

    def delete(self, filters: PointFilter) -> None:
        """Remove points of named records, and return once they are gone."""
        self._in_parts(filters, super().delete)

    def count(self, filters: PointFilter | None = None) -> int:
        """The exact number of points."""
        if not self._limits.exact:  # the server refuses exact counts: the ids are read
            return sum(map(len, self._pages(filters, _IDS_PER_PAGE)))
        return sum(self._in_parts(filters, super().count))

    def _pages(self, filters: PointFilter | None, size: int, **wanted: Any) -> Iterator[Any]:  # noqa: ANN401 - as above
        for part in self._limits.parts(filters):
            yield from super()._pages(part, min(size, self._limits.page or size), **wanted)

    def _in_parts(self, filters: PointFilter | None, do: Callable[[Any], _Result]) -> list[_Result]:
        """Do something with points in as many calls as the server's limits make necessary."""
        left, done = self._limits.parts(filters), []
        while left:
            part = left.pop(0)
            try:
                done.append(do(part))
            except StoreLimitError as error:
                smaller = halves(part) if error.may_split else []
                if not smaller:
                    raise
                left[:0] = smaller
        return done

    def _write(self, batch: PointBatch) -> None:
        left = list(_cut(batch, self._limits.points))
        while left:
            part = left.pop(0)
            try:
                self._write_part(part)
            except StoreLimitError as error:
                if not error.may_split or len(part) == 1:
                    raise
                left[:0] = _cut(part, -(-len(part) // 2))

    def _write_part(self, batch: PointBatch) -> None:
        _, target = self._open("write points")
        try:
            upsert = prepare_upsert(self._client, target, batch, wire=self._wire, timeout_seconds=self._server_seconds)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:  # it can't even be sent
            said = f"{type(error).__name__}: {error}"
            raise StoreRefusedError("write points", self.where, said, may_be_content=True) from error
        self._call("write points", lambda: require_completed(upsert))

    def _set_payload(self, values: dict[str, Any], condition: Any) -> None:  # noqa: ANN401 - the engine's own filter
        _, target = self._open("set a payload")
        seconds = self._server_seconds

        def write() -> models.UpdateResult:
            return self._client.set_payload(target, payload=values, points=condition, wait=True, timeout=seconds)

        self._call("set a payload", lambda: require_completed(write))

    def _remove(self, condition: Any) -> None:  # noqa: ANN401 - the engine's own filter
        _, target = self._open("remove points")
        self._remove_from(target, condition)

    def _remove_from(self, target: str, selector: Any) -> None:  # noqa: ANN401 - the engine's own selector
        def delete() -> models.UpdateResult:
            return self._client.delete(target, selector, wait=True, timeout=self._server_seconds)

        self._call("remove points", lambda: require_completed(delete))

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


def _cut(batch: PointBatch, size: int) -> Iterator[PointBatch]:
    for start in range(0, len(batch), size):
        part = slice(start, start + size)
        yield PointBatch(batch.ids[part], batch.vectors[part], batch.payloads[part])
