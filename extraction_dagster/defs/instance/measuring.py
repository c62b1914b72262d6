"""What Dagster's instance says of how far things are; each look-up is flat in partitions, runs and rows."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta

import dagster as dg

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.private_api import daemon_statuses
from extraction_dagster.defs.instance.runs import active_runs
from extraction_dagster.watch.figures import InstanceFigures

_LIVE = {
    "queued": (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED),
    "started": (dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED),
    "canceling": (dg.DagsterRunStatus.CANCELING,),
}
_ENDED = {
    "success": (dg.DagsterRunStatus.SUCCESS,),
    "failure": (dg.DagsterRunStatus.FAILURE,),
    "canceled": (dg.DagsterRunStatus.CANCELED,),
}
_RECENT = timedelta(hours=1)
_RATE_SECONDS = 900.0
_MOST_EVENTS = 200
_FEWEST_EVENTS = 5  # ranges that take long end seldom: fewer say little
# Where each rate is read: the asset, and the numbers in its metadata.
_MADE = {"qdrant_points": ("videos", "points"), "video_frames": ("frames",)}


class InstanceMeter:
    """Asks an instance, which is opened at the first question and stays open."""

    def __init__(self, open_instance: Callable[[], AbstractContextManager[dg.DagsterInstance]]) -> None:
        self._open_instance = open_instance
        self._opened = ExitStack()
        self._instance: dg.DagsterInstance | None = None

    def __call__(self) -> InstanceFigures:
        """Take the figures; whatever goes wrong, the instance is opened again next time."""
        try:
            if self._instance is None:
                self._instance = self._opened.enter_context(self._open_instance())
            return read_instance(self._instance)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the instance."""
        self._instance = None
        self._opened.close()


def read_instance(instance: dg.DagsterInstance) -> InstanceFigures:
    """Everything that an instance says."""
    store = CursorStore(instance)
    required = sorted(instance.get_required_daemon_types())
    statuses = daemon_statuses(instance, required)
    since = datetime.now(UTC) - _RECENT
    return InstanceFigures(
        cursor=store.read(),
        runs={name: instance.get_runs_count(dg.RunsFilter(statuses=statuses)) for name, statuses in _LIVE.items()},
        ended_runs={
            name: instance.get_runs_count(dg.RunsFilter(statuses=statuses, updated_after=since))
            for name, statuses in _ENDED.items()
        },
        last_tick_at=store.last_tick_at(),
        is_switched_on=store.is_switched_on(),
        daemons={kind.lower(): bool(status.healthy) for kind, status in statuses.items()},
        rates=recent_rates(instance, now=time.time()),
    )


def video_rate(instance: dg.DagsterInstance) -> float | None:
    """Videos a second over the newest runs, as the metrics show it; None when none has ended lately."""
    return recent_rates(instance, now=time.time(), assets=["qdrant_points"]).get("videos")


def recent_rates(instance: dg.DagsterInstance, *, now: float, assets: Iterable[str] = tuple(_MADE)) -> dict[str, float]:
    """Videos, frames and points a second over the newest runs; none of them when no run has ended lately."""
    rates: dict[str, float] = {}
    for asset in assets:
        records, since = _newest(instance, dg.AssetKey(asset), now)
        for name in _MADE[asset] if records else ():
            made = sum(_number(record, name) for record in records)
            rates[name] = round(made / max(now - since, 1.0), 4)
    return rates


def _newest(instance: dg.DagsterInstance, asset: dg.AssetKey, now: float) -> tuple[Sequence[dg.EventLogRecord], float]:
    """The materializations that a rate is made of, and the moment since when they were made.

    Those of the last quarter of an hour; and where they are few, for ranges that take long, the newest five while runs
    are at work. Where nothing older than the oldest is known, that one only says since when.
    """

    def found(limit: int, after: float | None = None, before: float | None = None) -> Sequence[dg.EventLogRecord]:
        wanted = dg.AssetRecordsFilter(asset_key=asset, after_timestamp=after, before_timestamp=before)
        return instance.fetch_materializations(wanted, limit=limit).records

    start = now - _RATE_SECONDS
    records = found(_MOST_EVENTS, after=start)
    if _FEWEST_EVENTS <= len(records) < _MOST_EVENTS and found(1, before=start):
        return records, start
    if not records and not active_runs(instance):
        return (), start
    if len(records) < _FEWEST_EVENTS:
        records = found(_FEWEST_EVENTS)
    return (records[:-1], records[-1].timestamp) if records else ((), start)


def _number(record: dg.EventLogRecord, name: str) -> int:
    materialization = record.asset_materialization
    found = materialization.metadata.get(name) if materialization else None
    return found.value if found is not None and isinstance(found.value, int) else 0
