"""Runs of ranges, and the ranges of backfills, as a tick asks for them; flat in the number of partitions."""

import json
import logging
import re
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import dagster as dg

from extraction_dagster.defs.instance.glance import rates
from extraction_dagster.defs.instance.private_api import (
    GRPC_INFO_TAG,
    AssetGraphSubset,
    PartitionBackfill,
    daemon_statuses,
    engine_messages,
    free_slots,
    requested_backfills,
    slot_holders,
)
from extraction_dagster.defs.partitions import (
    PROCESS_RUN_TAG,
    PROCESS_TAG,
    host_of,
    is_dead,
    is_gone,
    is_here,
    valid_ranges,
)
from extraction_dagster.errors import ExtractionError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.database import make_engine
from extraction_dagster.stages.catalog.signs import silences
from extraction_dagster.ticks.places import History, Outcomes

_log = logging.getLogger(__name__)
ASSETS = ("video_frames", "frame_embeddings", "qdrant_points")  # in data order
PARTITION_TAG = "dagster/partition"
BACKFILL_TAG = "dagster/backfill"
_RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
_ACTIVE = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_AT_WORK = _ACTIVE[2:]
ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_BACKFILL_DAEMONS = ("BACKFILL", "QUEUED_RUN_COORDINATOR")
_LONGEST_SECONDS = 3 * 86_400.0  # of a run that does not say how long it may take
_SILENT = timedelta(hours=1)  # without a run: a backfill that nobody works off, although a daemon runs
_LOOK_BACK = 12
_LOOK_BACK_AT_ALL = 50
_STARTED_PROCESS = re.compile(r"Started process for run \(pid: (\d+)\)")  # Dagster's own words, before the first step
# Where each rate is read: the asset, and the numbers in its metadata.
_MADE = {"qdrant_points": ("videos", "points"), "video_frames": ("frames",)}


def active_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Every run that is queued or works, of ranges or not."""
    return list(instance.get_runs(dg.RunsFilter(statuses=_ACTIVE)))


def attended_runs(instance: dg.DagsterInstance, *, under_daemon: bool = False) -> list[dg.DagsterRun]:
    """Every run that works, or waits in the queue and will be started: without a daemon, those there wait for ever."""
    runs = active_runs(instance)
    waits = any(run.status == dg.DagsterRunStatus.QUEUED for run in runs)
    if not waits or under_daemon or has_backfill_daemons(instance):
        return runs
    return [run for run in runs if run.status != dg.DagsterRunStatus.QUEUED]


def fail_dead_runs(instance: dg.DagsterInstance) -> None:
    """End the runs whose process was killed, and free the pool slots that they held.

    Otherwise a run whose worker and code server were both killed would keep its range and its slots for ever. One whose
    process can't be seen from here, since its machine or container is another, is ended once it has given no sign of
    life for EXTRACTION_DEAD_AFTER_SECONDS.
    """
    records = instance.get_run_records(dg.RunsFilter(statuses=_ACTIVE))
    silent = {run.run_id: seconds for run, seconds in _silent(records)}
    for record in records:
        run = record.dagster_run
        with _alone(run):
            if why := _is_silent(run, silent.get(run.run_id)) or _has_died(instance, run) or _takes_too_long(record):
                instance.report_run_failed(run, f"{why}. Its range is asked for again and goes on where it was.")
                free_slots(instance, run.run_id)
    # The code server ends a run whose process was killed within a second; Dagster itself frees its slots minutes later,
    # and a pool of one would stand still until then.
    if holders := slot_holders(instance):
        for run in instance.get_runs(dg.RunsFilter(run_ids=list(holders), statuses=ENDED)):
            with _alone(run):
                if _has_lost_its_process(instance, run):
                    free_slots(instance, run.run_id)


def silent_runs(instance: dg.DagsterInstance) -> list[tuple[dg.DagsterRun, float]]:
    """The runs at work whose process can't be seen from here, and for how many seconds each gave no sign of life.

    One that never gave a sign counts from its start, by this machine's clock, and only after an hour.
    """
    return _silent(instance.get_run_records(dg.RunsFilter(statuses=_AT_WORK)))


def _silent(records: Iterable[dg.RunRecord]) -> list[tuple[dg.DagsterRun, float]]:
    at_work = (record for record in records if record.dagster_run.status in _AT_WORK)
    away = [record for record in at_work if (tag := _process_of(record.dagster_run)) and not is_here(tag)]
    if not away:
        return []
    settings = load_settings()
    engine = make_engine(
        settings.resolved_state_url, setting="EXTRACTION_STATE_URL", state_schema=settings.state_schema
    )
    try:
        since = silences(engine)
    except ExtractionError as error:  # the state database is away, and nobody is judged
        _log.warning("Runs of other machines can't be judged: %s", error)
        return []
    finally:
        engine.dispose()
    found = []
    for record in away:
        run = record.dagster_run
        began_at = record.start_time or record.create_timestamp.replace(tzinfo=UTC).timestamp()
        unknown = max(time.time() - began_at - _SILENT.total_seconds(), 0.0)
        found.append((run, since.get(run.run_id, unknown)))
    return found


@contextmanager
def _alone(run: dg.DagsterRun) -> Iterator[None]:
    """Whatever is odd about one run, its tags, its events or that it is gone by now, no tick ends for it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever Dagster and people write of runs
        _log.warning("Run %s can't be judged: %s", run.run_id, str(error).partition("\n")[0])


