"""Who claimed a row last writes it; whoever planned it before writes nothing, in the ledger and in the marks."""

import logging
import threading
import time
from datetime import datetime

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.records import Failure, IdRange
from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints
from extraction_dagster.stages.catalog.pending import scan

TODAY = Fingerprints(frames="f1", embedding="e1")
ALL = IdRange(1, 100)
BASE = "SELECT value FROM extraction_meta WHERE key = 'claim_base'"


@pytest.fixture(params=["one database", "two databases"])
def opened(request, database, tmp_path):
    """Catalogs of the database that are closed at the end, with their state in it or elsewhere."""
    state = {} if request.param == "one database" else {"state_url": SecretStr(f"sqlite:///{tmp_path}/state.db")}
    catalogs = []

    def make(**overrides):
        catalogs.append(database.catalog(**{"retry_delay_seconds": 0, **state, **overrides}))
        return catalogs[-1]

    yield make
    for catalog in catalogs:
        catalog.close()


def claims(plan):
    return {record_id: planned.video.claim for record_id, planned in plan.items()}


def base_of(catalog):
    with catalog.state_engine.connect() as connection:
        return int(connection.execute(sa.text(BASE)).scalar_one())


def marks(database):
    rows = database.rows("SELECT id, is_extracted, is_embedded FROM insta_content ORDER BY id")
    return {record_id: (bool(extracted), bool(embedded)) for record_id, extracted, embedded in rows}


def failure(record_id, version=""):
    return Failure(record_id, version, "decode", "VideoDecodeError", "broken")


def finish(catalog, plan, *ids):
    catalog.mark_extracted(plan, dict.fromkeys(ids, 3), "f1")
    catalog.mark_embedded(ids, "e1", plan=plan)
    return catalog.mark_done(plan, dict.fromkeys(ids, 3), TODAY)


def due(catalog):
    return scan(catalog, after_id=None, up_to_id=None, budget=100).pending_ids


def test_a_run_that_begins_claims_what_it_will_do_and_leaves_the_rest(database, opened):
    database.create(ids=(1, 2, 3))
    catalog = opened()
    first = base_of(catalog) + 1
    assert claims(catalog.plan(ALL, TODAY)) == {1: 0, 2: 0, 3: 0}
    plan = catalog.begin(ALL, TODAY)
    assert claims(plan) == {1: first, 2: first, 3: first}
    assert {key: entry.state for key, entry in catalog.ledger.entries(ALL).items()} == dict.fromkeys((1, 2, 3), "todo")
    assert finish(catalog, plan, 1) == {1}
    catalog.record_failures(plan, [failure(3)], run_id="r")
    assert claims(catalog.begin(ALL, TODAY)) == {1: first, 2: first + 1, 3: first + 1}
    assert claims(catalog.plan(ALL, TODAY)) == {1: first, 2: first + 1, 3: first + 1}


def test_a_claim_alone_changes_nothing_else_of_an_entry(database, opened):
    database.create(ids=(1,))
    catalog = opened()
    catalog.mark_extracted(catalog.begin(ALL, TODAY), {1: 3}, "f1")
    before = catalog.ledger.entries(ALL)[1]
    with catalog.state_engine.connect() as connection:
        written = connection.execute(sa.text("SELECT updated_at FROM extraction_ledger")).scalar_one()
    plan = catalog.begin(ALL, TODAY)
    after = catalog.ledger.entries(ALL)[1]
    assert (after.claim, plan[1].entry) == (before.claim + 1, after)
    assert (after.state, after.num_frames, after.frames_fingerprint) == ("extracted", 3, "f1")
    assert (after.content_version, after.revision, after.address) == ("", 0, before.address)
    with catalog.state_engine.connect() as connection:  # whoever watches for progress sees none
        assert connection.execute(sa.text("SELECT updated_at FROM extraction_ledger")).scalar_one() == written


def test_the_claims_of_a_fresh_ledger_are_above_those_of_an_earlier_one(database, opened):
    database.create(ids=(1,))
    catalog = opened()
    earlier = claims(catalog.begin(ALL, TODAY))[1]
    with catalog.state_engine.begin() as connection:
        for name in ("ledger", "errors", "requests", "gone", "meta"):
            connection.execute(sa.text(f"DROP TABLE extraction_{name}"))
    assert claims(opened().begin(ALL, TODAY))[1] > earlier


def retry(catalog, _database):
    assert catalog.ledger.retry(record_ids=[1], error_type=None) == [1]


def reprocess(catalog, _database):
    catalog.reprocess_after(0)


def make_pending(catalog, _database):
    catalog.make_pending([1])


def force(catalog, _database):
    assert catalog.begin(ALL, TODAY, force=True)[1].status == "todo"


def force_vectors(catalog, _database):
    assert catalog.begin(ALL, TODAY, force=True, revises=False)[1].content_version == ""


