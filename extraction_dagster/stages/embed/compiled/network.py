"""A network in the ONNX format, run by ONNX Runtime (extra `onnxruntime`), that gives the vectors of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from extraction_dagster.errors.embed import CompiledNetworkError
from extraction_dagster.stages.embed.passes import Finished, normalise

if TYPE_CHECKING:
    from pathlib import Path

    from extraction_dagster.stages.embed.models.interface import EmbeddingModel
    from extraction_dagster.stages.embed.passes import Pending

PIXELS: Final = "pixels"  # the network's input
# Activations of so many frames stay in the CPU's cache from one layer to the next; more cost a tenth more a frame.
_FRAMES_AT_ONCE: Final = 4
_LOWEST_COSINE: Final = 0.9999


class OnnxNetwork:
    """A session of ONNX Runtime on the CPU.

    Args:
        path: The network.
        threads: Threads of a pass.
        shown: What errors call it; its path by default.

    Raises:
        CompiledNetworkError: It can't be loaded.
    """

    def __init__(self, path: Path, *, threads: int, shown: str = "") -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Threads that wait in a loop take the time of every other process that wants the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.path = shown or str(path)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no base
            raise CompiledNetworkError(self.path, str(error)) from error

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Run a pass: uint8 (N, h, w, 3) to float32 (N, dim).

        Raises:
            CompiledNetworkError: It failed.
        """
        parts = [pixels[start : start + _FRAMES_AT_ONCE] for start in range(0, len(pixels), _FRAMES_AT_ONCE)]
        try:
            vectors = [self._session.run(None, {PIXELS: part})[0] for part in parts]
        except Exception as error:  # as above
            raise CompiledNetworkError(self.path, str(error)) from error
        return np.concatenate(vectors)


class CompiledPasses:
    """Passes through a compiled network; what it can't run, the model runs uncompiled.

    Args:
        network: The network.
        model: The model it was made of.
        shape: The pixels it was made for, (h, w, 3).
    """

    def __init__(self, network: OnnxNetwork, model: EmbeddingModel, shape: tuple[int, ...]) -> None:
        self._network, self._shape, self._uncompiled = network, shape, model.passes

    def start(self, pixels: np.ndarray) -> Pending:
        """Run a pass over prepared pixels, uint8 (N, h, w, 3)."""
        if pixels.shape[1:] != self._shape or pixels.dtype != np.uint8 or not len(pixels):
            return self._uncompiled.start(pixels)
        try:
            return Finished(self._network(pixels))
        except CompiledNetworkError:
            return self._uncompiled.start(pixels)  # its errors have names, for example of memory that runs out


def probes() -> list[np.ndarray]:
    """Three pictures that any two networks differ on: noise, coarse and fine, and a slope."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 12, 3), np.uint8).repeat(20, 0).repeat(20, 1)
    slope = np.broadcast_to(np.arange(240, dtype=np.uint8)[:, None, None], (240, 240, 3))
    return [coarse, rng.integers(0, 256, (240, 240, 3), np.uint8), np.ascontiguousarray(slope)]


def open_passes(path: Path, model: EmbeddingModel, *, shown: str = "") -> CompiledPasses:
    """Load a compiled network, with this process's threads, and compare its vectors with the model's own.

    Args:
        path: Where it is read from.
        model: The model it was made of.
        shown: What errors call it; its path by default.

    Raises:
        CompiledNetworkError: It can't be loaded, or its vectors differ.
    """
    import torch

    network, pixels = OnnxNetwork(path, threads=torch.get_num_threads(), shown=shown), model.prepare(probes())
    passes = CompiledPasses(network, model, pixels.shape[1:])
    (expected, _), (got, faults) = normalise(model.embed_prepared(pixels)), normalise(passes.start(pixels).result())
    if got.shape != expected.shape or any(faults) or float((got * expected).sum(1).min()) < _LOWEST_COSINE:
        raise CompiledNetworkError(network.path, "its vectors are not the model's")
    return passes
