"""What frames and vectors have in common: names, listings, faults of the store, leftovers of killed writers."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extraction_dagster.errors.decode import EmbeddingShardError, FrameShardError, ShardStoreError
from extraction_dagster.files import temporary_name
from extraction_dagster.records import EmbeddingBatch, Failure, IdRange
from extraction_dagster.shards.compaction import Compacted, CompactionOptions, compact
from extraction_dagster.shards.embedding_store import EmbeddingShard, EmbeddingStore
from extraction_dagster.shards.frame_store import FrameRecord, FrameShard, FrameStore
from extraction_dagster.shards.store import ShardRecord, merged_name, new_name, written_at

RANGE = IdRange(1, 1000)
TWO_HOURS = 7200.0


def test_a_new_name_says_now_and_later_names_sort_behind():
    names = [new_name() for _ in range(20)]
    assert sorted(names) == names
    assert abs(written_at(names[0]) - datetime.now(UTC)) < timedelta(minutes=5)


def test_the_time_is_read_off_a_name():
    read = written_at("20260102T030405000006Z-0a1b2c3d4e5f.parquet")
    assert read == datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


def test_a_merged_shard_comes_just_after_the_last_of_its_sources():
    names = ["20260102T030405000006Z-aaaaaaaaaaaa.parquet", "20260102T030405000009Z-000000000000.parquet"]
    merged = merged_name(names)
    assert merged.startswith("20260102T030405000010Z-")
    assert merged == merged_name(names[::-1])
    assert merged != merged_name(names[1:])


def test_another_name_tells_no_time():
    with pytest.raises(ValueError, match="does not match format"):
        written_at("0001-abc")


def test_shards_are_listed_by_time_and_ranges_by_their_ids(kind, any_root):
    store = kind.open(any_root)
    assert (store.shards(RANGE), store.partitions()) == ([], [])
    first, second = kind.write(store, 1, 2), kind.write(store, 2, 3)
    kind.write(store, -5, partition=IdRange(-9, -1))
    kind.write(kind.open(any_root, "f2"), 4)
    assert kind.open(any_root).shards(RANGE) == [first, second]
    assert kind.read(store, second) == [2, 3]
    assert store.partitions() == [IdRange(-9, -1), RANGE]
    store.remove(first)
    store.remove(first)
    assert store.shards(RANGE) == [second]


def test_small_shards_are_merged_wherever_they_lie(kind, any_root):
    store = kind.open(any_root)
    for number in (1, 2, 3):
        kind.write(store, number)
    at_once = CompactionOptions(max_records=8, enough_shards=2, untouched=timedelta())
    assert compact(store, RANGE, at_once) == Compacted(removed=3, written=1)
    (merged,) = store.shards(RANGE)
    assert kind.read(store, merged) == [1, 2, 3]


def test_a_file_cut_anywhere_is_no_shard(kind, tmp_path):
    store = kind.open(tmp_path)
    path = Path(kind.write(store, 1).path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert store.shards(RANGE) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda footer: footer, ""),
        (lambda _: b"\xff" * 200, "Couldn't deserialize thrift"),
        (lambda footer: footer[:-60], ""),
        (lambda footer: footer.replace(b'"records"', b'"rekords"'), "'records'"),
        (lambda footer: footer.replace(b'"records": [', b'"records": {'), "Expecting"),
    ],
    ids=["none", "garbage", "cut", "a missing key", "no JSON"],
)
@pytest.mark.parametrize("root", ["folder", "memory"], indirect=True)
def test_a_damaged_footer_is_warned_about_and_left_out(kind, root, damage, said, caplog):
    store = kind.open(root)
    shard, whole = kind.write(store, 1), kind.write(store, 2)
    content = store._fs.cat_file(shard.path)
    length = int.from_bytes(content[-8:-4], "little")
    footer = damage(content[-8 - length : -8])
    store._fs.pipe_file(shard.path, content[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with caplog.at_level(logging.WARNING):
        listed = store.shards(RANGE)
    if not said and footer == content[-8 - length : -8]:
        assert (listed, caplog.messages) == ([shard, whole], [])
    else:
        (message,) = caplog.messages
        assert listed == [whole]
        assert f"{shard.name}: it is no whole {kind.name} shard of range 1-1000" in message
        assert said in message


@pytest.mark.parametrize("root", ["folder", "s3"], indirect=True)
def test_a_footer_is_read_once_in_a_process_until_its_file_is_another(kind, root, monkeypatch):
    store, later = kind.open(root), kind.open(root)  # each step of a run has its own
    shards, reads = [kind.write(store, 1), kind.write(store, 2)], []
    assert store.shards(RANGE) == shards

    def read(path, _size):
        reads.append(path)
        raise OSError(errno.EIO, "nobody reads it again")

    with monkeypatch.context() as patch:
        patch.setattr(later._fs, "tail", read)
        assert (later.shards(RANGE), reads) == (shards, [])
    content = store._fs.cat_file(shards[0].path)
    store._fs.pipe_file(shards[0].path, content[:-200] + b"\xff" * 192 + content[-8:])
    store._fs.invalidate_cache()
    assert store.shards(RANGE) == shards[1:]
    store.remove(shards[1])
    assert store.shards(RANGE) == []


@pytest.mark.parametrize("root", ["folder"], indirect=True)
def test_a_disk_that_stumbles_does_not_hide_its_shards(kind, root, monkeypatch):
    store = kind.open(root)
    shard = kind.write(store, 1)

    def stumble(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store._fs, "tail", stumble)
        with pytest.raises(store.store_error, match="can't be reached: Input/output error"):
            store.shards(RANGE)
    assert store.shards(RANGE) == [shard]


@pytest.mark.parametrize("root", ["folder", "memory", "s3"], indirect=True)
def test_damage_within_a_shard_is_blamed_on_the_shard_wherever_it_lies(kind, root):
    store = kind.open(root)
    shard = kind.write(store, 1)
    content = store._fs.cat_file(shard.path)
    store._fs.pipe_file(shard.path, content[:4] + bytes(60) + content[64:])
    with pytest.raises((FrameShardError, EmbeddingShardError), match=f"{shard.name}' can't be read"):
        kind.read(store, shard)
    store._fs.rm_file(shard.path)
    with pytest.raises((FrameShardError, EmbeddingShardError), match=f"{shard.name}' can't be read"):
        kind.read(store, shard)


def test_a_store_that_stopped_is_an_error_in_one_sentence_whatever_is_asked(
    kind, serving_s3, s3_environment, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with serving_s3() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(f"mine-{kind.name}")
        store = kind.open(f"s3://mine-{kind.name}/kept")
        store._fs = type(store._fs)(skip_instance_cache=True)  # the others of this process know another server
        shard = kind.write(store, 1)
        assert store.shards(RANGE) == [shard]
    for ask in (
        lambda: kind.write(store, 2),
        lambda: store.shards(RANGE),
        store.partitions,
        lambda: kind.read(store, shard),
        lambda: store.remove(shard),
        lambda: compact(store, RANGE, CompactionOptions(max_records=8)),
    ):
        with pytest.raises(ShardStoreError) as raised:
            ask()
        told = str(raised.value)
        assert type(raised.value) is store.store_error
        where = f"in 's3://mine-{kind.name}/kept/f1' can't be reached: EndpointConnectionError. No record is to blame"
        assert where in told
        assert f"Correct {kind.setting}, or the store's own configuration" in told
        assert s3_environment["AWS_SECRET_ACCESS_KEY"] not in told


def test_a_bucket_that_is_missing_is_named(kind, s3_root):
    store = kind.open(f"{s3_root}-elsewhere/kept")
    for ask in (lambda: kind.write(store, 1), lambda: store.shards(RANGE), store.partitions):
        with pytest.raises(
            ShardStoreError, match=r"-elsewhere/kept/f1' can't be reached: NoSuchBucket\. No record is to"
        ):
            ask()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (PermissionError(13, "Permission denied", "sig=hunter2"), "Permission denied"),
        (TimeoutError("asked with hunter2"), "TimeoutError"),
    ],
)
def test_a_secret_in_an_address_or_in_a_fault_is_not_told(kind, fault, why, monkeypatch):
    store = kind.open("renamingmemory://me:hunter2@host/kept")

    def refuse(*_, **__):
        raise fault

    monkeypatch.setattr(type(store._fs), "ls", refuse)
    with pytest.raises(ShardStoreError) as raised:
        store.shards(RANGE)
    assert f"'renamingmemory://host/kept/f1' can't be reached: {why}. " in str(raised.value)
    assert "hunter2" not in str(raised.value)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import KINDS
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
kind = KINDS[sys.argv[1]]
kind.write(kind.open(sys.argv[3]), 1)
"""

