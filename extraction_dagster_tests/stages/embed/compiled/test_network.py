"""Compiled models: real compilers, libraries, processes and locks. One compilation serves most tests."""

from __future__ import annotations

import hashlib
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch  # noqa: TID253 - its threads are set

from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled.network import FOLDER, CompiledPasses, compiling, cpu_identity
from extraction_dagster.stages.embed.compiled.network import network as compiled
from extraction_dagster.stages.embed.models import registry as model
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import HostPasses
from extraction_dagster.stages.embed.vectors import normalise

PATIENCE_SECONDS = 300  # of a busy machine
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@pytest.fixture(scope="module")
def compiled_home(tmp_path_factory):
    """A data folder in which the packaged model has been compiled; read it only."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    home = tmp_path_factory.mktemp("compiled")
    load_model(Settings(home=home, device="cpu", compile="on", embed_threads=1))
    assert len(libraries(home)) == 1
    return home


@pytest.fixture(autouse=True)
def _no_resident_model(monkeypatch):
    monkeypatch.setattr(model, "_resident", {})


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def copied_home(compiled_home, home):
    shutil.copytree(compiled_home, home)
    return home


@pytest.fixture
def load(home):
    def load(*, may_compile=True, **overrides):
        wanted = {"home": home, "device": "cpu", "compile": "on", "embed_threads": 1, **overrides}
        return load_model(Settings(**wanted), may_compile=may_compile)

    return load


@pytest.fixture
def compiling_copies(monkeypatch, compiled_home):
    """In place of the compiler: a copy of what it made before. Holds how often it was called."""
    calls = []

    def copy(work, _settings, name):
        calls.append(name)
        return Path(shutil.copy(libraries(compiled_home)[0], work / "network.so"))

    monkeypatch.setattr(compiled, "compile_in", copy)
    return calls


@pytest.fixture
def pixels():
    return np.random.default_rng(8).integers(0, 256, (32, 224, 224, 3), np.uint8)


def libraries(home):
    return sorted((home / FOLDER).glob("*.so"))


def cosines(left, right):
    (one, _), (two, _) = normalise(left), normalise(right)
    return (one * two).sum(1)


def renamed_to_its_hash(path):
    key = path.name.partition("-")[0]
    return path.rename(path.with_name(f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()}.so"))


@pytest.mark.slow
@pytest.mark.parametrize("num_frames", [1, 7, 32])
def test_compiled_vectors_are_those_of_the_model_in_any_batch(copied_home, load, model_vectors, pixels, num_frames):
    fast = load()

    assert isinstance(fast.passes, CompiledPasses)
    assert isinstance(fast.passes._uncompiled, HostPasses)
    vectors = fast.embed_prepared(pixels[:num_frames])
    assert (vectors.shape, vectors.dtype) == ((num_frames, 1280), np.float32)
    assert cosines(vectors, model_vectors[:num_frames]).min() > 0.999999
    assert np.abs(vectors - model_vectors[:num_frames]).max() < 1e-4
    assert libraries(copied_home) == [copied_home / FOLDER / libraries(copied_home)[0].name]


@pytest.fixture
def model_vectors(cpu_settings, pixels):
    return load_model(cpu_settings).embed_prepared(pixels)


@pytest.mark.slow
@pytest.mark.usefixtures("copied_home")
def test_compiling_moves_no_fingerprint_and_cut_vectors_are_cut(load, model_vectors, pixels, cpu_settings):
    plain = load_model(cpu_settings).fingerprint
    assert load().fingerprint == plain

    cut = load(embedding_dim=64, may_compile=False)  # of the same compiled network

    assert isinstance(cut.model.passes, CompiledPasses)
    assert np.abs(cut.embed_prepared(pixels) - model_vectors[:, :64]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("copied_home")
def test_a_compiled_network_uses_the_threads_of_the_process_that_runs_it(load, pixels):
    one = load().embed_prepared(pixels)
    before = torch.get_num_threads()
    try:
        two = load(embed_threads=2).embed_prepared(pixels)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

    assert np.abs(one - two).max() < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("copied_home")
def test_other_threads_run_while_a_compiled_pass_does(load, pixels):
    fast, over, naps = load(), threading.Event(), []

    def nap():
        while not over.is_set():
            time.sleep(0.001)
            naps.append(1)

    thread = threading.Thread(target=nap, daemon=True)
    thread.start()
    most = 0
    try:
        for _ in range(50):  # on a busy machine the other thread may not get its turn in the first
            before = len(naps)
            fast.embed_prepared(np.concatenate([pixels, pixels]))
            most = max(most, len(naps) - before)
            if most > 10:
                break
    finally:
        over.set()
        thread.join(timeout=60)

    # A pass that kept Python's lock would let the other thread nap twice at most.
    assert most > 10


@pytest.mark.slow
def test_every_later_process_loads_what_is_there(copied_home, compiling_copies, load):
    before = libraries(copied_home)

    load()
    load(embed_batch_size=3)

    assert (compiling_copies, libraries(copied_home)) == ([], before)


@pytest.mark.slow
def test_a_single_query_uses_what_is_there_and_compiles_nothing(copied_home, compiling_copies, load):
    assert isinstance(load(may_compile=False).passes, CompiledPasses)

    libraries(copied_home)[0].unlink()
    assert isinstance(load(may_compile=False, embed_threads=2).passes, HostPasses)
    assert compiling_copies == []


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-5000])


def no_library(path):
    path.write_bytes(b"\x7fELF and nothing more")
    renamed_to_its_hash(path)


def other_library(path):
    import _ctypes  # noqa: PLC0415 - any library will do

    path.write_bytes(Path(_ctypes.__file__).read_bytes())
    renamed_to_its_hash(path)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut_short, no_library, other_library])
def test_a_damaged_library_is_thrown_away_and_made_anew(copied_home, compiling_copies, load, caplog, damage):
    intact = libraries(copied_home)
    damage(intact[0])

    again = load()

    assert isinstance(again.passes, CompiledPasses)
    assert compiling_copies == ["efficientnet-lite0"]
    assert libraries(copied_home) == intact
    assert "it is removed and made anew" in caplog.text


@pytest.mark.slow
def test_a_library_that_gives_other_vectors_is_thrown_away(copied_home, compiling_copies, load, caplog, monkeypatch):
    network = compiled.NativeNetwork.__call__
    wrong = iter([True, False])

    def run(self, pixels):
        return network(self, pixels)[:, ::-1] if next(wrong) else network(self, pixels)

    monkeypatch.setattr(compiled.NativeNetwork, "__call__", run)

    assert isinstance(load().passes, CompiledPasses)
    assert compiling_copies == ["efficientnet-lite0"]
    assert "its vectors are not the model's; it is removed and made anew" in caplog.text
    assert len(libraries(copied_home)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("copied_home")
def test_what_the_compiled_code_does_not_expect_runs_uncompiled(load, pixels):
    fast = load()
    small = np.ascontiguousarray(pixels[:2, :192, :192])

    assert np.array_equal(fast.embed_prepared(small), fast.passes._uncompiled.start(small).result())
    turned = pixels[:2].transpose(0, 2, 1, 3)  # not contiguous, which compiled code would not see
    assert cosines(fast.embed_prepared(turned), fast.passes._uncompiled.start(turned).result()).min() > 0.999999


@pytest.mark.slow
@pytest.mark.usefixtures("copied_home")
def test_a_pass_that_fails_is_run_uncompiled_so_that_its_error_has_a_name(load, pixels, monkeypatch):
    fast = load()
    expected = fast.passes._uncompiled.start(pixels[:2]).result()
    monkeypatch.setattr(fast.passes._network, "_run", lambda *_: 1)

    assert np.array_equal(fast.embed_prepared(pixels[:2]), expected)


@pytest.mark.slow
def test_a_folder_that_others_may_write_to_is_not_loaded_from(copied_home, compiling_copies, load, caplog):
    (copied_home / FOLDER).chmod(0o777)

    assert isinstance(load().passes, HostPasses)
    assert "others may write to it (mode 777), expected what this user alone can write" in caplog.text
    assert compiling_copies == []


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", ["siglip"])
def test_a_model_of_transformers_is_compiled_too(saved_models, load, home, kind):
    folder = str(saved_models(kind))
    plain = load_model(Settings(model=folder, device="cpu", embed_threads=1))
    pictures = [np.random.default_rng(n).integers(0, 256, (60, 50 + n, 3), np.uint8) for n in range(9)]
    expected, texts = plain.embed_images(pictures), plain.embed_text(["two cats"])

    fast = load(model=folder)

    assert isinstance(fast.passes, CompiledPasses)
    assert cosines(fast.embed_images(pictures), expected).min() > 0.999999
    assert np.array_equal(fast.embed_text(["two cats"]), texts)
    assert fast.fingerprint == plain.fingerprint
    assert len(libraries(home)) == 1


# ONNX Runtime


@pytest.mark.parametrize("kind", [None, "clip", "siglip", "dinov2"])
def test_onnx_runtime_gives_the_same_vectors_in_any_batch(saved_models, load, home, kind):
    named = {"model": str(saved_models(kind))} if kind else {}
    plain = load_model(Settings(device="cpu", embed_threads=1, **named))
    pictures = [np.random.default_rng(n).integers(0, 256, (60, 50 + n, 3), np.uint8) for n in range(9)]
    expected = plain.embed_images(pictures)

    fast = load(compile="onnxruntime", **named)

    assert isinstance(fast.passes, CompiledPasses)
    assert type(fast.passes._network).__name__ == "OnnxNetwork"
    for count in (1, 4, 9):
        vectors = fast.embed_images(pictures[:count])
        assert (vectors.shape, vectors.dtype) == (expected[:count].shape, np.float32)
        assert cosines(vectors, expected[:count]).min() > 0.999999
    assert fast.fingerprint == plain.fingerprint
    assert [path.suffix for path in sorted((home / FOLDER).iterdir())] == [".onnx", ".lock"]


def test_each_kind_has_a_network_of_its_own(load, home, monkeypatch):
    def compile_in(work, settings, _name):
        (work / f"{settings.compile}.so").write_bytes(b"no network")
        return work / f"{settings.compile}.so"

    monkeypatch.setattr(compiled, "compile_in", compile_in)
    monkeypatch.setenv("CXX", sys.executable)
    load(compile="on")
    load(compile="onnxruntime")

    assert len({path.name.partition("-")[0] for path in libraries(home)}) == 2


def test_without_onnx_runtime_one_line_says_how_to_get_it(load, monkeypatch, caplog):
    def absent(package):
        raise compiling.PackageNotFoundError(package)

    monkeypatch.setattr(compiling, "version", absent)

    assert isinstance(load(compile="onnxruntime").passes, HostPasses)
    assert "there is no" not in caplog.text
    assert (
        "runs uncompiled: the package 'onnx' is not installed. Its vectors are the same, at more CPU time a frame. "
        "Install it: pip install 'extraction-dagster[onnxruntime]'."
    ) in caplog.text


def test_a_file_that_onnx_runtime_refuses_is_made_anew_once(load, monkeypatch, caplog):
    def garbage(work, *_):
        (work / "network.onnx").write_bytes(b"no network at all")
        return work / "network.onnx"

    monkeypatch.setattr(compiled, "compile_in", garbage)

    assert isinstance(load(compile="onnxruntime").passes, HostPasses)
    assert "can't be used: " in caplog.text
    assert "it is removed" not in caplog.text
    monkeypatch.undo()

    assert isinstance(load(compile="onnxruntime", embed_threads=2).passes, CompiledPasses)
    assert "it is removed and made anew" in caplog.text


# Where there is no compiler, or a bad one


@pytest.mark.parametrize("cxx", [None, "g++-of-nowhere -O3", " "])
def test_without_a_compiler_the_model_runs_as_it_is_and_one_line_says_why(load, home, monkeypatch, caplog, cxx):
    monkeypatch.setenv("PATH", str(home))
    monkeypatch.delenv("CXX", raising=False)
    if cxx:
        monkeypatch.setenv("CXX", cxx)

    plain = load()

    assert isinstance(plain.passes, HostPasses)
    assert len(caplog.records) == 1
    name = cxx or ("clang++" if sys.platform == "darwin" else "g++")
    assert caplog.messages[0] == (
        f"Model 'efficientnet-lite0' runs uncompiled: there is no C++ compiler {name!r}. Its vectors are the same, at "
        "more CPU time a frame. Install one, or name it in CXX. EXTRACTION_COMPILE=off ends this message."
    )


@pytest.mark.slow
def test_a_compiler_that_fails_is_asked_once_a_day(load, home, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no room for a compiler >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))

    assert isinstance(load().passes, HostPasses)
    assert "runs uncompiled: compiling failed (" in caplog.text
    assert [path.suffix for path in sorted((home / FOLDER).iterdir())] == [".failed", ".lock"]
    caplog.clear()
    monkeypatch.setattr(compiled, "compile_in", pytest.fail)

    assert isinstance(load(embed_threads=2).passes, HostPasses)
    assert "when it was last tried" in caplog.text


def test_a_full_disk_is_a_warning(load, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled, "compile_in", full)
    monkeypatch.setenv("CXX", sys.executable)

    assert isinstance(load().passes, HostPasses)
    assert "runs uncompiled: [Errno 28] No space left on device." in caplog.text


def test_on_another_device_nothing_is_compiled(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(compiled, "compile_in", pytest.fail)
    plain = load_model(Settings(device="cpu", embed_threads=1))
    plain.device = "cuda:0"

    compiled.speed_up(plain, Settings(compile="on"), identity={}, may_compile=True)

    assert isinstance(plain.passes, HostPasses)
    assert "EXTRACTION_COMPILE is for the CPU: model 'efficientnet-lite0' runs on cuda:0 as it is" in caplog.text


def test_the_worker_says_what_the_compiler_said(tmp_path):
    said = tmp_path / "said"
    said.write_text(
        "Traceback ...\nCppCompileError: C++ compile error\n\nCommand:\ng++ x\n\nOutput:\nx.cpp: no room\n 2\n"
    )
    assert compiling._last_words(said, 1) == "x.cpp: no room"
    said.write_text("Traceback ...\nValueError: not exportable\n\n")
    assert compiling._last_words(said, 1) == "ValueError: not exportable"
    assert compiling._last_words(said, -11) == "ended by signal 11"
    said.write_text("")
    assert compiling._last_words(said, 1) == "no words"


def test_the_key_follows_what_the_cpu_can_do(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 sse\nbugs : none\n\nflags : other\n")
    identity = cpu_identity(cpuinfo)

    assert identity["flags"] == ["avx2", "fpu", "sse"]
    assert identity["torch"] == torch.__version__
    assert cpu_identity(tmp_path / "none")["flags"] != identity["flags"]


# Several processes, and processes that die

LOAD = """
import faulthandler
faulthandler.dump_traceback_later(300, exit=True)  # whoever waits for a line waits no longer
import logging, sys, time
from pathlib import Path
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled.network import network as compiled
from extraction_dagster.stages.embed.models.registry import load_model
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
home, library = Path(sys.argv[1]), sys.argv[2]
def compile_in(work, settings, name):
    import shutil
    print("compiling", flush=True)
    for _ in range(6000):
        if (home / "go").exists():
            break
        time.sleep(0.02)
    return Path(shutil.copy(library, work / "network.so"))
