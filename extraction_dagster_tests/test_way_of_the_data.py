"""The whole way: the demo, and the obvious mistakes; all as a user would type them."""

import json
import os
import sqlite3
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
# One frame a second of the 26 rendered clips: 6+4+8+3+5+4+6+5+5+6+4+4 + 4+7+5+4+5+12+4+4+2+6+5+8+4+4 seconds.
RENDERED_FRAMES = 134
REAL_FRAMES = {"bikes": 10, "bigbuckbunny": 6, "carphone_pristine": 4, "carphone_distorted": 4}


@pytest.fixture(scope="module")
def run(commands):
    """Run a command of this project and check its exit code; only the demo's first run is a program of its own."""

    def run(*command, cwd, expect=0, **environment):
        environment = {**os.environ, "DAGSTER_HOME": str(cwd), "NO_COLOR": "1", **environment}
        done = commands.run([BIN / command[0], *command[1:]], cwd=cwd, env=environment)
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="module")
def demo(tmp_path_factory, demo_run):
    """A folder in which the demo ran once, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "folder"
    return folder, demo_run(folder)


def rows(folder, sql):
    with sqlite3.connect(f"file:{folder}/.extraction/source.db?mode=ro", uri=True) as connection:
        return connection.execute(sql).fetchall()


def points_by_record(folder):
    """Points in the engine, read with the engine's own package."""
    import qdrant_edge as edge

    (config,) = (folder / ".extraction" / "qdrant").rglob("edge_config.json")
    shard = edge.EdgeShard.load(str(config.parent))
    try:
        records, _ = shard.scroll(edge.ScrollRequest(limit=100_000, with_payload=["record_id"]))
    finally:
        shard.close()
    counts = {}
    for record in records:
        counts[record.payload["record_id"]] = counts.get(record.payload["record_id"], 0) + 1
    return counts


def expected_frames(folder):
    codes = [
        code for code, platform in rows(folder, "SELECT code, platform FROM insta_content") if platform != "rendered"
    ]
    return RENDERED_FRAMES + sum(REAL_FRAMES[code] for code in codes)


def test_the_demo_marks_every_good_video_and_leaves_the_two_broken_ones(demo):
    folder, _ = demo
    broken = "code IN ('truncated', 'no_video')"
    assert rows(
        folder, f"SELECT count(*) FROM insta_content WHERE NOT ({broken}) AND is_extracted AND is_embedded"
    ) == [(rows(folder, "SELECT count(*) - 2 FROM insta_content")[0][0],)]
    assert rows(folder, f"SELECT is_extracted, is_embedded FROM insta_content WHERE {broken}") == [(0, 0), (0, 0)]
    assert rows(folder, "SELECT count(*) FROM insta_content")[0][0] >= 28
    parked = rows(folder, "SELECT record_id FROM extraction_ledger WHERE state = 'parked' ORDER BY 1")
    assert parked == rows(folder, f"SELECT id FROM insta_content WHERE {broken} ORDER BY 1")


def test_the_store_holds_one_point_for_each_second_of_video(demo):
    folder, printed = demo
    points = points_by_record(folder)
    assert sum(points.values()) == expected_frames(folder)
    assert points == dict(rows(folder, "SELECT record_id, num_points FROM extraction_ledger WHERE state = 'done'"))
    assert f"points in Qdrant      │ {expected_frames(folder)} " in printed


def test_the_demo_says_what_a_person_wants_to_know(demo):
    _, printed = demo
    for words in (
        "ranges processed now  │ 1-12, 13-112, 113-208",
        "videos that failed    │ 2 ",
        "parked: Record 9: Video",
        "The first hit is the right video.",
        "extraction search --image",
    ):
        assert words in printed


def test_a_second_demo_does_nothing_new_and_says_so(demo, run):
    folder, _ = demo
    before = points_by_record(folder)
    printed = run("extraction", "demo", cwd=folder).stdout
    assert "Processed 0 records: everything was done already." in printed
    assert "ranges processed now  │ none" in printed
    assert points_by_record(folder) == before
    said = json.loads(run("extraction", "demo", "--json", cwd=folder).stdout)
    assert (said["ranges_processed_now"], said["records_processed_now"]) == ([], 0)
    assert (said["points_in_Qdrant"], said["videos_that_failed"]) == (expected_frames(folder), 2)
    assert said["first_hit_is_right"] is True


