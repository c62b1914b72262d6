"""Which source table it is: a mark that stands with everything made of it, whichever way its address is written.

    postgresql://DB.example:5432/videos     postgresql://db.example/videos      one address
    sqlite:///source.db                     sqlite:////work/source.db           one file, seen from /work

A database that moved has another address. `extraction init --take-over` then notes its earlier marks in the state
tables, and they count as the present one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from extraction_dagster.records import fingerprint
from extraction_dagster.stages.catalog.database import describe, parse_url

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import sqlalchemy as sa

    from extraction_dagster.settings import Settings

_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}


class SourceMark(str):  # noqa: SLOT000 - a str can't have slots of its own
    """16 hex digits that tell a source from another; equal to each other mark that the same source has had.

    Its hash is that of its own digits: look marks up in lists, never in sets.
    """

    also: frozenset[str]

    def __new__(cls, mark: str, also: Iterable[str] = ()) -> Self:
        """The mark, and those that mean the same."""
        made = super().__new__(cls, mark)
        made.also = frozenset(map(str, also)) - {str(mark)}
        return made

    def __eq__(self, other: object) -> bool:
        """Whether another mark names the same source."""
        return str.__eq__(self, other) is True or (isinstance(other, str) and str(other) in self.also)

    def __ne__(self, other: object) -> bool:
        """Whether it names another."""
        return not self == other

    __hash__ = str.__hash__

    def with_former(self, marks: Iterable[str]) -> SourceMark:
        """The mark, to which earlier ones count as equal."""
        return SourceMark(str(self), {*self.also, *marks})


def source_identity(settings: Settings) -> SourceMark:
    """A source's mark from the settings alone: the database without its credentials, the table, the id column.

    Raises:
        DatabaseUrlError: The source's URL is malformed.
    """
    url = parse_url(settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
    first, *others = (
        fingerprint(url=describe(spelled), table=table_name(settings), id_column=settings.source_id_column)
        for spelled in _spellings(url)
    )
    return SourceMark(first, others)


def table_name(settings: Settings) -> str:
    """The source table's name, with its schema where one is set."""
    return ".".join(filter(None, (settings.source_schema, settings.source_table)))


def told(settings: Settings) -> str:
    """The source in words, for people: `table 'videos' in postgresql://db/media`."""
    url = parse_url(settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
    return f"table {table_name(settings)!r} in {describe(next(_spellings(url)))}"


def is_same_database(one: str, other: str) -> bool:
    """Whether two URLs, of which one may be written another way, open the same database as the same user."""
    if one == other:
        return True
    urls = [parse_url(url, setting="EXTRACTION_STATE_URL") for url in (one, other)]
    return next(_spellings(urls[0])) == next(_spellings(urls[1]))


def _spellings(url: sa.URL) -> Iterator[sa.URL]:
    """A database's URL as it is kept, then the ways in which people and earlier releases have written it."""
    backend = url.get_backend_name()
    if backend == "sqlite":
        file = url.database
        if not file or file == ":memory:" or file.startswith("file:"):
            yield url
            return
        yield url.set(database=os.path.abspath(file))  # noqa: PTH100 - links are not followed
        yield url
        yield url.set(database=os.path.relpath(file))
        return
    port = _DEFAULT_PORTS.get(backend)
    plain = url.set(host=url.host.lower()) if url.host else url
    yield plain._replace(port=None) if plain.port == port else plain
    yield url
    if url.port in {None, port}:
        yield url._replace(port=None)
        yield plain._replace(port=port)
