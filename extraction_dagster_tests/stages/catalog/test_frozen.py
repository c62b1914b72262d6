"""Processes that are frozen or killed between any two statements, while an operator or another run goes on."""

import contextlib
import os
import signal
import threading
import traceback
from datetime import datetime

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.pending import scan

TODAY = Fingerprints(frames="f1", embedding="e1")
MOST_STATEMENTS = 40


@pytest.fixture(params=["one database", "two databases"])
def catalog(request, database, tmp_path):
    """A catalog of many rows, with its state in the same database or elsewhere."""
    database.create()
    database.insert(*range(1, MOST_STATEMENTS + 1), updated_at=datetime(2025, 1, 1))
    state = {} if request.param == "one database" else {"state_url": SecretStr(f"sqlite:///{tmp_path}/state.db")}
    with contextlib.closing(database.catalog(source_version_column="updated_at", **state)) as catalog:
        yield catalog


class Frozen:
    """A process that marks a planned row as done, and stops itself before its n-th statement that locks or writes."""

    def __init__(self, catalog, record_id, stop_at):
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._work(catalog, record_id, stop_at)
            except BaseException:  # noqa: BLE001 - this process must not go on as a test
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        self.is_stopped = os.WIFSTOPPED(status)
        assert self.is_stopped or os.WEXITSTATUS(status) == 0

    @staticmethod
    def _work(catalog, record_id, stop_at):
        window, seen, engines = IdRange(record_id, record_id), [], {catalog.source_engine, catalog.state_engine}
        for engine in engines:
            engine.dispose(close=False)  # connections are the other process's
        plan = catalog.begin(window, TODAY)
        catalog.mark_extracted(plan, {record_id: 3}, "f1")

        def stop(*_):
            seen.append(None)
            if len(seen) == stop_at:
                os.kill(os.getpid(), signal.SIGSTOP)

        def before(_connection, _cursor, statement, *_):
            if not statement.startswith("SELECT") or "FOR " in statement:
                stop()

        for engine in engines:
            sa.event.listen(engine, "before_cursor_execute", before)
            sa.event.listen(engine, "commit", stop)
        catalog.mark_done(plan, {record_id: 3}, TODAY)

    def go_on(self):
        os.kill(self.pid, signal.SIGCONT)
        assert os.waitpid(self.pid, 0)[1] == 0

    def die(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def reprocess(catalog, _database, record_id):
    catalog.reprocess_after(record_id - 1)


def make_pending(catalog, _database, record_id):
    catalog.make_pending([record_id])


def another_run(catalog, database, record_id):
    """A newer version is committed, and a run of it from begin to end."""
    database.execute("UPDATE insta_content SET updated_at = :at WHERE id = :id", at=datetime(2025, 2, 2), id=record_id)
    for _ in range(2):  # the second finds what a loser may have left
        plan = catalog.begin(IdRange(record_id, record_id), TODAY)
        if plan[record_id].status == "todo":
            catalog.mark_extracted(plan, {record_id: 7}, "f1")
            catalog.mark_done(plan, {record_id: 7}, TODAY)


def look(catalog, database, record_id):
    """What is left of a row: its state, whether it is marked as done, and whether a scan finds it."""
    entry = catalog.ledger.entries(IdRange(record_id, record_id))[record_id]
    ((extracted, embedded),) = database.rows(
        f"SELECT is_extracted, is_embedded FROM insta_content WHERE id = {record_id}"
    )
    found = scan(catalog, after_id=record_id - 1, up_to_id=record_id, budget=9, every_row=False).pending_ids
    return entry, bool(extracted and embedded), found == [record_id]


def moments(catalog):
    """A frozen process at each of its statements, one row each, from the last row to the first."""
    for stop_at in range(1, MOST_STATEMENTS):
        record_id = MOST_STATEMENTS - stop_at  # above it are only rows that were looked at
        frozen = Frozen(catalog, record_id, stop_at)
        if not frozen.is_stopped:
            assert stop_at > 4
            return
        yield record_id, frozen
    pytest.fail("it never came to its end")


def judge(catalog, database, record_id, command):
    entry, is_marked, is_due = look(catalog, database, record_id)
    if command is another_run:
        assert (entry.state, entry.content_version[:10], entry.num_frames) == ("done", "2025-02-02", 7)
        assert (is_marked, is_due) == (True, False)
    else:
        assert (entry.state, is_marked, is_due) == ("todo", False, True)


@pytest.mark.parametrize("command", [reprocess, make_pending, another_run], ids=lambda command: command.__name__)
def test_a_frozen_writer_that_returns_undoes_nothing(database, catalog, command):
    for record_id, frozen in moments(catalog):
        working = threading.Thread(target=command, args=(catalog, database, record_id))
        working.start()
        working.join(0.3)  # it waits for the frozen one where that holds a lock
        frozen.go_on()
        working.join(60)
        judge(catalog, database, record_id, command)


def test_a_writer_that_dies_at_any_moment_leaves_nothing_that_is_not_found(database, catalog):
    for record_id, frozen in moments(catalog):
        frozen.die()
        entry, is_marked, is_due = look(catalog, database, record_id)
        assert is_due or (entry.state, is_marked) == ("done", True)
        another_run(catalog, database, record_id)
        judge(catalog, database, record_id, another_run)
