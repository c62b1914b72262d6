"""Several copies of a record: the newest counts, everywhere; readers follow it; what is damaged is set aside."""

import json
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from extraction_dagster.errors.decode import ShardError
from extraction_dagster.records import IdRange
from extraction_dagster.shards.compaction import Compacted, CompactionOptions, compact
from extraction_dagster.shards.retention import prune_frames
from extraction_dagster.shards.store import new_name, newest_copies, written_at
from extraction_dagster.stages.catalog.catalog import Fingerprints
from extraction_dagster.stages.catalog.ledger import LedgerEntry

RANGE, TODAY = IdRange(1, 1000), Fingerprints(frames="f1", embedding="e1")
AT_ONCE = CompactionOptions(max_records=8, enough_shards=2, untouched=timedelta())


def newest(store):
    """By record, version and claim of the copy that counts."""
    copies = newest_copies(store.shards(RANGE))
    return {key: (copy.record.content_version, copy.record.claim) for key, copy in sorted(copies.items())}


def test_address_and_claim_come_back_and_are_kept_by_a_merge(kind, root):
    store = kind.open(root)
    kind.write(store, 1, claim=7, address="a" * 16)
    kind.write(store, 2, claim=8)
    listed = [(record.address, record.claim) for shard in kind.open(root).shards(RANGE) for record in shard.records]
    assert listed == [("a" * 16, 7), ("", 8)]
    assert compact(store, RANGE, AT_ONCE) == Compacted(removed=2, written=1)
    (merged,) = store.shards(RANGE)
    assert [(record.address, record.claim) for record in merged.records] == listed
    if kind.name == "frame":
        assert [(video.address, video.claim) for video in store.read(merged)] == listed


def test_a_copy_that_a_frozen_writer_writes_late_does_not_count(kind, root):
    store = kind.open(root)
    kind.write(store, 1, version="v2", claim=12)
    late = kind.write(store, 1, version="v1", claim=11)
    assert store.shards(RANGE)[-1] == late
    assert newest(store) == {1: ("v2", 12)}
    kind.write(store, 2, version="v1", claim=11)
    kind.write(store, 2, version="v1", claim=12)
    for _ in range(2):
        compact(store, RANGE, AT_ONCE)
        assert newest(store) == {1: ("v2", 12), 2: ("v1", 12)}


def test_a_late_copy_does_not_make_pruning_remove_the_right_one(kind, root):
    store = kind.open(root)
    right = kind.write(store, 1, version="v2", claim=12)
    kind.write(store, 1, version="v1", claim=11)
    under_way = {1: LedgerEntry(1, "extracted", content_version="v2", claim=12)}
    assert prune_frames(store, RANGE, under_way, TODAY, keep=timedelta()).shards == 1
    assert store.shards(RANGE) == [right]


def test_copies_of_an_earlier_release_have_no_claim_and_the_last_one_counts(kind, root):
    store = kind.open(root)
    kind.write(store, 1, version="v1")
    kind.write(store, 1, version="v2")
    assert newest(store) == {1: ("v2", 0)}
    kind.write(store, 1, version="v1", claim=1)
    kind.write(store, 1, version="v3")
    assert newest(store) == {1: ("v1", 1)}


def test_vectors_that_are_made_again_after_a_merge_count_and_stay(kind, root):
    """A forced run: the same version under the same claim, made of frames that are older than the merged shard."""
    store = kind.open(root)
    for number in (1, 2, 3):
        kind.write(store, number)
    compact(store, RANGE, AT_ONCE)
    (merged,) = store.shards(RANGE)
    forced = kind.write(kind.open(root), 1, 2, 3)
    counts = {copy.shard.name for copy in newest_copies(store.shards(RANGE)).values()}
    assert counts == {forced.name}
    compact(store, RANGE, AT_ONCE)
    assert store.shards(RANGE) == [forced]
    assert merged.name < forced.name


