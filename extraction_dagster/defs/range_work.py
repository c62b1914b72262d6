"""What each step of a range begins with: the run's options, the range, its rows; and what it reports at the end."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dagster as dg

from extraction_dagster.defs.partitions import above_floor, register
from extraction_dagster.defs.resources import Extraction, plain_failures
from extraction_dagster.errors.catalog import EmptyRangeError
from extraction_dagster.interrupts import delivered_again_when_dropped
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.run_options import in_words
from extraction_dagster.settings import Settings

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints, PlannedRow
    from extraction_dagster.stages.catalog.ledger import LedgerEntry

_log = logging.getLogger(__name__)  # managed by Dagster: what is said here is in the run's events too
OPTIONS_TAG = "extraction/options"


@dataclass(frozen=True, slots=True)
class RangeWork:
    """A range that a step works on.

    Attributes:
        extraction: Opens the stores.
        settings: Of this run.
        catalog: Open.
        id_range: The partition.
        plan: Its rows above the operator's floor.
        made_with: The fingerprints of this run.
        run_id: For the errors table.
    """

    extraction: Extraction
    settings: Settings
    catalog: "Catalog"
    id_range: IdRange
    plan: Mapping[int, "PlannedRow"]
    made_with: "Fingerprints"
    run_id: str

    @property
    def todo(self) -> dict[int, "PlannedRow"]:
        """The pending rows."""
        return {record_id: planned for record_id, planned in self.plan.items() if planned.status == "todo"}

    @property
    def due(self) -> dict[int, "PlannedRow"]:
        """The pending rows, and in a forced run those that are done as well."""
        statuses = {"todo", "done"} if self.extraction.force else {"todo"}
        return {
            record_id: planned
            for record_id, planned in self.plan.items()
            if planned.status in statuses and (planned.entry is not None or planned.status == "todo")
        }

    def entries(self) -> dict[int, "LedgerEntry"]:
        """The ledger of the whole range, as it is now."""
        return self.catalog.ledger.entries(self.id_range)

    def write_failures(self, failures: Iterable[Failure]) -> None:
        """Write failures down, and say so."""
        failures = list(failures)
        states = self.catalog.record_failures(self.plan, failures, run_id=self.run_id)
        for failure in failures:
            _log.warning("%s (%s)", failure.message, states[failure.record_id])


@dataclass(slots=True)
class Report:
    """What a step did.

    Attributes:
        numbers: To be plotted.
        failures: Records that gave nothing.
        markdown: The contact sheet, if there is one.
        unnormalised: Stored vectors whose length is not 1.
        verified: Points of the whole range, counted in the store.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    markdown: str | None = None
    unnormalised: int = 0
    verified: int = 0


@contextmanager
def work_on(context: dg.AssetExecutionContext, extraction: Extraction, *, begins: bool = False) -> Iterator[RangeWork]:
    """Open what a step needs; whatever is wrong with the run's options or its range is refused here, before any work.

    Args:
        context: The step's.
        extraction: The run's settings.
        begins: It is the first asset: rows that are asked for again get their new revision.
    """
    with (
        plain_failures(),
        _saying_how_to_go_on(context.partition_key),
        delivered_again_when_dropped(dg.DagsterExecutionInterruptedError),
    ):
        settings, made_with = extraction.settings, extraction.fingerprints
        id_range = register(context)
        extraction.refuse_what_no_collection_takes()
        if extraction.options or OPTIONS_TAG in context.run.tags:  # a run that is launched again inherits its tags
            shown = in_words(extraction.options) or "none"
            context.instance.add_run_tags(context.run.run_id, {OPTIONS_TAG: shown})
        with extraction.catalog() as catalog:
            within = above_floor(context, id_range)
            if begins:
                plan = catalog.begin(within, made_with, force=extraction.force)
                if not plan:
                    raise EmptyRangeError(id_range.partition_key, catalog.source.name, catalog.source.extent())
            else:
                plan = catalog.plan(within, made_with)
            yield RangeWork(extraction, settings, catalog, id_range, plan, made_with, context.run.run_id)


@contextmanager
def _saying_how_to_go_on(key: str) -> Iterator[None]:
    """Tell whoever stopped a run (Ctrl+C, SIGTERM, *Terminate*) what it left."""
    try:
        yield
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        _log.info(
            "Range %s was stopped. What was finished is kept and marked, and its next run goes on from there: the "
            "sensor asks for one by itself, 'extraction launch %s' is one at once.",
            key,
            key,
        )
        raise


def stored(shards: Iterable[Any], due: Mapping[int, "PlannedRow"]) -> dict[int, int]:
    """Frames by record, of the due rows that a shard holds in their present version."""
    return {
        record.record_id: record.num_frames
        for shard in shards
        for record in shard.records
        if record.record_id in due and record.content_version == due[record.record_id].video.content_version
    }


def lacking(due: Mapping[int, "PlannedRow"], have: Iterable[int]) -> list[int]:
    """The due rows that the step before left nothing for, in ascending order."""
    return sorted(due.keys() - set(have))


def was_done(planned: "PlannedRow") -> bool:
    """Whether a row was done in its present version, though with other settings perhaps."""
    entry = planned.entry
    return entry is not None and entry.state == "done" and entry.source_version == planned.source_version
