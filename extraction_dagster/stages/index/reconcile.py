"""Bring the store and the table to agreement, window by window.

Three rows of a window, what the ledger and the store say, and what becomes of them:

    record 7   done with 3 points      the store has 2    lost: its points are written again
    record 8   done with 2 points      the store has 4    stale: as above; the surplus goes when they are written
    record 9   deleted from the table  the store has 5    gone: when it still is at a later reconciliation, its points
                                                          are removed and the ledger forgets it; see `purge`

Rows that are pending, waiting or parked are not compared: their points in the store stay until they are replaced.
A difference counts only when it is seen twice, since runs go on meanwhile. What is gone is removed at the end, when all
windows were compared. Long because what is found, told and repaired of a window stands together.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from extraction_dagster.errors import some
from extraction_dagster.errors.index import CollectionMissingError
from extraction_dagster.stages.index.compare import (
    WHOLE,
    Differences,
    compare_points,
    expected_points,
    finished,
    moved,
    windows,
)
from extraction_dagster.stages.index.payloads import changed_payloads, write_payloads
from extraction_dagster.stages.index.points import rfc3339
from extraction_dagster.stages.index.purge import Brake, decide, find_returned, let_go, note_gone, take_off
from extraction_dagster.stages.index.stage import delete_records

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.stages.catalog.ledger import LedgerEntry
    from extraction_dagster.stages.catalog.source_table import SourceRow
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
        removed_records: Those records.
        brake: What became of the gone records.
        moved: Records that are done with a file of another address than their row has now.
        moved_are_pending: Whether those were made pending.
        returned: Records that were removed, and whose rows came back marked as done; a repair makes them pending.
        payloads: Records whose points say of their row what it no longer says; a repair writes their payload alone.
    """

    repaired: bool
    windows: int = 0
    records: int = 0
    points: int = 0
    differences: list[Differences] = field(default_factory=list)
    removed_points: int = 0
    removed_records: int = 0
    brake: Brake = field(default_factory=Brake)
    moved: list[int] = field(default_factory=list)
    moved_are_pending: bool = False
    returned: list[int] = field(default_factory=list)
    payloads: set[int] = field(default_factory=set)

    def add(self, found: Differences, *, with_moved: bool = True) -> None:
        """Take in what was found within one window; moved rows are the same in each collection."""
        self.windows += 1
        self.moved += found.moved if with_moved else ()
        self.records += found.compared
        self.points += found.held
        if not found.agrees:
            self.differences.append(found)

    @property
    def remaining(self) -> int:
        """Records on which store and table still disagree; those made pending are among them until they are done.

        After a repair, what waits to be found gone once more is not among them; what is held back is.
        """
        gone = self.brake.held_back if self.repaired else sum(len(item.gone) for item in self.differences)
        return self.num_pending + gone + (0 if self.repaired else len(self.payloads))

    @property
    def num_pending(self) -> int:
        """Records that a repair made pending."""
        wrong = sum(len(item.to_write_again) for item in self.differences) + len(self.returned)
        return wrong + (len(self.moved) if self.moved_are_pending else 0)

    def total(self, kind: str) -> tuple[int, int]:
        """Records and points of one kind: lost, stale or gone."""
        counts = [getattr(item, kind) for item in self.differences]
        return sum(map(len, counts)), sum(sum(item.values()) for item in counts)

    @property
    def summary(self) -> str:
        """What was found and done, in one sentence or two."""
        totals = [(kind, *self.total(kind)) for kind in ("lost", "stale", "gone")]
        text = ", ".join(f"{points} points {kind} ({records} records)" for kind, records, points in totals if records)
        found = (
            f"Of {self.records} records with {self.points} points: {text}."
            if text
            else f"The collection agrees with the table: {self.records} records, {self.points} points."
        )
        removed = f"Removed {self.removed_points} points." if self.removed_records else ""
        about = (self._about_moved(), self._about_returned(), self._about_payloads())
        return " ".join(filter(None, (found, removed, self.brake.summary, *about)))

    def _about_moved(self) -> str:
        if not self.moved:
            return ""
        shown = f"{len(self.moved)} records were made of a file at another address ({some(self.moved)})"
        if self.moved_are_pending:
            return f"{shown}: they are pending now."
        return f"{shown}: with EXTRACTION_ADDRESS_CHANGES=process, 'extraction reconcile --repair' makes them pending."

    def _about_returned(self) -> str:
        then = "are pending now" if self.repaired else "stay undone until 'extraction reconcile --repair'"
        shown = f"{len(self.returned)} removed records are back, marked as done ({some(self.returned)}): they {then}."
        return shown if self.returned else ""

    def _about_payloads(self) -> str:
        then = "it was written" if self.repaired else "'extraction reconcile --repair' writes it"
        shown = f"{len(self.payloads)} records have another payload than their rows say ({some(sorted(self.payloads))})"
        return f"{shown}: {then}." if self.payloads else ""

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
            "removed_records": self.removed_records,
            "gone_waiting_records": self.brake.waiting,
            "gone_waiting_since": self.brake.since and rfc3339(self.brake.since),
            "gone_waiting_until": self.brake.until and rfc3339(self.brake.until),
            "gone_held_back_records": self.brake.held_back,
            "gone_held_back_because": self.brake.why or None,
            "moved_records": len(self.moved),
            "returned_records": len(self.returned),
            "payload_records": len(self.payloads),
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
    force: bool = False,
    window_records: int = _WINDOW_RECORDS,
    hold_seconds: float = _HOLD_SECONDS,
) -> Reconciliation:
    """Compare the ledger and the table with the store; on `repair`, make them agree.

    Lost and stale points are not written here: their records become pending, so that the next run of their range
    writes them from the stored vectors. Points of gone records are removed once an earlier reconciliation, with or
    without `repair`, found them gone too, and unless they are too many.

    Args:
        catalog: The source table and the ledger.
        open_store: Opens the store; called again after every `hold_seconds`, so that runs can open it too.
        collection_name: The collection's name.
        embedding: The fingerprint of today's settings; while its collection is being loaded beside the one in use,
            records that are in it need not be in the one in use.
        within: Only these records.
        repair: Remove, forget and make pending.
        force: Remove more than the settings' share of all records.
        window_records: Ledger entries compared at once.
        hold_seconds: How long the embedded store is held without a break.
    """
    processes_moved = repair and catalog.settings.address_changes == "process"
    done, gone = Reconciliation(repaired=repair, moved_are_pending=processes_moved), _Gone()
    collections = _find_collections(open_store, collection_name, embedding)
    turns = {item: _Turns(open_store, collection_name, item, hold_seconds) for item in collections}
    for collection in collections:
        view = _View(catalog, collection, collections, adopts_addresses=repair)
        with contextlib.closing(turns[collection]) as turn:
            for window in windows(catalog, within, window_records):
                store, seen = turn.store(), view.look(window)
                found = view.compare(store, seen)
                if not found.agrees:
                    store, seen = turn.store(), view.look(window)
                    found = found.seen_again(view.compare(store, seen))
                done.add(found, with_moved=collection == collections[0])
                gone.add(collection, found)
                done.payloads.update(view.changed_payloads(store, seen, found, repair=repair))
                if repair:
                    _make_pending(catalog, found, with_moved=processes_moved)
    first_seen = note_gone(catalog, gone.claims, within=within)
    done.brake = decide(catalog, first_seen, known=gone.count_known(catalog), force=force)
    if repair and done.brake.removable:
        removed = let_go(catalog, {key: gone.claims[key] for key in done.brake.removable})
        for collection, turn in turns.items():
            with contextlib.closing(turn):
                done.removed_points += _remove(turn.store(), sorted(gone.with_points[collection].intersection(removed)))
        take_off(catalog, removed)
        done.removed_records = len(removed)
    done.returned = find_returned(catalog, within=within, repair=repair)
    return done


