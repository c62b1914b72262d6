"""Hold what the store has against what the table says, and copy one store to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from extraction_dagster.errors.index import PointsMissingError
from extraction_dagster.stages.index.filters import PointFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.index.protocol import PointStore

_RECORDS_PER_CALL = 512
_RECORDS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ExpectedPoints:
    """What the table says of one record.

    Attributes:
        num_points: How many points were verified when the row was marked.
        generation: What they were made from.
    """

    num_points: int
    generation: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Where a store and the table disagree; each maps a record id to a number of points.

    Attributes:
        lost: Points that should be there: materialize these records again.
        stale: Points of a record that should be there, but from another generation or too many: materialize again.
        orphans: Points of records that should have none: remove them.
    """

    lost: Mapping[int, int] = field(default_factory=dict)
    stale: Mapping[int, int] = field(default_factory=dict)
    orphans: Mapping[int, int] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether there is no difference."""
        return not (self.lost or self.stale or self.orphans)


def compare_points(store: PointStore, expected: Mapping[int, ExpectedPoints], *, within: IdRange) -> Comparison:
    """Compare a range of ids, record by record, by exact counts.

    Args:
        store: With its collection open.
        expected: Every record of the range that should have points.
        within: The range; points of records in it that are not expected are orphans.
    """
    held = store.count_by_record(PointFilter(record_id_range=within))
    current = _count_current(store, expected)
    lost = {record_id: want.num_points - current.get(record_id, 0) for record_id, want in expected.items()}
    # Whatever a record holds beyond its expected points of the right generation.
    stale = {
        record_id: held.get(record_id, 0) - min(current.get(record_id, 0), want.num_points)
        for record_id, want in expected.items()
    }
    return Comparison(
        lost={record_id: count for record_id, count in lost.items() if count > 0},
        stale={record_id: count for record_id, count in stale.items() if count > 0},
        orphans={record_id: count for record_id, count in sorted(held.items()) if record_id not in expected},
    )


def copy_points(source: PointStore, target: PointStore, *, on_copied: Callable[[int], None] | None = None) -> int:
    """Write every point of one store into another, and see that each record has as many there.

    It can be repeated: a point that is there already is written over. Points that only the target has are left alone,
    unless their record is in the source: then they are counted and refused.

    Args:
        source: With its collection open.
        target: With its collection open, of the same embedding.
        on_copied: Told the number of points copied so far.

    Returns:
        The number of points copied.

    Raises:
        PointsMissingError: A record has more or fewer points in the target.
    """
    copied = 0
    for batch in source.read():
        target.upsert(batch)
        copied += len(batch)
        if on_copied is not None:
            on_copied(copied)
    wanted, found = source.count_by_record(), target.count_by_record()
    wrong = {record_id: count for record_id, count in wanted.items() if found.get(record_id, 0) != count}
    if wrong:
        got = sum(found.get(record_id, 0) for record_id in wanted)
        shown = [f"record {key}: {found.get(key, 0)} of {wrong[key]}" for key in sorted(wrong)[:_RECORDS_SHOWN]]
        raise PointsMissingError(
            when="in the target after copying them", expected=copied, got=got, records=", ".join(shown)
        )
    target.flush()
    return copied


def _count_current(store: PointStore, expected: Mapping[int, ExpectedPoints]) -> dict[int, int]:
    counts: dict[int, int] = {}
    records = list(expected)
    for start in range(0, len(records), _RECORDS_PER_CALL):
        part = records[start : start + _RECORDS_PER_CALL]
        generations = {record_id: expected[record_id].generation for record_id in part}
        counts |= store.count_by_record(PointFilter.current(generations))
    return counts
