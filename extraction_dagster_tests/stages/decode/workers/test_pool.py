import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from extraction_dagster.errors.decode import DecodeWorkerStartError
from extraction_dagster.records import Failure, Outcome
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import Decoded, PoolOptions, decode_as_ready

# What a job does is its path; a hang keeps the interpreter's lock, as a codec may.
FAULTS = """
import ctypes, dataclasses, os, pathlib, signal, socket, subprocess, sys, time
import numpy as np
from extraction_dagster.errors.decode import NoVideoStreamError
from extraction_dagster.records import EncodedFrames
from extraction_dagster.stages.decode.workers import worker

send = worker.send

def send_half(wire, message):
    wire.sendall((1000).to_bytes(8, "big") + b"half of it")
    ctypes.PyDLL(None).sleep(600)

def send_steps(wire, message):
    while True:
        send(wire, "taken")

ways = {"half": send_half, "steps": send_steps}
way = [send]
worker.send = lambda wire, message: way[0](wire, message)

class Trick:
    # What it becomes in whoever reads it: a program.

    def __reduce__(self):
        return os.system, ("touch tricked",)

OUTSIDE = {
    "socket": lambda: socket.socket(socket.AF_INET),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "program": lambda: subprocess.run([sys.executable, "-c", ""]),
    "replace": lambda: os.execv(sys.executable, [sys.executable, "-c", ""]),
}

def run(job):
    what, _, value = job.path.partition(" ")
    if value and what not in {"modules", "environment", *OUTSIDE}:
        pathlib.Path(value).write_text(str(os.getpid()))
    if what == "segfault":
        print("libcodec: bad pointer", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(3)
    if what == "hang":
        ctypes.PyDLL(None).sleep(600)
    way[0] = ways.get(what, send)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "nap":
        time.sleep(0.5)
    if what == "fill":
        bytearray(8 << 30)
    if what in OUTSIDE:
        try:
            OUTSIDE[what]()
        except OSError as error:
            value = type(error).__name__
    if what == "trick":
        return Trick()
    if what == "stranger":
        job = dataclasses.replace(job, record_id=99)
    if what == "nothing":
        return None
    if what == "environment":
        value = " ".join(sorted(os.environ))
    if what == "refuse":
        raise NoVideoStreamError(job.path, "audio")
    if what == "bug":
        raise LookupError("no such thing")
    said = str(os.getpid())
    if what == "modules":
        said = " ".join(sorted(sys.modules))
    if what == "environment" or what in OUTSIDE:
        said = value
    jpeg = bytes(2**22) if what == "big" else b"jpeg"
    return EncodedFrames(job.record_id, said, [jpeg], np.zeros(1), np.zeros(1), np.zeros(1, np.int64), 1, 1)
"""


@pytest.fixture(autouse=True)
def faults(tmp_path, monkeypatch):
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)


def options(**fields):
    return PoolOptions(**{"workers": 2, "timeout_seconds": 60.0, "memory_bytes": 2**31, "task": "faults:run", **fields})


def jobs(*paths):
    return [DecodeJob(number, "v1", path) for number, path in enumerate(paths)]


def run(*paths, **fields):
    """Every outcome by its record."""
    return {
        decoded.outcome.record_id: decoded.outcome
        for decoded in filter(None, decode_as_ready(jobs(*paths), options(**fields)))
    }


def failure(outcome):
    assert outcome.failure is not None
    return outcome.failure


def test_a_crash_a_hang_and_a_full_memory_cost_only_their_own_record():
    outcomes = run("ok", "segfault", "ok", "hang", "fill", "exit", "ok", timeout_seconds=5.0)
    assert sorted(outcomes) == [0, 1, 2, 3, 4, 5, 6]
    assert all(outcomes[number].frames is not None for number in (0, 2, 6))
    crash, hang, fill, gone = (failure(outcomes[number]) for number in (1, 3, 4, 5))
    assert (crash.stage, crash.error_type, crash.permanent) == ("decode", "DecodeWorkerDiedError", False)
    assert crash.message.startswith("Record 1: Video 'segfault' ended its worker process (killed by SIGSEGV)")
    assert "libcodec: bad pointer" in crash.details
    assert hang.error_type == "DecodeTimeoutError"
    assert hang.message.startswith("Record 3: Video 'hang' was not decoded within 5 s")
    assert fill.error_type == "DecodeMemoryError"
    assert fill.message.startswith("Record 4: Video 'fill' needs more than the 2147483648 bytes")
    assert gone.message.startswith("Record 5: Video 'exit' ended its worker process (exit code 3)")


