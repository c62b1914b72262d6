"""EXTRACTION_COMPILE: a model compiled once, by a process of its own (`worker`), and loaded by every later process.

The compiled network is found under a key made of the model's files and torch's version. When it can't be had (a package
that is not installed, another process compiling right now, a folder that others may write to), the model runs as it is,
one warning says why, and the vectors are the same. What is loaded is what this user made, here, unaltered:

    <home>/cache/compiled       of this user, and writable by nobody else
        <key>-<sha256>.onnx     a compiled network; its name says what its bytes hash to
        <key>.lock              held by the process that compiles it
        <key>.tmp               the folder in which that process works
        <key>.failed            why it could not be compiled, and with which packages

A process that is killed while it compiles leaves a `.tmp`, which the next one to compile removes, and no lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from filelock import FileLock, Timeout

from extraction_dagster.errors.embed import ArtifactFolderError, CompiledNetworkError, CompileError
from extraction_dagster.files import publish
from extraction_dagster.permissions import make_private_folder, parents_fault
from extraction_dagster.records import fingerprint
from extraction_dagster.stages.embed.compiled.network import open_passes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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
_DAY_SECONDS: Final = 86_400
_UNUSED_SECONDS: Final = 30 * _DAY_SECONDS
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # neither a link nor a pipe to wait at
_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class ArtifactFolder:
    """The folder of compiled networks; it is made when it is first looked into.

    Args:
        folder: Under the data folder, never a shared place such as the system's temporary folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str) -> Path | None:
        """The compiled network of a key; a damaged one is removed first.

        Raises:
            ArtifactFolderError: The folder, or a file in it, could have been written by somebody else.
        """
        try:
            make_private_folder(self.folder)
        except OSError as error:
            raise ArtifactFolderError(str(self.folder), error.strerror or str(error)) from error
        self._check(self.folder, self.folder.lstat(), stat.S_ISDIR, "a folder")
        if why := parents_fault(self.folder):
            raise ArtifactFolderError(str(self.folder), why)
        for path in sorted(self.folder.glob(f"{key}-*.*")):
            if path.stem == f"{key}-{self._sha256(path)}":
                with suppress(OSError):
                    os.utime(path)  # the time of the last use
                return path
            self.discard(path, "is damaged")
        return None

    @contextmanager
    def opened(self, path: Path) -> Iterator[Path]:
        """A path of the very bytes that were judged, whatever stands under the name by then.

        Raises:
            ArtifactFolderError: What stands there now could have been written by somebody else, or is another.
        """
        try:
            handle = os.open(path, _READ_FLAGS)
        except OSError as error:
            raise ArtifactFolderError(str(path), error.strerror or str(error)) from error
        with os.fdopen(handle, "rb") as file:
            self._check(path, os.fstat(handle), stat.S_ISREG, "a file")
            if not path.stem.endswith(f"-{hashlib.file_digest(file, 'sha256').hexdigest()}"):
                raise ArtifactFolderError(str(path), "it was changed a moment ago")
            alias = Path(f"/proc/self/fd/{handle}")
            yield alias if alias.exists() else path

    def discard(self, path: Path, why: str) -> None:
        """Remove a compiled network that can't be used."""
        _log.warning("The compiled network %s %s; it is removed and made again", path, why)
        path.unlink(missing_ok=True)

    @contextmanager
    def building(self, key: str) -> Iterator[Path | None]:
        """An empty folder to compile in; None when another process is compiling the same."""
        lock = FileLock(self.folder / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield None
            return
        work = self.folder / f"{key}.tmp"
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(mode=0o700)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            lock.release()

    def keep(self, key: str, made: Path) -> Path:
        """Put a compiled network in its place, whole or not at all; those unused for a month go."""
        made.chmod(0o600)
        path = self.folder / f"{key}-{self._sha256(made)}{made.suffix}"
        publish(made, path)
        (self.folder / f"{key}.failed").unlink(missing_ok=True)
        for other in self.folder.glob("*-*.*"):
            with suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                    other.unlink()
        return path

    def remember_failure(self, key: str, compiler: str, why: str) -> None:
        """Keep the reason, so that the next process does not try the same."""
        (self.folder / f"{key}.failed").write_text(json.dumps({"compiler": compiler, "why": why}), "utf-8")

    def failure(self, key: str, compiler: str) -> str | None:
        """Why compiling failed within the last day, with this compiler."""
        path = self.folder / f"{key}.failed"
        try:
            old = time.time() - path.stat().st_mtime > _DAY_SECONDS
            noted = json.loads(path.read_text("utf-8"))
            return None if old or noted["compiler"] != compiler else str(noted["why"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _sha256(self, path: Path) -> str:
        try:
            with os.fdopen(os.open(path, _READ_FLAGS), "rb") as file:
                self._check(path, os.fstat(file.fileno()), stat.S_ISREG, "a file")
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ArtifactFolderError(str(path), error.strerror or str(error)) from error

    def _check(self, path: Path, found: os.stat_result, is_kind: Callable[[int], bool], kind: str) -> None:
        if not is_kind(found.st_mode):
            raise ArtifactFolderError(str(path), f"it is not {kind}")
        if found.st_uid != os.geteuid():
            raise ArtifactFolderError(str(path), f"it belongs to the user with number {found.st_uid}")
        if found.st_mode & _OTHERS_MAY_WRITE:
            raise ArtifactFolderError(str(path), f"others may write to it (mode {stat.S_IMODE(found.st_mode):o})")


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
            with folder.opened(there) as network:
                return open_passes(network, model, shown=str(there))
        except CompiledNetworkError as error:
            folder.discard(there, error.why)
    if not may_compile:
        return model.passes
    compiler = _find_compiler(model.name)
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
        with folder.opened(made) as network:
            return open_passes(network, model, shown=str(made))


def _find_compiler(model: str) -> str:
    """The versions of the packages that compile and run a network."""
    try:
        return ", ".join(f"{package} {version(package)}" for package in ("onnx", "onnxruntime"))
    except PackageNotFoundError as error:
        fix = "Install it: pip install 'extraction-dagster[onnxruntime]'."
        raise CompileError(model, f"the package {error.name!r} is not installed", fix) from error


def compile_in(work: Path, settings: Settings, model: str) -> Path:
    """Compile the model of the settings in an empty folder, and try the result, a file in it.

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
