"""The embedded store: one holder, crashes, broken files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from extraction_dagster.errors.index import (
    CollectionMissingError,
    StoreBusyError,
    StoreEngineError,
    StoreUnreadableError,
)
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import PointBatch, build_points, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec

SPEC = CollectionSpec("frames", dim=8, fingerprint="abc123")
_HOLD = """
import sys, time
from pathlib import Path
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.protocol import CollectionSpec
store = EdgeStore(Path(sys.argv[1]))
store.ensure_collection(CollectionSpec("frames", dim=8, fingerprint="abc123"))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def home(tmp_path):
    return tmp_path / "qdrant"


@pytest.fixture
def holder(home):
    """Another process that holds the store."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(home)], stdout=subprocess.PIPE, text=True) as process:
        guard = threading.Timer(120, process.kill)
        guard.start()
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
            guard.cancel()


def test_a_held_store_names_its_holder_and_the_way_out(home, holder):
    with EdgeStore(home) as store:
        with pytest.raises(StoreBusyError, match=f"held by process {holder.pid} on .*EXTRACTION_QDRANT_URL"):
            store.open_collection("frames")
        with pytest.raises(StoreBusyError, match="Nothing was changed"):
            store.ensure_collection(SPEC)


def test_a_killed_holder_lets_go(home, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with EdgeStore(home) as store:
        assert store.open_collection("frames") == SPEC


def test_a_folder_that_can_not_be_made_is_named(home):
    home.write_text("a file")
    with EdgeStore(home) as store, pytest.raises(StoreEngineError, match=r"hold the points in .*/frames: Not a dir"):
        store.ensure_collection(SPEC)


def test_a_second_store_in_the_same_process_is_refused(home):
    with EdgeStore(home) as first, EdgeStore(home) as second:
        first.ensure_collection(SPEC)
        with pytest.raises(StoreBusyError, match=f"held by process {os.getpid()}"):
            second.ensure_collection(SPEC)
        first.close()
        second.ensure_collection(SPEC)


def test_a_store_waits_for_a_holder_that_lets_go(home, monkeypatch):
    first, second = EdgeStore(home), EdgeStore(home, wait_seconds=60)
    first.ensure_collection(SPEC)
    monkeypatch.setattr("extraction_dagster.stages.index.edge.collection_folder.time.sleep", lambda _: first.close())
    assert second.open_collection(SPEC.name) == SPEC
    second.close()


def test_points_stay_after_closing_and_opening(home, embeddings, rows):
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
        store.upsert(build_points(embeddings({7: [0, 30]}), rows=rows(7), generations={7: "a"}))
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
        assert store.point_ids() == {point_id(7, 0), point_id(7, 30)}


def test_payload_indexes_are_there_before_the_first_point(home):
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
        kinds = {field: str(info.data_type) for field, info in store._engine.info().payload_schema.items()}
    assert kinds == {
        "record_id": "PayloadSchemaType.Integer",
        "generation": "PayloadSchemaType.Keyword",
        "platform": "PayloadSchemaType.Keyword",
        "created_at": "PayloadSchemaType.Datetime",
    }


def test_a_collection_that_somebody_copied_beside_itself_is_none_of_its_own(home):
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
    shutil.copytree(home / "frames" / "abc123", home / "frames" / "abc123-backup")
    with EdgeStore(home) as store:
        assert store.collections("frames") == {"abc123": True}
        with pytest.raises(CollectionMissingError, match="abc123-backup"):
            store.open_collection("frames", fingerprint="abc123-backup")


def test_a_creation_that_was_cut_off_starts_again(home):
    building = home / "frames" / "building-abc123" / "shard"
    building.mkdir(parents=True)
    (building / "edge_config.json").write_text("{")
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
        assert store.count() == 0
    assert sorted(path.name for path in (home / "frames").iterdir()) == ["abc123", "lock", "pointer.json"]


def test_a_creation_killed_before_its_pointer_was_written_is_found_again(home, embeddings, rows):
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
        store.upsert(build_points(embeddings({7: [0]}), rows=rows(7), generations={7: "a"}))
    (home / "frames" / "pointer.json").unlink()
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
        assert store.count() == 1
    assert json.loads((home / "frames" / "pointer.json").read_text()) == {"v": 1, "current": "abc123"}


@pytest.mark.parametrize("content", ["", "[]", '{"v": 2, "current": "abc123"}', '{"v": 1}'])
def test_a_broken_pointer_is_refused_by_naming_the_file_and_the_way_back(home, content):
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
    (home / "frames" / "pointer.json").write_text(content)
    with EdgeStore(home) as store, pytest.raises(StoreUnreadableError, match=r"pointer\.json.*reconcile --repair"):
        store.ensure_collection(SPEC)


def test_a_broken_shard_is_refused_and_let_go(home):
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
    (home / "frames" / "abc123" / "shard" / "edge_config.json").write_text("{")
    with EdgeStore(home) as store, EdgeStore(home) as other:
        with pytest.raises(StoreUnreadableError, match=r"abc123/shard can't be read"):
            store.ensure_collection(SPEC)
        with pytest.raises(StoreUnreadableError, match=r"abc123/shard can't be read"):
            other.ensure_collection(SPEC)


def test_a_broken_write_names_the_operation(home):
    with EdgeStore(home) as store:
        store.ensure_collection(SPEC)
        store._engine.close()
        with pytest.raises(StoreEngineError, match="Could not count points in"):
            store.count()


def test_a_quantized_collection_gives_cosines_and_cuts_by_them(home):
    """1,500 vectors are enough to be quantized, where they are this long."""
    count, dim = 1500, 4000
    vectors = np.random.default_rng(0).standard_normal((count, dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    payload = {"frame_number": 0, "frame_second": 0.0, "platform": None, "video_code": None, "path": ""}
    ids, payloads = zip(*((point_id(key, 0), {**payload, "record_id": key}) for key in range(count)), strict=True)
    with EdgeStore(home) as store:
        store.ensure_collection(CollectionSpec("frames", dim, "abc123", quantization="scalar"))
        store.upsert(PointBatch(ids, vectors, payloads))
        store.optimize()
        found = {key: store.search(vectors[key], limit=1, score_threshold=0.999) for key in range(0, count, 30)}
        assert [(hit.record_id, hit.score) for hits in found.values() for hit in hits] == [
            (key, pytest.approx(1, abs=1e-3)) for key in found
        ]
        near = vectors[7] + 0.5 * vectors[9]
        near /= np.linalg.norm(near)
        cosine = float(near @ vectors[7])
        assert [hit.record_id for hit in store.search(near, limit=9, score_threshold=cosine - 1e-3)] == [7]
        assert store.search(near, limit=9, score_threshold=cosine + 1e-3) == []
