"""What decode_range writes down while it goes on; and its contact sheet stays small, whatever a run decoded."""

import re
import sqlite3
import threading
import time

import numpy as np
import simplejpeg

from extraction_dagster import step_progress
from extraction_dagster.errors.catalog import FileUnavailableError
from extraction_dagster.ranges.decode import MAX_BYTES, ContactSheet, decode_range
from extraction_dagster.ranges.work import open_range
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.fetch.fetching import Fetcher
from extraction_dagster.stages.decode.stage import Preview

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
    assert states(settings) == {1: "todo", 2: "todo", 3: "failed"}

    report = decode(settings)
    assert (report.numbers["videos_kept"], report.numbers["frames"]) == (2, 0)
    assert states(settings) == {1: "extracted", 2: "extracted", 3: "failed"}


def test_the_number_of_frames_is_that_of_the_frames_that_are_kept(make_settings):
    once, twice = make_settings(), make_settings(fps=2)
    assert decode(once).numbers["frames"] == 6
    assert num_frames(once) == {1: 3, 2: 3}
    assert decode(twice).numbers["frames"] == 12
    assert num_frames(twice) == {1: 6, 2: 6}
    assert decode(once).numbers["videos_kept"] == 2
    assert num_frames(once) == {1: 3, 2: 3}


def num_frames(settings):
    with open_range(settings, IdRange(1, 2)) as work:
        return {record_id: entry.num_frames for record_id, entry in work.entries().items()}


def decode(settings):
    with open_range(settings, IdRange(1, 100), begins=True) as work:
        return decode_range(work)


def states(settings):
    with open_range(settings, IdRange(1, 100)) as work:
        return {record_id: entry.state for record_id, entry in work.entries().items()}


def noise(seed, width=320, height=180):
    image = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(image, quality=95)


def shown(markdown):
    return [int(record) for record in re.findall(r"!\[(\d+) at", markdown)]


def test_nothing_decoded_gives_no_sheet():
    assert ContactSheet(12).markdown() is None


def test_a_limit_of_none_keeps_no_picture():
    sheet = ContactSheet(0)
    sheet.add([Preview(1, 0.0, noise(1))])
    assert sheet.markdown() is None


def test_rows_of_four_with_a_caption_under_each_picture():
    sheet = ContactSheet(12)
    sheet.add(Preview(record, 1.25, noise(record, 32, 18)) for record in (5, 3, 1, 4, 2))
    lines = sheet.markdown().splitlines()
    assert shown(sheet.markdown()) == [1, 2, 3, 4, 5]
    assert lines[1] == "| --- | --- | --- | --- |"
    assert lines[2] == "| 1 at 1.2 s | 2 at 1.2 s | 3 at 1.2 s | 4 at 1.2 s |"
    assert lines[4] == "| 5 at 1.2 s |  |  |  |"


def test_of_many_videos_a_few_are_shown_from_beginning_to_end():
    sheet = ContactSheet(12)
    jpeg = noise(0, 32, 18)
    for record in range(1000):
        sheet.add([Preview(record, 0.0, jpeg)])
    records = shown(sheet.markdown())
    assert len(records) == 12
    assert records[0] < 100
    assert records[-1] > 800
    assert max(np.diff(records)) < 200


def test_a_sheet_never_exceeds_its_bytes_even_of_pictures_that_hardly_compress():
    sheet = ContactSheet(24)
    sheet.add(Preview(record, 0.0, noise(record, 300, 300)) for record in range(24))
    markdown = sheet.markdown()
    assert len(markdown) <= MAX_BYTES
    assert 4 <= len(shown(markdown)) < 24


def test_a_damaged_picture_leaves_its_place_empty():
    sheet = ContactSheet(12)
    sheet.add([Preview(1, 0.0, b"no jpeg"), Preview(2, 0.0, noise(2, 32, 18))])
    markdown = sheet.markdown()
    assert "(damaged)" in markdown
    assert shown(markdown) == [2]
