"""Which of several GPUs a process takes; the GPUs are stand-ins, the processes and locks are real."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from extraction_dagster.stages.embed import gpu_lease
from extraction_dagster.stages.embed.gpu_lease import lease_gpu

GPUS = ["cuda:0", "cuda:1", "cuda:2"]


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    monkeypatch.setattr(gpu_lease, "_uuid", lambda device: f"GPU-{device[-1]}")
    monkeypatch.setattr(gpu_lease, "_held", {})


LEASE = """
import faulthandler
faulthandler.dump_traceback_later(300, exit=True)  # whoever waits for a line waits no longer
import sys
from pathlib import Path
from extraction_dagster.stages.embed import gpu_lease
gpu_lease._uuid = lambda device: f"GPU-{device[-1]}"
print(gpu_lease.lease_gpu(["cuda:0", "cuda:1", "cuda:2"], Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path):
    """`other_process()`: the process that leases a device and keeps it, and the device."""
    running = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", LEASE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_single_gpu_is_shared_without_a_lock(tmp_path):
    assert lease_gpu(["cuda:0"], tmp_path / "gpus") == "cuda:0"
    assert not (tmp_path / "gpus").exists()


def test_each_process_gets_a_gpu_of_its_own_until_it_dies(tmp_path, other_process):
    first, device_of_first = other_process()
    _, device_of_second = other_process()
    assert (device_of_first, device_of_second) == ("cuda:0", "cuda:1")
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)

    assert lease_gpu(GPUS, tmp_path) == "cuda:0"
    assert lease_gpu(GPUS, tmp_path) == "cuda:0"  # the one it has, not another
    assert other_process()[1] == "cuda:2"


def test_when_every_gpu_is_taken_one_is_shared(tmp_path, other_process, monkeypatch, caplog):
    assert [other_process()[1] for _ in GPUS] == GPUS
    monkeypatch.setattr("os.getpid", lambda: 3001)

    assert lease_gpu(GPUS, tmp_path) == "cuda:1"
    assert "All 3 GPUs are in use by other processes; sharing cuda:1 with one of them" in caplog.text
