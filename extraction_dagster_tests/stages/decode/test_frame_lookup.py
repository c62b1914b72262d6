import numpy as np
import pytest

from extraction_dagster.records import EncodedFrames, IdRange
from extraction_dagster.shards.frame_lookup import find_frames
from extraction_dagster.shards.frame_store import FrameStore


def video(record_id, numbers, text="jpeg"):
    count = len(numbers)
    jpegs = [f"{text} {record_id}/{number}".encode() for number in numbers]
    seconds = np.arange(count, dtype=np.float64)
    return EncodedFrames(record_id, "v", jpegs, seconds, seconds, np.array(numbers, np.int64), 398, 224)


@pytest.fixture
def store(root):
    return FrameStore(root, "f1")


def test_frames_are_found_whatever_range_and_shard_they_lie_in(store):
    store.write_shard(IdRange(-5, 9), [video(-5, [0, 30]), video(7, range(0, 3000, 5))])
    store.write_shard(IdRange(10, 99), [video(10, [0])])
    wanted = [(-5, 30), (7, 2995), (7, 5), (7, 6), (10, 0), (11, 0), (500, 0)]
    assert find_frames(store, wanted) == {
        (-5, 30): b"jpeg -5/30",
        (7, 2995): b"jpeg 7/2995",
        (7, 5): b"jpeg 7/5",
        (10, 0): b"jpeg 10/0",
    }


def test_the_newest_frame_counts_and_an_older_one_serves_where_it_is_missing(store):
    store.write_shard(IdRange(1, 9), [video(7, [0, 30], "old")])
    store.write_shard(IdRange(1, 9), [video(7, [0, 60], "new")])
    assert find_frames(store, [(7, 0), (7, 30)]) == {(7, 0): b"new 7/0", (7, 30): b"old 7/30"}


def test_a_store_without_frames_and_a_damaged_shard_give_none(store, tmp_path):
    assert find_frames(store, [(7, 0)]) == {}
    folder = tmp_path / "frames" / "f1" / "1-9"
    folder.mkdir(parents=True)
    (folder / "20260101T000000000000Z-aa.parquet").write_bytes(b"PAR1 nothing")
    (folder.parent / "notes").mkdir()
    assert find_frames(store, [(7, 0)]) == {}
