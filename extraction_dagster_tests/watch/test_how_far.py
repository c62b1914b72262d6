"""How far things are and whether they move, on SQLite and PostgreSQL; the clock is the test's."""

from datetime import UTC, datetime, timedelta

import pytest

from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.state_tables import LEDGER_TABLE
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.watch.how_far import (
    Figures,
    ProgressMemory,
    look,
    recall_progress,
    remember_progress,
)

MADE_WITH = Fingerprints(frames="f", embedding="e")
ALL = IdRange(1, 100)
START = datetime.now(UTC) + timedelta(days=1)  # after whatever the ledger writes down


@pytest.fixture
def catalog(database):
    database.create(ids=range(1, 11))
    catalog = database.catalog(stuck_seconds=3600, max_attempts=2, retry_delay_seconds=600)
    yield catalog
    catalog.close()


def cursor(**values):
    return CursorState("0" * 16, **values)


def finish(catalog, *ids):
    plan = catalog.plan(ALL, MADE_WITH)
    catalog.mark_extracted(plan, dict.fromkeys(ids, 1), "f")
    catalog.mark_done(plan, dict.fromkeys(ids, 1), MADE_WITH)


def fail(catalog, record_id, *, permanent=False):
    failure = Failure(record_id, "", "decode", "VideoDecodeError", "broken", permanent=permanent)
    catalog.record_failures(catalog.plan(ALL, MADE_WITH), [failure], run_id="r")


def test_before_the_first_tick_everything_is_due(catalog):
    standing = look(catalog, None, ProgressMemory(), now=START)
    assert standing.figures == Figures(newest_id=10, lag_rows=10, pending_rows=10)
    assert "last_processed_id" not in standing.figures.numbers()
    assert not standing.is_stuck


def test_the_figures_of_a_table_that_is_half_done(catalog):
    finish(catalog, 1, 2, 3, 5)
    fail(catalog, 4)
    fail(catalog, 6, permanent=True)
    standing = look(catalog, cursor(last_processed_id=3, frontier_id=6), ProgressMemory(), now=START)
    assert standing.figures.numbers() == {
        "last_processed_id": 3,
        "frontier_id": 6,
        "newest_id": 10,
        "lag_ids": 7,
        "lag_rows": 7,
        "pending_rows": 4,
        "waiting_rows": 1,
        "failed_records": 1,
        "parked_records": 1,
    }


def test_rows_at_or_below_the_operators_floor_are_nobodys_business(catalog):
    figures = look(catalog, cursor(floor_id=8), ProgressMemory(), now=START).figures
    assert (figures.lag_rows, figures.lag_ids, figures.pending_rows) == (2, 2, 2)


def test_an_empty_table_has_no_newest_id(database):
    database.create()
    catalog = database.catalog()
    assert look(catalog, None, ProgressMemory(), now=START).figures == Figures()
    catalog.close()


def test_rows_that_are_not_eligible_do_not_count(database):
    database.create(ids=(1, 2, 3))
    database.insert(4, is_downloaded=True)
    catalog = database.catalog(source_predicate="is_downloaded")
    figures = look(catalog, None, ProgressMemory(), now=START).figures
    assert (figures.lag_rows, figures.pending_rows, figures.newest_id) == (1, 1, 4)
    catalog.close()


def test_counting_ends_at_its_limit_whatever_the_backlog(catalog):
    assert catalog.source.count_next(2, 5) == 5
    assert catalog.source.count_next(7, 5) == 3
    assert catalog.source.count_next(None, 100) == 10


# Whether anything moves


def after(memory, catalog, state, *, minutes):
    return look(catalog, state, memory, now=START + timedelta(minutes=minutes))


def test_rows_that_wait_without_a_sign_of_work_are_stuck_after_the_time_that_is_set(catalog):
    memory, state = ProgressMemory(), cursor(last_processed_id=0, frontier_id=10)
    assert not after(memory, catalog, state, minutes=0).is_stuck
    assert not after(memory, catalog, state, minutes=59).is_stuck
    stuck = after(memory, catalog, state, minutes=60)
    assert (stuck.is_stuck, stuck.moved_at) == (True, START)


def test_a_watermark_that_moves_is_a_sign_of_work(catalog):
    memory = ProgressMemory()
    after(memory, catalog, cursor(last_processed_id=0, frontier_id=10), minutes=0)
    moved = after(memory, catalog, cursor(last_processed_id=1, frontier_id=10), minutes=50)
    assert moved.moved_at == START + timedelta(minutes=50)
    assert not after(memory, catalog, cursor(last_processed_id=1, frontier_id=10), minutes=100).is_stuck


def test_a_shard_marked_in_a_long_range_is_a_sign_of_work_long_before_the_watermark_moves(catalog):
    memory, state = ProgressMemory(), cursor(last_processed_id=0, frontier_id=10)
    after(memory, catalog, state, minutes=0)
    catalog.mark_extracted(catalog.plan(ALL, MADE_WITH), {7: 1}, "f")
    with catalog.state_engine.begin() as connection:
        connection.execute(LEDGER_TABLE.update().values(updated_at=START + timedelta(minutes=55)))
    assert after(memory, catalog, state, minutes=100).moved_at == START + timedelta(minutes=55)
    assert not after(memory, catalog, state, minutes=100).is_stuck
    assert after(memory, catalog, state, minutes=115).is_stuck


def test_nothing_is_stuck_while_nothing_is_due(catalog):
    finish(catalog, *range(1, 10))
    fail(catalog, 10)
    memory, state = ProgressMemory(), cursor(last_processed_id=9, frontier_id=10)
    with catalog.state_engine.begin() as connection:  # its next try is far away
        connection.execute(LEDGER_TABLE.update().values(not_before=START + timedelta(days=9)))
    for minutes in (0, 500):
        standing = after(memory, catalog, state, minutes=minutes)
        assert (standing.figures.waiting_rows, standing.is_stuck) == (1, False)
        assert standing.moved_at == START + timedelta(minutes=minutes)


# Memory


def test_what_one_look_remembers_the_next_one_finds(catalog):
    memory = ProgressMemory(7, START, START - timedelta(minutes=1), {"lag_rows": 3, "videos_per_second": 0.5})
    remember_progress(catalog.state_engine, memory)
    assert recall_progress(catalog.state_engine) == memory
    remember_progress(catalog.state_engine, ProgressMemory())
    assert recall_progress(catalog.state_engine) == ProgressMemory()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"watermark": 1, "moved_at": "soon", "reported_at": null}'])
def test_what_can_not_be_read_is_forgotten(text):
    assert ProgressMemory.from_json(text) == ProgressMemory()
