"""Which ranges backfills take care of, whoever launched them: a command, the UI."""

from collections.abc import Iterator, Sequence

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus, PartitionBackfill

from extraction_dagster.defs.partitions import valid_ranges
from extraction_dagster.records import IdRange

ASSETS = ("video_frames", "frame_embeddings", "qdrant_points")  # in data order
_DAEMONS = ("BACKFILL", "QUEUED_RUN_COORDINATOR")
SILENCE_SECONDS = 150.0  # beside the 30 s between two signs of life: after three minutes a daemon is gone


def are_served(instance: dg.DagsterInstance) -> bool:
    """Whether daemons run that turn backfills into runs, and start them."""
    from dagster._daemon.controller import get_daemon_statuses  # noqa: PLC0415 - half a CPU second, seldom needed

    statuses = get_daemon_statuses(instance, daemon_types=_DAEMONS, heartbeat_tolerance_seconds=SILENCE_SECONDS)
    return all(status.healthy or not status.required for status in statuses.values())


def requested_backfills(instance: dg.DagsterInstance) -> Sequence[PartitionBackfill]:
    """The backfills that go on; one that is being cancelled asks for no more runs."""
    wanted = BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED])
    return instance.get_backfills(wanted) if instance.get_backfills_count(wanted) else []


def waiting_ranges(instance: dg.DagsterInstance, backfill: PartitionBackfill) -> Iterator[IdRange]:
    """The ranges of our assets for which a backfill has asked for no run yet."""
    data = backfill.asset_backfill_data
    if data is None:  # one of a job, or of an older version
        return
    with partition_loading_context(dynamic_partitions_store=instance):  # "all partitions" are those there are now
        seen = range_keys(data.requested_subset) | range_keys(data.materialized_subset)
        waiting = range_keys(data.target_subset) - seen - range_keys(data.failed_and_downstream_subset)
    yield from valid_ranges(waiting)


def range_keys(subset: AssetGraphSubset) -> set[str]:
    """The ranges of a subset, of whichever of our assets."""
    of_assets = subset.partitions_subsets_by_asset_key
    return {key for name in ASSETS if (found := of_assets.get(dg.AssetKey(name))) for key in found.get_partition_keys()}
