"""Bring the store and the table to agreement, window by window.

Three rows of a window, what the ledger and the store say, and what becomes of them:

    record 7   done with 3 points      the store has 2    lost: its points are written again
    record 8   done with 2 points      the store has 4    stale: as above; the surplus goes when they are written
    record 9   deleted from the table  the store has 5    gone: its points are removed, the ledger forgets it

Rows that are pending, waiting or parked are not compared: their points in the store stay until they are replaced.
A difference counts only when it is seen twice, since runs go on meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from extraction_dagster.errors.index import CollectionMissingError
from extraction_dagster.stages.index.compare import (
    WHOLE,
    Differences,
    compare_points,
    expected_points,
    finished,
    windows,
)
from extraction_dagster.stages.index.stage import delete_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.stages.catalog.ledger import LedgerEntry
    from extraction_dagster.stages.index.protocol import PointStore

_WINDOW_RECORDS = 1000
_HOLD_SECONDS = 5.0
_PAUSE_SECONDS = 0.25
_MUCH = 0.1  # share of a collection whose removal is worth an optimization


@dataclass(slots=True)
class Reconciliation:
    """What a reconciliation found and did.

    Attributes:
        repaired: Whether it was to repair.
        windows: Ranges compared.
        records: Records that should have points.
        points: Points that they should have.
        differences: The ranges that disagreed.
        removed_points: Points of gone records, removed.
    """

    repaired: bool
    windows: int = 0
    records: int = 0
    points: int = 0
    differences: list[Differences] = field(default_factory=list)
    removed_points: int = 0

    def add(self, found: Differences) -> None:
        """Take in what was found within one window."""
        self.windows += 1
        self.records += found.compared
        self.points += found.held
        if not found.agrees:
            self.differences.append(found)

    @property
    def remaining(self) -> int:
        """Records on which store and table still disagree; those made pending are among them until they are done."""
        wrong = sum(len(item.to_write_again) for item in self.differences)
        return wrong if self.repaired else wrong + sum(len(item.gone) for item in self.differences)

    def total(self, kind: str) -> tuple[int, int]:
        """Records and points of one kind: lost, stale or gone."""
        counts = [getattr(item, kind) for item in self.differences]
        return sum(map(len, counts)), sum(sum(item.values()) for item in counts)

    @property
    def summary(self) -> str:
        """What was found and done, in one sentence or two."""
        if not self.differences:
            return f"The collection agrees with the table: {self.records} records, {self.points} points."
        totals = [(kind, *self.total(kind)) for kind in ("lost", "stale", "gone")]
        text = ", ".join(f"{points} points {kind} ({records} records)" for kind, records, points in totals if records)
        done = f" Removed {self.removed_points} points." if self.repaired and self.total("gone")[0] else ""
        return f"Of {self.records} records with {self.points} points: {text}.{done}"

    def rows(self, *, limit: int | None = None) -> list[dict[str, int | None]]:
        """The records that differ: `{"record_id": 7, "lost": 1, "stale": None, "gone": None}`."""
        found = [
            {"record_id": key, "lost": item.lost.get(key), "stale": item.stale.get(key), "gone": item.gone.get(key)}
            for item in self.differences
            for key in sorted({*item.lost, *item.stale, *item.gone})
        ]
        return found[:limit]

    def document(self) -> dict[str, object]:
        """The same as one JSON document; the keys are stable."""
        return {
            "records": self.records,
            "points": self.points,
            "repaired": self.repaired,
            "removed_points": self.removed_points,
            "remaining": self.remaining,
            **{f"{kind}_records": self.total(kind)[0] for kind in ("lost", "stale", "gone")},
            **{f"{kind}_points": self.total(kind)[1] for kind in ("lost", "stale", "gone")},
            "differences": self.rows(),
        }


def reconcile(  # noqa: PLR0913 - what is compared with what
    catalog: Catalog,
    open_store: Callable[[], PointStore],
    *,
    collection_name: str,
    embedding: str,
    within: IdRange = WHOLE,
    repair: bool = False,
    window_records: int = _WINDOW_RECORDS,
    hold_seconds: float = _HOLD_SECONDS,
) -> Reconciliation:
    """Compare the ledger and the table with the store; on `repair`, make them agree.

    Lost and stale points are not written here: their records become pending, so that the next run of their range
    writes them from the stored vectors. Points of gone records are removed at once.

    Args:
        catalog: The source table and the ledger.
        open_store: Opens the store; called again after every `hold_seconds`, so that runs can open it too.
        collection_name: The collection's name.
        embedding: The fingerprint of today's settings; while its collection is being loaded beside the one in use,
            records that are in it need not be in the one in use.
        within: Only these records.
        repair: Remove, forget and make pending.
        window_records: Ledger entries compared at once.
        hold_seconds: How long the embedded store is held without a break.
    """
    done = Reconciliation(repaired=repair)
    collections = _find_collections(open_store, collection_name, embedding)
    for collection in collections:
        view = _View(catalog, collection, collections)
        with contextlib.closing(_Turns(open_store, collection_name, collection, hold_seconds)) as turns:
            removed = 0
            for window in windows(catalog, within, window_records):
                found = view.compare(turns.store(), window)
                if not found.agrees:
                    found = view.compare(turns.store(), window)
                done.add(found)
                if repair and not found.agrees:
                    removed += _repair(catalog, turns.store(), found)
            done.removed_points += removed
            store = turns.store()
            if store is not None and removed and removed >= _MUCH * (store.count() + removed):
                store.optimize()
                store.flush()
    return done


@dataclass(frozen=True, slots=True)
class _Collection:
    """A collection in which points should be: the one in use, one beside it, or none.

    Attributes:
        fingerprint: Of its vectors; None when there is no collection.
        in_use: Whether searches use it.
        of_today: Whether the settings of today write into it.
    """

    fingerprint: str | None
    in_use: bool
    of_today: bool = False


def _find_collections(open_store: Callable[[], PointStore], name: str, embedding: str) -> list[_Collection]:
    """The collections to compare; entries whose own collection was dropped are compared with the first one."""
    in_use: list[str] = []
    with open_store() as store:
        beside = set(store.collections(name))
        with contextlib.suppress(CollectionMissingError):
            in_use.append(store.open_collection(name).fingerprint)
    found = [*in_use, *sorted(beside.difference(in_use))]
    collections = [_Collection(item, in_use=item in in_use, of_today=item == embedding) for item in found]
    return collections or [_Collection(None, in_use=False)]


class _Turns:
    """The store, released now and then so that others can open it."""

    def __init__(
        self, open_store: Callable[[], PointStore], name: str, collection: _Collection, hold_seconds: float
    ) -> None:
        self._open_store, self._name, self._collection, self._hold_seconds = open_store, name, collection, hold_seconds
        self._store: PointStore | None = None
        self._since = 0.0

    def store(self) -> PointStore | None:
        """The store with its collection open; None when there is no collection."""
        if self._collection.fingerprint is None:
            return None
        if self._store is not None and time.monotonic() - self._since > self._hold_seconds:
            self.close()
            time.sleep(_PAUSE_SECONDS)
        if self._store is None:
            self._store = self._open_store()
            self._store.open_collection(
                self._name, fingerprint=None if self._collection.in_use else self._collection.fingerprint
            )
            self._since = time.monotonic()
        return self._store

    def close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()


@dataclass(frozen=True, slots=True)
class _View:
    """What the ledger and the table say of one collection."""

    catalog: Catalog
    collection: _Collection
    all_collections: list[_Collection]

    def compare(self, store: PointStore | None, window: IdRange) -> Differences:
        """The differences within a window."""
        entries = self.catalog.ledger.entries(window)
        rows = {row.video.record_id: row for row in self.catalog.source.rows_of(entries)}
        done = {record_id: entries[record_id] for record_id in finished(rows, entries)}
        expected = {record_id: expected_points(entry) for record_id, entry in done.items() if self._is_here(entry)}
        found = compare_points(store, expected, within=window)
        not_in_use = {
            record_id: entry.num_points or 0
            for record_id, entry in done.items()
            if self._should_be_seen(entry) and record_id not in found.gone
        }
        gone = self._gone(found.gone, entries, rows.keys())
        return replace(found, lost={**found.lost, **not_in_use}, gone=gone)

    def _is_here(self, entry: LedgerEntry) -> bool:
        """Whether an entry's points should be in this collection; those of a dropped one should be in the first."""
        known = {collection.fingerprint for collection in self.all_collections}
        if entry.embedding_fingerprint in known:
            return entry.embedding_fingerprint == self.collection.fingerprint
        return self.collection == self.all_collections[0]

    def _should_be_seen(self, entry: LedgerEntry) -> bool:
        """Whether searches should find points of a record in this collection, of any generation.

        A record that a run has written into another collection, of another model, keeps its points in the one in use.
        """
        others = {item.fingerprint for item in self.all_collections if not item.in_use and not item.of_today}
        return self.collection.in_use and entry.embedding_fingerprint in others

    def _gone(
        self, unexpected: Mapping[int, int], entries: Mapping[int, LedgerEntry], eligible: Iterable[int]
    ) -> dict[int, int]:
        """Records that are deleted or no longer eligible, and still have points, or an entry that says so."""
        unknown = [record_id for record_id in unexpected if record_id not in entries]
        eligible_now = {*eligible, *(row.video.record_id for row in self.catalog.source.rows_of(unknown))}
        gone = {record_id: number for record_id, number in unexpected.items() if record_id not in eligible_now}
        without_points = [record_id for record_id in entries if record_id not in eligible_now and record_id not in gone]
        there = self.catalog.source.existing(without_points)
        forgotten = [key for key in without_points if key not in there or entries[key].state == "done"]
        return dict(sorted({**gone, **dict.fromkeys(forgotten, 0)}.items()))


