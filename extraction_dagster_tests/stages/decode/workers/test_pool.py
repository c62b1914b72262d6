import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from extraction_dagster.errors.decode import DecodeWorkerStartError
from extraction_dagster.records import Failure, Outcome
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import Decoded, PoolOptions, decode_as_ready
from extraction_dagster.stages.decode.workers.wire import Inbox

# What a job does is its path; a hang keeps the interpreter's lock, as a codec may. A worker's words come as `partial`.
FAULTS = """
import ctypes, dataclasses, os, pickle, signal, sys, time
import numpy as np
import simplejpeg
from extraction_dagster.errors.decode import NoVideoStreamError, VideoDecodeError
from extraction_dagster.records import EncodedFrames
from extraction_dagster.stages.decode.workers import wire, worker

send = worker.send

def send_half(line, header, *body):
    line.sendall(wire.SIZES.pack(1000, 0) + b"half of it")
    ctypes.PyDLL(None).sleep(600)

def send_steps(line, header, *body):
    while True:
        send(line, {"kind": "taken"})

def send_trick(line, header, *body):
    program = pickle.dumps(Trick())
    line.sendall(wire.SIZES.pack(len(program), 0) + program)

def send_much(line, header, *body):
    said = b'{"kind": "failed"}'
    line.sendall(wire.SIZES.pack(len(said), 2**62) + said)

ways = {"half": send_half, "steps": send_steps, "trick": send_trick, "much": send_much}
way = [send]
worker.send = lambda line, header, *body: way[0](line, header, *body)

class Trick:
    # What it becomes in whoever reads it: a program.

    def __reduce__(self):
        return os.system, ("touch tricked",)

def jpeg(width, height):
    picture = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    return simplejpeg.encode_jpeg(picture, quality=95, colorspace="RGB", colorsubsampling="444")

def run(job):
    what = job.path
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
    if what == "stranger":
        job = dataclasses.replace(job, record_id=99)
    if what == "nothing":
        return None
    if what == "refuse":
        raise NoVideoStreamError(job.path, "audio")
    if what == "broken":
        raise VideoDecodeError(job.path, listed_frames=0, why="it is damaged")
    if what == "bug":
        raise LookupError("no such thing")
    if what == "complaint":
        print("libcodec: a bad block", file=sys.stderr, flush=True)
    said = str(os.getpid())
    if what == "modules":
        said = " ".join(sorted({name.partition(".")[0] for name in sys.modules}))
    if what == "environment":
        said = " ".join(sorted(os.environ))
    count, width, height = (3, 4000, 224) if what == "big" else (1, 1, 1)
    number = np.arange(count)
    pictures = [jpeg(width, height)] * count
    times = number.astype(float), number.astype(float), number
    return EncodedFrames(job.record_id, job.content_version, pictures, *times, width, height, partial=said)
"""


BEFORE = set()


@pytest.fixture(autouse=True)
def faults(tmp_path, monkeypatch):
    BEFORE.update(workers_of())
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)


def options(**fields):
    given = {"workers": 2, "timeout_seconds": 60.0, "memory_bytes": 2**31, "task": "faults:run", "libraries": ()}
    return PoolOptions(**{**given, **fields})


def jobs(*paths):
    return [DecodeJob(number, "v1", path) for number, path in enumerate(paths)]


def run(*paths, **fields):
    """Every outcome by its record."""
    return {
        decoded.outcome.record_id: decoded.outcome
        for decoded in filter(None, decode_as_ready(jobs(*paths), options(**fields)))
    }


def workers_of(pid=None):
    """The worker processes of a parent, of this one if not said."""
    return {child.pid for child in psutil.Process(pid).children() if child.pid not in BEFORE}


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
    assert (len(frames), frames.width_px, frames.height_px) == (3, 4000, 224)
    assert sum(map(len, frames.jpegs)) > 2**22


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


def test_the_caller_has_a_turn_while_a_video_takes_long():
    stream = decode_as_ready(jobs("hang"), options())
    assert [next(stream), next(stream)] == [None, None]
    stream.close()


def test_a_worker_is_replaced_after_its_share_of_tasks():
    outcomes = run("ok", "ok", "ok", "ok", "ok", workers=1, max_tasks=2)
    pids = [outcomes[number].frames.partial for number in range(5)]
    assert pids[0] == pids[1]
    assert pids[2] == pids[3]
    assert len(set(pids)) == 3


@pytest.mark.parametrize(
    ("what", "fresh"), [("refuse", False), ("broken", True), ("bug", True), ("complaint", True), ("ok", False)]
)
def test_a_worker_is_replaced_after_a_video_that_a_library_could_not_read(what, fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / what).touch()
    outcomes = run("ok", what, "ok", workers=1)
    assert (outcomes[0].frames.partial != outcomes[2].frames.partial) is fresh


def test_a_worker_that_had_no_file_to_read_is_kept():
    outcomes = run("ok", "broken", "ok", workers=1)
    assert outcomes[0].frames.partial == outcomes[2].frames.partial


def test_closing_early_stops_every_worker(is_alive):
    outcomes = decode_as_ready(jobs("ok", "hang"), options())
    next(filter(None, outcomes))
    pids = workers_of()
    assert len(pids) == 2
    assert all(map(is_alive, pids))
    outcomes.close()
    assert not any(map(is_alive, pids))


