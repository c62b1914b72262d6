"""`extraction run`: whatever is due, in the foreground; stopped by Ctrl+C again and again, nothing is lost."""

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest

EXTRACTION = Path(sys.executable).parent / "extraction"
NUM_ROWS = 12
pytestmark = pytest.mark.slow


def make_folder(folder, demo_folder, demo_videos):
    """A data folder with rendered clips, several to a range, and one row whose file is missing."""
    (folder / ".extraction").mkdir(parents=True)
    (folder / ".extraction" / "videos").symlink_to(demo_folder)
    good = [
        video for video in demo_videos if video.platform == "rendered" and video.code not in {"truncated", "no_video"}
    ]
    connection = sqlite3.connect(folder / ".extraction" / "source.db")
    connection.execute(
        "CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, "
        "is_extracted BOOLEAN NOT NULL DEFAULT 0, is_embedded BOOLEAN NOT NULL DEFAULT 0)"
    )
    rows = [(number, video.platform, video.code, video.path) for number, video in enumerate(good[:NUM_ROWS], 1)]
    connection.executemany("INSERT INTO insta_content (id, platform, code, path) VALUES (?, ?, ?, ?)", rows)
    connection.execute("INSERT INTO insta_content (id, path) VALUES (99, '/etc/passwd')")
    connection.commit()
    connection.close()
    return folder


@pytest.fixture(scope="module")
def start(commands):
    """`start(folder)`: `extraction run` there."""

    def start(folder, *arguments):
        environment = {"EXTRACTION_BATCH_SIZE": "5", "EXTRACTION_SHARD_RECORDS": "1", "NO_COLOR": "1"}
        process = commands.start([EXTRACTION, *(arguments or ("run",))], cwd=folder, env={**os.environ, **environment})
        watchdog = threading.Timer(300, process.kill)  # nobody reads for ever what a process that hangs never writes
        watchdog.daemon = True
        watchdog.start()
        return process

    return start


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def ledger(folder):
    connection = sqlite3.connect(f"file:{folder}/.extraction/source.db?mode=ro", uri=True)
    rows = connection.execute("SELECT record_id, state, num_frames, num_points FROM extraction_ledger ORDER BY 1")
    found = rows.fetchall()
    connection.close()
    return found


def points(folder):
    """Ids of the points in the engine, read with the engine's own package."""
    import qdrant_edge as edge

    (config,) = (folder / ".extraction" / "qdrant").rglob("edge_config.json")
    shard = edge.EdgeShard.load(str(config.parent))
    try:
        found, _ = shard.scroll(edge.ScrollRequest(limit=100_000, with_payload=False))
    finally:
        shard.close()
    return sorted(str(point.id) for point in found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, demo_folder, demo_videos, start):
    folder = make_folder(tmp_path_factory.mktemp("undisturbed"), demo_folder, demo_videos)
    return folder, *finish(start(folder))


def test_a_table_is_drained_and_the_log_says_what_was_done(undisturbed):
    folder, code, out, err = undisturbed
    assert code == 0, err
    assert f"Processed {NUM_ROWS + 1} records; no row is due.\n{NUM_ROWS} done, 0 failed, 1 parked." in out
    for line in (
        "Starting from the beginning: there is no checkpoint yet",
        "Processing batch of 5 records (IDs: 1 - 5)",
        "Processing batch of 5 records (IDs: 6 - 10)",
        "Updated checkpoint: last processed ID = 99",
        f"Total records processed so far: {NUM_ROWS + 1}",
    ):
        assert line in err
    assert [state for _, state, _, _ in ledger(folder)] == ["done"] * NUM_ROWS + ["parked"]


def test_a_second_run_does_nothing_and_says_where_it_resumed(undisturbed, start):
    folder, *_ = undisturbed
    before = points(folder)
    code, out, err = finish(start(folder))
    assert (code, "Processed 0 records; no row is due." in out) == (0, True)
    assert "Resuming from checkpoint: last processed ID = 99" in err
    assert "Processing batch" not in err
    assert points(folder) == before


def test_a_run_stopped_three_times_ends_as_an_undisturbed_one(undisturbed, tmp_path, demo_folder, demo_videos, start):
    folder, chance = make_folder(tmp_path / "stopped", demo_folder, demo_videos), random.Random(7)
    num_decoded = 0
    for stop in range(4):
        process = start(folder)
        said = []
        if stop < 3:
            for line in process.stderr:
                said.append(line)
                if "Marked" in line or "Processing batch" in line:
                    break
            time.sleep(chance.uniform(0, 0.5))
            process.send_signal(signal.SIGINT)
        code, _, err = finish(process)
        num_decoded += sum(int(n) for n in re.findall(r"Marked (\d+) records as extracted", "".join(said) + err))
        assert code == 0 or (stop < 3 and code == 130), err
        assert "Traceback" not in err
        if code == 130:
            assert "run the same command again to go on" in err
    whole, *_ = undisturbed
    assert ledger(folder) == ledger(whole)
    assert points(folder) == points(whole)
    # Each record's shard was marked once; a stop right after a mark can only cost its line in the log.
    assert NUM_ROWS - 3 <= num_decoded <= NUM_ROWS


def test_a_row_that_is_done_once_more_counts(undisturbed, tmp_path, start):
    folder, *_ = undisturbed
    shutil.copytree(folder, tmp_path / "again", symlinks=True)
    copy = tmp_path / "again"
    connection = sqlite3.connect(copy / ".extraction" / "source.db")
    connection.execute("UPDATE insta_content SET is_embedded = 0 WHERE id = 3")
    connection.commit()
    connection.close()
    code, out, err = finish(start(copy, "init", "--take-over"))
    assert code == 0, err
    assert "is taken over: work goes on where it was" in out
    code, out, err = finish(start(copy))
    assert code == 0, err
    assert "Processed 1 records; no row is due.\n1 done, 0 failed, 0 parked." in out
    assert len(ledger(copy)) == len(ledger(folder))
    assert points(copy) == points(folder)


def test_show_tells_the_watermark_of_a_drained_table(undisturbed, commands):
    folder, *_ = undisturbed
    done = commands.run([EXTRACTION, "checkpoint", "show", "--json"], cwd=folder, check=True)
    assert json.loads(done.stdout)["last_processed_id"] == 99
