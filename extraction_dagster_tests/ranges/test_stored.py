"""What is stored is found by record and used; what is another file's, another version's or damaged is made again."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr

from extraction_dagster.errors.decode import OtherSourceError
from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.embed import embed_range
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import fingerprints_of, open_range, vectors_fingerprint
from extraction_dagster.records import EmbeddingBatch, EncodedFrames, IdRange
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.shards.store import ShardRecord, newest_copies
from extraction_dagster.stages.catalog.catalog import Catalog

WIDE, NARROW = IdRange(1, 100), IdRange(1, 2)
STEPS = (decode_range, embed_range, index_range)


def step(function, settings, id_range=WIDE, **options):
    with open_range(settings, id_range, begins=function is decode_range, **options) as work:
        return function(work).numbers


def whole(settings, id_range=WIDE, **options):
    """Every step of a range; what each did."""
    return [step(function, settings, id_range, **options) for function in STEPS]


def make_pending(settings, *record_ids):
    """As when their points were lost."""
    with open_range(settings, WIDE) as work:
        work.catalog.make_pending(list(record_ids))


def states(settings):
    with open_range(settings, WIDE) as work:
        return {record_id: entry.state for record_id, entry in work.entries().items()}


def stores(settings):
    made_with = fingerprints_of(settings)
    return (
        FrameStore(settings.resolved_frames_uri, made_with.frames),
        EmbeddingStore(settings.resolved_embeddings_uri, vectors_fingerprint(made_with)),
    )


@pytest.fixture
def copied(make_settings, clips, tmp_path, sqlite_database):
    """Settings of two good videos in a folder of the test's own, to be removed."""
    folder = Path(shutil.copytree(clips, tmp_path / "videos"))
    sqlite_database.execute("DELETE FROM insta_content WHERE id = 3")
    sqlite_database.execute("UPDATE insta_content SET path = :folder || '/' || id || '.mp4'", folder=str(folder))

    def make(**overrides):
        return make_settings(**{"keep_frames": "none", **overrides}).model_copy(
            update={"allowed_roots": (str(folder),)}
        )

    make.folder = folder
    return make


def test_lost_points_come_back_from_their_vectors_without_frames_and_without_a_file(copied):
    settings = copied()
    whole(settings)
    frames, _ = stores(settings)
    assert frames.shards(WIDE) == []
    shutil.rmtree(copied.folder)
    make_pending(settings, 1, 2)

    decoded, embedded, indexed = whole(settings)

    assert (decoded["videos"], decoded["videos_kept"], decoded["frames"]) == (0, 2, 0)
    assert (embedded["videos"], embedded["frames"], indexed["points"]) == (2, 0, 6)
    assert states(settings) == {1: "done", 2: "done"}


def test_after_ranges_were_cut_differently_nothing_is_decoded_or_embedded_again(copied):
    settings = copied(keep_frames="all")
    whole(settings)
    shutil.rmtree(copied.folder)
    make_pending(settings, 1, 2)

    decoded, embedded, indexed = whole(settings, NARROW)

    assert (decoded["videos"], decoded["videos_kept"]) == (0, 2)
    assert (embedded["videos"], embedded["frames"], indexed["points"]) == (2, 0, 6)


def test_embedding_alone_finds_the_frames_of_ranges_that_were_cut_differently(copied):
    settings = copied(keep_frames="all")
    step(decode_range, settings)
    assert step(embed_range, settings, NARROW)["frames"] == 6
    assert step(embed_range, settings, NARROW)["frames"] == 0
    assert states(settings) == {1: "embedded", 2: "embedded"}


def test_a_new_range_lists_no_other_folder(copied, monkeypatch):
    settings = copied()

    def listed(_self):
        pytest.fail("the whole root is listed")

    monkeypatch.setattr(FrameStore, "partitions", listed)
    monkeypatch.setattr(EmbeddingStore, "partitions", listed)
    whole(settings)
    assert states(settings) == {1: "done", 2: "done"}
    whole(settings)


def write_frames(store, record_id, *, partition=WIDE, number=2, **fields):
    numbers = np.arange(number)
    jpegs = [b"no jpeg"] * number
    version = fields.pop("version", "")
    seconds = numbers.astype(float)
    return store.write_shard(
        partition, [EncodedFrames(record_id, version, jpegs, seconds, seconds, numbers, 8, 8, **fields)]
    )


def write_vectors(store, record_id, *, partition=WIDE, version="", **fields):
    batch = EmbeddingBatch(np.full((1, 4), 0.5, np.float16), np.array([record_id]), np.array([0]), np.zeros(1))
    return store.write(partition, store.next_name(), batch, records=[ShardRecord(record_id, version, 1, **fields)])


@pytest.fixture
def planned(make_settings):
    """A range whose row 1 has an address and a claim, and the stores beside it."""
    with open_range(make_settings(), WIDE, begins=True) as work:

        def plan(*, address="a" * 16, claim=7, known=None, version=""):
            item = work.plan[1]
            entry = None if known is None else replace(known, content_version=version, source_version="")
            video = replace(item.row.video, address=address, claim=claim, content_version="")
            return {1: replace(item, row=replace(item.row, video=video), entry=entry)}

        yield work, plan


