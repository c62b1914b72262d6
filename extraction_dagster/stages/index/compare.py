"""Compare what the store holds with what the table and the ledger say, by exact counts."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from extraction_dagster.records import IdRange
from extraction_dagster.stages.index.points import PointFilter, former_generation

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.stages.catalog.ledger import LedgerEntry
    from extraction_dagster.stages.catalog.source_table import SourceRow
    from extraction_dagster.stages.index.protocol import PointStore

WHOLE = IdRange(-(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class ExpectedPoints:
    """What the table says of one record.

    Attributes:
        num_points: How many points were verified when the row was marked.
        generation: What they were made from.
    """

    num_points: int
    generation: str


@dataclass(frozen=True, slots=True)
class Differences:
    """Where the store and the table disagree within a range; each maps a record id to a number of points.

    Attributes:
        within: The range that was compared.
        compared: Records that should have points.
        held: Points that should be there.
        lost: Points that are missing.
        stale: Points beyond those that were verified.
        gone: Points of records that should have none; 0 when only the ledger knows them.
        claims: Of the gone records that the ledger knows, their claims as they were when they were looked at.
        num_held: Records that have points in the store.
        moved: Records that are done with a file of another address than their row has now.
    """

    within: IdRange
    compared: int = 0
    held: int = 0
    lost: Mapping[int, int] = field(default_factory=dict)
    stale: Mapping[int, int] = field(default_factory=dict)
    gone: Mapping[int, int] = field(default_factory=dict)
    claims: Mapping[int, int] = field(default_factory=dict, compare=False)
    num_held: int = field(default=0, compare=False)
    moved: tuple[int, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether there is no difference."""
        return not (self.lost or self.stale or self.gone)

    @property
    def to_write_again(self) -> list[int]:
        """Records whose points are to be written again."""
        return sorted({*self.lost, *self.stale})

    def seen_again(self, second: Differences) -> Differences:
        """What a second look confirms: a difference counts only when both have it."""
        lost, stale, gone = (
            {key: min(count, now[key]) for key, count in before.items() if key in now}
            for before, now in ((self.lost, second.lost), (self.stale, second.stale), (self.gone, second.gone))
        )
        claims = {key: second.claims.get(key, 0) for key in gone if self.claims.get(key) == second.claims.get(key)}
        still_gone = {key: count for key, count in gone.items() if key in claims}
        moved = tuple(sorted({*self.moved}.intersection(second.moved)))
        return replace(second, lost=lost, stale=stale, gone=still_gone, claims=claims, moved=moved)


def compare_points(
    store: PointStore | None,
    expected: Mapping[int, ExpectedPoints],
    *,
    within: IdRange,
    only: Collection[int] | None = None,
) -> Differences:
    """Compare a range of ids, record by record, by exact counts.

    Args:
        store: With its collection open; None when there is no collection, so that every expected point is lost.
        expected: Every record of the range that should have points.
        within: The range, in which every expected record lies; points of others in it are gone.
        only: Compare these records by themselves, and of the others the number of all points of the range with what is
            expected of it: unless it is the same, each is compared. By default all are compared by themselves.
    """
    if store is not None and only is not None and 2 * len(only) < len(expected):
        wanted = {key: expected[key] for key in only if key in expected}
        found = _compared(store, wanted, within, PointFilter(record_ids=tuple(sorted(only)))) if wanted else None
        total = sum(want.num_points for want in expected.values())
        if (found is None or found.agrees) and store.count(PointFilter(record_id_range=within)) == total:
            return Differences(within, compared=len(expected), held=total, num_held=len(expected))
    return _compared(store, expected, within, PointFilter(record_id_range=within))


def _compared(
    store: PointStore | None, expected: Mapping[int, ExpectedPoints], within: IdRange, filters: PointFilter
) -> Differences:
    """Compare records one by one with the points under a filter."""
    by_generation = store.count_by_generation(filters) if store is not None else {}
    held, current = defaultdict[int, int](int), dict[int, int]()
    for (record_id, generation), number in by_generation.items():
        held[record_id] += number
        if record_id in expected and generation == expected[record_id].generation:
            current[record_id] = number
    lost = {record_id: want.num_points - current.get(record_id, 0) for record_id, want in expected.items()}
    # What a record holds beyond its expected points of the right generation.
    stale = {
        record_id: held.get(record_id, 0) - min(current.get(record_id, 0), want.num_points)
        for record_id, want in expected.items()
    }
    return Differences(
        within,
        compared=len(expected),
        held=sum(want.num_points for want in expected.values()),
        lost={record_id: count for record_id, count in lost.items() if count > 0},
        stale={record_id: count for record_id, count in stale.items() if count > 0},
        gone={record_id: count for record_id, count in sorted(held.items()) if record_id not in expected},
        num_held=len(held),
    )


def finished(catalog: Catalog, rows: Mapping[int, SourceRow], entries: Mapping[int, LedgerEntry]) -> list[int]:
    """The eligible rows that are done and were not asked for again since."""
    now = datetime.now(UTC)
    return [key for key, row in rows.items() if catalog.status_of(row, entries[key], None, now=now) == "done"]


def moved(rows: Mapping[int, SourceRow], entries: Mapping[int, LedgerEntry]) -> list[int]:
    """The eligible rows that are done with a file of another address than they have now."""
    return sorted(
        key
        for key, row in rows.items()
        if row.problem is None
        and row.video.address
        and entries[key].state == "done"
        and entries[key].source_version == row.video.content_version
        and entries[key].address not in {None, row.video.address}
    )


def windows(catalog: Catalog, within: IdRange, size: int) -> Iterator[IdRange]:
    """Cut a range so that each window holds `size` ledger entries; nothing lies between two windows."""
    first = within.first_id
    while True:
        end = catalog.ledger.window_end(None if first == WHOLE.first_id else first - 1, size)
        if end is None or end >= within.last_id:
            yield IdRange(first, within.last_id)
            return
        yield IdRange(first, end)
        first = end + 1


def expected_points(entry: LedgerEntry) -> ExpectedPoints:
    """What the ledger says of a record's points; an earlier release kept their generation in no entry."""
    made_from = entry.generation or former_generation(
        embedding_fingerprint=entry.embedding_fingerprint or "",
        frames_fingerprint=entry.frames_fingerprint or "",
        content_version=entry.content_version,
    )
    return ExpectedPoints(entry.num_points or 0, made_from)
