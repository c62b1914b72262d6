"""What ticks remember from one to the next, kept in the state database: a daemon loads its code each minute.

None of it matters for what is right, only for when: what can't be read is forgotten.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime

import sqlalchemy as sa

from extraction_dagster.stages.catalog.database import reading, writing
from extraction_dagster.stages.catalog.state_tables import META_TABLE, write_meta
from extraction_dagster.ticks.planner import Patience

_KEY = "sensor_memory"


@dataclass(slots=True)
class Memory:
    """What a tick remembers of those before.

    Attributes:
        patience: Since when rows wait for their range to fill.
        ticks: Ticks so far.
        sweep_after_id: Where the look through the rows below the watermark goes on.
        sweep_found_rows: Whether that look found pending rows last time: they may still wait for their turn.
    """

    patience: Patience = field(default_factory=Patience)
    ticks: int = 0
    sweep_after_id: int | None = None
    sweep_found_rows: bool = False

    def to_json(self) -> str:
        """As it is kept."""
        since = {kind: moment.isoformat() for kind, moment in self.patience.since.items()}
        values = {"since": since, "ticks": self.ticks, "after": self.sweep_after_id, "again": self.sweep_found_rows}
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Memory:
        """Read what is kept; nothing is remembered when it can't be read."""
        try:
            values = json.loads(text)
            since = {str(kind): datetime.fromisoformat(moment) for kind, moment in values["since"].items()}
            after = None if values["after"] is None else int(values["after"])
            return cls(Patience(since), int(values["ticks"]), after, bool(values["again"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls()


def recall(engine: sa.Engine) -> Memory:
    """What the last tick left."""
    kept = recall_text(engine, _KEY)
    return Memory() if kept is None else Memory.from_json(kept)


def remember(engine: sa.Engine, memory: Memory) -> None:
    """Keep it for the next tick."""
    remember_text(engine, _KEY, memory.to_json())


def recall_text(engine: sa.Engine, key: str) -> str | None:
    """What is kept under a key."""
    query = sa.select(META_TABLE.c.value).where(META_TABLE.c.key == key)
    with reading(engine, what="read the state tables") as connection:
        kept: str | None = connection.execute(query).scalar_one_or_none()
    return kept


def remember_text(engine: sa.Engine, key: str, text: str) -> None:
    """Keep a text under a key."""
    with writing(engine, what="write the state tables") as connection:
        write_meta(connection, {key: text})
