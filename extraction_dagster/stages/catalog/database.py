"""Connections to the source's and the state's databases: SQLAlchemy engines that never print a secret."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from extraction_dagster.errors import one_line
from extraction_dagster.errors.catalog import DatabaseUrlError, RightsError, SourceUnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_Item = TypeVar("_Item")
_CHUNK = 500
_TLS = {
    "disable": "never encrypted",
    "allow": "encrypted only if the server insists",
    "prefer": "encrypted if the server can, with whatever certificate",
    "require": "encrypted, with whatever certificate",
    "verify-ca": "encrypted, the certificate's issuer checked",
    "verify-full": "encrypted, the certificate and its host checked",
}
_HIGHEST_PORT = 65535
_DRIVERS = {
    "postgres": "postgresql+psycopg2",
    "postgresql": "postgresql+psycopg2",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
}
# The schema that the state tables name; what it is called in a database is decided where the engine is made.
STATE_SCHEMA = "extraction_state"


def parse_url(url: str, *, setting: str) -> sa.URL:
    """Parse a database URL; a bare `postgresql://` means psycopg2 and `mysql://` PyMySQL, whatever SQLAlchemy means.

    Raises:
        DatabaseUrlError: The text is no SQLAlchemy URL, or part of its password would be read as the host, the port
            or the database's name, and so be shown. The message never holds the text.
    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # ValueError: of a port that is no number; it quotes what it was
        raise DatabaseUrlError(setting) from None
    if parsed.get_backend_name() != "sqlite" and url.partition("?")[0].count("@") > 1:
        raise DatabaseUrlError(setting, odd="holds '@' more than once: write '@' in a user or password as %40")
    if parsed.port is not None and not 0 < parsed.port <= _HIGHEST_PORT:
        raise DatabaseUrlError(setting, odd=f"names port {parsed.port}, expected 1 to {_HIGHEST_PORT}")
    driver = _DRIVERS.get(parsed.drivername)
    return parsed if driver is None else parsed.set(drivername=driver)


def make_engine(url: str, *, setting: str, state_schema: str | None = None) -> sa.Engine:
    """Build an engine: parameters hidden from errors, SQLite with real transactions and patience for other writers.

    Args:
        url: A SQLAlchemy URL.
        setting: Where it comes from, for errors.
        state_schema: The schema in which the state tables lie; the database's default for None.

    Raises:
        DatabaseUrlError: The URL is malformed, or names a database whose driver is not installed.
    """
    parsed = parse_url(url, setting=setting)
    sqlite = parsed.get_backend_name() == "sqlite"
    # SQLite connections are cheap and must not outlive a fork; a server's are kept and tested before use.
    options: dict[str, Any] = {"poolclass": sa.NullPool} if sqlite else {"pool_pre_ping": True}
    try:
        schemas = {"schema_translate_map": {STATE_SCHEMA: state_schema}}
        engine = sa.create_engine(parsed, hide_parameters=True, execution_options=schemas, **options)
    except (ModuleNotFoundError, sa.exc.NoSuchModuleError) as error:
        raise DatabaseUrlError(setting, driver=parsed.drivername) from error
    if sqlite:
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    if parsed.get_backend_name() == "postgresql":
        sa.event.listen(engine, "connect", _prepare_postgresql)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver's own connection
    connection.isolation_level = None  # the driver must not begin transactions of its own
    connection.execute("PRAGMA busy_timeout = 60000")
    connection.execute("PRAGMA foreign_keys = ON")


def _prepare_postgresql(connection: Any, _record: object) -> None:  # noqa: ANN401 - a driver's own connection
    # A version column is compared as text: it must read the same whatever the server's or the role's defaults are.
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'; SET DateStyle TO 'ISO, YMD'")
    connection.commit()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer takes its lock at the start: a transaction that reads first and writes later would fail at once
    # with "database is locked" when another writer came between, however long the time-out.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def reading(engine: sa.Engine, *, what: str) -> Iterator[sa.Connection]:
    """A connection to read with.

    Raises:
        SourceUnreachableError: The database can't be reached or read.
    """
    with _translated(engine, what), engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: sa.Engine, *, what: str) -> Iterator[sa.Connection]:
    """A connection inside one transaction to write with: commits at the end, rolls back on an error.

    Raises:
        SourceUnreachableError: The database can't be reached or written.
    """
    with _translated(engine, what), engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def quiet_reflection() -> Iterator[None]:
    """Look at a table's columns without warnings of types and indexes that SQLAlchemy does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sa.exc.SAWarning)
        yield


def fetch_all(connection: sa.Connection, query: sa.Select[*tuple[Any, ...]]) -> Sequence[sa.Row[*tuple[Any, ...]]]:
    """Every row of a query, whatever bytes its text has: each that is none comes as a lone surrogate.

    One such text in SQLite makes the whole page unreadable otherwise; other databases take none.
    """
    try:
        return connection.execute(query).all()
    except sa.exc.OperationalError as error:
        if not is_undecodable(error):
            raise
    connection.connection.driver_connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")  # type: ignore[union-attr]  # SQLite's own
    return connection.execute(query).all()


def is_undecodable(error: sa.exc.DBAPIError) -> bool:
    """Whether a text in SQLite has bytes that are no UTF-8."""
    return "Could not decode to UTF-8" in str(error.orig)


@contextmanager
def _translated(engine: sa.Engine, what: str) -> Iterator[None]:
    try:
        yield
    except (sa.exc.IntegrityError, sa.exc.DataError):
        raise  # the database works: what it was given is wrong
    except (sa.exc.DatabaseError, sa.exc.InterfaceError) as error:
        if is_undecodable(error):
            raise UnicodeError(" ".join(str(error.orig).split())) from error
        if "permission denied" in str(error.orig) or "read-only transaction" in str(error.orig):
            raise RightsError(
                what, describe(engine.url), one_line(str(error.orig).strip().partition("\n")[0])
            ) from error
        raise SourceUnreachableError(what, describe(engine.url), str(error.orig)) from error


def describe(url: sa.URL) -> str:
    """The database as it may be printed: no user, no password, no query string."""
    bare = sa.URL.create(url.drivername, host=url.host, port=url.port, database=url.database)
    return bare.render_as_string(hide_password=True)


def describe_tls(url: str) -> str:
    """How a connection to PostgreSQL is encrypted, by its sslmode; empty for other databases."""
    parsed = sa.make_url(url)
    if not parsed.drivername.startswith("postgres"):
        return ""
    mode = str(parsed.query.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer")
    return f"sslmode {mode}, {_TLS.get(mode, 'which is unknown')}"


def file_is_there(url: sa.URL) -> bool:
    """Whether a database that is a file is there: SQLite would make one that is only looked at. Servers always are."""
    is_file = url.get_backend_name() == "sqlite" and url.database and not url.database.startswith((":", "file:"))
    return not is_file or Path(str(url.database)).exists()


def chunks(items: Sequence[_Item], size: int = _CHUNK) -> Iterable[Sequence[_Item]]:
    """Ids, or what else a query names, in pieces that fit every database's limit of bound parameters."""
    return (items[start : start + size] for start in range(0, len(items), size))


def is_text(value: object) -> bool:
    """Whether a value that was read holds no byte that was no text."""
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def storable(text: str) -> str:
    """What was read or said, without what no database takes as text."""
    if text.isascii() and "\0" not in text:
        return text
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()
