"""How far things are, in one record for `extraction status`, the charts of the UI, and Prometheus.

A look costs the same whatever the table's size. It also says whether anything moves: the looks of the sensor and of the
metrics remember where the watermark was, in the state database, and so share one memory.

    09:00   watermark 4,000, 900 rows pending      moved: now
    09:30   watermark 4,000, a shard was marked    moved: when it was marked
    10:40   watermark 4,000, nothing since         stuck after an hour (EXTRACTION_STUCK_SECONDS)
    11:00   watermark 4,900, nothing pending       moved: now
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.pending import scan
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.memory import recall_text, remember_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    import sqlalchemy as sa

    from extraction_dagster.stages.catalog.catalog import Catalog

# Rows are counted up to these limits at each look: beyond them, a chart shows a backlog by how far its ids reach.
MOST_COUNTED = 100_000
MOST_SCANNED = 20_000
_MOST_LOOKS = 10  # of so many rows
_KEY = "progress_memory"
_REPORT_KEY = "progress_reported"
_NOT_CHARTED = {"moved_at", "stalled_seconds", "is_stuck"}
# The rate is another one at each look: it alone is no reason to report.
_UNSTEADY = {"videos_per_second", "eta_seconds"}
# While nothing changes, it is reported a few times within the time after which silence counts as standing still.
_REPORTS_PER_STUCK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far things are at one moment.

    Attributes:
        last_processed_id: The watermark.
        frontier_id: The end of the last range handed out.
        floor_id: The operator's floor.
        newest_id: The greatest eligible id.
        lag_ids: How far the watermark is behind the newest id; None before there is a watermark.
        lag_rows: Eligible rows above the watermark and the floor that are neither done nor parked, up to
            `MOST_COUNTED`; done ones count from there on.
        pending_rows: Rows among them that may be processed now; rows are looked at up to `MOST_SCANNED`,
            and further while none of them is pending.
        waiting_rows: Failed rows among them that wait for their next try.
        failed_records: All that failed and have tries left.
        parked_records: All that are not tried again until somebody says so.
        active_runs: Runs that are queued or at work.
        videos_per_second: Over the newest runs; None when none has ended lately.
        moved_at: When something last moved, or when nothing was pending.
        stalled_seconds: How long ago that was.
        is_stuck: Rows are pending, and nothing has moved for `stuck_seconds`.
    """

    last_processed_id: int | None = None
    frontier_id: int | None = None
    floor_id: int | None = None
    newest_id: int | None = None
    lag_ids: int | None = None
    lag_rows: int = 0
    pending_rows: int = 0
    waiting_rows: int = 0
    failed_records: int = 0
    parked_records: int = 0
    active_runs: int = 0
    videos_per_second: float | None = None
    moved_at: datetime
    stalled_seconds: float = 0.0
    is_stuck: bool = False

    @property
    def after_id(self) -> int | None:
        """Above which id rows lag: the watermark, or the operator's floor where that is higher."""
        return _highest(self.last_processed_id, self.floor_id)

    @property
    def is_lag_counted(self) -> bool:
        """Whether `lag_rows` is the whole lag."""
        return self.lag_rows < MOST_COUNTED

    @property
    def eta_seconds(self) -> int | None:
        """When nothing will be pending; None where that is not known, or where not every row was looked at."""
        is_counted = self.pending_rows + self.waiting_rows < MOST_SCANNED
        return eta_seconds(self.pending_rows, self.videos_per_second) if is_counted else None

    def numbers(self) -> dict[str, float]:
        """What the charts of the UI show; the names are stable, and what is not known is left out."""
        values = {**asdict(self), "eta_seconds": self.eta_seconds}
        return {name: value for name, value in values.items() if value is not None and name not in _NOT_CHARTED}


@dataclass(slots=True)
class ProgressMemory:
    """What a look remembers of the looks before; when it is lost, only a stall is noticed later.

    Attributes:
        last_processed_id: The watermark that was seen last.
        moved_at: When something last moved.
    """

    last_processed_id: int | None = None
    moved_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What was last reported to the charts of the UI.

    Attributes:
        at: When; None when it was not yet, or when that can't be read.
        steady: The figures, without those that differ at each look.
    """

    at: datetime | None = None
    steady: Mapping[str, float] = field(default_factory=dict)

    def is_outdated(self, progress: Progress, *, now: datetime, stuck_seconds: float) -> bool:
        """Whether to report again: something changed, or it is long ago."""
        if self.at is None or _steady(progress) != self.steady:
            return True
        return now - self.at >= timedelta(seconds=stuck_seconds / _REPORTS_PER_STUCK)


def _steady(progress: Progress) -> dict[str, float]:
    return {name: value for name, value in progress.numbers().items() if name not in _UNSTEADY}


def last_report(engine: sa.Engine) -> Report:
    """What was last reported."""
    try:
        values = json.loads(recall_text(engine, _REPORT_KEY) or "")
        return Report(datetime.fromisoformat(values["at"]), dict(values["numbers"]))
    except (ValueError, KeyError, TypeError):
        return Report()


def remember_report(engine: sa.Engine, progress: Progress, *, now: datetime) -> None:
    """Note what is reported now."""
    remember_text(engine, _REPORT_KEY, json.dumps({"at": now.isoformat(), "numbers": _steady(progress)}))


def eta_seconds(pending: int, videos_per_second: float | None) -> int | None:
    """How long pending rows take at a rate; None without one."""
    if not pending:
        return 0
    return round(pending / videos_per_second) if videos_per_second else None


def recall_progress(engine: sa.Engine) -> ProgressMemory:
    """What the last look left; nothing is remembered when it can't be read."""
    try:
        values = json.loads(recall_text(engine, _KEY) or "")
        moved_at = values["moved_at"]
        return ProgressMemory(values["watermark"], moved_at and datetime.fromisoformat(moved_at))
    except (ValueError, KeyError, TypeError):
        return ProgressMemory()


