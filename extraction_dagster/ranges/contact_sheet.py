"""A few frames of what a run decoded, as Markdown for Dagster's UI: pictures inside, nothing fetched."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from extraction_dagster.stages.decode.jpeg import shrink_jpeg
from extraction_dagster.stages.decode.sampling import evenly

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extraction_dagster.stages.decode.stage import Preview

_LONGEST_PX = 128
_QUALITY = 70
_COLUMNS = 4
# It stays in Dagster's event log for ever, once for each materialization.
MAX_BYTES = 60_000


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
