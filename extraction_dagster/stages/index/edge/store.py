"""The embedded store: the Qdrant Edge engine in this process, at a folder.

One process holds it at a time. Acknowledged writes survive kill -9 through the engine's write-ahead log, which is
therefore never switched off (that would drop the engine's lock as well); `flush` makes them safe from a power cut.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from extraction_dagster.errors.index import (
    CollectionMissingError,
    StoreBusyError,
    StoreEngineError,
    StoreNotOpenError,
    StoreUnreadableError,
)
from extraction_dagster.stages.index.edge.collection_folder import EdgeFiles
from extraction_dagster.stages.index.points import Dialect
from extraction_dagster.stages.index.protocol import PAYLOAD_INDEXES, CollectionSpec, PointStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import qdrant_edge

    from extraction_dagster.stages.index.points import PointBatch


class EdgeStore(PointStore):
    """The store on the embedded engine. Nothing is created or held before a collection is opened.

    Args:
        home: The folder under which collections lie.
        wait_seconds: How long to wait for another process to release it.
        source: The identity of the source table whose points it keeps; any when it is empty.
    """

    def __init__(self, home: Path, *, wait_seconds: float = 0.0, source: str = "") -> None:
        self._home = home
        self._wait_seconds = wait_seconds
        self._source = source
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
            if current is not None:
                self._require_own(files.spec(current))
            if current is not None and not staged:
                spec.require_same_vectors(files.spec(current), str(files.folder))
            elif not files.exists(spec.fingerprint):
                own = replace(spec, source=self._source)
                files.create(own, functools.partial(_create, spec=own))
            self._load(files, spec.fingerprint)
            spec.require_same_vectors(files.spec(spec.fingerprint), str(files.folder))
            self._claim()
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
        spec, files, _ = self._open("publish a collection")
        if files.current is not None:
            self._require_own(files.spec(files.current))
        self._claim()
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
            self._require_own(files.spec(fingerprint))
            files.drop(fingerprint)
        finally:
            if not held:
                files.release()

    def optimize(self) -> None:
        """Free the disk space of removed points and build the vector index."""
        _, _, engine = self._open("optimize")
        with self._engine_errors("optimize"):
            engine.optimize()

    def flush(self) -> None:
        """Make every write safe from a power cut."""
        _, _, engine = self._open("flush")
        with self._engine_errors("flush"):
            engine.flush()

    def close(self) -> None:
        """Release the store; it can be opened again."""
        try:
            self._unload()
        finally:
            if self._files is not None:
                self._files.release()
            self._files = None

    @contextlib.contextmanager
    def _opening(self, name: str) -> Iterator[EdgeFiles]:
        """Lock the folder of a name; unlock it again when opening fails."""
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
        spec = files.spec(fingerprint)
        self._require_own(spec)
        path = files.shard(fingerprint)
        try:
            self._engine = edge.EdgeShard.load(str(path))
        except Exception as error:
            if "WouldBlock" in str(error):
                raise StoreBusyError(str(path), "another process") from error
            raise StoreUnreadableError(str(path), str(error)) from error
        self._spec = spec

    def _unload(self) -> None:
        engine, self._engine, self._spec = self._engine, None, None
        if engine is not None:
            engine.close()

    def _open(self, operation: str) -> tuple[CollectionSpec, EdgeFiles, qdrant_edge.EdgeShard]:
        if self._files is None or self._spec is None or self._engine is None:
            raise StoreNotOpenError(operation, str(self._home))
        return self._spec, self._files, self._engine

    @functools.cached_property
    def _dialect(self) -> Dialect:
        import qdrant_edge as edge

        return Dialect(
            edge,
            number_range=edge.RangeFloat,
            datetime_range=edge.RangeDateTime,
            has_ids=lambda ids: edge.HasIdCondition({UUID(point_id) for point_id in ids}),
        )

    def _note_source(self, source: str) -> bool:
        spec, files, _ = self._open("claim a collection")
        files.claim(spec.fingerprint, source)
        self._spec = replace(spec, source=source)
        return True

    def _write(self, batch: PointBatch) -> None:
        """The engine applies a write before it returns."""
        import qdrant_edge as edge

        _, _, engine = self._open("write points")
        with self._engine_errors("write points"):
            points = [
                edge.Point(point_id, vector, dict(payload))
                for point_id, vector, payload in zip(batch.ids, batch.vectors.tolist(), batch.payloads, strict=True)
            ]
            engine.update(edge.UpdateOperation.upsert_points(points))

    def _set_payload(self, values: dict[str, Any], condition: Any) -> None:  # noqa: ANN401 - the engine's own filter
        import qdrant_edge as edge

        _, _, engine = self._open("set a payload")
        with self._engine_errors("set a payload"):
            engine.update(edge.UpdateOperation.set_payload_by_filter(condition, values))

    def _remove(self, condition: Any) -> None:  # noqa: ANN401 - the engine's own filter
        import qdrant_edge as edge

        _, _, engine = self._open("remove points")
        with self._engine_errors("remove points"):
            engine.update(edge.UpdateOperation.delete_points_by_filter(condition))

    def _count(self, condition: Any) -> int:  # noqa: ANN401
        import qdrant_edge as edge

        _, _, engine = self._open("count points")
        with self._engine_errors("count points"):
            return engine.count(edge.CountRequest(exact=True, filter=condition))

    def _nearest(self, vector: list[float], limit: int, condition: Any, score_threshold: float | None) -> list[Any]:  # noqa: ANN401
        import qdrant_edge as edge

        _, _, engine = self._open("search")
        request = edge.QueryRequest(
            limit=limit,
            query=edge.Query.Nearest(vector),
            filter=condition,
            score_threshold=score_threshold,
            with_payload=True,
            params=edge.SearchParams(quantization=edge.QuantizationSearchParams(rescore=True)),
        )
        with self._engine_errors("search"):
            return engine.query(request)

    def _page(
        self,
        condition: Any,  # noqa: ANN401 - the engine's own filter
        size: int,
        offset: Any,  # noqa: ANN401 - the engine's own point id
        *,
        payload: bool | Sequence[str],
        vectors: bool,
    ) -> tuple[Sequence[Any], Any]:
        import qdrant_edge as edge

        _, _, engine = self._open("read points")
        fields = payload if isinstance(payload, bool) else edge.PayloadSelector.Include(list(payload))
        request = edge.ScrollRequest(
            offset=offset, limit=size, filter=condition, with_payload=fields, with_vector=vectors
        )
        with self._engine_errors("read points"):
            return engine.scroll(request)

    @contextlib.contextmanager
    def _engine_errors(self, operation: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            is_write = operation == "write points"
            raise StoreEngineError(operation, str(self._home), str(error), may_be_content=is_write) from error


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