def _is_silent(run: dg.DagsterRun, seconds: float | None) -> str:
    """Why a run is taken for dead since it gave no sign of life; empty when it is not."""
    if seconds is None or seconds < load_settings().dead_after_seconds:
        return ""
    return f"It gave no sign of life for {seconds:.0f} s (it was at work on host {host_of(_process_of(run))})"


def _has_died(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """Why a run is taken for dead since its process is gone; empty when it is not. One that is queued has none."""
    if run.status == dg.DagsterRunStatus.NOT_STARTED:  # a command's own run, made and stopped before its first step
        is_gone_now = is_dead(_process_of(run))
    else:
        is_gone_now = run.status in _AT_WORK and _has_lost_its_process(instance, run)
    return "Its process is gone" if is_gone_now else ""


def _takes_too_long(record: dg.RunRecord) -> str:
    """Why a run of a range is taken for dead although its process can't be seen; empty when it is not."""
    run, began_at = record.dagster_run, record.start_time or record.create_timestamp.replace(tzinfo=UTC).timestamp()
    if run.status not in _AT_WORK or time.time() - began_at < _LONGEST_SECONDS or not range_of(run):
        return ""
    longest = max(_LONGEST_SECONDS, 2 * float(run.tags.get("dagster/max_runtime_seconds", 0)))
    return f"It has been at work for more than {longest:.0f} s" if time.time() - began_at >= longest else ""


def _has_lost_its_process(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    tag = _process_of(run)
    return is_dead(tag) if tag else _died_early(instance, run)


def _process_of(run: dg.DagsterRun) -> str:
    """The tag that names a run's process; empty before its first step."""
    return run.tags.get(PROCESS_TAG, "") if run.tags.get(PROCESS_RUN_TAG, run.run_id) == run.run_id else ""


def _died_early(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether a worker of this machine was killed before its first step, hence before it could tag its run."""
    info = json.loads(run.tags.get(GRPC_INFO_TAG, "{}"))
    if not isinstance(info, dict) or info.get("host") != "localhost":
        return False
    for message, moment in engine_messages(instance, run.run_id):
        if started := _STARTED_PROCESS.match(message):
            return is_gone(int(started[1]), until=moment + 1)
    return False


class InstanceRuns:
    """Answers a tick from a Dagster instance.

    Args:
        instance: The instance.
        under_daemon: Whether a daemon asks, so that its heartbeat need not be looked up.
    """

    def __init__(self, instance: dg.DagsterInstance, *, under_daemon: bool = False) -> None:
        self._instance, self._under_daemon = instance, under_daemon

    def active(self) -> list[IdRange]:
        """Ranges that have an active run of the sensor, a command or the UI; those of backfills are not among them."""
        fail_dead_runs(self._instance)
        return [found for run in self._runs() if BACKFILL_TAG not in run.tags and (found := range_of(run))]

    def backfilled(self) -> list[IdRange]:
        """Ranges that backfills take care of: an active run works on them, or a daemon will ask for one."""
        # Those that wait come first: a run that is asked for in between is seen twice, not overlooked.
        backfills = requested_backfills(self._instance)
        served = self._under_daemon or (bool(backfills) and has_backfill_daemons(self._instance))
        going_on = [backfill for backfill in backfills if served and _is_going_on(self._instance, backfill)]
        waiting = [id_range for backfill in going_on for id_range in waiting_ranges(self._instance, backfill)]
        at_work = (range_of(run) for run in self._runs() if BACKFILL_TAG in run.tags)
        return [*waiting, *filter(None, at_work)]

    def _runs(self) -> list[dg.DagsterRun]:
        return attended_runs(self._instance, under_daemon=self._under_daemon)

    def partitions(self, record_ids: Sequence[int]) -> Iterator[IdRange]:
        """The ranges that hold any of these ids, which ascend; a range of negative ids is always among them."""
        return valid_ranges(_near(record_ids, self._instance.get_dynamic_partitions("id_ranges")))

    def history(self, id_range: IdRange) -> History:
        """The ended runs of a range."""
        wanted = dg.RunsFilter(tags={PARTITION_TAG: id_range.partition_key}, statuses=ENDED)
        records = self._instance.get_run_records(wanted, limit=_LOOK_BACK)
        if not records:
            return History()
        statuses = [record.dagster_run.status for record in records]
        failures = next(
            (n for n, status in enumerate(statuses) if status != dg.DagsterRunStatus.FAILURE), len(statuses)
        )
        return History(failures_in_a_row=failures, ended_at=_ended_at(records[0]))

    def outcomes(self) -> Outcomes:
        """How the newest runs of all ranges ended."""
        records = self._instance.get_run_records(dg.RunsFilter(statuses=ENDED), limit=_LOOK_BACK_AT_ALL)
        ended = [record for record in records if range_of(record.dagster_run)]

        def newest(status: dg.DagsterRunStatus) -> datetime | None:
            return max((_ended_at(record) for record in ended if record.dagster_run.status == status), default=None)

        return Outcomes(newest(dg.DagsterRunStatus.SUCCESS), newest(dg.DagsterRunStatus.FAILURE))


def _ended_at(record: dg.RunRecord) -> datetime:
    seconds = record.end_time or record.update_timestamp.replace(tzinfo=UTC).timestamp()
    return datetime.fromtimestamp(seconds, UTC)


def range_of(run: dg.DagsterRun) -> IdRange | None:
    """The range that a run works on; of a run over several partitions, from the first id to the last."""
    keys = [run.tags[tag] for tag in (PARTITION_TAG, *_RANGE_TAGS) if tag in run.tags]
    ranges = list(valid_ranges(keys))
    if not ranges:
        return None
    return IdRange(min(item.first_id for item in ranges), max(item.last_id for item in ranges))


def _near(record_ids: Sequence[int], keys: Iterable[str]) -> Iterator[str]:
    """Keys that may hold an id: of 100,000 keys, few are left that have to be parsed with care."""
    for key in keys:
        first, _, last = key.partition("-")
        try:
            index = bisect_left(record_ids, int(first))
            if index == len(record_ids) or record_ids[index] > int(last):
                continue
        except ValueError:  # of negative ids, or no range at all
            pass
        yield key


def first_failure(events: Iterable[dg.DagsterEvent]) -> tuple[str, str]:
    """The step that failed first, and its own sentence; an empty name when the run was stopped before a step failed."""
    for event in events:
        if event.is_step_failure:
            data = event.step_failure_data
            if data.user_failure_data and data.user_failure_data.description:
                return str(event.step_key), data.user_failure_data.description
            if data.error:
                return str(event.step_key), f"{event.step_key}: {(data.error.cause or data.error).message.strip()}"
    return "", "the run was stopped before it ended"


def has_backfill_daemons(instance: dg.DagsterInstance) -> bool:
    """Whether daemons run that turn backfills into runs, and start them."""
    statuses = daemon_statuses(instance, _BACKFILL_DAEMONS)
    return all(status.healthy or not status.required for status in statuses.values())


def waiting_ranges(instance: dg.DagsterInstance, backfill: PartitionBackfill) -> Iterator[IdRange]:
    """The ranges of our assets for which a backfill has asked for no run yet."""
    try:
        data = backfill.asset_backfill_data
        if data is None:  # one of a job, or of an older version
            return
        with dg.partition_loading_context(dynamic_partitions_store=instance):  # "all partitions": those there are now
            seen = range_keys(data.requested_subset) | range_keys(data.materialized_subset)
            waiting = range_keys(data.target_subset) - seen - range_keys(data.failed_and_downstream_subset)
    except Exception as error:  # noqa: BLE001 - what Dagster kept of it, with assets and partitions of another day
        _log.warning("Backfill %s can't be read: %s", backfill.backfill_id, str(error).partition("\n")[0])
        return
    yield from valid_ranges(waiting)


def _is_going_on(instance: dg.DagsterInstance, backfill: PartitionBackfill) -> bool:
    """Whether a backfill has begun lately, or has a run that is active or was so lately; else nobody works it off."""
    since = datetime.now(UTC) - _SILENT
    if backfill.backfill_timestamp >= since.timestamp():
        return True
    of_it = {BACKFILL_TAG: backfill.backfill_id}
    return any(
        instance.get_runs_count(filters)
        for filters in (dg.RunsFilter(tags=of_it, statuses=_ACTIVE), dg.RunsFilter(tags=of_it, updated_after=since))
    )


def range_keys(subset: AssetGraphSubset) -> set[str]:
    """The ranges of a subset, of any of our assets."""
    of_assets = subset.partitions_subsets_by_asset_key
    return {key for name in ASSETS if (found := of_assets.get(dg.AssetKey(name))) for key in found.get_partition_keys()}


def video_rate(instance: dg.DagsterInstance) -> float | None:
    """Videos a second over the newest runs, as the metrics show it; None when none has ended lately."""
    return recent_rates(instance, assets=["qdrant_points"]).get("videos")


def recent_rates(instance: dg.DagsterInstance, *, assets: Iterable[str] = tuple(_MADE)) -> dict[str, float]:
    """Videos, frames and points a second over the newest runs; none of them when no run has ended lately."""
    found = [
        rates(partial(_made, instance, dg.AssetKey(asset)), _MADE[asset], is_busy=lambda: bool(active_runs(instance)))
        for asset in assets
    ]
    return {name: rate for of_asset in found for name, rate in of_asset.items()}


class _Record:
    """A materialization as Dagster hands it out."""

    def __init__(self, record: dg.EventLogRecord) -> None:
        self._record, self.timestamp = record, record.timestamp

    def number(self, name: str) -> int:
        materialization = self._record.asset_materialization
        found = materialization.metadata.get(name) if materialization else None
        return found.value if found is not None and isinstance(found.value, int) else 0


def _made(
    instance: dg.DagsterInstance,
    asset: dg.AssetKey,
    limit: int,
    *,
    after: float | None = None,
    before: float | None = None,
) -> Sequence[_Record]:
    """The newest materializations of an asset between two moments."""
    wanted = dg.AssetRecordsFilter(asset_key=asset, after_timestamp=after, before_timestamp=before)
    return [_Record(record) for record in instance.fetch_materializations(wanted, limit=limit).records]