def test_an_interruption_while_waiting_stops_every_worker(is_alive):
    pids = set()

    def interrupted():
        yield DecodeJob(0, "v1", "nap")
        yield DecodeJob(1, "v1", "ok")
        pids.update(workers_of())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        list(filter(None, decode_as_ready(interrupted(), options())))
    assert pids
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_ignores_what_a_terminal_or_a_service_sends_to_all_which_is_for_its_parent(sent):
    done = []

    def jobs_and_signal():
        yield DecodeJob(0, "v1", "ok")
        yield DecodeJob(1, "v1", "nap")
        os.kill(int(done[0].frames.partial), sent)
        yield DecodeJob(2, "v1", "ok")

    for decoded in filter(None, decode_as_ready(jobs_and_signal(), options(workers=1))):
        done.append(decoded.outcome)  # noqa: PERF401 - the jobs look at it meanwhile
    assert [outcome.failure for outcome in done] == [None] * 3
    assert len({outcome.frames.partial for outcome in done}) == 1


def test_an_idle_worker_that_died_is_replaced_without_loss():
    def jobs_between_deaths():
        yield DecodeJob(0, "v1", "ok")
        os.kill(int(done[0].frames.partial), signal.SIGKILL)
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

worker._receive = lambda _: os._exit(9)
run = None
"""
KILLED_AT_THE_START = """
import os, pathlib, signal, faults  # before the cage

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


def test_workers_load_neither_dagster_nor_a_database_nor_their_parents_main():
    names = set(run("modules")[0].frames.partial.split())
    assert {"extraction_dagster", "numpy"} <= names
    assert not names & {"dagster", "torch", "pytest", "pydantic", "qdrant_client", "sqlalchemy", "fsspec"}


@pytest.mark.parametrize("what", ["trick", "stranger", "nothing", "much"])
def test_a_worker_that_sends_what_it_should_not_is_not_believed(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = run("ok", what, "ok")
    assert [outcomes[number].failure for number in (0, 2)] == [None, None]
    assert failure(outcomes[1]).error_type == "DecodeWorkerDiedError"
    assert not (tmp_path / "tricked").exists()


def test_a_report_that_does_not_fit_this_process_fails_its_video_alone(monkeypatch):
    def full(self, wire, most_bytes, take=Inbox.take):
        message = take(self, wire, most_bytes)
        if message is not None and message[0].get("num_frames") == 3:
            raise MemoryError
        return message

    monkeypatch.setattr(Inbox, "take", full)
    outcomes = run("ok", "big", "ok")
    assert [outcomes[number].failure for number in (0, 2)] == [None, None]
    said = failure(outcomes[1])
    assert (said.error_type, "its report did not fit the memory" in said.message) == ("DecodeWorkerDiedError", True)


def test_a_worker_is_given_no_key_and_no_setting(monkeypatch):
    for name in ("EXTRACTION_QDRANT_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "DATABASE_URL"):
        monkeypatch.setenv(name, "canary-4711")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/somewhere")
    names = set(run("environment")[0].frames.partial.split())
    assert {"PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS"} <= names
    assert not {"EXTRACTION_QDRANT_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "DATABASE_URL"} & names


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can hide a process from others of its user")
def test_nobody_of_this_user_can_look_into_a_process_that_decodes():
    code = PARENT.format(paths=["ok"]) + "\nimport ctypes\nprint(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=faults_folder(), env=_env(), capture_output=True, check=True
    )
    assert done.stdout.decode().splitlines()[-1] == "0"


def faults_folder():
    return next(path for path in sys.path if (Path(path) / "faults.py").exists())


def test_costs_are_measured():
    (decoded,) = filter(None, decode_as_ready(jobs("nap"), options()))
    assert 0 < decoded.cpu_seconds < 0.5


PARENT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are told to ignore it
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready
from extraction_dagster.stages.decode.task import DecodeJob
print("main runs")
options = PoolOptions(2, 60.0, 2**31, task="faults:run", libraries=())
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
    code = PARENT.format(paths=["hang", "hang"])
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=_env(), stdout=subprocess.DEVNULL) as parent:
        wait_until(lambda: len(workers_of(parent.pid)) == 2)
        pids = workers_of(parent.pid)
        assert all(map(is_alive, pids))
        parent.kill()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_ctrl_c_waits_for_no_codec_that_hangs(tmp_path, wait_until, is_alive):
    code = PARENT.format(paths=["hang", "hang"])
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=_env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as parent:
        wait_until(lambda: len(workers_of(parent.pid)) == 2)
        pids = workers_of(parent.pid)
        parent.send_signal(signal.SIGINT)
        _, said = parent.communicate(timeout=60)  # the workers would hang for ten minutes
    assert said.decode().splitlines()[-1] == "KeyboardInterrupt"
    assert not any(map(is_alive, pids))


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
    assert torn.message.startswith(
        f"Record 42: Video '{tmp_path}/torn.mp4' can't be opened: it is an MP4 without its index"
    )
    assert "moov atom not found" in torn.details
