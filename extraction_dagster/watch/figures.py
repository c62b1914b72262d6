"""The figures of the metrics beside `Progress`; `exposition.py` gives them their names.

Most cost the same whatever the table's size and are taken at each scrape. The census counts every row: it is taken now
and then, and says when.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from extraction_dagster.ticks.memory import recall_text, remember_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    import sqlalchemy as sa

    from extraction_dagster.watch.progress_record import Progress

_CENSUS_KEY = "metrics_census"


@dataclass(frozen=True, slots=True)
class InstanceFigures:
    """What Dagster's instance says.

    Attributes:
        cursor: The sensor's cursor as it is stored; None before the first tick.
        runs: Runs that have not ended, by status.
        ended_runs: Runs that ended within the last hour, by status.
        last_tick_at: When the sensor last ticked, in seconds since the epoch; None before the first tick.
        is_switched_on: Whether the sensor is on: it was not stopped.
        daemons: Whether each daemon that is needed lives.
        rates: Videos, frames and points a second, of those that were made lately.
    """

    cursor: str | None
    runs: Mapping[str, int]
    ended_runs: Mapping[str, int]
    last_tick_at: float | None
    is_switched_on: bool
    daemons: Mapping[str, bool]
    rates: Mapping[str, float]


class MirrorFigures(NamedTuple):
    """The mirror of the checkpoint: ok, missing, behind, ahead, corrupt or unreachable; and its last processed id."""

    state: str
    last_processed_id: int | None


@dataclass(frozen=True, slots=True)
class Census:
    """Every row counted.

    Attributes:
        taken_at: When, in seconds since the epoch.
        seconds: How long it took.
        rows: Eligible rows by state: done, pending.
        lag_rows: Eligible rows above the watermark and the floor.
        frames: Stored frames of the rows that are done.
        points: Verified points of the rows that are done.
        errors: Errors ever recorded, by stage and type.
        collection_points: What the collection holds; None when it could not be asked.
        collection_counted_at: When it was last asked; None when it never could be.
        collection_is_up: Whether the collection could be asked, or is merely held by a run.
    """

    taken_at: float
    seconds: float
    rows: Mapping[str, int]
    lag_rows: int
    frames: int
    points: int
    errors: Mapping[tuple[str, str], int] = field(default_factory=dict)
    collection_points: int | None = None
    collection_counted_at: float | None = None
    collection_is_up: bool = True


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that one scrape shows; what could not be read is None.

    Attributes:
        at: When, in seconds since the epoch.
        seconds: How long it took, without the census.
        parts: Whether each part could be read: table, dagster, cursor, and mirror where there is one.
        instance: Dagster's part.
        progress: The part of the table, the ledger and the cursor.
        mirror: The mirror's part.
    """

    at: float
    seconds: float
    parts: Mapping[str, bool]
    instance: InstanceFigures | None = None
    progress: Progress | None = None
    mirror: MirrorFigures | None = None


def recall_census(engine: sa.Engine) -> Census | None:
    """The newest census, for a cron job has no other memory; None when there is none that can be read."""
    try:
        values = json.loads(recall_text(engine, _CENSUS_KEY) or "")
        errors = {(str(stage), str(kind)): int(number) for stage, kind, number in values.pop("errors")}
        return Census(**values, errors=errors)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def remember_census(engine: sa.Engine, census: Census) -> None:
    """Keep a census for the next call."""
    errors = [[stage, kind, number] for (stage, kind), number in census.errors.items()]
    remember_text(engine, _CENSUS_KEY, json.dumps({**asdict(census), "errors": errors}))
