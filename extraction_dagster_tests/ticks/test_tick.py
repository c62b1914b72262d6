"""A tick over real databases: operators, mirrors, lost cursors, late rows."""

import functools
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.errors.runs import CursorError, LostCursorError
from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.ticks import looks as looks_module
from extraction_dagster.ticks import tick as tick_module
from extraction_dagster.ticks.cursor import CursorState, Requests
from extraction_dagster.ticks.looks import Round
from extraction_dagster.ticks.memory import Memory
from extraction_dagster.ticks.mirrors import Notice, Reading, TableMirror, make_mirror
from extraction_dagster.ticks.places import History, Outcomes, Rules
from extraction_dagster.ticks.tick import tick

TODAY = Fingerprints(frames="f1", embedding="e1")
ALL = IdRange(-100, 100_000)


class Sensor:
    """What the daemon does around a tick; its runs do what `finish` says."""

    def __init__(self, catalog):
        self.catalog, self.memory = catalog, Memory()
        self.stored, self.running, self.known = None, [], set()
        self.now = datetime(2025, 6, 1, tzinfo=UTC)

    def active(self):
        return list(self.running)

    def backfilled(self):
        return []

    def partitions(self, _record_ids):
        return set(self.known)

    def history(self, _range):
        return History()

    def outcomes(self):
        return Outcomes()

    def tick(self, *, keeps=True, **options):
        self.now += timedelta(seconds=1)
        ticked = tick(self.catalog, self, self.stored, self.memory, now=self.now, impatient=True, **options)
        if keeps:
            self.stored = ticked.cursor.to_json()
            self.known |= {request.id_range for request in ticked.requests}
            self.running += [request.id_range for request in ticked.requests]
        return ticked

    def finish(self):
        """Every active run does its range."""
        for id_range in self.running:
            plan = self.catalog.plan(id_range, TODAY)
            counts = {key: 3 for key, planned in plan.items() if planned.status == "todo"}
            self.catalog.mark_extracted(plan, counts, "f1")
            self.catalog.mark_done(plan, counts, TODAY)
        self.running = []

    def drain(self):
        ranges = []
        for _ in range(20):
            ticked = self.tick(whole=Round())
            ranges += asked(ticked)
            if not ticked.requests:
                return ranges
            self.finish()
        return pytest.fail("it never ends")

    @property
    def marks(self):
        cursor = CursorState.from_json(self.stored, source=self.catalog.source.identity)
        return cursor.last_processed_id, cursor.frontier_id, cursor.floor_id, cursor.reset_epoch


def asked(ticked):
    return [str(request.id_range) for request in ticked.requests]


def texts(ticked):
    return [notice.text for notice in ticked.notices]


@pytest.fixture
def start(database):
    """A sensor over the table: `start(1, 2, 3, batch_size=2)`."""
    catalogs = []

    def make(*ids, **overrides):
        database.create(ids=ids)
        catalogs.append(database.catalog(**{"batch_size": 3, "max_in_flight": 2, **overrides}))
        return Sensor(catalogs[-1])

    yield make
    for catalog in catalogs:
        catalog.close()


def test_a_backlog_is_handed_out_done_and_passed(start):
    sensor = start(1, 2, 3, 10, 11, 12, 20)
    first = sensor.tick()
    assert (asked(first), sensor.marks) == (["1-3", "4-12"], (None, 12, None, 0))
    assert asked(sensor.tick()) == []
    sensor.finish()
    second = sensor.tick()
    assert (asked(second), sensor.marks[0]) == (["13-26"], 12)
    assert texts(second) == ["Updated checkpoint: last processed ID = 12"]
    sensor.finish()
    sensor.tick()
    assert sensor.marks == (20, 26, None, 0)


def test_a_run_that_ends_between_two_looks_of_a_tick_is_not_asked_for_again(start):
    looked_at_rows = []

    class EndsWithinTheTick(Sensor):
        def active(self):
            at_work = [] if looked_at_rows else super().active()
            self.finish()
            return at_work

    def note(_connection, _cursor, statement, *_):
        looked_at_rows.extend([statement] if statement.startswith("SELECT insta_content.id") else [])

    sensor = EndsWithinTheTick(start(1, 2, 3).catalog)
    assert asked(sensor.tick()) == ["1-3"]
    sa.event.listen(sensor.catalog.source_engine, "before_cursor_execute", note)
    assert asked(sensor.tick()) == []
    assert looked_at_rows != []


