"""The store of points: what the project asks of an engine, and the records that both sides exchange."""

from __future__ import annotations

import abc
import logging
import re
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from extraction_dagster.errors import RecordShapeError
from extraction_dagster.errors.index import CollectionMismatchError, ForeignCollectionError
from extraction_dagster.stages.index.points import PointBatch, translate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.index.points import Dialect, PointFilter

_A_LITTLE = 1e-5  # of a cosine: more than the rounding of single precision
_log = logging.getLogger(__name__)
VectorDtype = Literal["float16", "float32"]
Quantization = Literal["none", "scalar"]
# Created before the first point, so that every filter of this project uses an index (a strict server refuses others).
# The types are Qdrant's own names.
PAYLOAD_INDEXES = {"record_id": "integer", "generation": "keyword", "platform": "keyword", "created_at": "datetime"}
MAX_POINTS_PER_CALL = 256
_MAX_BYTES_PER_CALL = 4_500_000
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """What a collection holds.

    Attributes:
        name: The name by which it is asked for.
        dim: Length of each vector.
        fingerprint: The embedding's fingerprint; vectors of two fingerprints can't be compared.
        vector_dtype: How the engine keeps vectors.
        quantization: `scalar` for a copy in int8 beside them, which is searched first and takes a quarter of float32.
        on_disk: Whether vectors are read from disk rather than kept in memory.
        source: The identity of the source table whose points it holds; empty where nobody has said so yet.

    The three before the last say how a collection is created; one that is there keeps what it has.
    """

    name: str
    dim: int
    fingerprint: str
    vector_dtype: VectorDtype = "float16"
    quantization: Quantization = "none"
    on_disk: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse what could not be a folder's or a collection's name."""
        shown = f"name {self.name!r}, dim {self.dim!r}, fingerprint {self.fingerprint!r}"
        if not all(re.fullmatch(r"[A-Za-z0-9_-]{1,200}", part, re.ASCII) for part in (self.name, self.fingerprint)):
            raise RecordShapeError(record="CollectionSpec", why="names are letters, digits, '_' and '-'", shapes=shown)
        if self.dim < 1:
            raise RecordShapeError(record="CollectionSpec", why="dim must be at least 1", shapes=shown)

    @classmethod
    def of(cls, settings: Settings, *, dim: int, fingerprint: str) -> CollectionSpec:
        """The collection that the settings ask for."""
        return cls(
            settings.collection_name,
            dim,
            fingerprint,
            quantization=settings.quantization,
            on_disk=settings.vectors_on_disk,
        )

    @property
    def full_name(self) -> str:
        """The collection's own name, for which `name` is an alias: `video_frames-<fingerprint>`."""
        return f"{self.name}-{self.fingerprint}"

    def require_same_vectors(self, found: CollectionSpec, where: str) -> None:
        """Refuse a collection whose vectors can't be compared with those of this one.

        Raises:
            CollectionMismatchError: It holds vectors of another length or fingerprint.
        """
        if (found.dim, found.fingerprint) != (self.dim, self.fingerprint):
            got, expected = (f"dim {spec.dim}, fingerprint {spec.fingerprint}" for spec in (found, self))
            raise CollectionMismatchError(self.name, where, got=got, expected=expected)


@dataclass(frozen=True, slots=True)
class Hit:
    """A frame that a search found.

    Attributes:
        record_id: The row's id.
        frame_number: The frame's index in the video's display order.
        frame_second: When the frame is shown.
        score: Cosine; 1 is the same picture, up to rounding.
        platform: Where the video comes from.
        video_code: The video's code on its platform.
        path: Where the file lies.
    """

    record_id: int
    frame_number: int
    frame_second: float
    score: float
    platform: str | None
    video_code: str | None
    path: str

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any], score: float) -> Hit:
        """Read a point's payload."""
        return cls(
            record_id=int(payload["record_id"]),
            frame_number=int(payload["frame_number"]),
            frame_second=float(payload["frame_second"]),
            score=score,
            platform=payload["platform"],
            video_code=payload["video_code"],
            path=str(payload["path"]),
        )

    @property
    def order(self) -> tuple[float, int, int]:
        """Best first; equal scores by record, then frame."""
        return (-self.score, self.record_id, self.frame_number)


