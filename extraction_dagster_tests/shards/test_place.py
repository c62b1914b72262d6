"""Whose a root of shards is; and a store that stumbles is not a store that is empty."""

import errno
import json
import os
import shutil
import sys
import threading
from datetime import timedelta
from itertools import count
from pathlib import Path

import fsspec
import numpy as np
import pytest
from botocore.exceptions import ClientError

from extraction_dagster.errors.decode import OtherSourceError, ShardError, ShardStoreError
from extraction_dagster.records import EncodedFrames, IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.shards.compaction import CompactionOptions, compact
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.shards.place import Source, _Watched
from extraction_dagster.shards.store import by_shard, newest_copies
from extraction_dagster.stages.catalog.identity import source_identity

RANGE = IdRange(1, 1000)
OURS, THEIRS = Source("0" * 15 + "1", "public.videos"), Source("0" * 15 + "2", "other.clips")
READER = Source(OURS.identity, OURS.table, claims=False)


def asks(kind, store, shard):
    """Everything that can be asked of a store."""
    return (
        lambda: store.shards(RANGE),
        store.partitions,
        store.fingerprints,
        lambda: kind.write(store, 2),
        lambda: kind.read(store, shard),
        lambda: store.remove(shard),
        lambda: store.set_aside(shard, "it is damaged"),
        lambda: store.sweep(RANGE),
        lambda: compact(store, RANGE, CompactionOptions(max_records=8)),
    )


def owner(kind, root):
    store = kind.open(root)
    return json.loads(store._fs.cat_file(f"{store._root}/source.json"))


def test_the_first_writer_claims_a_root_and_another_source_is_refused_whatever_it_asks(kind, any_root):
    first = kind.open(any_root, source=OURS)
    assert (first.shards(RANGE), first.partitions()) == ([], [])
    shard = kind.write(first, 1)
    assert owner(kind, any_root) == {"v": 1, "source": OURS.identity, "table": "public.videos"}

    for fingerprint in ("f1", "f2"):
        other = kind.open(any_root, fingerprint, source=THEIRS)
        for ask in asks(kind, other, shard):
            with pytest.raises(OtherSourceError) as refused:
                ask()
            said = str(refused.value)
            assert "belong to table 'public.videos', not to table 'other.clips'" in said
            assert f"Set {kind.setting} (or EXTRACTION_HOME) to a place of its own" in said
            assert "\n" not in said
    again = kind.open(any_root, source=OURS)
    assert (again.shards(RANGE), kind.read(again, shard)) == ([shard], [1])


def test_a_reader_of_another_source_is_refused_and_one_of_this_source_reads(kind, any_root):
    shard = kind.write(kind.open(any_root, source=OURS), 1)
    assert kind.open(any_root, source=READER).shards(RANGE) == [shard]
    theirs = Source(THEIRS.identity, THEIRS.table, claims=False)
    with pytest.raises(OtherSourceError, match=r"belong to table 'public\.videos'"):
        kind.open(any_root, source=theirs).shards(RANGE)


def test_a_root_that_says_nothing_is_claimed_by_its_first_user_once_with_one_line(kind, any_root, said):
    shard = kind.write(kind.open(any_root), 1)  # as an earlier release wrote it
    reader = kind.open(any_root, source=READER)
    assert reader.shards(RANGE) == [shard]
    assert not reader._fs.exists(f"{reader._root}/source.json")
    assert said() == []
    for _ in range(2):
        assert kind.open(any_root, source=OURS).shards(RANGE) == [shard]
    (line,) = said()
    assert "say nothing of their source: from now on they are those of table 'public.videos'" in line
    with pytest.raises(OtherSourceError, match=r"belong to table 'public\.videos'"):
        kind.open(any_root, source=THEIRS).shards(RANGE)


def test_a_reader_never_creates_anything(kind, tmp_path):
    reader = kind.open(tmp_path / "none", source=READER)
    assert (reader.shards(RANGE), reader.partitions()) == ([], [])
    assert list(tmp_path.iterdir()) == []


