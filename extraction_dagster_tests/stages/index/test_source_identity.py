"""Whose points a collection holds: another source table's are refused, nobody's are claimed once."""

import json
import logging

import pytest

from extraction_dagster.errors.index import ForeignCollectionError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.source_table import SourceTable, source_identity
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import PointFilter
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.search import open_for_search
from extraction_dagster.stages.index.server.retry import RetryPolicy
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import open_for_writing, open_point_store, replace_records
from extraction_dagster.stages.index.staging import stage_collection

OURS, THEIRS = "0123456789abcdef", "fedcba9876543210"
SPEC, NEXT = CollectionSpec("frames", 8, "abc123"), CollectionSpec("frames", 8, "next")
QUICK = RetryPolicy(attempts=2, base_seconds=0.05)
CLAIMED = "belongs to this source table"


@pytest.fixture(params=["edge", "wire"])
def store_of(request, tmp_path):
    """`store_of(OURS)`: the same store on each engine, for a source table; without one for an earlier release."""
    if request.param == "edge":
        return lambda source="": EdgeStore(tmp_path / "qdrant", source=source)
    server = request.getfixturevalue("stand_in")
    settings = Settings(home=tmp_path, qdrant_url=server.url, qdrant_grpc_port=server.port)
    return lambda source="": ServerStore.connect(settings, retry=QUICK, source=source)


@pytest.fixture
def fill(store_of, embeddings, rows):
    """`fill(OURS)`: write two points of record 7."""

    def write(source=""):
        with store_of(source) as store:
            store.ensure_collection(SPEC)
            replace_records(store, embeddings({7: [0, 30]}), rows=rows(7), generations={7: "a"})

    return write


def attempts(store_of):
    """Every way to open or change a collection that another source table has filled."""
    yield lambda store: store.ensure_collection(SPEC)
    yield lambda store: store.ensure_collection(NEXT, staged=True)
    yield lambda store: store.open_collection("frames")
    yield lambda store: store.open_collection("frames", fingerprint="abc123")
    yield lambda store: open_for_search(store, SPEC)
    yield lambda store: open_for_writing(store, SPEC)
    yield lambda store: stage_collection(store, NEXT)
    with store_of(OURS) as store:
        store.ensure_collection(NEXT, staged=True)
    yield lambda store: store.open_collection("frames", fingerprint="next")
    yield lambda store: store.drop("frames", "next")


def test_another_sources_collection_is_refused_before_anything_is_read_or_written(store_of, fill):
    fill(OURS)
    for attempt in attempts(store_of):
        wanted = r"'frames' in .*another source table, or of this one at another address.*COLLECTION_NAME"
        with store_of(THEIRS) as store, pytest.raises(ForeignCollectionError, match=wanted) as refused:
            attempt(store)
        assert "\n" not in str(refused.value)
    with store_of(OURS) as store:
        assert store.open_collection("frames").source == OURS
        assert store.count_by_record() == {7: 2}
        assert store.collections("frames") == {"abc123": True, "next": False}


def test_a_collection_of_nobody_is_claimed_by_its_first_writer_once_and_with_a_line(store_of, fill, caplog):
    caplog.set_level(logging.WARNING)
    fill()
    with store_of(OURS) as store:  # a search
        store.open_collection("frames")
        assert store.count() == 2
    assert caplog.records == []
    fill(OURS)
    fill(OURS)
    assert [record.getMessage().count(CLAIMED) for record in caplog.records] == [1]
    with store_of(THEIRS) as store, pytest.raises(ForeignCollectionError, match="holds points of another source table"):
        store.open_collection("frames")
    with store_of() as store:  # an earlier release
        assert store.open_collection("frames").fingerprint == "abc123"


def test_a_new_collection_belongs_to_whoever_makes_it_without_a_line(store_of, fill, caplog):
    caplog.set_level(logging.WARNING)
    fill(OURS)
    with store_of() as store:
        assert store.open_collection("frames") == CollectionSpec("frames", 8, "abc123", source=OURS)
    assert caplog.records == []


@pytest.mark.parametrize("write", ["delete", "publish"])
def test_removing_points_and_publishing_claim_too(store_of, fill, write):
    fill()
    with store_of(OURS) as store:
        store.open_collection("frames")
        store.publish() if write == "publish" else store.delete(PointFilter(record_ids=(7,)))
    with store_of() as store:
        assert store.open_collection("frames").source == OURS


def test_what_one_source_staged_is_not_published_in_place_of_anothers(store_of, fill):
    with store_of(THEIRS) as store:
        store.ensure_collection(NEXT, staged=True)
    fill(OURS)
    with store_of(THEIRS) as store:
        store.open_collection("frames", fingerprint="next")
        with pytest.raises(ForeignCollectionError, match="holds points of another source table"):
            store.publish()
    with store_of(OURS) as store:
        assert store.open_collection("frames").fingerprint == "abc123"


def test_of_two_who_claim_at_once_the_second_is_refused(stand_in, wire_store, tmp_path, monkeypatch):
    wire_store.ensure_collection(SPEC)
    settings = Settings(home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port)
    with ServerStore.connect(settings, retry=QUICK, source=OURS) as store:
        update = stand_in.engine.update_collection

        def then_theirs(name, *, metadata):
            update(name, metadata=metadata)
            return update(name, metadata={"extraction": {**metadata["extraction"], "source": THEIRS}})

        monkeypatch.setattr(stand_in.engine, "update_collection", then_theirs)
        with pytest.raises(ForeignCollectionError, match="holds points of another source table"):
            store.ensure_collection(SPEC)


@pytest.mark.parametrize("reason", ["keeps no metadata", "may not"])
def test_a_server_that_can_not_note_a_source_is_warned_of_and_used_as_before(  # noqa: PLR0913, PLR0917 - fixtures
    stand_in, wire, wire_store, tmp_path, monkeypatch, caplog, reason
):
    wire_store.ensure_collection(SPEC)
    settings = Settings(home=tmp_path, qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port)
    if reason == "may not":
        stand_in.faults.append(wire.Fault("Update", "unauthenticated"))
    else:
        monkeypatch.setattr(stand_in.engine, "update_collection", lambda *_, **__: True)
    with ServerStore.connect(settings, retry=QUICK, source=OURS) as store:
        store.ensure_collection(SPEC)
        store.delete(PointFilter(record_ids=(7,)))
    (warned,) = caplog.records
    assert "can't be told from another source's" in warned.getMessage()
    assert stand_in.calls.count("Update") == 1


def test_the_settings_name_the_source_and_those_of_a_searcher_without_one_take_any(tmp_path, sqlite_database):
    sqlite_database.create(ids=(1,))
    settings = sqlite_database.settings()
    identity = SourceTable(sqlite_database.engine, settings).identity
    assert source_identity(settings) == identity
    with open_point_store(settings) as store:
        store.ensure_collection(CollectionSpec("video_frames", 8, "abc123"))
    kept = json.loads((settings.home / "qdrant" / "video_frames" / "abc123" / "collection.json").read_text())
    assert kept["source"] == identity
    other = sqlite_database.settings(source_table="other")
    with (
        open_point_store(other) as store,
        pytest.raises(ForeignCollectionError, match="holds points of another source table"),
    ):
        store.open_collection("video_frames")
    (tmp_path / "source.db").rename(tmp_path / "elsewhere.db")
    with open_point_store(Settings(home=tmp_path)) as store:
        assert store.open_collection("video_frames").source == identity
