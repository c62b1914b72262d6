"""What a model is to everything else: images to vectors; and what a family of models says of the names it answers for.

To add a model: a file beside this one, with a subclass of `EmbeddingModel` and a `ModelFamily`; then the family's place
in `registry.FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from extraction_dagster.stages.embed.passes import CudaPasses, HostPasses, Leading, Passes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import torch

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.passes import Pending


class EmbeddingModel:
    """A network that stays loaded on one device. A subclass gives `network_dim`, `prepare` and `forward`.

    Vectors are what the network gives, float32 and not normalised: `passes.normalise` checks and normalises them, the
    same way for frames and for queries.

    Args:
        name: The model's name, for people.
        network: What `forward` runs, on the device: a module of torch, or a function of tensors.
        device: Where it runs: cpu, cuda:N or mps.
        fingerprint: Equal for two models exactly when their vectors may be compared.

    Attributes:
        network_dim: Numbers that `forward` gives for a frame.
        leading: Numbers that are kept of each vector, which is normalised afterwards (Matryoshka); None for all.
        dim: Length of a vector: `leading`, or `network_dim`.
        passes: What runs `forward`; may be exchanged for something faster that gives the same vectors.
    """

    network_dim: int

    def __init__(self, name: str, network: Any, *, device: str, fingerprint: str) -> None:  # noqa: ANN401 - either kind
        self.name, self.device, self.fingerprint, self.network = name, device, fingerprint, network
        self.passes: Passes = (CudaPasses if device.startswith("cuda") else HostPasses)(self.forward, device)
        self.leading: int | None = None

    @property
    def dim(self) -> int:  # noqa: D102 - described above
        return self.leading or self.network_dim

    def prepare(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Resize uint8 (H, W, 3) RGB images to the network's pixels, uint8 (N, h, w, 3); safe in any thread."""
        raise NotImplementedError

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, h, w, 3) on the device to (N, network_dim) there, in any type of float."""
        raise NotImplementedError

    def start(self, pixels: np.ndarray) -> Pending:
        """Start a pass over prepared pixels; its vectors are float32 (N, dim), not normalised."""
        pending = self.passes.start(pixels)
        return pending if self.leading is None else Leading(pending, self.leading)

    def embed_prepared(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors of prepared pixels, float32 (N, dim), not normalised."""
        return self.start(pixels).result()

    def embed_images(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Vectors of images of any size, float32 (N, dim), not normalised."""
        return self.embed_prepared(self.prepare(images))


@runtime_checkable
class TextEmbeddingModel(Protocol):
    """A model that puts texts beside images."""

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, float32 (N, dim), not normalised."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """The models that a set of names leads to.

    Attributes:
        shown: The names it answers for, as shown to a person.
        answers_for: Whether a name is one of its.
        settings_identity: What changes the vectors, cheaply, from the settings alone; without torch.
        identity: The same with the contents of the model's files; without torch.
        dim: Length of its vectors, without torch; None when only the loaded model knows.
        load: Loads the model; gets its fingerprint.
    """

    shown: str
    answers_for: Callable[[str], bool]
    settings_identity: Callable[[Settings], Mapping[str, object]]
    identity: Callable[[Settings], Mapping[str, object]]
    dim: Callable[[Settings], int | None]
    load: Callable[[Settings, str], EmbeddingModel]
