"""An export holds every point, and leaves nothing when it can't be finished; a copy is verified."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from extraction_dagster.errors.index import ExportError, PointsMissingError
from extraction_dagster.records import VideoRow
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.export import copy_points, export_points
from extraction_dagster.stages.index.points import PointFilter, point_id
from extraction_dagster.stages.index.stage import replace_records


@pytest.fixture
def filled(opened, embeddings):
    """Each store in turn, with three points of two records."""
    rows = {7: VideoRow(7, "/v/7.mp4", "insta", "c7", payload={"likes": 5}), 8: VideoRow(8, "/v/8.mp4")}
    replace_records(opened, embeddings({7: [0, 30], 8: [15]}), rows=rows, generations={7: "a", 8: "b"})
    return opened


def test_an_export_holds_every_point_with_payload_and_vector(filled, spec, tmp_path, embeddings):
    seen = []
    assert export_points(filled, spec, tmp_path / "points.parquet", on_written=seen.append) == 3
    assert seen[-1] == 3
    table = pq.read_table(tmp_path / "points.parquet")
    rows = {(row["record_id"], row["frame_number"]): row for row in table.to_pylist()}
    vector = rows[7, 30].pop("vector")
    assert vector == pytest.approx(embeddings({7: [0, 30], 8: [15]}).vectors[1].tolist(), abs=2e-3)
    created = rows[7, 30].pop("created_at")
    assert created.endswith("Z")
    assert rows[7, 30] == {
        "id": point_id(7, 30),
        "record_id": 7,
        "platform": "insta",
        "video_code": "c7",
        "frame_number": 30,
        "frame_second": 1.0,
        "path": "/v/7.mp4",
        "generation": "a",
        "payload": '{"likes": 5}',
    }
    assert (rows[8, 15]["payload"], rows[8, 15]["platform"]) == (None, None)
    assert table.schema.field("vector").type.list_size == 8
    assert b'"fingerprint": "abc123"' in table.schema.metadata[b"extraction"]
    assert [file.name for file in tmp_path.iterdir() if file.suffix in {".parquet", ".tmp"}] == ["points.parquet"]


def test_an_export_that_misses_points_is_refused_and_leaves_the_old_file(filled, spec, tmp_path, monkeypatch):
    file = tmp_path / "points.parquet"
    file.write_bytes(b"old")
    monkeypatch.setattr(filled, "count", lambda: 4)
    with pytest.raises(ExportError, match="3 points were written, and the store holds 4: try again"):
        export_points(filled, spec, file)
    assert file.read_bytes() == b"old"
    with pytest.raises(ExportError, match="No such file"):
        export_points(filled, spec, tmp_path / "nowhere" / "points.parquet")
    with pytest.raises(ExportError, match=r"exported to '\.': Is a directory"):
        export_points(filled, spec, Path())
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_empty_collection_gives_an_empty_file(opened, spec, tmp_path):
    assert export_points(opened, spec, tmp_path / "points.parquet") == 0
    assert np.array(pq.read_table(tmp_path / "points.parquet")["record_id"]).shape == (0,)


FRAMES = {5: [0], 7: [0, 30, 60], 8: [0, 15], 9: [0], 20: [0, 1]}


@pytest.fixture
def many(opened, embeddings, rows):
    """Each store in turn, holding FRAMES with generation a."""
    replace_records(opened, embeddings(FRAMES), rows=rows(*FRAMES), generations=dict.fromkeys(FRAMES, "a"))
    return opened


def test_a_copy_holds_the_same_points(many, spec, tmp_path):
    with EdgeStore(tmp_path / "copy") as target:
        target.ensure_collection(spec)
        assert copy_points(many, target) == 9
        assert copy_points(many, target) == 9
        assert target.point_ids() == many.point_ids()
        assert target.count_by_record(PointFilter(generations=dict.fromkeys(FRAMES, "a"))) == {
            5: 1,
            7: 3,
            8: 2,
            9: 1,
            20: 2,
        }


def test_a_copy_is_verified_by_reading_and_not_by_a_count_of_each_record(wire_store, spec, stand_in, tmp_path):
    wire_store.ensure_collection(spec)
    stand_in.calls.clear()
    with EdgeStore(tmp_path / "copy") as target:
        target.ensure_collection(spec)
        assert copy_points(wire_store, target) == 0
    assert stand_in.calls == ["Scroll", "Scroll"]


def test_a_copy_that_lacks_points_is_refused(many, spec, tmp_path, monkeypatch):
    with EdgeStore(tmp_path / "copy") as target:
        target.ensure_collection(spec)
        upsert = target.upsert
        monkeypatch.setattr(target, "upsert", lambda batch: upsert(next(batch.chunks(max_points=8, max_bytes=10**6))))
        with pytest.raises(
            PointsMissingError, match=r"8 points were found in the target .*exactly 9 \(record \d+: \d of"
        ):
            copy_points(many, target)
