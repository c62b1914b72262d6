"""Small files that are old or new, never torn, whatever is killed when."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extraction_dagster import files
from extraction_dagster.files import create_atomically, read_small, replacing, sweep, write_atomically

WRITER = """
import sys
from pathlib import Path
from extraction_dagster.files import write_atomically
print("ready", flush=True)
number = int(sys.argv[2])
while True:
    number += 1
    write_atomically(Path(sys.argv[1]), b"%d\\n" % number * 2000)
    print(number, flush=True)
"""

KILLED_WITHIN_ITS_WRITE = """
import resource, signal, sys
from pathlib import Path
from extraction_dagster.files import write_atomically
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills whoever writes more, in the middle of the write
write = {"atomically": write_atomically, "in place": Path.write_bytes}[sys.argv[1]]
write(Path(sys.argv[2]), b"new\\n" * 2000)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def temporary(prefix, pid, *, place=None):
    return f"{prefix}.{pid}-{place or files._place()}.0123abcd.tmp"


def test_a_file_is_created_and_replaced(tmp_path):
    path = tmp_path / "state"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert (path.read_bytes(), names(tmp_path), path.stat().st_mode & 0o777) == (b"new", ["state"], 0o600)


def test_a_writer_that_is_killed_leaves_a_whole_file_that_never_goes_back(tmp_path):
    path, last = tmp_path / "state", 0
    for kill in range(12):
        command = [sys.executable, "-c", WRITER, str(path), str(last)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = [process.stdout.readline() for _ in range(1 + kill % 4)]
            os.kill(process.pid, signal.SIGKILL)
            said = [line for line in (*lines, *process.stdout) if line.endswith("\n") and line != "ready\n"]
        if said or path.exists():
            found = path.read_bytes().split(b"\n")
            assert set(found) == {found[0], b""}
            assert len(found) == 2001
            assert int(found[0]) >= max([last, *map(int, said)])
            last = int(found[0])
    assert last > 12
    write_atomically(path, b"end")
    assert names(tmp_path) == ["state"]


@pytest.mark.parametrize(("how", "left"), [("atomically", b"old"), ("in place", b"new\n" * 250)])
def test_a_kill_within_a_write_keeps_the_old_file_and_a_writer_in_place_is_told_apart(tmp_path, how, left):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", KILLED_WITHIN_ITS_WRITE, how, str(path)], check=False, timeout=60)
    assert (killed.returncode, path.read_bytes()) == (-signal.SIGXFSZ, left)
    write_atomically(path, b"newer")
    assert (path.read_bytes(), names(tmp_path)) == (b"newer", ["state"])


def test_temporaries_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    dead, living = temporary(".state", gone.pid), temporary(".state", os.getpid())
    others = [".state.x.cc.tmp", temporary(".other", gone.pid), temporary(".state", gone.pid, place="0" * 8)]
    for name in (dead, living, *others):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".state.x.cc.tmp", (0, 0))  # somebody's own, however old it is
    write_atomically(tmp_path / "state", b"new")
    assert names(tmp_path) == sorted(["state", living, *others])


def test_temporaries_of_other_machines_and_versions_go_after_an_hour_without_a_change(tmp_path, caplog):
    theirs = [temporary(".state", os.getpid(), place="0" * 8), ".state.4711.aa.tmp", ".tmp-12-state.tmp"]
    for name in (*theirs, temporary(".state", os.getpid()), "state", ".hidden"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert len(names(tmp_path)) == 6
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 3700, time.time() - 3700))
    sweep(tmp_path)
    assert names(tmp_path) == sorted(["state", ".hidden", temporary(".state", os.getpid())])
    assert caplog.text.count("which a killed process left behind") == 3
    os.utime(tmp_path / temporary(".state", os.getpid()), (time.time() - 90_000, time.time() - 90_000))
    sweep(tmp_path)  # its process id was given again
    assert names(tmp_path) == sorted(["state", ".hidden"])
    sweep(tmp_path / "missing")


@pytest.mark.parametrize("call", ["lstat", "unlink"])
def test_a_temporary_that_its_writer_renames_while_it_is_looked_at_is_no_error(tmp_path, monkeypatch, call):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    (tmp_path / temporary(".state", gone.pid)).touch()
    real = getattr(Path, call)

    def rename_first(path, *arguments, **options):
        if path.name.endswith(".tmp"):
            os.rename(path, tmp_path / "state")  # noqa: PTH104 - the method is patched
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, rename_first)
        sweep(tmp_path)
    assert names(tmp_path) == ["state"]


