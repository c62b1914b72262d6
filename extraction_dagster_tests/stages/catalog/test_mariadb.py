"""MariaDB (and MySQL, whose language is the same here) as a source that is only read; the state lies elsewhere."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.errors.catalog import MarksRefusedError, SourceTableError, StateError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints
from extraction_dagster.stages.catalog.pending import scan

TODAY, ALL = Fingerprints("f1", "e1"), IdRange(-9, 99)
PROGRAMS = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
pytestmark = pytest.mark.servers
COLUMNS = (
    "id BIGINT PRIMARY KEY, path TEXT, platform VARCHAR(20), code VARCHAR(20), is_extracted TINYINT(1),"
    " is_embedded TINYINT(1), updated_at DATETIME(6), mood ENUM('ready', 'gone'), document JSON"
)


@pytest.fixture(scope="module")
def server():
    """A MariaDB on a socket of its own; yields the socket."""
    install, program = (shutil.which(name, path=PROGRAMS) for name in ("mariadb-install-db", "mariadbd"))
    if install is None or program is None:
        pytest.skip("mariadb-server is not installed")
    folder = Path(tempfile.mkdtemp(prefix="maria"))
    user = "mysql" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    if os.geteuid() == 0:
        shutil.chown(folder, user)
    common = ["--no-defaults", f"--datadir={folder}/data", f"--user={user}"]
    subprocess.run(
        [install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    options = [f"--socket={folder}/s", "--skip-networking", f"--pid-file={folder}/pid", "--innodb-buffer-pool-size=32M"]
    with subprocess.Popen([program, *common, *options], stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not (folder / "s").exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        yield f"{folder}/s"
        process.terminate()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def source(server):
    """A database of the test's own with three rows: `source(sql)` runs a statement in it; `source.url` leads there."""
    engine = sa.create_engine(
        f"mysql+pymysql://root@localhost/mysql?unix_socket={server}", isolation_level="AUTOCOMMIT"
    )

    def run(statement):
        with engine.connect() as connection:
            connection.execute(sa.text("USE videos"))
            return connection.execute(sa.text(statement))

    with engine.connect() as connection:
        connection.execute(sa.text("CREATE DATABASE videos CHARACTER SET utf8mb4"))
    run.url = f"mysql+pymysql://root@localhost/videos?unix_socket={server}"
    run(f"CREATE TABLE insta_content ({COLUMNS})")
    run(
        "INSERT INTO insta_content (id, path, code, is_extracted, is_embedded, updated_at, mood, document) VALUES"
        " (-5, 'a.mp4', 'ü', 0, 0, '2026-01-02 03:04:05.000006', 'ready', '{\"a\": 1}'),"
        " (1, 'b.mp4', 'b', 1, 1, '2026-01-02', 'gone', NULL), (7, 'c.mp4', NULL, NULL, NULL, NULL, NULL, NULL)"
    )
    yield run
    with engine.connect() as connection:
        connection.execute(sa.text("DROP DATABASE videos"))
    engine.dispose()


@pytest.fixture
def make_catalog(source, settings, tmp_path):
    made = []

    def make(**options):
        elsewhere = {"state_url": f"sqlite:///{tmp_path}/state.db", "source_read_only": True, **options}
        made.append(Catalog(settings(source_url=SecretStr(source.url), **elsewhere)))
        return made[-1]

    yield make
    for catalog in made:
        catalog.close()


def test_rows_are_read_and_done_without_a_write_to_the_source(source, make_catalog):
    options = {"source_version_column": "updated_at", "source_payload_columns": ("mood", "document")}
    catalog = make_catalog(**options)
    rows = {row.video.record_id: row.video for row in catalog.source.rows(ALL)}
    assert list(rows) == [-5, 1, 7]
    assert (rows[-5].code, rows[-5].payload) == ("ü", {"mood": "ready", "document": '{"a": 1}'}) or rows[
        -5
    ].payload == {"mood": "ready", "document": {"a": 1}}
    assert rows[-5].content_version.startswith("2026-01-02 03:04:05")
    assert scan(catalog, after_id=None, up_to_id=None, budget=100).pending_ids == [-5, 1, 7]
    plan = catalog.begin(ALL, TODAY)
    assert catalog.mark_done(plan, dict.fromkeys(plan, 3), TODAY) == {-5, 1, 7}
    assert catalog.status()["done"] == 3
    source("UPDATE insta_content SET updated_at = NOW(6) WHERE id = 7")
    assert scan(catalog, after_id=None, up_to_id=None, budget=100).pending_ids == [7]
    assert source("SELECT COUNT(*) FROM insta_content WHERE is_embedded = 1").scalar() == 1


def test_predicates_hold_and_a_small_number_is_a_boolean(make_catalog):
    for predicate, ids in {
        "is_extracted": [1],
        "NOT is_extracted": [-5, 7],
        "mood = 'ready'": [-5],
        "path LIKE '%.mp4' AND id BETWEEN -5 AND 1": [-5, 1],
        "platform IS NULL": [-5, 1, 7],
    }.items():
        catalog = make_catalog(source_predicate=predicate)
        assert [row.video.record_id for row in catalog.source.rows(ALL)] == ids, predicate


def test_marks_may_be_written_where_that_is_wanted(source, make_catalog):
    catalog = make_catalog(source_read_only=False)
    plan = catalog.begin(ALL, TODAY)
    assert catalog.mark_extracted(plan, {-5: 3}, "f1") == {-5}
    assert catalog.mark_done(plan, {-5: 3}, TODAY) == {-5}
    assert source("SELECT is_extracted + is_embedded FROM insta_content WHERE id = -5").scalar() == 2
    source("CREATE TRIGGER keep BEFORE UPDATE ON insta_content FOR EACH ROW SET NEW.is_extracted = OLD.is_extracted")
    with pytest.raises(MarksRefusedError, match="'is_extracted' of records 7"):
        catalog.source.rehearse(7)


def test_the_state_is_kept_elsewhere(source, settings):
    with pytest.raises(
        StateError, match=r"can't keep them. Set EXTRACTION_STATE_URL to a PostgreSQL or SQLite database"
    ):
        Catalog(settings(source_url=SecretStr(source.url)))


def test_a_table_that_is_not_there_is_told_with_those_that_are(make_catalog):
    with pytest.raises(SourceTableError, match=r"'insta_content', perhaps \(there: insta_content\)"):
        make_catalog(source_table="insta_contents")
