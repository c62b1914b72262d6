"""Decode a range: pending rows -> video files -> frame shards; each shard's rows are marked as soon as it is stored.

    plan      row 1 pending    row 2 pending    row 3 pending, an earlier try stored its frames, or its vectors
    decode    frames           a dead link      -
    marks     extracted        failed           extracted

A row that fails is written to the errors table when it fails, not at the end of the range. A contact sheet shows a few
of the range's frames in Dagster's UI, also those of earlier runs, as Markdown: pictures inside, nothing fetched.
"""

from __future__ import annotations

import base64
import logging
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING

from extraction_dagster import step_progress
from extraction_dagster.errors.decode import FrameShardError
from extraction_dagster.ranges.work import RangeWork, Report, Stopwatch
from extraction_dagster.shards.store import by_shard, newest_copies
from extraction_dagster.stages.decode.jpeg import shrink_jpeg
from extraction_dagster.stages.decode.sampling import evenly

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from extraction_dagster.shards.store import ShardRecord
    from extraction_dagster.stages.catalog.catalog import PlannedRow
    from extraction_dagster.stages.decode.stage import LandedShard, Preview

_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too
_HAS_FRAMES = {"extracted", "embedded", "done"}
_LONGEST_PX = 128
_QUALITY = 70
_COLUMNS = 4
# It stays in Dagster's event log for ever, once for each materialization.
MAX_BYTES = 60_000


def decode_range(work: RangeWork) -> Report:
    """Fetch, decode and sample the pending rows; shards that an earlier try finished are kept.

    Raises:
        DecodeWorkerStartError, FetchSetupError, FrameStoreError: No row is to blame; what was finished is marked.
        PointStoreError: The server would not take the points; nothing was fetched.
    """
    from extraction_dagster.stages.decode.stage import decode_rows  # noqa: PLC0415 - loads what decodes
    from extraction_dagster.stages.index.stage import require_store  # noqa: PLC0415 - loads the engine

    watch, report, counts, pending = Stopwatch(), Report(), Counter[str](), work.pending
    kept, made_with = _kept(work, pending), work.fingerprints.frames
    unmarked = {key: number for key, number in kept.items() if _is_unmarked(pending[key], number, made_with)}
    _mark_extracted(work, unmarked)
    rows = [planned.video for record_id, planned in pending.items() if record_id not in kept]
    if rows:
        require_store(work.settings, work.fingerprints.embedding)
        _log.info("Processing batch of %d records (IDs: %s)", len(rows), _ids_of(work))
    else:
        _log.info("Nothing to decode (IDs: %s)", _ids_of(work))
    step_progress.begin("video_frames", len(rows))
    sheet = ContactSheet(work.settings.contact_sheet_frames)
    shards = decode_rows(rows, store=work.frame_store, partition=work.id_range, settings=work.settings)
    with closing(shards):  # an interruption keeps, and marks, what was finished by then
        for landed in shards:
            _record(work, landed)
            report.failures.extend(landed.failures)
            watch.add("decode", landed.cpu_seconds)
            sheet.add(landed.previews)
            records = landed.shard.records if landed.shard else ()
            counts.update(frames=landed.num_frames, bytes=landed.num_bytes)
            counts.update(videos_partial=sum(record.partial is not None for record in records))
    num_failed = len(report.failures)
    report.failures.extend(work.unreadable)
    _add_earlier(work, sheet, decoded={row.record_id for row in rows})
    report.contact_sheet = sheet.markdown()
    report.numbers = {
        "videos": len(rows) - num_failed,
        "videos_kept": len(kept),
        **{name: counts[name] for name in ("videos_partial", "frames", "bytes")},
        **watch.numbers(num_frames=counts["frames"]),
    }
    return report


def _ids_of(work: RangeWork) -> str:
    """The ids that are there, and how far the range has room for more: `1001 - 46336, room to 825273`."""
    first, last = min(work.plan, default=work.id_range.first_id), max(work.plan, default=work.id_range.last_id)
    room = f", room to {work.id_range.last_id}" if last < work.id_range.last_id else ""
    return f"{first} - {last}{room}"


def _record(work: RangeWork, landed: LandedShard) -> None:
    """Mark the rows of a stored shard, and write failures down; those of dead links come without a shard."""
    if landed.shard is not None:
        _mark_extracted(work, {record.record_id: record.num_frames for record in landed.shard.records})
    work.record_failures(landed.failures)
    step_progress.advance("video_frames", landed.num_videos + len(landed.failures))


