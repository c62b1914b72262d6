"""Passes of a network over prepared pixels: started, and waited for when their vectors are wanted.

On the CPU a pass is over once `start` returns. On a CUDA device two are under way at a time:

    copies    |batch 1|batch 2|       |batch 3|
    compute           |batch 1        |batch 2        |batch 3
    host      makes 2, starts it, waits for 1, makes 3, ...

Pixels are copied out of page-locked memory on a stream of their own, so that the copy of a batch runs beside the
computation of the one before it. torch keeps and reuses both the page-locked blocks and the device's.

What a pass gives is checked and normalised here too, the same way for frames and for queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from extraction_dagster.late import np

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Forward = Callable[[torch.Tensor], torch.Tensor]

_SHORTEST = 1e-12
# float16 moves the length of a vector by about 0.0005.
_LENGTH_TOLERANCE = 0.01


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
    """A pass that is over; its vectors are float32 (N, dim)."""

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
class Leading:
    """A pass of which only the leading `dim` numbers of each vector are kept."""

    whole: Pending
    dim: int

    def done(self) -> bool:
        """Whether `result` returns at once."""
        return self.whole.done()

    def result(self) -> np.ndarray:
        """Wait for the vectors, float32 (N, dim)."""
        return np.ascontiguousarray(self.whole.result()[:, : self.dim])


def normalise(raw: np.ndarray) -> tuple[np.ndarray, list[str | None]]:
    """Scale each vector to length 1.

    The length is taken in float64, so that no finite float32 vector overflows.

    Args:
        raw: float32, shape (N, dim).

    Returns:
        float32 (N, dim), zeros in the rows that can't be kept; and for each row what is wrong with it, or None.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", raw, raw, dtype=np.float64))
    finite = np.isfinite(raw).all(axis=1)
    good = finite & (lengths > _SHORTEST)
    unit = np.divide(raw, lengths[:, None], out=np.zeros(raw.shape, np.float64), where=good[:, None])
    return unit.astype(np.float32), [
        None if fine else _fault(row) for fine, row in zip(good.tolist(), raw, strict=True)
    ]


def _fault(row: np.ndarray) -> str:
    if bool(np.isnan(row).any()):
        return "NaN"
    return "an infinite value" if bool(np.isinf(row).any()) else "length zero"


def count_unnormalised(vectors: np.ndarray) -> int:
    """The number of stored vectors, float16 (N, dim), whose length is not 1 up to float16's rounding."""
    wide = vectors.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return int(np.count_nonzero(~(np.abs(lengths - 1.0) <= _LENGTH_TOLERANCE)))
