"""Backfills of ranges: planned over a span of ids, launched through Dagster's queue, watched, cancelled.

A backfill is Dagster's own: the UI shows it, its daemon asks for the runs, and as many work at once as the instance
says. Where no daemon runs, the ranges of a plan can be processed in this process instead.
"""

import hashlib
import logging
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from extraction_dagster import step_progress
from extraction_dagster.defs.instance.launching import launch
from extraction_dagster.defs.instance.private_api import (
    BULK_ACTION_TERMINAL_STATUSES,
    AssetBackfillData,
    AssetGraphSubset,
    BaseAssetGraph,
    BulkActionStatus,
    PartitionBackfill,
    extract_data_provenance_from_entry,
    extract_data_version_from_entry,
    make_new_backfill_id,
    newest_materializations,
    requested_backfills,
)
from extraction_dagster.defs.instance.runs import (
    ASSETS,
    BACKFILL_TAG,
    active_runs,
    fail_dead_runs,
    has_backfill_daemons,
    range_keys,
    range_of,
    waiting_ranges,
)
from extraction_dagster.defs.jobs import pod_tags
from extraction_dagster.defs.partitions import add_ranges, id_ranges, valid_ranges
from extraction_dagster.errors.runs import BackfillUnknownError, RangeBusyError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.catalog.ranges import cover_span

_log = logging.getLogger(__name__)
_PAGE = 500  # materializations read in one query
_CHUNK = 1000  # ranges registered in one call: SQLite takes no more than some ten thousand
_GIVE_UP_AFTER = 3  # ranges that fail one after the other: a store is down, say, and the rest would fail as well
_LAST = "-1"  # priority of the runs: rows that come in meanwhile go first
_STATES = {
    BulkActionStatus.REQUESTED: "running",
    BulkActionStatus.CANCELING: "canceling",
    BulkActionStatus.FAILING: "failing",
    BulkActionStatus.CANCELED: "canceled",
    BulkActionStatus.COMPLETED: "done",
    BulkActionStatus.COMPLETED_SUCCESS: "done",
    BulkActionStatus.COMPLETED_FAILED: "failed",
    BulkActionStatus.FAILED: "failed",
}


@dataclass(frozen=True, slots=True)
class BackfillPlan:
    """What a backfill of a span would do.

    Attributes:
        span: The ids that were asked for.
        assets: The assets, in data order.
        ranges: What is to be launched, in ascending order.
        new: Those of them that are not registered yet.
        busy: Ranges left out, and the run or backfill that works on each.
        fresh: Ranges left out since nothing of them is stale.
    """

    span: IdRange
    assets: tuple[str, ...]
    ranges: tuple[IdRange, ...]
    new: tuple[IdRange, ...]
    busy: Mapping[IdRange, str]
    fresh: tuple[IdRange, ...]