@pytest.mark.parametrize("what", ["half", "stop"])
def test_a_worker_that_stops_in_the_middle_of_a_word_or_of_its_work_is_waited_for_no_longer(what):
    outcomes = run("ok", what, "ok", "ok", timeout_seconds=5.0)
    assert [outcomes[number].failure for number in (0, 2, 3)] == [None, None, None]
    assert failure(outcomes[1]).error_type == "DecodeTimeoutError"


def test_a_worker_gains_no_time_by_saying_that_it_begins_again_and_again():
    outcomes = run("ok", "steps", "ok")
    assert [outcomes[number].failure for number in (0, 2)] == [None, None]
    assert failure(outcomes[1]).error_type == "DecodeWorkerDiedError"


def test_the_time_that_a_caller_takes_is_not_counted_as_a_videos(monkeypatch):
    now, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + ahead[0])
    outcomes = []
    for decoded in filter(None, decode_as_ready(jobs("ok", "nap", "nap", "nap"), options())):
        outcomes.append(decoded.outcome)
        ahead[0] += 1000.0
    assert [outcome.failure for outcome in outcomes] == [None] * 4


def test_a_report_that_fills_the_wire_many_times_arrives_whole():
    frames = run("big", "big")[1].frames
    assert len(frames.jpegs[0]) == 2**22


def test_an_error_on_purpose_keeps_its_facts_and_a_bug_its_traceback():
    outcomes = run("refuse", "bug")
    refuse, bug = failure(outcomes[0]), failure(outcomes[1])
    assert (refuse.error_type, refuse.permanent, refuse.content_version) == ("NoVideoStreamError", True, "v1")
    assert refuse.message.startswith("Record 0: Video 'refuse' has no video stream that can be decoded: found audio")
    assert (bug.error_type, bug.message, bug.permanent) == ("LookupError", "Record 1: no such thing", False)
    assert 'raise LookupError("no such thing")' in bug.details


def test_no_more_jobs_are_drawn_than_workers_can_take():
    drawn = []

    def endless():
        for number in range(100):
            drawn.append(number)
            yield DecodeJob(number, "v1", "ok")

    outcomes = decode_as_ready(endless(), options())
    next(filter(None, outcomes))
    outcomes.close()
    assert len(drawn) <= 3


def test_what_is_decided_already_is_handed_on_while_others_are_decoded_and_while_none_is_ready():
    missing = [Decoded(Outcome(n, failure=Failure(n, "v1", "fetch", "FileNotFound", "gone"))) for n in (1, 2)]
    stream = decode_as_ready([*jobs("nap"), missing[0], None, missing[1]], options())
    given = list(stream)
    assert [item for item in given if item is not None][:2] == missing
    assert [item.outcome.record_id for item in given if item is not None] == [1, 2, 0]


def test_the_caller_has_a_turn_while_a_video_takes_long(tmp_path):
    stream = decode_as_ready(jobs(f"hang {tmp_path / 'pid'}"), options())
    assert [next(stream), next(stream)] == [None, None]
    stream.close()


def test_a_worker_is_replaced_after_its_share_of_tasks():
    outcomes = run("ok", "ok", "ok", "ok", "ok", workers=1, max_tasks=2)
    pids = [outcomes[number].frames.content_version for number in range(5)]
    assert pids[0] == pids[1]
    assert pids[2] == pids[3]
    assert len(set(pids)) == 3


def test_closing_early_stops_every_worker(tmp_path, wait_until, is_alive):
    outcomes = decode_as_ready(jobs("ok", f"hang {tmp_path / 'pid'}"), options())
    next(filter(None, outcomes))
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid)
    outcomes.close()
    assert not is_alive(pid)


