"""Having a model compiled: by one process, once; whatever goes wrong, the model runs as it is."""

from __future__ import annotations

import hashlib
import logging
import signal
import subprocess
import sys
import time
from contextlib import suppress

import onnx
import psutil
import pytest

from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled import compiling
from extraction_dagster.stages.embed.compiled.compiling import FOLDER
from extraction_dagster.stages.embed.compiled.network import CompiledPasses, OnnxNetwork
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import HostPasses

PATIENCE_SECONDS = 300  # of a busy machine


def networks(home):
    return sorted((home / FOLDER).glob("*.onnx"))


@pytest.mark.slow
def test_every_later_process_loads_what_is_there(copied_home, compiling_copies, load):
    before = networks(copied_home)

    load()
    load(embed_batch_size=3)

    assert (compiling_copies, networks(copied_home)) == ([], before)


@pytest.mark.slow
def test_a_single_query_uses_what_is_there_and_compiles_nothing(copied_home, compiling_copies, load):
    assert isinstance(load(may_compile=False).passes, CompiledPasses)

    networks(copied_home)[0].unlink()
    assert isinstance(load(may_compile=False, embed_threads=2).passes, HostPasses)
    assert compiling_copies == []


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-5000])


def no_network(path):
    replace(path, b"\x08\x08 and nothing more")


def other_network(path):
    """The mean colour of each picture."""
    helper, kind = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["pixels"], ["floats"], to=kind.FLOAT),
            helper.make_node("ReduceMean", ["floats", "axes"], ["vectors"], keepdims=0),
        ],
        "other",
        [helper.make_tensor_value_info("pixels", kind.UINT8, ["frames", 224, 224, 3])],
        [helper.make_tensor_value_info("vectors", kind.FLOAT, ["frames", 3])],
        [helper.make_tensor("axes", kind.INT64, [2], [1, 2])],
    )
    opset = helper.make_opsetid("", 18)
    replace(path, helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())


