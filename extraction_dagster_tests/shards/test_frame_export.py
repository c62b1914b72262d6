"""Frames for others: single ones by number, and files that are whole or not there; the newest of each record."""

import csv
import json
import tarfile

import numpy as np
import pytest

from extraction_dagster.errors.decode import FramesExportError
from extraction_dagster.records import EncodedFrames, IdRange
from extraction_dagster.shards.frame_export import export_frames, find_frames
from extraction_dagster.shards.frame_store import FrameStore

RANGE = IdRange(1, 10)


def video(record_id, numbers=(0, 30), version="v1", claim=0):
    seconds = np.array(numbers) / 30
    jpegs = [f"jpeg {record_id} {number} {version}".encode() for number in numbers]
    frame_number = np.array(numbers, np.int64)
    return EncodedFrames(record_id, version, jpegs, seconds, seconds + 0.25, frame_number, 398, 224, claim=claim)


@pytest.fixture
def store(root):
    store = FrameStore(root, "f1")
    store.write_shard(RANGE, [video(1), video(2)])
    store.write_shard(RANGE, [video(2, numbers=(0, 15), version="v2"), video(3, numbers=(7,))])
    store.write_shard(IdRange(-5, 0), [video(-5)])
    store.write_shard(IdRange(11, 20), [video(11)])
    return store


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jpg")}


def test_a_folder_holds_each_records_newest_frames_and_a_table_of_them(store, tmp_path):
    assert export_frames(store, RANGE, tmp_path / "out") == (3, 5)
    assert files(tmp_path / "out") == {
        "1/00000000.jpg": b"jpeg 1 0 v1",
        "1/00000030.jpg": b"jpeg 1 30 v1",
        "2/00000000.jpg": b"jpeg 2 0 v2",
        "2/00000015.jpg": b"jpeg 2 15 v2",
        "3/00000007.jpg": b"jpeg 3 7 v1",
    }
    with (tmp_path / "out" / "frames.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert rows[3] == {
        "record_id": "2",
        "frame_number": "15",
        "pts_seconds": "0.5",
        "target_seconds": "0.75",
        "width_px": "398",
        "height_px": "224",
        "content_version": "v2",
        "file": "2/00000015.jpg",
    }


def test_what_a_frozen_writer_wrote_late_is_neither_exported_nor_shown(root, tmp_path):
    store = FrameStore(root, "f1")
    store.write_shard(IdRange(1, 20), [video(1, version="v2", claim=12)])
    store.write_shard(RANGE, [video(1, version="v1", claim=11)])
    assert export_frames(store, RANGE, tmp_path / "out") == (1, 2)
    assert files(tmp_path / "out")["1/00000000.jpg"] == b"jpeg 1 0 v2"
    assert find_frames(store, [(1, 0), (1, 99)]) == {(1, 0): b"jpeg 1 0 v2"}


def test_a_tar_holds_a_jpeg_and_its_facts_side_by_side(store, tmp_path):
    assert export_frames(store, IdRange(-9, 1), tmp_path / "new" / "out.tar") == (2, 4)
    with tarfile.open(tmp_path / "new" / "out.tar") as tar:
        names = tar.getnames()
        jpeg, facts = (tar.extractfile(name).read() for name in names[2:4])
    assert names[:4] == ["-5-00000000.jpg", "-5-00000000.json", "-5-00000030.jpg", "-5-00000030.json"]
    assert names[4:6] == ["1-00000000.jpg", "1-00000000.json"]
    assert jpeg == b"jpeg -5 30 v1"
    assert json.loads(facts) == {
        "record_id": -5,
        "frame_number": 30,
        "pts_seconds": 1.0,
        "target_seconds": 1.25,
        "width_px": 398,
        "height_px": 224,
        "content_version": "v1",
    }


def test_the_same_frames_give_the_same_tar_which_is_replaced(store, tmp_path):
    out = tmp_path / "out.tar"
    export_frames(store, RANGE, out)
    first = out.read_bytes()
    out.write_bytes(b"old")
    export_frames(store, RANGE, out)
    assert out.read_bytes() == first


