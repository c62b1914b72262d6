"""The cursor sensor: finds new rows, requests runs, and keeps the last processed ID in Dagster's cursor store.

Beside it, the sensor that removes old runs.
"""

from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import dagster as dg

from extraction_dagster.defs.instance import SENSOR_NAME
from extraction_dagster.defs.jobs import extraction_job
from extraction_dagster.defs.partitions import FLOOR_TAG, id_ranges
from extraction_dagster.defs.resources import Extraction
from extraction_dagster.settings import load_settings

if TYPE_CHECKING:
    from extraction_dagster.ticks.tick import Ticked

_PRUNE_EVERY_SECONDS = 600


@dg.sensor(
    name=SENSOR_NAME,
    job=extraction_job,
    minimum_interval_seconds=load_settings().sensor_interval_seconds,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Turns rows that are not done into runs of ranges. Its cursor says how far every row is done.",
)
def extraction_sensor(context: dg.SensorEvaluationContext, extraction: Extraction) -> dg.SensorResult:
    """Tick once."""
    from extraction_dagster.defs.instance.runs import PARTITION_TAG, InstanceRuns
    from extraction_dagster.ticks.memory import recall, remember
    from extraction_dagster.ticks.tick import tick

    runs = InstanceRuns(context.instance, under_daemon=True)
    with extraction.catalog() as catalog:
        memory = recall(catalog.state_engine)
        keep = partial(remember, catalog.state_engine, memory)
        ticked = tick(catalog, runs, context.cursor, memory, now=datetime.now(UTC), keep=keep)
        keep()
    for notice in ticked.notices:
        getattr(context.log, notice.level)(notice.text)
    new = [request.id_range.partition_key for request in ticked.requests if request.is_new]
    tags = {"dagster/max_runtime_seconds": str(extraction.settings.max_run_seconds)}
    if ticked.cursor.floor_id is not None:
        tags[FLOOR_TAG] = str(ticked.cursor.floor_id)
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                run_key=request.run_key,
                partition_key=request.id_range.partition_key,
                tags={**tags, PARTITION_TAG: request.id_range.partition_key},
            )
            for request in ticked.requests
        ],
        dynamic_partitions_requests=[id_ranges.build_add_request(new)] if new else [],
        skip_reason=None if ticked.requests else _skip_reason(ticked),
        cursor=ticked.cursor.to_json(),
    )


@dg.sensor(
    name="history_sensor",
    minimum_interval_seconds=_PRUNE_EVERY_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Removes runs that ended longer ago than EXTRACTION_KEEP_RUNS, and their events, but for what the "
    "partitions page shows; starts no run.",
)
def history_sensor(context: dg.SensorEvaluationContext, extraction: Extraction) -> dg.SensorResult:
    """Look once; its cursor says where the next look goes on when time was up."""
    from extraction_dagster.defs.instance.pruning import prune

    kept_for = extraction.settings.runs_kept_for
    if kept_for is None:
        return dg.SensorResult(skip_reason="EXTRACTION_KEEP_RUNS is all: every run stays.", cursor="")
    pruned = prune(context.instance, before=datetime.now(UTC) - kept_for, after=context.cursor or None)
    said = f"{pruned.runs} runs and {pruned.events} reports of progress removed (EXTRACTION_KEEP_RUNS)."
    return dg.SensorResult(skip_reason=said, cursor=pruned.reached or "")


def _skip_reason(ticked: "Ticked") -> str:
    """Why no run was requested, for the sensor's page."""
    last = ticked.cursor.last_processed_id
    so_far = "No row is done yet" if last is None else f"Every row up to ID {last} is done or parked"
    return (
        f"{so_far}; {ticked.num_active} ranges are at work, {ticked.num_waiting} failed rows wait for their next try."
    )
