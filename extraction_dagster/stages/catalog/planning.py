"""A planned row, and what becomes of its ledger entry when a run or a command takes the row up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from extraction_dagster.stages.catalog.ledger import LedgerEntry

if TYPE_CHECKING:
    from extraction_dagster.records import VideoRow
    from extraction_dagster.stages.catalog.pending import Status
    from extraction_dagster.stages.catalog.source_rows import SourceRow


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
        """The row with its claim and its full content version: the source's version, and its revision."""
        if self.entry is None:
            return self.row.video
        return replace(self.row.video, content_version=self.content_version, claim=self.claim)

    @property
    def claim(self) -> int:
        """The number under which it was planned; 0 when the ledger did not know it."""
        return 0 if self.entry is None else self.entry.claim

    @property
    def content_version(self) -> str:
        """Names what is decoded: the source's version, and the revision."""
        if self.entry is None:
            return self.source_version
        if self.entry.source_version == self.source_version:
            return self.entry.content_version
        return _content_version(self.source_version, self.entry.revision)

    @property
    def address(self) -> str:
        """16 hex digits of the file's address; empty when it is not known."""
        return self.row.video.address

    @property
    def source_version(self) -> str:
        """The version column, as it was read."""
        return self.row.video.content_version


@dataclass(frozen=True, slots=True)
class Moved:
    """Done rows whose address has changed.

    Attributes:
        record_ids: In ascending order.
        reached_id: The last id looked at when the budget ended the look; None when the whole window was looked at.
    """

    record_ids: tuple[int, ...]
    reached_id: int | None


def _content_version(source_version: str, revision: int) -> str:
    return f"{source_version}~{revision}" if revision else source_version


def is_wanted(planned: PlannedRow, force: bool, revises: bool) -> bool:  # noqa: FBT001 - as begin has them
    """Whether a run that begins takes up a row."""
    if planned.status == "todo" or (force and revises):
        return True
    if planned.status == "again":
        return revises
    return force and planned.entry is not None


def taken_up(
    planned: PlannedRow, entry: LedgerEntry, *, force: bool, revises: bool, retries: bool = False
) -> LedgerEntry:
    """The entry of a row that a run takes up.

    One whose file is another now gets a new revision: what an earlier release stored of it says no address.
    """
    has_moved = bool(planned.address) and entry.address not in {None, "", planned.address}
    is_forced = force and not (retries and planned.status == "todo")  # what is retried has revised it
    if revises and (is_forced or planned.status == "again" or has_moved):
        return revised(planned, entry)
    if force and entry.state in {"failed", "parked"}:
        return replace(entry, state="todo", attempts=0, not_before=None)
    return entry


def revised(planned: PlannedRow, entry: LedgerEntry) -> LedgerEntry:
    """The entry with a new revision: whatever is stored of the row is made again."""
    revision = entry.revision + 1
    return replace(
        entry,
        state="todo",
        source_version=planned.source_version,
        content_version=_content_version(planned.source_version, revision),
        revision=revision,
        address=planned.address or entry.address,
        attempts=0,
        not_before=None,
    )


def fresh_entry(planned: PlannedRow, *, claim: int, claimed_by: str | None) -> LedgerEntry:
    """The entry of a row that the ledger does not know yet."""
    video = planned.row.video
    version = video.content_version
    return LedgerEntry(
        video.record_id,
        "todo",
        source_version=version,
        content_version=version,
        claim=claim,
        claimed_by=claimed_by,
    )


def made_pending(entry: LedgerEntry) -> LedgerEntry:
    """The entry of a row whose points are to be written again from what is stored."""
    return replace(entry, state="todo", attempts=0, not_before=None, claim=entry.claim + 1, claimed_by=None)
