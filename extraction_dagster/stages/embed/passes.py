"""A network's pass over prepared pixels: started, and waited for when its vectors are wanted.

On the CPU a pass is over once `start` returns. On a GPU it goes on while the caller makes the next batch; then copying
that batch overlaps with computing this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from extraction_dagster.stages.embed.cuda_passes import CudaPasses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
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
    """A pass that is over."""

    vectors: np.ndarray

    def done(self) -> bool:
        """It is."""
        return True

    def result(self) -> np.ndarray:
        """The vectors."""
        return self.vectors


class HostPasses:
    """Passes that the caller's thread runs itself: on the CPU, and on MPS."""

    def __init__(self, forward: Forward, device: str) -> None:
        """Take a network's forward pass: uint8 (N, h, w, 3) on the device to float32 (N, dim) there."""
        self._forward, self._device = forward, device

    def start(self, pixels: np.ndarray) -> Finished:
        """Run a pass."""
        import torch

        with torch.inference_mode():
            on_device = torch.from_numpy(pixels).to(self._device)
            vectors: np.ndarray[Any, Any] = self._forward(on_device).float().cpu().numpy()
            return Finished(vectors)


class ResidentModel:
    """A network that stays loaded on one device, behind the interface of `EmbeddingModel`.

    Attributes:
        name: The model's name, for people.
        dim: Length of a vector.
        device: Where it runs: cpu, cuda:N or mps.
        fingerprint: Equal for two models exactly when their vectors may be compared.
        network: What `forward` runs: a module of torch, or a function of tensors.
        passes: What runs `forward`; may be exchanged for something faster that gives the same vectors.
    """

    dim: int

    def __init__(self, name: str, network: Any, *, device: str, fingerprint: str) -> None:  # noqa: ANN401 - either kind
        """Take a network that lies on the device."""
        self.name, self.device, self.fingerprint, self.network = name, device, fingerprint, network
        kind = CudaPasses if device.startswith("cuda") else HostPasses
        self.passes: Passes = kind(self.forward, device)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, h, w, 3) on the device to (N, dim) there, in any type of float."""
        raise NotImplementedError

    def prepare(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Resize uint8 (H, W, 3) RGB images to the network's pixels, uint8 (N, h, w, 3); safe in any thread."""
        raise NotImplementedError

    def start(self, pixels: np.ndarray) -> Pending:
        """Start a pass over prepared pixels."""
        return self.passes.start(pixels)

    def embed_prepared(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors of prepared pixels, float32 (N, dim), not normalised."""
        return self.start(pixels).result()

    def embed_images(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Vectors of images of any size, float32 (N, dim), not normalised."""
        return self.embed_prepared(self.prepare(images))
