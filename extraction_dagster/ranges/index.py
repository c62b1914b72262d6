"""Index a range: embedding shards -> points in Qdrant, verified; then the rows are done.

newest shard first   row 3's points replaced, counted in the store, marked; then row 2's; ...
the whole range      compared with the store once more: what disagrees is pending again
at the end           frames that the settings don't keep are removed, small shards are merged
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from extraction_dagster import step_progress
from extraction_dagster.errors.decode import ShardStoreError
from extraction_dagster.errors.index import PointsChangedError
from extraction_dagster.errors.runs import VectorsMissingError
from extraction_dagster.ranges.work import RangeWork, Report, Stopwatch, frames_by_record, was_done
from extraction_dagster.shards.compaction import CompactionOptions, compact
from extraction_dagster.shards.retention import keep_time, prune_former, prune_frames

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extraction_dagster.shards.embedding_store import EmbeddingShard
    from extraction_dagster.stages.index.protocol import PointStore

_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too


def index_range(work: RangeWork) -> Report:
    """Replace the points of every pending row whose vectors are stored, and mark each row once they are verified.

    An interruption costs one shard at most.

    Raises:
        VectorsMissingError: Rows that were done before are to be indexed again, and their vectors are not stored.
        PointsMissingError: The store does not hold what it acknowledged; the rows are not marked.
        PointsChangedError: It did, and does not any more; the rows are pending again.
    """
    from extraction_dagster.stages.index.stage import open_point_store  # noqa: PLC0415 - loads the engine

    watch, report, rows = Stopwatch(), Report(), work.selected
    newest_first = work.embedding_store.shards(work.id_range)[::-1]
    shards = [(shard, records) for shard in newest_first if (records := frames_by_record([shard], rows))]
    have = {record_id for _, records in shards for record_id in records}
    step_progress.begin("qdrant_points", len(have))
    if newest_first or _should_hold_points(work):
        with open_point_store(work.settings, wait_seconds=work.settings.qdrant_timeout_seconds) as store:
            is_there = _open_collection(work, store, dim=newest_first[0].dim if newest_first else None)
            with watch.phase("write"):
                for shard, records in shards:
                    _replace_points(work, report, store, shard, records)
            with watch.phase("verify"):
                report.verified = _verify_range(work, store if is_there else None)
    missing = sorted(rows.keys() - have)
    if again := [record_id for record_id in missing if was_done(rows[record_id])]:
        raise VectorsMissingError(work.id_range.partition_key, again)
    num_points = sum(report.num_points.values())
    report.numbers = {
        "videos": len(report.num_points),
        "videos_without_vectors": len(missing),
        "points": num_points,
        "points_in_range": report.verified,
        **watch.numbers(own=("write", "verify"), num_frames=num_points),
    }
    _prune_frames(work)
    if num_points:
        _merge_small_shards(work)
    return report


def _should_hold_points(work: RangeWork) -> bool:
    """Whether points of these vectors were verified in an earlier run."""
    return any(
        entry.state == "done" and entry.embedding_fingerprint == work.fingerprints.embedding
        for entry in work.entries().values()
    )


def _open_collection(work: RangeWork, store: PointStore, *, dim: int | None) -> bool:
    """Open the collection of these vectors; without vectors none is created. Returns whether there is one."""
    from extraction_dagster.stages.index.protocol import CollectionSpec  # noqa: PLC0415 - loads the engine
    from extraction_dagster.stages.index.stage import open_for_reading, open_for_writing  # noqa: PLC0415

    if dim is None:
        return open_for_reading(store, work.settings.collection_name, work.fingerprints.embedding)
    open_for_writing(store, CollectionSpec.of(work.settings, dim=dim, fingerprint=work.fingerprints.embedding))
    return True


def _replace_points(
    work: RangeWork, report: Report, store: PointStore, shard: EmbeddingShard, records: Iterable[int]
) -> None:
    """Replace the points of those records of a shard that no newer shard held; mark those that were verified."""
    from extraction_dagster.stages.index.points import generation  # noqa: PLC0415 - loads the engine
    from extraction_dagster.stages.index.stage import index_records  # noqa: PLC0415

    seen = report.num_points.keys() | {failure.record_id for failure in report.failures}
    videos = {record_id: work.plan[record_id].video for record_id in records if record_id not in seen}
    if not videos:
        return
    generations = {
        record_id: generation(
            embedding_fingerprint=work.fingerprints.embedding,
            frames_fingerprint=work.fingerprints.frames,
            content_version=video.content_version,
        )
        for record_id, video in videos.items()
    }
    vectors = work.embedding_store.read(shard).of_records(videos)
    indexed = index_records(store, vectors, rows=videos, generations=generations)
    work.catalog.mark_done(work.plan, indexed.num_points, work.fingerprints)
    work.record_failures(indexed.failures)
    report.num_points.update(indexed.num_points)
    report.failures.extend(indexed.failures)
    _log.info("Marked %d records as embedded", len(indexed.num_points))
    step_progress.advance("qdrant_points", len(videos))


def _verify_range(work: RangeWork, store: PointStore | None) -> int:
    """Compare the whole range with the store once more; what disagrees is pending again. Returns its points."""
    from extraction_dagster.stages.index.reconcile import compare_range  # noqa: PLC0415 - loads the engine

    found = compare_range(work.catalog, store, within=work.id_range, fingerprint=work.fingerprints.embedding)
    if not found.agrees:
        work.catalog.make_pending(found.to_write_again)
        raise PointsChangedError(
            work.id_range.partition_key,
            lost=sum(found.lost.values()),
            surplus=sum(found.stale.values()),
            record_ids=found.to_write_again,
        )
    return found.held


def _prune_frames(work: RangeWork) -> None:
    """Remove frames that the settings don't keep, now that their records are done."""
    keep = keep_time(work.settings.keep_frames)
    if keep is not None:
        entries = work.entries()
        prune_frames(work.frame_store, work.id_range, entries, work.fingerprints, keep=keep)
        for store in (work.frame_store, work.embedding_store):
            prune_former(store, work.id_range, entries, work.fingerprints, keep=keep)


def _merge_small_shards(work: RangeWork) -> None:
    """Merge small shards once there are many; those that can't be merged now stay."""
    options = CompactionOptions.from_settings(work.settings)
    try:
        compact(work.frame_store, work.id_range, options, entries=work.entries())
        compact(work.embedding_store, work.id_range, options)
    except (OSError, ShardStoreError) as error:
        _log.warning("Small shards of range %s stay as they are: %s", work.id_range, error)