def begin(catalog, _database):
    assert catalog.begin(ALL, TODAY)[1].status == "todo"


def forget(catalog, _database):
    catalog.forget([1])


def forget_and_begin(catalog, database):
    database.execute("DELETE FROM insta_content WHERE id = 1")
    catalog.forget([1])
    database.insert(1)
    assert catalog.begin(ALL, TODAY)[1].status == "todo"


WRITERS = {
    "extracted": lambda catalog, plan: catalog.mark_extracted(plan, {1: 9}, "f9"),
    "embedded": lambda catalog, plan: catalog.mark_embedded([1], "e9", plan=plan),
    "done": lambda catalog, plan: catalog.mark_done(plan, {1: 9}, Fingerprints("f9", "e9")),
    "failed": lambda catalog, plan: set(catalog.record_failures(plan, [failure(1)], run_id="late")),
}


@pytest.mark.parametrize(
    "command",
    [retry, reprocess, make_pending, force, force_vectors, begin, forget, forget_and_begin],
    ids=lambda command: command.__name__,
)
def test_a_run_in_flight_can_not_undo_a_command(database, opened, command, caplog):
    database.create(ids=(1, 2))
    catalog = opened()
    if command is retry:
        catalog.record_failures(catalog.plan(ALL, TODAY), [failure(1)], run_id="r")
    plan = opened().begin(ALL, TODAY)
    command(catalog, database)
    entries, marked = catalog.ledger.entries(ALL), marks(database)
    errors = catalog.ledger.errors(limit=9, current_only=False)

    late = opened()
    with caplog.at_level(logging.WARNING):
        assert {name: write(late, plan) for name, write in WRITERS.items()} == {name: set() for name in WRITERS}

    assert (catalog.ledger.entries(ALL), marks(database)) == (entries, marked)
    assert catalog.ledger.errors(limit=9, current_only=False) == errors
    assert [record.getMessage() for record in caplog.records] == [
        "Wrote nothing of records that a later run or command has claimed since they were planned: 1"
    ]
    assert due(catalog) == [1, 2]


def test_who_has_lost_one_row_writes_the_others(database, opened):
    database.create(ids=(1, 2, 3))
    catalog = opened()
    plan = catalog.begin(ALL, TODAY)
    catalog.make_pending([2])
    assert catalog.mark_extracted(plan, {3: 5, 2: 5, 1: 5}, "f1") == {1, 3}
    assert catalog.mark_embedded([1, 2, 3], "e1", plan=plan) == {1, 3}
    assert catalog.mark_done(plan, {2: 5, 1: 5}, TODAY) == {1}
    assert catalog.record_failures(plan, [failure(2), failure(3)], run_id="r") == {3: "failed"}
    assert {key: entry.state for key, entry in catalog.ledger.entries(ALL).items()} == {
        1: "done",
        2: "todo",
        3: "failed",
    }
    assert marks(database) == {1: (True, True), 2: (False, False), 3: (True, False)}


def test_an_older_version_does_not_come_over_a_newer_one(database, opened):
    database.create()
    database.insert(1, updated_at=datetime(2025, 1, 1))
    catalog = opened(source_version_column="updated_at")
    old = catalog.begin(ALL, TODAY)
    database.execute("UPDATE insta_content SET updated_at = :at", at=datetime(2025, 2, 2))
    new = catalog.begin(ALL, TODAY)
    assert finish(catalog, new, 1) == {1}
    done = catalog.ledger.entries(ALL)[1]
    assert finish(catalog, old, 1) == set()
    assert (catalog.ledger.entries(ALL)[1], done.content_version[:10]) == (done, "2025-02-02")
    assert due(catalog) == []


def test_a_row_that_comes_back_after_it_was_forgotten_has_a_greater_claim(database, opened):
    database.create(ids=(1, 2))
    catalog = opened()
    for _ in range(3):
        before = claims(catalog.begin(ALL, TODAY))
    catalog.forget([1])
    assert base_of(catalog) == before[1]
    assert claims(catalog.begin(ALL, TODAY)) == {1: before[1] + 1, 2: before[2] + 1}


def test_rows_that_another_run_claims_between_plan_and_claim_are_planned_once_more(database, opened, monkeypatch):
    database.create(ids=(1, 2))
    catalog, other = opened(), opened()
    first, plan, theirs = base_of(catalog) + 1, catalog.plan, []

    def overtaken(*arguments):
        planned = plan(*arguments)
        if not theirs:
            theirs.append(other.begin(IdRange(2, 2), TODAY))
        return planned

    monkeypatch.setattr(catalog, "plan", overtaken)
    ours = catalog.begin(ALL, TODAY)
    assert (claims(theirs[0]), claims(ours)) == ({2: first}, {1: first, 2: first + 1})
    assert other.mark_extracted(theirs[0], {2: 3}, "f1") == set()
    assert catalog.mark_extracted(ours, {1: 3, 2: 3}, "f1") == {1, 2}