def test_few_rows_among_very_many_that_are_done_make_no_range_that_a_run_can_not_hold(start, database, monkeypatch):
    monkeypatch.setattr(tick_module, "Rules", functools.partial(Rules, most_rows=5))
    sensor = start(*range(1, 41))
    database.execute("UPDATE insta_content SET is_extracted = true, is_embedded = true WHERE id NOT IN (3, 30, 31)")
    assert asked(sensor.tick()) == ["3-3", "30-32"]
    sensor.finish()
    assert asked(sensor.tick()) == []
    assert sensor.marks[:2] == (40, 40)
    database.execute("UPDATE insta_content SET is_embedded = false WHERE id IN (10, 12, 20)")
    assert asked(sensor.tick(whole=Round())) == ["10-12", "20-20"]
    sensor.finish()
    assert sensor.drain() == []


def test_a_row_that_commits_late_is_found_below_the_watermark(start, database):
    sensor = start(10, 11, 12, 20, 21, 22)
    sensor.drain()
    assert sensor.marks[0] == 22
    database.insert(15, 3)
    assert sensor.drain() == ["3-3", "13-22"]
    assert database.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(8,)]
    assert sensor.marks[0] == 22


def test_the_rows_below_the_watermark_are_looked_through_at_each_nth_tick(start, database):
    sensor = start(10, 11, 12, sweep_every_ticks=5)
    sensor.tick()
    sensor.finish()
    sensor.tick()
    database.insert(5)
    ticks = [asked(sensor.tick()) for _ in range(4)]
    assert ticks == [[], [], [], ["5-5"]]


def test_with_a_version_column_every_tick_looks_and_finds_what_changed(start, database):
    sensor = start(10, 11, 12, source_version_column="updated_at")
    sensor.tick()
    sensor.finish()
    sensor.tick()
    database.execute("UPDATE insta_content SET updated_at = '2025-02-02 00:00:00' WHERE id = 11")
    assert asked(sensor.tick()) == ["10-12"]


def test_a_sweep_in_parts_goes_on_where_it_stopped_and_never_below_the_floor(start, database, monkeypatch):
    monkeypatch.setattr(looks_module, "_BUDGET", 4)
    sensor = start(*range(1, 13), source_version_column="updated_at")
    sensor.drain()
    sensor.memory.sweep_after_id = None
    database.execute("UPDATE insta_content SET updated_at = '2025-02-02 00:00:00' WHERE id IN (7, 10, 12)")
    assert [asked(sensor.tick()) for _ in range(2)] == [[], ["7-9"]]
    Requests(sensor.catalog.state_engine).add("set", 11)
    assert asked(sensor.tick()) == []
    sensor.running = []
    assert [asked(sensor.tick()) for _ in range(4)] == [["10-12"], [], [], []]


def test_a_failed_row_holds_the_watermark_and_a_parked_one_does_not(start, database):
    sensor = start(1, 2, 3, 4, 5, 6, retry_delay_seconds=3600, max_attempts=2)
    sensor.tick()
    plan = sensor.catalog.plan(ALL, TODAY)
    broken = Failure(2, "", "decode", "VideoDecodeError", "broken")
    sensor.catalog.record_failures(plan, [broken], run_id="r")
    sensor.finish()
    ticked = sensor.tick()
    assert (sensor.marks[0], ticked.num_waiting, asked(ticked)) == (1, 1, [])
    sensor.catalog.record_failures(plan, [broken], run_id="r")
    sensor.tick()
    assert sensor.marks[0] == 6
    assert sensor.catalog.ledger.retry(record_ids=[2], error_type=None) == [2]
    assert sensor.drain() == ["1-3"]
    assert database.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(6,)]


# Addresses


def test_a_done_row_whose_address_was_corrected_becomes_due(start, database, monkeypatch):
    monkeypatch.setattr(looks_module, "_ADDRESSES", 2)
    sensor = start(*range(1, 10), sweep_every_ticks=4)
    sensor.drain()
    sensor.memory = Memory()
    database.execute("UPDATE insta_content SET path = 'other.mp4' WHERE id IN (4, 8)")
    ticks = [asked(sensor.tick()) for _ in range(7)]
    assert ticks == [[], [], [], [], [], [], ["4-6"]]  # the third and each fourth after it: two rows each
    sensor.finish()
    assert [asked(sensor.tick()) for _ in range(8)][-1] == ["7-9"]
    sensor.finish()
    assert database.rows("SELECT count(*) FROM extraction_ledger WHERE state = 'done'") == [(9,)]
    assert [asked(sensor.tick()) for _ in range(16)] == [[]] * 16


