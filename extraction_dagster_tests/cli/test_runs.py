"""`extraction backfill`, as a user types it; no daemon runs, unless a test says that one does."""

import json
import os
import re
import sqlite3
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from extraction_dagster.cli.main import app
from extraction_dagster.errors.catalog import EmptyRangeError
from extraction_dagster.errors.runs import BackfillFailedError, BackfillUnknownError, DaemonMissingError

EXTRACTION = Path(sys.executable).parent / "extraction"
MARKS = "is_extracted BOOLEAN NOT NULL DEFAULT 0, is_embedded BOOLEAN NOT NULL DEFAULT 0"
# Loading the definitions: Dagster looks at a resource's fields as it did with an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")


def make_table(folder, rows):
    (folder / ".extraction").mkdir()
    connection = sqlite3.connect(folder / ".extraction" / "source.db")
    connection.execute(f"CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, {MARKS})")
    connection.executemany("INSERT INTO insta_content (id, path) VALUES (?, ?)", rows)
    connection.commit()
    connection.close()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Ten rows, from -2 to 7, in batches of four."""
    make_table(tmp_path, [(number, "x.mp4") for number in range(-2, 8)])
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "4")


def extraction(*arguments, code=0):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def document(*arguments, code=0):
    return json.loads(extraction("backfill", *arguments, "--json", code=code).stdout)


def plain(text):
    """A message as it reads, without the frame that is drawn around it and its line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["50-10"], "'50-10' is not a range of ids: the first id must not be greater than the last"),
        (["abc"], "'abc' is not a range of ids: it is not two integers joined by '-'"),
        (["-5"], "'-5' is not a range of ids"),
        (["-1--5"], "'-1--5' is not a range of ids: the first id must not be greater than the last"),
        (["1-99999999999999999999"], "is not a range of ids"),
        ([], "give FIRST-LAST, or --all, or --watch ID, or --cancel ID: exactly one of them"),
        (["1-5", "--all"], "exactly one of them"),
        (["1-5", "6-7"], "unexpected extra argument"),
        (["1-5", "--only", "frames"], "frames is not an asset: choose from video_frames, frame_embeddings,"),
        (["1-5", "--only", " , "], "nothing is not an asset"),
        (["1-5", "--here", "--wait"], "--here waits anyway"),
        (["1-5", "--dryrun"], "No such option: --dryrun"),
    ],
)
def test_wrong_usage_is_said_in_one_sentence(arguments, said):
    assert said in plain(extraction("backfill", *arguments, code=2).stderr)


@pytest.mark.usefixtures("table")
def test_a_span_without_a_row_fails_and_says_where_rows_are():
    error = extraction("backfill", "100-200", code=1).exception
    assert isinstance(error, EmptyRangeError)
    assert "Range 100-200 holds no eligible row of 'insta_content': its eligible rows have ids -2 to 7." in str(error)


def test_an_empty_table_has_nothing_to_backfill(tmp_path):
    make_table(tmp_path, [])
    assert "it has no eligible row at all" in str(extraction("backfill", "--all", code=1).exception)


@pytest.mark.usefixtures("table")
def test_a_dry_run_says_what_it_would_do_and_does_nothing():
    nothing_done = {
        "backfill_id": None,
        "state": "dry run",
        "span": "-5-50000",
        "assets": ["video_frames", "frame_embeddings", "qdrant_points"],
        "ranges": ["-5-1", "2-5", "6-7"],
        "new_ranges": ["-5-1", "2-5", "6-7"],
        "busy_ranges": {},
        "fresh_ranges": [],
        "finished": 0,
        "failed_ranges": [],
        "daemon_running": False,
    }
    assert document("-5-50000", "--dry-run") == nothing_done
    assert document("-5-50000", "--dry-run") == nothing_done
    printed = extraction("backfill", "--all", "--dry-run", "--only", "qdrant_points").stdout
    assert "Backfill of -2-7, qdrant_points: 3 ranges, 0 of them there already and 3 new." in printed
    assert "Would launch: -2-1, 2-5, 6-7." in printed