def test_status_errors_and_search_speak_json(demo, run):
    folder, _ = demo
    status = json.loads(run("extraction", "status", "--json", cwd=folder).stdout)
    assert (status["failed"], status["parked"], status["pending"]) == (0, 2, 0)
    assert (status["done"], status["lag_rows"], status["eta_seconds"]) == (status["eligible"] - 2, 0, 0)
    assert "\nextraction_lag_rows 0.0\n" in run("extraction", "metrics", cwd=folder).stdout
    errors = json.loads(run("extraction", "errors", "--json", cwd=folder).stdout)["errors"]
    assert sorted(error["record_id"] for error in errors) == [9, 108]
    image = str(folder / ".extraction" / "query.jpg")
    hits = json.loads(run("extraction", "search", "--image", image, "--limit", "3", "--json", cwd=folder).stdout)[
        "hits"
    ]
    assert len(hits) == 3
    assert hits[0]["score"] > hits[1]["score"] > hits[2]["score"]


def test_show_tells_all_of_one_record(demo, run):
    folder, _ = demo
    done = json.loads(run("extraction", "show", "3", "--json", cwd=folder).stdout)
    ((code,),) = rows(folder, "SELECT code FROM insta_content WHERE id = 3")
    ((run_id,),) = rows(folder, "SELECT claimed_by FROM extraction_ledger WHERE record_id = 3")
    assert (done["record_id"], done["status"], done["points"], done["errors"]) == (3, "done", 8, [])
    assert (done["row"]["code"], done["row"]["embedded"], done["runs"]) == (code, True, [run_id])
    assert (done["ledger"]["state"], done["ledger"]["num_frames"], done["ledger"]["num_points"]) == ("done", 8, 8)
    assert done["address"].endswith(f"/{code}.mp4")

    parked = run("extraction", "show", "9", cwd=folder).stdout
    assert parked.startswith("Record 9")
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in parked.splitlines()]
    assert [cell for cell in cells if cell[0] in {"status", "points", "row: code", "num frames"}] == [
        ["status", "parked"],
        ["points", "0"],
        ["row: code", "truncated"],
        ["num frames", "-"],
    ]
    assert "decode, VideoOpenError, run " in parked
    assert "truncated.mp4" in parked
    assert run("extraction", "show", "4711", cwd=folder, expect=1).stderr.startswith("error: Record 4711")


def test_a_cleared_mark_brings_a_record_back(demo, run):
    folder, _ = demo
    with sqlite3.connect(folder / ".extraction" / "source.db") as connection:
        connection.execute("UPDATE insta_content SET is_extracted = 0, is_embedded = 0 WHERE id = 3")
    printed = run("extraction", "launch", "1-12", cwd=folder)
    assert "Processing batch of 1 records (IDs: 1 - 12)" in printed.stderr
    assert "11 done, 0 pending, 0 failed, 1 parked" in printed.stdout
    assert points_by_record(folder)[3] == 8


