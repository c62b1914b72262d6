"""Shorter vectors: only the leading numbers of each, for models that were trained so that these say the most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.base import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extraction_dagster.stages.embed.models.registry import EmbeddingModel, TextEmbeddingModel
    from extraction_dagster.stages.embed.passes import Pending


def check_dim(wanted: int | None, dim: int | None, model: str) -> None:
    """Refuse to keep more numbers than a model gives; a dim of None is not known yet.

    Raises:
        SettingsError: It gives fewer.
    """
    if wanted is not None and dim is not None and wanted > dim:
        raise SettingsError("EXTRACTION_EMBEDDING_DIM", str(wanted), f"at most {dim}, the numbers that {model!r} gives")


@dataclass(frozen=True, slots=True)
class _Cut:
    """A pass whose vectors are cut once they are there."""

    whole: Pending
    cut: Callable[[np.ndarray], np.ndarray]

    def done(self) -> bool:
        return self.whole.done()

    def result(self) -> np.ndarray:
        return self.cut(self.whole.result())


class TruncatedModel:
    """A model of which only the leading `dim` numbers of each vector are kept; they are normalised afterwards."""

    def __init__(self, model: EmbeddingModel, dim: int) -> None:
        """Take a model that gives at least `dim` numbers."""
        self.model, self.dim = model, dim
        self.name, self.device, self.fingerprint = model.name, model.device, model.fingerprint

    def prepare(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """As the model does."""
        return self.model.prepare(images)

    def start(self, pixels: np.ndarray) -> Pending:
        """Start a pass over prepared pixels."""
        return _Cut(self.model.start(pixels), self.cut)

    def embed_prepared(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors of prepared pixels, float32 (N, dim), not normalised."""
        return self.cut(self.model.embed_prepared(pixels))

    def embed_images(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Vectors of images of any size, float32 (N, dim), not normalised."""
        return self.cut(self.model.embed_images(images))

    def cut(self, vectors: np.ndarray) -> np.ndarray:
        """The leading numbers."""
        return np.ascontiguousarray(vectors[:, : self.dim])


class TruncatedTextModel(TruncatedModel):
    """The same of a model that puts texts beside images."""

    model: EmbeddingModel
    text_model: TextEmbeddingModel

    def __init__(self, model: EmbeddingModel, text_model: TextEmbeddingModel, dim: int) -> None:
        """Take one model, as both."""
        super().__init__(model, dim)
        self.text_model = text_model

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, float32 (N, dim), not normalised."""
        return self.cut(self.text_model.embed_text(texts))