@dataclass(frozen=True, slots=True)
class BackfillProgress:
    """How far a backfill is.

    Attributes:
        state: running, canceling, failing; done, failed, canceled.
        total: Its ranges.
        finished: Ranges of which every asset is materialized.
        failed: Ranges of which a run failed or was cancelled, in ascending order.
        queued: Runs that wait for their turn.
        started: Runs at work.
        error: Why the backfill itself failed, in Dagster's words; empty otherwise.
    """

    state: str
    total: int
    finished: int
    failed: tuple[IdRange, ...]
    queued: int
    started: int
    error: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing of it goes on any more."""
        return self.state in {"done", "failed", "canceled"}


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


class Backfills:
    """The backfills of an instance."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance

    def has_daemons(self) -> bool:
        """Whether daemons run that turn backfills into runs, and start them."""
        return has_backfill_daemons(self.instance)

    def plan(self, catalog: Catalog, span: IdRange, *, assets: Sequence[str], stale_only: bool) -> BackfillPlan:
        """Decide which ranges to launch, and which to leave out.

        Args:
            catalog: The source table.
            span: The ids.
            assets: Names of assets.
            stale_only: Leave out ranges of which nothing is stale.
        """
        fail_dead_runs(self.instance)
        known = valid_ranges(self.instance.get_dynamic_partitions("id_ranges"))
        cover = cover_span(catalog.source, span, known, catalog.settings.batch_size)
        chosen = tuple(name for name in ASSETS if name in assets)
        wanted = [*cover.ranges]
        if stale_only:
            from extraction_dagster.definitions import defs

            keys = [dg.AssetKey(name) for name in chosen]
            stale = stale_ranges(self.instance, defs.resolve_asset_graph(), wanted, keys)
            wanted = [id_range for id_range in wanted if id_range in stale]
        busy = self._busy(wanted)
        ranges = tuple(id_range for id_range in wanted if id_range not in busy)
        new = tuple(sorted(set(cover.new) & set(ranges)))
        return BackfillPlan(span, chosen, ranges, new, busy, tuple(sorted(set(cover.ranges) - set(wanted))))

    def start(self, plan: BackfillPlan, settings: Settings) -> str:
        """Register the new ranges, hand the backfill to Dagster's daemon, and say its id."""
        for start in range(0, len(plan.new), _CHUNK):
            add_ranges(self.instance, plan.new[start : start + _CHUNK])
        subset = id_ranges.empty_subset().with_partition_keys([id_range.partition_key for id_range in plan.ranges])
        backfill = PartitionBackfill.from_asset_graph_subset(
            backfill_id=make_new_backfill_id(),
            backfill_timestamp=time.time(),
            tags={
                "dagster/max_runtime_seconds": str(settings.max_run_seconds),
                "dagster/priority": _LAST,
                **pod_tags(settings, embeds="frame_embeddings" in plan.assets),  # the runs are of no job of ours
            },
            dynamic_partitions_store=self.instance,
            asset_graph_subset=AssetGraphSubset(  # type: ignore[call-arg]  # its decorator hides the fields
                partitions_subsets_by_asset_key={dg.AssetKey(name): subset for name in plan.assets}
            ),
            title=f"extraction backfill {plan.span}",
            description=None,
            run_config=None,
        )
        in_data_order = [dg.AssetKey(name) for name in plan.assets]
        self.instance.add_backfill(backfill._replace(asset_selection=in_data_order))
        return str(backfill.backfill_id)

    def progress(self, backfill_id: str) -> BackfillProgress:
        """How far a backfill is.

        Raises:
            BackfillUnknownError: There is none of this id.
        """
        backfill = self._find(backfill_id)
        data = backfill.asset_backfill_data
        if data is None:
            raise BackfillUnknownError(backfill_id, "it is none of assets")
        with dg.partition_loading_context(dynamic_partitions_store=self.instance):
            total, failed = len(range_keys(data.target_subset)), range_keys(data.failed_and_downstream_subset)
            finished = len(_finished(data))
        run = dg.DagsterRunStatus
        # The daemon looks now and then; a range has one run, so that those that succeeded say it earlier.
        succeeded = min(self._num_runs(backfill_id, run.SUCCESS), total - len(failed))
        return BackfillProgress(
            state=_STATES[backfill.status],
            total=total,
            finished=finished if backfill.status in BULK_ACTION_TERMINAL_STATUSES else max(finished, succeeded),
            failed=tuple(sorted(valid_ranges(failed))),
            queued=self._num_runs(backfill_id, run.QUEUED, run.NOT_STARTED),
            started=self._num_runs(backfill_id, run.STARTING, run.STARTED, run.CANCELING),
            error=backfill.error.message.strip() if backfill.error else "",
        )

    def cancel(self, backfill_id: str) -> bool:
        """Ask the daemon to cancel a backfill and its runs; False when it was over already.

        Raises:
            BackfillUnknownError: There is none of this id.
        """
        backfill = self._find(backfill_id)
        if backfill.status in BULK_ACTION_TERMINAL_STATUSES:
            return False
        self.instance.update_backfill(backfill.with_status(BulkActionStatus.CANCELING))  # type: ignore[no-untyped-call]  # Dagster's own method
        return True

    def _find(self, backfill_id: str) -> PartitionBackfill:
        backfill = self.instance.get_backfill(backfill_id)
        if backfill is None:
            raise BackfillUnknownError(backfill_id, "the instance knows none of this id")
        return backfill

    def _num_runs(self, backfill_id: str, *statuses: dg.DagsterRunStatus) -> int:
        return self.instance.get_runs_count(dg.RunsFilter(tags={BACKFILL_TAG: backfill_id}, statuses=statuses))

    def _busy(self, ranges: Iterable[IdRange]) -> dict[IdRange, str]:
        """The ranges that lie within one that is at work or promised, with what works on it."""
        taken = [(found, f"run {run.run_id}") for run in active_runs(self.instance) if (found := range_of(run))]
        for backfill in requested_backfills(self.instance):
            waiting = waiting_ranges(self.instance, backfill)
            taken += ((id_range, f"backfill {backfill.backfill_id}") for id_range in waiting)
        taken.sort()
        furthest: list[tuple[int, str]] = []  # the greatest last id of those that begin no later, and whose it is
        for id_range, by in taken:
            furthest.append(max([*furthest[-1:], (id_range.last_id, by)]))
        busy = {}
        for id_range in ranges:
            position = bisect_right(taken, id_range.first_id, key=lambda item: item[0].first_id) - 1
            if position >= 0 and furthest[position][0] >= id_range.last_id:
                busy[id_range] = furthest[position][1]
        return busy


