"""How far things are, in figures that cost the same whatever the table's size; and whether they get any further.

The sensor's own ticks stay as they are: somebody looks now and then, and remembers when something last moved.

    09:00   watermark 4,000, 900 rows due          moved: now
    09:30   watermark 4,000, a shard was marked    moved: when it was marked
    10:40   watermark 4,000, nothing since         stuck after an hour (EXTRACTION_STUCK_SECONDS)
    11:00   watermark 4,900, nothing due           moved: now
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.pending import scan
from extraction_dagster.ticks.memory import recall_text, remember_text

if TYPE_CHECKING:
    import sqlalchemy as sa

    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.ticks.cursor import CursorState

# What is counted row by row is counted no further: a chart shows a backlog as well by how far its ids reach.
MOST_COUNTED = 100_000
MOST_SCANNED = 20_000
_KEY = "progress_memory"


@dataclass(frozen=True, slots=True)
class Figures:
    """How far things are at one moment.

    Attributes:
        last_processed_id: The watermark.
        frontier_id: The end of the last range handed out.
        newest_id: The greatest eligible id.
        lag_ids: How far the watermark is behind the newest id; None before there is a watermark.
        lag_rows: Eligible rows above the watermark, up to `MOST_COUNTED`.
        pending_rows: Rows above the watermark that may be processed now, up to `MOST_SCANNED`.
        waiting_rows: Failed rows among them that wait for their next try.
        failed_records: All that failed and have tries left.
        parked_records: All that are not tried again until somebody says so.
    """

    last_processed_id: int | None = None
    frontier_id: int | None = None
    newest_id: int | None = None
    lag_ids: int | None = None
    lag_rows: int = 0
    pending_rows: int = 0
    waiting_rows: int = 0
    failed_records: int = 0
    parked_records: int = 0

    def numbers(self) -> dict[str, int]:
        """Those that there are, by name; the names are stable."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether things get any further.

    Attributes:
        figures: How far they are.
        moved_at: When something last moved, or when nothing was left to do.
        is_stuck: Rows are due, and nothing has moved for `stuck_seconds`.
    """

    figures: Figures
    moved_at: datetime
    is_stuck: bool


@dataclass(slots=True)
class ProgressMemory:
    """What one look remembers of the looks before; none of it matters for what is right.

    Attributes:
        last_processed_id: The watermark that was seen last.
        moved_at: When something last moved.
        reported_at: When figures were last reported.
        reported: Which.
    """

    last_processed_id: int | None = None
    moved_at: datetime | None = None
    reported_at: datetime | None = None
    reported: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """As it is kept."""
        moved, reported = (moment and moment.isoformat() for moment in (self.moved_at, self.reported_at))
        values = {"watermark": self.last_processed_id, "moved_at": moved, "reported_at": reported}
        return json.dumps({**values, "reported": self.reported})

    @classmethod
    def from_json(cls, text: str) -> ProgressMemory:
        """Read what is kept; nothing is remembered when it can't be read."""
        try:
            values = json.loads(text)
            times = (values["moved_at"], values["reported_at"])
            moved, reported = (moment and datetime.fromisoformat(moment) for moment in times)
            return cls(values["watermark"], moved, reported, dict(values["reported"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls()


def recall_progress(engine: sa.Engine) -> ProgressMemory:
    """What the last look left."""
    kept = recall_text(engine, _KEY)
    return ProgressMemory() if kept is None else ProgressMemory.from_json(kept)


def remember_progress(engine: sa.Engine, memory: ProgressMemory) -> None:
    """Keep it for the next look."""
    remember_text(engine, _KEY, memory.to_json())


def look(catalog: Catalog, cursor: CursorState | None, memory: ProgressMemory, *, now: datetime) -> Standing:
    """Take the figures, and see whether anything has moved since the last look.

    Args:
        catalog: The source table and the ledger.
        cursor: The sensor's; None before its first tick.
        memory: Of the last look; what moved is noted in it.
        now: Timezone-aware.
    """
    figures = _figures(catalog, cursor)
    moved = [memory.moved_at, _last_mark(catalog, cursor)]
    if figures.pending_rows == 0 or memory.moved_at is None or memory.last_processed_id != figures.last_processed_id:
        moved.append(now)
    memory.moved_at = max(moment for moment in moved if moment is not None)
    memory.last_processed_id = figures.last_processed_id
    is_stuck = now - memory.moved_at >= timedelta(seconds=catalog.settings.stuck_seconds)
    return Standing(figures, memory.moved_at, is_stuck)


def _figures(catalog: Catalog, cursor: CursorState | None) -> Figures:
    source, after = catalog.source, _after(cursor)
    newest = source.newest_id()
    ahead = scan(catalog, after_id=after, up_to_id=None, budget=MOST_SCANNED)
    stopped = catalog.ledger.count_stopped()
    due = len(ahead.due_ids)
    return Figures(
        last_processed_id=cursor.last_processed_id if cursor else None,
        frontier_id=cursor.frontier_id if cursor else None,
        newest_id=newest,
        lag_ids=None if newest is None or after is None else max(newest - after, 0),
        lag_rows=source.count_next(after, MOST_COUNTED),
        pending_rows=due,
        waiting_rows=len(ahead.unfinished) - due,
        failed_records=stopped["failed"],
        parked_records=stopped["parked"],
    )


def _after(cursor: CursorState | None) -> int | None:
    """Where rows begin that are anybody's business: above the watermark, or above the operator's floor."""
    bounds = [bound for bound in (cursor.last_processed_id, cursor.floor_id) if bound is not None] if cursor else []
    return max(bounds, default=None)


def _last_mark(catalog: Catalog, cursor: CursorState | None) -> datetime | None:
    """When a row between the watermark and the frontier was last marked: a long range moves long before its end."""
    if cursor is None or cursor.frontier_id is None:
        return None
    after = _after(cursor)
    first = -(2**63) if after is None else after + 1
    if first > cursor.frontier_id:
        return None
    return catalog.ledger.last_change(IdRange(first, cursor.frontier_id), MOST_COUNTED)
