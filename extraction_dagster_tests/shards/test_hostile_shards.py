"""Shards that somebody else wrote: nothing escapes, no memory is lost, no good record is lost."""

import io
import json
import random
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg

from extraction_dagster.errors.decode import EmbeddingShardError, FrameShardError, ShardError
from extraction_dagster.media import jpeg_size_px, stored_jpeg_fault
from extraction_dagster.records import EmbeddingBatch, EncodedFrames, IdRange
from extraction_dagster.shards.checked_parquet import CheckedParquet, Layout
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.shards.store import ShardRecord

RANGE = IdRange(1, 1000)
RNG = np.random.default_rng(7)
PICTURES = [
    simplejpeg.encode_jpeg(RNG.integers(0, 256, (16, 24, 3), np.uint8), quality=95, colorsubsampling="444")
    for _ in range(4)
]


def video(record_id, count=3):
    numbers = np.arange(count)
    jpegs = [PICTURES[(record_id + number) % 4] for number in range(count)]
    return EncodedFrames(record_id, f"v{record_id}", jpegs, numbers / 2, numbers / 2, numbers * 15, 24, 16, 3.0)


def frames_of(root):
    store = FrameStore(str(root / "frames"), "f1")
    return store, store.write_shard(RANGE, [video(number) for number in (1, 2, 3)])


def batch_of(*record_ids, dim=8, count=2):
    ids = np.repeat(np.array(record_ids, np.int64), count)
    vectors = np.zeros((len(ids), dim), np.float16)
    vectors[:, 0] = 1
    return EmbeddingBatch(vectors, ids, np.tile(np.arange(count), len(record_ids)), np.zeros(len(ids)))


def vectors_of(root):
    store = EmbeddingStore(str(root / "vectors"), "e1")
    records = [ShardRecord(number, "v1", 2) for number in (1, 2, 3)]
    return store, store.write(RANGE, store.next_name(), batch_of(1, 2, 3), records=records)


def read(store, shard):
    """What can be read of a shard; its own error counts as nothing."""
    found = []
    try:
        if isinstance(store, FrameStore):
            found += (one.record_id for one in store.read(shard))
        else:
            found += store.read(shard).record_id.tolist()
    except ShardError:
        pass
    return found


def damaged(content, chance):
    """Some bytes turned, cut out, doubled, or other numbers in their place; mostly where headers and footer are."""
    content = bytearray(content)
    for _ in range(chance.randrange(1, 6)):
        at = len(content) - 1 - int(chance.random() ** 2 * (len(content) - 1)) if chance.random() < 0.7 else 0
        at = at or chance.randrange(len(content))
        what = chance.randrange(6)
        if what == 0:
            content[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            content[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif what == 2:
            del content[at : at + chance.randrange(1, 40)]
        elif what == 3:
            content[at:at] = content[at : at + chance.randrange(1, 40)]
        elif what == 4:
            content[at : at + 4] = struct.pack("<I", chance.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1)))
        else:
            content[at : at + 9] = b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
        if not content:
            break
    return bytes(content)


def fuzz(make, tmp_path, number, seed):
    """Damage a shard in many ways, beside a good one; returns how many could still be read, in part or whole."""
    chance = random.Random(seed)
    store, victim = make(tmp_path)
    _, good = make(tmp_path)
    path, content = Path(victim.path), Path(victim.path).read_bytes()
    readable = 0
    for _ in range(number):
        path.write_bytes(damaged(content, chance))
        listed = store.shards(RANGE)
        assert good in listed
        for shard in listed:
            found = read(store, shard)
            if shard == good:
                assert set(found) == {1, 2, 3}
            else:
                assert set(found) <= {record.record_id for record in shard.records}
                readable += bool(found)
        read(store, victim)  # as it was listed before it was damaged
    return readable


@pytest.mark.parametrize("make", [frames_of, vectors_of], ids=["frames", "vectors"])
def test_whatever_a_damaged_shard_says_nothing_escapes_and_no_good_record_is_lost(make, tmp_path):
    fuzz(make, tmp_path, 60, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("make", [frames_of, vectors_of], ids=["frames", "vectors"])
def test_a_thousand_damaged_shards_of_each_kind_let_nothing_escape(make, tmp_path):
    fuzz(make, tmp_path, 1000, seed=2)


def with_footer(store, shard, change=None, **options):
    """The shard written once more: its columns and its footer as they are changed, by default as the store writes."""
    table = pq.read_table(shard.path)
    footer = json.loads(pq.read_schema(shard.path).metadata[store.footer_key])
    table = (change(table, footer) if change else None) or table
    table = table.replace_schema_metadata({store.footer_key: json.dumps(footer)})
    pq.write_table(table, shard.path, **{**store.parquet_options, **options})


def put(**values):
    return lambda _, footer: footer["records"][0].update(values)


def column(name, values):
    def change(table, _):
        at = table.schema.get_field_index(name)
        return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))

    return change