def test_an_interruption_while_waiting_stops_every_worker(tmp_path, is_alive):
    def interrupted():
        yield DecodeJob(0, "v1", f"nap {tmp_path / 'pid'}")
        yield DecodeJob(1, "v1", "ok")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        list(filter(None, decode_as_ready(interrupted(), options())))
    assert not (tmp_path / "pid").exists() or not is_alive(int((tmp_path / "pid").read_text()))


def test_a_worker_ignores_ctrl_c_which_is_for_its_parent(tmp_path, wait_until):
    pid_file = tmp_path / "pid"

    def jobs_then_ctrl_c():
        yield DecodeJob(0, "v1", f"nap {pid_file}")
        wait_until(lambda: pid_file.exists() and pid_file.read_text())
        os.kill(int(pid_file.read_text()), signal.SIGINT)
        yield DecodeJob(1, "v1", "ok")

    outcomes = {
        decoded.outcome.record_id: decoded.outcome
        for decoded in filter(None, decode_as_ready(jobs_then_ctrl_c(), options()))
    }
    assert outcomes[0].failure is None
    assert outcomes[0].frames.content_version == pid_file.read_text()


def test_an_idle_worker_that_died_is_replaced_without_loss():
    def jobs_between_deaths():
        yield DecodeJob(0, "v1", "ok")
        os.kill(int(done[0].frames.content_version), signal.SIGKILL)
        yield DecodeJob(1, "v1", "ok")

    done = []
    for decoded in filter(None, decode_as_ready(jobs_between_deaths(), options(workers=1))):
        done.append(decoded.outcome)  # noqa: PERF401 - the jobs look at it meanwhile
    assert [(outcome.record_id, outcome.failure) for outcome in done] == [(0, None), (1, None)]


def test_a_worker_that_can_not_start_is_nobodys_record():
    with pytest.raises(DecodeWorkerStartError, match=r"did not start \(exit code 1\).*No module named 'nowhere'"):
        list(filter(None, decode_as_ready(jobs("ok"), options(task="nowhere:run"))))


DEAF = """
import os
from extraction_dagster.stages.decode.workers import worker

worker.Inbox = lambda **_: os._exit(9)
run = None
"""
KILLED_AT_THE_START = """
import os, pathlib, signal, faults

before = pathlib.Path(__file__).with_name("killed")
if not before.exists():
    before.touch()
    os.kill(os.getpid(), signal.SIGKILL)
run = faults.run
"""


def test_workers_that_all_end_before_their_first_video_are_not_replaced_for_ever(tmp_path):
    (tmp_path / "deaf.py").write_text(DEAF)
    with pytest.raises(DecodeWorkerStartError, match=r"did not start \(exit code 9\)"):
        list(filter(None, decode_as_ready(jobs("ok"), options(task="deaf:run"))))


def test_a_worker_that_is_killed_while_it_starts_is_replaced_without_loss(tmp_path):
    (tmp_path / "hurt.py").write_text(KILLED_AT_THE_START)
    outcomes = run("ok", "ok", task="hurt:run")
    assert [outcomes[number].failure for number in (0, 1)] == [None, None]
    assert (tmp_path / "killed").exists()


def test_workers_load_neither_dagster_nor_their_parents_main():
    names = set(run("modules x")[0].frames.content_version.split())
    assert "extraction_dagster.stages.decode.workers.worker" in names
    assert not names & {"dagster", "torch", "pytest", "pydantic", "qdrant_client"}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's fence is Linux's")
def test_a_worker_reaches_no_network_and_starts_no_program():
    outcomes = run("socket x", "unix x", "program x", "replace x", "ok")
    said = [outcomes[number].frames.content_version for number in range(4)]
    assert said == ["PermissionError"] * 4
    assert outcomes[4].failure is None