def remember_progress(engine: sa.Engine, memory: ProgressMemory) -> None:
    """Keep it for the next look."""
    moved_at = memory.moved_at and memory.moved_at.isoformat()
    remember_text(engine, _KEY, json.dumps({"watermark": memory.last_processed_id, "moved_at": moved_at}))


def take_look(
    catalog: Catalog, stored: str | None, *, now: datetime, active_runs: int, videos_per_second: float | None
) -> Progress:
    """Measure with the cursor as it is stored, and remember the look for the next one.

    Raises:
        CursorError: The cursor can't be used.
    """
    memory = recall_progress(catalog.state_engine)
    cursor = CursorState.from_json(stored, source=catalog.source.identity) if stored else None
    progress = measure_progress(
        catalog, cursor, memory, now=now, active_runs=active_runs, videos_per_second=videos_per_second
    )
    remember_progress(catalog.state_engine, memory)
    return progress


def measure_progress(  # noqa: PLR0913 - the table, the cursor, and what Dagster's instance says
    catalog: Catalog,
    cursor: CursorState | None,
    memory: ProgressMemory,
    *,
    now: datetime,
    active_runs: int = 0,
    videos_per_second: float | None = None,
) -> Progress:
    """Take one look, and see whether anything has moved since the last one.

    Args:
        catalog: The source table and the ledger.
        cursor: The sensor's; None before its first tick.
        memory: Of the last look; what moved is noted in it.
        now: Timezone-aware.
        active_runs: Runs that are queued or at work.
        videos_per_second: Over the newest runs.
    """
    cursor = cursor or CursorState(catalog.source.identity)
    last, frontier, floor = cursor.last_processed_id, cursor.frontier_id, cursor.floor_id
    after, newest = _highest(last, floor), catalog.source.newest_id()
    (pending, waiting, is_whole), stopped = _count_ahead(catalog, after), catalog.ledger.count_failed_and_parked()
    moved = [memory.moved_at, _last_mark(catalog, after, frontier)]
    if pending == 0 or memory.moved_at is None or memory.last_processed_id != last:
        moved.append(now)
    memory.moved_at = max(moment for moment in moved if moment is not None)
    memory.last_processed_id = last
    stalled_seconds = max((now - memory.moved_at).total_seconds(), 0.0)
    return Progress(
        last_processed_id=last,
        frontier_id=frontier,
        floor_id=floor,
        newest_id=newest,
        lag_ids=None if newest is None or after is None else max(newest - after, 0),
        lag_rows=pending + waiting if is_whole else max(pending + waiting, _count_lag(catalog, after)),
        pending_rows=pending,
        waiting_rows=waiting,
        failed_records=stopped["failed"],
        parked_records=stopped["parked"],
        active_runs=active_runs,
        videos_per_second=videos_per_second,
        moved_at=memory.moved_at,
        stalled_seconds=stalled_seconds,
        is_stuck=stalled_seconds >= catalog.settings.stuck_seconds,
    )


def whole_lag(catalog: Catalog, after_id: int | None, status: Mapping[str, int | str | None]) -> int:
    """The lag where it is more than `MOST_COUNTED`; reads the whole table.

    Args:
        catalog: The source table and the ledger.
        after_id: The watermark, or the floor above it.
        status: Of the catalog: every row counted.
    """
    eligible, *settled = (int(status[name] or 0) for name in ("eligible", "done", "parked"))
    return min(catalog.source.count_above(after_id), max(eligible - sum(settled), 0))


def _count_lag(catalog: Catalog, after_id: int | None) -> int:
    """The lag where more rows are ahead than are looked at one by one, from counts that end at `MOST_COUNTED`."""
    ahead = catalog.source.count_next(after_id, MOST_COUNTED)
    if ahead == MOST_COUNTED:
        return ahead
    settled = ("parked",) if catalog.source.has_marks else ("done", "parked")
    return ahead - catalog.ledger.count_next(settled, after_id, MOST_COUNTED)


def _count_ahead(catalog: Catalog, after_id: int | None) -> tuple[int, int, bool]:
    """Rows that may be processed now, and rows that wait: one look, and more while it finds none of the first.

    Returns whether that was all there is, as well.
    """
    pending = waiting = 0
    for _ in range(_MOST_LOOKS):
        found = scan(catalog, after_id=after_id, up_to_id=None, budget=MOST_SCANNED)
        pending += len(found.pending_ids)
        waiting += len(found.unfinished) - len(found.pending_ids)
        if pending or found.reached_id is None:
            break
        after_id = found.reached_id
    return pending, waiting, found.reached_id is None


def _highest(*ids: int | None) -> int | None:
    return max((number for number in ids if number is not None), default=None)


def _last_mark(catalog: Catalog, after_id: int | None, frontier_id: int | None) -> datetime | None:
    """When a row between the watermark and the frontier was last marked: a long range moves long before its end."""
    first = -(2**63) if after_id is None else after_id + 1
    if frontier_id is None or first > frontier_id:
        return None
    return catalog.ledger.last_change(IdRange(first, frontier_id), MOST_COUNTED)
