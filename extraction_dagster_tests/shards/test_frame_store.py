import logging
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extraction_dagster.errors.decode import FrameShardError, FrameStoreError
from extraction_dagster.records import EncodedFrames, IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.shards.frame_store import FrameRecord, FrameStore
from extraction_dagster.stages.decode.fingerprint import frames_fingerprint

RANGE = IdRange(1, 1000)


def video(record_id, frames=3, **fields):
    return EncodedFrames(
        **{
            "record_id": record_id,
            "content_version": f"v{record_id}",
            "jpegs": [f"jpeg {record_id}/{number}".encode() for number in range(frames)],
            "pts_seconds": np.arange(frames) / 2,
            "target_seconds": np.arange(frames) / 2 + 0.125,
            "frame_number": np.arange(frames) * 12,
            "width_px": 398,
            "height_px": 224,
            "duration_seconds": 1.5,
            "partial": None,
            **fields,
        }
    )


def as_plain(read):
    return (
        read.record_id,
        read.content_version,
        list(read.jpegs),
        read.pts_seconds.tolist(),
        read.target_seconds.tolist(),
        read.frame_number.tolist(),
        (read.width_px, read.height_px, read.duration_seconds, read.partial),
    )


def test_videos_come_back_as_they_were_written(root):
    store = FrameStore(root, "f1")
    long = video(2, 700, partial="half is missing", duration_seconds=None)
    written = store.write_shard(RANGE, [video(1), long, video(3, 1)])
    assert [as_plain(read) for read in store.read(written)] == [as_plain(one) for one in (video(1), long, video(3, 1))]


def test_shards_are_listed_from_their_footers(root):
    store = FrameStore(root, "f1")
    written = store.write_shard(RANGE, [video(1), video(2, 5, partial="cut", duration_seconds=None)])
    assert store.shards(RANGE) == [written]
    assert written.path.endswith(f"/f1/1-1000/{written.name}")
    assert written.path.endswith(f"/f1/1-1000/{written.name}")
    assert written.num_frames == 8
    assert written.size_bytes > 0
    assert written.records == (
        FrameRecord(1, "v1", 3, 398, 224, 1.5, None),
        FrameRecord(2, "v2", 5, 398, 224, None, "cut"),
    )


def test_another_range_and_another_fingerprint_are_apart(root):
    store = FrameStore(root, "f1")
    store.write_shard(RANGE, [video(1)])
    assert store.shards(IdRange(-5, -1)) == []
    assert FrameStore(root, "f2").shards(RANGE) == []
    negative = store.write_shard(IdRange(-5, -1), [video(-3)])
    assert store.shards(IdRange(-5, -1)) == [negative]


def test_materializing_again_adds_shards_in_the_order_of_time(root):
    store = FrameStore(root, "f1")
    written = [FrameStore(root, "f1").write_shard(RANGE, [video(1)]) for _ in range(5)]
    assert [shard.name for shard in store.shards(RANGE)] == [shard.name for shard in written]


def test_what_another_process_wrote_and_removed_meanwhile_is_seen(root):
    store, elsewhere = FrameStore(root, "f1"), FrameStore(root, "f1")
    elsewhere._fs = type(elsewhere._fs)(skip_instance_cache=True)  # with no part in this one's listings
    first = store.write_shard(RANGE, [video(1)])
    assert (store.shards(RANGE), store.partitions()) == ([first], [RANGE])
    second = elsewhere.write_shard(RANGE, [video(2)])
    other = elsewhere.write_shard(IdRange(1001, 1002), [video(1001)])
    assert store.partitions() == [RANGE, IdRange(1001, 1002)]
    assert (store.shards(RANGE), store.shards(IdRange(1001, 1002))) == ([first, second], [other])
    elsewhere.remove(first)
    assert store.shards(RANGE) == [second]
    with pytest.raises(FrameShardError, match="can't be read"):
        list(store.read(first))
    store.remove(first)


def test_a_bucket_that_is_missing_is_named_and_no_record_is_blamed(s3_root):
    store = FrameStore(f"{s3_root}-elsewhere/frames", "f1")
    said = r"-elsewhere/frames/f1' can't be reached: .+\. No record is to blame"
    for ask in (lambda: store.write_shard(RANGE, [video(1)]), lambda: store.shards(RANGE), store.partitions):
        with pytest.raises(FrameStoreError, match=said):
            ask()


