"""The checkpoint that the earlier script left: a JSON file or a table with the last processed id."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import sqlalchemy as sa

from extraction_dagster.checkpoint.atomic_file import read_small
from extraction_dagster.checkpoint.mirrors import CHECKPOINT_TABLE
from extraction_dagster.errors import LegacyCheckpointError
from extraction_dagster.stages.catalog.database import describe, reading

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES = 64 * 1024
_NAMES = ("last_processed_id", "last_id", "id")
_MIN_ID, _MAX_ID = -(2**63), 2**63 - 1


def read_legacy_checkpoint(file: Path | None, engine: sa.Engine) -> int:
    """The last processed id.

    Args:
        file: A file that holds a number, or a JSON object with `last_processed_id`; None to read the table.
        engine: The database of the table `extraction_checkpoint`; of several rows the greatest id counts.

    Raises:
        LegacyCheckpointError: There is none, or it can't be understood.
    """
    return _from_table(engine) if file is None else _from_file(file)


def _from_file(file: Path) -> int:
    try:
        data = read_small(file, max_bytes=_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise LegacyCheckpointError(str(file), f"it can't be read ({error})") from None
    if data is None:
        raise LegacyCheckpointError(str(file), "there is no such file")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise LegacyCheckpointError(str(file), "it is neither JSON nor a number") from None
    if isinstance(value, dict):
        value = next((value[name] for name in _NAMES if name in value), None)
    if type(value) is not int or not _MIN_ID <= value <= _MAX_ID:
        raise LegacyCheckpointError(str(file), "it holds no last_processed_id that is an integer")
    return value


def _from_table(engine: sa.Engine) -> int:
    where = f"table {CHECKPOINT_TABLE.name} at {describe(engine.url)}"
    with reading(engine, what="read the checkpoint table") as connection:
        if not sa.inspect(connection).has_table(CHECKPOINT_TABLE.name):
            raise LegacyCheckpointError(where, "there is no such table")
        value = connection.execute(sa.select(sa.func.max(CHECKPOINT_TABLE.c.id))).scalar_one()
    if value is None:
        raise LegacyCheckpointError(where, "it has no row")
    return int(value)
