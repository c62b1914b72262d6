"""The cache: never above its limit, nothing in use removed, whatever dies."""

import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from extraction_dagster.errors.catalog import DownloadCacheError, FileUnavailableError
from extraction_dagster.stages.catalog.fetch import cache as cache_module
from extraction_dagster.stages.catalog.fetch.cache import (
    OVERHEAD_BYTES,
    Deadline,
    DownloadCache,
    FetchStoppedError,
    FileVersion,
    PassingFaultError,
)

KB = 1000


@pytest.fixture
def deadline():
    return Deadline("https://host/v.mp4?canary", 60.0, threading.Event())


@pytest.fixture
def cache(tmp_path):
    return DownloadCache(tmp_path, max_bytes=10 * KB + OVERHEAD_BYTES, max_idle_seconds=3600, patience_seconds=0.3)


def store(cache, key, size, deadline, *, at=None):
    """A complete entry, in use; last used at `at`."""
    entry = cache.entry(key, suffix=".mp4", deadline=deadline)
    entry.begin(FileVersion(size, f'"{key}"', "", joins=True))
    with entry.receiving(size, deadline) as received:
        received.append(b"x" * size)
    entry.complete()
    if at is not None:
        for path in entry.path.parent.glob(f"{key}.*"):
            os.utime(path, (at, at))
    return entry


def names(cache):
    return sorted(path.name for path in cache.folder.glob("*.mp4"))


def num_bytes(cache):
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_what_was_unused_for_longest_makes_room(cache, deadline):
    now = time.time()
    for key, age in (("a", 20), ("b", 30), ("c", 10)):
        store(cache, key, 3 * KB, deadline, at=now - age).release()
    store(cache, "d", 3 * KB, deadline).release()
    assert names(cache) == ["a.video.mp4", "c.video.mp4", "d.video.mp4"]
    store(cache, "e", 6 * KB, deadline).release()
    assert names(cache) == ["d.video.mp4", "e.video.mp4"]
    assert not list(cache.folder.glob("[abc].*"))


def test_a_note_that_a_killed_process_left_half_written_goes_with_its_entry(cache, deadline):
    store(cache, "a", 3 * KB, deadline, at=time.time() - 20).release()
    (cache.folder / ".a.json.4711-00000000.0123abcd.tmp").write_bytes(b"{")
    store(cache, "b", 9 * KB, deadline).release()
    assert names(cache) == ["b.video.mp4"]
    assert not list(cache.folder.glob(".*"))


def test_using_an_entry_again_makes_it_young(cache, deadline):
    old = time.time() - 100
    for key in ("a", "b"):
        store(cache, key, 4 * KB, deadline, at=old + (key == "b")).release()
    cache.entry("a", suffix=".mp4", deadline=deadline).release()
    store(cache, "c", 4 * KB, deadline).release()
    assert names(cache) == ["a.video.mp4", "c.video.mp4"]


def test_files_in_use_stay_and_the_newcomer_waits_for_room(cache, deadline):
    used = store(cache, "a", 8 * KB, deadline, at=1.0)
    waiting = cache.entry("b", suffix=".mp4", deadline=deadline)
    waiting.begin(FileVersion(5 * KB))
    with pytest.raises(DownloadCacheError, match=r"5000 bytes more do not fit .* all that it holds is in use"):
        cache.reserve("b", 5 * KB, deadline)
    assert used.path.stat().st_size == 8 * KB
    threading.Timer(0.1, used.release).start()
    DownloadCache(cache.folder, max_bytes=cache._max_bytes, max_idle_seconds=1, patience_seconds=30).reserve(
        "b", 5 * KB, deadline
    )
    assert names(cache) == []
    waiting.release()


def test_room_is_reserved_before_the_first_byte(cache, deadline):
    first, second = (cache.entry(key, suffix=".mp4", deadline=deadline) for key in "ab")
    for entry in (first, second):
        entry.begin(FileVersion(6 * KB))
    with first.receiving(6 * KB, deadline), pytest.raises(DownloadCacheError, match="do not fit"):  # noqa: SIM117
        with second.receiving(6 * KB, deadline):
            pass
    with second.receiving(6 * KB, deadline) as received:
        received.append(b"x" * 6 * KB)
    first.release()
    second.release()


def test_a_part_is_counted_and_may_be_removed_once_nobody_has_it(cache, deadline):
    entry = cache.entry("a", suffix=".mp4", deadline=deadline)
    entry.begin(FileVersion(8 * KB, '"a"', "", joins=True))
    with entry.receiving(8 * KB, deadline) as received:
        received.append(b"x" * 7 * KB)
    entry.release()
    again = cache.entry("a", suffix=".mp4", deadline=deadline)
    assert again.num_bytes == 7 * KB
    with pytest.raises(DownloadCacheError, match="do not fit"):
        store(cache, "b", 5 * KB, deadline)
    again.release()
    store(cache, "c", 5 * KB, deadline).release()
    assert cache.entry("a", suffix=".mp4", deadline=deadline).num_bytes == 0