def _finished(data: AssetBackfillData) -> set[str]:
    """The ranges of which every targeted asset is materialized."""
    made = data.materialized_subset.partitions_subsets_by_asset_key
    targets = data.target_subset.partitions_subsets_by_asset_key
    return set.intersection(*(set(made[key].get_partition_keys()) if key in made else set() for key in targets))


def process_here(instance: dg.DagsterInstance, plan: BackfillPlan) -> Processed:
    """Process the ranges of a plan; one that fails does not stop the next, three in a row do.

    Raises:
        KeyboardInterrupt: Ctrl+C; finished shards are kept.
    """
    finished, failed, reason, in_a_row = 0, list[IdRange](), "", 0
    step_progress.begin("ranges", len(plan.ranges))
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
        step_progress.advance("ranges")
        if in_a_row == _GIVE_UP_AFTER:
            failed += plan.ranges[number:]
            break
    return Processed(finished, tuple(failed), reason)


@dataclass(frozen=True, slots=True)
class _Made:
    """What the newest materialization of an asset's range says of itself."""

    storage_id: int
    code_version: str | None
    data_version: str
    inputs: Mapping[dg.AssetKey, tuple[int | None, str]]

    def is_newer_than_read_by(self, reader: "_Made", asset: dg.AssetKey) -> bool:
        """Whether a reader of this asset read an older materialization of it, and one with other contents."""
        storage_id, version = reader.inputs.get(asset, (None, ""))
        if storage_id is not None and self.storage_id <= storage_id:
            return False
        return hashlib.sha256(self.data_version.encode()).hexdigest() != version  # how Dagster names a single range


def stale_ranges(
    instance: dg.DagsterInstance, graph: BaseAssetGraph[Any], ranges: Sequence[IdRange], assets: Iterable[dg.AssetKey]
) -> set[IdRange]:
    """The ranges of which an asset is missing, was made by other code or settings, or from older inputs.

    The UI shows the same, range by range. Dagster's own resolver asks the storage for each asset and range; here each
    asset costs a few queries for all of them.

    Args:
        instance: Whose materializations.
        graph: The assets as they are now.
        ranges: Those asked about.
        assets: Those asked about.
    """
    wanted = set(assets)
    parents = {key: graph.get(key).parent_keys & _like(graph, key) for key in wanted}
    keys = [id_range.partition_key for id_range in ranges]
    made = {key: _newest(instance, key, set(keys)) for key in wanted.union(*parents.values())}
    return {
        id_range
        for id_range, name in zip(ranges, keys, strict=True)
        if any(_is_stale(graph, key, parents[key], made, name) for key in wanted)
    }


def _like(graph: BaseAssetGraph[Any], key: dg.AssetKey) -> set[dg.AssetKey]:
    """The assets that have a materialization for each of an asset's ranges."""
    partitions = graph.get(key).partitions_def
    return {other for other in graph.materializable_asset_keys if graph.get(other).partitions_def == partitions}


def _is_stale(
    graph: BaseAssetGraph[Any],
    key: dg.AssetKey,
    parents: Iterable[dg.AssetKey],
    made: Mapping[dg.AssetKey, Mapping[str, _Made]],
    partition_key: str,
) -> bool:
    mine = made[key].get(partition_key)
    if mine is None or mine.code_version != graph.get(key).code_version:
        return True
    sources = {parent: made[parent].get(partition_key) for parent in parents}
    return any(source is not None and source.is_newer_than_read_by(mine, parent) for parent, source in sources.items())


def _newest(instance: dg.DagsterInstance, asset: dg.AssetKey, partition_keys: set[str]) -> dict[str, _Made]:
    """The newest materialization of each range."""
    newest = newest_materializations(instance, asset)
    storage_ids = [number for key, number in newest.items() if key in partition_keys]
    pages = (storage_ids[start : start + _PAGE] for start in range(0, len(storage_ids), _PAGE))
    return {key: made for page in pages for key, made in _read(instance, asset, page)}


def _read(instance: dg.DagsterInstance, asset: dg.AssetKey, storage_ids: Sequence[int]) -> Iterator[tuple[str, _Made]]:
    wanted = dg.AssetRecordsFilter(asset_key=asset, storage_ids=list(storage_ids))
    for record in instance.fetch_materializations(wanted, limit=len(storage_ids)).records:
        provenance = extract_data_provenance_from_entry(record.event_log_entry)
        version = extract_data_version_from_entry(record.event_log_entry)
        inputs = {}
        if provenance is not None:
            read = provenance.input_storage_ids
            inputs = {key: (read.get(key), value.value) for key, value in provenance.input_data_versions.items()}
        code_version = None if provenance is None else provenance.code_version
        made = _Made(record.storage_id, code_version, "" if version is None else version.value, inputs)
        yield record.partition_key or "", made