@dataclass(slots=True)
class _Gone:
    """The gone records of all windows and collections.

    Attributes:
        claims: Each one's claim when it was looked at; 0 when the ledger does not know it.
        with_points: Those that have points, by collection.
        num_known: Records that the ledger or a collection knows, by collection.
    """

    claims: dict[int, int] = field(default_factory=dict)
    with_points: dict[_Collection, set[int]] = field(default_factory=lambda: defaultdict(set))
    num_known: dict[_Collection, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, collection: _Collection, found: Differences) -> None:
        """Take in what was found within one window of a collection."""
        self.claims.update((key, found.claims.get(key, 0)) for key in found.gone)
        self.with_points[collection].update(key for key, number in found.gone.items() if number)
        self.num_known[collection] += found.num_held

    def count_known(self, catalog: Catalog) -> int:
        """Records that the ledger or a collection knows; counted only when some are gone."""
        if not self.claims:
            return 0
        return max(sum(catalog.ledger.counts().values()), *self.num_known.values())


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
class _Seen:
    """What the ledger and the table say of the records of a window at one look."""

    window: IdRange
    entries: Mapping[int, LedgerEntry]
    rows: Mapping[int, SourceRow]
    finished: Collection[int]


@dataclass(frozen=True, slots=True)
class _View:
    """What the ledger and the table say of one collection."""

    catalog: Catalog
    collection: _Collection
    all_collections: list[_Collection]
    adopts_addresses: bool

    def look(self, window: IdRange) -> _Seen:
        """Read the window's entries, and their rows."""
        entries = self.catalog.ledger.entries(window)
        rows = {row.video.record_id: row for row in self.catalog.source.rows_of(entries)}
        return _Seen(window, entries, rows, finished(self.catalog, rows, entries))

    def compare(self, store: PointStore | None, seen: _Seen) -> Differences:
        """The differences within a window."""
        entries, rows = seen.entries, seen.rows
        done = {record_id: entries[record_id] for record_id in seen.finished}
        expected = {record_id: expected_points(entry) for record_id, entry in done.items() if self._is_here(entry)}
        if self.adopts_addresses:  # of entries that an earlier release wrote
            self.catalog.adopt_addresses(rows[key] for key, entry in done.items() if entry.address is None)
        found = compare_points(store, expected, within=seen.window)
        not_in_use = {
            record_id: entry.num_points or 0
            for record_id, entry in done.items()
            if self._should_be_seen(entry) and record_id not in found.gone
        }
        gone = self._gone(found.gone, entries, rows.keys())
        claims = {key: entries[key].claim for key in gone if key in entries}
        lost = {**found.lost, **not_in_use}
        return replace(found, lost=lost, gone=gone, claims=claims, moved=tuple(moved(rows, entries)))

    def changed_payloads(self, store: PointStore | None, seen: _Seen, found: Differences, *, repair: bool) -> list[int]:
        """The records within a window that are whole, and whose payload is not what their row says; repairs write it.

        One whose file has moved keeps the address of the file that its frames are of.
        """
        if store is None:
            return []
        left = {*found.to_write_again, *moved(seen.rows, seen.entries)}
        whole = {
            key: seen.rows[key].video
            for key in seen.finished
            if key not in left and self._is_here(seen.entries[key]) and seen.rows[key].problem is None
        }
        changed = changed_payloads(store, whole)
        if repair:
            write_payloads(store, changed)
        return sorted(changed)

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


