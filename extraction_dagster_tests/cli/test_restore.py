"""The restore drills of docs/deploy.md: what each documented command rebuilds, and out of what."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from extraction_dagster.cli.main import app

# Loading the definitions: Dagster looks at a resource's fields as it did with an older pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:The `__fields__` attribute is deprecated")
DONE = [(1, "done", 3), (2, "done", 3), (3, "done", 3)]


def extraction(*arguments, code=0):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout


class Site:
    """Three videos that are done; each drill takes a part away and brings it back."""

    def __init__(self, folder, videos):
        self.home = folder / ".extraction"
        self.videos = videos

    def sql(self, statement):
        with closing(sqlite3.connect(self.home / "source.db")) as connection, connection:
            return connection.execute(statement).fetchall()

    def shards(self, kind):
        return {path: path.stat().st_mtime_ns for path in (self.home / kind).rglob("*.parquet")}

    def lose(self, *folders):
        for folder in folders:
            shutil.rmtree(self.home / folder)

    def is_whole(self):
        """Nothing lost, nothing twice: the ledger, the collection and the table agree."""
        assert self.sql("SELECT record_id, state, num_frames FROM extraction_ledger ORDER BY record_id") == DONE
        assert self.sql("SELECT sum(is_extracted), sum(is_embedded) FROM insta_content") == [(3, 3)]
        assert "The collection agrees with the table: 3 records, 9 points." in extraction("reconcile")


@pytest.fixture(scope="module")
def processed(tmp_path_factory, small_clips):
    folder = tmp_path_factory.mktemp("site")
    site = Site(folder, small_clips)
    site.home.mkdir(mode=0o700)
    site.sql(
        "CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, is_extracted BOOLEAN NOT NULL "
        "DEFAULT 0, is_embedded BOOLEAN NOT NULL DEFAULT 0)"
    )
    for name in "abc":
        site.sql(f"INSERT INTO insta_content (path) VALUES ('{small_clips}/{name}.mp4')")
    shutil.copy(Path(__file__).parents[2] / "dagster.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        enter(site, patch)
        extraction("run")
    return site


def enter(site, patch):
    patch.chdir(site.home.parent)
    patch.setenv("DAGSTER_HOME", str(site.home.parent))
    patch.setenv("EXTRACTION_ALLOWED_ROOTS", str(site.videos))


@pytest.fixture
def site(processed, monkeypatch):
    enter(processed, monkeypatch)
    return processed


@pytest.fixture
def without_videos(monkeypatch):
    monkeypatch.setenv("EXTRACTION_ALLOWED_ROOTS", "/nowhere")


@pytest.mark.usefixtures("without_videos")
def test_a_lost_index_is_written_again_from_stored_vectors(site):
    vectors = site.shards("embeddings")
    site.lose("qdrant")
    assert "9 points lost (3 records)" in extraction("reconcile", "--repair", code=1)
    extraction("run")
    site.is_whole()
    assert site.shards("embeddings") == vectors


@pytest.mark.usefixtures("without_videos")
def test_a_lost_cursor_is_derived_from_the_rows_and_nothing_is_done_again(site):
    stored = site.shards("frames"), site.shards("embeddings")
    site.lose("dagster")
    assert "Processed 0 records; no row is due." in extraction("run")
    assert '"last_processed_id": 3' in extraction("checkpoint", "show", "--json")
    site.is_whole()
    assert (site.shards("frames"), site.shards("embeddings")) == stored


@pytest.mark.usefixtures("without_videos")
def test_a_lost_state_is_rebuilt_from_what_is_stored(site):
    for (table,) in site.sql("SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'extraction_%'"):
        site.sql(f"DROP TABLE {table}")
    extraction("init")
    extraction("checkpoint", "set", "0", "--reprocess")
    extraction("run")
    site.is_whole()


def test_lost_frames_and_vectors_are_made_from_the_videos_again(site):
    site.lose("frames", "embeddings")
    extraction("checkpoint", "set", "0", "--reprocess")
    extraction("run")
    site.is_whole()
    assert site.shards("frames")
    assert site.shards("embeddings")