def test_what_nobody_used_for_long_is_removed_though_there_is_room(tmp_path, deadline):
    cache = DownloadCache(tmp_path, max_bytes=100 * KB, max_idle_seconds=50, patience_seconds=1)
    now = time.time()
    used = store(cache, "used", KB, deadline, at=now - 60)
    for key, age in (("young", 40), ("old", 60)):
        store(cache, key, KB, deadline, at=now - age).release()
    store(cache, "new", KB, deadline).release()
    assert names(cache) == ["new.video.mp4", "used.video.mp4", "young.video.mp4"]
    used.release()


def test_an_entry_is_one_holders_at_a_time(cache, deadline):
    held = cache.entry("a", suffix=".mp4", deadline=deadline)
    with pytest.raises(FileUnavailableError, match=r"'https://host/v\.mp4\?…' .* another process has been using it"):
        cache.entry("a", suffix=".mp4", deadline=deadline)
    held.release()
    cache.entry("a", suffix=".mp4", deadline=deadline).release()


def test_waiting_ends_with_a_stop(cache):
    stopped = threading.Event()
    stopped.set()
    held = cache.entry("a", suffix=".mp4", deadline=Deadline("u", 60.0, threading.Event()))
    with pytest.raises(FetchStoppedError, match="The download was stopped"):
        cache.entry("a", suffix=".mp4", deadline=Deadline("u", 60.0, stopped))
    held.release()


@pytest.mark.parametrize("note", ["", "{", "[]", '{"num_bytes": 3, "colour": "red"}'])
def test_a_part_whose_note_is_damaged_is_begun_anew(note, cache, deadline):
    entry = cache.entry("a", suffix=".mp4", deadline=deadline)
    entry.begin(FileVersion(8 * KB, '"a"', "", joins=True))
    with entry.receiving(8 * KB, deadline) as received:
        received.append(b"x" * KB)
    entry.release()
    (cache.folder / "a.json").write_text(note)
    again = cache.entry("a", suffix=".mp4", deadline=deadline)
    assert (again.version, again.num_bytes, again.is_complete) == (None, 0, False)
    again.release()


def test_a_folder_that_can_not_be_used_is_no_records_fault(tmp_path, deadline):
    (tmp_path / "file").write_text("in the way")
    cache = DownloadCache(tmp_path / "file" / "videos", max_bytes=KB, max_idle_seconds=1, patience_seconds=1)
    with pytest.raises(DownloadCacheError, match=r"can't be used: Not a directory\. No record is to blame"):
        cache.entry("a", suffix=".mp4", deadline=deadline)


def test_a_link_put_in_place_of_a_part_is_not_followed(cache, deadline, tmp_path):
    entry = cache.entry("a", suffix=".mp4", deadline=deadline)
    entry.begin(FileVersion(KB))
    entry._part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DownloadCacheError, match="symbolic links"), entry.receiving(KB, deadline):
        pass
    entry.release()


