"""Points: their ids, generations and payloads, and the filters that select them by their payload.

A point's id follows from its record and frame alone, so that writing it twice leaves one point. Its generation says
from what it was made, so that points made from something else can be told apart and removed.
"""

from __future__ import annotations

import json
import math
import uuid
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction_dagster.addresses import shown_address
from extraction_dagster.errors import RecordShapeError, SettingsError
from extraction_dagster.errors.index import PayloadError, VectorNormError
from extraction_dagster.records import MAX_INT, MIN_INT, fingerprint
from extraction_dagster.settings import RESERVED_PAYLOAD_KEYS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from extraction_dagster.records import EmbeddingBatch, IdRange, VideoRow

_NAMESPACE = uuid.UUID("8c1f4bb4-5d0a-5b6e-9c3e-2f6f1f0d7a51")
# Vectors come in float16, whose rounding moves a unit norm by about 0.0005.
NORM_TOLERANCE = 0.01


def point_id(record_id: int, frame_number: int) -> str:
    """The id of a frame's point. It never changes: neither the model nor the run is part of it."""
    return str(uuid.uuid5(_NAMESPACE, f"{record_id}/{frame_number}"))


def generation(
    *, embedding_fingerprint: str, frames_fingerprint: str, content_version: str, source: str, address: str
) -> str:
    """Name what a record's points are made from; a retry of the same work gives the same name.

    Args:
        embedding_fingerprint: Model, preprocessing and storage of the vectors.
        frames_fingerprint: Decoder, sampling and quality steps.
        content_version: The row's version of its file.
        source: The source table's identity.
        address: 16 hex digits of the file's resolved address; empty when it is not known.
    """
    made_from = {"embedding": embedding_fingerprint, "frames": frames_fingerprint, "content": content_version}
    return fingerprint(**made_from, source=source, address=address)


def former_generation(*, embedding_fingerprint: str, frames_fingerprint: str, content_version: str) -> str:
    """The generation of points that a release before state tables of version 3 wrote."""
    return fingerprint(embedding=embedding_fingerprint, frames=frames_fingerprint, content=content_version)


@dataclass(frozen=True, slots=True)
class PointBatch:
    """Points as a store takes them.

    Attributes:
        ids: N distinct UUIDs.
        vectors: float32 or float16, shape (N, dim), L2-normalised.
        payloads: N payloads of JSON values.
    """

    ids: Sequence[str]
    vectors: np.ndarray
    payloads: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        """Refuse mismatched lengths, other dtypes, and an id that occurs twice."""
        got = f"ids {len(self.ids)}, vectors {self.vectors.dtype} {self.vectors.shape}, payloads {len(self.payloads)}"
        if self.vectors.dtype not in (np.float32, np.float16) or self.vectors.ndim != 2:  # noqa: PLR2004 - (N, dim)
            raise RecordShapeError(record="PointBatch", why="vectors must be float32 or float16 (N, dim)", shapes=got)
        if not len(self.ids) == len(self.vectors) == len(self.payloads):
            raise RecordShapeError(record="PointBatch", why="ids, vectors, payloads must have one length", shapes=got)
        if len(set(self.ids)) != len(self.ids):
            raise RecordShapeError(record="PointBatch", why="ids must be distinct: a frame occurs twice", shapes=got)

    def __len__(self) -> int:
        """The number of points, N."""
        return len(self.ids)

    @property
    def dim(self) -> int:
        """The length of each vector."""
        return int(self.vectors.shape[1])

    def chunks(self, *, max_points: int, max_bytes: int) -> Iterator[PointBatch]:
        """Cut into batches that one call to a store can carry; a single point above `max_bytes` goes alone."""
        start, size = 0, 0
        for index, payload in enumerate(self.payloads):
            # 64 bytes stand for the id and the framing.
            point_bytes = 4 * self.dim + 64 + len(json.dumps(payload))
            if index > start and (index - start >= max_points or size + point_bytes > max_bytes):
                yield self._slice(start, index)
                start, size = index, 0
            size += point_bytes
        if start < len(self):
            yield self._slice(start, len(self))

    def _slice(self, start: int, stop: int) -> PointBatch:
        return PointBatch(self.ids[start:stop], self.vectors[start:stop], self.payloads[start:stop])


