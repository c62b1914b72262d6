"""Dagster's part of the metrics: the cursor, runs, ticks, daemons and rates; flat in partitions, runs and rows."""

import time
from collections import Counter
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import dagster as dg

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.defs.instance.private_api import daemon_statuses
from extraction_dagster.settings import Settings
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
# Where each rate is read: the asset, and the number in its metadata.
_MADE = {"videos": "qdrant_points", "frames": "video_frames", "points": "qdrant_points"}


class InstanceMeter:
    """Asks an instance, which stays open from one time to the next."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened before the first question."""
        self._settings = settings
        self._opened = ExitStack()
        self._instance: dg.DagsterInstance | None = None

    def __call__(self) -> InstanceFigures:
        """Take the figures; whatever goes wrong, the instance is opened anew next time."""
        try:
            if self._instance is None:
                self._instance = self._opened.enter_context(open_instance(self._settings))
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


def recent_rates(instance: dg.DagsterInstance, *, now: float) -> dict[str, float]:
    """Videos, frames and points a second over the last quarter of an hour; shorter where very many runs ended in it."""
    made, seconds = Counter[str](), dict[str, float]()
    for asset in sorted(set(_MADE.values())):
        wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), after_timestamp=now - _RATE_SECONDS)
        records = instance.fetch_materializations(wanted, limit=_MOST_EVENTS).records
        whole = len(records) < _MOST_EVENTS
        seconds[asset] = _RATE_SECONDS if whole else max(now - min(record.timestamp for record in records), 1.0)
        for record in records:
            metadata = record.asset_materialization.metadata if record.asset_materialization else {}
            for name in (name for name, source in _MADE.items() if source == asset and name in metadata):
                value = metadata[name].value
                made[name] += value if isinstance(value, int) else 0
    return {name: made[name] / seconds[asset] for name, asset in _MADE.items()}