@pytest.mark.parametrize(
    ("command", "environment", "code", "words"),
    [
        (("launch", "12-1"), {}, 1, "'12-1' is not a range of ids: the first id must not be greater"),
        (("launch", "abc"), {}, 1, "'abc' is not a range of ids: it is not two integers joined by '-'"),
        (
            ("launch", "5000-6000"),
            {},
            1,
            "Range 5000-6000 holds no eligible row of 'insta_content': its eligible rows have",
        ),
        (("launch",), {}, 2, "Missing argument 'FIRST-LAST'"),
        (("lunch",), {}, 2, "No such command 'lunch'"),
        (
            ("status",),
            {"EXTRACTION_SOURCE_TABLE": "videos"},
            1,
            "Source table 'videos' can't be used: there is no such table",
        ),
        (
            ("status",),
            {"EXTRACTION_SOURCE_URI_COLUMN": "file"},
            1,
            "it has no column 'file'. Set EXTRACTION_SOURCE_URI_COLUMN",
        ),
        (("status",), {"EXTRACTION_BATCH_SIZE": "0"}, 1, "Setting EXTRACTION_BATCH_SIZE is '0', expected"),
        (
            ("status",),
            {"EXTRACTION_BATCHSIZE": "5"},
            1,
            "EXTRACTION_BATCHSIZE is unknown, expected EXTRACTION_BATCH_SIZE",
        ),
        (("status",), {"EXTRACTION_SOURCE_URL": "nonsense"}, 1, "EXTRACTION_SOURCE_URL is not a database URL"),
        (("search", "--image", "none.jpg"), {}, 1, "none.jpg"),
        (("demo",), {"EXTRACTION_SOURCE_URL": "postgresql://u:s3cret@h/d"}, 1, "EXTRACTION_SOURCE_URL"),
    ],
)
def test_a_mistake_ends_in_one_clear_line(demo, command, environment, code, words, run):  # noqa: PLR0913, PLR0917
    folder, _ = demo
    done = run("extraction", *command, cwd=folder, expect=code, COLUMNS="200", **environment)
    assert words in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "s3cret" not in done.stderr + done.stdout
    if code == 1:
        assert len(done.stderr.splitlines()) == 1


def test_the_doctor_lists_every_setting_and_checks_what_a_run_needs(demo, run):
    folder, _ = demo
    assert "EXTRACTION_BATCH_SIZE" not in run("extraction", "doctor", cwd=folder).stdout
    printed = run("extraction", "doctor", "--all", cwd=folder).stdout
    assert "EXTRACTION_BATCH_SIZE" in printed
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("ok ")] == [
        "ok      rights",
        "ok      source table and state",
        "ok      Dagster's instance",
        "ok      decoding workers",
        "ok      embedding model",
        "ok      frames and vectors",
        "ok      Qdrant",
        "ok      notices",
    ]


def test_the_doctor_goes_on_after_a_failed_check_and_hides_secrets(demo, run):
    folder, _ = demo
    url = "postgresql://u:s3cret@127.0.0.1:1/d"
    printed = run("extraction", "doctor", cwd=folder, expect=1, EXTRACTION_SOURCE_URL=url).stdout
    assert "FAILED  source table and state: Cannot read source table 'insta_content' at postgresql" in printed
    assert "FAILED  Qdrant: Collection" in printed  # its points are of the table that the settings no longer name
    assert "ok      notices" in printed
    assert "s3cret" not in printed


def test_an_empty_table_says_so(tmp_path, run):
    marks = "is_extracted BOOLEAN, is_embedded BOOLEAN"
    schema = f"CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path, {marks})"
    (tmp_path / ".extraction").mkdir()
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        connection.execute(schema)
    done = run("extraction", "launch", "1-10", cwd=tmp_path, expect=1, DAGSTER_HOME="")
    assert "it has no eligible row at all" in done.stderr
    assert json.loads(run("extraction", "status", "--json", cwd=tmp_path, DAGSTER_HOME="").stdout)["eligible"] == 0


def test_files_that_can_not_be_read_fail_their_records_alone(demo, run):
    folder, _ = demo
    with sqlite3.connect(folder / ".extraction" / "source.db") as connection:
        connection.execute(
            "INSERT INTO insta_content (id, platform, code, path) VALUES (9001, 'x', 'y', 'no/such/file.mp4')"
        )
        connection.execute(
            "INSERT INTO insta_content (id, platform, code, path) VALUES (9002, 'x', 'z', '/etc/passwd')"
        )
    printed = run("extraction", "launch", "9001-9002", cwd=folder)
    assert "0 done, 0 pending, 1 failed, 1 parked" in printed.stdout
    with sqlite3.connect(folder / ".extraction" / "source.db") as connection:
        connection.execute("DELETE FROM insta_content WHERE id > 9000")