def _kept(work: RangeWork, pending: Mapping[int, PlannedRow]) -> dict[int, int]:
    """The number of frames of each row that is not decoded: an earlier try did, and its frames or vectors are stored.

    A row whose points were lost needs no frames, and no file, where its vectors are there. A forced run keeps nothing
    that was made before its rows were claimed.
    """
    vectors = work.stored(work.embedding_store, pending)
    frames = work.stored(work.frame_store, {key: row for key, row in pending.items() if key not in vectors})
    records: dict[int, ShardRecord] = {key: copy.record for key, copy in vectors.items()}
    records |= {key: copy.record for key, copy in frames.items()}
    return {
        key: record.num_frames
        for key, record in records.items()
        if not work.force or work.retries or record.claim >= pending[key].claim
    }


def _is_unmarked(planned: PlannedRow, num_frames: int, made_with: str) -> bool:
    """Whether the ledger does not say of these stored frames that they are the row's."""
    entry = planned.entry
    if entry is None or entry.state not in _HAS_FRAMES:
        return True
    return (entry.num_frames, entry.frames_fingerprint, entry.address) != (num_frames, made_with, planned.address)


def _mark_extracted(work: RangeWork, num_frames: Mapping[int, int]) -> None:
    if num_frames:
        work.catalog.mark_extracted(work.plan, num_frames, work.fingerprints.frames)
        _log.info("Marked %d records as extracted", len(num_frames))


def _add_earlier(work: RangeWork, sheet: ContactSheet, *, decoded: Collection[int]) -> None:
    """Let the sheet tell of the whole range, also where this run did a few of its rows: from the stored frames."""
    from extraction_dagster.stages.decode.stage import preview_of  # noqa: PLC0415 - loads what decodes

    if not work.settings.contact_sheet_frames:
        return
    with_frames = {key for key, entry in work.entries().items() if key in work.plan and entry.state in _HAS_FRAMES}
    earlier = with_frames.difference(decoded)
    copies = newest_copies(work.frame_store.shards(work.id_range)) if earlier else {}
    others = {key: copy for key, copy in copies.items() if key in earlier}

    def read(record_ids: Collection[int]) -> Iterator[Preview]:
        for shard, wanted in by_shard({key: others[key] for key in record_ids}):
            try:
                yield from map(preview_of, work.frame_store.read(shard, only=wanted))
            except FrameShardError as error:  # whoever needs what is damaged makes it again; here it is left out
                _log.info("The contact sheet lacks records %s: %s", ", ".join(map(str, wanted)), error)

    if others:
        sheet.spread(others, read)


class ContactSheet:
    """Gathers previews of a whole run while it goes on, evenly, in little memory.

    Args:
        limit: Show this many thumbnails at most; none for 0.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[Preview] = []
        self._seen, self._stride = 0, 1

    def add(self, previews: Iterable[Preview]) -> None:
        """Add previews of a shard; the more came before, the fewer of them are kept."""
        for preview in previews if self._limit else ():
            if self._seen % self._stride == 0:
                self._kept.append(preview)
            self._seen += 1
            if len(self._kept) >= 4 * self._limit:
                self._kept, self._stride = self._kept[::2], 2 * self._stride

    def spread(self, others: Collection[int], read: Callable[[Collection[int]], Iterable[Preview]]) -> None:
        """Show videos that were not added as well: evenly of all of them, and only so many are read.

        Args:
            others: Records whose frames are stored.
            read: Gives previews of some of them.
        """
        added = {preview.record_id: preview for preview in self._kept}
        known = sorted(added.keys() | others)
        chosen = [known[index] for index in evenly(len(known), min(self._limit, len(known)))]
        stored = read([key for key in chosen if key not in added])
        self._kept = [*(added[key] for key in chosen if key in added), *stored]

    def markdown(self) -> str | None:
        """A table of thumbnails, each over its record and second; None when there is none to show."""
        chosen = [self._kept[index] for index in evenly(len(self._kept), min(self._limit, len(self._kept)))]
        cells, size = [], 0
        for preview in sorted(chosen, key=lambda item: (item.record_id, item.pts_seconds)):
            cell = _cell(preview)
            size += len(cell[0]) + len(cell[1]) + 16
            if size > MAX_BYTES:
                break
            cells.append(cell)
        return _table(cells) if cells else None


def _cell(preview: Preview) -> tuple[str, str]:
    caption = f"{preview.record_id} at {preview.pts_seconds:.1f} s"
    small = shrink_jpeg(preview.jpeg, longest_px=_LONGEST_PX, quality=_QUALITY)
    if small is None:
        return "(damaged)", caption
    return f"![{caption}](data:image/jpeg;base64,{base64.b64encode(small).decode('ascii')})", caption


def _table(cells: list[tuple[str, str]]) -> str:
    width = min(_COLUMNS, len(cells))
    lines = []
    for start in range(0, len(cells), width):
        row = cells[start : start + width]
        row += [("", "")] * (width - len(row))
        lines.append(f"| {' | '.join(picture for picture, _ in row)} |")
        if start == 0:
            lines.append("|" + " --- |" * width)
        lines.append(f"| {' | '.join(caption for _, caption in row)} |")
    return "\n".join(lines)