def compare_range(  # noqa: PLR0913 - what is compared, and what is known of it
    catalog: Catalog,
    store: PointStore | None,
    *,
    within: IdRange,
    fingerprint: str,
    only: Collection[int] | None = None,
    entries: Mapping[int, LedgerEntry] | None = None,
) -> Differences:
    """Compare the open collection with what was verified for the records of a range; a difference is seen twice.

    Without a store, as when the collection was dropped, all that was verified is lost.
    Only records that are done, and whose vectors are of this fingerprint, are compared; `gone` stays empty. `only` is
    that of `compare_points`; with the range's `entries` the first look reads none.
    """

    def look(entries: Mapping[int, LedgerEntry]) -> Differences:
        expected = {
            key: expected_points(entry)
            for key, entry in entries.items()
            if entry.state == "done" and entry.embedding_fingerprint == fingerprint
        }
        return replace(compare_points(store, expected, within=within, only=only), gone={})

    found = look(catalog.ledger.entries(within) if entries is None else entries)
    return found if found.agrees else found.seen_again(look(catalog.ledger.entries(within)))


def _make_pending(catalog: Catalog, found: Differences, *, with_moved: bool) -> None:
    due = {*found.to_write_again, *(found.moved if with_moved else ())}
    if due:
        catalog.make_pending(sorted(due))


def _remove(store: PointStore | None, record_ids: list[int]) -> int:
    """Remove the points of records, and free their disk space when they were many. Returns how many points."""
    removed = delete_records(store, record_ids) if store is not None else 0
    if store is not None and removed and removed >= _MUCH * (store.count() + removed):
        store.optimize()
        store.flush()
    return removed
