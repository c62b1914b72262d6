"""The resource that assets work with: the settings of the process that runs them, and what is opened by them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dagster as dg

from extraction_dagster.errors import ExtractionError
from extraction_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.catalog import Catalog, Fingerprints
    from extraction_dagster.stages.decode.frame_store import FrameStore
    from extraction_dagster.stages.embed.embedding_store import EmbeddingStore


class Extraction(dg.ConfigurableResource):  # type: ignore[type-arg]  # not generic for its users
    """Opens the catalog and the stores as the settings say; nothing is opened before a step asks for it."""

    @property
    def settings(self) -> Settings:
        """Every setting, read from the environment of this process."""
        return load_settings()

    @property
    def fingerprints(self) -> "Fingerprints":
        """What the frames and vectors of today are made with."""
        from extraction_dagster.stages.catalog.catalog import Fingerprints  # noqa: PLC0415 - imports take time
        from extraction_dagster.stages.decode.frame_store import frames_fingerprint  # noqa: PLC0415
        from extraction_dagster.stages.embed.model import embedding_fingerprint  # noqa: PLC0415

        settings = self.settings
        return Fingerprints(frames=frames_fingerprint(settings), embedding=embedding_fingerprint(settings))

    @contextmanager
    def catalog(self) -> Iterator["Catalog"]:
        """The source table and the ledger."""
        from extraction_dagster.stages.catalog.catalog import open_catalog  # noqa: PLC0415

        with open_catalog(self.settings) as catalog:
            yield catalog

    def frame_store(self) -> "FrameStore":
        """The frames made with the settings of today."""
        from extraction_dagster.stages.decode.frame_store import FrameStore  # noqa: PLC0415

        return FrameStore(self.settings.resolved_frames_uri, self.fingerprints.frames)

    def embedding_store(self) -> "EmbeddingStore":
        """The vectors made with the settings of today, from the frames of today."""
        from extraction_dagster.stages.embed.embedding_store import EmbeddingStore  # noqa: PLC0415

        made_with = self.fingerprints
        return EmbeddingStore(self.settings.resolved_embeddings_uri, f"{made_with.frames}-{made_with.embedding}")


@contextmanager
def plain_failures() -> Iterator[None]:
    """Show an error of ours as the one clear line that it is, not as a stack of frames."""
    try:
        yield
    except ExtractionError as error:
        raise dg.Failure(
            description=str(error), metadata={"error_type": type(error).__name__}, allow_retries=not error.permanent
        ) from error
