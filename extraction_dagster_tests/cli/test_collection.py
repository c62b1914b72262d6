"""How `extraction reconcile` takes its turns at the embedded store, and where points may be copied to."""

import json
from unittest.mock import ANY

import pytest
import typer
from typer.testing import CliRunner

from extraction_dagster.cli.collection import _aimed_at, _opener
from extraction_dagster.cli.main import app
from extraction_dagster.errors.index import ForeignCollectionError, StoreBusyError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.protocol import CollectionSpec

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


def test_the_target_keeps_every_other_setting(settings):
    here = settings(collection_name="clips", qdrant_api_key="k", allowed_roots="/a,/b")
    there = _aimed_at(here, "http://q:6333", 7000)
    assert (there.qdrant_url, there.qdrant_grpc_port) == ("http://q:6333", 7000)
    assert (there.collection_name, there.home, there.allowed_roots) == ("clips", here.home, ("/a", "/b"))
    assert there.qdrant_api_key.get_secret_value() == "k"


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
