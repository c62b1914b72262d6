"""What changed lately is found at once, whatever the clock of its writer says; over real databases."""

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.changes import Place
from extraction_dagster.ticks import newest as newest_module
from extraction_dagster.ticks.cursor import CursorState
from extraction_dagster.ticks.looks import Looks, Round
from extraction_dagster.ticks.memory import Memory, Order

TODAY = Fingerprints(frames="f1", embedding="e1")
ALL = IdRange(-100, 1_000_000)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Four new rows in a page, two pages in a tick; two rows that are looked at again; a round of three rows a tick."""
    monkeypatch.setattr(newest_module, "_PAGE", 4)
    monkeypatch.setattr(newest_module, "_BUDGET", 8)
    monkeypatch.setattr(newest_module, "_PAGE_ONCE_MORE", 2)


class Table:
    """A table of rows that are done, and ticks' looks at it; times are minutes from now."""

    def __init__(self, database, catalog):
        self.database, self.catalog, self.memory = database, catalog, Memory()
        self.floor_id, self.epoch, self.last_id = None, 0, 1000

    def stamp(self, minutes, *ids, where="true"):
        moment = datetime.now(UTC).replace(tzinfo=None) + timedelta(minutes=minutes)
        chosen = f"id IN ({', '.join(map(str, ids))})" if ids else where
        self.database.execute(f"UPDATE insta_content SET updated_at = :moment WHERE {chosen}", moment=str(moment))

    def tick(self, *, whole=None):
        """The ids that a tick finds at or below the watermark, and those whose mark it clears."""
        marks = {"last_processed_id": self.last_id, "frontier_id": self.last_id, "floor_id": self.floor_id}
        cursor = CursorState(self.catalog.source.identity, **marks, reset_epoch=self.epoch)
        looks = Looks(self.catalog, cursor, self.memory, taken=[], whole=whole, keep=lambda: None)
        changed = looks.changed()
        looks.window()
        found = {*changed, *looks.sweep()}
        self.memory.ticks += 1
        kept = Memory.from_json(self.memory.to_json())
        assert kept.order == self.memory.order
        self.memory = kept
        return sorted(found)

    def finish(self):
        plan = self.catalog.plan(ALL, TODAY)
        counts = {key: 3 for key, planned in plan.items() if planned.status == "todo"}
        self.catalog.mark_extracted(plan, counts, "f1")
        self.catalog.mark_done(plan, counts, TODAY)

    def settle(self):
        for _ in range(20):
            if self.tick():
                self.finish()
        assert self.tick() == []


@pytest.fixture
def table(database):
    """The rows 1 to 20, done, stamped a day ago, a minute apart: `table(source_read_only=True)`."""
    tables = []

    def make(*, index="(updated_at)", ids=range(1, 21), **overrides):
        database.create()
        if index:
            database.execute(f"CREATE INDEX by_time ON insta_content {index}")
        moment = datetime.now(UTC).replace(tzinfo=None) - timedelta(days=1)
        for record_id in ids:
            database.insert(record_id, updated_at=str(moment + timedelta(minutes=record_id)))
        catalog = database.catalog(source_version_column="updated_at", sweep_every_ticks=10_000, **overrides)
        tables.append(Table(database, catalog))
        tables[-1].finish()
        return tables[-1]

    yield make
    for made in tables:
        made.catalog.close()


@pytest.fixture(params=["one database", "two databases"])
def apart(request, tmp_path):
    return {} if request.param == "one database" else {"state_url": SecretStr(f"sqlite:///{tmp_path}/ledger.db")}


def no_round(monkeypatch):
    """The round never comes to anything: what is found is found by its version."""
    monkeypatch.setattr(newest_module.NewestLook, "round", lambda _self, **_options: [])


@pytest.mark.parametrize("index", ["(updated_at)", "(updated_at, id)", "(updated_at DESC)"])
def test_a_changed_row_is_found_by_the_next_tick(table, apart, monkeypatch, index):
    no_round(monkeypatch)
    made = table(index=index, **apart)
    made.settle()
    made.stamp(0, 7)
    assert made.tick() == [7]
    made.finish()
    assert made.tick() == []


def test_a_row_that_changed_before_the_first_look_is_found_by_it(table, monkeypatch):
    no_round(monkeypatch)
    made = table()
    made.stamp(0, 7)
    assert made.tick() == [7]