def test_a_store_that_is_down_is_an_error_in_one_line(s3_root, monkeypatch):
    written = FrameStore(s3_root, "f1").write_shard(RANGE, [video(1)])
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = FrameStore(s3_root, "f1")
    store._fs = type(store._fs)(skip_instance_cache=True)  # the others of this process know the way already
    for ask in (
        lambda: store.write_shard(RANGE, [video(1)]),
        lambda: store.shards(RANGE),
        store.partitions,
        lambda: list(store.read(written)),
        lambda: store.remove(written),
    ):
        with pytest.raises(FrameStoreError, match=r"f1' can't be reached: EndpointConnectionError\. No record"):
            ask()


def test_the_file_is_laid_out_for_fast_reading(tmp_path):
    shard = FrameStore(str(tmp_path), "f1").write_shard(RANGE, [video(1, 350)])
    metadata = pq.read_metadata(shard.path)
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [300, 50]
    columns = {
        metadata.row_group(0).column(number).path_in_schema: metadata.row_group(0).column(number) for number in range(5)
    }
    assert {column.compression for column in columns.values()} == {"UNCOMPRESSED"}
    assert [name for name, column in columns.items() if column.has_dictionary_page] == ["record_id"]


def test_what_is_no_whole_shard_is_left_out_with_a_warning(tmp_path, caplog):
    store = FrameStore(str(tmp_path), "f1")
    whole = store.write_shard(RANGE, [video(1)])
    folder = tmp_path / "f1" / "1-1000"
    content = (folder / whole.name).read_bytes()
    (folder / "0-torn.parquet").write_bytes(content[: len(content) // 2])
    (folder / "0-empty.parquet").write_bytes(b"")
    (folder / "0-notes.txt").write_text("notes")
    pq.write_table(pa.table({"a": [1]}), folder / "0-foreign.parquet")
    other = store.write_shard(IdRange(7, 9), [video(8)])
    (folder / "0-misplaced.parquet").write_bytes((tmp_path / "f1" / "7-9" / other.name).read_bytes())
    with caplog.at_level(logging.WARNING):
        assert store.shards(RANGE) == [whole]
    for name in ("torn", "empty", "notes", "foreign", "misplaced"):
        assert any(f"0-{name}" in line and "no whole frame shard of range 1-1000" in line for line in caplog.messages)


def test_a_shard_that_vanished_or_rotted_is_an_error_that_names_it(tmp_path):
    store = FrameStore(str(tmp_path), "f1")
    shard = store.write_shard(RANGE, [video(1), video(2)])
    rotten = FrameStore(str(tmp_path), "f1").write_shard(RANGE, [video(1), video(3)])
    content = (tmp_path / "f1" / "1-1000" / rotten.name).read_bytes()
    (tmp_path / "f1" / "1-1000" / shard.name).write_bytes(content)
    with pytest.raises(FrameShardError, match=rf"{shard.name}' can't be read: its rows are not those of record 2"):
        list(store.read(shard))
    (tmp_path / "f1" / "1-1000" / shard.name).unlink()
    with pytest.raises(FrameShardError, match=rf"{shard.name}' can't be read: .*No such file"):
        list(store.read(shard))


def test_a_temporary_file_is_no_shard_and_is_swept_once_it_is_old(tmp_path, caplog):
    store = FrameStore(str(tmp_path), "f1")
    folder = tmp_path / "f1" / "1-1000"
    folder.mkdir(parents=True)
    (folder / ".young.tmp").write_bytes(b"x")
    (folder / ".old.tmp").write_bytes(b"x")
    two_hours_ago = time.time() - 7200
    os.utime(folder / ".old.tmp", (two_hours_ago, two_hours_ago))
    assert store.shards(RANGE) == []
    store.write_shard(RANGE, [video(1)])
    assert sorted(path.name for path in folder.glob(".*")) == [".young.tmp"]
    assert "which a killed process left behind" in caplog.text


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    store = FrameStore(str(tmp_path), "f1")

    def no_space(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        store.write_shard(RANGE, [video(1)])
    assert list((tmp_path / "f1" / "1-1000").iterdir()) == []


def test_the_fingerprint_follows_whatever_changes_pixels_or_frames():
    same = [Settings(), Settings(decode_workers=7, shard_records=3, max_pixels=99, num_frames=3)]
    assert len({frames_fingerprint(settings) for settings in same}) == 1
    changed = [
        Settings(),
        Settings(decoder="decord"),
        Settings(fps=2.0),
        Settings(max_frames=10),
        Settings(sampling="uniform"),
        Settings(sampling="uniform", num_frames=3),
        Settings(short_side_px=336),
        Settings(jpeg_quality=90),
    ]
    assert len({frames_fingerprint(settings) for settings in changed}) == len(changed)
