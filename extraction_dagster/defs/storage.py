"""Where the Dagster instance keeps its data: the settings decide, so that one dagster.yaml serves every place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from extraction_dagster.defs.instance.private_api import (
    CapturedLogContext,
    ConfigurableClass,
    ConfigurableClassData,
    DagsterSqliteStorage,
    DagsterStorage,
    LocalArtifactStorage,
    LocalComputeLogManager,
)
from extraction_dagster.permissions import make_private_folder
from extraction_dagster.settings import load_settings


def instance_folder() -> Path:
    """The folder of everything that Dagster writes to disk."""
    return load_settings().home / "dagster"


class _ConfiguredBySettings:
    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Nothing to configure here: the settings decide."""
        return {}


class ExtractionStorage(_ConfiguredBySettings, DagsterStorage, ConfigurableClass):
    """Runs, events, schedules and cursors: PostgreSQL when EXTRACTION_POSTGRES_URL is set, else SQLite under home."""

    @classmethod
    def from_config_value(  # type: ignore[override]  # it opens one of two kinds
        cls,
        inst_data: ConfigurableClassData | None,
        config_value: object,  # noqa: ARG003 - Dagster's signature
    ) -> DagsterStorage[Any]:
        """Open the storage that the settings name.

        Raises:
            DatabaseUrlError: EXTRACTION_POSTGRES_URL is malformed.
        """
        settings = load_settings()
        if settings.postgres_url is None:
            folder = instance_folder()
            make_private_folder(folder)
            with FileLock(folder / "storage.lock"):  # two processes that create the tables at once would collide
                return DagsterSqliteStorage.from_local(str(folder), inst_data=inst_data)
        from dagster_postgres import DagsterPostgresStorage

        from extraction_dagster.stages.catalog.database import parse_url

        url = parse_url(settings.postgres_url.get_secret_value(), setting="EXTRACTION_POSTGRES_URL")
        return DagsterPostgresStorage(url.render_as_string(hide_password=False), inst_data=inst_data)


class ExtractionArtifactStorage(_ConfiguredBySettings, LocalArtifactStorage):
    """Local artifacts, under home."""

    @classmethod
    def from_config_value(
        cls,
        inst_data: ConfigurableClassData | None,
        config_value: object,  # noqa: ARG003 - Dagster's signature
    ) -> "ExtractionArtifactStorage":
        """Use the folder under home."""
        return cls(str(instance_folder()), inst_data=inst_data)


class ExtractionComputeLogManager(_ConfiguredBySettings, LocalComputeLogManager):
    """What steps print, under home."""

    captures = True  # off where a command runs steps in its own process: what they print is on its terminal

    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        """Keep what a step prints."""
        if not self.captures:
            yield CapturedLogContext(log_key)
            return
        with super().capture_logs(log_key) as captured:
            yield captured

    @classmethod
    def from_config_value(
        cls,
        inst_data: ConfigurableClassData | None,
        config_value: object,  # noqa: ARG003 - Dagster's signature
    ) -> "ExtractionComputeLogManager":
        """Use the folder under home."""
        return cls(str(instance_folder() / "storage"), inst_data=inst_data)
