"""EXTRACTION_COMPILE: a model compiled for this machine's CPU, once, and loaded by every process after that.

    on             by torch's AOTInductor into a shared library, which needs a C++ compiler
    onnxruntime    into ONNX Runtime's format, which needs the extra `onnxruntime`

The compiled network is found under a key made of the model's files, torch's version and the CPU. Whatever stands in its
way (no compiler, another process compiling right now, a folder that others may write to), the model runs as it is, one
warning says why, and the vectors are the same.
"""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from extraction_dagster.errors.embed import ArtifactFolderError, CompiledNetworkError, CompileError
from extraction_dagster.records import fingerprint
from extraction_dagster.stages.embed.compiled.artifacts import ArtifactFolder
from extraction_dagster.stages.embed.compiled.compiling import ONNX, compile_in, find_compiler
from extraction_dagster.stages.embed.compiled.native import NativeNetwork
from extraction_dagster.stages.embed.compiled.onnx import OnnxNetwork
from extraction_dagster.stages.embed.passes import Finished
from extraction_dagster.stages.embed.vectors import normalise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.passes import Passes, Pending, ResidentModel

_log = logging.getLogger(__name__)
FOLDER: Final = Path("cache", "compiled")
# Part of every key: raise it whenever other code would come out of the same model.
_RECIPE: Final = 2
_LOWEST_COSINE: Final = 0.9999
_CPU_FLAGS: Final = ("flags", "Features")


class Network(Protocol):
    """A compiled network; it trusts its input, so whoever calls it checks the shape."""

    path: str

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, h, w, 3), contiguous, to float32 (N, dim)."""
        ...


def open_network(kind: str, path: Path) -> Network:
    """Load a compiled network of a kind that EXTRACTION_COMPILE names.

    Raises:
        CompiledNetworkError: It can't be loaded.
    """
    import torch

    return OnnxNetwork(path, threads=torch.get_num_threads()) if kind == ONNX else NativeNetwork(path)


class CompiledPasses:
    """Passes through a compiled network; what that can't do, the model does as it is."""

    def __init__(self, network: Network, model: ResidentModel, shape: tuple[int, ...]) -> None:
        """Take a network that was compiled for pixels of a shape (h, w, 3)."""
        self._network, self._shape, self._uncompiled = network, shape, model.passes

    def start(self, pixels: np.ndarray) -> Pending:
        """Run a pass over prepared pixels."""
        # Compiled code reads what its shape says, whatever is there.
        if pixels.shape[1:] != self._shape or pixels.dtype != np.uint8 or not len(pixels):
            return self._uncompiled.start(pixels)
        try:
            return Finished(self._network(np.ascontiguousarray(pixels)))
        except CompiledNetworkError:
            return self._uncompiled.start(pixels)  # memory that runs out, for one, has a name there


def speed_up(model: ResidentModel, settings: Settings, *, identity: Mapping[str, object], may_compile: bool) -> None:
    """Let a model run compiled from now on, if that can be.

    Args:
        model: The model, loaded.
        settings: home, and what the model was loaded with.
        identity: What changes its vectors.
        may_compile: Compile it if nobody has; else use only what is there.
    """
    if model.device != "cpu":
        _log.info("EXTRACTION_COMPILE is for the CPU: model %r runs on %s as it is", model.name, model.device)
        return
    key = fingerprint(recipe=_RECIPE, kind=settings.compile, identity=dict(identity), **cpu_identity())
    try:
        model.passes = _passes(model, settings, ArtifactFolder(settings.home / FOLDER), key, may_compile=may_compile)
    except (ArtifactFolderError, CompileError, CompiledNetworkError) as error:
        _log.warning("%s", error)
    except OSError as error:  # no room, say
        _log.warning("%s", CompileError(model.name, str(error), "Make room, or choose another EXTRACTION_HOME."))


def cpu_identity(cpu_file: Path = Path("/proc/cpuinfo")) -> dict[str, object]:
    """What compiled code depends on besides the network: torch, and what this CPU can do."""
    import torch

    try:
        lines = (line.partition(":") for line in cpu_file.read_text().splitlines())
        flags = next((sorted(value.split()) for name, _, value in lines if name.strip() in _CPU_FLAGS), [])
    except OSError:
        flags = [platform.processor()]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "machine": platform.machine(), "capability": capability, "flags": flags}


def probes() -> list[np.ndarray]:
    """Three pictures that any two networks differ on: noise, coarse and fine, and a slope."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 12, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    slope = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], (240, 240, 3))
    return [coarse, rng.integers(0, 256, (240, 240, 3), np.uint8), np.ascontiguousarray(slope)]


def check(network: Network, model: ResidentModel) -> CompiledPasses:
    """The compiled passes, once their vectors have been compared with the model's own.

    Raises:
        CompiledNetworkError: They differ.
    """
    pixels = model.prepare(probes())
    passes = CompiledPasses(network, model, pixels.shape[1:])
    (expected, _), (got, faults) = normalise(model.embed_prepared(pixels)), normalise(passes.start(pixels).result())
    if got.shape != expected.shape or any(faults) or float((got * expected).sum(1).min()) < _LOWEST_COSINE:
        raise CompiledNetworkError(network.path, "its vectors are not the model's")
    return passes


def _passes(model: ResidentModel, settings: Settings, folder: ArtifactFolder, key: str, *, may_compile: bool) -> Passes:
    there = folder.find(key)
    if there is not None:
        try:
            return check(open_network(settings.compile, there), model)
        except CompiledNetworkError as error:
            folder.discard(there, error.why)
    if not may_compile:
        return model.passes
    compiler = find_compiler(settings.compile, model.name)
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
        return check(open_network(settings.compile, made), model)