class PointStore(abc.ABC):
    """A store of points with one collection open. Every write has been applied when its call returns.

    With the identity of a source table, a collection of another source is refused before anything in it is read or
    written, and the first writer of one that nobody has claimed claims it. Without, every collection is taken.

    What is the same for every engine is written here; an engine adds the abstract methods. Those that begin with an
    underscore get filters as the engine's own, translated through its `_dialect`.
    """

    _source: str = ""

    @abc.abstractmethod
    def ensure_collection(self, spec: CollectionSpec, *, staged: bool = False) -> None:
        """Open the collection, and create it with its payload indexes when there is none.

        Args:
            spec: What it must hold.
            staged: Open the collection of this fingerprint beside the one in use, which searches go on using until
                `publish` is called.

        Raises:
            ForeignCollectionError: The one in use holds points of another source table.
            CollectionMismatchError: The one in use holds other vectors.
            StoreBusyError: Another process holds the embedded store.
        """

    @abc.abstractmethod
    def open_collection(self, name: str, *, fingerprint: str | None = None) -> CollectionSpec:
        """Open a collection with any vectors, and say what it holds.

        Args:
            name: The name by which it is asked for.
            fingerprint: Which of those under the name; the one in use when None.

        Raises:
            CollectionMissingError: There is none.
            ForeignCollectionError: It holds points of another source table.
        """

    @abc.abstractmethod
    def publish(self) -> None:
        """Make the open collection the one in use."""

    @abc.abstractmethod
    def collections(self, name: str) -> Mapping[str, bool]:
        """The fingerprints loaded under a name, and whether each is the one in use."""

    @abc.abstractmethod
    def drop(self, name: str, fingerprint: str) -> None:
        """Remove a collection that is not in use.

        Raises:
            CollectionInUseError: It is in use.
            CollectionMissingError: There is none.
            ForeignCollectionError: It holds points of another source table.
        """

    def upsert(self, batch: PointBatch) -> None:
        """Write points, and return once they are applied."""
        spec: CollectionSpec = self._open("write points")[0]
        if batch.dim != spec.dim and len(batch):
            why = f"collection {spec.name!r} takes dim {spec.dim}"
            raise RecordShapeError(record="PointBatch", why=why, shapes=f"dim {batch.dim}")
        self._claim()
        for chunk in batch.chunks(max_points=MAX_POINTS_PER_CALL, max_bytes=_MAX_BYTES_PER_CALL):
            self._write(chunk)

    def delete(self, filters: PointFilter) -> None:
        """Remove points of named records, and return once they are gone."""
        self._open("remove points")
        if not filters.names_points:
            why = "removing needs records or points by name"
            raise RecordShapeError(record="PointFilter", why=why, shapes=repr(filters))
        self._claim()
        self._remove(translate(filters, self._dialect))

    def count(self, filters: PointFilter | None = None) -> int:
        """The exact number of points."""
        self._open("count points")
        return self._count(translate(filters, self._dialect))

    def count_by_generation(self, filters: PointFilter | None = None) -> Counter[tuple[int, str]]:
        """The exact number of points of each record and generation that has any, read page by page.

        An exact facet would make a count of its own for each distinct value, and each count looks at every branch of
        the filter: where each record has a generation of its own, 1,000 records cost a million looks.
        """
        return self._counted(filters, "record_id", "generation")

    def count_by_record(self, filters: PointFilter | None = None) -> dict[int, int]:
        """The exact number of points of each record that has any, read page by page."""
        return {record_id: number for (record_id,), number in sorted(self._counted(filters, "record_id").items())}

    def _counted(self, filters: PointFilter | None, *keys: str) -> Counter[Any]:
        found: Counter[Any] = Counter()
        for page in self._pages(filters, _PAGE, payload=keys):
            found.update(tuple(map(payload.get, keys)) for payload in self._payloads(page))
        return found

    def search(
        self,
        vector: np.ndarray,
        *,
        limit: int,
        filters: PointFilter | None = None,
        score_threshold: float | None = None,
    ) -> list[Hit]:
        """The points nearest to a vector by cosine, best first; equal scores by record, then frame."""
        self._open("search")
        query = vector.astype(np.float32).tolist()
        # The engines' threshold is "more than", and by single precision.
        least = None if score_threshold is None else score_threshold - _A_LITTLE
        found = self._nearest(query, limit, translate(filters, self._dialect), least)
        if score_threshold is not None:
            wanted = np.float32(score_threshold)
            found = [point for point in found if np.float32(point.score) >= wanted]
        return sorted((Hit.from_payload(hit.payload or {}, hit.score) for hit in found), key=lambda hit: hit.order)

    def payloads(self, filters: PointFilter | None, keys: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """These keys of the points' payloads, in the order of the points' ids."""
        for page in self._pages(filters, _PAGE, payload=keys):
            yield from self._payloads(page)

    def set_payload(self, values: Mapping[str, Any], filters: PointFilter) -> None:
        """Set keys of the payload of points; other keys, and the vectors, stay as they are."""
        self._open("set a payload")
        self._set_payload(dict(values), translate(filters, self._dialect))

    def point_ids(self, filters: PointFilter | None = None) -> set[str]:
        """The ids of the points."""
        return {point_id for page in self._pages(filters, _PAGE) for point_id in self._ids(page)}

    def read(self, filters: PointFilter | None = None, *, batch_size: int = 1024) -> Iterator[PointBatch]:
        """The points themselves, in the order of their ids."""
        for page in self._pages(filters, batch_size, payload=True, vectors=True):
            yield PointBatch(tuple(self._ids(page)), self._vectors(page), tuple(self._payloads(page)))

    @abc.abstractmethod
    def optimize(self) -> None:
        """Free the disk space of removed points and build the vector index, if the engine does not do so by itself."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Make every write safe from a power cut."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the store."""

    def __enter__(self) -> Self:
        """The store."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the store."""
        self.close()

    def _require_own(self, found: CollectionSpec) -> None:
        if self._source and found.source and found.source != self._source:
            raise ForeignCollectionError(found.name, repr(self))

    def take_over(self) -> bool:
        """Let the open collection be of the source's present mark, where it had an earlier one; safe to repeat.

        Returns whether it has it now.
        """
        spec: CollectionSpec = self._open("take a collection over")[0]
        self._require_own(spec)
        return str(spec.source) == str(self._source) or self._note_source(str(self._source))

    def _claim(self) -> None:
        """Note in the open collection that its points are of this source, unless somebody has."""
        spec: CollectionSpec = self._open("claim a collection")[0]
        if self._source and not spec.source and self._note_source(self._source):
            _log.warning("Collection %r in %r belongs to this source table from now on", spec.name, self)

    def _pages(
        self, filters: PointFilter | None, size: int, *, payload: bool | Sequence[str] = False, vectors: bool = False
    ) -> Iterator[Sequence[Any]]:
        self._open("read points")
        condition = translate(filters, self._dialect)
        offset: Any = None
        while True:
            page, offset = self._page(condition, size, offset, payload=payload, vectors=vectors)
            if page:
                yield page
            if offset is None:
                return

    @property
    @abc.abstractmethod
    def _dialect(self) -> Dialect:
        """The engine's own classes for filters."""

    @abc.abstractmethod
    def _open(self, operation: str) -> tuple[Any, ...]:
        """What is open, the collection's spec first.

        Raises:
            StoreNotOpenError: Nothing is; `operation` says what was to be done.
        """

    @abc.abstractmethod
    def _note_source(self, source: str) -> bool:
        """Keep the source's identity with the open collection, and in its spec. Returns whether the former is done."""

    @abc.abstractmethod
    def _write(self, batch: PointBatch) -> None:
        """Write as many points as one call takes."""

    @abc.abstractmethod
    def _set_payload(self, values: dict[str, Any], condition: Any) -> None:  # noqa: ANN401 - as above
        """Set keys of the payload of the points that meet a condition."""

    @abc.abstractmethod
    def _remove(self, condition: Any) -> None:  # noqa: ANN401 - the engine's own filter, here and below
        """Remove the points that meet a condition."""

    @abc.abstractmethod
    def _count(self, condition: Any) -> int:  # noqa: ANN401
        """The exact number of points that meet a condition; all when it is None, as below."""

    @abc.abstractmethod
    def _nearest(self, vector: list[float], limit: int, condition: Any, score_threshold: float | None) -> list[Any]:  # noqa: ANN401
        """The points nearest to a vector, each with its payload and its cosine, never an estimate of it."""

    @abc.abstractmethod
    def _page(
        self,
        condition: Any,  # noqa: ANN401
        size: int,
        offset: Any,  # noqa: ANN401
        *,
        payload: bool | Sequence[str],
        vectors: bool,
    ) -> tuple[Sequence[Any], Any]:
        """Points from an offset on, as the engine gives them, and the next page's offset.

        `payload` is whether it is wanted, or which of its fields are.
        """

    def _ids(self, page: Sequence[Any]) -> list[str]:
        return [str(record.id) for record in page]

    def _payloads(self, page: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
        """One by one: a counted page of them is never alive at once, which the garbage collector would look through."""
        return (record.payload or {} for record in page)

    def _vectors(self, page: Sequence[Any]) -> np.ndarray:
        """Vectors that come as lists of Python floats; packing them costs half of what NumPy takes for them."""
        spec: CollectionSpec = self._open("read points")[0]
        pack = struct.Struct(f"<{spec.dim}f").pack
        return as_rows([pack(*record.vector) for record in page], spec.dim)


def as_rows(vectors: Sequence[bytes], dim: int) -> np.ndarray:
    """Vectors of little-endian float32, as one array (N, dim)."""
    return np.frombuffer(bytearray().join(vectors), "<f4").reshape(len(vectors), dim)