def compare_range(catalog: Catalog, store: PointStore | None, *, within: IdRange, fingerprint: str) -> Differences:
    """Compare the open collection with what was verified for the records of a range; a difference is seen twice.

    Without a store, as when the collection was dropped, all that was verified is lost.
    Only records that are done, and whose vectors are of this fingerprint, are compared; `gone` stays empty.
    """
    found = Differences(within)
    for _ in range(2):
        entries = catalog.ledger.entries(within)
        expected = {
            key: expected_points(entry)
            for key, entry in entries.items()
            if entry.state == "done" and entry.embedding_fingerprint == fingerprint
        }
        found = replace(compare_points(store, expected, within=within), gone={})
        if found.agrees:
            break
    return found


def _repair(catalog: Catalog, store: PointStore | None, found: Differences) -> int:
    """Remove what is gone, make pending what is to be written again. Returns the number of points removed.

    A row that is there but not eligible keeps its entry, as pending: it is processed when it becomes eligible again.
    """
    with_points = [record_id for record_id, number in found.gone.items() if number]
    removed = delete_records(store, with_points) if store is not None else 0
    there = catalog.source.existing(found.gone)
    catalog.forget([record_id for record_id in found.gone if record_id not in there])
    catalog.make_pending(sorted({*there, *found.to_write_again}))
    return removed