BAD_FOOTERS = {
    "a width of nothing": put(width_px=0),
    "a width without end": put(width_px=10**9),
    "a width in words": put(width_px="24"),
    "a duration that is none": put(duration_seconds=float("nan")),
    "a duration in words": put(duration_seconds="long"),
    "a reason without end": put(partial="x" * 20_000),
    "an id beyond 64 bits": put(record_id=2**63),
    "a claim beyond 64 bits": put(claim=2**70),
    "a version without end": put(content_version="x" * 100_000),
    "frames below nothing": lambda _, footer: (
        footer["records"][0].update(num_frames=-3),
        footer["records"][1].update(num_frames=9),
    )[:0],
    "no frames": lambda _, footer: (
        footer["records"][0].update(num_frames=0),
        footer["records"][1].update(num_frames=6),
    )[:0],
    "a record twice": put(record_id=2),
}


@pytest.mark.parametrize("case", BAD_FOOTERS)
def test_a_footer_that_says_what_can_not_be_is_none(case, tmp_path):
    store, shard = frames_of(tmp_path)
    with_footer(store, shard, BAD_FOOTERS[case])
    assert store.shards(RANGE) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda _, footer: footer.update(dim=0),
        lambda _, footer: footer.update(dim=10**6),
        lambda _, footer: footer.update(dim="8"),
        lambda _, footer: footer.update(failures=[{"record_id": "1"}]),
        lambda _, footer: footer["failures"].append(
            dict.fromkeys(("record_id", "content_version", "stage", "error_type", "message"), 7)
        ),
    ],
)
def test_a_footer_of_vectors_that_says_what_can_not_be_is_none(change, tmp_path):
    store, shard = vectors_of(tmp_path)
    with_footer(store, shard, change)
    assert store.shards(RANGE) == []


def test_a_footer_without_end_is_not_read(tmp_path, said, least_seconds):
    store, shard = frames_of(tmp_path)
    path = Path(shard.path)
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<I", 2**32 - 1) + b"PAR1")
    assert store.shards(RANGE) == []
    assert least_seconds(store.shards, RANGE) < 2
    assert "its footer has 4294967295 bytes, expected at most 67108864" in said()[-1]


def test_a_file_that_is_too_large_is_no_shard(tmp_path, monkeypatch, said):
    monkeypatch.setattr("extraction_dagster.shards.store.MOST_BYTES", 1000)
    store, _ = frames_of(tmp_path)
    assert store.shards(RANGE) == []
    assert "expected at most 1000" in said()[-1]


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (None, {"compression": "zstd"}, "column record_id is packed by ZSTD"),
        (None, {"use_dictionary": ["record_id", "jpeg"]}, "pages of kind 2 and encoding"),
        (None, {"data_page_version": "2.0"}, "pages of kind 3"),
        (column("jpeg", [b"x"] * 8 + [None]), {}, "values that are NULL"),
        (column("record_id", [1, 1, 1, 2, 2, 7, 3, 3, 3]), {}, "its rows are not those of record 2"),
        (column("frame_number", [0, 15, 15, 0, 15, 30, 0, 15, 30]), {}, "frame_number must be strictly ascending"),
        (column("frame_number", [-1, 15, 16, 0, 15, 30, 0, 15, 30]), {}, "frame numbers that no video has"),
        (column("pts_seconds", [0, np.nan, 1, 0, 1, 2, 0, 1, 2]), {}, "pts_seconds must be finite"),
        (column("target_seconds", [np.inf, 0, 1, 0, 1, 2, 0, 1, 2]), {}, "has times or frame numbers"),
        (lambda table, _: table.rename_columns(["record_id", "frame_number", "a", "b", "jpeg"]), {}, "its columns are"),
        (lambda table, _: table.append_column("more", pa.array(range(9))), {}, "its columns are"),
    ],
)
def test_frames_that_are_not_what_the_footer_lists_are_damaged(change, options, why, tmp_path):
    store, shard = frames_of(tmp_path)
    with_footer(store, shard, change, **options)
    (found,) = store.shards(RANGE)
    with pytest.raises(FrameShardError, match=why):
        list(store.read(found))


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        (None, {"compression": "none"}, "is packed by UNCOMPRESSED"),
        (None, {"use_dictionary": True}, "pages of kind 2"),
        (column("record_id", [1, 1, 2, 9, 3, 3]), {}, "its rows are not those of the records"),
        (column("record_id", [1, 2, 2, 2, 3, 3]), {}, "its rows are not those of the records"),
        (column("frame_number", [0, 0, 0, 1, 0, 1]), {}, "its frame numbers do not ascend"),
        (column("frame_number", [-2, 0, 0, 1, 0, 1]), {}, "its frame numbers do not ascend"),
        (column("pts_seconds", [0, np.inf, 0, 1, 0, 1]), {}, "times that are not finite"),
        (column("vector", [bytes(16)] * 5 + [None]), {}, "values that are NULL"),
        (lambda table, _: table.set_column(3, "vector", pa.array([bytes(4)] * 6, pa.binary(4))), {}, "its columns are"),
    ],
)
def test_vectors_that_are_not_what_the_footer_lists_are_damaged(change, options, why, tmp_path):
    store, shard = vectors_of(tmp_path)
    with_footer(store, shard, change, **options)
    (found,) = store.shards(RANGE)
    with pytest.raises(EmbeddingShardError, match=why):
        store.read(found)


