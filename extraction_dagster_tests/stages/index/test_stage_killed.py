"""A process is killed while it replaces points: nothing is lost, no search misses a record, the next one arrives."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from extraction_dagster.stages.index.points import PointFilter, point_id

pytestmark = pytest.mark.slow
_MOST_SECONDS = 600  # for all kills of a test, on a busy machine
# A round: upsert, count, delete, count, point_ids, flush, done. Two rounds and more can pass before the kill.
_MOST_STEPS = 16
_KINDS = ("exhausted", "unavailable", "internal", "aborted", "lost", "reset", "reset_after", "slow")
_METHODS = ("Upsert", "Count", "Delete", "Scroll")


@pytest.fixture
def start():
    """`start(ROUND, HOME, URL, PORT)`: another process replaces points; returns the pipe with what it says."""
    program = Path(__file__).with_name("replacing.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, str(program)], start_new_session=True, **pipes) as parent:
        guard = threading.Timer(_MOST_SECONDS, os.killpg, (parent.pid, signal.SIGKILL))
        guard.start()

        def begin(*arguments):
            parent.stdin.write(" ".join(map(str, arguments)) + "\n")
            return parent.stdout

        yield begin
        guard.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.soak)])
def test_a_killed_process_loses_nothing_and_the_next_one_arrives(tmp_path, replacing, start, kills):
    _kill_again_and_again(replacing, start, (tmp_path / "qdrant",), kills, most_seconds=0.005)


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_a_process_killed_beside_a_faulty_server_loses_nothing(  # noqa: PLR0913, PLR0917 - fixtures
    tmp_path, replacing, start, stand_in, wire, kills
):
    chance, place = random.Random(20260103), (tmp_path, stand_in.url, stand_in.port)
    searches = faults = 0

    @contextlib.contextmanager
    def faults_and_a_searcher():
        nonlocal searches, faults
        planned = [_fault(wire, chance) for _ in range(6)]
        with replacing.searching(other) as seen:
            stand_in.faults[:] = planned
            yield
        assert seen.missed == set()
        searches, faults = searches + seen.searches, faults + len(planned) - len(stand_in.faults)
        stand_in.faults.clear()
        _wait_until(lambda: not stand_in.num_at_work)  # what the killed process has asked for is still applied

    with replacing.open_store(*place) as other:
        other.ensure_collection(replacing.SPEC)
        _kill_again_and_again(replacing, start, place, kills, most_seconds=0.06, meanwhile=faults_and_a_searcher)
    print(f"{faults} faults, {searches} searches beside the replacements")
    assert faults >= kills


def _fault(wire, chance):
    """Any fault of a call that replaces points, or a write that is only acknowledged."""
    if chance.randrange(len(_KINDS) + 1) == 0:
        return wire.Fault(chance.choice(("Upsert", "Delete")), "acknowledged")
    return wire.Fault(chance.choice(_METHODS), chance.choice(_KINDS), 0.02)


def _kill_again_and_again(  # noqa: PLR0913 - what is killed, where, how often
    replacing, start, place, kills, *, most_seconds, meanwhile=contextlib.nullcontext
):
    chance = random.Random(20260102)
    with replacing.open_store(*place) as store:
        store.ensure_collection(replacing.SPEC)
        replacing.replace_round(store, 0)
    round_number, states = 1, {"one generation": 0, "mixed": 0}
    for _ in range(kills):
        with meanwhile():
            steps, seconds = chance.randrange(_MOST_STEPS), chance.uniform(0, most_seconds)
            round_number += _kill_after(start(round_number, *place), steps, seconds)
        with replacing.open_store(*place) as store:
            store.ensure_collection(replacing.SPEC)
            held = replacing.held(store)
            generations = {generation for frames in held.values() for _, generation in frames}
            states["mixed" if len(generations) > 1 else "one generation"] += 1
            assert set(held) == set(range(1, 61))
            assert replacing.missed(store) == set()
            # Frame 4 is sampled in every round: it was there before the kill, whichever step it hit.
            assert store.count(PointFilter(point_ids=[point_id(record_id, 4) for record_id in range(2, 60, 5)])) == 12
            assert generations <= {f"g{round_number - 1}", f"g{round_number}"}
            assert replacing.replace_round(store, round_number) == replacing.held(store)
        round_number += 1
    print(f"{kills} kills: {states}")


def _kill_after(said, steps, seconds):
    """Kill a process so many steps and seconds after it began; the number of rounds it finished."""
    word, _, number = said.readline().partition(" ")
    assert word == "go"
    lines = [said.readline() for _ in range(steps)]
    time.sleep(seconds)
    os.kill(int(number), signal.SIGKILL)
    while lines[-1:] != ["ended -9\n"]:
        lines.append(said.readline())
        assert lines[-1], f"it was too slow: {lines}"
    assert [line for line in lines if line.startswith("missed")] == []
    return lines.count("done\n")


def _wait_until(is_so):
    give_up = time.monotonic() + _MOST_SECONDS
    while not is_so():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.01)
