"""What Dagster's instance says of how far things are; each look-up is flat in partitions, runs and rows."""

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import dagster as dg

from extraction_dagster.defs.instance.cursor_store import CursorStore
from extraction_dagster.defs.instance.launching import open_instance
from extraction_dagster.defs.instance.private_api import daemon_statuses
from extraction_dagster.defs.instance.runs import recent_rates
from extraction_dagster.settings import Settings
from extraction_dagster.watch.meter import InstanceFigures

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


class InstanceMeter:
    """Asks an instance, which is opened at the first question and stays open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened = ExitStack()
        self._instance: dg.DagsterInstance | None = None

    def __call__(self) -> InstanceFigures:
        """Take the figures; whatever goes wrong, the instance is opened again next time."""
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
        rates=recent_rates(instance),
    )
