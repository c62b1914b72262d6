"""Which name leads to which model; one model is loaded per process. `FAMILIES` is the list to add a model to.

Telling vectors apart (`embedding_fingerprint`) needs no torch; only loading does.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from extraction_dagster.errors import SettingsError
from extraction_dagster.errors.embed import EmbeddingModelError
from extraction_dagster.records import fingerprint
from extraction_dagster.stages.embed.models import lite0, transformers
from extraction_dagster.stages.embed.runtime import import_torch

if TYPE_CHECKING:
    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.models.interface import EmbeddingModel, ModelFamily

# The first family that answers for a name is taken.
FAMILIES: tuple[ModelFamily, ...] = (lite0.FAMILY, transformers.FAMILY)
# What becomes of a network's vector before it is kept, the same for every model; part of every fingerprint.
_STORED = {"normalisation": "l2", "normalisation_dtype": "float64", "storage_dtype": "float16"}

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
        from extraction_dagster.stages.embed.compiled.compiling import speed_up  # noqa: PLC0415 - few processes need it

        speed_up(model, settings, identity=family.identity(settings), may_compile=may_compile)
    _check_dim(settings.embedding_dim, model.dim, model.name)
    if settings.embedding_dim is not None and settings.embedding_dim < model.dim:
        model.leading = settings.embedding_dim
    return model


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
    _check_dim(settings.embedding_dim, family.dim(settings) if settings.embedding_dim else None, settings.model)
    return fingerprint(**_STORED, **_cut(settings), **family.identity(settings))


def embedding_settings_fingerprint(settings: Settings) -> str:
    """The same from the settings alone: opens no file, imports no torch; for an asset's code version."""
    return fingerprint(**_STORED, **_cut(settings), **_family(settings.model).settings_identity(settings))


def _cut(settings: Settings) -> dict[str, object]:
    """Left out while every number is kept, so that vectors stored before there was a choice stay what they are."""
    return {} if settings.embedding_dim is None else {"leading_numbers": settings.embedding_dim}


def _check_dim(wanted: int | None, dim: int | None, model: str) -> None:
    """Refuse to keep more numbers than a model gives; a dim of None is not known yet."""
    if wanted is not None and dim is not None and wanted > dim:
        raise SettingsError("EXTRACTION_EMBEDDING_DIM", str(wanted), f"at most {dim}, the numbers that {model!r} gives")


def _family(name: str) -> ModelFamily:
    for family in FAMILIES:
        if family.answers_for(name):
            return family
    raise EmbeddingModelError(name, "the name is unknown", "; ".join(family.shown for family in FAMILIES))
