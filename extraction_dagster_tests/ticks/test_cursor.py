"""The cursor's text is read back as it was written, or refused; what an operator asks for is done once, in order."""

import json
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.errors.runs import CursorError
from extraction_dagster.ticks.cursor import CursorState, OperatorRequest, Requests

SOURCE = "0123456789abcdef"
GOOD = {
    "v": 1,
    "source": SOURCE,
    "last_processed_id": 12345,
    "frontier_id": 16345,
    "floor_id": None,
    "seq": 17,
    "reset_epoch": 2,
    "updated_at": "2025-01-31T12:00:00Z",
}
ids = st.none() | st.integers(-(2**63), 2**63 - 1)
counters = st.integers(0, 2**63 - 1)


def text(**changes):
    return json.dumps(GOOD | changes)


def refused(stored, match):
    with pytest.raises(CursorError, match=match):
        CursorState.from_json(stored, source=SOURCE)


def test_a_state_is_written_as_documented():
    state = CursorState(SOURCE, 12345, 16345, None, 17, 2, datetime(2025, 1, 31, 12, tzinfo=UTC))
    assert state.to_json() == (
        '{"v": 1, "source": "0123456789abcdef", "last_processed_id": 12345, "frontier_id": 16345, "floor_id": null, '
        '"seq": 17, "reset_epoch": 2, "updated_at": "2025-01-31T12:00:00Z"}'
    )
    assert CursorState.from_json(text(), source=SOURCE) == state


@given(ids, ids, ids, counters, counters, st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31)))
def test_every_state_is_read_back_as_it_was_written(last, frontier, floor, seq, epoch, when):  # noqa: PLR0913, PLR0917 - its fields
    state = CursorState(SOURCE, last, frontier, floor, seq, epoch, when.replace(microsecond=0, tzinfo=UTC))
    assert CursorState.from_json(state.to_json(), source=SOURCE) == state


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_whatever_else_is_stored_is_refused_and_never_guessed_at(stored):
    with pytest.raises(CursorError, match="The stored cursor can't be used"):
        CursorState.from_json(stored, source=SOURCE)


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_another_version_is_refused(version):
    refused(text(v=version), rf"it has version {version!r}, expected 1")


def test_another_sources_cursor_is_refused():
    refused(text(source="f" * 16), "it belongs to another source table, or to this one at another address")


@pytest.mark.parametrize("source", ["0123456789ABCDEF", "0123456789abcde", 7, None, "0123456789abcdef\n"])
def test_a_malformed_source_is_refused(source):
    refused(text(source=source), "its source is .*, expected 16 hex digits")


@pytest.mark.parametrize("name", ["last_processed_id", "frontier_id", "floor_id", "seq", "reset_epoch"])
@pytest.mark.parametrize("value", [1.0, 12345.5, True, False, "7", [7], 2**63, -(2**63) - 1])
def test_what_is_no_integer_of_the_database_is_refused(name, value):
    refused(text(**{name: value}), f"its {name} is .*, expected an integer that fits BIGINT")


@pytest.mark.parametrize("name", ["seq", "reset_epoch"])
def test_a_counter_is_neither_missing_nor_negative(name):
    refused(text(**{name: None}), f"its {name} is None, expected an integer")
    refused(text(**{name: -1}), f"its {name} is -1, expected 0 or more")


@pytest.mark.parametrize("value", ["2025-01-31", "2025-01-31T12:00:00", "2025-01-31T12:00:00+00:00", 7, None, ""])
def test_a_time_in_another_form_is_refused(value):
    refused(text(updated_at=value), "its updated_at is .*, expected for example 2025-01-31T12:00:00Z")


def test_unknown_missing_and_repeated_keys_are_refused():
    refused(text(extra=1), "it has the keys .*'extra'.*, expected")
    refused(json.dumps({name: value for name, value in GOOD.items() if name != "seq"}), "it has the keys")
    refused(text()[:-1] + ', "seq": 18}', "a key stands twice")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_in_json_is_refused(constant):
    refused(text().replace("12345", constant), f"{constant} is no number")


def test_a_number_with_too_many_digits_is_refused():
    refused(text().replace("12345", "9" * 5000), "it is no JSON object")


@pytest.mark.parametrize("stored", ["", "[]", "7", "null", '"x"', "{", text() + "x"])
def test_what_is_no_object_is_refused(stored):
    refused(stored, "expected an object|it is no JSON object")


def test_a_text_over_64_kib_is_refused_before_it_is_parsed():
    refused(text() + " " * (64 * 1024), r"it has 65\d\d\d bytes, expected at most 65536")
    assert CursorState.from_json(text() + " " * 1000, source=SOURCE).seq == 17


def test_deep_nesting_is_refused_and_not_a_crash():
    refused("[" * 30_000 + "]" * 30_000, "it is no JSON object")


def test_a_refusal_says_what_to_do():
    refused("{", "Nothing was changed.*'extraction checkpoint show'.*'extraction checkpoint reset --storage cursor'")


def test_the_first_state_counts_on_from_the_clock():
    now = datetime(2025, 1, 31, 12, tzinfo=UTC)
    assert CursorState.first(SOURCE, now=now) == CursorState(SOURCE, seq=1_738_324_800_000, updated_at=now)


def test_a_change_is_stamped_and_no_change_is_none():
    state = CursorState.from_json(text(), source=SOURCE)
    now = datetime(2025, 2, 1, tzinfo=UTC)
    assert state.moved(now=now, last_processed_id=12345) is state
    assert state.moved(now=now, last_processed_id=12346).updated_at == now


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