@pytest.mark.usefixtures("table")
def test_without_a_daemon_the_backfill_waits_and_says_so():
    done = extraction("backfill", "1-5")
    assert "Backfill of 1-5, video_frames, frame_embeddings, qdrant_points: 2 ranges, 0 of them" in done.stdout
    backfill_id = re.search(r"Launched backfill (\w+):", done.stdout)[1]
    assert f"cancel it with 'extraction backfill --cancel {backfill_id}'" in done.stdout
    assert "No Dagster daemon is running" in done.stderr
    assert "dagster dev -w workspace.yaml" in done.stderr
    again = document("1-7")
    assert (again["ranges"], again["busy_ranges"]) == (
        ["6-7"],
        {"1-4": f"backfill {backfill_id}", "5-5": f"backfill {backfill_id}"},
    )
    assert (again["state"], again["daemon_running"]) == ("launched", False)


@pytest.mark.usefixtures("table")
def test_a_second_backfill_of_the_same_span_launches_nothing():
    extraction("backfill", "1-5")
    done = extraction("backfill", "1-5")
    assert "Left out, at work: 1-4 (backfill " in done.stdout
    assert "Nothing to launch." in done.stdout
    assert document("1-5")["state"] == "nothing to do"


@pytest.mark.usefixtures("table")
def test_waiting_for_a_daemon_that_is_not_there_is_refused_before_anything_is_launched():
    assert isinstance(extraction("backfill", "1-5", "--wait", code=1).exception, DaemonMissingError)
    assert document("1-5", "--dry-run")["new_ranges"] == ["1-4", "5-5"]


@pytest.mark.usefixtures("table")
def test_a_backfill_can_be_cancelled_and_its_ranges_are_free_again():
    backfill_id = document("--all")["backfill_id"]
    assert "is being cancelled" in extraction("backfill", "--cancel", backfill_id).stdout
    assert document("--all", "--dry-run")["busy_ranges"] == {}
    assert isinstance(extraction("backfill", "--cancel", "nope", code=1).exception, BackfillUnknownError)
    assert isinstance(extraction("backfill", "--watch", "nope", code=1).exception, BackfillUnknownError)


@pytest.fixture
def ended(monkeypatch):
    """Let a backfill end as told: its state, and which ranges failed."""
    from extraction_dagster.defs.instance.backfills import BackfillProgress, Backfills  # noqa: PLC0415 - loads Dagster
    from extraction_dagster.records import IdRange  # noqa: PLC0415

    def end(state, finished, *failed, error=""):
        ranges = tuple(IdRange.parse(key) for key in failed)
        seen = BackfillProgress(state, 3, finished, ranges, queued=0, started=0, error=error)
        monkeypatch.setattr(Backfills, "progress", lambda *_: seen)

    return end


@pytest.mark.usefixtures("table")
def test_watching_ends_with_the_backfill_and_tells_how_it_ended(ended):
    ended("done", 3)
    done = extraction("backfill", "--watch", "abcdefgh")
    assert "Backfill abcdefgh is done: 3 ranges." in done.stdout
    assert "Backfill abcdefgh: 3 of 3 ranges finished, 0 at work, 0 queued, 0 failed" in done.stderr
    ended("failed", 2, "2-5", error="Something broke\nat a line")
    error = extraction("backfill", "--watch", "abcdefgh", code=1).exception
    assert isinstance(error, BackfillFailedError)
    assert str(error) == (
        "Backfill abcdefgh failed: 2 of 3 ranges are done, 1 failed (2-5). Something broke. What was finished is kept: "
        "the same command goes on from there, with --stale-only on what is missing alone."
    )
    ended("canceled", 1)
    assert "Backfill abcdefgh canceled: 1 of 3" in str(extraction("backfill", "--watch", "abcdefgh", code=1).exception)


@pytest.mark.usefixtures("table")
def test_ctrl_c_ends_the_watching_alone_and_says_how_to_cancel(ended, monkeypatch):
    def interrupt(_seconds):
        raise KeyboardInterrupt

    ended("running", 1)
    monkeypatch.setattr("extraction_dagster.cli.runs.time.sleep", interrupt)
    done = extraction("backfill", "--watch", "abcdefgh", code=130)
    assert "backfill abcdefgh goes on" in done.stderr
    assert "extraction backfill --cancel abcdefgh" in done.stderr
    assert "No Dagster daemon is running: the backfill goes on once there is one" in done.stderr


