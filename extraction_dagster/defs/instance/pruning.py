"""What of Dagster's history is over goes: EXTRACTION_KEEP_RUNS.

run of 1-1000, in March       superseded in May: goes, with its events
run of 1-1000, in May         goes; its materializations stay, for the partitions page shows them
run of 1001-2000, in May      failed, and no run since: stays, for the partitions page shows it
"""

import time
from dataclasses import dataclass
from datetime import datetime

import dagster as dg

from extraction_dagster.defs.instance.private_api import (
    forget_run,
    forget_runless_events,
    has_sql_storages,
    live_backfills,
    newest_asset_events,
)
from extraction_dagster.defs.instance.runs import ASSETS, BACKFILL_TAG, ENDED, active_runs

JOBS = frozenset({"extraction_job", "embedding_job", "indexing_job", "reconcile_job"})
PROGRESS = dg.AssetKey("extraction_progress")
_OF_ASSETS = "__ASSET_JOB"  # Dagster's own: what is materialized in the UI, and by backfills
_OURS = frozenset({dg.AssetKey(name) for name in ASSETS} | {PROGRESS})
_PLANNED = dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED.value
_PAGE = 100
_MOST_EVENTS = 5_000


@dataclass(frozen=True, slots=True)
class Pruned:
    """What one look removed.

    Attributes:
        runs: Runs.
        events: Events that no run made.
        reached: The run after which the next look goes on, when time was up; None to begin with the oldest.
    """

    runs: int
    events: int
    reached: str | None


def prune(
    instance: dg.DagsterInstance, *, before: datetime, after: str | None = None, most_seconds: float = 20.0
) -> Pruned:
    """Remove this project's runs that ended before a moment, oldest first, and reports of progress made before it.

    Runs of other projects in the same instance stay, and so do those that a backfill or a retry that goes on refers to.

    Args:
        instance: The instance.
        before: Timezone-aware.
        after: Where an earlier look left off.
        most_seconds: How long to look.
    """
    if not has_sql_storages(instance):
        return Pruned(0, 0, None)
    started, removed = time.monotonic(), 0
    events = forget_runless_events(instance, PROGRESS, before=before, most=_MOST_EVENTS)
    backfills, parents = live_backfills(instance), _parents(instance)
    ended = dg.RunsFilter(statuses=ENDED, updated_before=before)
    while page := instance.get_run_records(ended, limit=_PAGE, ascending=True, cursor=after):
        for record in page:
            run = record.dagster_run
            is_in_use = run.run_id in parents or run.tags.get(BACKFILL_TAG) in backfills
            if not is_in_use and _is_ours(run) and _forget(instance, run):
                removed += 1
            else:
                after = run.run_id
            if time.monotonic() - started > most_seconds:
                return Pruned(removed, events, after)
    return Pruned(removed, events, None)


def _forget(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Remove a run, unless the partitions page shows that it failed."""
    shown = newest_asset_events(instance, run.run_id)
    made = {(asset, partition) for asset, partition, kind in shown.values() if kind != _PLANNED}
    asked = {(asset, partition) for asset, partition, kind in shown.values() if kind == _PLANNED}
    if run.status != dg.DagsterRunStatus.SUCCESS and asked - made:
        return False
    forget_run(instance, run.run_id, keep=shown)
    return True


def _is_ours(run: dg.DagsterRun) -> bool:
    if run.job_name in JOBS:
        return True
    keys = {*(run.asset_selection or ()), *(check.asset_key for check in run.asset_check_selection or ())}
    return run.job_name.startswith(_OF_ASSETS) and bool(keys) and keys <= _OURS


def _parents(instance: dg.DagsterInstance) -> set[str | None]:
    """The runs that active ones were launched again from."""
    return {run_id for run in active_runs(instance) for run_id in (run.parent_run_id, run.root_run_id)}