def test_of_several_first_writers_one_is_the_owner_and_the_others_are_refused(kind, any_root):
    sources = [Source(f"{number:016x}", f"table{number}") for number in range(6)]
    start, outcomes = threading.Barrier(len(sources)), {}

    def first_use(source):
        store = kind.open(any_root, source=source)
        store.require_source()  # all see a root that is nobody's
        start.wait(30)
        try:
            kind.write(store, 1)
        except OtherSourceError:
            outcomes[source.table] = "refused"
        else:
            outcomes[source.table] = "wrote"

    threads = [threading.Thread(target=first_use, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if any_root.startswith("renamingmemory"):  # it has no call that creates a file unless there is one
        assert outcomes[owner(kind, any_root)["table"]] == "wrote"
    else:
        assert outcomes == {source.table: "refused" for source in sources} | {owner(kind, any_root)["table"]: "wrote"}


def test_the_source_is_read_before_anything_else_and_once_a_store(kind, tmp_path, monkeypatch):
    kind.write(kind.open(tmp_path, source=OURS), 1)
    store, calls = kind.open(tmp_path, source=OURS), []
    for name in ("cat_file", "ls", "tail", "open"):
        real = getattr(type(store._fs), name)

        def spy(self, path, *arguments, real=real, name=name, **options):
            calls.append((name, str(path).rsplit("/", 1)[-1]))
            return real(self, path, *arguments, **options)

        monkeypatch.setattr(type(store._fs), name, spy)
    (shard,) = store.shards(RANGE)
    kind.read(store, shard)
    kind.write(store, 2)
    store.partitions()
    assert calls[0] == ("cat_file", "source.json")
    assert calls.count(("cat_file", "source.json")) == 1


@pytest.mark.parametrize(
    "content", [b"", b"{no json", b"[1]", b'{"v": 2, "source": "1", "table": "t"}', b'{"v": 1, "table": "t"}']
)
def test_a_source_that_this_release_can_not_read_is_refused_and_stays(kind, tmp_path, content):
    (tmp_path / "source.json").write_bytes(content)
    with pytest.raises(OtherSourceError, match=rf"source\.json there, which this release can't read.*{kind.setting}"):
        kind.open(tmp_path, source=OURS).shards(RANGE)
    assert (tmp_path / "source.json").read_bytes() == content


def test_the_settings_name_the_source_for_those_who_only_read(tmp_path):
    assert Source.for_reading(Settings(home=tmp_path)) is None
    (tmp_path / "source.db").touch()
    settings = Settings(home=tmp_path, source_schema="main", source_table="videos")
    assert Source.for_reading(settings) == Source(source_identity(settings), "main.videos", claims=False)


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import KINDS, kill_at
from extraction_dagster.records import IdRange
from extraction_dagster.shards.place import Source

root, name, step, number = sys.argv[2:6]

owner, _, call = step.partition(".")
owner = {"os": os, "Path": Path}[owner]
kill_at(owner, call, int(number))
kind = KINDS[name]
store = kind.open(root, source=Source("0" * 15 + "1", "public.videos"))
first = kind.write(store, 1, claim=7, address="a" * 16)
kind.write(store, 2)
store.set_aside(first, "it is damaged")
two = kind.write(store, 4, 5)
store.set_aside(two, "it has a damaged picture", records=[4])
"""
WRITES = {"Path.write_bytes": 5, "os.fsync": 10, "Path.hardlink_to": 1, "Path.unlink": 1, "os.replace": 6}


@pytest.mark.parametrize(
    ("step", "number"), [(step, number) for step, times in WRITES.items() for number in range(times)]
)
def test_a_kill_between_any_two_writes_leaves_what_the_next_user_goes_on_with(kind, tmp_path, commands, step, number):
    script = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), kind.name, step, str(number)]
    assert commands.run(script).returncode == -9

    store = kind.open(tmp_path, source=OURS)
    copies = newest_copies(store.shards(RANGE))
    assert set(copies) in (set(), {1}, {1, 2}, {2}, {2, 4, 5}, {2, 5})
    assert {key for shard, _ in by_shard(copies) for key in kind.read(store, shard)} == set(copies)
    later = kind.write(store, 3)
    compact(store, RANGE, CompactionOptions(max_records=8))
    assert owner(kind, tmp_path) == {"v": 1, "source": OURS.identity, "table": "public.videos"}
    assert list(tmp_path.rglob(".*.tmp")) == []
    assert newest_copies(store.shards(RANGE)).keys() == {*copies, 3}
    assert store.shards(RANGE)[-1] == later


def refusal(code):
    """What s3fs makes of an answer of S3."""
    from s3fs.errors import translate_boto_error  # noqa: PLC0415 - lazy: slow to import

    return translate_boto_error(ClientError({"Error": {"Code": code, "Message": "with hunter2"}}, "GetObject"))


STUMBLES = {
    "SlowDown": lambda: refusal("SlowDown"),
    "503": lambda: refusal("503"),
    "AccessDenied": lambda: refusal("AccessDenied"),
    "NoSuchBucket": lambda: refusal("NoSuchBucket"),
    "InternalError": lambda: refusal("InternalError"),
    "SomethingNew": lambda: refusal("SomethingNew"),
    "PermissionError": lambda: PermissionError("Forbidden"),
    "TimeoutError": lambda: TimeoutError("hunter2"),
    "OSError": lambda: OSError("hunter2, without a number"),
    "RuntimeError": lambda: RuntimeError("hunter2"),
    "Too many open files": lambda: OSError(errno.EMFILE, "Too many open files"),
    "Stale file handle": lambda: OSError(errno.ESTALE, "Stale file handle"),
    "Input/output error": lambda: OSError(errno.EIO, "Input/output error"),
}


@pytest.mark.parametrize("why", STUMBLES)
@pytest.mark.parametrize("call", ["ls", "tail", "cat_file", "open"])
def test_whatever_goes_wrong_while_bytes_are_fetched_is_the_stores_error(kind, tmp_path, monkeypatch, why, call):
    store = kind.open(tmp_path)
    shard = kind.write(store, 1)

    def stumble(*_, **__):
        fault = STUMBLES[why]()
        raise fault

    def ask():
        return store.shards(RANGE) if call in {"ls", "tail"} else kind.read(store, shard)

    read_by = "open" if kind.name == "frame" else "cat_file"
    if call in {"cat_file", "open"} and call != read_by:
        pytest.skip("it is not read so")
    with monkeypatch.context() as patch:
        patch.setattr(type(store._fs), call, stumble)
        with pytest.raises(ShardStoreError) as raised:
            ask()
    said = str(raised.value)
    assert f"can't be reached: {why}. No record is to blame" in said
    assert "hunter2" not in said
    assert store.shards(RANGE) == [shard]
    assert kind.read(store, shard) == [1]


@pytest.mark.parametrize("after", [0, 1])
def test_a_read_that_stumbles_half_way_through_a_shard_is_no_damage(tmp_path, monkeypatch, after):
    store = FrameStore(str(tmp_path), "f1")
    zeros, numbers = np.zeros(2000), np.arange(2000)
    long = EncodedFrames(1, "v1", [os.urandom(500)] * 2000, zeros, zeros, numbers, 8, 8)
    shard = store.write_shard(RANGE, [long])
    real, reads = _Watched.read, count()

    def stumble(self, *size):
        if next(reads) >= after:
            self._file.read = fail
        return real(self, *size)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_Watched, "read", stumble)
    with pytest.raises(ShardStoreError, match="can't be reached: Input/output error"):
        list(store.read(shard))
    assert next(reads) > after


def test_a_bucket_that_vanishes_in_the_middle_of_a_listing_is_not_empty(kind, s3_root):
    store = kind.open(f"{s3_root}/kept", source=OURS)
    shard = kind.write(store, 1)
    real = store._fs.ls

    def vanish(path, **options):
        found = real(path, **options)
        fsspec.filesystem("s3", skip_instance_cache=True).rm(s3_root, recursive=True)
        return found

    store._fs = type(store._fs)(skip_instance_cache=True)
    store._fs.ls = vanish
    with pytest.raises(ShardStoreError, match=r"can't be reached: NoSuchBucket\. No record is to blame"):
        store.shards(RANGE)
    with pytest.raises(ShardStoreError, match=r"can't be reached: NoSuchBucket\. No record is to blame"):
        kind.read(store, shard)


def test_a_shard_that_vanishes_in_the_middle_of_a_listing_is_left_out(kind, root):
    store = kind.open(root)
    shards = [kind.write(store, number) for number in (1, 2)]
    real = store._tail

    def vanish(path):
        if path == shards[0].path:
            store.remove(shards[0])
        return real(path)

    store._tail = vanish
    assert store.shards(RANGE) == shards[1:]


def test_shards_that_are_merged_in_the_middle_of_a_listing_are_found_in_the_merged_one(kind, root):
    store = kind.open(root)
    shards = [kind.write(store, number) for number in (1, 2)]
    real = store._tail

    def merge(path):
        if path == shards[1].path:
            compact(kind.open(root), RANGE, CompactionOptions(8, enough_shards=2, untouched=timedelta()))
        return real(path)

    store._tail = merge
    assert newest_copies(store.shards(RANGE)).keys() == {1, 2}


def test_a_disk_that_was_unmounted_while_a_step_works_is_not_empty(kind, tmp_path):
    store = kind.open(tmp_path / "disk", source=OURS)
    kind.write(store, 1)
    shutil.move(tmp_path / "disk", tmp_path / "elsewhere")
    with pytest.raises(ShardStoreError, match=r"can't be reached: source\.json, which was there, is gone"):
        store.shards(RANGE)


def test_damage_is_no_error_of_the_store(kind, tmp_path):
    store = kind.open(tmp_path)
    path = Path(kind.write(store, 1).path)
    content = path.read_bytes()
    (shard,) = store.shards(RANGE)
    path.write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(ShardError) as raised:
        kind.read(store, shard)
    assert (raised.value.path, raised.value.gone) == (str(path), False)
