"""A backfill without a daemon: the ranges of a plan one by one, in this process."""

import logging
from dataclasses import dataclass

import dagster as dg

from extraction_dagster import progress
from extraction_dagster.defs.instance.backfills import BackfillPlan
from extraction_dagster.defs.instance.launching import launch
from extraction_dagster.errors.runs import RangeBusyError
from extraction_dagster.records import IdRange

_log = logging.getLogger(__name__)
_GIVE_UP_AFTER = 3  # ranges that fail one after the other: a store is down, say, and the rest would fail as well


@dataclass(frozen=True, slots=True)
class Processed:
    """What became of the ranges.

    Attributes:
        finished: How many succeeded.
        failed: Those that failed, and those that were not tried any more.
        reason: Why the first of them failed.
    """

    finished: int
    failed: tuple[IdRange, ...]
    reason: str


def process_here(instance: dg.DagsterInstance, plan: BackfillPlan) -> Processed:
    """Process the ranges of a plan; one that fails does not stop the next, three in a row do.

    Raises:
        KeyboardInterrupt: Ctrl+C; finished shards are kept.
    """
    finished, failed, reason, in_a_row = 0, list[IdRange](), "", 0
    progress.begin("ranges", len(plan.ranges))
    for number, id_range in enumerate(plan.ranges, 1):
        _log.info("Range %s, %d of %d", id_range, number, len(plan.ranges))
        try:
            run = launch(instance, id_range, assets=plan.assets)
        except RangeBusyError as error:  # somebody else launched it meanwhile
            _log.warning("%s", error)
        else:
            finished, in_a_row = finished + run.success, 0 if run.success else in_a_row + 1
            if not run.success:
                _log.error("Range %s failed (run %s): %s", id_range, run.run_id, run.error)
                reason = reason or f"Range {id_range}: {run.error}"
                failed.append(id_range)
        progress.advance("ranges")
        if in_a_row == _GIVE_UP_AFTER:
            failed += plan.ranges[number:]
            break
    return Processed(finished, tuple(failed), reason)