def test_a_file_is_created_once_and_a_later_creator_changes_nothing(tmp_path):
    assert create_atomically(tmp_path / "source.json", b"first")
    assert not create_atomically(tmp_path / "source.json", b"second")
    assert ((tmp_path / "source.json").read_bytes(), names(tmp_path)) == (b"first", ["source.json"])


def test_a_disk_without_links_creates_a_file_by_renaming_it(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert create_atomically(tmp_path / "source.json", b"first")
    assert not create_atomically(tmp_path / "source.json", b"second")
    assert ((tmp_path / "source.json").read_bytes(), names(tmp_path)) == (b"first", ["source.json"])


def test_a_leftover_that_can_not_be_removed_keeps_nobody_from_writing(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    (tmp_path / temporary(".state", gone.pid)).touch()

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)  # as in a folder like /tmp, where it is another user's
    write_atomically(tmp_path / "state", b"new")
    assert names(tmp_path) == sorted([temporary(".state", gone.pid), "state"])


def test_a_folder_takes_the_place_of_an_empty_one_and_is_not_there_before_its_end(tmp_path):
    (tmp_path / "out").mkdir()
    with replacing(tmp_path / "out", mode=None, folder=True) as beside:
        (beside / "a").write_bytes(b"a")
        assert names(tmp_path / "out") == []
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["a"])
    with pytest.raises(OSError, match="Directory not empty"), replacing(tmp_path / "out", folder=True) as beside:
        (beside / "b").write_bytes(b"b")
    assert (names(tmp_path), names(tmp_path / "out")) == (["out"], ["a"])


def test_a_folder_that_a_killed_process_left_behind_is_swept(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    (tmp_path / temporary(".out", gone.pid) / "inside").mkdir(parents=True)
    with replacing(tmp_path / "out", folder=True):
        pass
    assert names(tmp_path) == ["out"]


def test_the_umask_says_who_may_read_where_the_caller_does_not(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "page", b"", mode=None)
        write_atomically(tmp_path / "metrics", b"", mode=0o644)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("page", "metrics")] == [0o640, 0o644]


def test_a_name_as_long_as_the_disk_takes_is_written(tmp_path):
    path = tmp_path / ("ä" * 125 + ".json")
    write_atomically(path, b"new")
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_keeps_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "state"
    write_atomically(path, b"old")

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    owner = os if call == "fsync" else Path
    monkeypatch.setattr(owner, call, full)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, b"new")
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["state"])


def test_a_link_is_replaced_and_what_it_points_at_stays(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "state").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "state", b"new")
    assert not (tmp_path / "state").is_symlink()
    assert ((tmp_path / "state").read_bytes(), (tmp_path / "precious").read_bytes()) == (b"new", b"precious")


def test_a_folder_in_the_way_is_an_error_and_stays(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_atomically(tmp_path / "state", b"new")
    assert names(tmp_path) == ["state"]


def test_reading_tells_what_is_missing_from_what_is_too_large(tmp_path):
    path = tmp_path / "state"
    assert read_small(path, max_bytes=4) is None
    path.write_bytes(b"1234")
    assert read_small(path, max_bytes=4) == b"1234"
    with pytest.raises(ValueError, match="it has more than 3 bytes"):
        read_small(path, max_bytes=3)


def make_link(path):
    path.with_name("target").write_bytes(b"x")
    path.symlink_to(path.with_name("target"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_link, "Too many levels of symbolic links"),
        (lambda path: path.mkdir(), "no regular file"),
        (os.mkfifo, "no regular file"),
    ],
)
def test_what_is_no_regular_file_is_not_read_and_nothing_stays_open(tmp_path, make, words):
    make(tmp_path / "state")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match=words):
        read_small(tmp_path / "state", max_bytes=4)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def check_that_readers_see_the_old_file_or_the_new_one(write, path):
    """A reader that opened the old file reads it to its end, and a writer that stops half-way leaves it."""
    path.write_bytes(b"old" * 1000)
    with path.open("rb", buffering=0) as reader:
        beginning = reader.read(3)
        write(path, b"new" * 10)
        assert beginning + reader.read() == b"old" * 1000
    assert path.read_bytes() == b"new" * 10


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    check_that_readers_see_the_old_file_or_the_new_one(write_atomically, tmp_path / "state")


def test_a_write_in_place_would_be_found(tmp_path):
    with pytest.raises(AssertionError, match="assert"):
        check_that_readers_see_the_old_file_or_the_new_one(Path.write_bytes, tmp_path / "state")
