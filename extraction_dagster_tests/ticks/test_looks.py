"""How far a tick looks, and that each look goes on where the last one ended; over real databases."""

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.pending import Unfinished
from extraction_dagster.stages.catalog.state_tables import LEDGER_TABLE
from extraction_dagster.ticks import looks as looks_module
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.looks import Looks, Round
from extraction_dagster.ticks.memory import Memory

NAMES = {"last": "last_processed_id", "frontier": "frontier_id", "floor": "floor_id"}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Four rows of the window in a tick, two in a query, and no time for more than one query above the frontier."""
    monkeypatch.setattr(looks_module, "_BUDGET", 4)
    monkeypatch.setattr(looks_module, "_STEP", 2)
    monkeypatch.setattr(looks_module, "_SECONDS_AHEAD", 0)
    monkeypatch.setattr(looks_module, "_KEEP_EVERY_SECONDS", -1)


@pytest.fixture
def table(database):
    """The rows 1 to 20 with a version, some of which wait for their next try for ever: `table(range(1, 15))`."""
    catalogs = []

    def make(waiting=(), *, ids=range(1, 21), **overrides):
        database.create()
        database.insert(*ids, updated_at="2025-01-01 00:00:00")
        catalogs.append(database.catalog(**overrides))
        for record_id in waiting:
            put(catalogs[-1], record_id, "failed", not_before=datetime(2100, 1, 1, tzinfo=UTC))
        return catalogs[-1]

    yield make
    for catalog in catalogs:
        catalog.close()


def put(catalog, record_id, state, **values):
    """An entry of the ledger."""
    version = "2025-01-01 00:00:00" if catalog.source.has_version else ""
    values = {"source_version": version, **values}
    with catalog.state_engine.begin() as connection:
        connection.execute(
            sa.insert(LEDGER_TABLE).values(record_id=record_id, state=state, updated_at=datetime.now(UTC), **values)
        )


def look(catalog, memory, *, taken=(), whole=None, keep=lambda: None, **marks):
    cursor = CursorState(catalog.source.identity, **{NAMES[name]: value for name, value in marks.items()})
    return Looks(catalog, cursor, memory, taken=list(taken), whole=whole, keep=keep)


def window(catalog, memory, **options):
    return look(catalog, memory, frontier=20, **options).window()


def test_rows_that_wait_hide_no_due_row_above_them(table):
    catalog, memory = table(range(1, 14)), Memory()
    found = [window(catalog, memory) for _ in range(6)]
    # Each time the first ones, for the watermark; then a part further on, and at the end from the beginning.
    assert [item.pending_ids for item in found] == [[], [], [14, 15, 16], [17, 18, 19, 20], [], []]
    assert {(item.reached_id, item.finished_up_to) for item in found} <= {(4, None), (2, None)}
    assert found[0].unfinished[:2] == (Unfinished(1, pending=False), Unfinished(2, pending=False))
    assert memory.window_after_id == 8


def test_the_whole_window_is_looked_through_for_who_says_that_nothing_is_due(table):
    catalog = table(range(1, 20))
    assert window(catalog, Memory(), whole=Round()).pending_ids == [20]
    assert window(catalog, Memory(), whole=Round(), taken=[IdRange(20, 20)]).reached_id == 4
    put(catalog, 20, "parked")
    assert window(catalog, Memory(window_after_id=18), whole=Round()).pending_ids == []


def test_a_window_that_is_looked_at_in_one_has_no_place_to_go_on_from(table):
    catalog, memory = table(ids=(1, 2, 3)), Memory(window_after_id=2)
    assert window(catalog, memory).pending_ids == [1, 2, 3]
    put(catalog, 1, "parked")
    put(catalog, 2, "parked")
    memory = Memory(window_after_id=2)
    assert (window(catalog, memory, last=2).pending_ids, memory.window_after_id) == ([3], None)


def test_rows_that_wait_above_the_frontier_hide_no_due_row_either(table):
    catalog, memory = table(range(1, 10), ids=range(1, 12)), Memory()
    places, found = [], []
    for _ in range(4):
        found.append(look(catalog, memory).ahead(2, nothing_before=True).pending_ids)
        places.append(memory.ahead_after_id)
    assert (found, places) == ([[], [], [], [10]], [4, 6, 8, 8])
    assert look(catalog, memory).ahead(2, nothing_before=True).pending_ids == [10]  # it stays until that is handed out
    assert look(catalog, memory, frontier=10).ahead(2, nothing_before=False).pending_ids == [11]


def test_done_rows_above_the_frontier_are_passed_in_parts_while_something_below_waits(table):
    catalog, memory = table(ids=range(1, 12), source_extracted_column="", source_embedded_column=""), Memory()
    for record_id in range(2, 10):
        put(catalog, record_id, "done")
    found = [look(catalog, memory, frontier=1).ahead(2, nothing_before=False).pending_ids for _ in range(4)]
    assert found == [[], [], [], [10, 11]]
    # While nothing below waits, the frontier itself follows.
    moved = look(catalog, Memory(ahead_after_id=9), frontier=1).ahead(2, nothing_before=True)
    assert (moved.pending_ids, moved.finished_up_to) == ([], 5)
    assert look(catalog, Memory(), frontier=1, whole=Round()).ahead(2, nothing_before=True).pending_ids == [10, 11]


def sweep(catalog, memory, **options):
    return look(catalog, memory, last=20, **options).sweep()


@pytest.fixture
def versions(table, database):
    """Rows that are done, of which some have another version now: `versions(3, 17)`."""

    def make(*changed):
        catalog = table(source_version_column="updated_at")
        database.execute("UPDATE insta_content SET is_extracted = true, is_embedded = true")
        for record_id in range(1, 21):
            put(catalog, record_id, "done")
        for record_id in changed:
            database.execute("UPDATE insta_content SET updated_at = '2025-02-02 00:00:00' WHERE id = :id", id=record_id)
        return catalog

    return make


def test_a_whole_sweep_stays_where_it_finds_rows_and_then_goes_on(versions):
    catalog, memory, whole = versions(3, 4, 17), Memory(), Round()
    assert (sweep(catalog, memory, whole=whole), memory.sweep_after_id) == ([3, 4], 2)
    assert sweep(catalog, memory, whole=whole) == [3, 4]
    taken = [IdRange(3, 4)]  # a run works there
    assert (sweep(catalog, memory, whole=whole, taken=taken), memory.sweep_after_id) == ([17], 16)
    assert not whole.is_over
    assert sweep(catalog, memory, whole=whole, taken=[*taken, IdRange(17, 17)]) == []
    assert (whole.is_over, memory.sweep_after_id) == (True, None)


def test_a_whole_sweep_that_was_stopped_goes_on_and_comes_to_where_it_began(versions):
    catalog, memory = versions(3, 9), Memory(sweep_after_id=10)
    whole, places = Round(memory.sweep_after_id), []
    found = sweep(catalog, memory, whole=whole, keep=lambda: places.append(memory.sweep_after_id))
    assert (found, whole.is_second_half) == ([3], True)
    assert places == [12, 14, 16, 18, 20, None, 2]  # kept as it goes
    rest = sweep(catalog, memory, whole=whole, taken=[IdRange(3, 3)])
    assert (rest, whole.is_over) == ([9], False)
    assert sweep(catalog, memory, whole=whole, taken=[IdRange(3, 3), IdRange(9, 9)]) == []
    assert whole.is_over


def test_a_part_of_a_sweep_ends_in_time_and_the_next_goes_on(versions, monkeypatch):
    monkeypatch.setattr(looks_module, "_SECONDS_A_PART", 0)
    catalog, memory, places = versions(3), Memory(ticks=1), []
    keep = lambda: places.append(memory.sweep_after_id)  # noqa: E731 - two words
    assert [sweep(catalog, memory, keep=keep) for _ in range(3)] == [[], [3], []]
    assert places == [2, 4, 6]
    monkeypatch.setattr(looks_module, "_SECONDS_A_PART", 5)
    assert (sweep(catalog, memory), memory.sweep_after_id) == ([], 10)


def test_without_a_watermark_there_is_nothing_to_sweep(versions):
    whole = Round(7)
    assert (look(versions(3), Memory(), whole=whole).sweep(), whole.is_over) == ([], True)
