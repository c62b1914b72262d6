"""EXTRACTION_COMPILE: a model compiled once, by a process of its own (`worker`), and loaded by every later process.

The compiled network is found under a key made of the model's files and torch's version. When it can't be had (a package
that is not installed, another process compiling right now, a folder that others may write to), the model runs as it is,
one warning says why, and the vectors are the same.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from extraction_dagster.errors.embed import ArtifactFolderError, CompiledNetworkError, CompileError
from extraction_dagster.records import fingerprint
from extraction_dagster.stages.embed.compiled.artifacts import ArtifactFolder
from extraction_dagster.stages.embed.compiled.network import open_passes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.models.interface import EmbeddingModel
    from extraction_dagster.stages.embed.passes import Passes

_log = logging.getLogger(__name__)
FOLDER: Final = Path("cache", "compiled")
# Part of every key: raise it whenever another network would come out of the same model.
_RECIPE: Final = 3
_PATIENCE_SECONDS: Final = 1800.0
_WORKER: Final = "extraction_dagster.stages.embed.compiled.worker"
_MODEL_SETTINGS: Final = ("model", "trust_remote_code", "embed_dtype", "embed_threads", "resize_on")


def speed_up(model: EmbeddingModel, settings: Settings, *, identity: Mapping[str, object], may_compile: bool) -> None:
    """Let a model run compiled from now on, if that can be.

    Args:
        model: The model, loaded.
        settings: home, and what the model was loaded with.
        identity: What changes its vectors.
        may_compile: Compile it if no process has; else use only what is there.
    """
    if model.device != "cpu":
        _log.info("EXTRACTION_COMPILE is for the CPU: model %r runs on %s as it is", model.name, model.device)
        return
    import torch

    key = fingerprint(recipe=_RECIPE, identity=dict(identity), torch=torch.__version__)
    try:
        model.passes = _passes(model, settings, ArtifactFolder(settings.home / FOLDER), key, may_compile=may_compile)
    except (ArtifactFolderError, CompileError, CompiledNetworkError) as error:
        _log.warning("%s", error)
    except OSError as error:  # a full disk, for example
        _log.warning("%s", CompileError(model.name, str(error), "Make room, or choose another EXTRACTION_HOME."))


def _passes(
    model: EmbeddingModel, settings: Settings, folder: ArtifactFolder, key: str, *, may_compile: bool
) -> Passes:
    there = folder.find(key)
    if there is not None:
        try:
            return open_passes(there, model)
        except CompiledNetworkError as error:
            folder.discard(there, error.why)
    if not may_compile:
        return model.passes
    compiler = find_compiler(model.name)
    if why := folder.failure(key, compiler):
        fix = f"It is tried again a day after that, with another compiler, or without {folder.folder / key}.failed."
        raise CompileError(model.name, f"{why} when it was last tried", fix)
    with folder.building(key) as work:
        if work is None:
            _log.info("Another process is compiling model %r; this one runs it as it is", model.name)
            return model.passes
        made = folder.find(key)  # another process may have been done in the meantime
        if made is None:
            try:
                made = folder.keep(key, compile_in(work, settings, model.name))
            except CompileError as error:
                folder.remember_failure(key, compiler, error.why)
                raise
        return open_passes(made, model)


def find_compiler(model: str) -> str:
    """The versions of the packages that compile and run a network.

    Raises:
        CompileError: One is not installed.
    """
    try:
        return ", ".join(f"{package} {version(package)}" for package in ("onnx", "onnxruntime"))
    except PackageNotFoundError as error:
        fix = "Install it: pip install 'extraction-dagster[onnxruntime]'."
        raise CompileError(model, f"the package {error.name!r} is not installed", fix) from error


def compile_in(work: Path, settings: Settings, model: str) -> Path:
    """Compile the model of the settings, and try the result.

    Args:
        work: An empty folder, writable by this user alone.
        settings: The model.
        model: What to call it.

    Returns:
        The compiled network, a file in the folder.

    Raises:
        CompileError: It can't be compiled, or not within half an hour.
    """
    _log.info("Compiling model %r for ONNX Runtime, once; that takes some seconds", model)
    started, output = time.perf_counter(), work / "network.onnx"
    if why := _run_worker(settings, work, output):
        raise CompileError(model, f"compiling failed ({why})", "It is tried again in a day.")
    _log.info("Compiled model %r in %.0f s", model, time.perf_counter() - started)
    return output


def _run_worker(settings: Settings, work: Path, output: Path) -> str | None:
    """Run the process to its end; returns why it failed."""
    job = {
        "settings": {name: getattr(settings, name) for name in _MODEL_SETTINGS},
        "output": str(output),
        "parent": os.getpid(),
    }
    (work / "job").write_text(json.dumps(job), "utf-8")
    # All temporary files lie in our folder too; nothing is asked of the hub, and no setting but the job's holds.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EXTRACTION_")}
    environment |= {"TMPDIR": str(work), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", "-m", _WORKER, str(work / "job")]
    with (work / "said").open("wb") as log:
        worker = subprocess.Popen(  # noqa: S603 - a module of this project
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        worker.wait(timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done after {_PATIENCE_SECONDS:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)  # after an interruption
        worker.wait()
    return None if worker.returncode == 0 else _last_words(work / "said", worker.returncode)


def _last_words(said: Path, code: int) -> str:
    """The last line of what a process wrote: of a Python error, its name and text."""
    if code < 0:
        return f"ended by signal {-code}"
    lines = [line.strip() for line in said.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return (lines or ["no words"])[-1][:300]
