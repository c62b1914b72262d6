"""Having a model compiled by a process of its own, which `compile_worker` is."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from extraction_dagster.errors.embed import CompileError
from extraction_dagster.stages.embed.runtime import batch_size

if TYPE_CHECKING:
    from extraction_dagster.settings import Settings

_log = logging.getLogger(__name__)
ONNX: Final = "onnxruntime"
_PATIENCE_SECONDS: Final = 1800.0
_WORKER: Final = "extraction_dagster.stages.embed.compiled.worker"
_MODEL_SETTINGS: Final = ("model", "trust_remote_code", "embed_dtype", "embed_threads", "resize_on")


def find_compiler(kind: str, model: str) -> str:
    """What compiles: path and time of change of torch's C++ compiler, or the versions of ONNX's packages.

    Raises:
        CompileError: It is not there.
    """
    if kind == ONNX:
        try:
            return ", ".join(f"{package} {version(package)}" for package in ("onnx", "onnxruntime"))
        except PackageNotFoundError as error:
            fix = "Install it: pip install 'extraction-dagster[onnxruntime]'."
            raise CompileError(model, f"the package {error.name!r} is not installed", fix) from error
    command = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which((shlex.split(command) or [""])[0])
    if path is None:
        raise CompileError(model, f"there is no C++ compiler {command!r}", "Install one, or name it in CXX.")
    return f"{path} of {Path(path).stat().st_mtime_ns}"


def compile_in(work: Path, settings: Settings, model: str) -> Path:
    """Compile the model of the settings for this CPU, and try the result.

    Args:
        work: An empty folder, writable by this user alone.
        settings: The model, and the batch size to tune for.
        model: What to call it.

    Returns:
        The compiled network, a file in the folder.

    Raises:
        CompileError: It can't be compiled, or not within half an hour.
    """
    _log.info("Compiling model %r for this CPU, once; that takes up to some minutes", model)
    started, output = time.perf_counter(), work / ("network.onnx" if settings.compile == ONNX else "network.so")
    if why := _run_worker(settings, work, output):
        raise CompileError(model, f"compiling failed ({why})", "It is tried again in a day.")
    _log.info("Compiled model %r in %.0f s", model, time.perf_counter() - started)
    return output


def _run_worker(settings: Settings, work: Path, output: Path) -> str | None:
    """Run the process to its end; returns why it failed."""
    job = {
        "settings": {name: getattr(settings, name) for name in _MODEL_SETTINGS},
        "kind": settings.compile,
        "num_frames": batch_size(settings, "cpu"),
        "output": str(output),
        "parent": os.getpid(),
    }
    (work / "job").write_text(json.dumps(job), "utf-8")
    command = [sys.executable, "-P", "-m", _WORKER, str(work / "job")]
    with (work / "said").open("wb") as log:
        worker = subprocess.Popen(  # noqa: S603 - a module of this project
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(work), start_new_session=True
        )
    try:
        worker.wait(timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done after {_PATIENCE_SECONDS:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # after an interruption, with the compiler it started
        worker.wait()
    return None if worker.returncode == 0 else _last_words(work / "said", worker.returncode)


def _environment(work: Path) -> dict[str, str]:
    """All that torch writes and reads again lies in our folder; by default that is a well-known one in /tmp."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EXTRACTION_")}
    return inherited | {
        "TORCHINDUCTOR_CACHE_DIR": str(work),
        "TMPDIR": str(work),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def _last_words(said: Path, code: int) -> str:
    if code < 0:
        return f"ended by signal {-code}"
    _, marked, words = said.read_text("utf-8", errors="replace").rpartition("Output:")
    lines = [line.strip() for line in words.splitlines() if line.strip()] or ["no words"]
    # torch shows the compiler's own words behind "Output:"; a Python error's are on its last line.
    return (lines[0] if marked else lines[-1])[:300]
