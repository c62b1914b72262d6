"""How `extraction reconcile` takes its turns at the embedded store, and where points may be copied to."""

import json
import shutil
from unittest.mock import ANY

import numpy as np
import pytest
import sqlalchemy as sa
import typer
from typer.testing import CliRunner

from extraction_dagster.cli.collection import _aimed_at, _opener
from extraction_dagster.cli.main import app
from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.index import ForeignCollectionError, StoreBusyError
from extraction_dagster.records import EmbeddingBatch, IdRange, VideoRow
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.identity import source_identity
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint, load_model
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import replace_records

SPEC = CollectionSpec("video_frames", dim=8, fingerprint="abc123")


def test_a_held_store_is_said_at_once_but_waited_for_once_it_has_begun(settings, monkeypatch):
    open_store, holder = _opener(settings()), EdgeStore(settings().home / "qdrant")
    holder.ensure_collection(SPEC)
    with open_store() as store, pytest.raises(StoreBusyError, match="are held by process"):
        store.open_collection("video_frames")
    monkeypatch.setattr("extraction_dagster.stages.index.edge.collection_folder.time.sleep", lambda _: holder.close())
    with open_store() as store:
        assert store.open_collection("video_frames") == SPEC


def test_what_waits_ends_with_0_what_is_held_back_with_1_and_force_goes_with_repair(
    settings, monkeypatch, sqlite_database
):
    sqlite_database.create(ids=(1, 2))
    monkeypatch.setenv("EXTRACTION_HOME", str(settings().home))
    monkeypatch.setenv("EXTRACTION_SOURCE_URL", sqlite_database.url)
    with open_catalog(load_settings()) as catalog:
        catalog.ledger.write([{"record_id": key, "state": "done", "num_points": 0} for key in (1, 2, 3)])

    def reconcile(*options):
        done = CliRunner().invoke(app, ["reconcile", *options])
        return done.exit_code, " ".join(done.output.split())

    assert reconcile("--force") == (2, ANY)
    code, said = reconcile("--repair")
    assert (code, "1 records wait, the first of them since" in said) == (0, True)
    monkeypatch.setenv("EXTRACTION_PURGE_AFTER_SECONDS", "0")
    monkeypatch.setenv("EXTRACTION_PURGE_SHARE", "0")
    code, said = reconcile("--repair")
    assert (code, "1 records are held back: 1 of 3 known records are gone" in said) == (1, True)
    assert (
        json.loads(CliRunner().invoke(app, ["reconcile", "--repair", "--json"]).stdout)["gone_held_back_records"] == 1
    )
    assert reconcile("--repair", "--force")[0] == 0
    with open_catalog(load_settings()) as catalog:
        assert list(catalog.ledger.entries(IdRange(1, 9))) == [1, 2]


@pytest.mark.parametrize(
    "command",
    [
        ["reconcile", "--repair"],
        ["collection", "list"],
        ["collection", "publish", "--force"],
        ["collection", "drop", "0123456789abcdef", "--yes"],
        ["points", "export", "out.parquet"],
        ["points", "copy", "--to", "http://127.0.0.1:1"],
    ],
)
def test_every_command_refuses_the_collection_of_another_source_table(settings, monkeypatch, sqlite_database, command):
    sqlite_database.create(ids=(1,))
    monkeypatch.setenv("EXTRACTION_HOME", str(settings().home))
    monkeypatch.setenv("EXTRACTION_SOURCE_URL", sqlite_database.url)
    of_today = CollectionSpec("video_frames", 8, embedding_fingerprint(load_settings()))
    with EdgeStore(settings().home / "qdrant", source="another") as store:
        store.ensure_collection(of_today)
        store.ensure_collection(CollectionSpec("video_frames", 8, "0123456789abcdef"), staged=True)
    with pytest.raises(
        ForeignCollectionError, match=r"'video_frames' in EdgeStore.* holds points of another source table"
    ):
        CliRunner().invoke(app, command, catch_exceptions=False)
    with EdgeStore(settings().home / "qdrant") as store:
        assert store.collections("video_frames") == {of_today.fingerprint: True, "0123456789abcdef": False}


@pytest.fixture
def filled(settings, monkeypatch, sqlite_database):
    """A source table and a collection of three points; `filled(name)` takes another data folder."""
    sqlite_database.create(ids=(1, 2))
    monkeypatch.setenv("EXTRACTION_SOURCE_URL", sqlite_database.url)

    def at(name):
        monkeypatch.setenv("EXTRACTION_HOME", str(settings().home / name))
        return load_settings()

    chosen = at("first")
    with EdgeStore(chosen.home / "qdrant", source=source_identity(chosen)) as store:
        store.ensure_collection(spec_of(chosen))
        fill(store, {1: "a", 2: "b"})
    return at


def spec_of(settings, dim=8):
    return CollectionSpec("video_frames", dim, embedding_fingerprint(settings))


def fill(store, generations):
    frames = [(key, number) for key in generations for number in {1: (0, 1), 2: (2,)}[key]]
    ids, numbers = np.array(frames).T
    replace_records(
        store,
        EmbeddingBatch(np.eye(8, dtype=np.float16)[numbers], ids, numbers, numbers / 30),
        rows={key: VideoRow(key, f"{key}.mp4", "tube") for key in generations},
        generations=generations,
    )


def extraction(*words):
    """What a command says as JSON, its exit code, and what it says on stderr."""
    done = CliRunner().invoke(app, [*words, "--json"])
    if isinstance(done.exception, ExtractionError):
        return {"error": str(done.exception)}, 1, ""
    return json.loads(done.stdout), done.exit_code, done.stderr


