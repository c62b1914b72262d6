"""The resource that assets work with: the settings of a run, and what is opened by them."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from extraction_dagster.errors.base import ExtractionError
from extraction_dagster.errors.runs import OtherModelError
from extraction_dagster.run_options import OVERRIDABLE, as_environment, description, in_words, settings_with
from extraction_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from extraction_dagster.shards.embedding_store import EmbeddingStore
    from extraction_dagster.shards.frame_store import FrameStore
    from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints


class DecoderChoice(Enum):
    """The launchpad offers an enumeration's names."""

    pyav = "pyav"
    decord = "decord"


class SamplingChoice(Enum):
    """As above."""

    fps = "fps"
    uniform = "uniform"
    keyframes = "keyframes"
    scene = "scene"


def _as_set(name: str) -> Any:  # noqa: ANN401 - pydantic's own type for a field
    """An option that may be left out; its description is the setting's."""
    return Field(None, description=description(name))


class Extraction(dg.ConfigurableResource):  # type: ignore[type-arg]  # not generic for its users
    """What this run does differently from the settings; all that is left out is as they say.

    It opens the catalog and the stores accordingly, once a step asks for them.
    """

    force: bool = Field(
        default=False,
        description="Do every record of the range again, done and parked ones too. What the job begins with decides "
        "what is done again: decoding (extraction_job), embedding (embedding_job) or indexing (indexing_job).",
    )
    decoder: DecoderChoice | None = _as_set("decoder")
    sampling: SamplingChoice | None = _as_set("sampling")
    fps: float | None = _as_set("fps")
    num_frames: int | None = _as_set("num_frames")
    max_frames: int | None = _as_set("max_frames")
    min_frames: int | None = _as_set("min_frames")
    scene_distance: float | None = _as_set("scene_distance")
    reject_solid: bool | None = _as_set("reject_solid")
    crop_bars: bool | None = _as_set("crop_bars")
    drop_duplicates: bool | None = _as_set("drop_duplicates")
    model: str | None = _as_set("model")
    embedding_dim: int | None = _as_set("embedding_dim")
    device: str | None = _as_set("device")
    embed_batch_size: int | None = _as_set("embed_batch_size")
    decode_workers: int | None = _as_set("decode_workers")
    decode_timeout_seconds: float | None = _as_set("decode_timeout_seconds")

    @property
    def options(self) -> dict[str, object]:
        """What this run does differently from the settings, by the name of the setting."""
        given = {name: getattr(self, name) for name in OVERRIDABLE}
        return {
            name: value.value if isinstance(value, Enum) else value
            for name, value in given.items()
            if value is not None
        }

    @property
    def settings(self) -> Settings:
        """Every setting, read from the environment of this process, with the run's options in their place."""
        return settings_with(self.options)

    @property
    def fingerprints(self) -> "Fingerprints":
        """What the frames and vectors of this run are made with."""
        return _fingerprints(self.settings)

    @contextmanager
    def catalog(self) -> Iterator["Catalog"]:
        """The source table and the ledger."""
        from extraction_dagster.stages.catalog.catalog import open_catalog  # noqa: PLC0415 - imports take time

        with open_catalog(self.settings) as catalog:
            yield catalog

    def frame_store(self) -> "FrameStore":
        """The frames made with the settings of this run."""
        from extraction_dagster.shards.frame_store import FrameStore  # noqa: PLC0415

        return FrameStore(self.settings.resolved_frames_uri, self.fingerprints.frames)

    def embedding_store(self) -> "EmbeddingStore":
        """The vectors made with the settings of this run, from frames made with them."""
        from extraction_dagster.shards.embedding_store import EmbeddingStore  # noqa: PLC0415

        made_with = self.fingerprints
        return EmbeddingStore(self.settings.resolved_embeddings_uri, f"{made_with.frames}-{made_with.embedding}")

    def refuse_what_no_collection_takes(self) -> None:
        """Refuse options that give other vectors than the settings do, unless a collection was staged for them.

        Raises:
            OtherModelError: There is no such collection; nothing was done yet.
        """
        settings = self.settings
        wanted, usual = _fingerprints(settings).embedding, _fingerprints(load_settings()).embedding
        if wanted == usual:
            return
        from extraction_dagster.stages.index.stage import open_point_store  # noqa: PLC0415

        with open_point_store(settings, wait_seconds=settings.qdrant_timeout_seconds) as store:
            there = store.collections(settings.collection_name)
        if wanted not in there:
            raise OtherModelError(
                in_words({name: value for name, value in self.options.items() if name in {"model", "embedding_dim"}}),
                fingerprint=wanted,
                collection=settings.collection_name,
                there=", ".join(sorted(there)) or "none",
                environment=as_environment(settings),
            )


def _fingerprints(settings: Settings) -> "Fingerprints":
    from extraction_dagster.shards.frame_store import frames_fingerprint  # noqa: PLC0415
    from extraction_dagster.stages.catalog.catalog import Fingerprints  # noqa: PLC0415 - imports take time
    from extraction_dagster.stages.embed.models.registry import embedding_fingerprint  # noqa: PLC0415

    return Fingerprints(frames=frames_fingerprint(settings), embedding=embedding_fingerprint(settings))


@contextmanager
def plain_failures() -> Iterator[None]:
    """Show an error of ours as the one clear line that it is, not as a stack of frames."""
    try:
        yield
    except ExtractionError as error:
        raise dg.Failure(
            description=str(error), metadata={"error_type": type(error).__name__}, allow_retries=not error.permanent
        ) from error
