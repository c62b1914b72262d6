"""The checkpoint that the earlier script left: a JSON file or a table with the last processed id."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from extraction_dagster.errors.ticks import LegacyCheckpointError
from extraction_dagster.files import read_small
from extraction_dagster.stages.catalog.database import describe, reading
from extraction_dagster.ticks.mirrors import CHECKPOINT_TABLE
from extraction_dagster.ticks.strict_json import parse_strictly

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MAX_BYTES = 64 * 1024
_NAMES = ("last_processed_id", "last_id", "id")
_MIN_ID, _MAX_ID = -(2**63), 2**63 - 1


def read_legacy_checkpoint(file: Path | None, *engines: sa.Engine) -> int:
    """The last processed id.

    Args:
        file: A file that holds a number, or a JSON object with `last_processed_id`; None to read the table.
        engines: Databases that may have the table `extraction_checkpoint`; the first that has it is asked, and of
            several rows the greatest id counts.

    Raises:
        LegacyCheckpointError: There is none, or it can't be understood.
    """
    return _from_table(engines) if file is None else _from_file(file)


def _from_file(file: Path) -> int:
    try:
        data = read_small(file, max_bytes=_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise LegacyCheckpointError(str(file), f"it can't be read ({error})") from None
    if data is None:
        raise LegacyCheckpointError(str(file), "there is no such file")
    try:
        value = parse_strictly(data)
    except ValueError:
        raise LegacyCheckpointError(str(file), "it is neither JSON nor a number") from None
    if isinstance(value, dict):
        value = next((value[name] for name in _NAMES if name in value), None)
    if type(value) is not int or not _MIN_ID <= value <= _MAX_ID:
        raise LegacyCheckpointError(str(file), "it holds no last_processed_id that is an integer")
    return value


def _from_table(engines: Sequence[sa.Engine]) -> int:
    for engine in engines:
        with reading(engine, what="read the checkpoint table") as connection:
            if not sa.inspect(connection).has_table(CHECKPOINT_TABLE.name):
                continue
            value = connection.execute(sa.select(sa.func.max(CHECKPOINT_TABLE.c.id))).scalar_one()
        if type(value) is int:
            return value
        why = "it has no row" if value is None else "it holds an id that is no integer"
        raise LegacyCheckpointError(_place(engine), why)
    raise LegacyCheckpointError(" or ".join(dict.fromkeys(map(_place, engines))), "there is no such table")


def _place(engine: sa.Engine) -> str:
    return f"table {CHECKPOINT_TABLE.name} at {describe(engine.url)}"
