from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extraction_dagster.errors.decode import EmbeddingShardError
from extraction_dagster.records import EmbeddingBatch, Failure, IdRange
from extraction_dagster.shards.compaction import CompactionOptions, compact
from extraction_dagster.shards.embedding_store import EmbeddingShard, EmbeddingStore
from extraction_dagster.shards.store import ShardRecord

RANGE = IdRange(-5, 20)
FAILURE = Failure(9, "v2", "embed", "InvalidVectorError", "NaN in frame 3", permanent=False, details="more")


def _batch(*counts):
    ids = np.repeat(np.array([record_id for record_id, _ in counts], np.int64), [count for _, count in counts])
    total = len(ids)
    return EmbeddingBatch(
        vectors=np.arange(total * 6, dtype=np.float16).reshape(total, 6) / 64,
        record_id=ids,
        frame_number=np.arange(total, dtype=np.int64) * 30,
        pts_seconds=np.arange(total, dtype=np.float64) / 4,
    )


def _write(store, name="0001-abc", partition=RANGE):
    return store.write(
        partition,
        name,
        _batch((7, 2), (-3, 3)),
        records=[ShardRecord(7, "v1", 2), ShardRecord(-3, "", 3)],
        failures=[FAILURE],
    )


def test_what_is_written_is_listed_from_the_footer_and_read_back(any_root):
    written = _write(EmbeddingStore(any_root, "f00d"))

    store = EmbeddingStore(any_root, "f00d")
    (shard,) = store.shards(RANGE)
    batch = store.read(shard)

    assert shard == written
    assert shard == EmbeddingShard(
        name="0001-abc",
        path=shard.path,
        size_bytes=60,
        dim=6,
        records=(ShardRecord(7, "v1", 2), ShardRecord(-3, "", 3)),
        failures=(FAILURE,),
    )
    assert shard.path.endswith("/f00d/-5-20/0001-abc.parquet")
    assert shard.num_frames == 5
    assert batch.record_id.tolist() == [7, 7, -3, -3, -3]
    assert batch.frame_number.tolist() == [0, 30, 60, 90, 120]
    assert batch.pts_seconds.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert batch.vectors[4].tolist() == [24 / 64, 25 / 64, 26 / 64, 27 / 64, 28 / 64, 29 / 64]


def test_the_file_is_called_as_its_frame_shard_is(tmp_path):
    store = EmbeddingStore(str(tmp_path), "f00d")

    shard = _write(store, "20260101T000000Z-0a1b.parquet")

    assert Path(shard.path) == tmp_path / "f00d" / "-5-20" / "20260101T000000Z-0a1b.parquet"
    assert store.shards(RANGE) == [shard]
    assert shard.name == "20260101T000000Z-0a1b.parquet"


def test_a_shard_of_failures_only_has_no_vectors(any_root):
    store = EmbeddingStore(any_root, "f00d")
    store.write(RANGE, "0001", _batch(), records=[], failures=[FAILURE])

    (shard,) = store.shards(RANGE)

    assert (shard.num_frames, shard.records, shard.failures) == (0, (), (FAILURE,))
    assert store.read(shard).vectors.shape == (0, 6)


def test_a_second_write_of_a_name_replaces_the_first(any_root):
    store = EmbeddingStore(any_root, "f00d")
    _write(store)
    store.write(RANGE, "0001-abc", _batch((7, 1)), records=[ShardRecord(7, "v2", 1)])

    (shard,) = store.shards(RANGE)

    assert shard.records == (ShardRecord(7, "v2", 1),)
    assert store.read(shard).record_id.tolist() == [7]


def test_shards_are_kept_apart_by_fingerprint_and_partition_and_come_by_name(any_root):
    store = EmbeddingStore(any_root, "f00d")
    for name in ("0003", "0001", "0002"):
        _write(store, name)
    _write(store, "0009", IdRange(21, 30))
    _write(EmbeddingStore(any_root, "beef"), "0008")

    assert [shard.name for shard in store.shards(RANGE)] == ["0001", "0002", "0003"]
    assert [shard.name for shard in store.shards(IdRange(21, 30))] == ["0009"]
    assert store.shards(IdRange(31, 40)) == []
    assert [shard.name for shard in EmbeddingStore(any_root, "beef").shards(RANGE)] == ["0008"]


def test_a_file_cut_anywhere_is_no_shard(tmp_path):
    store = EmbeddingStore(str(tmp_path), "f00d")
    path = Path(_write(store).path)
    whole = path.read_bytes()

    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert store.shards(RANGE) == []


