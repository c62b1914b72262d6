"""Index a range: embedding shards -> points in Qdrant, verified; then the rows are done.

newest shard first   row 3's points replaced, counted in the store, marked; then row 2's; ...
                     of each row, its newest copy alone; none of a row that somebody else has claimed meanwhile
the whole range      compared with the store once more: what disagrees is pending again
at the end           frames that the settings don't keep are removed, small shards are merged
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from extraction_dagster import step_progress
from extraction_dagster.errors import some
from extraction_dagster.errors.decode import EmbeddingShardError, ShardStoreError
from extraction_dagster.errors.index import PointsChangedError, PointStoreError
from extraction_dagster.errors.runs import VectorsMissingError
from extraction_dagster.ranges.work import RangeWork, Report, Stopwatch, was_done
from extraction_dagster.records import IdRange
from extraction_dagster.shards.compaction import CompactionOptions, compact
from extraction_dagster.shards.retention import keep_time, prune_former, prune_frames
from extraction_dagster.shards.store import by_shard

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from extraction_dagster.records import VideoRow
    from extraction_dagster.shards.embedding_store import EmbeddingShard
    from extraction_dagster.shards.store import Copy
    from extraction_dagster.stages.catalog.ledger import LedgerEntry
    from extraction_dagster.stages.index.protocol import PointStore

_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too
_MOST_LOOKS = 5  # at what is stored, when shards turn out to be damaged or are merged by others


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
    writer = _Writer(work, report)
    copies, entries = writer.copies(), None
    step_progress.begin("qdrant_points", len(copies))
    if copies or _should_hold_points(work):
        with open_point_store(work.settings, wait_seconds=work.settings.qdrant_timeout_seconds) as store:
            is_there = _open_collection(work, store, dim=next((copy.shard.dim for copy in copies.values()), None))
            with watch.phase("write"):
                writer.write(store, copies)
            with watch.phase("verify"):
                entries = work.entries()
                report.verified = _verify_range(work, store if is_there else None, entries, written=report.num_points)
    missing = sorted(rows.keys() - writer.handled)
    if unread := copies.keys() - writer.handled:  # their run goes on: the next one makes their vectors
        work.catalog.make_pending(sorted(unread))
    if again := [record_id for record_id in missing if was_done(rows[record_id]) and record_id not in unread]:
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
        _merge_small_shards(work, entries or {})
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


@dataclass(slots=True)
class _Writer:
    """Writes the points of a range's rows, shard by shard.

    Attributes:
        work: The range.
        report: Gets the numbers of points and the failures.
        handled: Rows that need nothing more from this run: written, failed, or claimed by somebody else.
    """

    work: RangeWork
    report: Report
    handled: set[int] = field(default_factory=set)

    def copies(self) -> dict[int, Copy[EmbeddingShard]]:
        """The newest vectors of each row that is still to be written."""
        rows = {key: planned for key, planned in self.work.selected.items() if key not in self.handled}
        return self.work.stored(self.work.embedding_store, rows)

    def write(self, store: PointStore, copies: Mapping[int, Copy[EmbeddingShard]]) -> None:
        """Write each row's newest copy; where its shard is damaged, the newest that is left."""
        for _ in range(_MOST_LOOKS):
            were_readable = [self._write_shard(store, shard, records) for shard, records in reversed(by_shard(copies))]
            if all(were_readable):
                return
            copies = self.copies()

    def _write_shard(self, store: PointStore, shard: EmbeddingShard, records: Sequence[int]) -> bool:
        """Replace the points of some records of a shard, and mark them. Returns whether the shard could be read."""
        from extraction_dagster.stages.index.stage import index_records  # noqa: PLC0415 - loads the engine

        work = self.work
        videos = {key: work.plan[key].video for key in sorted(self._still_claimed(records))}
        if not videos:
            return True
        try:
            vectors = work.embedding_store.read(shard, only=videos)
        except EmbeddingShardError as error:
            if not error.gone:
                work.embedding_store.set_aside(shard, "it is damaged")
            return False
        generations = self._generations(videos)
        try:
            indexed = index_records(store, vectors, rows=videos, generations=generations)
        except PointStoreError:  # points that another run wrote meanwhile, and that we may have removed
            self._let_others_win(videos.keys() - self._still_claimed(list(videos)), generations)
            raise
        won = work.catalog.mark_done(work.plan, indexed.num_points, work.fingerprints, generations=generations)
        self._let_others_win(indexed.num_points.keys() - won, generations)
        work.record_failures(indexed.failures)
        self.handled.update(videos)
        self.report.num_points.update((key, number) for key, number in indexed.num_points.items() if key in won)
        self.report.failures.extend(indexed.failures)
        _log.info("Marked %d records as embedded", len(won))
        step_progress.advance("qdrant_points", len(videos))
        return True

    def _generations(self, videos: Mapping[int, VideoRow]) -> dict[int, str]:
        from extraction_dagster.stages.index.points import generation  # noqa: PLC0415 - loads the engine

        made_with, source = self.work.fingerprints, self.work.catalog.source.identity
        return {
            key: generation(
                embedding_fingerprint=made_with.embedding,
                frames_fingerprint=made_with.frames,
                content_version=video.content_version,
                source=source,
                address=video.address,
            )
            for key, video in videos.items()
        }

    def _still_claimed(self, records: Sequence[int]) -> set[int]:
        """Leave out the rows that another run or an operator has claimed since this one was planned."""
        claims = self.work.catalog.ledger.claims(records)
        others = [key for key in records if claims.get(key, 0) != self.work.plan[key].claim]
        if others:
            _log.warning("Left out %d records that were claimed by others meanwhile (%s)", len(others), some(others))
            self.handled.update(others)
        return set(records).difference(others)

    def _let_others_win(self, losers: Iterable[int], generations: Mapping[int, str]) -> None:
        """Make rows pending whose newer points this run may have written over.

        One that is not done yet needs nothing: whoever has claimed it writes its points after ours, or compares them
        at the end of its run.
        """
        lost = sorted(losers)
        if not lost:
            return
        entries = self.work.catalog.ledger.entries(IdRange(lost[0], lost[-1]))
        overwritten = [
            key
            for key in lost
            if key in entries and entries[key].state == "done" and entries[key].generation != generations[key]
        ]
        if overwritten:
            _log.warning("Pending again, since older points may stand in place of newer ones: %s", some(overwritten))
            self.work.catalog.make_pending(overwritten)


def _verify_range(
    work: RangeWork, store: PointStore | None, entries: Mapping[int, LedgerEntry], *, written: Collection[int]
) -> int:
    """Compare the whole range with the store once more; what disagrees is pending again. Returns its points.

    The records that this run wrote are compared one by one, the others by their number of points together.
    """
    from extraction_dagster.stages.index.reconcile import compare_range  # noqa: PLC0415 - loads the engine

    made_with = work.fingerprints.embedding
    found = compare_range(
        work.catalog, store, within=work.id_range, fingerprint=made_with, only=written, entries=entries
    )
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
        prune_former(work.frame_store, work.id_range, entries, work.fingerprints, keep=keep)
        prune_former(work.embedding_store, work.id_range, entries, work.fingerprints, keep=keep)


def _merge_small_shards(work: RangeWork, entries: Mapping[int, LedgerEntry]) -> None:
    """Merge small shards once there are many; those that can't be merged now stay."""
    options = CompactionOptions.from_settings(work.settings)
    try:
        compact(work.frame_store, work.id_range, options, entries=entries)
        compact(work.embedding_store, work.id_range, options)
    except (OSError, ShardStoreError) as error:
        _log.warning("Small shards of range %s stay as they are: %s", work.id_range, error)
