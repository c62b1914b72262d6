"""Obvious mistakes, each typed as a user would: an exit code, one line, what is wrong, how to mend it, no secret."""

import json
import os
import re
import signal
import sqlite3

import pytest

from extraction_dagster.cli.main import run_app

CANARY = "canary4711"
UP, DOWN = "sqlite:///{home}/source.db", f"postgresql://u:{CANARY}@127.0.0.1:1/db"
COLUMNS = "id INTEGER PRIMARY KEY, platform TEXT, code TEXT, path TEXT, is_extracted BOOLEAN, is_embedded BOOLEAN"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A data folder with a table of two rows, tables of other shapes beside it, and a few files."""
    home = tmp_path / ".extraction"
    home.mkdir()
    with sqlite3.connect(home / "source.db") as connection:
        connection.execute(f"CREATE TABLE insta_content ({COLUMNS})")
        connection.executemany("INSERT INTO insta_content (id, path) VALUES (?, 'x.mp4')", [(1,), (2,)])
        connection.execute("CREATE TABLE texts (id TEXT PRIMARY KEY, path TEXT)")
        connection.execute("CREATE TABLE loose (id INTEGER, path TEXT)")
        connection.execute(f"CREATE TABLE numbers ({COLUMNS.replace('is_extracted BOOLEAN', 'is_extracted INTEGER')})")
        connection.execute("CREATE TABLE extraction_checkpoint (name TEXT, value INTEGER)")
    connection.close()
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "no.json").write_text("{]")
    (tmp_path / "no.jpg").write_text("no picture")
    (tmp_path / "no.parquet").write_text("no Parquet")
    (tmp_path / "no.jsonl").write_text("{}\n")
    monkeypatch.setenv("COLUMNS", "1000")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def extraction(monkeypatch, capsys):
    """The command as a program: its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["extraction", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_app()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


# Settings, arguments, exit code, and what the message says: the culprit, and how to mend it.
MISTAKES = {
    # settings
    "a misspelt setting": (
        {"SOURCE_URLS": UP},
        "status",
        1,
        "EXTRACTION_SOURCE_URLS is unknown",
        "SOURCE_URL, perhaps",
    ),
    "a number that is none": ({"BATCH_SIZE": "many"}, "status", 1, "EXTRACTION_BATCH_SIZE is 'many'", "valid integer"),
    "a number out of range": (
        {"BATCH_SIZE": "0"},
        "run",
        1,
        "EXTRACTION_BATCH_SIZE is '0'",
        "greater than or equal to 1",
    ),
    "a choice that is none": ({"SAMPLING": "all"}, "doctor", 1, "EXTRACTION_SAMPLING is 'all'", "'fps', 'uniform'"),
    "a flag that is none": ({"ALLOW_HTTP": "perhaps"}, "status", 1, "EXTRACTION_ALLOW_HTTP", "boolean"),
    "two settings that disagree": (
        {"SOURCE_READ_ONLY": "1"},
        "init",
        1,
        "source_read_only needs state_url",
        "Correct it",
    ),
    "fewer frames than the least": (
        {"MIN_FRAMES": "9", "MAX_FRAMES": "5"},
        "run",
        1,
        "min_frames (9)",
        "max_frames (5)",
    ),
    "a schema in SQLite": ({"STATE_SCHEMA": "mine"}, "status", 1, "state_schema needs PostgreSQL", "Correct it"),
    "a schema that is no name": ({"STATE_SCHEMA": "my schema"}, "init", 1, "EXTRACTION_STATE_SCHEMA", "pattern"),
    "a network that is none": (
        {"ALLOWED_NETWORKS": "10.0.0.0/4"},
        "run",
        1,
        "ALLOWED_NETWORKS",
        "none larger than a /8",
    ),
    "a bucket that is none": ({"ALLOWED_BUCKETS": "videos"}, "run", 1, "ALLOWED_BUCKETS", "s3://videos"),
    "a host with a path": ({"ALLOWED_HOSTS": "https://x.example/a"}, "run", 1, "ALLOWED_HOSTS", "media.example.com"),
    "a notifier that is none": ({"NOTIFY": "mail"}, "notify", 1, "EXTRACTION_NOTIFY", "module:function"),
    "no notifier": ({}, "notify", 1, "EXTRACTION_NOTIFY is none", "log, webhook, slack"),
    "a hook without an address": ({"NOTIFY": "slack"}, "notify", 1, "notify=slack needs notify_url", "Correct it"),
    "a payload column that every point has": (
        {"SOURCE_PAYLOAD_COLUMNS": "path"},
        "run",
        1,
        "(refused: path)",
        "other than",
    ),
    "a decoder that is none": ({"DECODER": "opencv"}, "run", 1, "EXTRACTION_DECODER is 'opencv'", "'pyav' or 'decord'"),
    "a device that is none": ({"DEVICE": "gpu"}, "run", 1, "EXTRACTION_DEVICE is 'gpu'", "cuda"),
    "a setting of an odd prefix in .env": (
        {},
        "status",
        1,
        "EXTRATION_HOME is unknown (in .env)",
        "EXTRACTION_HOME, per",
    ),
    # URLs
    "a URL that is none": (
        {"SOURCE_URL": CANARY},
        "status",
        1,
        "SOURCE_URL is not a database URL",
        "postgresql://USER",
    ),
    "a password with an @": (
        {"SOURCE_URL": f"postgresql://u:p@{CANARY}@h/d"},
        "status",
        1,
        "SOURCE_URL holds '@'",
        "%40",
    ),
    "a port in a password": (
        {"SOURCE_URL": f"postgresql://u:p@s:{CANARY}@h/d"},
        "run",
        1,
        "SOURCE_URL is not",
        "sqlite:",
    ),
    "a port that is none": (
        {"STATE_URL": f"postgresql://u:{CANARY}@h:x/d"},
        "status",
        1,
        "STATE_URL is not a",
        "sqlite:",
    ),
    "a port out of range": (
        {"STATE_URL": f"postgresql://u:{CANARY}@h:70000/d"},
        "run",
        1,
        "names port 70000",
        "1 to 65535",
    ),
    "a database of another kind": (
        {"SOURCE_URL": "mongodb://h/d"},
        "status",
        1,
        "driver 'mongodb'",
        "postgresql://USER",
    ),
    "a source that is down": ({"SOURCE_URL": DOWN}, "status", 1, "127.0.0.1:1/db", "Check that the database runs"),
    "a state that is down": ({"STATE_URL": DOWN}, "status", 1, "127.0.0.1:1/db", "Check that the database runs"),
    "Dagster's storage is down": ({"POSTGRES_URL": DOWN}, "status", 1, "EXTRACTION_POSTGRES_URL", "Bring the database"),
    "Dagster's storage is none": (
        {"POSTGRES_URL": CANARY},
        "status",
        1,
        "POSTGRES_URL is not a database",
        "postgresql:",
    ),
    "a file that is not there": (
        {"SOURCE_URL": "sqlite:////no/a.db"},
        "status",
        1,
        "no file sqlite:////no/a.db",
        "Correct",
    ),
    "a Qdrant with a password": (
        {"QDRANT_URL": f"http://u:{CANARY}@q:6333"},
        "run",
        1,
        "EXTRACTION_QDRANT_URL",
        "API_KEY",
    ),
    "a Qdrant whose port is none": ({"QDRANT_URL": "http://q:http"}, "run", 1, "QDRANT_URL is 'http://q:http'", "6333"),
    "a Qdrant that is none": (
        {"QDRANT_URL": "q:6333"},
        "run",
        1,
        "EXTRACTION_QDRANT_URL is 'q:6333'",
        "http://localhost",
    ),
    "a copy to a server that is none": ({}, "points copy --to q:6333", 2, "--to", "http://localhost:6333"),
    # tables and rows
    "a table that is not there": (
        {"SOURCE_TABLE": "insta_contents"},
        "status",
        1,
        "'insta_contents'",
        "'insta_content', per",
    ),
    "our own table": (
        {"SOURCE_TABLE": "extraction_ledger"},
        "status",
        1,
        "'extraction_ledger'",
        "Set EXTRACTION_SOURCE_TA",
    ),
    "a column that is not there": (
        {"SOURCE_URI_COLUMN": "pth"},
        "status",
        1,
        "no column 'pth'",
        "URI_COLUMN to 'path', per",
    ),
    "ids that are texts": ({"SOURCE_TABLE": "texts"}, "status", 1, "'id' is of type TEXT", "expected an integer"),
    "ids that may repeat": (
        {"SOURCE_TABLE": "loose"},
        "status",
        1,
        "'id' is not declared unique",
        "CREATE UNIQUE INDEX",
    ),
    "a mark that is a number": (
        {"SOURCE_TABLE": "numbers"},
        "status",
        1,
        "'is_extracted' is of type INT",
        "EXTRACTED_COLUMN",
    ),
    "a template without a column": (
        {"SOURCE_URI_TEMPLATE": "s3://b/x"},
        "run",
        1,
        "URI_TEMPLATE is 's3://b/x'",
        "{platform}",
    ),
    "a template of another column": ({"SOURCE_URI_TEMPLATE": "{pth}"}, "run", 1, "no column 'pth'", "'path', perhaps"),
    "a predicate that is none": (
        {"SOURCE_PREDICATE": "path ="},
        "status",
        1,
        "PREDICATE is 'path ='",
        "is_downloaded AND",
    ),
    "a predicate over no column": (
        {"SOURCE_PREDICATE": "pth IS NULL"},
        "run",
        1,
        "no column pth",
        "over the columns code",
    ),
    "a predicate that runs SQL": (
        {"SOURCE_PREDICATE": "1=1; DROP TABLE x"},
        "run",
        1,
        "no boolean expression",
        "Expected",
    ),
    "a record that is not there": (
        {},
        "show 77",
        1,
        "Record 77 of 'insta_content' is not there",
        "'extraction status'",
    ),
    "a range without rows": ({}, "launch 500-600", 1, "Range 500-600 holds no eligible row", "ids 1 to 2"),
    "a backfill without rows": ({}, "backfill 500-600 --dry-run", 1, "500-600 holds no eligible row", "ids 1 to 2"),
    "a backfill that nobody knows": ({}, "backfill --watch nobody", 1, "No backfill 'nobody'", "lists them"),
    # files and folders
    "a home that is a file": (
        {"HOME": "file", "SOURCE_URL": UP},
        "status",
        1,
        "EXTRACTION_HOME is",
        "to another folder",
    ),
    "a home that can't be made": (
        {"HOME": "/proc/x", "SOURCE_URL": UP},
        "status",
        1,
        "EXTRACTION_HOME is '/proc/x'",
        "Permit",
    ),
    "a Dagster home that is none": ({"DAGSTER": "/no/where"}, "status", 1, "DAGSTER_HOME is '/no/where'", "unset it"),
    "a checkpoint that is no file": (
        {},
        "checkpoint import none",
        1,
        "from none: there is no such file",
        "checkpoint set",
    ),
    "a checkpoint that is no JSON": (
        {},
        "checkpoint import no.json",
        1,
        "neither JSON nor a number",
        "checkpoint set ID",
    ),
    "a checkpoint table of another shape": ({}, "checkpoint import", 1, "it has: name, value", "checkpoint set ID"),
    "a picture that is not there": ({}, "search --image none.jpg", 1, "none.jpg", "file"),
    "a picture that is none": ({}, "search --image no.jpg", 1, "no.jpg", "expected a JPEG"),
    "metrics into no folder": ({}, "metrics --textfile no/a.prom", 1, "'no/a.prom'", "a folder that is there"),
    "a database file to propose from": (
        {},
        "init --propose sqlite:////no.db",
        1,
        "no file sqlite:////no.db",
        "--propose",
    ),
    "points of no file": ({}, "points import none.parquet", 1, "from 'none.parquet': No such file", "points export"),
    "points of a folder": ({}, "points import .", 2, "FILE is '.'", ".jsonl.gz"),
    "points of half a file": ({}, "points import no.parquet", 1, "no Parquet file, or cut short", "points export"),
    "points of other lines": ({}, "points import no.jsonl", 1, "says nothing of an export", "points export"),
    "points in another format": ({}, "points export points.csv", 2, "OUT is 'points.csv'", ".parquet, .jsonl"),
    "a gallery in no folder": (
        {},
        "search --image no.jpg --html no/a.html",
        1,
        "'no/a.html'",
        "another file for --html",
    ),
    "a page in a folder's place": ({}, "preview 1 --html .", 1, "'.' can't be written: Is a directory", "--html"),
    "a preview of a folder": ({}, "preview .", 1, "No preview of '.'", "it is no regular file"),
    "a preview of no record": ({}, "preview 77", 1, "record 77", "EXTRACTION_SOURCE_PREDICATE"),
    "frames in a packed file": ({}, "frames export 1-2 --to a.zip", 2, "ends in .tar", "--to"),
    "frames of no range": ({}, "frames prune 8-1", 1, "'8-1' is not a range", "1-1000"),
    "no collection to drop": ({}, "collection drop abc", 1, "no collection 'video_frames-abc'", "collection list"),
    "a collection that is none": ({}, "collection publish ../x", 1, "no collection 'video_frames'", "collection list"),
    "a record that has not failed": ({}, "retry 1 77", 1, "left as they are: 1, 77", "'extraction errors'"),
    # arguments
    "a question before a document": ({}, "collection drop abc --json", 2, "--json goes with --yes", "--yes"),
    "a checkpoint in words": ({}, "checkpoint set all", 2, "'all' is no id", "such as 12345"),
    "a storage that is none": ({}, "checkpoint reset --storage disk", 2, "'disk' is not one of", "'table'"),
    "an asset that is none": ({}, "backfill 1-2 --only frames --dry-run", 2, "frames is not an asset", "video_frames"),
    "minutes in words": ({}, "frames compact --older-than soon", 2, "--older-than", "valid number"),
    "one argument more": ({}, "status now", 2, "unexpected extra argument", "-h' for help"),
    "a range the wrong way": ({}, "launch 9-1", 1, "9-1", "FIRST-LAST"),
    "a range that is none": ({}, "launch all", 1, "all", "FIRST-LAST"),
    "an id that is none": ({}, "retry one", 2, "'one' is no id", "such as 12345"),
    "an id beyond BIGINT": ({}, f"show {2**63}", 2, str(2**63), "does not fit BIGINT"),
    "nothing to retry": ({}, "retry", 2, "give record ids", "exactly one"),
    "two ways to retry": ({}, "retry 1 --all", 2, "give record ids", "exactly one"),
    "nothing to search for": ({}, "search", 2, "--image or --text", "or --video alone"),
    "a date that is none": ({}, "search --text x --after soon", 2, "--after is 'soon'", "2026-01-31"),
    "a time that runs back": (
        {},
        "search --text x --after 2026-02-01 --before 2026-01-01",
        2,
        "--after",
        "not earlier",
    ),
    "a limit of none": ({}, "errors --limit 0", 2, "--limit", "greater than or equal to 1"),
    "force without repair": ({}, "reconcile --force", 2, "--force", "--repair"),
    "a command that is none": ({}, "start", 2, "'start'", "-h' for help"),
    "an option that is none": ({}, "run --fast", 2, "--fast", "-h' for help"),
    "a port to serve at that is none": ({}, "metrics --serve x:y", 2, "'x:y' is no address", "HOST:PORT"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_that_names_it_and_the_way_out(name, extraction, monkeypatch, tmp_path):
    settings, arguments, code, culprit, fix = MISTAKES[name]
    for key, value in settings.items():
        variable = "DAGSTER_HOME" if key == "DAGSTER" else f"EXTRACTION_{key}"
        monkeypatch.setenv(variable, value.replace("{home}", str(tmp_path / ".extraction")))
    if "in .env" in culprit:
        (tmp_path / ".env").write_text("EXTRATION_HOME=/elsewhere\n")
    ended, out, err = extraction(*arguments.split())
    said = re.sub(r"\s+", " ", out + err) if code == 2 or "doctor" in arguments else err
    assert (ended, culprit in said, fix in said) == (code, True, True), out + err
    assert "Traceback" not in out + err
    assert CANARY not in out + err
    if code == 1:
        (line,) = err.strip().splitlines()
        assert line.startswith("error: ") or arguments.startswith("retry")
        assert len(line) < 900


def test_doctor_shows_what_failed_and_goes_on(extraction, monkeypatch, tmp_path):
    monkeypatch.setenv("EXTRACTION_POSTGRES_URL", DOWN)
    monkeypatch.setenv("EXTRACTION_SOURCE_TABLE", "none")
    before = sorted(path.name for path in (tmp_path / ".extraction").iterdir())
    code, out, err = extraction("doctor")
    assert code == 1
    assert re.findall(r"^(FAILED|ok) +([\w' ]+):", out, re.MULTILINE) == [
        ("ok", "rights"),
        ("FAILED", "source table and state"),
        ("FAILED", "Dagster's instance"),
        ("ok", "decoding workers"),
        ("ok", "embedding model"),
        ("ok", "frames and vectors"),
        ("ok", "Qdrant"),
        ("ok", "notices"),
    ]
    assert "EXTRACTION_POSTGRES_URL" in out
    assert "Traceback" not in out + err
    assert CANARY not in out + err
    assert sorted(path.name for path in (tmp_path / ".extraction").iterdir()) == before
    assert not (tmp_path / "dagster.yaml").exists()
    assert "DAGSTER_HOME" not in os.environ


def test_doctor_warns_of_a_folder_for_videos_that_is_none(extraction, monkeypatch):
    monkeypatch.setenv("EXTRACTION_ALLOWED_ROOTS", ".,/no/videos")
    code, out, _ = extraction("doctor", "--json")
    assert code == 0
    assert json.loads(out)["warnings"][-1:] == ["EXTRACTION_ALLOWED_ROOTS names '/no/videos', which is no folder"]


def test_a_healthy_doctor_makes_nothing_and_tells_what_init_will_make(extraction, tmp_path):
    before = sorted(path.name for path in (tmp_path / ".extraction").iterdir())
    code, out, _ = extraction("doctor")
    assert (code, "FAILED" in out) == (0, False)
    assert "the state tables (version none yet) are made or migrated by 'extraction init'" in out
    assert "its storage is made by 'extraction init'" in out
    assert "EXTRACTION_ALLOWED_ROOTS" not in out
    assert sorted(path.name for path in (tmp_path / ".extraction").iterdir()) == before
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        assert not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'extraction_ledger'").fetchall()
    connection.close()
