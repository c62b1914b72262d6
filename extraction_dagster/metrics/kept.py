"""What the metrics keep from one call to the next, in the state database: a cron job has no other memory.

None of it matters for what is right: what can't be read is counted anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from extraction_dagster.metrics.figures import Census
from extraction_dagster.stages.catalog.database import reading, writing
from extraction_dagster.stages.catalog.state_tables import META_TABLE

if TYPE_CHECKING:
    from collections.abc import Callable

_Kept = TypeVar("_Kept")
_CENSUS_KEY = "metrics_census"
_WATERMARK_KEY = "metrics_watermark"


@dataclass(frozen=True, slots=True)
class Seen:
    """Where the watermark was seen, and since when.

    Attributes:
        last_processed_id: The watermark.
        moved_at: When it was first seen there, or when nothing was left to do for the last time.
    """

    last_processed_id: int | None
    moved_at: float


def recall_seen(engine: sa.Engine) -> Seen | None:
    """Where the watermark was seen last."""

    def read(values: Any) -> Seen:  # noqa: ANN401 - any JSON document
        last = values["last_processed_id"]
        return Seen(None if last is None else int(last), float(values["moved_at"]))

    return _recall(engine, _WATERMARK_KEY, read)


def remember_seen(engine: sa.Engine, seen: Seen) -> None:
    """Keep where the watermark was seen."""
    _remember(engine, _WATERMARK_KEY, asdict(seen))


def recall_census(engine: sa.Engine) -> Census | None:
    """The newest census."""

    def read(values: Any) -> Census:  # noqa: ANN401 - any JSON document
        errors = {(str(stage), str(kind)): int(number) for stage, kind, number in values.pop("errors")}
        return Census(**values, errors=errors)

    return _recall(engine, _CENSUS_KEY, read)


def remember_census(engine: sa.Engine, census: Census) -> None:
    """Keep a census for the next call."""
    errors = [[stage, kind, number] for (stage, kind), number in census.errors.items()]
    _remember(engine, _CENSUS_KEY, {**asdict(census), "errors": errors})


def _recall(engine: sa.Engine, key: str, read: Callable[[Any], _Kept]) -> _Kept | None:
    with reading(engine, what="read the state tables") as connection:
        text = connection.execute(sa.select(META_TABLE.c.value).where(META_TABLE.c.key == key)).scalar_one_or_none()
    try:
        return None if text is None else read(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _remember(engine: sa.Engine, key: str, values: dict[str, Any]) -> None:
    with writing(engine, what="write the state tables") as connection:
        connection.execute(sa.delete(META_TABLE).where(META_TABLE.c.key == key))
        connection.execute(sa.insert(META_TABLE).values(key=key, value=json.dumps(values)))
