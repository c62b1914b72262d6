"""What the metrics keep from one call to the next, in the state database: a cron job has no other memory.

None of it matters for what is right: what can't be read is counted anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from extraction_dagster.ticks.memory import recall_text, remember_text
from extraction_dagster.watch.figures import Census
from extraction_dagster.watch.how_far import ProgressMemory

if TYPE_CHECKING:
    import sqlalchemy as sa

_CENSUS_KEY = "metrics_census"
_LOOKS_KEY = "metrics_looks"


def recall_looks(engine: sa.Engine) -> ProgressMemory:
    """What the looks before remember of where the watermark was, and since when."""
    return ProgressMemory.from_json(recall_text(engine, _LOOKS_KEY) or "")


def remember_looks(engine: sa.Engine, memory: ProgressMemory) -> None:
    """Keep it for the next look; the charts in Dagster's UI have a memory of their own."""
    remember_text(engine, _LOOKS_KEY, memory.to_json())


def recall_census(engine: sa.Engine) -> Census | None:
    """The newest census; None when there is none that can be read."""
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
