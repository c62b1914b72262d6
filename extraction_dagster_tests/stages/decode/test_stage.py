import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from extraction_dagster.records import IdRange, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.shards.compaction import Compacted, CompactionOptions, compact
from extraction_dagster.shards.frame_export import export_frames
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.shards.retention import prune_frames
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.ledger import LedgerEntry
from extraction_dagster.stages.decode import stage
from extraction_dagster.stages.decode.stage import decode_rows

RANGE = IdRange(1, 100)


@pytest.fixture
def settings(tmp_path, clip_path, monkeypatch):
    monkeypatch.setattr(stage, "_MAX_SHARD_SECONDS", 3600)
    root = Path(clip_path("h264")).parent.parent
    return Settings(home=tmp_path, allowed_roots=(str(root),), decode_workers=2, fps=2.0)


@pytest.fixture
def store(settings):
    return FrameStore(settings.resolved_frames_uri, "f1")


def rows(clip_path, count=5):
    return [VideoRow(number, str(clip_path("h264")), content_version=f"v{number}") for number in range(1, count + 1)]


def landed_ids(store):
    return sorted(record.record_id for shard in store.shards(RANGE) for record in shard.records)


def test_every_row_lands_once_with_frames_or_a_failure(clip_path, settings, store):
    root = Path(settings.allowed_roots[0])
    (root / "broken.mp4").write_bytes(clip_path("h264").read_bytes()[:900])
    work = [
        *rows(clip_path, 2),
        VideoRow(3, str(root / "broken.mp4"), content_version="v3"),
        VideoRow(4, str(root / "missing.mp4")),
        VideoRow(5, str(root.parent / "elsewhere.mp4")),
        VideoRow(6, "https://example.com/video.mp4"),
        VideoRow(7, "ftp://example.com/video.mp4"),
    ]
    landed = list(decode_rows(work, store=store, partition=RANGE, settings=settings))
    (with_frames,) = [item for item in landed if item.shard is not None]
    assert with_frames.shard == store.shards(RANGE)[0]
    assert with_frames.num_videos == 2
    assert (with_frames.num_frames, with_frames.num_bytes) == (8, with_frames.shard.size_bytes)
    assert sum(item.cpu_seconds for item in landed) > 0
    failures = [failure for item in landed for failure in item.failures]
    assert len(failures) == 5
    facts = {f.record_id: (f.stage, f.error_type, f.permanent, f.content_version) for f in failures}
    assert facts == {
        3: ("decode", "VideoOpenError", False, "v3"),
        4: ("fetch", "FileUnavailableError", False, ""),
        5: ("fetch", "FileForbiddenError", True, ""),
        6: ("fetch", "AddressForbiddenError", True, ""),
        7: ("fetch", "SchemeError", True, ""),
    }
    assert all(f.message.startswith(f"Record {f.record_id}: ") for f in failures)


