"""How `extraction reconcile` takes its turns at the embedded store."""

import pytest

from extraction_dagster.cli.reconcile import _opener
from extraction_dagster.errors.index import StoreBusyError
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.protocol import CollectionSpec

SPEC = CollectionSpec("video_frames", dim=8, fingerprint="abc123")


def test_a_held_store_is_said_at_once_but_waited_for_once_it_has_begun(settings, monkeypatch):
    open_store, holder = _opener(settings()), EdgeStore(settings().home / "qdrant")
    holder.ensure_collection(SPEC)
    with open_store() as store, pytest.raises(StoreBusyError, match="are held by process"):
        store.open_collection("video_frames")
    monkeypatch.setattr("extraction_dagster.stages.index.edge.files.time.sleep", lambda _: holder.close())
    with open_store() as store:
        assert store.open_collection("video_frames") == SPEC