def test_foreign_files_are_no_shards_and_are_named_in_the_log(tmp_path, caplog):
    store = EmbeddingStore(str(tmp_path), "f00d")
    mine = Path(_write(store).path)
    table = pa.table({"a": [1]})
    pq.write_table(table, mine.with_name("plain.parquet"))
    pq.write_table(
        table.replace_schema_metadata({b"extraction_dagster.embedding_shard": b"[1]"}), mine.with_name("list.parquet")
    )
    pq.write_table(
        table.replace_schema_metadata({b"extraction_dagster.embedding_shard": b"{no json"}),
        mine.with_name("broken.parquet"),
    )
    mine.with_name("text.parquet").write_text("PAR1 is how Parquet ends: xxxxPAR1")
    mine.with_name("notes.txt").write_text("hello")
    other_range, other_model = mine.parents[1] / "21-30", tmp_path / "beef" / "-5-20"
    for folder in (other_range, other_model):
        folder.mkdir(parents=True)
        (folder / mine.name).write_bytes(mine.read_bytes())

    assert [shard.name for shard in store.shards(RANGE)] == ["0001-abc"]
    assert store.shards(IdRange(21, 30)) == []
    assert EmbeddingStore(str(tmp_path), "beef").shards(RANGE) == []
    for name in ("plain", "list", "broken", "text"):
        assert f"{name}.parquet: it is no whole embedding shard of range -5-20" in caplog.text
    assert "'fingerprint': 'f00d', 'partition': '-5-20'}, expected {'format_version': 1, 'fingerprint': 'f00d', " in (
        caplog.text
    )
    assert "'fingerprint': 'f00d', 'partition': '-5-20'}, expected {'format_version': 1, 'fingerprint': 'beef', " in (
        caplog.text
    )


def test_a_footer_longer_than_one_read_is_read_whole(tmp_path):
    store = EmbeddingStore(str(tmp_path), "f00d")
    failures = [Failure(n, "v", "embed", "InvalidVectorError", "x" * 200) for n in range(1000)]
    store.write(RANGE, "0001", _batch((7, 2)), records=[ShardRecord(7, "v1", 2)], failures=failures)

    (shard,) = store.shards(RANGE)

    assert shard.failures == tuple(failures)


def test_a_shard_that_vanished_or_was_damaged_since_it_was_listed_is_an_error_with_the_fix(tmp_path):
    store = EmbeddingStore(str(tmp_path), "f00d")
    shard = _write(store)
    whole = Path(shard.path).read_bytes()

    vectors = whole.index(b"\x28\xb5\x2f\xfd", whole.index(b"\x28\xb5\x2f\xfd") + 1)  # a later column's zstd frame
    flipped = bytearray(whole)
    flipped[vectors + 12] ^= 1
    Path(shard.path).write_bytes(flipped)
    with pytest.raises(
        EmbeddingShardError, match=r"0001-abc\.parquet' can't be read: .*sets it aside and makes them again"
    ):
        store.read(shard)
    Path(shard.path).unlink()
    with pytest.raises(EmbeddingShardError, match="got FileNotFoundError"):
        store.read(shard)


def test_a_name_can_not_lead_out_of_the_folder(tmp_path):
    store = EmbeddingStore(str(tmp_path), "f00d")

    for name in ("../0001", "a/b", ".hidden"):
        with pytest.raises(EmbeddingShardError, match="expected a plain file name"):
            _write(store, name)


DIE = """
import os, signal, sys
import numpy as np
from pathlib import Path
from extraction_dagster.records import EmbeddingBatch, IdRange
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.shards.store import ShardRecord

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

point = sys.argv[2]
if point == "half written":
    write = Path.write_bytes
    Path.write_bytes = lambda path, data: (write(path, data[: len(data) // 2]), die())
elif point == "before the rename":
    os.replace = die
elif point == "after the rename":
    replace = os.replace
    os.replace = lambda *paths: (replace(*paths), die())
n = 50
batch = EmbeddingBatch(np.ones((n, 64), np.float16), np.full(n, 7), np.arange(n), np.arange(n) / 1.0)
EmbeddingStore(sys.argv[1], "f00d").write(IdRange(1, 9), "0001", batch, records=[ShardRecord(7, "v", n)])
"""


@pytest.mark.parametrize(
    ("point", "names"), [("half written", []), ("before the rename", []), ("after the rename", ["0001"])]
)
def test_a_writer_killed_at_any_point_leaves_a_whole_shard_or_none(tmp_path, point, names):
    killed = subprocess.run([sys.executable, "-c", DIE, str(tmp_path), point], check=False, timeout=300)
    store = EmbeddingStore(str(tmp_path), "f00d")

    assert killed.returncode == -9
    assert [shard.name for shard in store.shards(IdRange(1, 9))] == names
    assert [len(store.read(shard)) for shard in store.shards(IdRange(1, 9))] == [50] * len(names)
    assert len(list((tmp_path / "f00d" / "1-9").iterdir())) == 1  # the shard, or what was left of it
    compact(store, IdRange(1, 9), CompactionOptions(max_records=8))
    assert [path.name for path in (tmp_path / "f00d" / "1-9").iterdir()] == [f"{name}.parquet" for name in names]


def test_a_write_that_fails_leaves_no_temporary_file_and_keeps_the_old_shard(tmp_path, monkeypatch):
    store = EmbeddingStore(str(tmp_path), "f00d")
    shard = _write(store)

    def disk_full(_):
        message = "No space left on device"
        raise OSError(message)

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        store.write(RANGE, "0001-abc", _batch((7, 1)), records=[ShardRecord(7, "v2", 1)])

    assert [path.name for path in Path(shard.path).parent.iterdir()] == ["0001-abc.parquet"]
    assert store.shards(RANGE) == [shard]
