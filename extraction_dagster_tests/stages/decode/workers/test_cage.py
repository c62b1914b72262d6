"""What a confined worker can't do, asked of real workers: by its own tries, and by what strace saw of them."""

import ctypes
import errno
import json
import logging
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from extraction_dagster.errors.decode import DecodeConfinementError
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers import cage, pool
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready, look_at_confinement

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[3]
PARTS = ("limits", "not dumpable", "Landlock", "no capabilities", "system calls")
REFUSED = {
    **dict.fromkeys(
        (
            *("read the parent's environment", "read the parent's memory", "attach to the parent", "write a file"),
            *("write over the video", "change the video's mode", "remove the video", "make a folder", "make a link"),
            *("open another file", "open the video by name", "hold a path", "list a folder", "read a link", "fork"),
            *("start a program", "become a program", "signal the parent", "signal everybody", "signal the group"),
            *("open a socket", "open a local socket", "open a pair of sockets", "raise a limit"),
            *("memory outside of the limit", "be looked into", "run sooner", "leave its group"),
        ),
        "EACCES",
    ),
    "queues of calls": "ENOSYS",
    "start a thread": "done",
    "signal itself": "done",
    "read a module": "done",
}
# What strace has to show of each try; {parent} and {folder} are filled in. An ordinary user's strace can't read a
# name out of the worker's memory, for the worker is not dumpable: it shows where the name is.
SEEN = {
    "read the parent's environment": r'openat\(AT_FDCWD, ("/proc/{parent}/environ"|0x\w+), O_RD\S*\) += -1 EACCES',
    "write a file": r'openat\(AT_FDCWD, ("{folder}/written"|0x\w+), O_WRONLY\|O_CREAT\S*, 0777\) += -1 EACCES',
    "open another file": r'openat\(AT_FDCWD, ("{folder}/other"|0x\w+), O_RDONLY\S*\) += -1 EACCES',
    "fork": r"clone\(child_stack=NULL, flags=[^)]*SIGCHLD[^)]*\) += -1 EACCES",
    "signal": r"kill\({parent}, 0\) += -1 EACCES",
    "open a socket": r"socket\(AF_INET, [^)]*\) += -1 EACCES",
    "become a program": r"execve\([^)]*\) += -1 EACCES",
}
FILTER = "seccomp(SECCOMP_SET_MODE_FILTER"
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Landlock, seccomp and capabilities are Linux's")


@pytest.fixture
def folder():
    """A folder that every user may read, with a video and another file."""
    with tempfile.TemporaryDirectory() as made:
        path = Path(made).resolve()
        path.chmod(0o755)
        for name in ("video", "other"):
            (path / name).write_bytes(b"content")
            (path / name).chmod(0o644)
        yield path


