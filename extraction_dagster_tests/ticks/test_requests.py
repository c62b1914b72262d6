"""What an operator asks for is done once, in order, and survives a crash."""

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.requests import OperatorRequest, Requests

NOW = datetime(2025, 6, 1, tzinfo=UTC)
CURSOR = CursorState("0" * 16, 50, 60, None, seq=7, reset_epoch=3)


@pytest.fixture
def requests(database):
    database.create()
    catalog = database.catalog()
    yield Requests(catalog.state_engine)
    catalog.close()


def test_without_requests_the_cursor_stays_as_it_is(requests):
    assert requests.apply(CURSOR, now=NOW) is CURSOR


def test_requests_wait_in_their_order(requests):
    requests.add("set", 2**63 - 1)
    requests.add("reset")
    assert requests.waiting() == [
        OperatorRequest(1, "set", 2**63 - 1, None),
        OperatorRequest(2, "reset", None, None),
    ]


def test_set_puts_every_mark_at_its_value_in_a_new_epoch(requests):
    requests.add("set", 20)
    cursor = requests.apply(CURSOR, now=NOW)
    assert cursor == CursorState("0" * 16, 20, 20, 20, seq=7, reset_epoch=4, updated_at=NOW)


def test_reset_takes_every_mark_away_in_a_new_epoch(requests):
    requests.add("reset")
    assert requests.apply(CURSOR, now=NOW) == CursorState("0" * 16, seq=7, reset_epoch=4, updated_at=NOW)


def test_of_several_requests_the_last_one_holds(requests):
    requests.add("set", 20)
    requests.add("reset")
    requests.add("set", 30)
    cursor = requests.apply(CURSOR, now=NOW)
    assert (cursor.floor_id, cursor.reset_epoch) == (30, 6)
    assert requests.apply(cursor, now=NOW) is cursor
    assert requests.waiting() == []


def test_a_crash_before_the_cursor_is_stored_applies_them_again_to_the_same_end(requests):
    requests.add("set", 20)
    first = requests.apply(CURSOR, now=NOW)
    requests.add("set", 30)
    again = requests.apply(CURSOR, now=NOW)  # the store still has the old one
    assert (first.floor_id, again.floor_id, again.reset_epoch) == (20, 30, 5)
    assert requests.apply(again, now=NOW) is again
    assert requests.waiting() == []


def test_a_request_that_was_applied_to_a_lost_cursor_is_applied_to_the_next_one(requests):
    requests.add("set", 20)
    requests.apply(CURSOR, now=NOW)
    cursor = requests.apply(CursorState.first("0" * 16, now=NOW), now=NOW)
    assert (cursor.floor_id, cursor.reset_epoch) == (20, 1)
    assert len(requests.waiting()) == 1
    assert requests.apply(cursor, now=NOW) is cursor
    assert requests.waiting() == []


def test_waiting_requests_are_found_through_their_index_however_many_were_consumed(database):
    database.create()
    catalog = database.catalog()
    series = (
        "generate_series(1, 20000) AS series(i)"
        if database.engine.dialect.name == "postgresql"
        else "(WITH RECURSIVE series(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM series WHERE i < 20000) "
        "SELECT i FROM series)"
    )
    database.execute(
        "INSERT INTO extraction_requests (kind, requested_at, consumed_at) "
        f"SELECT 'reset', '2025-01-01 00:00:00', '2025-01-02 00:00:00' FROM {series}"
    )
    Requests(catalog.state_engine).add("set", 7)
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
    queries = []

    def keep(_connection, _cursor, statement, *_):
        queries.append(statement)

    sa.event.listen(catalog.state_engine, "before_cursor_execute", keep)
    assert [request.value for request in Requests(catalog.state_engine).waiting()] == [7]
    (query,) = (text for text in queries if text.startswith("SELECT"))
    explain = "EXPLAIN " if database.engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
    plan = "\n".join(str(row[-1]) for row in database.rows(explain + query))
    assert "extraction_requests_waiting" in plan
    catalog.close()
