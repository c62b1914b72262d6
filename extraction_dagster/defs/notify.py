"""A sensor that tells people of failed runs, as EXTRACTION_NOTIFY says; whatever goes wrong, its tick goes on."""

from typing import TYPE_CHECKING

import dagster as dg

from extraction_dagster.defs.resources import Extraction
from extraction_dagster.errors import ExtractionError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings

if TYPE_CHECKING:
    from extraction_dagster.notify import RunFailure

_WILL_RETRY_TAG = "dagster/will_retry"
_TOLD = frozenset({1, 2, 4, 8})  # of failures in a row of one range; at the 12th there is one an hour, and each is told
_EACH_FROM = 12


@dg.run_failure_sensor(
    name="run_failure_notices",
    minimum_interval_seconds=load_settings().sensor_interval_seconds,
    default_status=dg.DefaultSensorStatus.STOPPED
    if load_settings().notify == "none"
    else dg.DefaultSensorStatus.RUNNING,
    description="Tells of failed runs as EXTRACTION_NOTIFY says: which range, why, how many records, what to do.",
)
def run_failure_notices(context: dg.RunFailureSensorContext, extraction: Extraction) -> None:
    """Tell of one failed run."""
    from extraction_dagster.notify import deliver, make_notifier

    try:
        settings = extraction.settings
        notifier = make_notifier(settings)
        if notifier is None:
            context.log.info("EXTRACTION_NOTIFY is none: nobody is told")
            return
        if context.dagster_run.tags.get(_WILL_RETRY_TAG) == "true":
            context.log.info("Dagster tries run %s again by itself: nobody is told", context.dagster_run.run_id)
            return
        failure = _describe(context, extraction)
        if failure.failures_in_a_row not in _TOLD and failure.failures_in_a_row < _EACH_FROM:
            context.log.info("Range %s fails again and again: told of it already", failure.key)
            return
        deliver(notifier, failure)
        context.log.info("Told of run %s (%s)", failure.run_id, settings.notify)
    except ExtractionError as error:
        context.log.error("%s", error)  # noqa: TRY400 - it is one clear line
    except Exception as error:  # noqa: BLE001 - a notice is never worth a tick
        context.log.error("A notice was not delivered: %s was raised", type(error).__name__)  # noqa: TRY400 - likewise


def _describe(context: dg.RunFailureSensorContext, extraction: Extraction) -> "RunFailure":
    from extraction_dagster.defs.instance.runs import InstanceRuns, first_failure, range_of
    from extraction_dagster.notify import RunFailure, redact

    run = context.dagster_run
    id_range = range_of(run)
    step, error = first_failure(context.get_step_failure_events())
    if not step:
        error = context.failure_event.message or error
    return RunFailure(
        run_id=run.run_id,
        job=run.job_name,
        key=None if id_range is None else id_range.partition_key,
        step=step,
        error=redact(error, extraction.settings),
        failed_records=0 if id_range is None else _num_failed(extraction, run.run_id, id_range),
        failures_in_a_row=1
        if id_range is None
        else max(InstanceRuns(context.instance).history(id_range).failures_in_a_row, 1),
    )


def _num_failed(extraction: Extraction, run_id: str, id_range: IdRange) -> int | None:
    """How many of its records failed; None while the database can't be asked: that may be why the run failed."""
    try:
        with extraction.catalog() as catalog:
            return catalog.ledger.num_failed(run_id, id_range)
    except ExtractionError:
        return None
