"""Signs of life of runs, in the state database: each run says every so often that its process lives.

A host's name and a process id say nothing once the host is gone: a container's successor has another name. The moments
are by the database's clock, so that those of two machines can be compared. A run that gave no sign for
EXTRACTION_DEAD_AFTER_SECONDS is taken for dead; should it live after all, it writes nothing that others have claimed.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import sqlalchemy as sa

from extraction_dagster.errors import ExtractionError
from extraction_dagster.stages.catalog.database import reading, writing
from extraction_dagster.stages.catalog.state_tables import META_TABLE, write_meta

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger(__name__)
_PREFIX = "alive:"
_SIGNS = 5  # in the time after which a run is taken for dead: one that is late ends no run
_LONGEST_SECONDS = 60.0
_KEPT_SECONDS = 7 * 86_400
_NOW = sa.cast(sa.extract("epoch", sa.func.current_timestamp()), sa.BigInteger)


@contextmanager
def signs_of_life(engine: sa.Engine, run_id: str, *, dead_after_seconds: float) -> Iterator[None]:
    """Give signs of life of a run, at once and then from a thread, until the block ends."""
    stopped, pause = threading.Event(), min(dead_after_seconds / _SIGNS, _LONGEST_SECONDS)

    def go_on() -> None:
        while not stopped.wait(pause):
            try:
                give_sign(engine, run_id)
            except ExtractionError as error:  # the database is away: the step itself says so when it needs it
                _log.debug("No sign of life was given: %s", error)

    give_sign(engine, run_id, first=True)
    thread = threading.Thread(target=go_on, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        with suppress(ExtractionError):  # a sign that stays is removed by a later run
            forget_sign(engine, run_id)


def give_sign(engine: sa.Engine, run_id: str, *, first: bool = False) -> None:
    """Say that a run lives now, by the database's clock; the first of them removes what killed runs left long ago."""
    with writing(engine, what="say that a run is alive") as connection:
        now = int(connection.execute(sa.select(_NOW)).scalar_one())
        write_meta(connection, {f"{_PREFIX}{run_id}": str(now)})
        if first:
            is_old = sa.and_(META_TABLE.c.key.startswith(_PREFIX), META_TABLE.c.value < str(now - _KEPT_SECONDS))
            connection.execute(sa.delete(META_TABLE).where(is_old))


def silences(engine: sa.Engine) -> dict[str, float]:
    """For how many seconds each run that ever gave a sign, and was not forgotten, has given none."""
    query = sa.select(META_TABLE.c.key, META_TABLE.c.value, _NOW).where(META_TABLE.c.key.startswith(_PREFIX))
    with reading(engine, what="read the runs' signs of life") as connection:
        rows = connection.execute(query).all()
    return {key.removeprefix(_PREFIX): float(now - int(moment)) for key, moment, now in rows if moment.isdecimal()}


def forget_sign(engine: sa.Engine, run_id: str) -> None:
    """Remove the sign of a run whose step is over."""
    with writing(engine, what="forget a run's signs of life") as connection:
        connection.execute(sa.delete(META_TABLE).where(META_TABLE.c.key == f"{_PREFIX}{run_id}"))
