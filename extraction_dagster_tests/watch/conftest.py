"""Figures of every kind, so that every metric there is shows."""

from datetime import UTC, datetime

import pytest

from extraction_dagster.watch.meter import Census, Figures, InstanceFigures, MirrorFigures
from extraction_dagster.watch.progress import Progress

CENSUS = Census(
    taken_at=1_748_780_000.0,
    seconds=1.5,
    rows={"done": 990, "pending": 4},
    lag_rows=17,
    frames=5000,
    points=4990,
    errors={("decode", "VideoOpenError"): 3, ("fetch", "SchemeError"): 1},
    collection_points=4991,
    collection_counted_at=1_748_780_001.0,
)
INSTANCE = InstanceFigures(
    cursor=None,
    runs={"queued": 3, "started": 2, "canceling": 0},
    ended_runs={"success": 7, "failure": 1, "canceled": 0},
    last_tick_at=1_748_779_990.5,
    is_switched_on=True,
    daemons={"sensor": True, "backfill": False},
    rates={"videos": 1.25, "frames": 6.5, "points": 6.0},
)
PROGRESS = Progress(
    last_processed_id=12345,
    frontier_id=13345,
    floor_id=-1,
    newest_id=13400,
    lag_rows=6,
    pending_rows=3,
    waiting_rows=1,
    failed_records=2,
    parked_records=4,
    moved_at=datetime.fromtimestamp(1_748_779_000, UTC),
    stalled_seconds=1000.0,
)


@pytest.fixture
def census():
    return CENSUS


@pytest.fixture
def figures():
    parts = {"dagster": True, "table": True, "cursor": True, "mirror": True}
    return Figures(1_748_780_000.0, 0.25, parts, INSTANCE, PROGRESS, MirrorFigures("behind", 12000))
