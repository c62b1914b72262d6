"""Passes of a network over prepared pixels: started, and waited for when their vectors are wanted.

On the CPU a pass is over once `start` returns. On a CUDA device two are under way at a time:

    copies    |batch 1|batch 2|       |batch 3|
    compute           |batch 1        |batch 2        |batch 3
    host      makes 2, starts it, waits for 1, makes 3, ...

Pixels are copied out of page-locked memory on a stream of their own, so that the copy of a batch runs beside the
computation of the one before it. torch keeps and reuses both the page-locked blocks and the device's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Forward = Callable[[torch.Tensor], torch.Tensor]


class Pending(Protocol):
    """A pass that was started."""

    def done(self) -> bool:
        """Whether `result` returns at once."""
        ...

    def result(self) -> np.ndarray:
        """Wait for the vectors, float32 (N, dim)."""
        ...


class Passes(Protocol):
    """What runs a network."""

    def start(self, pixels: np.ndarray) -> Pending:
        """Start a pass over prepared pixels, uint8 (N, h, w, 3)."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """A pass that is over.

    Attributes:
        vectors: float32 (N, dim).
    """

    vectors: np.ndarray

    def done(self) -> bool:
        """Always true."""
        return True

    def result(self) -> np.ndarray:
        """The vectors."""
        return self.vectors


class HostPasses:
    """Passes that the caller's thread runs itself: on the CPU, and on MPS.

    Args:
        forward: The network: uint8 (N, h, w, 3) on the device to float (N, dim) there.
        device: Where it lies.
    """

    def __init__(self, forward: Forward, device: str) -> None:
        self._forward, self._device = forward, device

    def start(self, pixels: np.ndarray) -> Finished:
        """Run a pass."""
        import torch

        with torch.inference_mode():
            on_device = torch.from_numpy(pixels).to(self._device)
            vectors: np.ndarray[Any, Any] = self._forward(on_device).float().cpu().numpy()
            return Finished(vectors)


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
    """Passes on one CUDA device, which copies on a second stream; takes what `HostPasses` takes."""

    def __init__(self, forward: Forward, device: str) -> None:
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


@dataclass(frozen=True, slots=True)
class _Leading:
    """A pass whose vectors are cut once they are there."""

    whole: Pending
    dim: int

    def done(self) -> bool:
        return self.whole.done()

    def result(self) -> np.ndarray:
        return np.ascontiguousarray(self.whole.result()[:, : self.dim])


@dataclass(frozen=True, slots=True)
class LeadingPasses:
    """Passes of which only the leading numbers of each vector are kept (Matryoshka)."""

    whole: Passes
    dim: int

    def start(self, pixels: np.ndarray) -> Pending:
        """Start a pass; its vectors are float32 (N, dim)."""
        return _Leading(self.whole.start(pixels), self.dim)


def passes_on(device: str, forward: Forward) -> Passes:
    """What runs a network on a device: cpu, cuda:N or mps."""
    return (CudaPasses if device.startswith("cuda") else HostPasses)(forward, device)
