"""`extraction metrics`, as a user and as a machine calls it."""

import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic
from typer.testing import CliRunner

from extraction_dagster.cli import operations
from extraction_dagster.cli.main import app
from extraction_dagster.errors.runs import MetricsFileError
from extraction_dagster.settings import load_settings

EXTRACTION = Path(sys.executable).parent / "extraction"
SECRET = "hunter2-canary"  # noqa: S105 - it must not be seen anywhere


@pytest.fixture
def table(tmp_path):
    (tmp_path / ".extraction").mkdir(mode=0o700)
    connection = sqlite3.connect(tmp_path / ".extraction" / "source.db")
    marks = "is_extracted BOOLEAN, is_embedded BOOLEAN"
    connection.execute(f"CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, {marks})")
    connection.executemany("INSERT INTO insta_content (id, path) VALUES (?, 'x.mp4')", [(n,) for n in range(1, 7)])
    connection.commit()
    connection.close()


def extraction(*arguments, code=0):
    done = CliRunner().invoke(app, ["metrics", *arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def values(text, parse=parse_openmetrics):
    return {(sample.name, *sample.labels.values()): sample.value for family in parse(text) for sample in family.samples}


@pytest.mark.usefixtures("table")
def test_they_are_printed_as_openmetrics_and_nothing_else_is():
    shown = values(extraction().stdout)
    assert shown["extraction_up",] == 1
    assert shown["extraction_lag_rows",] == 6
    assert shown["extraction_rows", "pending"] == 6
    assert shown["extraction_collection_points",] == 0
    assert ("extraction_watermark_id",) not in shown


@pytest.mark.usefixtures("table")
def test_doctor_says_how_changed_versions_are_found_and_which_index_helps(tmp_path, monkeypatch):
    told = "insta_content, 6 eligible rows; "
    assert operations._catalog(load_settings()).startswith(f"{told}there is no version column")
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        connection.execute("ALTER TABLE insta_content ADD COLUMN updated_at TIMESTAMP")
    monkeypatch.setenv("EXTRACTION_SOURCE_VERSION_COLUMN", "updated_at")
    shown, statement, _ = operations._catalog(load_settings()).split("\n  ")
    assert shown.startswith(f"{told}no index begins with updated_at")
    assert statement == "CREATE INDEX extraction_versions_insta_content ON insta_content (updated_at, id);"
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        connection.execute(statement)
    shown, state = operations._catalog(load_settings()).split("\n  ")
    assert shown == f"{told}a changed updated_at is found at once, through the index extraction_versions_insta_content"
    assert state == "the state tables (version none yet) are made or migrated by 'extraction init'"


def test_the_settings_that_init_proposes_for_a_database_are_enough_to_prepare_it(database, tmp_path, monkeypatch):
    database.create(ids=(1, 2, 3))
    for sql in (
        "CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT)",
        "CREATE TABLE old_links (code TEXT PRIMARY KEY, url TEXT)",
        "CREATE TABLE extraction_ours (id INTEGER PRIMARY KEY, path TEXT, platform TEXT, code TEXT, version TEXT)",
    ):
        database.execute(sql)
    done = CliRunner().invoke(app, ["init", "--propose", database.url])
    assert (done.exit_code, done.stderr) == (
        0,
        "Likeliest table: insta_content (an integer key and 'path')\n",
    )
    assert done.stdout.splitlines() == [
        f"EXTRACTION_SOURCE_URL={database.url}",
        "EXTRACTION_SOURCE_TABLE=insta_content",
        "EXTRACTION_SOURCE_ID_COLUMN=id",
        "EXTRACTION_SOURCE_URI_COLUMN=path",
        "EXTRACTION_SOURCE_PLATFORM_COLUMN=platform",
        "EXTRACTION_SOURCE_CODE_COLUMN=code",
        "EXTRACTION_SOURCE_EXTRACTED_COLUMN=is_extracted",
        "EXTRACTION_SOURCE_EMBEDDED_COLUMN=is_embedded",
        "EXTRACTION_SOURCE_VERSION_COLUMN=updated_at",
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".db") == []  # it only looked
    (tmp_path / ".env").write_text(done.stdout)
    monkeypatch.setenv("DAGSTER_HOME", "")
    made = CliRunner().invoke(app, ["init"])
    assert made.exit_code == 0, (made.output, made.exception)
    assert "Source table 'insta_content' can be used: 3 eligible rows" in made.stdout


@pytest.mark.usefixtures("table")
def test_a_file_is_replaced_at_once_and_may_be_read_by_others(tmp_path):
    before = os.umask(0o077)
    try:
        assert extraction("--textfile", "extraction.prom").stdout == ""
    finally:
        os.umask(before)
    file = tmp_path / "extraction.prom"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert values(file.read_text(), parse_classic)["extraction_up",] == 1
    inode = file.stat().st_ino
    extraction("--textfile", str(file))
    assert file.stat().st_ino != inode
    assert sorted(path.name for path in tmp_path.iterdir()) == [".extraction", "extraction.prom"]


@pytest.mark.usefixtures("table")
def test_a_file_that_the_collector_would_not_read_is_mentioned(tmp_path):
    assert "out.txt does not end in .prom" in extraction("--textfile", "out.txt").stderr
    assert (tmp_path / "out.txt").exists()


@pytest.mark.usefixtures("table")
def test_a_folder_that_is_not_there_is_named():
    error = extraction("--textfile", "no/where.prom", code=1).exception
    assert isinstance(error, MetricsFileError)
    assert "Metrics can't be written to 'no/where.prom': No such file or directory" in str(error)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--serve", "x"], "'x' is no address"),
        (["--serve", "70000"], "'70000' is no address"),
        (["--serve", "localhost:"], "'localhost:' is no address"),
        (["--serve", "1", "--textfile", "a.prom"], "not both"),
    ],
)
def test_wrong_usage_is_said(arguments, said):
    assert said in extraction(*arguments, code=2).stderr