def test_progress_counts_videos(store, tmp_path):
    seen = []
    export_frames(store, RANGE, tmp_path / "out", on_video=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_a_range_without_frames_is_an_error_and_leaves_nothing(store, tmp_path, name):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FramesExportError, match=r"no frame of range 30-40 is stored.*'extraction launch 30-40' first"):
        export_frames(store, IdRange(30, 40), tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["out", "out.tar"])
def test_an_export_that_is_stopped_leaves_nothing(store, tmp_path, name):
    def stop(*_):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export_frames(store, RANGE, tmp_path / name, on_video=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_with_something_in_it_is_refused_and_an_empty_one_is_filled(store, tmp_path):
    (tmp_path / "out").mkdir()
    assert export_frames(store, RANGE, tmp_path / "out") == (3, 5)
    with pytest.raises(
        FramesExportError, match=r"out': it is there already, expected a missing or empty folder.*not t"
    ):
        export_frames(store, RANGE, tmp_path / "out")
    assert len(files(tmp_path / "out")) == 5


def test_a_place_that_can_not_be_written_is_named(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FramesExportError, match=r"out\.tar': (Not a directory|File exists)\. No file was left behind"):
        export_frames(store, RANGE, tmp_path / "file" / "out.tar")


@pytest.fixture
def empty(root):
    return FrameStore(root, "f2")


def test_frames_are_found_whatever_range_and_shard_they_lie_in(empty):
    empty.write_shard(IdRange(-5, 9), [video(-5, [0, 30]), video(7, range(0, 3000, 5))])
    empty.write_shard(IdRange(10, 99), [video(10, [0])])
    wanted = [(-5, 30), (7, 2995), (7, 5), (7, 6), (10, 0), (11, 0), (500, 0)]
    assert find_frames(empty, wanted) == {
        (-5, 30): b"jpeg -5 30 v1",
        (7, 2995): b"jpeg 7 2995 v1",
        (7, 5): b"jpeg 7 5 v1",
        (10, 0): b"jpeg 10 0 v1",
    }


def test_the_newest_frame_counts_and_an_older_one_serves_where_it_is_missing(empty):
    empty.write_shard(IdRange(1, 9), [video(7, [0, 30], "old")])
    empty.write_shard(IdRange(1, 9), [video(7, [0, 60], "new")])
    assert find_frames(empty, [(7, 0), (7, 30)]) == {(7, 0): b"jpeg 7 0 new", (7, 30): b"jpeg 7 30 old"}


def test_a_store_without_frames_and_a_damaged_shard_give_none(empty, tmp_path):
    assert find_frames(empty, [(7, 0)]) == {}
    folder = tmp_path / "frames" / "f2" / "1-9"
    folder.mkdir(parents=True)
    (folder / "20260101T000000000000Z-aa.parquet").write_bytes(b"PAR1 nothing")
    (folder.parent / "notes").mkdir()
    assert find_frames(empty, [(7, 0)]) == {}


def test_no_cell_of_the_table_is_taken_for_a_formula(root, tmp_path):
    store = FrameStore(root, "f1")
    versions = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "v=1", "'=1", ""]
    store.write_shard(RANGE, [video(n, numbers=(0,), version=version) for n, version in enumerate(versions, 1)])
    export_frames(store, RANGE, tmp_path / "out")
    with (tmp_path / "out" / "frames.csv").open(newline="") as file:
        found = [row["content_version"] for row in csv.DictReader(file)]
    assert found == ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\tx", "'\rx", "v=1", "'=1", ""]
    store.write_shard(IdRange(-5, 0), [video(-5, numbers=(0,))])
    export_frames(store, IdRange(-5, 0), tmp_path / "more")
    assert (tmp_path / "more" / "frames.csv").read_text().splitlines()[1].startswith("-5,0,")
