"""The figures, as they are taken; `exposition.py` gives them their names.

Most cost the same whatever the table's size and are taken at each scrape. The census counts every row: it is taken now
and then, and says when.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class InstanceFigures:
    """What Dagster's instance says.

    Attributes:
        cursor: The sensor's cursor as it is stored; None before the first tick.
        runs: Runs that have not ended, by status.
        ended_runs: Runs that ended within the last hour, by status.
        last_tick_at: When the sensor last ticked, in seconds since the epoch; None before the first tick.
        is_switched_on: Whether nobody has stopped the sensor.
        daemons: Whether each daemon that is needed lives.
        rates: Videos, frames and points a second over the last minutes.
    """

    cursor: str | None
    runs: Mapping[str, int]
    ended_runs: Mapping[str, int]
    last_tick_at: float | None
    is_switched_on: bool
    daemons: Mapping[str, bool]
    rates: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TableFigures:
    """What the source table and the ledger say, without counting them.

    Attributes:
        last_processed_id: The watermark; None before the first.
        frontier_id: The end of the last range handed out.
        floor_id: The operator's floor.
        newest_id: The greatest eligible id.
        lag_rows: Eligible rows above the watermark; None when there are too many to count at each scrape.
        due_rows: Rows among them that may be processed now, up to a limit.
        waiting_rows: Failed rows among them that wait for their next try.
        stopped: Every failed and every parked row, by state.
        moved_at: When something last moved, or nothing was left to do, as far as was seen; since the epoch.
        stalled_seconds: How long ago that was, while rows are due; else 0.
    """

    last_processed_id: int | None
    frontier_id: int | None
    floor_id: int | None
    newest_id: int | None
    lag_rows: int | None
    due_rows: int
    waiting_rows: int
    stopped: Mapping[str, int]
    moved_at: float
    stalled_seconds: float


@dataclass(frozen=True, slots=True)
class MirrorFigures:
    """The mirror of the checkpoint, beside the cursor.

    Attributes:
        state: ok, missing, behind, ahead, corrupt, unreachable.
        last_processed_id: What it says.
    """

    state: str
    last_processed_id: int | None


@dataclass(frozen=True, slots=True)
class Census:
    """Every row counted.

    Attributes:
        taken_at: When, in seconds since the epoch.
        seconds: How long it took.
        rows: Eligible rows by state: done, pending.
        lag_rows: Eligible rows above the watermark.
        frames: Stored frames of the rows that are done.
        points: Verified points of the rows that are done.
        errors: Errors ever recorded, by stage and type.
        collection_points: What the collection holds; None when it could not be asked.
        collection_counted_at: When it was last asked; None when it never could be.
        collection_is_up: Whether the collection could be asked, or is merely held by a run.
    """

    taken_at: float
    seconds: float
    rows: Mapping[str, int]
    lag_rows: int
    frames: int
    points: int
    errors: Mapping[tuple[str, str], int] = field(default_factory=dict)
    collection_points: int | None = None
    collection_counted_at: float | None = None
    collection_is_up: bool = True


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that one scrape shows; what could not be read is None.

    Attributes:
        at: When, in seconds since the epoch.
        seconds: How long it took, without the census.
        parts: Whether each part could be read: table, dagster, cursor, and mirror where there is one.
        instance: Dagster's part.
        table: The table's part.
        mirror: The mirror's part.
    """

    at: float
    seconds: float
    parts: Mapping[str, bool]
    instance: InstanceFigures | None = None
    table: TableFigures | None = None
    mirror: MirrorFigures | None = None