def entry_of(work, **fields):
    """An entry of a row whose frames and vectors of today are stored, by what the ledger says."""
    from extraction_dagster.stages.catalog.ledger import LedgerEntry  # noqa: PLC0415 - beside its use

    made_with = work.fingerprints
    known = {"frames_fingerprint": made_with.frames, "embedding_fingerprint": made_with.embedding, "claim": 7}
    return LedgerEntry(1, "todo", **{**known, **fields})


@pytest.mark.parametrize(
    ("stored", "known", "is_kept"),
    [
        ({"address": "a" * 16}, None, True),
        ({"address": "b" * 16}, None, False),
        ({"version": "v0", "address": "a" * 16}, None, False),
        ({}, None, True),
        ({}, {"address": None}, True),
        ({}, {"address": "a" * 16}, True),
        ({}, {"address": "b" * 16}, False),
        ({"address": "a" * 16}, {"address": "b" * 16}, True),
    ],
)
def test_a_copy_is_kept_when_it_is_of_the_rows_version_and_address(planned, stored, known, is_kept):
    work, plan = planned
    rows = plan(known=None if known is None else entry_of(work, **known))
    write_frames(work.frame_store, 1, **stored)
    write_vectors(work.embedding_store, 1, **stored)
    for store in (work.frame_store, work.embedding_store):
        assert (1 in work.stored(store, rows)) is is_kept


def test_only_the_newest_copy_is_kept_whatever_is_right_beside_it(planned):
    work, plan = planned
    write_frames(work.frame_store, 1, address="a" * 16, claim=6)
    write_frames(work.frame_store, 1, address="b" * 16, claim=7)
    assert work.stored(work.frame_store, plan()) == {}
    right = write_frames(work.frame_store, 1, address="a" * 16, claim=8)
    write_frames(work.frame_store, 1, address="b" * 16, claim=7)
    assert work.stored(work.frame_store, plan())[1].shard == right


def test_the_newest_copy_may_lie_in_the_folder_of_another_range(planned):
    work, plan = planned
    write_frames(work.frame_store, 1, address="a" * 16, claim=6, version="v0")
    right = write_frames(work.frame_store, 1, partition=IdRange(-5, 3), address="a" * 16, claim=7)
    write_frames(work.frame_store, 4, partition=IdRange(4, 5), address="a" * 16, claim=7)
    assert work.stored(work.frame_store, plan(known=entry_of(work)))[1].shard == right
    assert work.stored(work.frame_store, plan(known=entry_of(work, frames_fingerprint="f0"))) == {}
    assert work.stored(work.frame_store, plan(known=entry_of(work, address="b" * 16))) == {}


def test_embedding_again_counts_also_after_a_merge_and_its_vectors_stay(copied):
    from datetime import timedelta  # noqa: PLC0415 - beside its use

    from extraction_dagster.shards.compaction import CompactionOptions, compact  # noqa: PLC0415 - as above

    settings, at_once = copied(keep_frames="all"), CompactionOptions(64, enough_shards=1, untouched=timedelta())
    whole(settings)
    _, vectors = stores(settings)
    compact(vectors, WIDE, at_once)  # its name is later than the frame shard's now
    before = {copy.shard.name for copy in newest_copies(vectors.shards(WIDE)).values()}

    assert step(embed_range, settings, force=True)["frames"] == 6

    after = {copy.shard.name for copy in newest_copies(vectors.shards(WIDE)).values()}
    assert len(after) == 1
    assert after.isdisjoint(before)
    compact(vectors, WIDE, at_once)
    step(index_range, settings, force=True)
    assert max(after) <= max(copy.shard.name for copy in newest_copies(vectors.shards(WIDE)).values())


def spoil(shard, *, from_byte=4, number=60):
    path = Path(shard.path)
    content = path.read_bytes()
    path.write_bytes(content[:from_byte] + bytes(number) + content[from_byte + number :])


def test_a_damaged_frame_shard_is_set_aside_and_its_records_are_decoded_again_by_the_next_try(copied, caplog):
    settings = copied(keep_frames="all", retry_delay_seconds=0.001, shard_records=1)
    step(decode_range, settings)
    frames, _ = stores(settings)
    damaged, good = frames.shards(WIDE)
    spoil(damaged)
    (lost,) = (record.record_id for record in damaged.records)

    with caplog.at_level(logging.WARNING):
        assert step(embed_range, settings)["frames"] == good.num_frames

    assert states(settings) == {1: "embedded", 2: "embedded", lost: "failed"}
    assert f"Set aside {damaged.path} as .damaged-{damaged.name}" in caplog.text
    assert frames.shards(WIDE) == [good]
    decoded, embedded, _ = whole(settings)
    assert (decoded["videos"], embedded["frames"]) == (1, 3)
    assert states(settings) == {1: "done", 2: "done"}