def test_without_a_table_they_are_written_all_the_same_and_say_that_it_is_down(tmp_path):
    done = extraction("--textfile", "extraction.prom")
    shown = values((tmp_path / "extraction.prom").read_text(), parse_classic)
    assert (shown["extraction_up",], shown["extraction_part_up", "table"]) == (0, 0)
    assert "part 'table' can't be read: Source table 'insta_content' can't be used" in done.stderr


def test_no_password_is_ever_shown(monkeypatch):
    url = f"postgresql://operator:{SECRET}@127.0.0.1:1/videos"
    for name in ("SOURCE_URL", "POSTGRES_URL", "STATE_URL"):
        monkeypatch.setenv(f"EXTRACTION_{name}", url)
    monkeypatch.setenv("EXTRACTION_QDRANT_API_KEY", SECRET)
    done = extraction()
    assert values(done.stdout)["extraction_up",] == 0
    assert "can't be read" in done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("table")
def test_they_are_served_while_the_table_goes_and_comes_back(tmp_path, commands):
    environment = {**os.environ, "NO_COLOR": "1", "EXTRACTION_QDRANT_API_KEY": SECRET}
    command = [EXTRACTION, "metrics", "--serve", "0"]
    server = commands.start(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        address = re.search(r"Serving (http://127\.0\.0\.1:\d+/metrics)", server.stderr.readline())[1]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def scrape():
            with opener.open(address, timeout=60) as response:
                return values(response.read().decode(), parse_classic)

        def until(wanted):
            for _ in range(240):
                if (shown := scrape())["extraction_up",] == wanted:
                    return shown
                time.sleep(0.5)
            return pytest.fail(f"never {wanted}: {shown}")

        assert until(1)["extraction_lag_rows",] == 6
        source, away = tmp_path / ".extraction/source.db", tmp_path / "away.db"
        source.rename(away)
        assert until(0)["extraction_part_up", "table"] == 0
        away.rename(source)
        assert until(1)["extraction_rows", "pending"] == 6
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 130
        said = server.stderr.read()
        assert said.endswith("Stopped serving.\n")
        assert "Traceback" not in said
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