@pytest.mark.slow
def test_here_ranges_are_processed_without_a_daemon_and_a_second_time_nothing_is_stale(tmp_path, small_clips, commands):
    make_table(tmp_path, [(number, f"{name}.mp4") for number, name in enumerate("abc", 1)])
    (tmp_path / ".extraction" / "videos").symlink_to(small_clips)

    def backfill(*arguments, code=0):
        environment = {**os.environ, "EXTRACTION_BATCH_SIZE": "2", "NO_COLOR": "1"}
        done = commands.run([EXTRACTION, "backfill", *arguments], cwd=tmp_path, env=environment)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def done_records():
        connection = sqlite3.connect(f"file:{tmp_path}/.extraction/source.db?mode=ro", uri=True)
        found = connection.execute("SELECT id FROM insta_content WHERE is_extracted AND is_embedded").fetchall()
        connection.close()
        return [record_id for (record_id,) in found]

    first = backfill("--all", "--here", "--only", "video_frames")
    assert "Backfill of 1-3 is done: 2 ranges." in first.stdout
    assert "Range 1-2, 1 of 2" in first.stderr
    assert done_records() == []
    assert "2 ranges, 2 of them there already and 0 new" in backfill("--all", "--stale-only", "--here").stdout
    assert done_records() == [1, 2, 3]
    assert "Left out, nothing is stale: 1-2, 3-3." in backfill("--all", "--stale-only", "--here").stdout


NO_SHARDS = {"merged": 0, "written": 0}
NOTHING_REMOVED = {"frame_shards": 0, "frame_bytes": 0, "former_shards": 0, "former_bytes": 0}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("checkpoint set 3", {"state": "applied", "last_processed_id": 3, "floor_id": 3}),
        ("checkpoint reset", {"state": "applied", "last_processed_id": None, "floor_id": None}),
        (
            "checkpoint import 4.json",
            {"state": "applied", "last_processed_id": 4, "floor_id": 4, "read_from": "file 4.json, key last_id"},
        ),
        ("frames prune", {"keep_frames": "all", **NOTHING_REMOVED}),
        ("frames compact", {"frame_shards": NO_SHARDS, "embedding_shards": NO_SHARDS}),
        ("notify", {"delivered": True, "notify": "log"}),
    ],
)
def test_what_a_command_reports_is_one_document(words, said, monkeypatch, tmp_path):
    monkeypatch.setenv("EXTRACTION_NOTIFY", "log")
    (tmp_path / "4.json").write_text('{"last_id": 4}')
    assert json.loads(extraction(*words.split(), "--json").stdout) == said


@pytest.mark.usefixtures("table")
def test_init_reports_as_one_document(tmp_path):
    said = json.loads(extraction("init", "--json").stdout)
    assert (said["table"], said["eligible_rows"], said["taken_over"]) == ("insta_content", 10, False)
    assert said["wrote"] == ["workspace.yaml", "dagster.yaml"]
    assert said["storage"] == str(tmp_path / ".extraction" / "dagster")
    assert json.loads(extraction("init", "--json").stdout)["wrote"] == []
    proposed = json.loads(
        extraction("init", "--propose", f"sqlite:///{tmp_path}/.extraction/source.db", "--json").stdout
    )
    assert proposed["table"] == "insta_content"
    assert any(line.startswith("EXTRACTION_SOURCE_TABLE=") for line in proposed["lines"])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "words",
    [
        "status",
        "errors",
        "reconcile",
        "reconcile --repair",
        "backfill --all --dry-run",
        "checkpoint show",
        "checkpoint set 3",
        "checkpoint reset",
        "frames prune",
        "frames compact",
        "collection list",
        "points export points.parquet",
        "launch 900-1000",
        "retry --all",
    ],
)
def test_no_command_shows_the_ends_of_all_ids_where_rows_have_others(words, monkeypatch):
    monkeypatch.setenv("EXTRACTION_KEEP_FRAMES", "none")
    for options in ([], ["--json"]):
        done = CliRunner().invoke(app, [*words.split(), *options])
        assert not re.search(r"\d{17}", f"{done.output} {done.stderr} {done.exception}")


def test_a_broken_object_is_named_by_its_address_in_the_ledger_and_in_the_log(tmp_path, monkeypatch, s3_root):
    import s3fs  # noqa: PLC0415 - lazy: slow to import

    address = f"{s3_root}/what? #1 50%.mp4"
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(address, b"no video")
    make_table(tmp_path, [(1, address)])
    monkeypatch.setenv("EXTRACTION_ALLOWED_BUCKETS", s3_root)
    done = extraction("launch", "1-4")
    assert f"Record 1: Video '{address}' can't be opened" in done.stderr
    (error,) = json.loads(extraction("errors", "--json").stdout)["errors"]
    assert error["error_message"].startswith(f"Record 1: Video '{address}' can't be opened")
    assert error["address"] == address
    assert "cache" not in done.output + done.stderr + error["error_message"] + error["error_details"]