def test_points_go_into_a_file_and_back_and_what_is_newer_stays(filled):
    written, code, _ = extraction("points", "export", "points.jsonl.gz")
    of_today = embedding_fingerprint(filled("first"))
    assert (written, code) == ({"file": "points.jsonl.gz", "points": 3, "dim": 8, "fingerprint": of_today}, 0)
    there = {"file": "points.jsonl.gz", "collection": f"video_frames-{of_today}"}
    done = {**there, "written": 0, "unchanged": 3, "refused": 0, "refused_records": []}
    assert extraction("points", "import", "points.jsonl.gz")[:2] == (done, 0)
    settings = filled("second")
    with EdgeStore(settings.home / "qdrant", source=source_identity(settings)) as store:
        store.ensure_collection(spec_of(settings))
        fill(store, {2: "of-today"})
    said, code, told = extraction("points", "import", "points.jsonl.gz")
    assert (said, code) == ({**there, "written": 2, "unchanged": 0, "refused": 1, "refused_records": [2]}, 1)
    assert "Refused: the collection has records 2 from another version or other settings" in told


def test_a_folder_without_a_collection_gets_one_of_the_settings_model_or_none(filled):
    extraction("points", "export", "small.parquet")
    settings = filled("second")
    said, code, _ = extraction("points", "import", "small.parquet")
    assert code == 1
    assert (
        f"its vectors are of dim 8, fingerprint {embedding_fingerprint(settings)}, and those of collection"
        in said["error"]
    )
    assert not (settings.home / "qdrant").exists()
    dim = load_model(settings, may_compile=False).dim
    third = filled("third")
    with EdgeStore(third.home / "qdrant", source=source_identity(third)) as store:
        store.ensure_collection(spec_of(third, dim))
        vectors = np.zeros((1, dim), np.float16)
        vectors[0, 0] = 1
        batch = EmbeddingBatch(vectors, np.array([1]), np.array([0]), np.array([0.0]))
        replace_records(store, batch, rows={1: VideoRow(1, "1.mp4")}, generations={1: "a"})
    extraction("points", "export", "points.parquet")
    filled("second")
    said, code, _ = extraction("points", "import", "points.parquet")
    assert (said, code) == ({**said, "written": 1, "unchanged": 0, "refused": 0}, 0)
    said, code, _ = extraction("points", "import", "points.parquet")
    assert (said, code) == ({**said, "written": 0, "unchanged": 1, "refused": 0}, 0)


def test_points_of_another_table_are_refused_and_those_of_a_moved_one_are_not(filled, monkeypatch, tmp_path):
    extraction("points", "export", "points.parquet")
    settings = filled("first")
    with open_catalog(settings):
        pass  # makes the state tables, which move too
    moved = f"sqlite:///{tmp_path / 'moved.db'}"
    shutil.copy(sa.make_url(settings.resolved_source_url).database, tmp_path / "moved.db")
    monkeypatch.setenv("EXTRACTION_SOURCE_URL", moved)
    monkeypatch.setenv("EXTRACTION_COLLECTION_NAME", "others")
    settings = load_settings()
    said, code, _ = extraction("points", "import", "points.parquet")
    assert code == 1
    assert "its points are of another source table, or of this one at another address" in said["error"]
    assert "'extraction init --take-over'" in said["error"]
    assert not (settings.home / "qdrant" / "others").exists()
    monkeypatch.setenv("EXTRACTION_COLLECTION_NAME", "video_frames")
    CliRunner().invoke(app, ["init", "--take-over"], catch_exceptions=False)
    said, code, _ = extraction("points", "import", "points.parquet")
    assert (said, code) == ({**said, "written": 0, "unchanged": 3}, 0)


def test_an_import_never_takes_over_the_collection_of_another_table(filled):
    extraction("points", "export", "points.parquet")
    settings = filled("second")
    with EdgeStore(settings.home / "qdrant", source="another") as store:
        store.ensure_collection(spec_of(settings))
    said, code, _ = extraction("points", "import", "points.parquet")
    assert code == 1
    assert "'video_frames' in EdgeStore" in said["error"]
    assert "holds points of another source table" in said["error"]
    with EdgeStore(settings.home / "qdrant") as store:
        assert store.open_collection("video_frames").source == "another"
        assert store.count() == 0


def test_another_format_is_refused_by_both_commands():
    for command in ("export", "import"):
        done = CliRunner().invoke(app, ["points", command, "points.csv"], env={"COLUMNS": "200"})
        assert done.exit_code == 2
        assert "'points.csv', expected a name that ends in .parquet, .jsonl, .jsonl.gz" in done.output


def test_the_target_keeps_every_other_setting(settings):
    here = settings(collection_name="clips", qdrant_api_key="k", allowed_roots="/a,/b")
    there = _aimed_at(here, "https://q:6333", 7000)
    assert (there.qdrant_url, there.qdrant_grpc_port) == ("https://q:6333", 7000)
    assert (there.collection_name, there.home, there.allowed_roots) == ("clips", here.home, ("/a", "/b"))
    assert there.qdrant_api_key.get_secret_value() == "k"


def test_no_key_is_sent_unencrypted_to_another_server(settings):
    with pytest.raises(
        typer.BadParameter, match="--to expects qdrant_url must be https where there is a qdrant_api_key"
    ):
        _aimed_at(settings(qdrant_api_key="k"), "http://q:6333", None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://u:p@q:6333", "--to expects an address without user"),
        ("q", "--to expects an address such as"),
        ("http://here:6333", "--to is the server that the settings name already"),
    ],
)
def test_a_target_that_can_not_be_is_refused(settings, url, message):
    with pytest.raises(typer.BadParameter, match=message):
        _aimed_at(settings(qdrant_url="http://here:6333"), url, None)
