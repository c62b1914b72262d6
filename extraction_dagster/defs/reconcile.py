"""Bring the collection and the table to agreement: a check on qdrant_points, the job that runs it, a schedule."""

import time

import dagster as dg
from pydantic import Field

from extraction_dagster.defs.assets import qdrant_points
from extraction_dagster.defs.jobs import pod_tags
from extraction_dagster.defs.resources import Extraction, plain_failures
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings

_MOST_RECORDS_SHOWN = 100


class ReconcileConfig(dg.Config):
    """Whether to repair what is found."""

    # A default would stand in the launchpad of every job with this asset, and those that leave the check out refuse it.
    repair: bool | None = Field(
        None,
        description="Remove points of rows that are gone, and make records pending whose points are lost or too many. "
        "Left out: only compare.",
    )
    force: bool | None = Field(
        None,
        description="With repair: remove points of deleted rows also where they are more than EXTRACTION_PURGE_SHARE.",
    )


@dg.asset_check(
    asset=qdrant_points,
    pool="qdrant",
    blocking=True,  # the run fails with the check: a job never ends green with points missing
    description="Qdrant holds exactly the points that the table and the ledger say, of every range. With `repair`, "
    "points of deleted rows are removed once two reconciliations found them gone, and records that lost points become "
    "pending.",
)
def points_agree_with_table(
    context: dg.AssetCheckExecutionContext, config: ReconcileConfig, extraction: Extraction
) -> dg.AssetCheckResult:
    """Compare every record of the ledger with the store; in a run of one range, those of the range."""
    from extraction_dagster.ranges.work import fingerprints_of
    from extraction_dagster.stages.catalog.catalog import open_catalog
    from extraction_dagster.stages.index.compare import WHOLE
    from extraction_dagster.stages.index.reconcile import reconcile
    from extraction_dagster.stages.index.stage import open_point_store

    started = time.perf_counter()
    settings = extraction.settings
    with plain_failures(), open_catalog(settings) as catalog:
        found = reconcile(
            catalog,
            lambda: open_point_store(settings, wait_seconds=settings.qdrant_timeout_seconds),
            collection_name=settings.collection_name,
            embedding=fingerprints_of(settings).embedding,
            within=IdRange.parse(context.partition_key) if context.has_partition_key else WHOLE,
            repair=bool(config.repair),
            force=bool(config.repair and config.force),
        )
    context.log.info("%d records differ on %d points", found.remaining, found.points)
    differences = [dg.TableRecord(row) for row in found.rows(limit=_MOST_RECORDS_SHOWN)]
    return dg.AssetCheckResult(
        passed=found.remaining == 0,
        severity=dg.AssetCheckSeverity.ERROR,
        description=found.summary,
        metadata={
            **{name: value for name, value in found.document().items() if isinstance(value, int | str)},
            **({"differences": dg.MetadataValue.table(differences)} if differences else {}),
            "seconds": round(time.perf_counter() - started, 3),
        },
    )


reconcile_job = dg.define_asset_job(
    name="reconcile_job",
    selection=dg.AssetSelection.checks(points_agree_with_table),
    executor_def=dg.in_process_executor,
    tags=pod_tags(load_settings(), embeds=False) or None,
    description="Compare Qdrant with the table, and repair when asked to.",
)

reconcile_schedule = dg.ScheduleDefinition(
    name="reconcile_schedule",
    job=reconcile_job,
    cron_schedule=load_settings().reconcile_cron,
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    run_config={"ops": {points_agree_with_table.node_def.name: {"config": {"repair": True}}}},
    description="Purges deleted rows and asks for lost points again; EXTRACTION_RECONCILE_CRON says when (UTC).",
)
