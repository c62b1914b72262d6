"""Embed a range: frame shards -> vectors -> embedding shards, one for one.

    row 1    its vectors are stored already, of its present version and file       left as they are
    row 2    it is pending, its newest frames lie in frame shard 0001              read, embedded, stored

The ledger notes a row as embedded once its vectors were read back and have length 1. The source's own mark waits for
the points.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from extraction_dagster import step_progress
from extraction_dagster.errors.decode import EmbeddingShardError
from extraction_dagster.errors.runs import FramesMissingError, SettingsChangedError
from extraction_dagster.ranges.work import RangeWork, Report, Stopwatch, vectors_fingerprint, was_done
from extraction_dagster.records import Failure
from extraction_dagster.shards.store import by_shard

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from extraction_dagster.shards.embedding_store import EmbeddingShard
    from extraction_dagster.shards.frame_store import FrameShard
    from extraction_dagster.stages.catalog.catalog import PlannedRow
    from extraction_dagster.stages.embed.stage import EmbeddedShard


def embed_range(work: RangeWork) -> Report:
    """Embed the newest frames of the pending rows that have no vectors yet; in a forced run, of all rows.

    Raises:
        FramesMissingError: Rows that were done before are to be embedded again, and their frames are not stored.
        SettingsChangedError: The model's files have changed since the step began; nothing was embedded.
        PointStoreError: The server would not take the points; nothing was embedded.
    """
    from extraction_dagster.stages.index.stage import require_store  # noqa: PLC0415 - loads the engine

    watch, report, rows = Stopwatch(), Report(), work.selected
    there = {} if work.force else work.stored(work.embedding_store, rows)
    frames = work.stored(work.frame_store, {key: row for key, row in rows.items() if key not in there})
    parts = by_shard(frames)
    if parts:
        require_store(work.settings, work.fingerprints.embedding)
    step_progress.begin("frame_embeddings", len(frames))
    num_frames = num_bytes = 0
    written: list[EmbeddingShard] = []
    for done in _embed(work, parts, watch) if parts else ():
        failed = [failure for failure in done.failures if _concerns(failure, rows)]
        work.record_failures(failed)
        report.failures += failed
        if done.shard is not None:
            num_frames, num_bytes = num_frames + done.num_frames, num_bytes + 2 * done.shard.dim * done.num_frames
            written.append(done.shard)
        step_progress.advance("frame_embeddings", len(done.shard.records if done.shard else ()) + len(done.failures))
    with watch.phase("verify"):
        have = there.keys() | _verified(work, report, written)
    if not report.unnormalised:
        work.catalog.mark_embedded(_unmarked(work, have), work.fingerprints.embedding, plan=work.plan)
    missing = sorted(rows.keys() - have - {failure.record_id for failure in report.failures})
    if again := [record_id for record_id in missing if was_done(rows[record_id])]:
        raise FramesMissingError(work.id_range.partition_key, again)
    report.numbers = {
        "videos": len(have),
        "videos_without_frames": len(missing),
        "frames": num_frames,
        "bytes": num_bytes,
        "shards": len(parts),
        **watch.numbers(own=("load", "embed", "verify"), num_frames=num_frames),
    }
    return report


def _verified(work: RangeWork, report: Report, written: Sequence[EmbeddingShard]) -> set[int]:
    """The records whose vectors can be read back; those of a shard that can't be fail, and it is set aside."""
    from extraction_dagster.stages.embed.passes import count_unnormalised  # noqa: PLC0415 - beside the model

    have = set[int]()
    for shard in written:
        try:
            report.unnormalised += count_unnormalised(work.embedding_store.read(shard).vectors)
        except EmbeddingShardError as error:
            if not error.gone:
                work.embedding_store.set_aside(shard, "it can't be read back")
            name, said = type(error).__name__, str(error)
            lost = [Failure(item.record_id, item.content_version, "embed", name, said) for item in shard.records]
            work.record_failures(lost)
            report.failures += lost
        else:
            have.update(record.record_id for record in shard.records)
    return have


def _embed(
    work: RangeWork, parts: Iterable[tuple[FrameShard, Collection[int]]], watch: Stopwatch
) -> Iterator[EmbeddedShard]:
    from extraction_dagster.stages.embed.models.registry import load_model  # noqa: PLC0415 - loads torch
    from extraction_dagster.stages.embed.stage import embed_shards  # noqa: PLC0415 - beside the model

    with watch.phase("load"):
        model = load_model(work.settings)
    if model.fingerprint != work.fingerprints.embedding:  # its files were replaced since the step began
        now = replace(work.fingerprints, embedding=model.fingerprint)
        raise SettingsChangedError(
            work.id_range.partition_key, began=vectors_fingerprint(work.fingerprints), now=vectors_fingerprint(now)
        )
    for done in embed_shards(
        parts,
        frames=work.frame_store,
        store=work.embedding_store,
        model=model,
        partition=work.id_range,
        settings=work.settings,
        rows={key: planned.video for key, planned in work.selected.items()},
    ):
        watch.add("embed", done.cpu_seconds)
        yield done


def _unmarked(work: RangeWork, have: Iterable[int]) -> list[int]:
    """Those that the ledger does not know as embedded yet: a run that only tries again writes nothing."""
    wanted = ("embedded", work.fingerprints.embedding)
    known = {key: (item.entry.state, item.entry.embedding_fingerprint) for key, item in work.plan.items() if item.entry}
    return [record_id for record_id in have if known.get(record_id) != wanted]


def _concerns(failure: Failure, rows: Mapping[int, PlannedRow]) -> bool:
    """Whether a failure is one of these rows in its present version."""
    planned = rows.get(failure.record_id)
    return planned is not None and planned.video.content_version == failure.content_version
