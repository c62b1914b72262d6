"""`extraction frames`: what a person sees."""

import os
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from extraction_dagster.cli.main import app
from extraction_dagster.errors.decode import OtherSourceError
from extraction_dagster.ranges.work import fingerprints_of
from extraction_dagster.records import EncodedFrames, IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.database import make_engine, writing
from extraction_dagster.stages.decode.fingerprint import frames_fingerprint
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint


@pytest.fixture
def stored():
    settings = load_settings()
    store = FrameStore(settings.resolved_frames_uri, frames_fingerprint(settings))
    zero = np.zeros(1)
    frames = EncodedFrames(3, "", [b"jpeg"], zero, zero, np.zeros(1, np.int64), 8, 8)
    return store.write_shard(IdRange(1, 10), [frames])


@pytest.mark.usefixtures("stored")
def test_export_says_what_it_wrote(tmp_path):
    done = CliRunner().invoke(app, ["frames", "export", "1-5", "--to", "out"])
    assert (done.exit_code, done.output) == (0, "Wrote 1 frames of 1 videos to out\n")
    assert (tmp_path / "out" / "3" / "00000000.jpg").read_bytes() == b"jpeg"


def test_a_packed_tar_is_wrong_usage(tmp_path):
    done = CliRunner().invoke(app, ["frames", "export", "1-5", "--to", "out.tar.gz"])
    assert done.exit_code == 2
    assert "a name that ends in .tar, not .gz" in done.output
    assert list(tmp_path.iterdir()) == []


def test_prune_leaves_everything_unless_the_settings_say_otherwise(stored):
    done = CliRunner().invoke(app, ["frames", "prune"])
    assert (done.exit_code, done.output.partition(":")[0]) == (0, "EXTRACTION_KEEP_FRAMES is 'all'")
    assert stored.path


@pytest.fixture
def trickled():
    """Five shards of one record each, all done; a sixth whose record is under way."""
    settings = load_settings()
    store = FrameStore(settings.resolved_frames_uri, frames_fingerprint(settings))
    zero = np.zeros(1)
    for number in range(1, 7):
        frames = EncodedFrames(number, "", [b"jpeg"], zero, zero, np.zeros(1, np.int64), 8, 8)
        store.write_shard(IdRange(1, 10), [frames])
    engine = make_engine(settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform TEXT, code TEXT, path TEXT, "
            "is_extracted BOOLEAN, is_embedded BOOLEAN)"
        )
    engine.dispose()
    with open_catalog(settings) as catalog, writing(catalog.state_engine, what="write the ledger") as connection:
        catalog.ledger.upsert(
            connection,
            [
                {"record_id": number, "state": "done" if number < 6 else "extracted", "content_version": ""}
                for number in range(1, 7)
            ],
        )
    return store


def test_compact_merges_what_is_done_and_old_enough(trickled):
    young = CliRunner().invoke(app, ["frames", "compact"])
    assert (young.exit_code, young.output) == (0, "0 frame shards became 0\n0 embedding shards became 0\n")
    done = CliRunner().invoke(app, ["frames", "compact", "1-10", "--older-than", "0"])
    assert (done.exit_code, done.output) == (0, "5 frame shards became 1\n0 embedding shards became 0\n")
    assert [[record.record_id for record in shard.records] for shard in trickled.shards(IdRange(1, 10))] == [
        [1, 2, 3, 4, 5],
        [6],
    ]


def test_compact_removes_what_killed_writers_left_behind(trickled, tmp_path):
    embeddings = tmp_path / ".extraction" / "embeddings"
    settings = load_settings()
    folder = embeddings / f"{trickled.fingerprint}-{embedding_fingerprint(settings)}" / "1-10"
    folder.mkdir(parents=True)
    old = folder / ".tmp-0a1b-20260102T030405000006Z-0a.parquet"
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    done = CliRunner().invoke(app, ["frames", "compact"])
    assert (done.exit_code, list(folder.iterdir())) == (0, [])


def test_compact_leaves_ranges_alone_that_reach_beyond_the_named_one(trickled):
    done = CliRunner().invoke(app, ["frames", "compact", "1-9", "--older-than", "0"])
    assert done.output.startswith("0 frame shards became 0")
    assert len(trickled.shards(IdRange(1, 10))) == 6


@pytest.mark.usefixtures("trickled")
@pytest.mark.parametrize(
    "command",
    [["export", "1-10", "--to", "out"], ["prune"], ["compact", "--older-than", "0"]],
)
def test_frames_of_another_source_are_refused_in_one_line_and_stay(tmp_path, monkeypatch, command):
    assert CliRunner().invoke(app, ["frames", "compact"]).exit_code == 0  # the first user
    before = sorted(tmp_path.rglob("*.parquet"))
    monkeypatch.setenv("EXTRACTION_KEEP_FRAMES", "none")
    monkeypatch.setenv("EXTRACTION_STATE_URL", f"sqlite:///{tmp_path}/state.db")
    engine = make_engine(load_settings().resolved_source_url, setting="EXTRACTION_SOURCE_URL")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE other (id INTEGER PRIMARY KEY, platform TEXT, code TEXT, path TEXT, "
            "is_extracted BOOLEAN, is_embedded BOOLEAN)"
        )
    engine.dispose()
    monkeypatch.setenv("EXTRACTION_SOURCE_TABLE", "other")
    monkeypatch.setenv("EXTRACTION_SOURCE_ID_COLUMN", "id")
    done = CliRunner().invoke(app, ["frames", *command])
    assert isinstance(done.exception, OtherSourceError)
    assert "belong to table 'insta_content'" in str(done.exception)
    assert sorted(tmp_path.rglob("*.parquet")) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("trickled")
def test_prune_removes_what_former_settings_left_in_every_range(monkeypatch):
    settings, made_with = load_settings(), fingerprints_of(load_settings())
    former = FrameStore(settings.resolved_frames_uri, "former")
    zero = np.zeros(1)
    for number, partition in ((1, IdRange(1, 1)), (2, IdRange(2, 5)), (6, IdRange(6, 7))):
        frames = EncodedFrames(number, "", [b"jpeg"], zero, zero, np.zeros(1, np.int64), 8, 8)
        former.write_shard(partition, [frames])
    today = {"frames_fingerprint": made_with.frames, "embedding_fingerprint": made_with.embedding}
    with open_catalog(settings) as catalog, writing(catalog.state_engine, what="write the ledger") as connection:
        catalog.ledger.upsert(connection, [{"record_id": key, "state": "done", **today} for key in (1, 2)])
    monkeypatch.setenv("EXTRACTION_KEEP_FRAMES", "none")
    done = CliRunner().invoke(app, ["frames", "prune"])
    assert (done.exit_code, done.output.splitlines()[1].rpartition(",")[0]) == (
        0,
        "Removed 2 shards of former settings",
    )
    assert former.partitions() == [IdRange(6, 7)]
