"""Ranges of ids: a backlog is cut into new ones, and a span is covered with those that are there already.

Three ranges of a table with the ids 1…12, 101…112, 201…205, ten records each:

    ids     1 ──── 10 │ 11, 12, 101 ── 108 │ 109 … 112, 201 … 205
    ranges  1-10        11-108               109-205

The next range starts right after the last one, so that no id falls between two ranges, however sparse ids are.

A span is covered with the ranges that are there where they fit, and with new ones where there are none:

    span       1 ─────────────────────────────────────────────── 5000
    there        1-1000 │ 1001-2000                4001-6000
    covered by   1-1000 │ 1001-2000 │ 2001-3000 │ 3001-4000 │ 4001-6000
                  there      there       new          new        there

A range that is there is used as a whole, so that the span may be left at both ends: every range is one partition, and
what is done in it is not done again. Of ranges that overlap, each id goes to the narrowest one. A range that holds more
than two batches is not used: somebody once launched the whole table as one, say.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING

from extraction_dagster.records import IdRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extraction_dagster.stages.catalog.source_table import SourceTable

_MOST_BATCHES = 2  # of records in a range that is used as it is; a tick draws the same line
_MIN_ID = -(2**63)


def cut_backlog(
    source: SourceTable, batch_size: int, *, after_id: int | None = None, up_to_id: int | None = None
) -> Iterator[IdRange]:
    """Cut every eligible row between two ids into ranges of `batch_size` records; the last one may hold fewer.

    The first range starts right above `after_id`, or at the first record.
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


@dataclass(frozen=True, slots=True)
class Cover:
    """Ranges that together hold every eligible row of a span.

    Attributes:
        there: Those that are there already, in ascending order; each holds an eligible row of the span.
        new: Those that are to be registered, in ascending order.
    """

    there: tuple[IdRange, ...]
    new: tuple[IdRange, ...]

    @property
    def ranges(self) -> list[IdRange]:
        """All of them, in ascending order."""
        return sorted((*self.there, *self.new))


def cover_span(source: SourceTable, span: IdRange, existing: Iterable[IdRange], batch_size: int) -> Cover:
    """Find the ranges that hold the eligible rows of a span; those existing come in any order, and may overlap."""
    parts = list(narrowest_parts(span, existing))
    owners = sorted({owner for _, owner in parts if owner is not None})
    most = _MOST_BATCHES * batch_size
    held = dict(zip(owners, source.counts(owners, at_most=most + 1), strict=True))
    fitting = {owner for owner, number in held.items() if number <= most}
    # Where nothing is left out and nothing overlaps, the range's own count says that it holds a row of the span.
    cut_short = [part for part, owner in parts if owner in fitting and part != owner]
    filled = {part for part, number in zip(cut_short, source.counts(cut_short, at_most=1), strict=True) if number}
    there = {owner for part, owner in parts if owner in fitting and (part in filled or (part == owner and held[owner]))}
    gaps = merge(part for part, owner in parts if owner not in fitting)
    return Cover(tuple(sorted(there)), tuple(new for gap in gaps for new in _cut(source, gap, span, batch_size)))


def _cut(source: SourceTable, gap: IdRange, span: IdRange, batch_size: int) -> list[IdRange]:
    """New ranges for a gap; the last one reaches up to the range that follows, so that no id falls between them."""
    after_id = gap.first_id - 1 if gap.first_id > _MIN_ID else None
    cut = list(cut_backlog(source, batch_size, after_id=after_id, up_to_id=gap.last_id))
    if cut and gap.last_id < span.last_id:
        cut[-1] = IdRange(cut[-1].first_id, gap.last_id)
    return cut


def narrowest_parts(span: IdRange, existing: Iterable[IdRange]) -> Iterator[tuple[IdRange, IdRange | None]]:
    """Cut a span into parts, each with the narrowest range that holds it, or None where there is no range.

    In ascending order; together they are the span.
    """
    touching = sorted(item for item in existing if item.first_id <= span.last_id and span.first_id <= item.last_id)
    edges = {span.first_id, span.last_id + 1}
    for item in touching:
        edges.update((max(item.first_id, span.first_id), min(item.last_id, span.last_id) + 1))
    begun: list[tuple[int, IdRange]] = []
    position = 0
    parts: list[tuple[IdRange, IdRange | None]] = []
    for first, after in pairwise(sorted(edges)):
        while position < len(touching) and touching[position].first_id <= first:
            item = touching[position]
            heappush(begun, (item.last_id - item.first_id, item))
            position += 1
        while begun and begun[0][1].last_id < first:
            heappop(begun)
        owner = begun[0][1] if begun else None
        if parts and parts[-1][1] == owner:
            parts[-1] = (IdRange(parts[-1][0].first_id, after - 1), owner)
        else:
            parts.append((IdRange(first, after - 1), owner))
    yield from parts