def test_rows_that_are_stamped_at_once_are_found_page_by_page_and_none_is_forgotten(table, monkeypatch):
    no_round(monkeypatch)
    made = table()
    made.settle()
    made.stamp(-1)
    found = set()
    for _ in range(4):  # nobody does any of them meanwhile
        found |= set(made.tick())
    assert found == set(range(1, 21))
    assert made.database.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(0,)]
    made.stamp(0, 3)
    made.finish()
    assert made.tick() == []


def test_a_late_commit_with_an_older_time_is_found_by_the_overlap(table, monkeypatch):
    no_round(monkeypatch)
    made = table(source_version_overlap_seconds=600)
    made.stamp(-2, 20)
    made.settle()
    made.stamp(-8, 5)
    found = [made.tick() for _ in range(3)]
    assert [5] in found


def test_a_commit_that_is_later_than_the_overlap_is_found_by_the_round(table):
    made = table(source_version_overlap_seconds=60)
    made.stamp(-2, 20)
    made.settle()
    made.stamp(-30, 5)
    found = [made.tick() for _ in range(8)]
    assert [5] in found
    assert not made.memory.order.is_whole  # a command compares each row then, since this one was missed


def test_a_clock_that_is_wrong_blinds_no_look(table, monkeypatch):
    no_round(monkeypatch)
    made = table()
    made.settle()
    made.stamp(60 * 24 * 365, 9)
    assert made.tick() == [9]
    made.finish()
    made.stamp(0, 7)
    assert made.tick() == [7]
    made.finish()
    made.stamp(60 * 24 * 366, 8)
    assert made.tick() == [8]
    made.finish()
    assert made.tick() == []


def test_clocks_of_another_zone_hide_nothing(table, monkeypatch):
    no_round(monkeypatch)
    made = table()
    made.stamp(120)  # all of it, two hours ahead
    made.finish()
    made.settle()
    for record_id in (3, 11, 4):
        made.stamp(121 + record_id / 60, record_id)
        assert record_id in {key for _ in range(2) for key in made.tick()}
        made.finish()


def test_a_row_that_is_not_eligible_when_it_changes_is_found_once_it_is(table, monkeypatch):
    no_round(monkeypatch)
    made = table(source_predicate="NOT is_downloaded")
    made.settle()
    made.database.execute("UPDATE insta_content SET is_downloaded = true WHERE id = 6")
    made.stamp(0, 6)
    assert made.tick() == []
    made.database.execute("UPDATE insta_content SET is_downloaded = NULL WHERE id = 6")
    assert made.tick() == [6]


def test_rows_at_or_below_the_floor_are_left_alone_until_it_is_gone(table):
    made = table()
    made.settle()
    made.floor_id, made.epoch = 10, 1
    made.tick()
    made.stamp(0, 6, 12)
    assert made.tick() == [12]
    made.finish()
    assert made.database.rows("SELECT id FROM insta_content WHERE NOT is_embedded") == []
    made.stamp(-5, 6)
    made.floor_id, made.epoch = None, 2
    assert made.tick(whole=Round()) == [6]


def test_rows_above_the_watermark_are_left_to_the_looks_there(table, monkeypatch):
    no_round(monkeypatch)
    made = table()
    made.settle()
    made.last_id = 10
    made.stamp(0, 6, 12)
    assert made.tick() == [6]
    assert made.database.rows("SELECT id FROM insta_content WHERE NOT is_embedded ORDER BY id") == [(6,), (12,)]


def test_a_command_relies_on_it_once_a_round_has_ended(table):
    made, whole = table(), Round()
    made.memory.order.key = "of something else"
    statements = []
    sa.event.listen(
        made.catalog.source_engine, "before_cursor_execute", lambda *event: statements.append((event[2], event[3]))
    )
    while not whole.is_over:
        assert made.tick(whole=whole) == []
    assert (whole.compares_since is not None, made.memory.order.is_whole) == (True, True)
    again = Round()
    assert (made.tick(whole=again), again.is_over, again.compares_since) == ([], True, None)
    made.stamp(0, 4)
    assert made.tick(whole=Round()) == [4]