def replace(path, contents):
    path.write_bytes(contents)
    key = path.name.partition("-")[0]
    path.rename(path.with_name(f"{key}-{hashlib.sha256(contents).hexdigest()}.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut_short, no_network, other_network])
def test_a_damaged_network_is_thrown_away_and_made_again(copied_home, compiling_copies, load, caplog, damage):
    intact = networks(copied_home)
    damage(intact[0])

    again = load()

    assert isinstance(again.passes, CompiledPasses)
    assert compiling_copies == ["efficientnet-lite0"]
    assert networks(copied_home) == intact
    assert "it is removed and made again" in caplog.text


@pytest.mark.slow
def test_a_network_that_gives_other_vectors_is_thrown_away(copied_home, compiling_copies, load, caplog, monkeypatch):
    network = OnnxNetwork.__call__
    wrong = iter([True, False])

    def run(self, pixels):
        return network(self, pixels)[:, ::-1] if next(wrong) else network(self, pixels)

    monkeypatch.setattr(OnnxNetwork, "__call__", run)

    assert isinstance(load().passes, CompiledPasses)
    assert compiling_copies == ["efficientnet-lite0"]
    assert "its vectors are not the model's; it is removed and made again" in caplog.text
    assert len(networks(copied_home)) == 1


@pytest.mark.slow
def test_a_folder_that_others_may_write_to_is_not_loaded_from(copied_home, compiling_copies, load, caplog):
    (copied_home / FOLDER).chmod(0o777)

    assert isinstance(load().passes, HostPasses)
    assert "others may write to it (mode 777), expected what this user alone can write" in caplog.text
    assert compiling_copies == []


def test_without_onnx_runtime_one_line_says_how_to_get_it(load, monkeypatch, caplog):
    def absent(package):
        raise compiling.PackageNotFoundError(package)

    monkeypatch.setattr(compiling, "version", absent)

    assert isinstance(load().passes, HostPasses)
    assert "there is no" not in caplog.text
    assert (
        "runs uncompiled: the package 'onnx' is not installed. Its vectors are the same, at more CPU time a frame. "
        "Install it: pip install 'extraction-dagster[onnxruntime]'."
    ) in caplog.text


def test_a_file_that_onnx_runtime_refuses_is_made_again_once(load, monkeypatch, caplog):
    def garbage(work, *_):
        (work / "network.onnx").write_bytes(b"no network at all")
        return work / "network.onnx"

    monkeypatch.setattr(compiling, "compile_in", garbage)

    assert isinstance(load().passes, HostPasses)
    assert "can't be used: " in caplog.text
    assert "it is removed" not in caplog.text
    monkeypatch.undo()

    assert isinstance(load(embed_threads=2).passes, CompiledPasses)
    assert "it is removed and made again" in caplog.text


@pytest.mark.slow
def test_a_compiler_that_fails_is_asked_once_a_day(load, home, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "_WORKER", "no_such_worker")

    assert isinstance(load().passes, HostPasses)
    assert "runs uncompiled: compiling failed (" in caplog.text
    assert "No module named no_such_worker). Its vectors are the same" in caplog.text
    assert [path.suffix for path in sorted((home / FOLDER).iterdir())] == [".failed", ".lock"]
    caplog.clear()
    monkeypatch.setattr(compiling, "compile_in", pytest.fail)

    assert isinstance(load(embed_threads=2).passes, HostPasses)
    assert "when it was last tried" in caplog.text


def test_a_full_disk_is_a_warning(load, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiling, "compile_in", full)

    assert isinstance(load().passes, HostPasses)
    assert "runs uncompiled: [Errno 28] No space left on device." in caplog.text


def test_on_another_device_nothing_is_compiled(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compiling, "compile_in", pytest.fail)
    plain = load_model(Settings(device="cpu", embed_threads=1))
    plain.device = "cuda:0"

    compiling.speed_up(plain, Settings(compile="onnxruntime"), identity={}, may_compile=True)

    assert isinstance(plain.passes, HostPasses)
    assert "EXTRACTION_COMPILE is for the CPU: model 'efficientnet-lite0' runs on cuda:0 as it is" in caplog.text


def test_the_last_line_of_the_worker_says_why_it_failed(tmp_path):
    said = tmp_path / "said"
    said.write_text("Traceback ...\nValueError: not exportable\n\n")
    assert compiling._last_words(said, 1) == "ValueError: not exportable"
    assert compiling._last_words(said, -11) == "ended by signal 11"
    said.write_text("")
    assert compiling._last_words(said, 1) == "no words"


# Several processes, and processes that die

LOAD = """
import faulthandler
faulthandler.dump_traceback_later(300, exit=True)  # the test must not wait for a line for ever
import logging, sys, time
from pathlib import Path
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled import compiling
from extraction_dagster.stages.embed.models.registry import load_model
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
home, network = Path(sys.argv[1]), sys.argv[2]
def compile_in(work, settings, name):
    import shutil
    print("compiling", flush=True)
    for _ in range(6000):
        if (home / "go").exists():
            break
        time.sleep(0.02)
    return Path(shutil.copy(network, work / "network.onnx"))
if network:
    compiling.compile_in = compile_in
model = load_model(Settings(home=home, device="cpu", compile="onnxruntime", embed_threads=1))
print(type(model.passes).__name__, flush=True)
"""


@pytest.fixture
def process(home):
    """`process()`: a process that loads the model, ended with the test; with a network, that is what it compiles."""
    home.mkdir(exist_ok=True)
    running = []

    def start(network=""):
        command = [sys.executable, "-c", LOAD, str(home), str(network)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_of_two_processes_one_compiles_and_the_other_goes_on(process, compiled_home, home):
    network = networks(compiled_home)[0]
    first = process(network)
    assert first.stdout.readline() == "compiling\n"
    said, _ = process(network).communicate(timeout=PATIENCE_SECONDS)
    assert said.splitlines() == [
        "Another process is compiling model 'efficientnet-lite0'; this one runs it as it is",
        "HostPasses",
    ]
    assert networks(home) == []
    (home / "go").touch()
    assert first.communicate(timeout=PATIENCE_SECONDS)[0] == "CompiledPasses\n"
    assert [path.name for path in networks(home)] == [network.name]

    assert process(network).communicate(timeout=PATIENCE_SECONDS)[0] == "CompiledPasses\n"


@pytest.mark.slow
def test_kill_9_while_compiling_ends_the_worker_and_leaves_nothing_in_the_way(process, home, load, compiling_copies):
    loading = process()
    worker = within_patience(loading, lambda: child(loading, "compiled.worker"))
    within_patience(loading, lambda: worker.memory_info().rss > 2**27)  # it has begun to load torch
    loading.kill()
    loading.communicate(timeout=PATIENCE_SECONDS)
    worker.wait(timeout=60)
    assert networks(home) == []
    assert len(list((home / FOLDER).glob("*.tmp"))) == 1

    assert isinstance(load().passes, CompiledPasses)
    assert compiling_copies == ["efficientnet-lite0"]
    assert [path.suffix for path in sorted((home / FOLDER).iterdir())] == [".onnx", ".lock"]


@pytest.mark.slow
def test_an_interruption_while_compiling_ends_the_worker(home, load, monkeypatch):
    workers = []

    class Interrupted(compiling.subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            workers.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(compiling.subprocess, "Popen", Interrupted)

    with pytest.raises(KeyboardInterrupt):
        load()

    assert workers[0].returncode == -signal.SIGKILL
    assert [path.suffix for path in (home / FOLDER).iterdir()] == [".lock"]


def test_a_worker_whose_parent_is_gone_ends_at_once(tmp_path):
    (tmp_path / "job").write_text('{"parent": 1, "settings": {}, "output": "/nowhere"}')
    command = [sys.executable, "-m", "extraction_dagster.stages.embed.compiled.worker", str(tmp_path / "job")]

    ran = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE_SECONDS)

    assert ran.returncode == 1
    assert ran.stderr.strip() == b"the process that started this one is gone"


def child(process, word):
    """The process's child whose command line has a word, once there is one."""
    for found in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if any(word in part for part in found.cmdline()):
                return found
    return None


def within_patience(process, ask):
    """What `ask` gives, once it gives something; the process goes on meanwhile."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := ask()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found