def build_points(
    embeddings: EmbeddingBatch,
    *,
    rows: Mapping[int, VideoRow],
    generations: Mapping[int, str],
    created_at: datetime | None = None,
) -> PointBatch:
    """Make the points of a batch of embeddings.

    Args:
        embeddings: Vectors, L2-normalised up to float16 rounding; they are normalised again in float32.
        rows: The row of every record in the batch; further rows are ignored.
        generations: The generation of every record in the batch.
        created_at: Timezone-aware; now when None.

    Raises:
        VectorNormError: A vector's norm is not 1.
        PayloadError: A payload column's value has no JSON form.
        SettingsError: A payload column has a reserved name.
        RecordShapeError: A record has no row or no generation.
    """
    stamp = rfc3339(created_at or datetime.now(UTC))
    record_ids: list[int] = embeddings.record_id.tolist()
    frame_numbers: list[int] = embeddings.frame_number.tolist()
    bases = {record_id: _record_payload(record_id, rows, generations, stamp) for record_id in dict.fromkeys(record_ids)}
    return PointBatch(
        ids=tuple(map(point_id, record_ids, frame_numbers)),
        vectors=_unit(embeddings),
        payloads=tuple(
            {**bases[record_id], "frame_number": number, "frame_second": second}
            for record_id, number, second in zip(
                record_ids, frame_numbers, embeddings.pts_seconds.tolist(), strict=True
            )
        ),
    )


def rfc3339(moment: datetime) -> str:
    """A moment as `2026-01-02T03:04:05.678Z`; a naive one is taken for UTC."""
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return aware.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _unit(embeddings: EmbeddingBatch) -> np.ndarray:
    vectors = embeddings.vectors.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(np.abs(norms - 1) > NORM_TOLERANCE)
    if len(wrong):
        first = int(wrong[0])
        raise VectorNormError(
            int(embeddings.record_id[first]), int(embeddings.frame_number[first]), float(norms[first])
        )
    return np.asarray(vectors / norms[:, np.newaxis], dtype=np.float32)


def _record_payload(
    record_id: int, rows: Mapping[int, VideoRow], generations: Mapping[int, str], stamp: str
) -> dict[str, Any]:
    if record_id not in rows or record_id not in generations:
        why = f"record {record_id} needs a row and a generation"
        shapes = f"rows {sorted(rows)}, generations {sorted(generations)}"
        raise RecordShapeError(record="PointBatch", why=why, shapes=shapes)
    own = {"record_id": record_id, "created_at": stamp, "generation": generations[record_id]}
    return {**row_payload(rows[record_id]), **own}


def row_payload(row: VideoRow) -> dict[str, Any]:
    """What the payload of a record's points says of its row.

    Raises:
        PayloadError: A payload column's value has no JSON form.
        SettingsError: A payload column has a reserved name.
    """
    path = _text(shown_address(row.uri))
    return {**_extra_payload(row), "platform": row.platform, "video_code": row.code, "path": path}


def _extra_payload(row: VideoRow) -> dict[str, Any]:
    reserved = sorted(set(row.payload) & set(RESERVED_PAYLOAD_KEYS))
    if reserved:
        raise SettingsError(
            setting="EXTRACTION_SOURCE_PAYLOAD_COLUMNS",
            got=repr(", ".join(reserved)),
            expected=f"columns other than {', '.join(RESERVED_PAYLOAD_KEYS)}, which every point has",
        )
    return {column: _json_value(value, row.record_id, column) for column, value in row.payload.items()}


def _json_value(value: object, record_id: int, column: str) -> object:  # noqa: C901, PLR0911 - one line a type
    """A database value as JSON has it; NaN and infinity, which JSON lacks, become null."""
    match value:
        case None | bool():
            return value
        case str():
            return _text(value)
        case int():
            if MIN_INT <= value <= MAX_INT:
                return value
            raise PayloadError(record_id, column, f"{value} does not fit 64 bits")
        case float() | Decimal():
            with suppress(ValueError, OverflowError):  # a signalling NaN
                return float(value) if math.isfinite(value) else None
            return None
        case datetime():
            return rfc3339(value)
        case date() | time():
            return value.isoformat()
        case uuid.UUID():
            return str(value)
        case np.generic():
            return _json_value(value.item(), record_id, column)
        case dict():
            return {_text(str(key)): _json_value(item, record_id, column) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_json_value(item, record_id, column) for item in value]
    raise PayloadError(record_id, column, f"a value of type {type(value).__name__} has no JSON form")


def _text(value: str) -> str:
    r"""Text that UTF-8 can carry: a file name's undecodable byte 0xff becomes `\udcff`, spelled out."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True, slots=True)
class PointFilter:
    """Which points; every condition that is given must hold.

    Attributes:
        record_ids: Points of these records.
        exclude_record_ids: No points of these records.
        record_id_range: Points of records in this range.
        platform: Points of this platform.
        created_from: Points written at or after this moment.
        created_before: Points written before this moment.
        point_ids: These points.
        generations: Points of these records that carry their record's generation given here.
        stale: Turn `generations` round: points of these records that carry any other generation.
    """

    record_ids: Collection[int] | None = None
    exclude_record_ids: Collection[int] = ()
    record_id_range: IdRange | None = None
    platform: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None
    point_ids: Collection[str] | None = None
    generations: Mapping[int, str] | None = None
    stale: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty list: engines differ in whether it means none or all."""
        for name in ("record_ids", "point_ids", "generations"):
            if getattr(self, name) is not None and len(getattr(self, name)) == 0:
                raise RecordShapeError(record="PointFilter", why=f"{name} must not be empty", shapes="length 0")

    @property
    def names_points(self) -> bool:
        """Whether records or points are named at all: deleting by anything wider is refused."""
        return any(
            part is not None for part in (self.record_ids, self.record_id_range, self.point_ids, self.generations)
        )


