"""Damaged videos: nothing hangs, ends the run, or comes out as anything but frames or a known error.

`python benchmarks/fuzz.py` does the same a thousand times and more; `benchmarks/watched.py` looks at what the workers
ask the kernel for meanwhile.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.slow
def test_a_hundred_and_fifty_damaged_videos_harm_nobody_and_nothing_escapes():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "fuzz.py", "--mutations", "150", "--timeout-seconds", "60", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode in {0, 1}, done.stderr
    said = json.loads(done.stdout)
    assert said["escapes"] == []
    assert sum(said["outcomes"].values()) == 150 + 16
    assert said["intact"] == 16
    # Both ends are met: damage that a codec survives, and damage that it does not.
    assert said["outcomes"]["frames"] > 16
    assert said["outcomes"]["VideoOpenError"] > 0
    assert said["outcomes"]["VideoDecodeError"] > 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_workers_open_their_video_once_and_nothing_else_no_socket_no_program():
    command = [sys.executable, BENCHMARKS / "watched.py"]
    fuzz = [sys.executable, BENCHMARKS / "fuzz.py", "--mutations", "45", "--timeout-seconds", "60", "--json"]
    done = subprocess.run([*command, *fuzz], capture_output=True, text=True, check=False, timeout=600)
    if "PTRACE" in done.stderr:
        pytest.skip("strace may not watch here")
    found = re.search(r"workers (\d+), videos opened (\d+), out of the fence (\d+)", done.stderr)
    assert found is not None, done.stderr
    assert (int(found[1]) >= 2, found[2], found[3], done.returncode) == (True, "49", "0", 0), done.stderr
