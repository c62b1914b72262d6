"""Small embedding shards become few, and every record keeps its newest vectors."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from extraction_dagster.records import EmbeddingBatch, Failure, IdRange
from extraction_dagster.shards.compaction import Compacted, CompactionOptions, compact
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.shards.store import ShardRecord

RANGE = IdRange(1, 1000)
AT_ONCE = CompactionOptions(max_records=8, enough_shards=2, untouched=timedelta())
FAILURE = Failure(9, "v1", "embed", "InvalidVectorError", "NaN in frame 3", permanent=True)


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(str(tmp_path), "f00d")


def write(store, *records, name=None, failures=()):
    """Write a shard of records, each with two vectors full of one value."""
    ids = np.repeat(np.array([record_id for record_id, _, _ in records], np.int64), 2)
    values = np.repeat(np.array([value for _, _, value in records], np.float16), 2)
    batch = EmbeddingBatch(
        np.tile(values[:, None], (1, 4)),
        ids,
        np.tile(np.arange(2, dtype=np.int64), len(records)),
        np.tile(np.arange(2) / 4, len(records)),
    )
    listed = [ShardRecord(record_id, version, 2) for record_id, version, _ in records]
    return store.write(RANGE, name or store.next_name(), batch, records=listed, failures=list(failures))


def test_vectors_of_merged_shards_are_as_they_were_and_older_copies_go(store):
    write(store, (1, "v1", 0.25), (2, "v1", 0.5))
    write(store, (1, "v2", 0.75), failures=[FAILURE])
    write(store, (3, "v1", 1.0))
    assert compact(store, RANGE, AT_ONCE) == Compacted(removed=3, written=1)
    (merged,) = store.shards(RANGE)
    batch = store.read(merged)
    assert merged.records == (ShardRecord(2, "v1", 2), ShardRecord(1, "v2", 2), ShardRecord(3, "v1", 2))
    assert merged.failures == (FAILURE,)
    assert batch.record_id.tolist() == [2, 2, 1, 1, 3, 3]
    assert batch.vectors.tolist() == [[value] * 4 for value in (0.5, 0.5, 0.75, 0.75, 1.0, 1.0)]
    assert batch.frame_number.tolist() == [0, 1, 0, 1, 0, 1]
    assert batch.pts_seconds.tolist() == [0.0, 0.25, 0.0, 0.25, 0.0, 0.25]
    assert compact(store, RANGE, AT_ONCE) == Compacted()


def test_a_shard_of_which_newer_ones_hold_everything_goes(store):
    write(store, *((number, "v1", 0.25) for number in range(1, 7)))
    newer = write(store, *((number, "v2", 0.5) for number in range(1, 7)))
    assert compact(store, RANGE, AT_ONCE) == Compacted(removed=1)
    assert store.shards(RANGE) == [newer]


def test_a_shard_of_failures_alone_is_no_copy_of_anything(store):
    write(store, failures=[FAILURE])
    write(store, (1, "v1", 0.5))
    compact(store, RANGE, AT_ONCE)
    (merged,) = store.shards(RANGE)
    assert (merged.records, merged.failures) == ((ShardRecord(1, "v1", 2),), (FAILURE,))


def test_young_shards_and_those_of_other_names_are_left_alone(store, tmp_path):
    write(store, (1, "v1", 0.5))
    write(store, (2, "v1", 0.5))
    assert compact(store, RANGE, CompactionOptions(max_records=8, enough_shards=2)) == Compacted()
    named = EmbeddingStore(str(tmp_path), "beef")
    write(named, (1, "v1", 0.5), name="0001-abc")
    write(named, (2, "v1", 0.5), name="0002-abc")
    assert compact(named, RANGE, AT_ONCE) == Compacted()


def test_a_damaged_shard_is_set_aside_and_the_others_are_merged_by_the_next_compaction(store, caplog):
    shard = write(store, (1, "v1", 0.5))
    write(store, (2, "v1", 0.5))
    write(store, (3, "v1", 0.5))
    content = bytearray(Path(shard.path).read_bytes())
    content[4:40] = bytes(36)
    Path(shard.path).write_bytes(content)
    assert compact(store, RANGE, AT_ONCE) == Compacted()
    assert "stay as they are" in caplog.text
    assert Path(shard.path).with_name(f".damaged-{shard.name}").read_bytes() == bytes(content)
    assert compact(store, RANGE, AT_ONCE) == Compacted(removed=2, written=1)
    assert [[record.record_id for record in kept.records] for kept in store.shards(RANGE)] == [[2, 3]]


def test_the_partitions_that_have_shards_are_known_by_name(store):
    assert store.partitions() == []
    write(store, (1, "v1", 0.5))
    assert store.partitions() == [RANGE]
