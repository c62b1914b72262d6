"""What is to do in a range of ids, and how it is marked once it is done: the source table and the ledger together."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from extraction_dagster.stages.catalog.database import make_engine, writing
from extraction_dagster.stages.catalog.ledger import Fingerprints, Ledger, LedgerEntry, State
from extraction_dagster.stages.catalog.pending import Status, count_pending, is_pending, status_of
from extraction_dagster.stages.catalog.source_table import SourceRow, SourceTable, Step
from extraction_dagster.stages.catalog.state_tables import prepare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import sqlalchemy as sa

    from extraction_dagster.records import Failure, IdRange, VideoRow
    from extraction_dagster.settings import Settings

# What became of a record, by its status; a failed one whose wait is over is pending.
_SUMMARY = {"done": "done", "todo": "pending", "again": "pending", "waiting": "failed", "parked": "parked"}
__all__ = ["Catalog", "Fingerprints", "PlannedRow", "Status", "open_catalog", "status_of"]


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row, what the ledger says of it, and what is to be done with it.

    Attributes:
        row: As the source table has it.
        entry: As the ledger has it, or None.
        status: `todo`: to be processed; `again`: was done, and its mark was cleared since; `waiting`: failed, and its
            next try is later; `parked`: failed, and not tried until somebody says so; `done`.
    """

    row: SourceRow
    entry: LedgerEntry | None
    status: Status

    @property
    def video(self) -> VideoRow:
        """The row with its full content version: the source's version, and its revision."""
        if self.entry is not None and self.entry.source_version == self.source_version:
            return replace(self.row.video, content_version=self.entry.content_version)
        revision = self.entry.revision if self.entry else 0
        return replace(self.row.video, content_version=_content_version(self.row.video.content_version, revision))

    @property
    def source_version(self) -> str:
        """The version column, as it was read."""
        return self.row.video.content_version


def _content_version(source_version: str, revision: int) -> str:
    return f"{source_version}~{revision}" if revision else source_version


