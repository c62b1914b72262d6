"""The embedded store: the Qdrant Edge engine in this process, at a folder.

One process holds it at a time. Acknowledged writes survive kill -9 through the engine's write-ahead log, which is
therefore never switched off (that would drop the engine's lock as well); `flush` makes them safe from a power cut.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Self, cast
from uuid import UUID

import numpy as np

from extraction_dagster.errors.base import RecordShapeError
from extraction_dagster.errors.index import (
    CollectionMismatchError,
    CollectionMissingError,
    StoreBusyError,
    StoreEngineError,
    StoreNotOpenError,
    StoreUnreadableError,
)
from extraction_dagster.stages.index.edge.files import EdgeFiles
from extraction_dagster.stages.index.filters import Dialect, PointFilter, translate
from extraction_dagster.stages.index.points import PointBatch
from extraction_dagster.stages.index.protocol import (
    MAX_BYTES_PER_CALL,
    MAX_POINTS_PER_CALL,
    PAYLOAD_INDEXES,
    CollectionSpec,
    Hit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    import qdrant_edge

_PAGE = 4096


class EdgeStore:
    """A `PointStore` on the embedded engine; see `PointStore` for what each method promises."""

    def __init__(self, home: Path, *, wait_seconds: float = 0.0) -> None:
        """Name the folder under which collections lie; nothing is created or held before one is opened.

        Args:
            home: The folder.
            wait_seconds: How long to wait for another process to let go of it.
        """
        self._home = home
        self._wait_seconds = wait_seconds
        self._files: EdgeFiles | None = None
        self._spec: CollectionSpec | None = None
        self._engine: qdrant_edge.EdgeShard | None = None

    def __repr__(self) -> str:
        """The folder."""
        return f"EdgeStore({str(self._home)!r})"

    def ensure_collection(self, spec: CollectionSpec, *, staged: bool = False) -> None:
        """Open the collection, and create it when there is none."""
        with self._opening(spec.name) as files:
            current = files.current
            if current is not None and not staged:
                found = files.spec(current)
                _refuse_other_vectors(found, spec, str(files.folder))
            elif not files.exists(spec.fingerprint):
                files.create(spec, functools.partial(_create, spec=spec))
            self._load(files, spec.fingerprint)
            _refuse_other_vectors(files.spec(spec.fingerprint), spec, str(files.folder))
            if current is None and not staged:
                files.publish(spec.fingerprint)

    def open_collection(self, name: str, *, fingerprint: str | None = None) -> CollectionSpec:
        """Open the collection in use, or another of that name."""
        if not (self._home / name).is_dir():  # looking must not create anything
            raise CollectionMissingError(name, str(self._home))
        with self._opening(name) as files:
            chosen = fingerprint or files.current
            if chosen is None or not files.exists(chosen):
                raise CollectionMissingError(f"{name}-{fingerprint}" if fingerprint else name, str(self._home))
            self._load(files, chosen)
            return files.spec(chosen)

    def publish(self) -> None:
        """Make the open collection the one in use."""
        files, spec, _ = self._open("publish a collection")
        self.flush()
        files.publish(spec.fingerprint)

    def collections(self, name: str) -> dict[str, bool]:
        """The fingerprints under a name, and whether each is in use."""
        files = EdgeFiles(self._home / name)
        return {fingerprint: fingerprint == files.current for fingerprint in files.fingerprints()}

    def drop(self, name: str, fingerprint: str) -> None:
        """Remove a collection that is not in use."""
        if self._spec is not None and (self._spec.name, self._spec.fingerprint) == (name, fingerprint):
            self.close()
        files = self._files or EdgeFiles(self._home / name)
        held = self._files is not None
        if fingerprint not in files.fingerprints():
            raise CollectionMissingError(name=f"{name}-{fingerprint}", where=str(self._home))
        files.acquire()
        try:
            files.drop(fingerprint)
        finally:
            if not held:
                files.release()

    def upsert(self, batch: PointBatch) -> None:
        """Write points; the engine applies them before it returns."""
        import qdrant_edge as edge

        _, spec, engine = self._open("write points")
        if batch.dim != spec.dim and len(batch):
            raise RecordShapeError(
                record="PointBatch", why=f"collection {spec.name!r} takes dim {spec.dim}", shapes=f"dim {batch.dim}"
            )
        for chunk in batch.chunks(max_points=MAX_POINTS_PER_CALL, max_bytes=MAX_BYTES_PER_CALL):
            points = [
                edge.Point(point_id, vector, dict(payload))
                for point_id, vector, payload in zip(chunk.ids, chunk.vectors.tolist(), chunk.payloads, strict=True)
            ]
            with self._engine_errors("write points"):
                engine.update(edge.UpdateOperation.upsert_points(points))

    def count(self, filters: PointFilter | None = None) -> int:
        """The exact number of points."""
        import qdrant_edge as edge

        _, _, engine = self._open("count points")
        with self._engine_errors("count points"):
            return engine.count(edge.CountRequest(exact=True, filter=translate(filters, _dialect())))

    def count_by_record(self, filters: PointFilter | None = None) -> dict[int, int]:
        """The exact number of points of each record that has any."""
        import qdrant_edge as edge

        _, _, engine = self._open("count points")
        limit = _PAGE
        while True:
            request = edge.FacetRequest("record_id", limit=limit, exact=True, filter=translate(filters, _dialect()))
            with self._engine_errors("count points"):
                hits = engine.facet(request).hits
            if len(hits) < limit:
                return {int(hit.value): hit.count for hit in hits}
            limit *= 8

    def delete(self, filters: PointFilter) -> None:
        """Remove points; the engine applies it before it returns."""
        import qdrant_edge as edge

        _, _, engine = self._open("remove points")
        if not filters.names_points:
            raise RecordShapeError(
                record="PointFilter", why="removing needs records or points by name", shapes=repr(filters)
            )
        with self._engine_errors("remove points"):
            condition = translate(filters, _dialect())
            engine.update(edge.UpdateOperation.delete_points_by_filter(cast("edge.Filter", condition)))

    def search(
        self,
        vector: np.ndarray,
        *,
        limit: int,
        filters: PointFilter | None = None,
        score_threshold: float | None = None,
    ) -> list[Hit]:
        """The points nearest to a vector."""
        import qdrant_edge as edge

        _, _, engine = self._open("search")
        request = edge.QueryRequest(
            limit=limit,
            query=edge.Query.Nearest(vector.astype(np.float32).tolist()),
            filter=translate(filters, _dialect()),
            score_threshold=score_threshold,
            with_payload=True,
        )
        with self._engine_errors("search"):
            found = engine.query(request)
        return sorted((Hit.from_payload(hit.payload or {}, hit.score) for hit in found), key=lambda hit: hit.order)

    def point_ids(self, filters: PointFilter | None = None) -> set[str]:
        """The ids of the points."""
        return {str(record.id) for page in self._pages(filters, _PAGE, content=False) for record in page}

    def read(
        self, filters: PointFilter | None = None, *, batch_size: int = MAX_POINTS_PER_CALL
    ) -> Iterator[PointBatch]:
        """The points themselves, in the order of their ids."""
        for page in self._pages(filters, batch_size, content=True):
            yield PointBatch(
                ids=tuple(str(record.id) for record in page),
                vectors=np.asarray([record.vector for record in page], dtype=np.float32),
                payloads=tuple(record.payload or {} for record in page),
            )

    def optimize(self) -> None:
        """Give back the room of removed points and build the vector index."""
        _, _, engine = self._open("optimize")
        with self._engine_errors("optimize"):
            engine.optimize()

    def flush(self) -> None:
        """Make every write safe from a power cut."""
        _, _, engine = self._open("flush")
        with self._engine_errors("flush"):
            engine.flush()

    def close(self) -> None:
        """Let go of the store; it can be opened again."""
        try:
            self._unload()
        finally:
            if self._files is not None:
                self._files.release()
            self._files = None

    def __enter__(self) -> Self:
        """The store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the store."""
        self.close()

    @contextlib.contextmanager
    def _opening(self, name: str) -> Iterator[EdgeFiles]:
        """Hold the folder of a name; let go of it again when opening fails."""
        if self._files is None or self._files.folder.name != name:
            self.close()
            self._files = EdgeFiles(self._home / name)
        try:
            self._files.acquire(wait_seconds=self._wait_seconds)
            yield self._files
        except BaseException:
            self.close()
            raise

    def _load(self, files: EdgeFiles, fingerprint: str) -> None:
        import qdrant_edge as edge

        if self._spec is not None and self._spec.fingerprint == fingerprint:
            return
        self._unload()
        path = files.shard(fingerprint)
        try:
            self._engine = edge.EdgeShard.load(str(path))
        except Exception as error:
            if "WouldBlock" in str(error):
                raise StoreBusyError(str(path), "another process") from error
            raise StoreUnreadableError(str(path), str(error)) from error
        self._spec = files.spec(fingerprint)

    def _unload(self) -> None:
        engine, self._engine, self._spec = self._engine, None, None
        if engine is not None:
            engine.close()

    def _open(self, operation: str) -> tuple[EdgeFiles, CollectionSpec, qdrant_edge.EdgeShard]:
        if self._files is None or self._spec is None or self._engine is None:
            raise StoreNotOpenError(operation, str(self._home))
        return self._files, self._spec, self._engine

    @contextlib.contextmanager
    def _engine_errors(self, operation: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise StoreEngineError(operation, str(self._home), str(error)) from error

    def _pages(self, filters: PointFilter | None, size: int, *, content: bool) -> Iterator[list[Any]]:
        import qdrant_edge as edge

        _, _, engine = self._open("read points")
        offset: Any = None
        while True:
            request = edge.ScrollRequest(
                offset=offset,
                limit=size,
                filter=translate(filters, _dialect()),
                with_payload=content,
                with_vector=content,
            )
            with self._engine_errors("read points"):
                page, offset = engine.scroll(request)
            if page:
                yield page
            if offset is None:
                return


def _refuse_other_vectors(found: CollectionSpec, spec: CollectionSpec, where: str) -> None:
    if (found.dim, found.fingerprint) != (spec.dim, spec.fingerprint):
        raise CollectionMismatchError(spec.name, where, got=found.vectors, expected=spec.vectors)


def _create(path: Path, *, spec: CollectionSpec) -> None:
    import qdrant_edge as edge

    datatype = {"float16": edge.VectorStorageDatatype.Float16, "float32": edge.VectorStorageDatatype.Float32}
    kinds = {
        "integer": edge.PayloadSchemaType.Integer,
        "keyword": edge.PayloadSchemaType.Keyword,
        "datetime": edge.PayloadSchemaType.Datetime,
    }
    int8 = edge.ScalarQuantizationConfig(edge.ScalarType.Int8, quantile=0.99, memory=edge.Memory.Cached)
    vectors = edge.EdgeVectorParams(
        size=spec.dim,
        distance=edge.Distance.Cosine,
        datatype=datatype[spec.vector_dtype],
        memory=edge.Memory.Cold if spec.on_disk else None,
        quantization_config=int8 if spec.quantization == "scalar" else None,
    )
    shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors=vectors))
    for field, kind in PAYLOAD_INDEXES.items():
        shard.update(edge.UpdateOperation.create_field_index(field, kinds[kind]))
    shard.flush()
    shard.close()


@functools.cache
def _dialect() -> Dialect:
    import qdrant_edge as edge

    return Dialect(
        filter=edge.Filter,
        field=edge.FieldCondition,
        match_any=edge.MatchAny,
        match_value=edge.MatchValue,
        number_range=edge.RangeFloat,
        datetime_range=edge.RangeDateTime,
        has_ids=lambda ids: edge.HasIdCondition({UUID(point_id) for point_id in ids}),
    )