def test_one_stored_picture_that_is_no_jpeg_is_not_taken_from_the_store_again(copied):
    settings = copied(keep_frames="all", retry_delay_seconds=0.001)
    step(decode_range, settings)
    frames, _ = stores(settings)
    (shard,) = frames.shards(WIDE)
    broken = [
        replace(video, jpegs=[b"no jpeg", *video.jpegs[1:]]) if video.record_id == 1 else video
        for video in frames.read(shard)
    ]
    frames.remove(shard)
    frames.write_shard(WIDE, broken)

    assert step(embed_range, settings)["frames"] == 3

    assert states(settings) == {1: "failed", 2: "embedded"}
    assert newest_copies(frames.shards(WIDE)).keys() == {2}
    decoded, _, indexed = whole(settings)
    assert (decoded["videos"], indexed["points"]) == (1, 6)
    assert states(settings) == {1: "done", 2: "done"}


def test_the_number_of_frames_of_a_kept_video_is_what_is_stored(copied):
    one, other = copied(keep_frames="all"), copied(keep_frames="all", fps=0.5)
    whole(one)
    whole(other)
    step(decode_range, one)
    with open_range(one, WIDE) as work:
        found = {key: (entry.num_frames, entry.frames_fingerprint) for key, entry in work.entries().items()}
        assert found == dict.fromkeys((1, 2), (3, work.fingerprints.frames))


def test_frames_of_former_settings_go_with_the_run_that_is_done_with_todays(copied):
    one, other = copied(keep_frames="all"), copied(keep_frames="none", fps=0.5)
    whole(one)
    whole(other)
    assert [len(store.shards(WIDE)) for store in (*stores(one), *stores(other))] == [0, 0, 0, 1]


def test_a_home_of_another_source_is_refused_before_anything_is_planned(copied, sqlite_database, monkeypatch):
    settings = copied()
    whole(settings)
    marks = "is_extracted BOOLEAN, is_embedded BOOLEAN"
    sqlite_database.execute(
        f"CREATE TABLE other (id INTEGER PRIMARY KEY, platform TEXT, code TEXT, path TEXT, {marks})"
    )
    state = SecretStr(f"sqlite:///{settings.home}/other.db")
    other = settings.model_copy(update={"source_table": "other", "state_url": state})

    def begun(*_, **__):
        pytest.fail("something was planned")

    monkeypatch.setattr(Catalog, "begin", begun)
    with pytest.raises(OtherSourceError, match="belong to table 'insta_content'"):
        step(decode_range, other)


def as_of_an_earlier_release(settings, sqlite_database):
    """What is stored of the rows says no address and no claim, nor does the ledger."""
    frames, vectors = stores(settings)
    for shard in frames.shards(WIDE):
        frames.write_shard(WIDE, [replace(video, address="", claim=0) for video in frames.read(shard)], name=shard.name)
    for shard in vectors.shards(WIDE):
        records = [replace(record, address="", claim=0) for record in shard.records]
        vectors.write(WIDE, shard.name, vectors.read(shard), records=records)
    sqlite_database.execute("UPDATE extraction_ledger SET claim = 0, address = NULL")


def test_after_an_upgrade_what_is_stored_is_used(copied, sqlite_database):
    settings = copied(keep_frames="all")
    whole(settings)
    as_of_an_earlier_release(settings, sqlite_database)
    shutil.rmtree(copied.folder)
    make_pending(settings, 1, 2)
    decoded, embedded, indexed = whole(settings)
    assert (decoded["videos_kept"], embedded["frames"], indexed["points"]) == (2, 0, 6)


def test_after_an_upgrade_another_file_gets_frames_and_vectors_of_its_own(copied, sqlite_database):
    """Its vectors of before say no address, and its ledger's entry says the new one once it is decoded."""
    settings = copied(keep_frames="all")
    whole(settings)
    as_of_an_earlier_release(settings, sqlite_database)
    make_pending(settings, 1)
    step(decode_range, settings)  # the entry takes the present address over
    sqlite_database.execute("UPDATE insta_content SET path = :path WHERE id = 1", path=str(copied.folder / "2.mp4"))
    decoded, embedded, indexed = whole(settings)
    assert (decoded["videos"], decoded["videos_kept"]) == (1, 0)
    assert (embedded["videos"], embedded["frames"], indexed["points"]) == (1, 3, 3)
    assert states(settings) == {1: "done", 2: "done"}


def test_a_damaged_embedding_shard_is_set_aside_and_its_vectors_are_made_again_by_the_next_tries(copied, caplog):
    settings = copied(keep_frames="all", retry_delay_seconds=0.001)
    step(decode_range, settings)
    step(embed_range, settings)
    _, vectors = stores(settings)
    (damaged,) = vectors.shards(WIDE)
    spoil(damaged)

    assert step(index_range, settings)["points"] == 0

    assert f"Set aside {damaged.path} as .damaged-{damaged.name}" in caplog.text
    assert vectors.shards(WIDE) == []
    decoded, embedded, indexed = whole(settings)
    assert (decoded["videos"], embedded["frames"], indexed["points"]) == (0, 6, 6)
    assert states(settings) == {1: "done", 2: "done"}