WAITS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from conftest import KINDS
replace = Path.replace
Path.replace = lambda *paths: (print("written", flush=True), sys.stdin.readline(), replace(*paths))
kind = KINDS[sys.argv[1]]
kind.write(kind.open(sys.argv[3]), 1)
"""


def command(script, kind, root):
    return [sys.executable, "-c", script, kind.name, str(Path(__file__).parent), str(root)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", ["by the next writer", "where shards are merged"])
def test_what_a_killed_writer_left_behind_is_removed(kind, tmp_path, how, caplog):
    killed = subprocess.run(command(KILLED, kind, tmp_path), check=False, timeout=300)
    folder, store = tmp_path / "f1" / "1-1000", kind.open(tmp_path)
    assert (killed.returncode, len(names(folder)), store.shards(RANGE)) == (-9, 1, [])
    if how == "by the next writer":
        shard = kind.write(store, 2)
        assert (store.shards(RANGE), names(folder)) == ([shard], [shard.name])
    else:
        compact(store, RANGE, CompactionOptions(max_records=8))
        assert names(folder) == []
    assert "which a killed process left behind" in caplog.text


def test_what_a_living_writer_has_begun_stays_and_becomes_a_shard(kind, tmp_path):
    store = kind.open(tmp_path)
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(WAITS, kind, tmp_path), **piped) as writer:
        assert writer.stdout.readline() == "written\n"
        for path in (tmp_path / "f1" / "1-1000").iterdir():
            os.utime(path, (time.time() - TWO_HOURS, time.time() - TWO_HOURS))  # it has been stopped for long
        kind.write(store, 2)
        compact(store, RANGE, CompactionOptions(max_records=8))
        assert len(names(tmp_path / "f1" / "1-1000")) == 2
        writer.communicate("go on\n", timeout=60)
    assert writer.returncode == 0
    assert sorted(kind.read(store, shard) for shard in store.shards(RANGE)) == [[1], [2]]
    assert len(names(tmp_path / "f1" / "1-1000")) == 2


def test_leftovers_of_older_versions_and_other_machines_go_once_they_are_old(kind, tmp_path):
    folder, store = tmp_path / "f1" / "1-1000", kind.open(tmp_path)
    shard = kind.write(store, 1)
    old = [".tmp-0a1b-20260102T030405000006Z-0a.parquet", ".20260102T030405000006Z-0a-1b2c.tmp"]
    kept = [".hidden", ".nfs0001"]
    for name in (*old, *kept):
        (folder / name).write_bytes(b"half")
    compact(store, RANGE, CompactionOptions(max_records=8))
    assert names(folder) == sorted([shard.name, *old, *kept])
    for path in folder.iterdir():
        os.utime(path, (time.time() - TWO_HOURS, time.time() - TWO_HOURS))
    compact(store, RANGE, CompactionOptions(max_records=8))
    assert names(folder) == sorted([shard.name, *kept])
    assert store.shards(RANGE) == [shard]


def test_where_files_are_renamed_into_place_elsewhere_leftovers_go_once_they_are_old(kind, tmp_path):
    store = kind.open(f"renamingmemory://{tmp_path.name}/kept")
    shard = kind.write(store, 1)
    folder = shard.path.rpartition("/")[0]
    young, old = f"{folder}/{temporary_name('a')}", f"{folder}/{temporary_name('b')}"
    for path in (young, old):
        store._fs.pipe_file(path, b"half")
    store._fs.store[old].modified = datetime.now(UTC) - timedelta(hours=2)
    later = kind.write(store, 2)
    assert sorted(store._fs.ls(folder, detail=False)) == sorted([young, shard.path, later.path])
    assert store.shards(RANGE) == [shard, later]


def test_frames_of_version_0_1_0_are_read(tmp_path):
    """As 7d6dea2 wrote them: the footer, its key and the columns are typed out."""
    footer = (
        b'{"format": 1, "partition_key": "1-1000", "records": [{"record_id": 7, "content_version": "v1", '
        b'"num_frames": 2, "width_px": 320, "height_px": 180, "duration_seconds": 6.0, "partial": null}]}'
    )
    table = pa.table(
        {
            "record_id": pa.array([7, 7], pa.int64()),
            "frame_number": pa.array([0, 30], pa.int64()),
            "pts_seconds": pa.array([0.0, 1.0], pa.float64()),
            "target_seconds": pa.array([0.25, 1.25], pa.float64()),
            "jpeg": pa.array([b"one", b"two"], pa.large_binary()),
        }
    ).replace_schema_metadata({b"extraction_frames": footer})
    path = tmp_path / "3a696068d2e67d52" / "1-1000" / "20261130T064641064687Z-c7161cc2d727.parquet"
    path.parent.mkdir(parents=True)
    columns = ["record_id"]
    pq.write_table(table, path, compression="none", use_dictionary=columns, write_statistics=columns)

    store = FrameStore(str(tmp_path), "3a696068d2e67d52")
    (shard,) = store.shards(RANGE)
    record = FrameRecord(7, "v1", 2, 320, 180, 6.0, None)
    assert shard == FrameShard(path.name, str(path), path.stat().st_size, (record,))
    (video,) = store.read(shard)
    assert (video.jpegs, video.pts_seconds.tolist(), video.frame_number.tolist()) == ([b"one", b"two"], [0, 1], [0, 30])
    again = store.write_shard(RANGE, [video])
    assert pq.read_metadata(again.path).metadata[b"extraction_frames"] == footer
    assert Path(again.path).read_bytes() == path.read_bytes()


def test_vectors_of_version_0_1_0_are_read(tmp_path):
    """As above; a vector is a fixed-size binary of float16."""
    footer = (
        b'{"format_version": 1, "fingerprint": "3a69-b09d", "partition": "1-1000", '
        b'"name": "20261130T064641064687Z-c7161cc2d727.parquet", "dim": 2, "records": [[7, "v1", 2]], '
        b'"failures": [{"record_id": 9, "content_version": "v2", "stage": "embed", "error_type": '
        b'"InvalidVectorError", "message": "NaN", "permanent": true, "details": ""}]}'
    )
    vectors = [b"\x00\x3c\x00\x00", b"\x00\x00\x00\x3c"]  # (1, 0) and (0, 1)
    table = pa.table(
        {
            "record_id": pa.array([7, 7], pa.int64()),
            "frame_number": pa.array([0, 30], pa.int64()),
            "pts_seconds": pa.array([0.0, 1.0], pa.float64()),
            "vector": pa.array(vectors, pa.binary(4)),
        }
    ).replace_schema_metadata({b"extraction_dagster.embedding_shard": footer})
    path = tmp_path / "3a69-b09d" / "1-1000" / "20261130T064641064687Z-c7161cc2d727.parquet"
    path.parent.mkdir(parents=True)
    plain = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(table, path, compression="zstd", **plain)
    written = path.read_bytes()

    store = EmbeddingStore(str(tmp_path), "3a69-b09d")
    failure = Failure(9, "v2", "embed", "InvalidVectorError", "NaN", permanent=True)
    expected = EmbeddingShard(path.name, str(path), 8, (ShardRecord(7, "v1", 2),), 2, (failure,))
    assert store.shards(RANGE) == [expected]
    batch = store.read(expected)
    assert batch.vectors.tolist() == [[1, 0], [0, 1]]
    assert (batch.record_id.tolist(), batch.pts_seconds.tolist()) == ([7, 7], [0, 1])
    again = EmbeddingBatch(batch.vectors, batch.record_id, batch.frame_number, np.array([0.0, 1.0]))
    store.write(RANGE, path.name, again, records=[ShardRecord(7, "v1", 2)], failures=[failure])
    assert json.loads(pq.read_metadata(path).metadata[b"extraction_dagster.embedding_shard"]) == json.loads(footer)
    assert path.read_bytes() == written
