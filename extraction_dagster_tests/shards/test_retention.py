"""Which shards go: those that no record needs, and none before its time."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from extraction_dagster.records import EmbeddingBatch, EncodedFrames, IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.shards.retention import Removed, keep_time, prune_former, prune_frames
from extraction_dagster.shards.store import ShardRecord, new_name, written_at
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.ledger import LedgerEntry

RANGE, TODAY = IdRange(1, 10), Fingerprints(frames="f1", embedding="e1")
DAY = timedelta(days=1)
AT_ONCE = timedelta()


def video(record_id, version="v1"):
    zero = np.zeros(1)
    return EncodedFrames(record_id, version, [b"jpeg"], zero, zero, np.zeros(1, np.int64), 8, 8)


def entry(record_id, state="done", *, version="v1", frames="f1", embedding="e1"):
    return LedgerEntry(
        record_id, state, content_version=version, frames_fingerprint=frames, embedding_fingerprint=embedding
    )


@pytest.fixture
def store(root):
    return FrameStore(root, "f1")


def prune(store, *entries, keep=AT_ONCE, later=AT_ONCE):
    known = {one.record_id: one for one in entries}
    return prune_frames(store, RANGE, known, TODAY, keep=keep, now=datetime.now(UTC) + later).shards


def test_a_shard_goes_once_all_its_records_are_done_or_parked(store):
    shard = store.write_shard(RANGE, [video(1), video(2)])
    assert prune(store, entry(1), entry(2, "embedded")) == 0
    assert store.shards(RANGE) == [shard]
    entries = {1: entry(1), 2: entry(2, "parked")}
    assert prune_frames(store, RANGE, entries, TODAY, keep=AT_ONCE) == Removed(1, 2, shard.size_bytes)
    assert store.shards(RANGE) == []


@pytest.mark.parametrize("state", ["extracted", "embedded", "failed", "todo"])
def test_a_record_that_is_under_way_keeps_its_shard_for_ever(store, state):
    store.write_shard(RANGE, [video(1)])
    assert prune(store, entry(1, state), later=1000 * DAY) == 0


@pytest.mark.parametrize("made_with", [{"frames": "f0"}, {"embedding": "e0"}])
def test_done_with_other_settings_is_not_done(store, made_with):
    store.write_shard(RANGE, [video(1)])
    assert prune(store, entry(1, **made_with), later=1000 * DAY) == 0


def test_days_count_from_when_a_shard_was_written(store):
    store.write_shard(RANGE, [video(1)])
    assert prune(store, entry(1), keep=3 * DAY, later=2.9 * DAY) == 0
    assert prune(store, entry(1), keep=3 * DAY, later=3 * DAY) == 1


def test_a_record_that_the_ledger_does_not_know_yet_keeps_its_shard_for_a_day(store):
    store.write_shard(RANGE, [video(1)])
    assert prune(store, later=0.9 * DAY) == 0
    assert prune(store, later=DAY) == 1


def test_a_version_that_the_ledger_does_not_know_yet_keeps_its_shard_for_a_day(store):
    store.write_shard(RANGE, [video(1, version="v2")])
    assert prune(store, entry(1, version="v1"), later=0.9 * DAY) == 0
    assert prune(store, entry(1, "failed", version="v3"), later=DAY) == 1


def test_what_a_newer_shard_holds_goes_and_the_newer_one_stays(store):
    store.write_shard(RANGE, [video(1)])
    newer = store.write_shard(RANGE, [video(1, version="v2")])
    assert prune(store, entry(1, "extracted", version="v2")) == 1
    assert store.shards(RANGE) == [newer]


def test_the_time_is_read_off_the_name(store):
    shard = store.write_shard(RANGE, [video(1)])
    assert abs(written_at(shard.name) - datetime.now(UTC)) < timedelta(minutes=5)


@pytest.mark.parametrize(("setting", "time"), [("all", None), ("none", AT_ONCE), ("30", 30 * DAY)])
def test_the_setting_is_all_none_or_days(setting, time):
    assert keep_time(Settings(keep_frames=setting).keep_frames) == time


@pytest.mark.parametrize("setting", ["0", "-1", "some", "1.5", "100000"])
def test_any_other_setting_is_refused(setting):
    with pytest.raises(ValueError, match="keep_frames"):
        Settings(keep_frames=setting)


def former(store, *entries, keep=AT_ONCE, later=AT_ONCE):
    known = {one.record_id: one for one in entries}
    return prune_former(store, RANGE, known, TODAY, keep=keep, now=datetime.now(UTC) + later).shards


def test_frames_of_former_settings_go_once_their_records_are_done_with_todays(store, root):
    other = FrameStore(root, "f0")
    other.write_shard(RANGE, [video(1), video(2)])
    elsewhere = other.write_shard(IdRange(11, 20), [video(11)])
    today = store.write_shard(RANGE, [video(1)])
    assert former(store, entry(1), entry(2, frames="f0")) == 0
    assert former(store, entry(1), entry(2, "extracted")) == 0
    assert former(store, entry(1), entry(2, version="v9")) == 1
    assert (store.shards(RANGE), other.shards(RANGE)) == ([today], [])
    assert other.shards(IdRange(11, 20)) == [elsewhere]


def test_frames_of_former_settings_stay_as_long_as_others(store, root):
    FrameStore(root, "f0").write_shard(RANGE, [video(1)])
    assert former(store, entry(1), keep=3 * DAY, later=2.9 * DAY) == 0
    assert former(store, keep=AT_ONCE, later=0.9 * DAY) == 0
    assert former(store, entry(1), keep=3 * DAY, later=3 * DAY) == 1


def test_vectors_of_former_frames_go_and_those_of_another_model_stay(root):
    stores = {name: EmbeddingStore(root, name) for name in ("f1-e1", "f1-e0", "f0-e1")}
    for number, one in enumerate(stores.values()):
        zeros = np.zeros(1)
        batch = EmbeddingBatch(np.ones((1, 4), np.float16), np.array([1]), np.array([0]), zeros)
        one.write(RANGE, new_name(), batch, records=[ShardRecord(1, "v1", 1, claim=number)])
    assert former(stores["f1-e1"], entry(1)) == 1
    assert [len(one.shards(RANGE)) for one in stores.values()] == [1, 1, 0]


def test_no_empty_folder_of_former_settings_is_left_on_a_disk(tmp_path):
    FrameStore(str(tmp_path), "f0").write_shard(RANGE, [video(1)])
    assert former(FrameStore(str(tmp_path), "f1"), entry(1)) == 1
    assert list(tmp_path.iterdir()) == []


def test_another_address_than_the_ledgers_is_unknown_for_a_day(store):
    store.write_shard(RANGE, [replace(video(1), address="a" * 16)])
    moved = replace(entry(1), address="b" * 16)
    assert prune(store, moved, later=0.9 * DAY) == 0
    assert prune(store, moved, later=DAY) == 1
