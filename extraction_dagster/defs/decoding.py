"""What video_frames does with its range."""

import logging
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING

from extraction_dagster import progress
from extraction_dagster.defs.contact_sheet import ContactSheet
from extraction_dagster.defs.metadata import Stopwatch
from extraction_dagster.defs.range_work import RangeWork, Report, stored
from extraction_dagster.errors.shards import ShardStoreError
from extraction_dagster.records import IdRange

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.catalog import PlannedRow

_log = logging.getLogger(__name__)  # managed by Dagster: what is said here is in the run's events too


def decode_range(work: RangeWork) -> Report:
    """Fetch, decode and sample the pending rows; finished shards of an earlier try are kept."""
    from extraction_dagster.stages.decode.stage import LandedShard, decode_rows  # noqa: PLC0415 - loads the decoders' neighbours

    watch, report, todo = Stopwatch(), Report(), work.todo
    store = work.extraction.frame_store()
    kept = stored(store.shards(work.id_range), todo)
    _mark_extracted(work, {key: number for key, number in kept.items() if _unmarked(todo[key])})
    rows = [planned.video for record_id, planned in todo.items() if record_id not in kept]
    if rows:
        _log.info("Processing batch of %d records (IDs: %d - %d)", len(rows), *_bounds(work.id_range))
    else:
        _log.info("Nothing to decode (IDs: %d - %d)", *_bounds(work.id_range))
    progress.begin("video_frames", len(rows))
    sheet = ContactSheet(work.settings.contact_sheet_frames)
    num_frames = num_bytes = num_partial = 0

    def keep(landed: LandedShard) -> None:
        nonlocal num_frames, num_bytes, num_partial
        if landed.shard is not None:
            _mark_extracted(work, {record.record_id: record.num_frames for record in landed.shard.records})
            num_partial += sum(record.partial is not None for record in landed.shard.records)
        work.write_failures(landed.failures)
        report.failures.extend(landed.failures)
        watch.add("decode", landed.cpu_seconds)
        sheet.add(landed.previews)
        num_frames, num_bytes = num_frames + landed.num_frames, num_bytes + landed.num_bytes
        progress.advance("video_frames", landed.num_videos + len(landed.failures))

    shards = decode_rows(rows, store=store, partition=work.id_range, settings=work.settings)
    with closing(shards):  # an interruption keeps, and marks, what was finished by then
        for landed in shards:
            keep(landed)
    report.markdown = sheet.markdown()
    report.numbers = {
        "videos": len(rows) - len(report.failures),
        "videos_kept": len(kept),
        "videos_partial": num_partial,
        "frames": num_frames,
        "bytes": num_bytes,
        **watch.numbers(num_frames=num_frames),
    }
    return report


def let_frames_go(work: RangeWork) -> None:
    """Remove frames that the settings keep no longer, now that their records are done."""
    from extraction_dagster.shards.retention import keep_time, prune_frames  # noqa: PLC0415

    keep = keep_time(work.settings.keep_frames)
    if keep is not None:
        prune_frames(work.extraction.frame_store(), work.id_range, work.entries(), work.made_with, keep=keep)


def merge_small_shards(work: RangeWork) -> None:
    """Merge small shards once there are many; what can't be merged now is left as it is."""
    from extraction_dagster.shards.compaction import CompactionOptions, compact  # noqa: PLC0415

    options = CompactionOptions.from_settings(work.settings)
    try:
        compact(work.extraction.frame_store(), work.id_range, options, entries=work.entries())
        compact(work.extraction.embedding_store(), work.id_range, options)
    except (OSError, ShardStoreError) as error:
        _log.warning("Small shards of range %s stay as they are: %s", work.id_range, error)


def _bounds(id_range: IdRange) -> tuple[int, int]:
    return id_range.first_id, id_range.last_id


def _unmarked(planned: "PlannedRow") -> bool:
    return planned.entry is None or planned.entry.state not in {"extracted", "embedded", "done"}


def _mark_extracted(work: RangeWork, num_frames: Mapping[int, int]) -> None:
    if num_frames:
        work.catalog.mark_extracted(work.plan, num_frames, work.made_with.frames)
        _log.info("Marked %d records as extracted", len(num_frames))
