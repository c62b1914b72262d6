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
    from collections.abc import Iterator

    from extraction_dagster.stages.catalog.source_table import SourceTable


def cut_backlog(source: SourceTable, batch_size: int, *, after_id: int | None = None) -> Iterator[IdRange]:
    """Cut every eligible row above an id into ranges of `batch_size` records; the last one may hold fewer."""
    while (batch := source.batch_end(after_id, batch_size)) is not None:
        first_record, last_record, _ = batch
        yield IdRange(first_record if after_id is None else after_id + 1, last_record)
        after_id = last_record