def test_what_is_written_is_later_than_what_was_seen_whatever_the_clocks_say(kind, root):
    ahead = kind.open(root)
    tomorrow = f"{datetime.now(UTC) + timedelta(hours=20):%Y%m%dT%H%M%S%f}Z-0a1b2c3d4e5f.parquet"
    kind.write(ahead, 1, version="v1", claim=7, name=tomorrow)
    here = kind.open(root)
    assert here.shards(RANGE)[0].name == tomorrow
    kind.write(here, 1, version="v2", claim=7)
    kind.write(here, 1, version="v3", claim=7)
    assert newest(here) == {1: ("v3", 7)}
    assert new_name("a name that tells no time") > new_name("")[:10]
    assert written_at(new_name(tomorrow)) == written_at(tomorrow) + timedelta(microseconds=1)


def test_a_reader_whose_shard_was_merged_away_goes_on_with_the_one_that_has_its_records(kind, any_root):
    store = kind.open(any_root)
    listed = [kind.write(store, *ids, claim=7) for ids in ((1, 2), (3,), (4,))]
    assert compact(kind.open(any_root), RANGE, AT_ONCE) == Compacted(removed=3, written=1)
    assert [kind.read(store, shard) for shard in listed] == [[1, 2], [3], [4]]
    read = store.read(listed[0], only=[2])
    assert ([video.record_id for video in read] if kind.name == "frame" else read.record_id.tolist()) == [2]


def test_a_reader_whose_shard_was_merged_twice_goes_on(kind, root):
    store = kind.open(root)
    first = kind.write(store, 1, 2)
    for number in (3, 4):
        kind.write(store, number)
        compact(store, RANGE, AT_ONCE)
    assert kind.read(store, first) == [1, 2]


@pytest.mark.parametrize("kind", ["frame"], indirect=True)
def test_frames_that_are_merged_while_they_are_read_are_read_once_each(root, kind):
    store = kind.open(root)
    shard = kind.write(store, 1, 2, 3)
    kind.write(store, 4)
    real = store._read_file

    def vanish(part, wanted):
        for video in real(part, wanted):
            yield video
            if part == shard and video.record_id == 2:
                compact(kind.open(root), RANGE, AT_ONCE)
                list(real(part, wanted))  # it is gone

    store._read_file = vanish
    assert [video.record_id for video in store.read(shard)] == [1, 2, 3]


def test_a_reader_of_what_is_nowhere_any_more_is_told_so(kind, root):
    store = kind.open(root)
    shard = kind.write(store, 1, 2, version="v1", address="a" * 16)
    store.remove(shard)
    kind.write(store, 1, version="v2", address="a" * 16)
    kind.write(store, 2, version="v1", address="b" * 16)
    with pytest.raises(ShardError, match=f"{shard.name}' can't be read") as raised:
        kind.read(store, shard)
    assert raised.value.gone


FROZEN = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import KINDS
from extraction_dagster.records import IdRange

kind = KINDS[sys.argv[2]]
store = kind.open(sys.argv[3])
shards = store.shards(IdRange(1, 1000))
print("listed", flush=True)
sys.stdin.readline()
if sys.argv[4] == "reads":
    print([kind.read(store, shard) for shard in shards], flush=True)
else:
    kind.write(store, 1, version="v1", claim=7)
    print("wrote", flush=True)
