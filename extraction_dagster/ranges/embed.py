"""Embed a range: frame shards -> vectors -> embedding shards, one for one.

    frame shard 0001   rows 1, 2    its vectors are stored already              left as it is
    frame shard 0002   row 3        row 3 is pending and has no vectors yet     read, embedded, stored

The ledger notes a row as embedded once the vectors of all these shards were read back and have length 1. The source's
own mark waits for the points.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from extraction_dagster import step_progress
from extraction_dagster.errors.runs import FramesMissingError, SettingsChangedError
from extraction_dagster.ranges.work import RangeWork, Report, Stopwatch, frames_by_record, vectors_fingerprint, was_done

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from extraction_dagster.records import Failure
    from extraction_dagster.shards.embedding_store import EmbeddingShard
    from extraction_dagster.shards.frame_store import FrameShard
    from extraction_dagster.stages.catalog.catalog import PlannedRow
    from extraction_dagster.stages.embed.stage import EmbeddedShard


def embed_range(work: RangeWork) -> Report:
    """Embed the frame shards that hold a pending row and have no vectors yet; in a forced run, all of them.

    Raises:
        FramesMissingError: Rows that were done before are to be embedded again, and their frames are not stored.
        SettingsChangedError: The model's files have changed since the step began; nothing was embedded.
    """
    from extraction_dagster.stages.embed.passes import count_unnormalised  # noqa: PLC0415 - beside the model

    watch, report, rows, store = Stopwatch(), Report(), work.selected, work.embedding_store
    there = {} if work.force else frames_by_record(store.shards(work.id_range), rows)
    shards = [
        shard for shard in work.frame_store.shards(work.id_range) if frames_by_record([shard], rows).keys() - there
    ]
    step_progress.begin("frame_embeddings", sum(len(shard.records) for shard in shards))
    num_frames = num_bytes = 0
    written: list[EmbeddingShard] = []
    for done in _embed(work, shards, watch) if shards else ():
        failed = [failure for failure in done.failures if _concerns(failure, rows)]
        work.record_failures(failed)
        report.failures += failed
        num_frames, num_bytes = num_frames + done.num_frames, num_bytes + 2 * done.shard.dim * done.num_frames
        written.append(done.shard)
        step_progress.advance("frame_embeddings", len(done.shard.records) + len(done.failures))
    with watch.phase("verify"):
        report.unnormalised = sum(count_unnormalised(store.read(shard).vectors) for shard in written)
    have = there | frames_by_record(written, rows)
    if not report.unnormalised:
        work.catalog.mark_embedded(_unmarked(work, have), work.fingerprints.embedding, plan=work.plan)
    missing = sorted(rows.keys() - have.keys() - {failure.record_id for failure in report.failures})
    if again := [record_id for record_id in missing if was_done(rows[record_id])]:
        raise FramesMissingError(work.id_range.partition_key, again)
    report.numbers = {
        "videos": len(have),
        "videos_without_frames": len(missing),
        "frames": num_frames,
        "bytes": num_bytes,
        "shards": len(shards),
        **watch.numbers(own=("load", "embed", "verify"), num_frames=num_frames),
    }
    return report


def _embed(work: RangeWork, shards: list[FrameShard], watch: Stopwatch) -> Iterator[EmbeddedShard]:
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
        shards,
        frames=work.frame_store,
        store=work.embedding_store,
        model=model,
        partition=work.id_range,
        settings=work.settings,
        reuse=not work.force,
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
