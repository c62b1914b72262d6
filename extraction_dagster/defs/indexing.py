"""What qdrant_points does with its range."""

import logging
from typing import TYPE_CHECKING

from extraction_dagster import progress
from extraction_dagster.defs.metadata import Stopwatch
from extraction_dagster.defs.range_work import RangeWork, Report, lacking, stored, was_done
from extraction_dagster.errors.index import PointsChangedError
from extraction_dagster.errors.runs import VectorsMissingError
from extraction_dagster.records import EmbeddingBatch

if TYPE_CHECKING:
    from extraction_dagster.stages.index.protocol import PointStore

_log = logging.getLogger(__name__)  # managed by Dagster: what is said here is in the run's events too


def index_range(work: RangeWork) -> Report:
    """Replace the points of every pending row whose vectors are stored, shard by shard; mark each once it is verified.

    An interruption costs one shard at most.

    Raises:
        VectorsMissingError: Rows that were done before are to be indexed anew, and their vectors are not stored.
        PointsMissingError: The store does not hold what it acknowledged; the rows are not marked.
        PointsChangedError: It did, and does not any more; the rows are pending again.
    """
    from extraction_dagster.stages.index.stage import open_point_store  # noqa: PLC0415 - loads the engine

    watch, report, due = Stopwatch(), Report(), work.due
    embeddings = work.extraction.embedding_store()
    newest_first = embeddings.shards(work.id_range)[::-1]
    shards = [(shard, records) for shard in newest_first if (records := stored([shard], due))]
    have = {record_id for _, records in shards for record_id in records}
    progress.begin("qdrant_points", len(have))
    num_points: dict[int, int] = {}
    if newest_first or _should_hold_points(work):
        with open_point_store(work.settings, wait_seconds=work.settings.qdrant_timeout_seconds) as store:
            is_there = _open(work, store, dim=newest_first[0].dim if newest_first else None)
            with watch.phase("write"):
                for shard, records in shards:
                    seen = num_points.keys() | {failure.record_id for failure in report.failures}
                    if wanted := [record_id for record_id in records if record_id not in seen]:
                        num_points |= _replace(work, report, store, embeddings.read(shard), wanted)
            with watch.phase("verify"):
                report.verified = _verify(work, store if is_there else None)
    missing = lacking(due, have)
    if again := [record_id for record_id in missing if was_done(due[record_id])]:
        raise VectorsMissingError(work.id_range.partition_key, again)
    report.numbers = {
        "videos": len(num_points),
        "videos_without_vectors": len(missing),
        "points": sum(num_points.values()),
        "points_in_range": report.verified,
        **watch.numbers(own=("write", "verify"), num_frames=sum(num_points.values())),
    }
    return report


def _should_hold_points(work: RangeWork) -> bool:
    """Whether points of these vectors were verified in an earlier run."""
    return any(
        entry.state == "done" and entry.embedding_fingerprint == work.made_with.embedding
        for entry in work.entries().values()
    )


def _open(work: RangeWork, store: "PointStore", *, dim: int | None) -> bool:
    """Open the collection of these vectors; without vectors none is created. Returns whether there is one."""
    from extraction_dagster.stages.index.protocol import CollectionSpec  # noqa: PLC0415 - loads the engine
    from extraction_dagster.stages.index.stage import open_for_reading, open_for_writing  # noqa: PLC0415

    if dim is None:
        return open_for_reading(store, work.settings.collection_name, work.made_with.embedding)
    open_for_writing(store, CollectionSpec.of(work.settings, dim=dim, fingerprint=work.made_with.embedding))
    return True


def _replace(
    work: RangeWork,
    report: Report,
    store: "PointStore",
    vectors: EmbeddingBatch,
    wanted: list[int],
) -> dict[int, int]:
    """Replace the points of some records of a shard, and mark those that were verified."""
    from extraction_dagster.stages.index.points import generation  # noqa: PLC0415 - loads the engine
    from extraction_dagster.stages.index.stage import index_records  # noqa: PLC0415

    videos = {record_id: work.plan[record_id].video for record_id in wanted}
    generations = {
        record_id: generation(
            embedding_fingerprint=work.made_with.embedding,
            frames_fingerprint=work.made_with.frames,
            content_version=video.content_version,
        )
        for record_id, video in videos.items()
    }
    indexed = index_records(store, vectors.of_records(wanted), rows=videos, generations=generations)
    work.catalog.mark_done(work.plan, indexed.num_points, work.made_with)
    work.write_failures(indexed.failures)
    report.failures.extend(indexed.failures)
    _log.info("Marked %d records as embedded", len(indexed.num_points))
    progress.advance("qdrant_points", len(wanted))
    return dict(indexed.num_points)


def _verify(work: RangeWork, store: "PointStore | None") -> int:
    """Hold the whole range against the store once more; what disagrees is pending again. Returns its points."""
    from extraction_dagster.stages.index.reconcile import compare_range  # noqa: PLC0415 - loads the engine

    found = compare_range(work.catalog, store, within=work.id_range, fingerprint=work.made_with.embedding)
    if not found.agrees:
        work.catalog.request_again(found.to_write_again)
        raise PointsChangedError(
            work.id_range.partition_key,
            lost=sum(found.lost.values()),
            surplus=sum(found.stale.values()),
            record_ids=found.to_write_again,
        )
    return found.held
