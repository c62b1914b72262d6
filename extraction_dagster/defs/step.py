"""A step of a run, on its way into the room `ranges`: the run's options and partition in, an open `RangeWork` out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from extraction_dagster.defs.partitions import above_floor, add_ranges, process_tags
from extraction_dagster.defs.resources import Extraction, plain_failures
from extraction_dagster.errors.runs import SettingsChangedError
from extraction_dagster.interrupts import redeliver_dropped_interrupts
from extraction_dagster.ranges.work import RangeWork, fingerprints_of, open_range, vectors_fingerprint
from extraction_dagster.records import IdRange
from extraction_dagster.run_options import describe_options

_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too
OPTIONS_TAG = "extraction/options"
MADE_WITH_TAG = ".dagster/extraction_made_with"  # with this prefix, Dagster's pages do not show it


@contextmanager
def open_step(
    context: dg.AssetExecutionContext, extraction: Extraction, *, begins: bool = False
) -> Iterator[RangeWork]:
    """Open what a step needs; whatever is wrong with the run's options or its range is refused here, before any work.

    Args:
        context: The step's.
        extraction: The run's options; the settings are read once, here.
        begins: It is the first asset: rows that are asked for again get their new revision.
    """
    with (
        plain_failures(),
        _log_how_to_resume(context.partition_key),
        redeliver_dropped_interrupts(dg.DagsterExecutionInterruptedError),
    ):
        settings = extraction.settings
        fingerprints = fingerprints_of(settings)
        id_range = IdRange.parse(context.partition_key)
        add_ranges(context.instance, [id_range])  # so that any valid range can be launched without preparation
        _tag_run(context, extraction, vectors_fingerprint(fingerprints))
        extraction.refuse_unstaged_model(settings, fingerprints)
        with open_range(
            settings,
            id_range,
            within=above_floor(context, id_range),
            begins=begins,
            force=extraction.force,
            fingerprints=fingerprints,
            run_id=context.run.run_id,
        ) as work:
            yield work


def _tag_run(context: dg.AssetExecutionContext, extraction: Extraction, made_with: str) -> None:
    """Note in the run what works on it and how: its process, its options, and the fingerprints of its first step.

    A run that is launched again inherits the tags of the run before it; so they name the run that they speak of.

    Raises:
        SettingsChangedError: An earlier step of this run had other fingerprints.
    """
    run_id = context.run.run_id
    run = context.instance.get_run_by_id(run_id)
    known = run.tags if run else context.run.tags  # the context's are those with which the run began
    of_run, _, began = known.get(MADE_WITH_TAG, "").partition(":")
    if of_run == run_id and began != made_with:
        raise SettingsChangedError(context.partition_key, began=began, now=made_with)
    tags = {**process_tags(run_id), MADE_WITH_TAG: f"{run_id}:{made_with}"}
    if extraction.options or OPTIONS_TAG in known:
        tags[OPTIONS_TAG] = describe_options(extraction.options) or "none"
    if not tags.items() <= known.items():
        context.instance.add_run_tags(run_id, tags)


@contextmanager
def _log_how_to_resume(key: str) -> Iterator[None]:
    """Log what a run that somebody stops (Ctrl+C, SIGTERM, *Terminate*) leaves, and how it goes on."""
    try:
        yield
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        _log.info(
            "Range %s was stopped. What was finished is kept and marked, and its next run goes on from there: the "
            "sensor requests one by itself, 'extraction launch %s' starts one at once.",
            key,
            key,
        )
        raise
