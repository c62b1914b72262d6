"""`extraction launch FIRST-LAST`: process one range of ids now, in this process."""

from typing import Annotated

import typer

from extraction_dagster.cli import console
from extraction_dagster.errors.catalog import EmptyRangeError
from extraction_dagster.errors.runs import RunFailedError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog


def command(
    id_range: Annotated[str, typer.Argument(metavar="FIRST-LAST", help="Range of ids, both ends included: 1-1000.")],
) -> None:
    """Process one range of ids now: video_frames, frame_embeddings, qdrant_points.

    The run is in Dagster's run history like any other. Records that are done already are skipped.
    """
    from extraction_dagster.defs.instance.launching import launch, open_instance

    wanted = IdRange.parse(id_range)
    settings = load_settings()
    with open_catalog(settings) as catalog:  # refuses a table that can't be used before a run is made of it
        if not catalog.source.count(wanted):
            raise EmptyRangeError(wanted.partition_key, catalog.source.name, catalog.source.extent())
    with open_instance(settings) as instance, console.long_work():
        run = launch(instance, wanted)
    if not run.success:
        raise RunFailedError(wanted.partition_key, run.run_id, run.error)
    with open_catalog(settings) as catalog:
        states = catalog.summary(wanted)
    console.out.print(f"Range {wanted} (run {run.run_id}): {states}")
