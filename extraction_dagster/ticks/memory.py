"""What ticks remember from one to the next, kept in the state database: a daemon loads its code each minute.

None of it matters for what is right, only for when: what can't be read is forgotten.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from extraction_dagster.errors import PartitionKeyError
from extraction_dagster.records import IdRange
from extraction_dagster.stages.catalog.changes import Place
from extraction_dagster.stages.catalog.database import reading, writing
from extraction_dagster.stages.catalog.state_tables import META_TABLE, write_meta
from extraction_dagster.ticks.cursor import is_id
from extraction_dagster.ticks.places import History, Patience

_KEY = "sensor_memory"


@dataclass(slots=True)
class Order:
    """Where the looks in the order of versions are, and how far the round behind them came.

    Attributes:
        key: The column and the operator's last word that it is about; another one begins anew.
        newest: Rows up to here were looked at; never a version of the future.
        ahead: Rows of the future up to here were looked at as well.
        once_more: Where the look for late commits goes on.
        round_after_id: Where the round, which compares every row, goes on.
        is_whole: Whether a whole round ended since the looks began: then they have seen every change.
        found_rows: Whether the round found rows after that, which the looks had not seen.
    """

    key: str = ""
    newest: Place | None = None
    ahead: Place | None = None
    once_more: Place | None = None
    round_after_id: int | None = None
    is_whole: bool = False
    found_rows: bool = False

    def to_values(self) -> list[Any]:
        """As JSON has it."""
        places = [None if place is None else [place.version, place.record_id] for place in self._places()]
        return [self.key, *places, self.round_after_id, self.is_whole, self.found_rows]

    @classmethod
    def from_values(cls, values: Any) -> Order:  # noqa: ANN401 - whatever is kept
        """Read what is kept; begins anew where it can't be read."""
        try:
            key, *places, after_id, is_whole, found_rows = values
            newest, ahead, once_more = (None if place is None else _place(*place) for place in places)
            if after_id is not None and not is_id(after_id):
                return cls()
            return cls(str(key), newest, ahead, once_more, after_id, is_whole is True, found_rows is True)
        except (ValueError, TypeError):
            return cls()

    def _places(self) -> tuple[Place | None, ...]:
        return self.newest, self.ahead, self.once_more


def _place(version: object, record_id: object) -> Place:
    is_version = isinstance(version, str | int | float) and not isinstance(version, bool)
    if not is_version or not (record_id is None or is_id(record_id)):
        raise ValueError(f"{version!r} and {record_id!r} are no place")
    return Place(version, record_id)  # type: ignore[arg-type]  # just looked at


@dataclass(slots=True)
class Memory:
    """What a tick remembers of those before.

    Attributes:
        patience: Since when rows wait for their range to fill, and which ranges back off.
        ticks: Ticks so far.
        sweep_after_id: Where the look through the rows below the watermark goes on.
        sweep_found_rows: Whether that look found pending rows last time: they may still wait for their turn.
        window_after_id: Where the look between the watermark and the frontier goes on, which begins at the watermark.
        ahead_after_id: Where the look above the frontier goes on while it can't move the frontier.
        address_after_id: Where the look at the addresses of rows that are done goes on.
        order: Where the looks in the order of versions are.
    """

    patience: Patience = field(default_factory=Patience)
    ticks: int = 0
    sweep_after_id: int | None = None
    sweep_found_rows: bool = False
    window_after_id: int | None = None
    ahead_after_id: int | None = None
    address_after_id: int | None = None
    order: Order = field(default_factory=Order)

    def to_json(self) -> str:
        """As it is kept."""
        patience = self.patience
        failing = {
            item.partition_key: [history.failures_in_a_row, history.ended_at.isoformat()]
            for item, history in patience.failing.items()
            if history.ended_at is not None
        }
        values = {
            "since": {kind: moment.isoformat() for kind, moment in patience.since.items()},
            "failing": failing,
            "ticks": self.ticks,
            "again": self.sweep_found_rows,
            "order": self.order.to_values(),
            **{name: getattr(self, attribute) for name, attribute in _PLACES.items()},
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Memory:
        """Read what is kept, by an earlier release too; nothing is remembered when it can't be read."""
        try:
            values = json.loads(text)
            since = {str(kind): datetime.fromisoformat(moment) for kind, moment in values["since"].items()}
            failing = {
                IdRange.parse(key): History(int(number), datetime.fromisoformat(ended_at))
                for key, (number, ended_at) in values.get("failing", {}).items()
            }
            places = {
                attribute: None if values.get(name) is None else int(values[name])
                for name, attribute in _PLACES.items()
            }
            order = Order.from_values(values.get("order"))
            ticks, again = int(values["ticks"]), bool(values["again"])
            return cls(Patience(since, failing), ticks, sweep_found_rows=again, order=order, **places)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, PartitionKeyError, RecursionError):
            return cls()


# Where looks go on: the names under which these are kept.
_PLACES = {
    "after": "sweep_after_id",
    "window_after": "window_after_id",
    "ahead_after": "ahead_after_id",
    "address_after": "address_after_id",
}


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
