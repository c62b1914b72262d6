"""Embedding models: one interface, and which names lead to which.

A family answers for a set of names. Telling vectors apart (`identity`) needs no torch; only loading does.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from extraction_dagster.errors.embed import EmbeddingModelError
from extraction_dagster.records import fingerprint
from extraction_dagster.stages.embed.models import hub
from extraction_dagster.stages.embed.models import lite0 as efficientnet_lite0
from extraction_dagster.stages.embed.models import transformers as transformers_model
from extraction_dagster.stages.embed.models.matryoshka import TruncatedModel, TruncatedTextModel, check_dim
from extraction_dagster.stages.embed.runtime import import_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.passes import Pending, ResidentModel

# What becomes of a network's vector before it is kept, the same for every model; part of every fingerprint.
_STORED = {"normalisation": "l2", "normalisation_dtype": "float64", "storage_dtype": "float16"}


class EmbeddingModel(Protocol):
    """A resident model: images to vectors.

    Vectors are what the network gives, float32 and not normalised: `vectors.normalise` checks and normalises them, the
    same way for frames and for queries.

    Attributes:
        name: The model's name, for people.
        dim: Length of a vector.
        device: Where it runs: cpu, cuda:N or mps.
        fingerprint: Equal for two models exactly when their vectors may be compared.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - an attribute, described above
    @property
    def dim(self) -> int: ...  # noqa: D102 - as above
    @property
    def device(self) -> str: ...  # noqa: D102 - as above
    @property
    def fingerprint(self) -> str: ...  # noqa: D102 - as above

    def prepare(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Resize uint8 (H, W, 3) RGB images to the network's pixels, uint8 (N, h, w, 3); safe in any thread."""
        ...

    def start(self, pixels: np.ndarray) -> Pending:
        """Start a pass over prepared pixels; its vectors are float32 (N, dim), not normalised."""
        ...

    def embed_prepared(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors of prepared pixels, float32 (N, dim), not normalised."""
        ...

    def embed_images(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Vectors of images of any size, float32 (N, dim), not normalised."""
        ...


@runtime_checkable
class TextEmbeddingModel(Protocol):
    """A model that puts texts beside images."""

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, float32 (N, dim), not normalised."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A kind of model.

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
    load: Callable[[Settings, str], ResidentModel]


def _lite0_family() -> ModelFamily:
    return ModelFamily(
        shown=f"{efficientnet_lite0.NAME} (packaged, offline)",
        answers_for=lambda name: name == efficientnet_lite0.NAME,
        settings_identity=efficientnet_lite0.settings_identity,
        identity=efficientnet_lite0.identity,
        dim=lambda _: efficientnet_lite0.DIM,
        load=lambda settings, fingerprint: efficientnet_lite0.load(settings, fingerprint=fingerprint),
    )


def _folder_family() -> ModelFamily:
    return ModelFamily(
        shown="./folder or /folder, saved by transformers",
        answers_for=transformers_model.answers_for_folder,
        settings_identity=transformers_model.settings_identity,
        identity=transformers_model.identity,
        dim=transformers_model.declared_dim,
        load=lambda settings, fingerprint: transformers_model.load(settings, fingerprint=fingerprint),
    )


def _hub_family() -> ModelFamily:
    def identity(settings: Settings) -> Mapping[str, object]:
        hub.check_pinned(settings.model)
        return transformers_model.settings_identity(settings)

    return ModelFamily(
        shown=hub.SHOWN,
        answers_for=hub.answers_for,
        settings_identity=identity,
        identity=identity,  # the commit names every byte of the files
        dim=lambda _: None,
        load=lambda settings, fingerprint: transformers_model.load(settings, fingerprint=fingerprint),
    )


FAMILIES: tuple[ModelFamily, ...] = (_lite0_family(), _folder_family(), _hub_family())

_resident: dict[tuple[object, ...], EmbeddingModel] = {}
_loading = threading.Lock()


def load_model(settings: Settings, *, may_compile: bool = True) -> EmbeddingModel:
    """The model of the settings, loaded once per process; another model replaces the resident one.

    Args:
        settings: model and what goes with it.
        may_compile: With EXTRACTION_COMPILE, compile the model if nobody has: not worth it for a single query.

    Raises:
        EmbeddingModelError: No family answers for the name.
        ModelLibraryError: A package that the model needs is not installed.
        ModelFilesError: The model's files are missing, damaged or refused.
        EmbeddingDeviceError: The device is not there.
        SettingsError: embedding_dim is more than the model gives.
    """
    key = (
        embedding_fingerprint(settings),
        settings.device,
        settings.embed_threads,
        settings.compile != "off" and (settings.compile, settings.home, may_compile),
    )
    with _loading:
        if key not in _resident:
            _resident.clear()
            import_torch()
            _resident[key] = _loaded(settings, str(key[0]), may_compile=may_compile)
        return _resident[key]


def _loaded(settings: Settings, fingerprint: str, *, may_compile: bool) -> EmbeddingModel:
    family = _family(settings.model)
    model = family.load(settings, fingerprint)
    if settings.compile != "off":
        from extraction_dagster.stages.embed.compiled.network import speed_up  # noqa: PLC0415 - few processes need it

        speed_up(model, settings, identity=family.identity(settings), may_compile=may_compile)
    return _shortened(model, settings.embedding_dim)


def _shortened(model: EmbeddingModel, dim: int | None) -> EmbeddingModel:
    check_dim(dim, model.dim, model.name)
    if dim is None or dim == model.dim:
        return model
    return (
        TruncatedTextModel(model, model, dim) if isinstance(model, TextEmbeddingModel) else TruncatedModel(model, dim)
    )


def embedding_fingerprint(settings: Settings) -> str:
    """Names the vectors: equal exactly when vectors may lie in one collection.

    Covers model, weights, preprocessing, dim, normalisation, compute and storage type; batch size, device, threads and
    library versions are left out, for they move a vector by less than its float16 storage does.

    Raises:
        EmbeddingModelError: No family answers for the name.
        ModelFilesError: The model's files are missing, damaged or refused.
        SettingsError: embedding_dim is more than the model gives.
    """
    family = _family(settings.model)
    check_dim(settings.embedding_dim, family.dim(settings) if settings.embedding_dim else None, settings.model)
    return fingerprint(**_STORED, **_cut(settings), **family.identity(settings))


def embedding_settings_fingerprint(settings: Settings) -> str:
    """The same from the settings alone: opens no file, imports no torch; for an asset's code version."""
    return fingerprint(**_STORED, **_cut(settings), **_family(settings.model).settings_identity(settings))


def _cut(settings: Settings) -> dict[str, object]:
    """Left out while every number is kept, so that vectors stored before there was a choice stay what they are."""
    return {} if settings.embedding_dim is None else {"leading_numbers": settings.embedding_dim}


def _family(name: str) -> ModelFamily:
    for family in FAMILIES:
        if family.answers_for(name):
            return family
    raise EmbeddingModelError(name, "the name is unknown", "; ".join(family.shown for family in FAMILIES))