@pytest.mark.parametrize("what", ["trick", "stranger", "nothing"])
def test_a_worker_that_sends_what_it_should_not_is_not_believed(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = run("ok", what, "ok")
    assert [outcomes[number].failure for number in (0, 2)] == [None, None]
    assert failure(outcomes[1]).error_type == "DecodeWorkerDiedError"
    assert not (tmp_path / "tricked").exists()


def test_a_worker_is_given_no_key_and_no_setting(monkeypatch):
    for name in ("EXTRACTION_QDRANT_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "DATABASE_URL"):
        monkeypatch.setenv(name, "canary-4711")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    names = set(run("environment x")[0].frames.content_version.split())
    assert {"PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"} <= names
    assert not {"EXTRACTION_QDRANT_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "DATABASE_URL"} & names


def test_costs_are_measured():
    (decoded,) = filter(None, decode_as_ready(jobs("nap"), options()))
    assert 0 < decoded.cpu_seconds < 0.5


PARENT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are told to ignore it
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready
from extraction_dagster.stages.decode.task import DecodeJob
print("main runs")
options = PoolOptions(2, 60.0, 2**31, task="faults:run")
for decoded in filter(None, decode_as_ready([DecodeJob(n, "v1", path) for n, path in enumerate({paths!r})], options)):
    print("got", decoded.outcome.record_id, decoded.outcome.failure, flush=True)
"""


@pytest.mark.parametrize("way", ["command", "script"])
def test_any_main_module_can_be_the_parent_without_a_guard(way, tmp_path):
    code = PARENT.format(paths=["ok"])
    (tmp_path / "script.py").write_text(code)
    arguments = ["-c", code] if way == "command" else ["script.py"]
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=_env(), capture_output=True, check=True, timeout=120
    )
    assert done.stdout.decode().splitlines() == ["main runs", "got 0 None"]
    assert done.stderr == b""


def test_killing_the_parent_leaves_no_orphan_even_in_a_codec_that_hangs(tmp_path, wait_until, is_alive):
    code = PARENT.format(paths=[f"hang {tmp_path / 'one'}", f"hang {tmp_path / 'two'}"])
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=_env(), stdout=subprocess.DEVNULL) as parent:
        pids = [tmp_path / "one", tmp_path / "two"]
        wait_until(lambda: all(pid.exists() and pid.read_text() for pid in pids))
        assert all(is_alive(int(pid.read_text())) for pid in pids)
        parent.kill()
    wait_until(lambda: not any(is_alive(int(pid.read_text())) for pid in pids))


def test_ctrl_c_waits_for_no_codec_that_hangs(tmp_path, wait_until, is_alive):
    code = PARENT.format(paths=[f"hang {tmp_path / 'one'}", f"hang {tmp_path / 'two'}"])
    pids = [tmp_path / "one", tmp_path / "two"]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=_env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as parent:
        wait_until(lambda: all(pid.exists() and pid.read_text() for pid in pids))
        parent.send_signal(signal.SIGINT)
        _, said = parent.communicate(timeout=60)  # the workers would hang for ten minutes
    assert said.decode().splitlines()[-1] == "KeyboardInterrupt"
    assert not any(is_alive(int(pid.read_text())) for pid in pids)


def _env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}


def test_real_videos_are_decoded_and_broken_ones_explained(clip_path, tmp_path):
    (tmp_path / "torn.mp4").write_bytes(clip_path("h264").read_bytes()[:700])
    work = [
        DecodeJob(41, "", str(clip_path("h264 open GOP in TS"))),
        DecodeJob(42, "", str(tmp_path / "torn.mp4")),
        DecodeJob(43, "", str(clip_path("vp9")), decoder="decord"),
    ]
    real = PoolOptions(workers=2, timeout_seconds=60.0, memory_bytes=2**32)
    outcomes = {decoded.outcome.record_id: decoded.outcome for decoded in filter(None, decode_as_ready(work, real))}
    assert [len(outcomes[number].frames) for number in (41, 43)] == [2, 2]
    torn = failure(outcomes[42])
    assert (torn.stage, torn.error_type, torn.permanent) == ("decode", "VideoOpenError", False)
    assert torn.message.startswith(f"Record 42: Video '{tmp_path}/torn.mp4' can't be opened: Invalid data found")
    assert "moov atom not found" in torn.details