@pytest.fixture(autouse=True)
def paths(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.syspath_prepend(tmp_path)


def options(task, **fields):
    return PoolOptions(
        **{"workers": 1, "timeout_seconds": 60.0, "memory_bytes": 2**31, "libraries": (), **fields}, task=task
    )


def answers(task, folder, **fields):
    (decoded,) = filter(None, decode_as_ready([DecodeJob(1, "v1", str(folder))], options(task, **fields)))
    frames = decoded.outcome.frames
    assert frames is not None, decoded.outcome.failure
    return json.loads(frames.partial)


def what_is_lacking():
    """The parts that this machine lacks, each with the reason: of these a test can't show that they hold."""
    return look_at_confinement(options("tries:run")).lacking


@needs_linux
def test_a_worker_can_neither_read_nor_write_nor_start_nor_signal_nor_connect(folder):
    lacking = what_is_lacking()
    assert lacking == {}, f"this machine lacks {lacking}"
    assert answers("tries:run", folder) == REFUSED
    assert sorted(path.name for path in folder.iterdir()) == ["other", "video"]


WITHOUT = """
import tries
from extraction_dagster.stages.decode.workers import cage

def lack(*_, **__):
    raise cage.LackingError("taken away by a test")

cage.{part} = lack
run = tries.run
"""


def test_without_landlock_nothing_at_all_can_be_opened(folder, tmp_path):
    (tmp_path / "without.py").write_text(WITHOUT.format(part="landlock"))
    assert answers("without:run", folder) == {**REFUSED, "read a module": "EACCES"}


@needs_linux
def test_without_a_list_of_calls_landlock_still_keeps_files_and_others_out_of_reach(folder, tmp_path):
    (tmp_path / "without.py").write_text(WITHOUT.format(part="allow_calls"))
    got = answers("without:run", folder)
    held = {
        *("read the parent's environment", "write a file", "write over the video", "remove the video"),
        *("make a folder", "make a link", "open another file", "open the video by name", "list a folder"),
        *("become a program", "signal the parent", "raise a limit", "run sooner"),
    }
    assert {name: answer for name, answer in got.items() if name in held and answer == "done"} == {}
    assert got["read a module"] == "done"


def test_a_video_is_decoded_without_landlock_too_whatever_loads_late(clip_path, tmp_path):
    code = WITHOUT.format(part="landlock").replace(
        "run = tries.run", "from extraction_dagster.stages.decode.task import *"
    )
    (tmp_path / "without.py").write_text(code)
    names = ["h264", "vp8 with hidden frames", "gif", "h264 in AVI", "h264 turned by 90"]
    work = [
        DecodeJob(2 * number + place, "", str(clip_path(name)), decoder=decoder)
        for number, name in enumerate(names)
        for place, decoder in enumerate(("pyav", "decord"))
    ]
    strict = PoolOptions(workers=1, timeout_seconds=60.0, memory_bytes=2**32, task="without:decode_job")
    outcomes = [decoded.outcome for decoded in filter(None, decode_as_ready(work, strict))]
    assert [outcome.failure for outcome in outcomes] == [None] * 10


def test_what_holds_is_said_once_in_the_log(folder, caplog):
    pool._told.clear()
    with caplog.at_level(logging.INFO, "extraction_dagster"):
        answers("tries:run", folder)
        answers("tries:run", folder)
    (said,) = [record.getMessage() for record in caplog.records if "confined" in record.getMessage()]
    assert said.startswith("Decoding workers are confined: limits, not dumpable, Landlock (version ")


@pytest.mark.parametrize(
    ("part", "name"),
    [("hide", "not dumpable"), ("landlock", "Landlock"), ("drop_capabilities", "no capabilities"), ("limit", "limits")],
)
def test_what_is_lacking_is_warned_of_and_refused_where_all_of_it_is_asked_for(part, name, folder, tmp_path, caplog):
    (tmp_path / "without.py").write_text(WITHOUT.format(part=part))
    pool._told.clear()
    assert answers("without:run", folder)["fork"] == "EACCES"
    (said,) = [record for record in caplog.records if "confined" in record.getMessage()]
    assert (said.levelname, f"lacking: {name} (taken away by a test)" in said.getMessage()) == ("WARNING", True)
    with pytest.raises(DecodeConfinementError, match=rf"this machine lacks {name} \(taken away by a test\)\. No video"):
        answers("without:run", folder, require_confinement=True)


def test_a_kernel_without_landlock_is_told_from_one_with_it(monkeypatch):
    def refuse(*_):
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(cage, "_syscall", refuse)
    with pytest.raises(
        cage.LackingError, match=r"the kernel refuses it: Operation not supported; Linux has it from 5.13"
    ):
        cage.landlock([])


def test_each_version_of_landlock_is_asked_for_no_more_than_it_knows(monkeypatch):
    asked = {}

    def kernel(version):
        def call(number, *arguments):
            if number == 444 and arguments[0] is None:
                return version
            if number == 444:
                asked[version] = struct.unpack(f"={len(arguments[0]) // 8}Q", arguments[0])
                return os.open(os.devnull, os.O_RDONLY)
            return 0

        return call

    monkeypatch.setattr(cage, "_prctl", lambda *_: 0)
    monkeypatch.setattr(cage, "_threads", lambda: 1)
    for version in (1, 2, 3, 4, 5, 6, 7, 9):
        monkeypatch.setattr(cage, "_syscall", kernel(version))
        assert cage.landlock([]) == f"version {version}"
    assert asked == {
        1: (0x1FFF,),
        2: (0x3FFF,),
        3: (0x7FFF,),
        4: (0x7FFF, 3),
        5: (0xFFFF, 3),
        6: (0xFFFF, 3, 3),
        7: (0xFFFF, 3, 3),
        9: (0xFFFF, 3, 3),
    }


ALLOW, EACCES, ENOSYS = "allow", "EACCES", "ENOSYS"
# By machine: a call's number, its arguments, and what becomes of it in process 4711 with its lifeline at 5.
CALLS = {
    "x86_64": [
        *[(number, (), ALLOW) for number in (0, 1, 9, 10, 11, 17, 44, 45, 202, 228, 231)],
        *[(number, (), EACCES) for number in (2, 4, 41, 42, 53, 57, 58, 59, 82, 83, 87, 90, 101, 165, 310, 319, 321)],
        *[(424, (), ENOSYS), (425, (), ENOSYS), (435, (), ENOSYS), (437, (), ENOSYS)],
        *[(0x40000000, (), EACCES), (0x40000000 + 59, (), EACCES)],
        *[(257, (0, 0, 0), ALLOW), (257, (0, 0, 0x80000), ALLOW), (257, (0, 0, 0x90800), ALLOW)],
        *[(257, (0, 0, flags), EACCES) for flags in (1, 2, 0x40, 0x200, 0x400, 0x200000, 0x410000)],
        *[(3, (4,), ALLOW), (3, (5,), EACCES), (3, (2**32 + 5,), EACCES)],
        *[
            (56, (0x3D0F00,), ALLOW),
            (56, (17,), EACCES),
            (56, (0x4111,), EACCES),
            (56, (0x3D0F00 | 0x10000000,), EACCES),
        ],
        *[(62, (4711, 9), ALLOW), (62, (1, 9), EACCES), (62, (0, 9), EACCES), (62, (2**32 - 1, 9), EACCES)],
        *[(234, (4711, 4712, 6), ALLOW), (234, (1, 1, 6), EACCES)],
        *[(72, (5, 3), ALLOW), (72, (5, 4), EACCES), (72, (5, 8), EACCES), (72, (5, 10), EACCES)],
        *[(157, (15,), ALLOW), (157, (4, 1), EACCES), (157, (22,), EACCES), (33, (3, 0), ALLOW), (33, (3, 5), EACCES)],
    ],
    "aarch64": [
        *[(number, (), ALLOW) for number in (63, 64, 67, 98, 113, 206, 207, 215, 222, 226)],
        *[(number, (), EACCES) for number in (0, 1, 34, 35, 117, 198, 203, 221, 270, 279, 280, 281)],
        *[(56, (0, 0, 0x4000), ALLOW), (56, (0, 0, 0x41), EACCES), (57, (5,), EACCES), (57, (0,), ALLOW)],
        *[(220, (0x3D0F00,), ALLOW), (220, (17,), EACCES), (129, (4711,), ALLOW), (129, (1,), EACCES)],
        *[(435, (), ENOSYS), (425, (), ENOSYS), (24, (3, 0), ALLOW), (24, (3, 5), EACCES), (167, (4,), EACCES)],
    ],
}


@pytest.mark.parametrize("machine", list(CALLS))
def test_the_list_lets_pass_what_it_says_and_nothing_else(machine, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    architecture, place = cage._MACHINES[machine][0], list(cage._MACHINES).index(machine)
    program, _ = cage._filter(architecture, place, lifeline=5, reading=True)
    found = [
        (number, arguments, verdict(program, number, architecture, arguments))
        for number, arguments, _ in CALLS[machine]
    ]
    assert found == CALLS[machine]
    assert verdict(program, 0, 0x40000003, ()) == EACCES  # as a program for the older 32-bit machine asks
    blind, _ = cage._filter(architecture, place, lifeline=5, reading=False)
    assert verdict(blind, {"x86_64": 257, "aarch64": 56}[machine], architecture, (0, 0, 0)) == EACCES


def verdict(program, number, architecture, arguments):
    """Run a classic packet filter as the kernel does."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator, at = 0, 0
    while True:
        code, true, false, value = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return {0x7FFF0000: ALLOW, 0x50000 | errno.EACCES: EACCES, 0x50000 | errno.ENOSYS: ENOSYS}[value]
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += true if holds else false


PARENT = """
import sys
sys.path[:0] = {paths!r}
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready
from extraction_dagster.stages.decode.task import DecodeJob
options = PoolOptions(1, 60.0, 2**31, task="tries:{task}", libraries=())
print("running", flush=True)
for decoded in filter(None, decode_as_ready([DecodeJob(1, "v1", {folder!r})], options)):
    print(decoded.outcome.frames.partial if decoded.outcome.frames else decoded.outcome.failure)
"""


@needs_linux
def test_a_worker_that_ignores_every_signal_and_closes_everything_ends_with_its_parent(folder, wait_until, is_alive):
    code = PARENT.format(paths=[str(HERE), str(REPOSITORY)], folder=str(folder), task="deaf")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        me = psutil.Process(parent.pid)
        wait_until(me.children)
        (worker,) = me.children()
        wait_until(lambda: worker.is_running() and worker.cpu_times().user > 2.0)  # it is long at it
        parent.kill()
    wait_until(lambda: not is_alive(worker.pid))


@pytest.mark.parametrize("user", ["root", "an ordinary user"])
@needs_linux
def test_strace_sees_each_try_refused(user, folder):
    lacking = what_is_lacking()
    assert lacking == {}, f"this machine lacks {lacking}"
    command = as_user(user, folder)
    logs = folder / "logs"
    logs.mkdir()
    logs.chmod(0o777)
    code = PARENT.format(paths=[str(HERE), str(REPOSITORY)], folder=str(folder), task="run")
    strace = [find_strace(), "-ff", "-qq", "-s", "300", "-o", f"{logs}/process"]
    done = subprocess.run(
        [*command, *strace, sys.executable, "-c", code],
        capture_output=True, text=True, check=False, timeout=300, cwd=folder, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    assert "PTRACE" not in done.stderr, f"strace may not watch here: {done.stderr}"
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got == REFUSED
    (worker,) = [log for log in logs.iterdir() if FILTER in log.read_text(errors="replace")]
    said = worker.read_text(errors="replace")
    said = said[said.index(FILTER) :]
    parent = re.search(r"kill\((\d+), 0\)", said)[1]
    missing = [
        name
        for name, pattern in SEEN.items()
        if not re.search(pattern.replace("{parent}", parent).replace("{folder}", re.escape(str(folder))), said)
    ]
    assert missing == []
    assert sorted(path.name for path in folder.iterdir()) == ["logs", "other", "video"]


def find_strace():
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed: nothing was seen from outside; apt-get install strace")
    return strace


def as_user(user, folder):
    """What comes before a command so that root, or an ordinary user, runs it."""
    if os.geteuid() != 0:
        if user == "root":
            pytest.skip("this test runs as an ordinary user: what root's worker may was not seen")
        return []
    if user == "root":
        return []
    # The interpreter may lie in root's home: in a view of its own it lies where everybody may read.
    homes = [str(Path(path).resolve()) for path in (sys.base_prefix, sys.prefix, str(REPOSITORY))]
    hidden = [path for path in homes if any(not parent.stat().st_mode & 1 for parent in Path(path).parents)]
    steps = ["set -e"]
    for number, path in enumerate(hidden):
        steps += [f"mkdir -p {folder}/view{number}", f"mount --bind {path} {folder}/view{number}"]
    closed = {next(str(p) for p in reversed(Path(path).parents) if not p.stat().st_mode & 1) for path in hidden}
    steps += [f"mount -t tmpfs -o mode=755 none {path}" for path in sorted(closed)]
    for number, path in enumerate(hidden):
        steps += [f"mkdir -p {path}", f"mount --bind {folder}/view{number} {path}", f"umount {folder}/view{number}"]
        steps += [f"rmdir {folder}/view{number}"]
    steps += ['exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"']
    return ["unshare", "--mount", "sh", "-c", "\n".join(steps), "sh"]


def test_the_list_is_written_for_the_machines_that_this_project_is_used_on():
    assert set(cage._MACHINES) == {"x86_64", "aarch64"}
    if sys.platform == "linux":
        assert platform.machine() in cage._MACHINES, f"no list of calls for {platform.machine()}"