def test_a_run_that_begins_with_vectors_claims_and_revises_nothing(database, opened):
    database.create(ids=(1, 2, 3, 4))
    catalog = opened()
    plan = catalog.begin(ALL, TODAY)
    finish(catalog, plan, 1, 2)
    catalog.record_failures(plan, [failure(3)], run_id="r")
    database.execute("UPDATE insta_content SET is_embedded = false WHERE id = 2")
    forced = catalog.begin(ALL, TODAY, force=True, revises=False)
    base = claims(plan)[1]
    assert {key: (item.status, item.video.claim - base, item.content_version) for key, item in forced.items()} == {
        1: ("done", 1, ""),
        2: ("again", 0, ""),  # it is to be decoded: that is asked of a run that decodes
        3: ("todo", 1, ""),
        4: ("todo", 1, ""),
    }
    assert catalog.ledger.entries(ALL)[3].attempts == 0


# Locks are taken in one order: two that work on the same rows wait for each other, and neither dies.


LOCKS = ("INSERT", "UPDATE", "DELETE", " FOR ")
WAITING = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


class Race:
    """Two at once on PostgreSQL: after its first statement that locks rows the first one lets the second begin, and
    before each further one it waits until the second is done or waits for a lock."""

    def __init__(self, database, engine, other):
        self._database, self._other, self._done, self.errors = database, other, threading.Event(), []
        self._second = threading.Thread(target=self._run_other)
        sa.event.listen(engine, "before_cursor_execute", self._pause)
        sa.event.listen(engine, "after_cursor_execute", self._begin_other)

    def run(self, work):
        self._run(work)
        self._second.join(60)
        return self.errors

    def _run(self, work):
        try:
            work()
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            self.errors.append(error)

    def _run_other(self):
        self._run(self._other)
        self._done.set()

    def _begin_other(self, _connection, _cursor, statement, *_):
        if self._second.ident is None and any(word in statement for word in LOCKS):
            self._second.start()

    def _pause(self, _connection, _cursor, statement, *_):
        if self._second.ident is None or not any(word in statement for word in LOCKS):
            return
        until = time.monotonic() + 20
        while time.monotonic() < until and not self._done.is_set() and self._database.rows(WAITING) == [(0,)]:
            time.sleep(0.01)


@pytest.mark.parametrize(
    "command",
    [
        lambda catalog: catalog.make_pending([1, 2, 3]),
        lambda catalog: catalog.reprocess_after(0),
        lambda catalog: catalog.begin(ALL, TODAY, force=True),
        lambda catalog: catalog.forget([3, 2, 1]),
        lambda catalog: finish(catalog, catalog.plan(ALL, TODAY), 1, 2, 3),
    ],
    ids=["make_pending", "reprocess", "force", "forget", "another run's marks"],
)
@pytest.mark.parametrize("version", [None, "updated_at"])
def test_a_mark_and_a_command_at_once_do_not_die_of_each_other(postgres_url, make_database, settings, command, version):
    database = make_database(postgres_url, settings)
    database.create()
    database.insert(3, 2, 1, updated_at=datetime(2025, 1, 1))
    first, second = (database.catalog(source_version_column=version) for _ in range(2))
    plan = first.begin(ALL, TODAY)
    both = Race(database, first.source_engine, lambda: command(second))
    assert both.run(lambda: first.mark_done(plan, {3: 1, 1: 1, 2: 1}, TODAY)) == []
    first.close()
    second.close()
    database.engine.dispose()


def test_a_reconciliation_and_a_mark_at_once_do_not_die_of_each_other(postgres_url, make_database, settings):
    database = make_database(postgres_url, settings)
    database.create(ids=(3, 2, 1))
    first, second = database.catalog(), database.catalog()
    plan = second.begin(ALL, TODAY)
    both = Race(database, first.source_engine, lambda: finish(second, plan, 1, 2, 3))
    assert both.run(lambda: first.make_pending([3, 1, 2])) == []
    assert due(first) == [1, 2, 3]
    first.close()
    second.close()
    database.engine.dispose()


# What an earlier release left: entries without a claim and without an address.


def test_entries_of_an_earlier_release_are_fenced_from_their_first_claim_on(database, opened):
    database.create(ids=(1,))
    catalog = opened()
    finish(catalog, catalog.plan(ALL, TODAY), 1)
    with catalog.state_engine.begin() as connection:
        connection.execute(sa.text("UPDATE extraction_ledger SET claim = 0, address = NULL"))
        connection.execute(sa.text("UPDATE extraction_meta SET value = '0' WHERE key = 'claim_base'"))
    old = Catalog(catalog.settings)
    planned = old.plan(ALL, TODAY)
    catalog.reprocess_after(0)
    assert finish(old, planned, 1) == set()
    assert claims(catalog.begin(ALL, TODAY)) == {1: 2}
    old.close()
