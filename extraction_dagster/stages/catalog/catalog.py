"""What is to do in a range of ids, and how it is marked once it is done: the source table and the ledger together.

Long because each writer of a row stands beside the others: they lock in one order, and write under one rule of claims.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from extraction_dagster.errors.catalog import SourceUnreachableError, StateError
from extraction_dagster.stages.catalog.database import make_engine, writing
from extraction_dagster.stages.catalog.identity import is_same_database, told
from extraction_dagster.stages.catalog.ledger import Fingerprints, Ledger, LedgerEntry, State
from extraction_dagster.stages.catalog.pending import Status, count_pending, is_pending, status_of
from extraction_dagster.stages.catalog.planning import (
    Moved,
    PlannedRow,
    fresh_entry,
    is_wanted,
    made_pending,
    revised,
    taken_up,
)
from extraction_dagster.stages.catalog.source_table import SourceRow, SourceTable, Step
from extraction_dagster.stages.catalog.state_tables import lock_claim_base, note_purged, prepare, take_over

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    import sqlalchemy as sa

    from extraction_dagster.records import Failure, IdRange
    from extraction_dagster.settings import Settings

# What became of a record, by its status; a failed one whose wait is over is pending.
_SUMMARY = {"done": "done", "todo": "pending", "again": "pending", "waiting": "failed", "parked": "parked"}
_LOOKED_AT = 500  # records of a ledger that is taken over
_CLAIM_TRIES = 3  # others may claim rows between our look at them and our claim
_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too
__all__ = ["Catalog", "Fingerprints", "Moved", "PlannedRow", "Status", "open_catalog", "status_of"]


class Catalog:
    """The rows of the source table with what is known of each.

    Opening it reflects and checks the source table, and makes or migrates the state tables.

    Args:
        settings: Which ones.
        creates: Make, migrate or take over the state tables; otherwise they must be there.
        takes_over: The state tables are of this source at an address that it had before.

    Raises:
        SourceTableError, SourceUnreachableError, DatabaseUrlError, PredicateError, StateError: What they say.
    """

    def __init__(self, settings: Settings, *, creates: bool = True, takes_over: bool = False) -> None:
        self.settings = settings
        schema = settings.state_schema
        self.source_engine = make_engine(
            settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL", state_schema=schema
        )
        self.source = SourceTable(self.source_engine, settings)
        self.one_database = is_same_database(settings.resolved_state_url, settings.resolved_source_url)
        self.state_engine = (
            self.source_engine
            if self.one_database
            else make_engine(settings.resolved_state_url, setting="EXTRACTION_STATE_URL", state_schema=schema)
        )
        self.ledger = Ledger(self.state_engine)
        if takes_over:
            refuse_strangers(self)
            take_over(self.state_engine, self.source.identity, told=told(settings))
        self.source.identity = prepare(self.state_engine, self.source.identity, told=told(settings), creates=creates)
        self._lost: set[int] = set()

    def close(self) -> None:
        """Give the connections back."""
        self.source_engine.dispose()
        self.state_engine.dispose()

    def plan(self, id_range: IdRange, fingerprints: Fingerprints) -> dict[int, PlannedRow]:
        """Every eligible row of a range and what is to be done with it, in ascending order of ids."""
        return {planned.row.video.record_id: planned for planned in self._planned(id_range, fingerprints)}

    def _planned(self, id_range: IdRange, fingerprints: Fingerprints | None) -> Iterator[PlannedRow]:
        """Each eligible row of a range with its status; without fingerprints, whatever the settings of today are."""
        entries, now = self.ledger.entries(id_range), datetime.now(UTC)
        for row in self.source.rows(id_range):
            entry = entries.get(row.video.record_id)
            yield PlannedRow(row, entry, self.status_of(row, entry, fingerprints, now=now))

    def status_of(
        self, row: SourceRow, entry: LedgerEntry | None, fingerprints: Fingerprints | None, *, now: datetime
    ) -> Status:
        """What is to be done with a row, its address and the settings considered; see `pending.status_of`."""
        return status_of(
            row.video.content_version,
            row.marked_done,
            entry,
            fingerprints,
            now=now,
            address=row.video.address,
            keeps_moved=self.settings.address_changes == "report",
        )

    def begin(  # noqa: PLR0913 - what a run may want, each by name
        self,
        id_range: IdRange,
        fingerprints: Fingerprints,
        *,
        force: bool = False,
        revises: bool = True,
        retries: bool = False,
        run_id: str = "",
    ) -> dict[int, PlannedRow]:
        """Plan a range and claim what is to be done in it, so that whoever planned a row before writes nothing more.

        Rows whose mark was cleared get a new revision, so that they are decoded again; with `force`, every row does.

        Args:
            id_range: The range.
            fingerprints: Those of today.
            force: Every row is to be done, whatever became of it.
            revises: The run begins with decoding. One that begins with stored frames or vectors leaves the revisions
                as they are, and rows that are to be decoded again.
            retries: An earlier run that was forced broke off, and this one goes on with what it left.
            run_id: Whose claims these are.
        """
        plan, now = self.plan(id_range, fingerprints), datetime.now(UTC)
        self.adopt_addresses(item.row for item in plan.values() if item.entry and item.entry.address is None)
        lost = set(plan)
        for _ in range(_CLAIM_TRIES):
            wanted = {key: plan[key] for key in lost if key in plan and is_wanted(plan[key], force, revises)}
            if not wanted:
                break
            self.source.rehearse(min(wanted))
            claimed, lost = self._claim(wanted, force=force, revises=revises, retries=retries, run_id=run_id)
            if lost:
                plan = self.plan(id_range, fingerprints)
            for key, entry in claimed.items():
                if key in plan:
                    row = plan[key].row
                    plan[key] = PlannedRow(row, entry, self.status_of(row, entry, fingerprints, now=now))
        return plan

    def _claim(
        self, wanted: Mapping[int, PlannedRow], *, force: bool, revises: bool, retries: bool, run_id: str
    ) -> tuple[dict[int, LedgerEntry], set[int]]:
        """Raise the claims of planned rows; returns their new entries, and the rows that somebody else claimed."""
        with writing(self.state_engine, what="write the ledger") as connection:
            base = lock_claim_base(connection)
            there = self.ledger.lock(connection, [key for key, item in wanted.items() if item.entry is not None])
            changed, added = dict[int, LedgerEntry](), dict[int, LedgerEntry]()
            for key in sorted(wanted):
                planned, before = wanted[key], there.get(key)
                if planned.entry is None or before is None:
                    fresh = fresh_entry(planned, claim=base + 1, claimed_by=run_id or None)
                    added[key] = revised(planned, fresh) if force and revises else fresh
                elif before.claim == planned.entry.claim:
                    taken = replace(before, claim=before.claim + 1, claimed_by=run_id or None)
                    changed[key] = taken_up(planned, taken, force=force, revises=revises, retries=retries)
            won = changed.keys() | self.ledger.add(connection, list(added.values()))
            self.ledger.replace(connection, list(changed.values()))
        return {key: entry for key, entry in {**changed, **added}.items() if key in won}, wanted.keys() - won

    def adopt_addresses(self, rows: Iterable[SourceRow]) -> None:
        """Give entries of an earlier release, which knew no addresses, the present ones of these rows; once each."""
        self.ledger.adopt_addresses({row.video.record_id: row.video.address for row in rows if row.video.address})

    def moved(self, *, after_id: int | None, budget: int, up_to_id: int | None = None) -> Moved:
        """Find the done rows whose address is another than that of the file which their frames are of.

        They are found whatever EXTRACTION_ADDRESS_CHANGES says; `make_pending` makes them due. Rows that an earlier
        release did, which knew no addresses, get their present ones.

        Args:
            after_id: Look above this id; None for the whole beginning.
            budget: Most rows looked at.
            up_to_id: Look up to this id; None for the whole end.
        """
        ids = self.source.next_ids(after_id, budget, up_to_id=up_to_id)
        known = self.ledger.addresses(ids)
        now = self.source.addresses_of(list(known))
        self.ledger.adopt_addresses(
            {key: now[key] for key, address in known.items() if address is None and now.get(key)}
        )
        found = tuple(key for key in ids if now.get(key) and known[key] not in {None, now[key]})
        return Moved(found, ids[-1] if len(ids) >= budget else None)

    def mark_extracted(self, plan: Mapping[int, PlannedRow], num_frames: Mapping[int, int], frames: str) -> set[int]:
        """Mark rows of a plan whose frames are stored: their number by record, and their fingerprint.

        Returns:
            The rows whose claim is still the planned one: these were marked, and no other.
        """
        entries = {
            record_id: {
                "state": "extracted",
                "content_version": plan[record_id].content_version,
                "frames_fingerprint": frames,
                "num_frames": number,
                "address": plan[record_id].address,
                "not_before": None,
            }
            for record_id, number in num_frames.items()
        }
        return self._mark("extracted", plan, entries)

    def mark_embedded(
        self, records: Iterable[int], embedding: str, *, plan: Mapping[int, PlannedRow] | None = None
    ) -> set[int]:
        """Note rows whose vectors are stored; the source's mark waits until their points are verified.

        Args:
            records: Their ids.
            embedding: What the vectors were made with.
            plan: Rows whose claim is not the planned one any more are left alone; without it, none is.

        Returns:
            The rows that were noted.
        """
        records = list(records)
        if not records:
            return set()
        with writing(self.state_engine, what="write the ledger") as connection:
            if plan is None:
                claims = {key: entry.claim for key, entry in self.ledger.lock(connection, records).items()}
                claims = dict.fromkeys(records, 0) | claims
            else:
                claims = {key: plan[key].claim for key in records}
            won = self.ledger.hold(connection, claims)
            entry = {"state": "embedded", "embedding_fingerprint": embedding}
            self.ledger.upsert(connection, [{"record_id": key, **entry} for key in sorted(won)])
        self._log_lost(records, won)
        return won

    def mark_done(
        self,
        plan: Mapping[int, PlannedRow],
        num_points: Mapping[int, int],
        fingerprints: Fingerprints,
        *,
        generations: Mapping[int, str] | None = None,
    ) -> set[int]:
        """Mark rows of a plan whose points were verified, by record; this is the last thing that happens to a row.

        Args:
            plan: The rows as they were planned.
            num_points: Verified points by record.
            fingerprints: What frames and vectors were made with.
            generations: What the points are made from, by record.

        Returns:
            The rows whose claim is still the planned one: these were marked, and no other.
        """
        entries = {
            record_id: {
                "state": "done",
                "content_version": plan[record_id].content_version,
                "frames_fingerprint": fingerprints.frames,
                "embedding_fingerprint": fingerprints.embedding,
                "num_frames": number,
                "num_points": number,
                "address": plan[record_id].address,
                "generation": generations[record_id] if generations else None,
                "attempts": 0,
                "not_before": None,
                "last_error": None,
            }
            for record_id, number in num_points.items()
        }
        return self._mark("embedded", plan, entries)

    def record_failures(
        self, plan: Mapping[int, PlannedRow], failures: Iterable[Failure], *, run_id: str
    ) -> dict[int, State]:
        """Write failures down; each record is tried again later, or parked.

        Returns:
            Each record's new state. Nothing is written of rows whose claim is not the planned one any more.
        """
        failures = list(failures)
        records = [failure.record_id for failure in failures]
        states = self.ledger.record_failures(
            failures,
            {key: plan[key].video for key in records},
            {key: plan[key].source_version for key in records},
            run_id=run_id,
            max_attempts=self.settings.max_attempts,
            retry_delay_seconds=self.settings.retry_delay_seconds,
        )
        self._log_lost(records, states)
        return states

    def make_pending(self, record_ids: Collection[int]) -> None:
        """Make records pending whose points are not there; their stored frames and vectors are used.

        The ledger comes first: a crash in between leaves a marked row that is not done, which is pending as well.
        """
        with writing(self.state_engine, what="write the ledger") as connection:
            base = lock_claim_base(connection)
            before = self.ledger.lock(connection, record_ids)
            self.ledger.add(
                connection, [LedgerEntry(key, "todo", claim=base + 1) for key in record_ids if key not in before]
            )
            after = {key: made_pending(entry) for key, entry in before.items()}
            self.ledger.replace(connection, list(after.values()))
            if self.one_database:
                self.ledger.restamp(connection, self.source.unmark(connection, record_ids))
        if not self.one_database and self.source.has_marks:
            claims = {key: after[key].claim if key in after else base + 1 for key in record_ids}
            self._touch_source_elsewhere(claims, self.source.unmark)

    def make_changed_pending(self, record_ids: Collection[int]) -> set[int]:
        """Clear a mark of those of these rows whose version is not the ledger's, so that every look finds them.

        Their claims stay: a run that has them in the present version already goes on and marks them.

        Returns:
            The rows that have another version.
        """
        with writing(self.state_engine, what="write the ledger") as ledger:
            known = {key: entry.source_version for key, entry in self.ledger.lock(ledger, record_ids).items()}
            if self.one_database:
                return self.source.unmark_others(ledger, known)
            with writing(self.source_engine, what=f"mark rows of {self.source.name!r}") as source:
                return self.source.unmark_others(source, known)

    def forget(self, record_ids: Sequence[int], *, purged_at: datetime | None = None) -> None:
        """Forget records that were deleted; with the moment of it, rows that come back marked are found later."""
        with writing(self.state_engine, what="write the ledger") as connection:
            self.ledger.remove(connection, record_ids)
            if purged_at is not None:
                note_purged(connection, record_ids, purged_at)

    def reprocess_after(self, after_id: int) -> None:
        """Make every row above an id pending, whatever became of it."""
        self.ledger.forget_done(after_id)
        if not self.source.has_marks:
            return
        with writing(self.source_engine, what=f"clear marks of {self.source.name!r}") as connection:
            self.source.clear_marks(connection, after_id)

    def num_pending(self, id_range: IdRange) -> int:
        """The records of a range that a run would process now, if a person launched it: no floor holds there."""
        rows = self._planned(id_range, None)
        return sum(is_pending(planned.row.video.record_id, planned.status, floor_id=None) for planned in rows)

    def summary(self, id_range: IdRange) -> str:
        """A range in words: how many of its records are done, failed, parked, pending."""
        counts = Counter(_SUMMARY[planned.status] for planned in self._planned(id_range, None))
        return ", ".join(f"{counts[name]} {name}" for name in ("done", "pending", "failed", "parked"))

    def status(self, *, floor_id: int | None = None) -> dict[str, int | str | None]:
        """The whole table in numbers; the keys are stable.

        With marks, a row that they say is done counts as done, even one that the ledger does not know; without
        marks, the ledger counts. A failed record whose wait is over counts as failed and as pending. Rows at or below
        the cursor's floor are not pending.
        """
        counts, extent, eligible = self.ledger.counts(), self.source.extent(), self.source.count()
        unmarked = self.source.count_unmarked()
        done = counts.get("done", 0) if unmarked is None else eligible - unmarked
        return {
            "source_table": self.source.name,
            "first_id": extent[0] if extent else None,
            "last_id": extent[1] if extent else None,
            "eligible": eligible,
            "done": done,
            "failed": counts.get("failed", 0),
            "parked": counts.get("parked", 0),
            "pending": count_pending(self, floor_id=floor_id, now=datetime.now(UTC)),
        }

    def _mark(self, step: Step, plan: Mapping[int, PlannedRow], entries: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Write the ledger and the source's marks, both only of rows that still have the claim of the plan.

        In one transaction where they share a database. In two, the ledger comes first: a crash in between leaves a row
        that is done and not marked, which is processed once more. The marks are then set while the entries are
        locked, so that our mark does not come after another claim: a marked row whose entry is not done would be
        found by its entry, but one that was forgotten has none.
        """
        claims = {key: plan[key].claim for key in entries}
        versions = {key: plan[key].source_version for key in entries}

        def write(connection: sa.Connection, source_versions: Mapping[int, str]) -> None:
            rows = [{"record_id": key, "source_version": source_versions[key], **entries[key]} for key in sorted(won)]
            # A run that begins with vectors under a fresh ledger has counted no frames: each has a point.
            self.ledger.upsert(connection, rows, if_unknown=("num_frames",) if step == "embedded" else ())

        def mark(connection: sa.Connection, held: Iterable[int]) -> dict[int, tuple[str, str]]:
            return self.source.mark(connection, {key: versions[key] for key in held}, step=step)

        what = f"mark rows of {self.source.name!r}" if self.one_database else "write the ledger"
        with writing(self.state_engine, what=what) as connection:
            won = self.ledger.hold(connection, claims)
            stamped = mark(connection, won) if self.one_database else {}
            write(connection, versions | {key: after for key, (_, after) in stamped.items()})
        self._log_lost(entries, won)
        if won and not self.one_database and self.source.has_mark(step):
            self._touch_source_elsewhere({key: claims[key] for key in won}, mark)
        return won

    def _touch_source_elsewhere(
        self,
        claims: Mapping[int, int],
        touch: Callable[[sa.Connection, Collection[int]], Mapping[int, tuple[str, str]]],
    ) -> None:
        """Write to a source in another database, while the entries of those that still have their claim are locked."""
        with writing(self.state_engine, what="write the ledger") as ledger:
            held = self.ledger.hold(ledger, claims)
            with writing(self.source_engine, what=f"mark rows of {self.source.name!r}") as source:
                stamped = touch(source, held)
            self.ledger.restamp(ledger, stamped)

    def _log_lost(self, records: Iterable[int], won: Collection[int]) -> None:
        """Say once of each record that it was claimed by others since it was planned."""
        lost = sorted({key for key in records if key not in won} - self._lost)
        if lost:
            self._lost.update(lost)
            _log.warning(
                "Wrote nothing of records that a later run or command has claimed since they were planned: %s",
                ", ".join(map(str, lost)),
            )


def refuse_strangers(catalog: Catalog) -> None:
    """Refuse state tables that can't be of this source table: they know records, and none of those is in it.

    Raises:
        StateError: Says so.
    """
    try:
        known = catalog.ledger.first_ids(_LOOKED_AT)
    except SourceUnreachableError:  # there are none yet
        return
    if known and not catalog.source.existing(known):
        raise StateError(
            f"they know {len(known)} records or more, from {known[0]} on, and {catalog.source.name!r} has none of the "
            f"first {len(known)}",
            "It is another table: nothing was changed. Set EXTRACTION_STATE_SCHEMA or EXTRACTION_STATE_URL to a place "
            "of its own for it.",
        )


def open_catalog(settings: Settings, *, creates: bool = True, takes_over: bool = False) -> closing[Catalog]:
    """A catalog that gives its connections back at the end of a `with` block; see `Catalog`."""
    return closing(Catalog(settings, creates=creates, takes_over=takes_over))