"""


@pytest.mark.parametrize("what", ["reads", "writes"])
def test_a_process_that_was_frozen_for_long_reads_what_was_merged_and_writes_nothing_that_counts(kind, tmp_path, what):
    store = kind.open(tmp_path)
    for number in (1, 2):
        kind.write(store, number, version="v1", claim=7)
    command = [sys.executable, "-c", FROZEN, str(Path(__file__).parent), kind.name, str(tmp_path), what]
    piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **piped) as frozen:
        assert frozen.stdout.readline() == "listed\n"
        frozen.send_signal(signal.SIGSTOP)
        compact(store, RANGE, AT_ONCE)
        if what == "writes":
            kind.write(store, 1, version="v2", claim=9)
        frozen.send_signal(signal.SIGCONT)
        said, _ = frozen.communicate("go on\n", timeout=60)
    assert said == ("[[1], [2]]\n" if what == "reads" else "wrote\n")
    compact(store, RANGE, AT_ONCE)
    assert newest(store) == {1: ("v2", 9) if what == "writes" else ("v1", 7), 2: ("v1", 7)}


def test_a_damaged_shard_is_set_aside_under_a_name_that_is_no_shard_with_one_line(kind, any_root, said):
    store = kind.open(any_root)
    damaged, whole = kind.write(store, 1, 2), kind.write(store, 3)
    for _ in range(2):
        store.set_aside(damaged, "it is cut short")
    aside = damaged.path.replace(damaged.name, f".damaged-{damaged.name}")
    assert store.shards(RANGE) == [whole]
    assert store._fs.exists(aside)
    (line,) = said()
    assert f"Set aside {damaged.path} as .damaged-{damaged.name}: it is cut short. What it held of 2 records" in line
    assert "is made again; keep the file to find out why, or delete it" in line
    store.sweep(RANGE)
    kind.write(store, 4)
    assert store._fs.exists(aside)


def test_records_beside_a_damaged_one_stay(kind, any_root):
    store = kind.open(any_root)
    damaged = kind.write(store, 1, 2, 3, claim=7, address="a" * 16)
    store.set_aside(damaged, "a frame of it is no readable JPEG", records=[2])
    (kept,) = store.shards(RANGE)
    assert kind.read(store, kept) == [1, 3]
    assert [(record.claim, record.address) for record in kept.records] == [(7, "a" * 16)] * 2
    again = kind.write(store, 2, claim=7)
    assert newest_copies(store.shards(RANGE))[2].shard == again


def test_where_the_other_records_can_not_be_read_either_all_are_made_again(kind, tmp_path):
    store = kind.open(tmp_path)
    damaged = kind.write(store, 1, 2)
    path = Path(damaged.path)
    path.write_bytes(path.read_bytes()[:4] + bytes(60) + path.read_bytes()[64:])
    store.set_aside(damaged, "it is damaged", records=[2])
    assert store.shards(RANGE) == []
    assert [file.name for file in path.parent.iterdir()] == [f".damaged-{damaged.name}"]


def test_what_was_merged_meanwhile_is_not_set_aside(kind, root):
    store = kind.open(root)
    listed = [kind.write(store, number) for number in (1, 2)]
    compact(store, RANGE, AT_ONCE)
    store.set_aside(listed[0], "it is damaged", records=[])
    (merged,) = store.shards(RANGE)
    assert kind.read(store, merged) == [1, 2]


def rewritten(shard, change):
    """The shard with another footer."""
    table, metadata = pq.read_table(shard.path), dict(pq.read_schema(shard.path).metadata)
    key = next(key for key in metadata if key.startswith(b"extraction"))
    footer = json.loads(metadata[key])
    change(footer)
    pq.write_table(table.replace_schema_metadata({key: json.dumps(footer)}), shard.path)


def set_key(name, value):
    return lambda footer: footer.update({name: value})


def format_of(kind):
    return "format" if kind.name == "frame" else "format_version"


FOREIGN = {
    "a newer format": lambda kind: set_key(format_of(kind), 99),
    "records of another shape": lambda _: set_key("records", [7]),
    "no list of records": lambda _: set_key("records", 7),
    "records of other types": lambda kind: (
        (lambda footer: footer["records"][0].update(record_id="1"))
        if kind.name == "frame"
        else (lambda footer: footer["records"][0].__setitem__(0, "1"))
    ),
}


@pytest.mark.parametrize("shape", FOREIGN)
def test_a_footer_of_another_shape_is_left_out_with_a_note_and_its_file_stays(kind, tmp_path, shape, caplog):
    store = kind.open(tmp_path)
    other, whole = kind.write(store, 1), kind.write(store, 2)
    rewritten(other, FOREIGN[shape](kind))
    before = Path(other.path).read_bytes()
    assert store.shards(RANGE) == [whole]
    (line,) = caplog.messages
    assert f"{other.name}: it is no whole {kind.name} shard of range 1-1000" in line
    compact(store, RANGE, AT_ONCE)
    assert Path(other.path).read_bytes() == before
