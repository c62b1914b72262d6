"""Ranges: cut from a backlog, and a span covered with those that are there and new ones where none is."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.ranges import Cover, cover_span, cut_backlog, merge, narrowest_parts


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


# A span covered with ranges.


def ranges(*keys):
    return tuple(IdRange.parse(key) for key in keys)


def parts(span, *keys):
    found = narrowest_parts(IdRange.parse(span), ranges(*keys))
    return [(str(part), None if owner is None else str(owner)) for part, owner in found]


def covered(database, span, *keys, batch_size=3):
    catalog = database.catalog()
    cover = cover_span(catalog.source, IdRange.parse(span), ranges(*keys), batch_size)
    catalog.close()
    return cover


def test_parts_of_ranges_that_touch_are_the_ranges_and_the_gap():
    assert parts("1-50", "1-10", "11-20", "31-40") == [
        ("1-10", "1-10"),
        ("11-20", "11-20"),
        ("21-30", None),
        ("31-40", "31-40"),
        ("41-50", None),
    ]


def test_of_ranges_that_overlap_each_id_goes_to_the_narrowest():
    assert parts("5-30", "1-100", "8-12", "11-20") == [
        ("5-7", "1-100"),
        ("8-12", "8-12"),
        ("13-20", "11-20"),
        ("21-30", "1-100"),
    ]


def test_the_greatest_ids_are_no_exception():
    least, most = -(2**63), 2**63 - 1
    assert parts(f"{least}-{most}", f"0-{most}") == [(f"{least}--1", None), (f"0-{most}", f"0-{most}")]


spans = st.tuples(st.integers(-20, 20), st.integers(0, 25)).map(lambda pair: IdRange(pair[0], pair[0] + pair[1]))


@given(spans, st.lists(spans, max_size=8))
def test_parts_are_the_span_and_each_id_lies_with_the_narrowest_range(span, existing):
    found = list(narrowest_parts(span, existing))
    ids = [number for part, _ in found for number in range(part.first_id, part.last_id + 1)]
    assert ids == list(range(span.first_id, span.last_id + 1))
    for part, owner in found:
        for number in range(part.first_id, part.last_id + 1):
            widths = [item.last_id - item.first_id for item in existing if number in item]
            assert (owner is None) == (not widths)
            assert owner is None or (number in owner and owner.last_id - owner.first_id == min(widths))


@given(st.lists(spans, max_size=8))
def test_merged_ranges_hold_the_same_ids_ascend_and_leave_gaps(given_ranges):
    merged = merge(given_ranges)
    held = {number for item in given_ranges for number in range(item.first_id, item.last_id + 1)}
    assert {number for item in merged for number in range(item.first_id, item.last_id + 1)} == held
    assert all(after.first_id > before.last_id + 1 for before, after in pairwise(merged))


def test_an_empty_instance_gets_ranges_cut_by_records(database):
    database.create(ids=[*range(1, 8), 101, 102])
    assert covered(database, "1-50000") == Cover(there=(), new=ranges("1-3", "4-6", "7-102"))


def test_ranges_that_are_there_are_used_and_a_gap_is_filled_up_to_the_next(database):
    database.create(ids=range(1, 21))
    cover = covered(database, "1-20", "1-3", "11-13", "14-20", batch_size=4)
    assert cover == Cover(there=ranges("1-3", "11-13", "14-20"), new=ranges("4-7", "8-10"))
    assert [str(item) for item in cover.ranges] == ["1-3", "4-7", "8-10", "11-13", "14-20"]


def test_a_gap_between_ranges_leaves_no_id_to_nobody(database):
    database.create(ids=[1, 2, 6, 20])
    assert covered(database, "1-20", "1-3", "18-30") == Cover(there=ranges("1-3", "18-30"), new=ranges("4-17"))


def test_ranges_are_used_as_a_whole_at_both_ends_of_the_span(database):
    database.create(ids=range(1, 13))
    assert covered(database, "2-8", "1-3", "4-6", "7-9", "10-12") == Cover(there=ranges("1-3", "4-6", "7-9"), new=())


def test_ranges_and_gaps_without_a_row_are_left_out(database):
    database.create(ids=[5, 6])
    assert covered(database, "1-100", "1-4", "20-30") == Cover(there=(), new=ranges("5-19"))
    assert covered(database, "1-4", "1-10") == Cover(there=(), new=())


def test_a_range_that_holds_more_than_two_batches_is_cut_anew(database):
    database.create(ids=range(1, 11))
    assert covered(database, "1-10", "1-1000", batch_size=5) == Cover(there=ranges("1-1000"), new=())
    assert covered(database, "1-10", "1-1000", "4-6", batch_size=4) == Cover(
        there=ranges("4-6"), new=ranges("1-3", "7-10")
    )


def test_rows_that_are_not_eligible_do_not_count(database):
    database.create(ids=range(1, 7))
    database.execute("UPDATE insta_content SET is_downloaded = (id > 3)")
    catalog = database.catalog(source_predicate="is_downloaded")
    cover = cover_span(catalog.source, IdRange(1, 6), ranges("1-3"), 3)
    assert cover == Cover(there=(), new=ranges("4-6"))
    assert catalog.source.counts(ranges("1-3", "2-5", "4-6"), at_most=2) == [0, 2, 2]
    catalog.close()


def test_many_ranges_are_counted_in_the_order_asked(database):
    database.create(ids=range(1, 301))
    catalog = database.catalog()
    asked = [IdRange(first, 300) for first in range(1, 301)]
    assert catalog.source.counts(asked, at_most=1000) == [301 - first for first in range(1, 301)]
    assert catalog.source.counts([], at_most=5) == []
    catalog.close()
