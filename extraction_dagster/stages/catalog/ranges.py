"""Cut a backlog of rows into contiguous ranges of ids.

Three ranges of a table with the ids 1…12, 101…112, 201…205, ten records each:

    ids     1 ──── 10 │ 11, 12, 101 ── 108 │ 109 … 112, 201 … 205
    ranges  1-10        11-108               109-205

The next range starts right after the last one, so that no id falls between two ranges, however sparse ids are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extraction_dagster.records import IdRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extraction_dagster.stages.catalog.source_table import SourceTable


def cut_backlog(
    source: SourceTable, batch_size: int, *, after_id: int | None = None, up_to_id: int | None = None
) -> Iterator[IdRange]:
    """Cut every eligible row between two ids into ranges of `batch_size` records; the last one may hold fewer.

    Args:
        source: The table.
        batch_size: Records to a range.
        after_id: The first range starts right above it; at the first record when None.
        up_to_id: The last id that may be in a range; None for none.
    """
    while (batch := source.batch_end(after_id, batch_size, up_to_id=up_to_id)) is not None:
        first_record, last_record, _ = batch
        yield IdRange(first_record if after_id is None else after_id + 1, last_record)
        after_id = last_record


def merge(ranges: Iterable[IdRange]) -> list[IdRange]:
    """The same ids in as few ranges as can be, in ascending order: those that overlap or touch are made one."""
    merged: list[IdRange] = []
    for id_range in sorted(ranges):
        if merged and id_range.first_id <= merged[-1].last_id + 1:
            merged[-1] = IdRange(merged[-1].first_id, max(merged[-1].last_id, id_range.last_id))
        else:
            merged.append(id_range)
    return merged