def test_corrected_addresses_that_find_no_place_are_not_forgotten(start, database):
    sensor = start(*range(1, 10), sweep_every_ticks=20, max_in_flight=1)
    sensor.drain()
    database.execute("UPDATE insta_content SET path = 'other.mp4'")
    given = []
    while not given:  # the tick whose turn it is to compare addresses; the next one that does is twenty ticks later
        given += asked(sensor.tick())
        sensor.finish()
    for _ in range(6):
        given += asked(sensor.tick())
        sensor.finish()
    assert given == ["1-3", "4-6", "7-9"]


def test_a_command_compares_addresses_once_and_those_at_or_below_the_floor_are_left(start, database):
    sensor = start(*range(1, 10))
    sensor.drain()
    Requests(sensor.catalog.state_engine).add("set", 5)
    sensor.drain()
    database.execute("UPDATE insta_content SET path = 'other.mp4' WHERE id IN (4, 8)")
    assert sensor.drain() == ["7-9"]


def test_where_changed_addresses_are_only_reported_nothing_becomes_due(start, database):
    sensor = start(*range(1, 10), sweep_every_ticks=1, address_changes="report")
    sensor.drain()
    database.execute("UPDATE insta_content SET path = 'other.mp4'")
    assert sensor.drain() == []
    assert asked(sensor.tick()) == []


# Operators


def test_set_leaves_alone_what_is_below_and_reset_takes_it_up(start, database):
    sensor = start(1, 2, 3, 4, 5, 6)
    requests = Requests(sensor.catalog.state_engine)
    requests.add("set", 4)
    assert sensor.drain() == ["5-7"]
    assert sensor.marks == (6, 7, 4, 1)
    assert database.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(2,)]
    requests.add("reset")
    assert sensor.drain() == ["1-3", "4-6"]
    assert sensor.marks[2:] == (None, 2)
    assert database.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(6,)]
    assert requests.waiting() == []


def test_a_request_is_consumed_only_once_its_cursor_is_stored(start):
    sensor = start(1, 2, 3, 4, 5, 6)
    requests = Requests(sensor.catalog.state_engine)
    sensor.tick()
    requests.add("set", 4)
    assert sensor.tick(keeps=False).cursor.floor_id == 4  # a crash: the cursor is not stored
    assert sensor.marks[2:] == (None, 0)
    assert [request.kind for request in requests.waiting()] == ["set"]
    sensor.tick()
    assert (sensor.marks[2:], len(requests.waiting())) == ((4, 1), 1)
    sensor.tick()
    assert (sensor.marks[2:], requests.waiting()) == ((4, 1), [])


def test_an_operators_request_mends_a_lost_cursor_and_outweighs_the_mirror(start):
    sensor = start(1, 2, 3, checkpoint_mirror="json")
    mirror = make_mirror(sensor.catalog.settings, sensor.catalog.state_engine)
    mirror.write(3, now=sensor.now)
    Requests(sensor.catalog.state_engine).add("reset")
    assert asked(sensor.tick()) == ["1-3"]


# The mirror and the cursor store


@pytest.mark.parametrize("kind", ["json", "table"])
def test_the_mirror_follows_the_watermark(start, kind):
    sensor = start(1, 2, 3, checkpoint_mirror=kind)
    mirror = make_mirror(sensor.catalog.settings, sensor.catalog.state_engine)
    sensor.tick()
    assert mirror.read() == Reading("missing")
    sensor.finish()
    sensor.tick()
    assert mirror.read() == Reading("ok", 3)


def test_a_mirror_ahead_never_moves_the_cursor(start):
    sensor = start(1, 2, 3, checkpoint_mirror="table")
    sensor.tick()
    TableMirror(sensor.catalog.state_engine).write(900, now=sensor.now)
    ticked = sensor.tick()
    assert sensor.marks[0] is None
    assert [notice.level for notice in ticked.notices] == ["warning"]
    assert TableMirror(sensor.catalog.state_engine).read() == Reading("missing")