if library:
    compiled.compile_in = compile_in
model = load_model(Settings(home=home, device="cpu", compile="on", embed_threads=1))
print(type(model.passes).__name__, flush=True)
"""


@pytest.fixture
def process(home):
    """`process()`: a process that loads the model, ended with the test; with a library, that is what it compiles."""
    home.mkdir(exist_ok=True)
    running = []

    def start(library=""):
        command = [sys.executable, "-c", LOAD, str(home), str(library)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_of_two_processes_one_compiles_and_the_other_goes_on(process, compiled_home, home):
    library = libraries(compiled_home)[0]
    first = process(library)
    assert first.stdout.readline() == "compiling\n"
    said, _ = process(library).communicate(timeout=PATIENCE_SECONDS)
    assert said.splitlines() == [
        "Another process is compiling model 'efficientnet-lite0'; this one runs it as it is",
        "HostPasses",
    ]
    assert libraries(home) == []
    (home / "go").touch()
    assert first.communicate(timeout=PATIENCE_SECONDS)[0] == "CompiledPasses\n"
    assert [path.name for path in libraries(home)] == [library.name]

    assert process(library).communicate(timeout=PATIENCE_SECONDS)[0] == "CompiledPasses\n"


@pytest.mark.slow
@needs_compiler
def test_kill_9_while_compiling_ends_the_compiler_and_leaves_nothing_in_the_way(process, home, load, compiling_copies):
    loading = process()
    worker = within_patience(loading, lambda: child(loading, "compile_worker"))
    # What the compiler is given.
    within_patience(loading, lambda: list((home / FOLDER).glob("*.tmp/**/*.cpp")))
    loading.kill()
    loading.communicate(timeout=PATIENCE_SECONDS)
    worker.wait(timeout=60)
    assert libraries(home) == []
    assert len(list((home / FOLDER).glob("*.tmp"))) == 1

    assert isinstance(load().passes, CompiledPasses)
    assert compiling_copies == ["efficientnet-lite0"]
    assert [path.suffix for path in sorted((home / FOLDER).iterdir())] == [".so", ".lock"]


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
    monkeypatch.setenv("CXX", sys.executable)

    with pytest.raises(KeyboardInterrupt):
        load()

    assert workers[0].returncode == -signal.SIGKILL
    assert [path.suffix for path in (home / FOLDER).iterdir()] == [".lock"]


def test_a_worker_whose_parent_is_gone_ends_at_once(tmp_path):
    (tmp_path / "job").write_text('{"parent": 1, "settings": {}, "output": "/nowhere"}')
    command = [sys.executable, "-m", "extraction_dagster.stages.embed.compiled.worker", str(tmp_path / "job")]

    ran = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE_SECONDS)

    assert ran.returncode == 1
    assert ran.stderr.strip() == b"whoever started this is gone"


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
