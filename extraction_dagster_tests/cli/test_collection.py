"""How `extraction reconcile` takes its turns at the embedded store, and where points may be copied to."""

import pytest
import typer

from extraction_dagster.cli.collection import _aimed_at, _opener
from extraction_dagster.errors.index import StoreBusyError
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
