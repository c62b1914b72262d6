"""Damaged videos: nothing hangs, ends the run, or comes out as anything but frames or a known error.

`python benchmarks/fuzz.py` does the same a thousand times and more; `benchmarks/watched.py` looks at what the workers
ask the kernel for meanwhile.
"""

import json
import os
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


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: nothing was seen from outside")
def test_workers_that_decode_damaged_videos_reach_nothing_outside_and_ask_for_nothing():
    command = [sys.executable, BENCHMARKS / "watched.py"]
    fuzz = [sys.executable, BENCHMARKS / "fuzz.py", "--mutations", "45", "--timeout-seconds", "60", "--json"]
    done = subprocess.run([*command, *fuzz], capture_output=True, text=True, check=False, timeout=600)
    assert "PTRACE" not in done.stderr, f"strace may not watch here: {done.stderr}"
    found = re.search(r"workers (\d+), confined (\d+), asked in vain (\d+), reached outside (\d+)", done.stderr)
    assert found is not None, done.stderr
    workers, confined, refused, reached = map(int, found.groups())
    assert (workers >= 2, confined, reached, done.returncode) == (True, workers, 0, 0), done.stderr
    assert refused == 0, done.stderr  # what is loaded late would be asked for: see PoolOptions.libraries


@pytest.mark.soak
def test_twenty_thousand_damaged_videos_harm_nobody_and_nothing_escapes():
    command = [sys.executable, BENCHMARKS / "fuzz.py", "--mutations", "20000", "--timeout-seconds", "120", "--json"]
    done = subprocess.run([*command, "--workers", str(os.cpu_count())], capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    print(said)
    assert (said["escapes"], said["mutations"], said["intact"]) == ([], 20_000, 2_222)
