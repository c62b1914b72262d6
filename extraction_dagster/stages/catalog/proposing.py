"""Look at a database's tables and propose the settings for the one that looks like a table of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from extraction_dagster.errors.catalog import SourceTableError
from extraction_dagster.stages.catalog.database import describe, file_is_there, make_engine, quiet_reflection, reading

if TYPE_CHECKING:
    from collections.abc import Sequence

_OWN = ("extraction_", "alembic_version")
_URIS = (
    "path",
    "uri",
    "url",
    "file_path",
    "filepath",
    "file",
    "filename",
    "video_path",
    "video_url",
    "location",
    "key",
)
_PLATFORMS = ("platform", "source", "site", "service", "channel")
_CODES = ("code", "video_code", "shortcode", "slug", "external_id", "video_id")
_VERSIONS = ("etag", "content_hash", "checksum", "updated_at", "modified_at", "version")
_MARKS = ("is_extracted", "is_embedded")
_MOST_TABLES = 200


@dataclass(frozen=True, slots=True)
class Proposal:
    """A table, why it was chosen, and the lines of `.env` for it; the URL's password is in one of them."""

    table: str
    why: str
    lines: tuple[str, ...]


def propose(url: str) -> Proposal:
    """The likeliest table of a database; nothing is written.

    Raises:
        DatabaseUrlError, SourceUnreachableError: What they say.
        SourceTableError: No table has an integer key and a column for the file's address.
    """
    engine = make_engine(url, setting="--propose")
    if not file_is_there(engine.url):
        raise SourceTableError("?", f"there is no file {describe(engine.url)}", "Correct the URL after --propose.")
    with reading(engine, what="look at the tables") as connection, quiet_reflection():
        inspector, found = sa.inspect(connection), list[tuple[int, str, dict[str, str]]]()
        for name in inspector.get_table_names()[:_MOST_TABLES]:
            if not name.startswith(_OWN):
                key = inspector.get_pk_constraint(name)["constrained_columns"]
                settings = _settings_of(inspector.get_columns(name), key)
                if settings is not None:
                    found.append((sum(map(bool, settings.values())), name, settings))
    engine.dispose()
    if not found:
        why = "no table has an integer primary key and a column for the address of a file"
        raise SourceTableError(describe(engine.url), why, "Set EXTRACTION_SOURCE_TABLE and its columns by hand.")
    _, name, settings = max(found, key=lambda item: (item[0], item[1]))
    lines = {"SOURCE_URL": url, "SOURCE_TABLE": name, **settings}
    why = f"an integer key and {settings['SOURCE_URI_COLUMN']!r}"
    return Proposal(name, why, tuple(f"EXTRACTION_{key}={value}" for key, value in lines.items()))


def _settings_of(columns: Sequence[Any], key: Sequence[str]) -> dict[str, str] | None:
    """The settings for a table of these columns; None where it can hold no videos."""
    kinds = {column["name"]: column["type"] for column in columns}
    uri = _first(kinds, _URIS, sa.String)
    if len(key) != 1 or not isinstance(kinds[key[0]], sa.Integer) or uri is None:
        return None
    chosen = {"SOURCE_ID_COLUMN": key[0], "SOURCE_URI_COLUMN": uri}
    chosen["SOURCE_PLATFORM_COLUMN"] = _first(kinds, _PLATFORMS, sa.String) or ""
    chosen["SOURCE_CODE_COLUMN"] = _first(kinds, _CODES, sa.String) or ""
    for setting, mark in zip(("SOURCE_EXTRACTED_COLUMN", "SOURCE_EMBEDDED_COLUMN"), _MARKS, strict=True):
        chosen[setting] = _first(kinds, (mark,), sa.Boolean) or ""
    if version := _first(kinds, _VERSIONS, sa.types.TypeEngine):
        chosen["SOURCE_VERSION_COLUMN"] = version
    return chosen


def _first(kinds: dict[str, Any], names: Sequence[str], kind: type[Any]) -> str | None:
    lower = {name.lower(): name for name in kinds}
    return next((lower[name] for name in names if name in lower and isinstance(kinds[lower[name]], kind)), None)
