"""The store of points: what the project asks of it, and the choice of the engine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

from extraction_dagster.errors.base import RecordShapeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    import numpy as np

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.index.filters import PointFilter
    from extraction_dagster.stages.index.points import PointBatch

VectorDtype = Literal["float16", "float32"]
Quantization = Literal["none", "scalar"]
# Created before the first point, so that every filter of this project is an indexed one (a strict server refuses
# others). The kinds are Qdrant's own names.
PAYLOAD_INDEXES = {"record_id": "integer", "generation": "keyword", "platform": "keyword", "created_at": "datetime"}
MAX_POINTS_PER_CALL = 256
MAX_BYTES_PER_CALL = 4_500_000


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

    The last three say how a collection is created; one that is there keeps what it has.
    """

    name: str
    dim: int
    fingerprint: str
    vector_dtype: VectorDtype = "float16"
    quantization: Quantization = "none"
    on_disk: bool = False

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
        """The name behind the name: `video_frames` stands for `video_frames-<fingerprint>`."""
        return f"{self.name}-{self.fingerprint}"

    @property
    def vectors(self) -> str:
        """The kind of its vectors, for messages."""
        return f"dim {self.dim}, fingerprint {self.fingerprint}"


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


@runtime_checkable
class PointStore(Protocol):
    """A store of points with one collection open. Every write has been applied when its call returns."""

    def ensure_collection(self, spec: CollectionSpec, *, staged: bool = False) -> None:
        """Open the collection, and create it with its payload indexes when there is none.

        Args:
            spec: What it must hold.
            staged: Open the collection of this fingerprint beside the one in use, which searches go on using until
                `publish` is called.

        Raises:
            CollectionMismatchError: The one in use holds other vectors.
            StoreBusyError: Another process holds the embedded store.
        """
        ...

    def open_collection(self, name: str, *, fingerprint: str | None = None) -> CollectionSpec:
        """Open a collection, whatever its vectors, and say what it holds.

        Args:
            name: The name by which it is asked for.
            fingerprint: Which of those under the name; the one in use when None.

        Raises:
            CollectionMissingError: There is none.
        """
        ...

    def publish(self) -> None:
        """Make the open collection the one in use."""
        ...

    def collections(self, name: str) -> Mapping[str, bool]:
        """The fingerprints loaded under a name, and whether each is the one in use."""
        ...

    def drop(self, name: str, fingerprint: str) -> None:
        """Remove a collection that is not in use.

        Raises:
            CollectionInUseError: It is in use.
        """
        ...

    def upsert(self, batch: PointBatch) -> None:
        """Write points, and return once they are applied."""
        ...

    def count(self, filters: PointFilter | None = None) -> int:
        """The exact number of points."""
        ...

    def count_by_record(self, filters: PointFilter | None = None) -> dict[int, int]:
        """The exact number of points of each record that has any."""
        ...

    def delete(self, filters: PointFilter) -> None:
        """Remove points of named records, and return once they are gone."""
        ...

    def search(
        self,
        vector: np.ndarray,
        *,
        limit: int,
        filters: PointFilter | None = None,
        score_threshold: float | None = None,
    ) -> list[Hit]:
        """The points nearest to a vector by cosine, best first; equal scores by record, then frame."""
        ...

    def point_ids(self, filters: PointFilter | None = None) -> set[str]:
        """The ids of the points."""
        ...

    def read(self, filters: PointFilter | None = None, *, batch_size: int = 256) -> Iterator[PointBatch]:
        """The points themselves, in the order of their ids."""
        ...

    def optimize(self) -> None:
        """Give back the room of removed points and build the vector index, where the engine leaves that to us."""
        ...

    def flush(self) -> None:
        """Make every write safe from a power cut."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...

    def __enter__(self) -> Self:
        """The store."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the store."""
        ...


def open_point_store(settings: Settings, *, wait_seconds: float = 0.0, attempts: int | None = None) -> PointStore:
    """The store that the settings choose: a server when `qdrant_url` is set, else the embedded engine.

    Args:
        settings: Which one, and where.
        wait_seconds: How long to wait for another process to let go of the embedded store.
        attempts: Tries of each call to a server; as many as a write takes when None.
    """
    if settings.qdrant_url is None:
        from extraction_dagster.stages.index.edge.store import EdgeStore  # noqa: PLC0415 - one engine is loaded

        return EdgeStore(settings.home / "qdrant", wait_seconds=wait_seconds)
    from extraction_dagster.stages.index.server.retry import RetryPolicy  # noqa: PLC0415 - one engine is loaded
    from extraction_dagster.stages.index.server.store import ServerStore  # noqa: PLC0415

    return ServerStore.connect(settings, retry=RetryPolicy(attempts=attempts) if attempts else None)
