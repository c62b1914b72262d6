"""Passes on a CUDA device, two under way at a time.

    copies    |batch 1|batch 2|       |batch 3|
    compute           |batch 1        |batch 2        |batch 3
    host      makes 2, starts it, waits for 1, makes 3, ...

Pixels are copied out of page-locked memory on a stream of their own, so that the copy of a batch runs beside the
computation of the one before it. torch keeps and reuses both the page-locked blocks and the device's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from extraction_dagster.stages.embed.passes import Forward


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A pass under way.

    Attributes:
        vectors: Page-locked memory that the device fills.
        filled: Recorded behind the copy into it.
    """

    vectors: torch.Tensor
    filled: torch.cuda.Event

    def done(self) -> bool:
        """Whether the device has filled the vectors."""
        return bool(self.filled.query())  # type: ignore[no-untyped-call] # torch types none of its streams and events

    def result(self) -> np.ndarray:
        """Wait for the vectors, float32 (N, dim)."""
        self.filled.synchronize()
        # A copy: the page-locked block goes back to torch, which has few of them.
        values: np.ndarray[Any, Any] = self.vectors.numpy().copy()
        return values


class CudaPasses:
    """Runs a network on one CUDA device, copying on a second stream."""

    def __init__(self, forward: Forward, device: str) -> None:
        """Take a network's forward pass: uint8 (N, h, w, 3) on the device to (N, dim) there."""
        import torch

        self._forward, self._device = forward, device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # as above

    def start(self, pixels: np.ndarray) -> OnDevice:
        """Start a pass; returns while the device works on it."""
        import torch

        with torch.inference_mode(), torch.cuda.device(self._device):
            compute = torch.cuda.current_stream()
            page_locked = torch.from_numpy(pixels).pin_memory()
            with torch.cuda.stream(self._copies):
                on_device = page_locked.to(self._device, non_blocking=True)
            compute.wait_stream(self._copies)
            on_device.record_stream(compute)  # freed while `compute` still reads it, it would be copied over
            vectors = self._forward(on_device).float()
            home = torch.empty(vectors.shape, pin_memory=True).copy_(vectors, non_blocking=True)
            filled = torch.cuda.Event()  # type: ignore[no-untyped-call] # as above
            filled.record(compute)
            return OnDevice(home, filled)