def test_a_broken_object_is_named_by_its_address_and_not_by_the_file_of_the_cache(clip_path, settings, store, s3_root):
    import s3fs  # noqa: PLC0415 - lazy: slow to import

    bucket, broken = s3fs.S3FileSystem(skip_instance_cache=True), clip_path("h264").read_bytes()[:900]
    name = s3_root.removeprefix("s3://")
    bucket.call_s3("put_bucket_versioning", Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    keys = ["part #1.mp4", "what?.mp4", "50% off.mp4", "a%20b.mp4", "a b/ü'.mp4"]
    for key in keys:
        bucket.pipe_file(f"{name}/{key}", broken)
    older = bucket.call_s3("put_object", Bucket=name, Key="v?.mp4", Body=broken)["VersionId"]
    bucket.call_s3("put_object", Bucket=name, Key="v?.mp4", Body=clip_path("h264").read_bytes())
    keys += [f"v?.mp4?versionId={older}"]
    work = [VideoRow(number, f"{s3_root}/{key}") for number, key in enumerate(keys, 1)]
    home = settings.home / "it's \\ here"  # which Python quotes otherwise
    chosen = settings.model_copy(update={"allowed_buckets": (s3_root,), "home": home})
    landed = list(decode_rows(work, store=store, partition=RANGE, settings=chosen))
    failures = {failure.record_id: failure for item in landed for failure in item.failures}
    assert {failure.error_type for failure in failures.values()} == {"VideoOpenError"}
    assert sorted(failures) == list(range(1, len(keys) + 1))
    for number, key in enumerate(keys, 1):
        assert f"{s3_root}/{key}" in failures[number].message
        assert "cache" not in failures[number].message + failures[number].details


def test_the_stored_frames_are_those_shown_at_the_sampled_times(clip_path, settings, store):
    landed = list(decode_rows(rows(clip_path, 1), store=store, partition=RANGE, settings=settings))
    stored = next(store.read(landed[0].shard))
    assert (stored.record_id, stored.content_version) == (1, "v1")
    assert stored.target_seconds.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert stored.frame_number.tolist() == [0, 12, 24, 36]
    assert (stored.width_px, stored.height_px, stored.duration_seconds, stored.partial) == (160, 112, 2.0, None)


def test_frames_live_in_a_bucket_until_nobody_needs_them(clip_path, settings, s3_root, tmp_path):
    store = FrameStore(f"{s3_root}/frames", "f1")
    small = settings.model_copy(update={"shard_records": 1})
    list(decode_rows(rows(clip_path, 3), store=store, partition=RANGE, settings=small))
    assert (len(store.shards(RANGE)), landed_ids(store)) == (3, [1, 2, 3])
    done = {
        number: LedgerEntry(
            number, "done", content_version=f"v{number}", frames_fingerprint="f1", embedding_fingerprint="e1"
        )
        for number in (1, 2, 3)
    }
    at_once = CompactionOptions(max_records=64, enough_shards=2, untouched=timedelta())
    assert compact(store, RANGE, at_once, entries=done) == Compacted(removed=3, written=1)
    assert (len(store.shards(RANGE)), landed_ids(store)) == (1, [1, 2, 3])
    assert export_frames(store, RANGE, tmp_path / "out") == (3, 12)
    assert (tmp_path / "out" / "3" / "00000036.jpg").read_bytes()[:2] == b"\xff\xd8"
    removed = prune_frames(store, RANGE, done, Fingerprints(frames="f1", embedding="e1"), keep=timedelta())
    assert (removed.shards, removed.records) == (1, 3)
    assert FrameStore(f"{s3_root}/frames", "f1").partitions() == []


def test_the_settings_choose_the_sampling_and_the_steps(clip_path, settings, store):
    steps = {"reject_solid": True, "solid_deviation": 200.0, "min_frames": 3}
    chosen = settings.model_copy(update={"sampling": "uniform", "num_frames": 8, **steps})
    landed = list(decode_rows(rows(clip_path, 1), store=store, partition=RANGE, settings=chosen))
    stored = next(store.read(landed[0].shard))
    assert len(stored.frame_number) == 3  # of eight; the rest is taken for solid
    assert set(stored.frame_number.tolist()) < {3, 9, 15, 21, 27, 33, 39, 45}


def test_a_shard_lands_once_it_holds_its_share_of_videos(clip_path, settings, store):
    few = settings.model_copy(update={"shard_records": 2})
    landed = list(decode_rows(rows(clip_path), store=store, partition=RANGE, settings=few))
    assert [shard.num_videos for shard in landed] == [2, 2, 1]
    assert landed_ids(store) == [1, 2, 3, 4, 5]


def test_a_shard_lands_once_its_first_video_is_old_enough(clip_path, settings, store, monkeypatch):
    monkeypatch.setattr(stage, "_MAX_SHARD_SECONDS", 1e-9)
    landed = list(decode_rows(rows(clip_path, 3), store=store, partition=RANGE, settings=settings))
    assert [shard.num_videos for shard in landed] == [1, 1, 1]


def test_rows_that_all_fail_give_failures_without_a_shard(settings, store):
    landed = list(decode_rows([VideoRow(1, "no.mp4")], store=store, partition=RANGE, settings=settings))
    assert [(shard.shard, shard.num_videos, len(shard.failures)) for shard in landed] == [(None, 0, 1)]
    assert store.shards(RANGE) == []


def test_no_rows_give_nothing(settings, store):
    assert list(decode_rows([], store=store, partition=RANGE, settings=settings)) == []


def test_an_interruption_yields_the_finished_videos_then_goes_on(clip_path, settings, store):
    def interrupted():
        yield from rows(clip_path, 3)
        raise KeyboardInterrupt

    landed = []
    outcomes = decode_rows(interrupted(), store=store, partition=RANGE, settings=settings)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        landed.extend(outcomes)
    done = sorted(record.record_id for shard in landed for record in shard.shard.records)
    assert len(done) >= 1
    assert done == landed_ids(store)


def test_closing_early_has_reported_everything_that_is_stored(clip_path, settings, store):
    drawn = []

    def watched():
        for row in rows(clip_path, 50):
            drawn.append(row.record_id)
            yield row

    few = settings.model_copy(update={"shard_records": 2})
    outcomes = decode_rows(watched(), store=store, partition=RANGE, settings=few)
    reported = [record.record_id for record in next(outcomes).shard.records]
    outcomes.close()
    assert sorted(reported) == landed_ids(store)
    assert len(drawn) <= 5


def test_closing_where_only_failures_were_reported_keeps_the_finished_videos(clip_path, settings, store, monkeypatch):
    monkeypatch.setattr(stage, "_FAILURE_SECONDS", 0.0)
    work = [*rows(clip_path, 1), VideoRow(2, "no.mp4"), VideoRow(3, "no.mp4")]
    one_by_one = settings.model_copy(update={"decode_workers": 1})
    outcomes = decode_rows(work, store=store, partition=RANGE, settings=one_by_one)
    first = next(outcomes)
    assert (first.shard, [failure.record_id for failure in first.failures]) == (None, [2])
    assert landed_ids(store) == []
    outcomes.close()
    assert landed_ids(store) == [1]


def test_a_store_that_refuses_is_an_error_and_the_rows_stay_to_be_done(clip_path, settings, tmp_path):
    (tmp_path / "frames").write_text("in the way")
    store = FrameStore(settings.resolved_frames_uri, "f1")
    landed = []
    work = [*rows(clip_path, 1), VideoRow(2, "no.mp4")]
    with pytest.raises(OSError, match="Not a directory"):
        landed.extend(decode_rows(work, store=store, partition=RANGE, settings=settings))
    assert [(item.shard, failure.record_id) for item in landed for failure in item.failures] == [(None, 2)]


KILLED = """
import sys
from pathlib import Path
from extraction_dagster.records import IdRange, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.ledger import LedgerEntry
from extraction_dagster.shards.compaction import Compacted, CompactionOptions, compact
from extraction_dagster.shards.frame_export import export_frames
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.stages.decode import stage
from extraction_dagster.shards.retention import prune_frames
from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.stage import decode_rows
home, clip = sys.argv[1:]
settings = Settings(home=home, allowed_roots=(str(Path(clip).parent),), decode_workers=2, shard_records=2)
store = FrameStore(settings.resolved_frames_uri, "f1")
rows = (VideoRow(number, clip) for number in range(1, 101))
for landed in decode_rows(rows, store=store, partition=IdRange(1, 100), settings=settings):
    print(*[record.record_id for record in landed.shard.records], flush=True)
"""


def test_a_kill_leaves_whole_shards_only(clip_path, tmp_path, store, no_longer_than_minutes):
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(clip_path("h264"))]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment, cwd=tmp_path) as process:
        no_longer_than_minutes(process)
        said = [process.stdout.readline() for _ in range(3)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
    reported = {int(number) for line in said for number in line.split()}
    assert len(reported) >= 6
    assert reported <= set(landed_ids(store))
    assert all(len(list(store.read(shard))) == 2 for shard in store.shards(RANGE))


def test_a_landed_shard_carries_the_middle_frame_of_its_videos(clip_path, settings, store):
    (landed,) = decode_rows(rows(clip_path, 2), store=store, partition=RANGE, settings=settings)
    middles = {video.record_id: (float(video.pts_seconds[2]), video.jpegs[2]) for video in store.read(landed.shard)}
    assert {item.record_id: (item.pts_seconds, item.jpeg) for item in landed.previews} == middles
    assert landed.num_frames == 8


def test_frames_are_stored_with_the_address_and_the_claim_of_their_row(clip_path, settings, store):
    work = [VideoRow(1, str(clip_path("h264")), content_version="v1", address="a" * 16, claim=7)]
    list(decode_rows(work, store=store, partition=RANGE, settings=settings))
    ((record,),) = (shard.records for shard in store.shards(RANGE))
    assert (record.content_version, record.address, record.claim) == ("v1", "a" * 16, 7)