@dataclass(frozen=True, slots=True)
class Dialect:
    """An engine's own classes for filters; `models` is a module with those that the engines name alike."""

    models: Any
    number_range: Callable[..., Any]
    datetime_range: Callable[..., Any]
    has_ids: Callable[[Collection[str]], Any]


def translate(filters: PointFilter | None, dialect: Dialect) -> Any | None:  # noqa: ANN401 - an engine's own filter
    """The engine's filter, or None for every point."""
    if filters is None:
        return None
    must: list[Any] = []
    must_not: list[Any] = []
    if filters.record_ids is not None:
        must.append(_records(filters.record_ids, dialect))
    if filters.exclude_record_ids:
        must_not.append(_records(filters.exclude_record_ids, dialect))
    if filters.point_ids is not None:
        must.append(dialect.has_ids(filters.point_ids))
    if filters.platform is not None:
        must.append(_equals("platform", filters.platform, dialect))
    since, before = (moment and rfc3339(moment) for moment in (filters.created_from, filters.created_before))
    if since or before:
        must.append(dialect.models.FieldCondition(key="created_at", range=dialect.datetime_range(gte=since, lt=before)))
    if filters.record_id_range is not None:
        _add_range(filters.record_id_range, dialect, must, must_not)
    if filters.generations is not None:
        _add_generations(filters.generations, dialect, must, must_not if filters.stale else None)
    return dialect.models.Filter(must=must or None, must_not=must_not or None) if must or must_not else None


def _records(record_ids: Collection[int], dialect: Dialect) -> Any:  # noqa: ANN401 - an engine's own condition
    return dialect.models.FieldCondition(key="record_id", match=dialect.models.MatchAny(any=sorted(set(record_ids))))


def _equals(key: str, value: str, dialect: Dialect) -> Any:  # noqa: ANN401 - an engine's own condition
    return dialect.models.FieldCondition(key=key, match=dialect.models.MatchValue(value=value))


def _add_generations(
    generations: Mapping[int, str], dialect: Dialect, must: list[Any], must_not: list[Any] | None
) -> None:
    """Records of one generation share a condition.

    `{1: "a", 2: "a", 3: "b"}` gives (record 1 or 2, and generation a) or (record 3, and generation b); turned round,
    record 1, 2 or 3, and neither of those two.
    """
    by_generation: dict[str, list[int]] = defaultdict(list)
    for record_id, name in generations.items():
        by_generation[name].append(record_id)
    groups = [
        dialect.models.Filter(must=[_records(ids, dialect), _equals("generation", name, dialect)])
        for name, ids in by_generation.items()
    ]
    must.append(_records(generations, dialect))
    if must_not is None:
        must.append(dialect.models.Filter(should=groups))
    else:
        must_not.extend(groups)


def _add_range(ids: IdRange, dialect: Dialect, must: list[Any], must_not: list[Any]) -> None:
    """An engine's range is of float64, which can't tell ids above 2**53 apart.

    The range is widened to the next float64 at each end, and the few ids that come with it are excluded by name:
    from 2**60 + 1 on is "from 2**60 on, but not 2**60 itself" (at most 3,072 ids at an end, near 2**63).
    """
    low, high = _float_at_most(ids.first_id), -_float_at_most(-ids.last_id)
    must.append(dialect.models.FieldCondition(key="record_id", range=dialect.number_range(gte=low, lte=high)))
    below, above = range(int(low) - _slack(low), ids.first_id), range(ids.last_id + 1, int(high) + _slack(high) + 1)
    extra = [record_id for record_id in (*below, *above) if MIN_INT <= record_id <= MAX_INT]
    if extra:
        must_not.append(_records(extra, dialect))


def _float_at_most(value: int) -> float:
    number = float(value)
    return number if int(number) <= value else math.nextafter(number, -math.inf)


def _slack(bound: float) -> int:
    """Ids beyond the bound that still round to it."""
    return int(math.ulp(bound)) if math.ulp(bound) >= 2 else 0  # noqa: PLR2004 - below, float64 holds every integer