@pytest.mark.parametrize("index", ["", "(updated_at) WHERE size_bytes > 1"])
def test_without_its_index_each_row_is_compared_as_ever(table, index):
    made = table(index=index)
    made.stamp(0, 7)
    assert made.tick() == [7]
    assert made.memory.order.newest is None
    assert made.database.rows("SELECT count(*) FROM insta_content WHERE is_embedded") == [(20,)]
    whole = Round()
    assert (made.tick(whole=whole), whole.compares_since) == ([7], made.memory.order.key)


def test_a_command_compares_each_row_while_one_has_no_version(table):
    made = table()
    made.settle()
    assert made.memory.order.is_whole
    made.database.execute("UPDATE insta_content SET updated_at = NULL WHERE id = 5")
    assert made.tick(whole=Round()) == [5]


def test_a_table_without_marks_is_looked_at_in_the_same_order(table):
    made = table(source_read_only=True, ids=range(1, 7))
    assert made.tick() == []
    made.stamp(0, 3)
    assert made.tick() == [3]
    made.stamp(0, 4)
    assert made.tick() == [3, 4]  # the look stays until they are done
    made.finish()
    assert made.tick() == []


def test_a_place_that_is_lost_begins_at_the_newest_rows(table, monkeypatch):
    no_round(monkeypatch)
    made = table()
    made.settle()
    place = made.memory.order.newest
    made.memory = Memory()
    assert made.tick() == []
    assert made.memory.order.newest == place


def test_versions_that_are_none_are_left_to_the_round(sqlite_database):
    sqlite_database.create()
    sqlite_database.execute("CREATE INDEX by_time ON insta_content (updated_at)")
    sqlite_database.insert(1, 2, 3, updated_at="2026-01-01 00:00:00")
    catalog = sqlite_database.catalog(source_version_column="updated_at")
    made = Table(sqlite_database, catalog)
    made.finish()
    sqlite_database.execute("UPDATE insta_content SET updated_at = CAST(:raw AS TEXT) WHERE id = 2", raw=b"\xff\xfe")
    assert made.tick() == [2]
    assert made.memory.order == Order(made.memory.order.key)
    catalog.close()


@pytest.mark.parametrize(
    ("kind", "values", "newer"),
    [
        (sa.BigInteger(), [10, 20, 30], 31),
        (sa.Integer(), [1_767_000_000, 1_767_000_001, 1_767_000_002], 1_767_000_003),
        (sa.Date(), ["2026-01-01", "2026-01-01", "2026-01-02"], "2026-01-03"),
        (sa.DateTime(timezone=True), ["2026-01-01 10:00:00+02:00"] * 3, "2026-01-01 10:00:00.000001+02:00"),
    ],
)
def test_every_kind_of_version_that_grows(database, monkeypatch, kind, values, newer):
    no_round(monkeypatch)
    types = {"id": sa.BigInteger().with_variant(sa.Integer, "sqlite"), "platform": sa.Text, "code": sa.Text}
    types |= {"path": sa.Text, "is_extracted": sa.Boolean, "is_embedded": sa.Boolean, "version": kind}
    database.create(*(sa.Column(name, type_, primary_key=name == "id") for name, type_ in types.items()))
    database.execute("CREATE INDEX by_version ON insta_content (version)")
    for number, value in enumerate(values, 1):
        database.insert(number, version=value)
    catalog = database.catalog(source_version_column="version", sweep_every_ticks=10_000)
    made = Table(database, catalog)
    made.finish()
    assert made.tick() == []
    database.execute("UPDATE insta_content SET version = :newer WHERE id = 1", newer=newer)
    assert made.tick() == [1]
    made.finish()
    assert made.tick() == []
    made.memory.order.is_whole = True
    whole = Round()
    made.tick(whole=whole)
    assert (whole.compares_since is None) is not isinstance(kind, sa.Integer)  # a number may count for its row alone
    catalog.close()


@pytest.mark.parametrize(
    "values",
    [
        None,
        7,
        "text",
        [],
        ["k", None],
        ["k", ["v", True], None, None, 1, True, False],
        ["k", None, None, None, 2**63, 1, 0],
    ],
)
def test_a_memory_that_can_not_be_read_begins_anew(values):
    assert Order.from_values(values) == Order()


def test_what_is_remembered_comes_back():
    order = Order("k", Place("2026-01-01", -5), Place(7), Place(1.5, 3), 9, is_whole=True, found_rows=True)
    assert Memory.from_json(Memory(order=order).to_json()).order == order
