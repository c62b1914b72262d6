"""Ranges cut from a backlog: contiguous, and each with a batch of records however sparse the ids are."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.ranges import cut_backlog


class Source:
    """Ids in memory; `SourceTable.batch_end` has its own tests on real databases."""

    def __init__(self, ids):
        self._ids = sorted(ids)

    def batch_end(self, after_id, batch_size, *, up_to_id=None):
        ids = [number for number in self._ids if up_to_id is None or number <= up_to_id]
        batch = [number for number in ids if after_id is None or number > after_id][:batch_size]
        return (batch[0], batch[-1], len(batch) == batch_size) if batch else None


def test_sparse_ids_leave_no_gap_between_ranges():
    ids = [*range(1, 13), *range(101, 113), *range(201, 206)]
    assert list(cut_backlog(Source(ids), 10)) == [IdRange(1, 10), IdRange(11, 108), IdRange(109, 205)]


def test_an_empty_table_has_no_range():
    assert list(cut_backlog(Source([]), 10)) == []


@given(st.sets(st.integers(-(2**63), 2**63 - 1), max_size=60), st.integers(1, 20))
def test_every_id_lies_in_exactly_one_range_and_no_range_holds_more_than_a_batch(ids, batch_size):
    ranges = list(cut_backlog(Source(ids), batch_size))
    assert [sum(number in id_range for id_range in ranges) for number in sorted(ids)] == [1] * len(ids)
    sizes = [sum(number in id_range for number in ids) for id_range in ranges]
    assert all(size == batch_size for size in sizes[:-1])
    assert all(after.first_id == before.last_id + 1 for before, after in pairwise(ranges))