class Catalog:
    """The rows of the source table with what is known of each.

    Opening it reflects and checks the source table, and makes or migrates the state tables.

    Raises:
        SourceTableError, SourceUnreachableError, DatabaseUrlError, PredicateError, StateError: What they say.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.source_engine = make_engine(settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
        self.source = SourceTable(self.source_engine, settings)
        self.one_database = settings.resolved_state_url == settings.resolved_source_url
        self.state_engine = (
            self.source_engine
            if self.one_database
            else make_engine(settings.resolved_state_url, setting="EXTRACTION_STATE_URL")
        )
        self.ledger = Ledger(self.state_engine)
        prepare(self.state_engine, self.source.identity)

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
            status = status_of(row.video.content_version, row.marked_done, entry, fingerprints, now=now)
            yield PlannedRow(row, entry, status)

    def begin(self, id_range: IdRange, fingerprints: Fingerprints, *, force: bool = False) -> dict[int, PlannedRow]:
        """Plan a range; rows whose mark was cleared get a new revision, so that they are decoded again.

        With `force`, so does every row that was finished or has failed before.
        """
        plan = self.plan(id_range, fingerprints)
        revised = [item for item in plan.values() if item.status == "again" or (force and item.status != "todo")]
        if not revised:
            return plan
        self.ledger.write([_next_revision(planned) for planned in revised])
        return self.plan(id_range, fingerprints)

    def mark_extracted(self, plan: Mapping[int, PlannedRow], num_frames: Mapping[int, int], frames: str) -> None:
        """Mark rows of a plan whose frames are stored: their number by record, and their fingerprint."""
        entries = {
            record_id: {
                "state": "extracted",
                "content_version": plan[record_id].video.content_version,
                "frames_fingerprint": frames,
                "num_frames": number,
                "not_before": None,
            }
            for record_id, number in num_frames.items()
        }
        self._mark("extracted", plan, entries)

    def mark_embedded(self, records: Iterable[int], embedding: str) -> None:
        """Note rows whose vectors are stored; the source's mark waits until their points are verified."""
        self.ledger.write(
            [{"record_id": key, "state": "embedded", "embedding_fingerprint": embedding} for key in records]
        )

    def mark_done(
        self,
        plan: Mapping[int, PlannedRow],
        num_points: Mapping[int, int],
        fingerprints: Fingerprints,
        *,
        generations: Mapping[int, str] | None = None,
    ) -> set[int]:
        """Mark rows of a plan whose points were verified, by record; this is the last thing that happens to a row.

        Returns:
            The rows that were marked: those that nobody else has claimed since they were planned.
        """
        entries = {
            record_id: {
                "state": "done",
                "content_version": plan[record_id].video.content_version,
                "frames_fingerprint": fingerprints.frames,
                "embedding_fingerprint": fingerprints.embedding,
                "num_points": number,
                "generation": (generations or {}).get(record_id),
                "attempts": 0,
                "not_before": None,
                "last_error": None,
            }
            for record_id, number in num_points.items()
        }
        self._mark("embedded", plan, entries)
        return set(num_points)

    def record_failures(
        self, plan: Mapping[int, PlannedRow], failures: Iterable[Failure], *, run_id: str
    ) -> dict[int, State]:
        """Write failures down; each record is tried again later, or parked. Returns each record's new state."""
        failures = list(failures)
        return self.ledger.record_failures(
            failures,
            {failure.record_id: plan[failure.record_id].source_version for failure in failures},
            run_id=run_id,
            max_attempts=self.settings.max_attempts,
            retry_delay_seconds=self.settings.retry_delay_seconds,
        )

    def make_pending(self, record_ids: Sequence[int]) -> None:
        """Make records pending whose points are not there; their stored frames and vectors are used.

        The mark is cleared first: a crash in between leaves a cleared mark, which is pending as well.
        """
        entries = [
            {"record_id": record_id, "state": "todo", "attempts": 0, "not_before": None} for record_id in record_ids
        ]
        if not self.settings.source_read_only and not self.one_database:
            with writing(self.source_engine, what=f"mark rows of {self.source.name!r}") as connection:
                self.source.unmark(connection, record_ids)
        with writing(self.state_engine, what="write the ledger") as connection:
            self.ledger.upsert(connection, entries)
            if self.one_database:
                self.source.unmark(connection, record_ids)

    def forget(self, record_ids: Sequence[int]) -> None:
        """Forget records that were deleted from the source table."""
        with writing(self.state_engine, what="write the ledger") as connection:
            self.ledger.remove(connection, record_ids)

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

    def _mark(self, step: Step, plan: Mapping[int, PlannedRow], entries: Mapping[int, Mapping[str, Any]]) -> None:
        """Write the ledger and the source's marks: in one transaction where they share a database.

        In two databases the ledger comes first: a crash in between leaves a row that is done and not marked, which
        is processed once more; the other order would leave a marked row that the ledger never finished.
        """
        versions = {record_id: plan[record_id].source_version for record_id in entries}

        def write(connection: sa.Connection, source_versions: Mapping[int, str]) -> None:
            seen = {**versions, **source_versions}
            rows = [{"record_id": key, "source_version": seen[key], **entry} for key, entry in entries.items()]
            self.ledger.upsert(connection, rows)

        if self.one_database:
            with writing(self.source_engine, what=f"mark rows of {self.source.name!r}") as connection:
                write(connection, self.source.mark(connection, versions, step=step))
            return
        with writing(self.state_engine, what="write the ledger") as connection:
            write(connection, versions)
        if not self.source.has_marks:
            return
        with writing(self.source_engine, what=f"mark rows of {self.source.name!r}") as connection:
            stamped = self.source.mark(connection, versions, step=step)
        if any(versions[record_id] != version for record_id, version in stamped.items()):
            with writing(self.state_engine, what="write the ledger") as connection:
                write(connection, stamped)


def _next_revision(planned: PlannedRow) -> dict[str, object]:
    revision = (planned.entry.revision if planned.entry else 0) + 1
    return {
        "record_id": planned.row.video.record_id,
        "state": "todo",
        "source_version": planned.source_version,
        "content_version": _content_version(planned.source_version, revision),
        "revision": revision,
        "attempts": 0,
        "not_before": None,
    }


def open_catalog(settings: Settings) -> closing[Catalog]:
    """A catalog that gives its connections back at the end of a `with` block."""
    return closing(Catalog(settings))
