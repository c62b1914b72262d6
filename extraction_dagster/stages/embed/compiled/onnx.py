"""A network in the ONNX format, run by ONNX Runtime (extra `onnxruntime`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from extraction_dagster.errors.embed import CompiledNetworkError

if TYPE_CHECKING:
    from pathlib import Path

PIXELS: Final = "pixels"
# Activations of so many frames stay in the CPU's cache from one layer to the next; more cost a tenth more a frame.
_FRAMES_AT_ONCE: Final = 4


class OnnxNetwork:
    """A session of ONNX Runtime on the CPU."""

    def __init__(self, path: Path, *, threads: int) -> None:
        """Load a network.

        Raises:
            CompiledNetworkError: It can't be loaded.
        """
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Threads that wait in a loop take the time of whoever else wants the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.path = str(path)
        try:
            self._session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no base
            raise CompiledNetworkError(self.path, str(error)) from error

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Run a pass: uint8 (N, h, w, 3), contiguous, to float32 (N, dim).

        Raises:
            CompiledNetworkError: It failed.
        """
        parts = [pixels[start : start + _FRAMES_AT_ONCE] for start in range(0, len(pixels), _FRAMES_AT_ONCE)]
        try:
            vectors = [self._session.run(None, {PIXELS: part})[0] for part in parts]
        except Exception as error:  # as above
            raise CompiledNetworkError(self.path, str(error)) from error
        return np.concatenate(vectors)
