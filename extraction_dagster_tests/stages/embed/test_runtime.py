from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch  # noqa: TID253 - what the settings act on

from extraction_dagster.errors.embed import EmbeddingDeviceError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed import runtime
from extraction_dagster.stages.embed.runtime import (
    batch_size,
    lease_gpu,
    num_readers,
    resolve_device,
    tune_process,
    usable_cores,
)

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")


@NO_GPU
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_there_is_an_error_that_names_those_that_are(device, tmp_path):
    with pytest.raises(EmbeddingDeviceError, match=rf"Device '{device}' is not available, .* sees: cpu\. Set"):
        resolve_device(device, tmp_path)


@NO_GPU
def test_auto_is_the_cpu_where_there_is_no_gpu(tmp_path):
    assert resolve_device("auto", tmp_path) == "cpu"
    assert resolve_device("cpu", tmp_path) == "cpu"


def test_auto_is_the_first_gpu_and_a_number_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runtime, "_uuid", str)
    monkeypatch.setattr(runtime, "_leases", {})

    assert resolve_device("auto", tmp_path) == "cuda:0"
    assert resolve_device("cuda", tmp_path) == "cuda:0"
    assert resolve_device("cuda:1", tmp_path) == "cuda:1"
    with pytest.raises(EmbeddingDeviceError, match=r"Device 'cuda:2' is not available, .*: cpu, cuda:0, cuda:1"):
        resolve_device("cuda:2", tmp_path)


@pytest.mark.parametrize(("limit", "cores"), [("150000 100000", 2), ("20000 100000", 1), ("max 100000", 6), ("", 6)])
def test_a_container_limit_caps_the_cores(tmp_path, monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    (tmp_path / "cpu.max").write_text(limit)

    assert usable_cores(tmp_path / "cpu.max") == cores
    assert usable_cores(tmp_path / "missing") == 6


def test_threads_are_those_asked_for_and_omp_num_threads_is_left_alone(monkeypatch):
    before = torch.get_num_threads()
    try:
        tune_process("cpu", 1)
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(2)
        tune_process("cpu", None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


LOAD = """
import os
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.models.registry import load_model
load_model(Settings(device="cpu"))
print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is what torch brings on Linux")
@pytest.mark.parametrize(("given", "policy", "left"), [(None, "PASSIVE", "None"), ("ACTIVE", "ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise_and_child_processes_see_no_difference(given, policy, left):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "TRUE"} | ({"OMP_WAIT_POLICY": given} if given else {})

    command = [sys.executable, "-c", LOAD]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)

    assert f"OMP_WAIT_POLICY = '{policy}'" in ran.stderr
    assert ran.stdout.strip() == left


@pytest.mark.parametrize("collects", [True, False])
def test_importing_torch_leaves_the_garbage_collector_as_it_was_and_torchs_objects_out_of_its_sight(collects):
    code = f"""
import gc
from extraction_dagster.stages.embed.runtime import import_torch
gc.enable() if {collects} else gc.disable()
collected = gc.get_stats()[0]["collections"]
import_torch()
print(gc.isenabled(), gc.get_freeze_count() > 100_000, gc.get_stats()[0]["collections"] - collected < 10)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)

    assert ran.stdout.split() == [str(collects), "True", "True"]


def test_batches_and_readers_are_those_set_or_what_the_device_wants(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    unset, chosen = Settings(), Settings(embed_batch_size=5, embed_readers=2)

    assert [batch_size(unset, device) for device in ("cpu", "cuda:1", "mps")] == [8, 128, 8]
    assert [num_readers(unset, device) for device in ("cpu", "cuda:1", "mps")] == [1, 4, 1]
    assert (batch_size(chosen, "cuda:0"), num_readers(chosen, "cuda:0")) == (5, 2)


# Which of several GPUs a process takes: the GPUs are stand-ins, the processes and locks are real

GPUS = ["cuda:0", "cuda:1", "cuda:2"]


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(runtime, "_uuid", lambda device: f"GPU-{device[-1]}")
    monkeypatch.setattr(runtime, "_leases", {})


LEASE = """
import faulthandler
faulthandler.dump_traceback_later(300, exit=True)  # the test must not wait for a line for ever
import sys
from pathlib import Path
from extraction_dagster.stages.embed import runtime
runtime._uuid = lambda device: f"GPU-{device[-1]}"
print(runtime.lease_gpu(["cuda:0", "cuda:1", "cuda:2"], Path(sys.argv[1])), flush=True)
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


@pytest.mark.usefixtures("stand_ins")
def test_a_single_gpu_is_shared_without_a_lock(tmp_path):
    assert lease_gpu(["cuda:0"], tmp_path / "gpus") == "cuda:0"
    assert not (tmp_path / "gpus").exists()


@pytest.mark.usefixtures("stand_ins")
def test_each_process_gets_a_gpu_of_its_own_until_it_dies(tmp_path, other_process):
    first, device_of_first = other_process()
    _, device_of_second = other_process()
    assert (device_of_first, device_of_second) == ("cuda:0", "cuda:1")
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)

    assert lease_gpu(GPUS, tmp_path) == "cuda:0"
    assert lease_gpu(GPUS, tmp_path) == "cuda:0"  # the one it has, not another
    assert other_process()[1] == "cuda:2"


@pytest.mark.usefixtures("stand_ins")
def test_when_every_gpu_is_taken_one_is_shared(tmp_path, other_process, monkeypatch, caplog):
    assert [other_process()[1] for _ in GPUS] == GPUS
    monkeypatch.setattr("os.getpid", lambda: 3001)

    assert lease_gpu(GPUS, tmp_path) == "cuda:1"
    assert "All 3 GPUs are in use by other processes; sharing cuda:1 with one of them" in caplog.text
