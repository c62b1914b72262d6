"""How far things are and whether they move, on SQLite and PostgreSQL; the clock is the test's."""

from datetime import UTC, datetime, timedelta

import pytest

from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.state_tables import LEDGER_TABLE
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.memory import remember_text
from extraction_dagster.watch import progress
from extraction_dagster.watch.progress import (
    Progress,
    ProgressMemory,
    measure_progress,
    recall_progress,
    remember_progress,
    whole_lag,
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


def look(catalog, state, memory, *, now=START, **work):
    return measure_progress(catalog, state, memory, now=now, **work)


def cursor(**values):
    return CursorState("0" * 16, **values)


def finish(catalog, *ids):
    plan = catalog.plan(ALL, MADE_WITH)
    catalog.mark_extracted(plan, dict.fromkeys(ids, 1), "f")
    catalog.mark_done(plan, dict.fromkeys(ids, 1), MADE_WITH)


def fail(catalog, record_id, *, permanent=False):
    failure = Failure(record_id, "", "decode", "VideoDecodeError", "broken", permanent=permanent)
    catalog.record_failures(catalog.plan(ALL, MADE_WITH), [failure], run_id="r")


def test_before_the_first_tick_everything_is_pending(catalog):
    found = look(catalog, None, ProgressMemory())
    assert found == Progress(newest_id=10, lag_rows=10, pending_rows=10, moved_at=START)
    assert "last_processed_id" not in found.numbers()


def test_the_figures_of_a_table_that_is_half_done(catalog):
    finish(catalog, 1, 2, 3, 5)
    fail(catalog, 4)
    fail(catalog, 6, permanent=True)
    state = cursor(last_processed_id=3, frontier_id=6)
    found = look(catalog, state, ProgressMemory(), active_runs=2, videos_per_second=0.5)
    assert found.numbers() == {
        "last_processed_id": 3,
        "frontier_id": 6,
        "newest_id": 10,
        "lag_ids": 7,
        "lag_rows": 5,
        "pending_rows": 4,
        "waiting_rows": 1,
        "failed_records": 1,
        "parked_records": 1,
        "active_runs": 2,
        "videos_per_second": 0.5,
        "eta_seconds": 8,
    }


def test_rows_at_or_below_the_operators_floor_do_not_count(catalog):
    found = look(catalog, cursor(floor_id=8), ProgressMemory())
    assert (found.floor_id, found.lag_rows, found.lag_ids, found.pending_rows) == (8, 2, 2, 2)


@pytest.mark.parametrize(("rate", "expected"), [(2.0, 5), (None, None)])
def test_when_it_will_be_done_follows_from_the_rate(catalog, rate, expected):
    assert look(catalog, None, ProgressMemory(), videos_per_second=rate).eta_seconds == expected


def test_of_a_backlog_that_is_not_counted_to_its_end_nobody_knows_when_it_will_be_done(catalog, monkeypatch):
    monkeypatch.setattr(progress, "MOST_SCANNED", 10)
    assert "eta_seconds" not in look(catalog, None, ProgressMemory(), videos_per_second=2.0).numbers()


def test_rows_that_wait_hide_no_due_row_above_them(catalog, monkeypatch):
    monkeypatch.setattr(progress, "MOST_SCANNED", 2)
    for record_id in range(1, 8):
        fail(catalog, record_id)
    found = look(catalog, None, ProgressMemory(moved_at=START - timedelta(hours=2)), now=START)
    assert (found.pending_rows, found.is_stuck) == (1, True)


def test_an_empty_table_has_no_newest_id(database):
    database.create()
    catalog = database.catalog()
    found = look(catalog, None, ProgressMemory(), now=START)
    assert (found, found.eta_seconds) == (Progress(moved_at=START), 0)
    catalog.close()


def test_rows_that_are_not_eligible_do_not_count(database):
    database.create(ids=(1, 2, 3))
    database.insert(4, is_downloaded=True)
    catalog = database.catalog(source_predicate="is_downloaded")
    found = look(catalog, None, ProgressMemory())
    assert (found.lag_rows, found.pending_rows, found.newest_id) == (1, 1, 4)
    catalog.close()


def test_counting_ends_at_its_limit_whatever_the_backlog(catalog):
    assert catalog.source.count_next(2, 5) == 5
    assert catalog.source.count_next(7, 5) == 3
    assert catalog.source.count_next(None, 100) == 10


@pytest.mark.parametrize("has_marks", [True, False])
def test_a_lag_that_is_too_long_to_look_at_each_row_is_counted_without_what_is_done_or_parked(
    database, monkeypatch, has_marks
):
    marks = {} if has_marks else {"source_extracted_column": None, "source_embedded_column": None}
    database.create(ids=range(1, 11))
    catalog = database.catalog(max_attempts=2, retry_delay_seconds=600, **marks)
    finish(catalog, 1, 2, 3, 5)
    fail(catalog, 6, permanent=True)
    monkeypatch.setattr(progress, "MOST_SCANNED", 2)
    assert [look(catalog, cursor(last_processed_id=last), ProgressMemory()).lag_rows for last in (None, 3)] == [5, 5]
    monkeypatch.setattr(progress, "MOST_COUNTED", 5)
    found = look(catalog, None, ProgressMemory())
    assert (found.lag_rows, found.is_lag_counted) == (5, False)
    assert whole_lag(catalog, None, {"eligible": 10, "done": 4, "parked": 1}) == 5
    catalog.close()


# Whether anything moves


def after(memory, catalog, state, *, minutes):
    return look(catalog, state, memory, now=START + timedelta(minutes=minutes))


def test_rows_that_wait_without_a_sign_of_work_are_stuck_after_the_time_that_is_set(catalog):
    memory, state = ProgressMemory(), cursor(last_processed_id=0, frontier_id=10)
    assert not after(memory, catalog, state, minutes=0).is_stuck
    assert not after(memory, catalog, state, minutes=59).is_stuck
    stuck = after(memory, catalog, state, minutes=60)
    assert (stuck.is_stuck, stuck.moved_at, stuck.stalled_seconds) == (True, START, 3600)


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


def test_nothing_is_stuck_while_nothing_is_pending(catalog):
    finish(catalog, *range(1, 10))
    fail(catalog, 10)
    memory, state = ProgressMemory(), cursor(last_processed_id=9, frontier_id=10)
    with catalog.state_engine.begin() as connection:  # its next try is far away
        connection.execute(LEDGER_TABLE.update().values(not_before=START + timedelta(days=9)))
    for minutes in (0, 500):
        found = after(memory, catalog, state, minutes=minutes)
        assert (found.waiting_rows, found.is_stuck, found.stalled_seconds) == (1, False, 0)
        assert found.moved_at == START + timedelta(minutes=minutes)


# Memory


def test_what_one_look_remembers_the_next_one_finds(catalog):
    memory = ProgressMemory(7, START)
    remember_progress(catalog.state_engine, memory)
    assert recall_progress(catalog.state_engine) == memory
    remember_progress(catalog.state_engine, ProgressMemory())
    assert recall_progress(catalog.state_engine) == ProgressMemory()


def test_what_an_earlier_release_kept_is_read(catalog):
    kept = '{"watermark": 7, "moved_at": "2025-06-01T12:00:00+00:00", "reported_at": null, "reported": {}}'
    remember_text(catalog.state_engine, "progress_memory", kept)
    assert recall_progress(catalog.state_engine) == ProgressMemory(7, datetime(2025, 6, 1, 12, tzinfo=UTC))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"watermark": 1, "moved_at": "soon"}', '{"watermark": 1}'])
def test_what_can_not_be_read_is_forgotten(catalog, text):
    remember_text(catalog.state_engine, "progress_memory", text)
    assert recall_progress(catalog.state_engine) == ProgressMemory()
