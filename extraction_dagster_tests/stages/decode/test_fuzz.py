"""Damaged videos: nothing hangs, ends the run, or comes out as anything but frames or a known error.

`python benchmarks/fuzz.py` does the same a thousand times and more.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "fuzz.py"


@pytest.mark.slow
def test_a_hundred_and_fifty_damaged_videos_harm_nobody_and_nothing_escapes():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--mutations", "150", "--seed", "1", "--timeout-seconds", "60", "--json"],
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