def test_a_mirror_that_can_not_be_written_never_stops_a_tick(start, tmp_path):
    sensor = start(1, 2, 3, checkpoint_mirror="json", checkpoint_path=tmp_path)
    ticked = sensor.tick()  # the very first: the rows know what is done, whatever the mirror would say
    assert asked(ticked) == ["1-3"]
    for _ in range(2):
        assert isinstance(ticked.notices[0], Notice)
        assert (ticked.notices[0].level, "Checkpoint mirror" in ticked.notices[0].text) == ("warning", True)
        ticked = sensor.tick()


def test_a_lost_cursor_is_adopted_from_the_mirror_and_no_row_is_done_twice(start, database):
    sensor = start(1, 2, 3, 4, 5, 6, checkpoint_mirror="json")
    sensor.drain()
    sensor.stored = None
    database.insert(7, 2_000)
    assert sensor.drain() == ["7-2997"]
    assert database.rows("SELECT count(*) FROM insta_content WHERE NOT is_embedded") == [(0,)]


@pytest.mark.parametrize("kind", ["none", "json", "table"])
def test_the_floor_of_a_consumed_request_outlives_the_cursor(start, database, kind):
    sensor = start(*range(1, 10), checkpoint_mirror=kind)
    requests = Requests(sensor.catalog.state_engine)
    requests.add("set", 4)
    sensor.tick()
    sensor.finish()
    sensor.tick()
    assert (sensor.marks, requests.waiting()) == ((9, 10, 4, 1), [])
    sensor.stored = None
    database.insert(12)
    assert sensor.drain() == ["10-15"]
    assert sensor.marks[2:] == (4, 1)
    assert database.rows("SELECT count(*) FROM insta_content WHERE NOT is_embedded") == [(4,)]
    requests.add("reset")
    sensor.drain()
    sensor.stored = None
    sensor.drain()
    assert sensor.marks[2:] == (None, 2)


def test_a_lost_cursor_never_starts_below_the_floor_whatever_the_mirror_says(start):
    sensor = start(*range(1, 10), checkpoint_mirror="json")
    requests = Requests(sensor.catalog.state_engine)
    for _ in range(2):
        requests.add("set", 4)
        sensor.tick()
        sensor.tick()
    assert requests.waiting() == []
    make_mirror(sensor.catalog.settings, sensor.catalog.state_engine).write(2, now=sensor.now)
    sensor.stored, sensor.running = None, []
    assert sensor.tick(keeps=False).cursor.floor_id == 4
    assert sensor.tick().cursor.last_processed_id == 4


def test_without_a_mirror_a_lost_cursor_is_derived_from_the_rows(start):
    sensor = start(1, 2, 3, 4, 5, 6)
    sensor.drain()
    sensor.stored = None
    assert asked(sensor.tick()) == []
    assert sensor.marks[:2] == (6, 6)


def test_a_lost_cursor_and_a_corrupt_mirror_start_nothing(start, tmp_path):
    sensor = start(1, 2, 3, checkpoint_mirror="json")
    (tmp_path / ".checkpoint").write_text("{")
    with pytest.raises(LostCursorError, match="Nothing was started"):
        sensor.tick()
    assert (tmp_path / ".checkpoint").read_text() == "{"


def test_a_cursor_that_can_not_be_used_starts_nothing(start):
    sensor = start(1, 2, 3)
    sensor.stored = CursorState("f" * 16, last_processed_id=2).to_json()
    with pytest.raises(CursorError, match="it belongs to another source table"):
        sensor.tick()
    sensor.stored = CursorState("f" * 16).to_json()  # of a trial that never moved
    assert asked(sensor.tick()) == ["1-3"]


def test_an_operators_request_replaces_a_cursor_that_can_not_be_used(start):
    sensor = start(1, 2, 3, 4, 5)
    sensor.stored = '{"v": 2}'
    Requests(sensor.catalog.state_engine).add("set", 2)
    ticked = sensor.tick()
    assert (asked(ticked), sensor.marks) == (["3-5"], (2, 5, 2, 1))
    assert sensor.tick().cursor.reset_epoch == 1
    assert Requests(sensor.catalog.state_engine).waiting() == []


def test_a_read_only_source_is_drained_with_its_state_elsewhere(start, database, tmp_path):
    state = SecretStr(f"sqlite:///{tmp_path}/state.db")
    sensor = start(1, 2, 3, 4, 5, source_read_only=True, state_url=state)
    assert sensor.drain() == ["1-3", "4-6"]
    assert sensor.marks[0] == 5
    assert database.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(0,)]