def test_pages_that_unpack_to_more_than_the_vectors_are_not_unpacked(tmp_path):
    store, shard = vectors_of(tmp_path)

    def swell(table, footer):  # 64 MiB of zeros, in a few kilobytes; the footer lists no more vectors than before
        footer["records"] = [[number, "v1", 2] for number in (1, 2, 3)]
        return table.set_column(3, "vector", pa.array([bytes(16 * 2**20)] * 6, pa.binary()))

    with_footer(store, shard, swell)
    assert Path(shard.path).stat().st_size < 100_000
    (found,) = store.shards(RANGE)
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(EmbeddingShardError, match="its columns are"):
        store.read(found)
    assert pa.default_memory_pool().max_memory() - before < 2**24


def test_only_the_row_groups_of_the_wanted_records_are_read(tmp_path):
    store = FrameStore(str(tmp_path), "f1")
    shard = store.write_shard(RANGE, [video(1, 290), video(2, 290), video(3, 290), video(4, 290), video(5, 10)])
    whole = {one.record_id: (one.jpegs, one.frame_number.tolist()) for one in store.read(shard)}
    for wanted in ([1], [2], [3], [5], [1, 4], [2, 3], [4, 5], [1, 2, 3, 4, 5]):
        found = {one.record_id: (one.jpegs, one.frame_number.tolist()) for one in store.read(shard, only=wanted)}
        assert found == {key: whole[key] for key in wanted}


def test_what_a_picture_says_of_itself_is_read_without_decoding_it():
    jpeg = PICTURES[0]
    assert jpeg_size_px(jpeg) == (24, 16)
    assert stored_jpeg_fault(jpeg, width_px=24, height_px=16) is None
    assert stored_jpeg_fault(jpeg, width_px=16, height_px=24) == "it is 24x16, and its shard says 16x24"
    at = jpeg.index(b"\xff\xc0")
    huge = jpeg[: at + 5] + b"\xff\xf0\xff\xf0" + jpeg[at + 9 :]
    assert stored_jpeg_fault(huge, width_px=65520, height_px=65520) == "it has more than 67108864 pixels"
    progressive = jpeg[: at + 1] + b"\xc2" + jpeg[at + 2 :]
    assert (jpeg_size_px(progressive), jpeg_size_px(progressive, only_baseline=False)) == (None, (24, 16))
    for wrong in (b"", b"\xff\xd8", b"GIF89a" + jpeg, jpeg[:at], jpeg[: at + 6], b"\xff\xd8\xff" + b"\xff" * 10**6):
        assert stored_jpeg_fault(wrong, width_px=24, height_px=16) == "it does not begin as a baseline JPEG does"
    for cut in range(len(jpeg)):
        jpeg_size_px(jpeg[:cut])


def test_pages_are_counted_before_arrow_sees_them(tmp_path):
    _, shard = vectors_of(tmp_path)
    content = io.BytesIO(Path(shard.path).read_bytes())
    schema = pq.read_schema(content).remove_metadata()
    rows = CheckedParquet(content, Layout(schema, "ZSTD", max_bytes=1000)).read(0)
    assert rows["record_id"].to_pylist() == [1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="has pages of more than 200 bytes"):
        CheckedParquet(content, Layout(schema, "ZSTD", max_bytes=200)).read(0)
    with pytest.raises(ValueError, match="it has row groups of"):
        CheckedParquet(content, Layout(schema, "ZSTD", max_group_rows=5))
