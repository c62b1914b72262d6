"""What decode_range writes down while it goes on."""

import sqlite3
import threading
import time

from extraction_dagster import step_progress
from extraction_dagster.errors.catalog import FileUnavailableError
from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.work import open_range
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.fetch.fetching import Fetcher

DEAD = 50
PATIENCE_SECONDS = 30.0


class Counting:
    """A listener that counts."""

    def __init__(self):
        self.total = self.finished = 0

    def begin(self, _step, total):
        self.total = total

    def advance(self, _step, number):
        self.finished += number


def test_dead_links_are_written_down_while_the_last_one_is_still_tried(sqlite_database, tmp_path, monkeypatch):
    sqlite_database.create(ids=range(1, DEAD + 1))
    sqlite_database.execute("UPDATE insta_content SET path = 'https://dead.example/' || path")
    settings = sqlite_database.settings(decode_workers=1)
    let_go, seen, count = threading.Event(), {}, Counting()

    def fetch(_self, row):
        if row.record_id == DEAD:
            let_go.wait(2 * PATIENCE_SECONDS)
        raise FileUnavailableError(row.uri, "no such host")

    def watch():
        deadline = time.monotonic() + PATIENCE_SECONDS
        with sqlite3.connect(tmp_path / "source.db") as connection:
            while time.monotonic() < deadline and seen != {"errors": DEAD - 1, "finished": DEAD - 1}:
                time.sleep(0.1)
                seen["errors"] = connection.execute("SELECT count(*) FROM extraction_errors").fetchone()[0]
                seen["finished"] = count.finished
        let_go.set()

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    watcher = threading.Thread(target=watch)
    with step_progress.listening(count), open_range(settings, IdRange(1, 100), begins=True) as work:
        watcher.start()
        report = decode_range(work)
        watcher.join()

    assert seen == {"errors": DEAD - 1, "finished": DEAD - 1}
    assert (count.total, count.finished) == (DEAD, DEAD)
    assert sorted(failure.record_id for failure in report.failures) == list(range(1, DEAD + 1))
    assert (report.numbers["videos"], report.numbers["frames"]) == (0, 0)


def test_frames_that_an_earlier_try_stored_are_marked_and_not_decoded_again(make_settings, monkeypatch):
    from extraction_dagster.stages.catalog.catalog import Catalog  # noqa: PLC0415 - beside the fault

    settings = make_settings()
    with monkeypatch.context() as killed:
        killed.setattr(Catalog, "mark_extracted", lambda *_: None)  # as if the process had ended just before
        assert decode(settings).numbers["frames"] == 6
    assert states(settings) == {3: "failed"}

    report = decode(settings)
    assert (report.numbers["videos_kept"], report.numbers["frames"]) == (2, 0)
    assert states(settings) == {1: "extracted", 2: "extracted", 3: "failed"}


def decode(settings):
    with open_range(settings, IdRange(1, 100), begins=True) as work:
        return decode_range(work)


def states(settings):
    with open_range(settings, IdRange(1, 100)) as work:
        return {record_id: entry.state for record_id, entry in work.entries().items()}