HOLDER = """
import sys, threading, time
from pathlib import Path
from extraction_dagster.stages.catalog.fetch.cache import Deadline, DownloadCache, FileVersion
folder, max_bytes = Path(sys.argv[1]), int(sys.argv[2])
deadline = Deadline("u", 60.0, threading.Event())
cache = DownloadCache(folder, max_bytes=max_bytes, max_idle_seconds=3600, patience_seconds=1)
entry = cache.entry("dead", suffix=".mp4", deadline=deadline)
entry.begin(FileVersion(8000, '"a"', "", joins=True))
with entry.receiving(8000, deadline) as received:
    received.append(b"x" * 1000)
    print("holding", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_held_and_reserved_is_free_and_its_part_goes_on(cache, deadline, no_longer_than_minutes):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(cache.folder), str(cache._max_bytes)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        no_longer_than_minutes(process)
        assert process.stdout.readline() == b"holding\n"
        with pytest.raises(DownloadCacheError, match="do not fit"):
            store(cache, "other", 5 * KB, deadline)
        process.kill()
    store(cache, "more", 5 * KB, deadline).release()
    entry = cache.entry("dead", suffix=".mp4", deadline=deadline)
    assert (entry.version, entry.num_bytes) == (FileVersion(8000, '"a"', "", joins=True), 1000)
    entry.release()


def test_parts_in_the_way_of_each_other_do_not_wait_for_ever(cache, deadline):
    one, other = (cache.entry(key, suffix=".mp4", deadline=deadline) for key in "ab")
    for entry in (one, other):
        entry.begin(FileVersion(8 * KB, '"v1"', "", joins=True))
        with entry.receiving(4 * KB, deadline) as received:
            received.append(b"x" * 4 * KB)
    with pytest.raises(PassingFaultError, match="made room for others"), one.receiving(8 * KB, deadline):
        pass
    assert (one.num_bytes, one.version) == (0, None)
    with other.receiving(8 * KB, deadline) as received:
        received.append(b"x" * 4 * KB)
    assert other.num_bytes == 8 * KB
    one.release()
    other.release()


def test_one_who_was_stopped_while_holding_the_list_is_not_waited_for_for_ever(cache, deadline):
    entry = cache.entry("a", suffix=".mp4", deadline=deadline)
    held = os.open(cache.folder / "cache.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(DownloadCacheError, match="holding its list all the time"), entry.receiving(KB, deadline):
        pass
    os.close(held)
    with entry.receiving(KB, deadline) as received:
        received.append(b"x" * KB)
    entry.release()


FILLER = """
import random, sys, threading
from pathlib import Path
from extraction_dagster.stages.catalog.fetch.cache import Deadline, DownloadCache, FileVersion
folder, max_bytes, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
deadline = Deadline("u", 60.0, threading.Event())
cache = DownloadCache(folder, max_bytes=max_bytes, max_idle_seconds=3600, patience_seconds=30)
for number in range(60):
    entry = cache.entry(str(chance.randrange(12)), suffix=".mp4", deadline=deadline)
    size = chance.randrange(1, 5000)
    entry.begin(FileVersion(size))
    with entry.receiving(size, deadline) as received:
        for _ in range(size // 500):
            received.append(b"x" * 500)
    entry.complete()
    assert entry.path.stat().st_size == size // 500 * 500
    entry.release()
"""


def test_several_processes_together_never_exceed_the_limit(cache, no_longer_than_minutes):
    cache.folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    commands = [[sys.executable, "-c", FILLER, str(cache.folder), str(cache._max_bytes), seed] for seed in "123"]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    for process in processes:
        no_longer_than_minutes(process)
    highest = 0
    while any(process.poll() is None for process in processes):
        seen = 0
        for path in list(cache.folder.iterdir()):
            if path.suffix in {".part", ".mp4"}:
                try:
                    seen += path.stat().st_size
                except FileNotFoundError:
                    continue
        highest = max(highest, seen)
        time.sleep(0.005)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert 5 * KB < highest <= cache._max_bytes
    assert num_bytes(cache) <= cache._max_bytes


def test_the_name_of_a_part_can_not_be_foreseen_and_is_found_again(cache, deadline):
    names = set()
    for _ in range(2):
        entry = cache.entry("a", suffix=".mp4", deadline=deadline)
        entry.begin(FileVersion(KB, '"a"', "", joins=True))
        with entry.receiving(KB, deadline) as received:
            received.append(b"x" * 10)
        names.add(entry._part.name)
        entry.release()
        again = cache.entry("a", suffix=".mp4", deadline=deadline)
        assert (again._part.name, again.num_bytes) == (entry._part.name, 10)
        again.release()
    assert len(names) == 2
    assert len(list(cache.folder.glob("*.part"))) == 1


def test_a_part_of_an_earlier_release_makes_room(cache, deadline):
    cache.entry("a", suffix=".mp4", deadline=deadline).release()
    (cache.folder / "a.part").write_bytes(b"old")
    (cache.folder / "a.json").write_text('{"num_bytes": 10, "etag": "e", "modified": "", "joins": true}')
    entry = cache.entry("a", suffix=".mp4", deadline=deadline)
    assert (entry.version, entry.num_bytes) == (None, 0)
    assert not (cache.folder / "a.part").exists()
    entry.release()


def test_a_download_of_unknown_length_takes_room_as_it_comes(tmp_path, deadline, monkeypatch):
    monkeypatch.setattr(cache_module, "_FIRST_ROOM_BYTES", 2 * KB)
    cache = DownloadCache(tmp_path, max_bytes=10 * KB + OVERHEAD_BYTES, max_idle_seconds=3600, patience_seconds=0.3)
    store(cache, "kept", 3 * KB, deadline).release()
    entry = cache.entry("new", suffix=".mp4", deadline=deadline)
    entry.begin(FileVersion(None, '"new"', "", joins=True))
    with entry.receiving(10 * KB, deadline, is_known=False) as received:
        for _ in range(3):
            received.append(b"x" * KB)
        assert names(cache) == ["kept.video.mp4"]
        assert json.loads((cache.folder / "reserved.json").read_text()) == {"new": 4 * KB}
        for _ in range(5):  # 8 kB are reserved for it now, and the other one goes
            received.append(b"x" * KB)
    entry.complete()
    assert names(cache) == ["new.video.mp4"]
    entry.release()


def test_there_are_never_more_entries_than_may_be(tmp_path, deadline):
    limits = {"max_bytes": 100 * KB + OVERHEAD_BYTES, "max_idle_seconds": 3600, "patience_seconds": 0.3}
    cache = DownloadCache(tmp_path, max_entries=3, **limits)
    now = time.time()
    for number in range(6):
        store(cache, f"k{number}", 10, deadline, at=now - 100 + number).release()
    assert names(cache) == ["k3.video.mp4", "k4.video.mp4", "k5.video.mp4"]
