"""Small shards become few; the newest frames of every record stay, whenever it is killed."""

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.records import EncodedFrames, IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.shards.compaction import Compacted, CompactionOptions, compact, plan_compaction
from extraction_dagster.shards.frame_store import FrameRecord, FrameShard, FrameStore
from extraction_dagster.shards.store import Copy, by_shard, newest_copies
from extraction_dagster.stages.catalog.ledger import LedgerEntry

RANGE = IdRange(1, 1000)
AT_ONCE = CompactionOptions(max_records=8, enough_shards=2, untouched=timedelta())


def video(record_id, version="v1", frames=2):
    numbers = np.arange(frames)
    jpegs = [f"{record_id} {version} {number}".encode() for number in range(frames)]
    return EncodedFrames(
        record_id, version, jpegs, numbers / 2, numbers / 2 + 0.125, numbers * 12, 398, 224, 1.5, "half is missing"
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


def newest(store):
    """What a reader finds: each record's newest copy."""
    parts = by_shard(newest_copies(store.shards(RANGE)))
    return {read.record_id: as_plain(read) for shard, ids in parts for read in store.read(shard, only=ids)}


def done(*record_ids, state="done"):
    return {record_id: LedgerEntry(record_id, state, content_version="v1") for record_id in record_ids}


@pytest.fixture
def store(root):
    return FrameStore(root, "f1")


def write(store, *videos):
    return store.write_shard(RANGE, videos)


def records(store):
    return [[record.record_id for record in shard.records] for shard in store.shards(RANGE)]


def test_small_shards_become_one_whose_frames_are_as_they_were(store):
    for number in range(1, 7):
        write(store, video(number))
    before = newest(store)
    assert compact(store, RANGE, AT_ONCE, entries=done(*range(1, 7))) == Compacted(removed=6, written=1)
    assert records(store) == [[1, 2, 3, 4, 5, 6]]
    assert newest(store) == before


def test_of_several_copies_the_newest_stays_and_what_nobody_needs_goes(store):
    write(store, video(1), video(2))
    write(store, video(1, "v2"))
    write(store, video(3))
    write(store, video(3, "v2"))
    assert compact(store, RANGE, AT_ONCE, entries=done(1, 2, 3)) == Compacted(removed=4, written=1)
    assert {key: value[1] for key, value in newest(store).items()} == {1: "v2", 2: "v1", 3: "v2"}
    assert records(store) == [[2, 1, 3]]


def test_large_shards_stay_and_a_merged_one_holds_no_more_than_it_may(store):
    write(store, *(video(number) for number in range(100, 105)))
    for number in range(1, 11):
        write(store, video(number))
    assert compact(store, RANGE, AT_ONCE, entries=done(*range(1, 200))) == Compacted(removed=10, written=2)
    assert records(store) == [[100, 101, 102, 103, 104], [1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]


def test_what_comes_later_is_newer_than_what_was_merged(store):
    write(store, video(1))
    write(store, video(2))
    later = write(store, video(1, "v2"))
    for _ in range(2):
        compact(store, RANGE, AT_ONCE, entries=done(1, 2))
        assert newest(store)[1][1] == "v2"
    written_afterwards = write(store, video(1, "v3"))
    assert written_afterwards.name > later.name
    assert newest(store)[1][1] == "v3"
    assert [shard.name for shard in store.shards(RANGE)][-1] == written_afterwards.name


def test_doing_it_again_does_nothing(store):
    for number in range(1, 7):
        write(store, video(number))
    compact(store, RANGE, AT_ONCE, entries=done(*range(1, 7)))
    assert compact(store, RANGE, AT_ONCE, entries=done(*range(1, 7))) == Compacted()


@pytest.mark.parametrize("state", ["extracted", "embedded", "failed", "todo"])
def test_a_shard_with_a_record_that_is_under_way_is_left_alone(state, store):
    kept = write(store, video(1), video(2))
    write(store, video(3))
    write(store, video(4))
    compact(store, RANGE, AT_ONCE, entries=done(2, 3, 4) | done(1, state=state))
    assert records(store) == [[1, 2], [3, 4]]
    assert store.shards(RANGE)[0] == kept


def test_a_record_that_the_ledger_does_not_know_is_under_way(store):
    write(store, video(1))
    write(store, video(2))
    assert compact(store, RANGE, AT_ONCE, entries={}) == Compacted()


def test_young_shards_and_few_ones_are_left_alone(store):
    for number in range(1, 4):
        write(store, video(number))
    entries = done(1, 2, 3)
    hour = CompactionOptions(max_records=8, enough_shards=2)
    assert compact(store, RANGE, hour, entries=entries) == Compacted()
    four = CompactionOptions(max_records=8, enough_shards=4, untouched=timedelta())
    assert compact(store, RANGE, four, entries=entries) == Compacted()


def test_the_settings_say_how_many_videos_a_merged_shard_holds():
    assert CompactionOptions.from_settings(Settings(shard_records=10)) == CompactionOptions(10, 8, timedelta(hours=1))


def test_a_damaged_shard_is_set_aside_and_the_others_are_merged_by_the_next_compaction(tmp_path, caplog):
    store = FrameStore(str(tmp_path), "f1")
    shard = write(store, video(1))
    write(store, video(2))
    write(store, video(3))
    content = bytearray(Path(shard.path).read_bytes())
    content[4:60] = bytes(56)
    Path(shard.path).write_bytes(content)
    assert compact(store, RANGE, AT_ONCE, entries=done(1, 2, 3)) == Compacted()
    assert records(store) == [[2], [3]]
    assert "stay as they are" in caplog.text
    assert Path(shard.path).with_name(f".damaged-{shard.name}").read_bytes() == bytes(content)
    assert compact(store, RANGE, AT_ONCE, entries=done(1, 2, 3)) == Compacted(removed=2, written=1)


def test_a_shard_that_another_process_merged_meanwhile_is_left_out(tmp_path, caplog):
    store = FrameStore(str(tmp_path), "f1")
    for number in (1, 2):
        write(store, video(number))
    listed = store.shards(RANGE)
    before = newest(store)
    compact(store, RANGE, AT_ONCE, entries=done(1, 2))
    store.shards = lambda _partition: listed
    assert compact(store, RANGE, AT_ONCE, entries=done(1, 2)) == Compacted()
    assert newest(FrameStore(str(tmp_path), "f1")) == before
    assert "stay as they are" in caplog.text


def test_two_that_merge_the_same_shards_at_once_write_the_same_file(tmp_path):
    store = FrameStore(str(tmp_path), "f1")
    for number in (1, 2):
        write(store, video(number))
    before, write_shard = newest(store), store.write_shard

    def after_another(partition, videos, **fields):
        compact(FrameStore(str(tmp_path), "f1"), RANGE, AT_ONCE, entries=done(1, 2))
        return write_shard(partition, videos, **fields)

    store.write_shard = after_another
    compact(store, RANGE, AT_ONCE, entries=done(1, 2))
    assert records(store) == [[1, 2]]
    assert newest(store) == before


KILLED = """
import os, sys
from pathlib import Path
from datetime import timedelta
sys.path.insert(0, sys.argv[1])
from conftest import kill_at
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.ledger import LedgerEntry
from extraction_dagster.shards.compaction import CompactionOptions, compact
from extraction_dagster.shards.frame_store import FrameStore

root, step, number = sys.argv[2:5]
kill_at({"fsync": os, "replace": Path, "remove": FrameStore}[step], step, int(number))
entries = {n: LedgerEntry(n, "done", content_version="v1") for n in range(1, 100)}
compact(FrameStore(root, "f1"), IdRange(1, 1000), CompactionOptions(8, 2, timedelta()), entries=entries)
"""


@pytest.mark.parametrize(
    ("step", "number"),
    [("fsync", 0), ("fsync", 1), ("replace", 0), *(("remove", number) for number in range(7))],
)
def test_a_kill_at_any_moment_loses_nothing_and_the_next_one_ends_it(step, number, tmp_path, commands):
    store = FrameStore(str(tmp_path), "f1")
    write(store, video(1), video(2))
    write(store, video(1, "v2"))
    for record_id in range(3, 8):
        write(store, video(record_id))
    before = newest(store)
    killed = commands.run([sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), step, str(number)])
    assert killed.returncode == -9
    assert newest(FrameStore(str(tmp_path), "f1")) == before
    compact(store, RANGE, AT_ONCE, entries=done(*range(1, 8)))
    assert newest(store) == before
    assert records(store) == [[2, 1, 3, 4, 5, 6, 7]]


def shard(number, ids, size, claim):
    listed = tuple(FrameRecord(record_id, "v1", 1, 8, 8, None, None, claim=claim) for record_id in ids)
    return FrameShard(f"20200101T00000000{number:04d}Z-0.parquet", "", size, listed)


@given(
    st.lists(
        st.tuples(st.sets(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 2**26), st.integers(0, 3)),
        min_size=1,
        max_size=25,
    )
)
def test_no_plan_loses_a_newest_copy_or_makes_a_shard_too_large(drawn):
    shards = [shard(number, *one) for number, one in enumerate(drawn)]
    plan = plan_compaction(shards, AT_ONCE)
    touched = [one.name for group in plan.groups for one in group]
    assert len(touched) == len({*touched})
    for one in plan.superseded:
        assert one.name not in touched
        assert all(plan.newest[record.record_id].order > Copy(one, record).order for record in one.records)
    for group in plan.groups:
        assert len(group) >= 2
        assert sum(len(plan.live(one)) for one in group) <= 8
        assert sum(one.size_bytes for one in group) <= 2**26
