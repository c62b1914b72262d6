"""The index stage: vectors in, verified points and failures out.

The points of a record are replaced so that no moment shows it without points: write the new points, see that they are
there, only then remove the old ones, and see that nothing else is left. A process killed between any two of these
steps leaves a state from which the same call arrives at the same points.

    before          a1 a2          record 7, generation a
    1 upsert        b1 b2 b3       frames 1 and 2 keep their ids and turn from a to b; 3 is new
    2 count         3 of b         expected 3, or nothing is removed
    3 delete        points of record 7 that are not b: frames that are no longer sampled
    4 count         3 in all, and their ids are these
    5 flush
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.index import (
    CollectionMissingError,
    PayloadError,
    PointRefusedError,
    PointsMissingError,
    PointStoreError,
    VectorNormError,
)
from extraction_dagster.records import Failure
from extraction_dagster.stages.catalog.identity import source_identity
from extraction_dagster.stages.index.points import PointFilter, build_points

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from extraction_dagster.errors import ExtractionError
    from extraction_dagster.records import EmbeddingBatch, VideoRow
    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.index.points import PointBatch
    from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore

# Keeps a filter, which names each record, and the ids of their points well within one call.
_RECORDS_PER_STEP = 64
_RECORDS_PER_DELETE = 512
_RECORDS_SHOWN = 5
_NOBODY = str(uuid.UUID(int=0))  # no point has it: ours are of version 5
_PATIENCE_OF_A_PERSON_SECONDS = 20.0


def open_point_store(
    settings: Settings, *, wait_seconds: float = 0.0, attempts: int | None = None, source: str | None = None
) -> PointStore:
    """Open the store that the settings choose: a server when `qdrant_url` is set, else the embedded engine.

    Collections of another source table than the settings' are refused when they are opened.

    Args:
        settings: Which one, and where.
        wait_seconds: How long to wait for another process to release the embedded store; with 0 somebody looks on,
            who is not kept waiting for a server either.
        attempts: Tries of each call to a server; as many as the time allows when None.
        source: The mark of the source table; that of the settings when None.
    """
    if source is None:
        source = source_identity(settings) if names_source(settings) else ""
    if settings.qdrant_url is None:
        from extraction_dagster.stages.index.edge.store import EdgeStore  # noqa: PLC0415 - one engine is loaded

        return EdgeStore(settings.home / "qdrant", wait_seconds=wait_seconds, source=source)
    from extraction_dagster.stages.index.server.retry import RetryPolicy  # noqa: PLC0415 - one engine is loaded
    from extraction_dagster.stages.index.server.store import ServerStore  # noqa: PLC0415

    most = settings.qdrant_retry_seconds
    budget = most if wait_seconds else min(most, _PATIENCE_OF_A_PERSON_SECONDS)
    retry = RetryPolicy(budget_seconds=budget, attempts=attempts)
    return ServerStore.connect(settings, retry=retry, source=source)


def require_store(settings: Settings, fingerprint: str) -> None:
    """See that a server will take points of this fingerprint, before a video is fetched for them.

    Raises:
        PointStoreError: It won't: the key may not write, its disk is full, it is in recovery mode, or it holds other
            vectors under this name.
    """
    if not settings.qdrant_url:
        return
    from extraction_dagster.stages.index.server.store import ServerStore  # noqa: PLC0415 - one engine is loaded

    source = source_identity(settings) if names_source(settings) else ""
    with ServerStore.connect(settings, source=source) as store:
        store.require_writable(settings.collection_name, fingerprint)


def names_source(settings: Settings) -> bool:
    """Whether the settings lead to a source table: a machine that only searches may know of none."""
    return settings.source_url is not None or (settings.home / "source.db").exists()


def open_for_writing(store: PointStore, spec: CollectionSpec) -> None:
    """Open the collection that takes these vectors: the one in use, or the one that was staged beside it.

    Raises:
        CollectionMismatchError: The one in use holds other vectors, and none was staged for these.
    """
    there = store.collections(spec.name)
    others_in_use = any(in_use for fingerprint, in_use in there.items() if fingerprint != spec.fingerprint)
    store.ensure_collection(spec, staged=others_in_use and spec.fingerprint in there)


def open_for_reading(store: PointStore, name: str, fingerprint: str) -> bool:
    """Open the collection of these vectors, in use or staged, if there is one. Returns whether there is."""
    for chosen in (None, fingerprint):
        with contextlib.suppress(CollectionMissingError):
            if store.open_collection(name, fingerprint=chosen).fingerprint == fingerprint:
                return True
    return False


@dataclass(frozen=True, slots=True)
class Indexed:
    """What became of some records.

    Attributes:
        num_points: Verified points by record.
        failures: The records that can't become points; the points that they had stay.
    """

    num_points: Mapping[int, int]
    failures: tuple[Failure, ...]


def index_records(
    store: PointStore, embeddings: EmbeddingBatch, *, rows: Mapping[int, VideoRow], generations: Mapping[int, str]
) -> Indexed:
    """Replace the points of these records; a record that can't become points fails alone.

    Where the store takes writes and not these, they are halved until the record is alone that it does not take:

        records 1 … 64    refused; and so are 1 … 32, 17 … 32, …, 23, while all others are written: record 23 fails

    Raises:
        PointStoreError: The store failed; no record is to blame.
    """
    left, failures = set(embeddings.record_id.tolist()), list[Failure]()

    def fail(record_id: int, error: ExtractionError) -> None:
        left.discard(record_id)
        version, name = rows[record_id].content_version, type(error).__name__
        failures.append(Failure(record_id, version, "index", name, str(error), error.permanent))

    while True:
        try:
            written, refused = _replace_or_halve(store, embeddings, sorted(left), rows=rows, generations=generations)
        except (PayloadError, VectorNormError) as error:
            fail(error.record_id, error)
            continue
        if len(refused) > 1 and not written:  # none is taken: it is not about one of them
            raise next(iter(refused.values()))
        for record_id, refusal in refused.items():
            fail(record_id, PointRefusedError(record_id, str(refusal)))
        return Indexed(written, tuple(failures))


def _replace_or_halve(
    store: PointStore,
    embeddings: EmbeddingBatch,
    record_ids: Sequence[int],
    *,
    rows: Mapping[int, VideoRow],
    generations: Mapping[int, str],
) -> tuple[dict[int, int], dict[int, PointStoreError]]:
    """The points of each record that was written, and the records that the store does not take, each by itself."""
    try:
        part = embeddings.of_records(record_ids)
        return replace_records(store, part, rows=rows, generations=generations), {}
    except PointStoreError as error:
        if not error.may_be_content or not _takes_writes(store):
            raise
        if len(record_ids) == 1:
            return {}, {record_ids[0]: error}
    written, refused, middle = dict[int, int](), dict[int, PointStoreError](), len(record_ids) // 2
    for half in (record_ids[:middle], record_ids[middle:]):
        done, not_done = _replace_or_halve(store, embeddings, half, rows=rows, generations=generations)
        written, refused = written | done, refused | not_done
    return written, refused


def _takes_writes(store: PointStore) -> bool:
    """Whether the store takes a write whose content nobody can object to: the removal of a point that is not there."""
    try:
        store.delete(PointFilter(point_ids=(_NOBODY,)))
    except PointStoreError:
        return False
    return True


def replace_records(
    store: PointStore,
    embeddings: EmbeddingBatch,
    *,
    rows: Mapping[int, VideoRow],
    generations: Mapping[int, str],
    created_at: datetime | None = None,
) -> dict[int, int]:
    """Make the store hold exactly these points for exactly the records in the batch.

    Records that are not in the batch are never touched. Marking rows is the caller's, afterwards.

    Args:
        store: With its collection open.
        embeddings: All frames of each record in it.
        rows: The row of every record in the batch.
        generations: What each record's points are made from; see `points.generation`.
        created_at: Timezone-aware; now when None.

    Returns:
        The number of points of each record.

    Raises:
        PointsMissingError: The store does not hold what it acknowledged; old points that were there are kept.
        PointStoreError: The store failed.
    """
    ids, counts = np.unique(embeddings.record_id, return_counts=True)
    expected: dict[int, int] = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    for start in range(0, len(ids), _RECORDS_PER_STEP):
        chosen = ids[start : start + _RECORDS_PER_STEP].tolist()
        part = embeddings.of_records(chosen)
        batch = build_points(part, rows=rows, generations=generations, created_at=created_at)
        of_part = {key: expected[key] for key in chosen}
        _replace(store, batch, expected=of_part, generations={key: generations[key] for key in chosen})
    if expected:
        store.flush()
    return expected


def delete_records(store: PointStore, record_ids: Sequence[int]) -> int:
    """Remove every point of these records, and see that they are gone.

    Returns:
        The number of points removed.

    Raises:
        PointsMissingError: Points are left.
    """
    removed = 0
    for start in range(0, len(record_ids), _RECORDS_PER_DELETE):
        filters = PointFilter(record_ids=tuple(record_ids[start : start + _RECORDS_PER_DELETE]))
        before = store.count(filters)
        if before:
            store.delete(filters)
            _verify(store, filters, when="after removing them", expected={})
        removed += before
    if removed:
        store.flush()
    return removed


def wrong_counts(found: Mapping[int, int], expected: Mapping[int, int]) -> str:
    """Name the records with a wrong number of points: `record 7: 4 of 2, record 8: 0 of 1`."""
    wrong = [
        f"record {record_id}: {found.get(record_id, 0)} of {expected.get(record_id, 0)}"
        for record_id in sorted(expected.keys() | found.keys())
        if found.get(record_id, 0) != expected.get(record_id, 0)
    ]
    more = len(wrong) - _RECORDS_SHOWN
    return ", ".join(wrong[:_RECORDS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _replace(
    store: PointStore, batch: PointBatch, *, expected: Mapping[int, int], generations: Mapping[int, str]
) -> None:
    store.upsert(batch)
    current = PointFilter(generations=generations)
    surplus = _surplus(store, current, batch, expected)
    store.delete(PointFilter(generations=generations, stale=True))
    if surplus:
        store.delete(PointFilter(point_ids=surplus))
    filters = PointFilter(record_ids=tuple(expected))
    _verify(store, filters, when="after removing stale ones", expected=expected)
    # Numbers can agree by chance, ids can't.
    if (found := store.point_ids(filters)) != set(batch.ids):
        _refuse(store, filters, when="by their ids", expected=expected, got=len(found.intersection(batch.ids)))


def _surplus(
    store: PointStore, current: PointFilter, batch: PointBatch, expected: Mapping[int, int]
) -> tuple[str, ...]:
    """Points of the current generation beyond the batch.

    The same file can give fewer frames than before (a disk that fails half-way, say): those are stale as well, though
    their generation says otherwise.
    """
    count = store.count(current)
    if count == len(batch):
        return ()
    found = store.point_ids(current)
    if not found.issuperset(batch.ids):
        _refuse(store, current, when="after writing them", expected=expected, got=len(found.intersection(batch.ids)))
    return tuple(sorted(found.difference(batch.ids)))


def _verify(store: PointStore, filters: PointFilter, *, when: str, expected: Mapping[int, int]) -> None:
    count = store.count(filters)
    if count != sum(expected.values()):
        _refuse(store, filters, when=when, expected=expected, got=count)


def _refuse(store: PointStore, filters: PointFilter, *, when: str, expected: Mapping[int, int], got: int) -> None:
    records = wrong_counts(store.count_by_record(filters), expected)
    raise PointsMissingError(when, expected=sum(expected.values()), got=got, records=records or "ids differ")
